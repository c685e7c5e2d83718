"""The report: one self-contained HTML file, and its figures as files beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from stagewise.report.contents import Plate, Section, sections
from stagewise.report.files import inline_svg, write_figure
from stagewise.report.findings import findings
from stagewise.report.results import Results


def write_report(results: Results, folder: Path | str) -> Path:
    """Write ``report.html`` and ``figures/`` (SVG, PNG, PDF) into the folder; older ones are replaced.

    The page needs nothing but itself: no network, no scripts, no files beside it. All text of the data is escaped.

    Args:
        results: what to report.
        folder: is made if it is not there.

    Returns:
        The path of the page.
    """
    folder = Path(folder)
    parts = sections(results)
    drawn = [plate for section in parts for plate in section.parts if isinstance(plate, Plate)]
    svgs = {}
    for plate in drawn:
        if plate.figure is not None:
            svg = write_figure(plate.figure, folder / "figures", plate.name)[0]
            svgs[plate.name] = inline_svg(svg.read_text(encoding="utf-8"), plate.name, plate.caption)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "report.html"
    page.write_text(_render(results, parts, svgs), encoding="utf-8")
    return page


def _render(results: Results, parts: list[Section], svgs: Mapping[str, Markup]) -> str:
    # Autoescape always: by default jinja2 decides by the name of the template.
    environment = Environment(
        loader=PackageLoader("stagewise.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        title=results.title,
        findings=findings(results),
        sections=parts,
        svgs=svgs,
        window=None if results.influence is None else results.influence.attrs.get("window"),
        config=_yaml(results.config),
        provenance=_yaml(results.provenance),
    )


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True).strip() if values else ""
