"""Reports that are drawn in a hurry, where a test is about something else than how they look."""


class Empty:
    """A canvas that writes empty files."""

    def __init__(self, _figure):
        pass

    def print_pdf(self, path, **_settings):
        path.touch()

    print_png = print_pdf


def without_files_for_papers(set_attribute=setattr) -> None:
    """From now on reports have empty PNG and PDF files beside them, and figures as they are drawn before the layout.

    Fonts and layout are most of the time of a report.
    """
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    from stagewise.reporting import files

    set_attribute(ConstrainedLayoutEngine, "execute", lambda _engine, _figure: None)
    set_attribute(files, "FigureCanvasPdf", Empty)
    set_attribute(files, "FigureCanvasAgg", Empty)
