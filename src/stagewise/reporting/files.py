"""A figure as files, and as a piece of a page."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from stagewise.reporting.style import STYLE

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_PIXELS_PER_POINT = 100 / 72
_DPI = 200

ET.register_namespace("", _SVG)
ET.register_namespace("xlink", _XLINK)


def write_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``name.svg``, ``name.png`` and ``name.pdf`` into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    svg, png, pdf = paths = [folder / f"{name}.{suffix}" for suffix in ("svg", "png", "pdf")]
    # The canvases' own methods: savefig would lay the figure out and draw it once more for each of them.
    # Neither dates nor versions: the same results give the same files.
    canvases: tuple[Any, Any, Any] = (FigureCanvasSVG(figure), FigureCanvasPdf(figure), FigureCanvasAgg(figure))
    with matplotlib.rc_context(STYLE):
        canvases[0].print_svg(svg, metadata={"Date": None, "Creator": None})
        canvases[1].print_pdf(pdf, metadata={"CreationDate": None, "Creator": None, "Producer": None})
        figure.dpi = _DPI
        canvases[2].print_png(png, metadata={"Software": None})
    return paths


def inline_svg(svg: str, name: str, title: str) -> Markup:
    """An SVG file of matplotlib as an ``<svg>`` element that can stand in a page beside others.

    Every id gets the prefix ``name``, so that those of several figures cannot clash; style sheets and metadata,
    which would reach beyond the figure, are left out. Texts of the data are escaped.

    Args:
        svg: content of the file.
        name: unique on the page; letters, digits and hyphens.
        title: what the figure shows, for those who cannot see it.
    """
    root = ET.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
        for key, value in parent.attrib.items():
            parent.set(key, _prefixed(key, value, name))
    root.set("width", f"{float(root.attrib['width'].removesuffix('pt')) * _PIXELS_PER_POINT:.0f}")
    del root.attrib["height"]
    root.set("role", "img")
    root.set("aria-label", title)
    return Markup(ET.tostring(root, encoding="unicode"))


def _prefixed(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key.endswith("href"):
        return re.sub(r"^#", f"#{name}-", value)
    return re.sub(r"url\(#", f"url(#{name}-", value)
