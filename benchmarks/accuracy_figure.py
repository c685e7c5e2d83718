"""Error against gradients, drawn: the figure of accuracy_per_gradient.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, StrMethodFormatter

from stagewise.reporting import style

ALONE, FIRST_ORDER = "solve alone", "first order"
"""The row of the solve, and how the names of those end that rest on it."""

_GRADIENTS, _ERRORS = (300, 1_000, 4_000, 16_000, 64_000), (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)


class Compared(NamedTuple):
    """Errors at one checkpoint.

    Attributes:
        title: of the checkpoint.
        judged: what the errors are from.
        rows: by sampler, relative error by the gradients spent on the chains.
        solve: gradients of the solve to first order.
        remarks: on some of the rows.
    """

    title: str
    judged: str
    rows: Mapping[str, Mapping[int, float]]
    solve: int
    remarks: Mapping[str, str]

    def spent(self, row: str, gradients: int) -> int:
        """With those of the solve, where the row rests on it."""
        if row == ALONE:
            return self.solve
        return gradients + self.solve * row.endswith(FIRST_ORDER)


@style.styled
def error_against_gradients(found: Sequence[Compared]) -> Figure:
    """A panel for every checkpoint."""
    figure = style.canvas(3.6)
    axes = figure.subplots(1, len(found), sharex=True, sharey=True, squeeze=False)[0]
    colours = style.colours([*found[0].rows])
    for ax, one in zip(axes, found, strict=True):
        for (name, errors), colour in zip(one.rows.items(), colours.values(), strict=True):
            points = {one.spent(name, gradients): error for gradients, error in errors.items()}
            ax.plot([*points], [*points.values()], color=colour, marker="o" if len(points) > 1 else "D", markersize=4)
        ax.set_title(one.title.partition(", W")[0])
        ax.loglog()
        for axis, ticks, text in ((ax.xaxis, _GRADIENTS, "{x:,.0f}"), (ax.yaxis, _ERRORS, "{x:g}")):
            axis.set_major_formatter(StrMethodFormatter(text))
            axis.set_minor_locator(NullLocator())
            low, high = axis.get_view_interval()
            axis.set_ticks([tick for tick in ticks if low <= tick <= high])
    figure.legend(axes[0].lines, [*found[0].rows], loc="outside upper center", ncols=4, frameon=False)
    style.name_axes(figure, "gradients of the mean loss, the solve's among them", "error, relative to the influence")
    return figure
