"""The results of a run as one page that can be read anywhere, and as figures for print.

``figures``, ``check_figures`` and ``exemplar_figure`` draw :class:`stagewise.results.Results`, ``findings`` puts them
in words, ``contents`` puts all in order, ``page`` writes any page. This room only shows: it samples nothing and
estimates nothing. It is not called ``report``, because ``stagewise.report`` is a function.
"""

from stagewise.reporting.contents import write_report

__all__ = ["write_report"]
