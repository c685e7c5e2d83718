"""A page: findings, figures and tables as one self-contained HTML file, and the figures as files beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from stagewise.reporting.files import inline_svg, write_figure
from stagewise.reporting.passages import Passages
from stagewise.reporting.tables import Table


@dataclass(frozen=True)
class Plate:
    """A figure with its caption.

    Attributes:
        name: of its files, and of its anchor on a page.
        caption: what the figure shows, or why there is none.
        figure: None if its data are missing.
    """

    name: str
    caption: str
    figure: Figure | None = None


@dataclass(frozen=True)
class Section:
    """A part of the report: its figures, tables and passages in the order of reading."""

    title: str
    parts: Sequence[Plate | Table | Passages]


@dataclass(frozen=True)
class Page:
    """All that stands on a page; plain text, which is escaped.

    Attributes:
        title: headline.
        when: when the weight is changed in the definition of influence, e.g. ``"during 30 training steps"``.
        findings: what was found, a sentence or two each.
        sections: figures, tables and passages.
        configuration: plain values.
        provenance: the same.
        member: of what unit weight is: a sample, or a token.
        explorer: address, from this page, of the one to look around in; None if there is none.
    """

    title: str
    when: str
    findings: Sequence[str]
    sections: Sequence[Section]
    configuration: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    member: str = "sample"
    explorer: str | None = None


def write_page(page: Page, folder: Path | str) -> Path:
    """Write ``report.html`` and ``figures/`` (SVG, PNG, PDF) into the folder; older ones are replaced.

    The page needs nothing but itself: no network, no scripts, no files beside it. All text of the data is escaped.

    Args:
        page: what to show.
        folder: is made if it is not there.

    Returns:
        The path of the page.
    """
    folder = Path(folder)
    drawn = [plate for section in page.sections for plate in section.parts if isinstance(plate, Plate)]
    svgs = {}
    for plate in drawn:
        if plate.figure is not None:
            svg = write_figure(plate.figure, folder / "figures", plate.name)[0]
            svgs[plate.name] = inline_svg(svg.read_text(encoding="utf-8"), plate.name, plate.caption)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    path.write_text(_render(page, svgs), encoding="utf-8")
    return path


def _render(page: Page, svgs: Mapping[str, Markup]) -> str:
    # Autoescape always: by default jinja2 decides by the name of the template.
    environment = Environment(
        loader=PackageLoader("stagewise.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        page=page, svgs=svgs, config=_yaml(page.configuration), provenance=_yaml(page.provenance)
    )


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True).strip() if values else ""
