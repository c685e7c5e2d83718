"""Reports that are drawn in a hurry, where a test is about something else than how they look."""

from pathlib import Path

NOTHING = '<svg xmlns="http://www.w3.org/2000/svg" width="1pt" height="1pt"/>'


class Empty:
    """A canvas that writes empty pictures."""

    def __init__(self, _figure):
        pass

    def print_svg(self, path, **_settings):
        Path(path).write_text(NOTHING)

    print_png = print_pdf = print_svg


def without_pictures(set_attribute=setattr) -> None:
    """From now on figures are made for reports and not drawn: fonts, layout and drawing are most of the time of one."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    from stagewise.reporting import files

    set_attribute(ConstrainedLayoutEngine, "execute", lambda _engine, _figure: None)
    for canvas in ("FigureCanvasSVG", "FigureCanvasPdf", "FigureCanvasAgg"):
        set_attribute(files, canvas, Empty)
