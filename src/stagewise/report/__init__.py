"""The results of a run as one page that can be read anywhere, and as figures for print.

``results`` holds the data, ``figures``, ``check_figures`` and ``exemplar_figure`` draw them, ``findings`` puts them
in words, ``contents`` puts all in order, ``page`` writes any page. This room only shows: it samples nothing and
estimates nothing.
"""

from stagewise.report.contents import write_report
from stagewise.report.results import Exemplar, Results

__all__ = ["Exemplar", "Results", "write_report"]
