"""Influence in two times: of an item shown at one time, on what is known of another at a later one."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from stagewise.reporting import style, triangle_figure
from stagewise.reporting.page import Plate, Section
from stagewise.studies.experiment import Check, Experiment
from stagewise.studies.hierarchy import drawing
from stagewise.studies.hierarchy.lab import Lab, correlation
from stagewise.studies.hierarchy.settings import RATE
from stagewise.studies.hierarchy.theory.modes import half_rise
from stagewise.studies.hierarchy.theory.tree import KINDS, Floats
from stagewise.studies.hierarchy.theory.two_times import binned_influence


def two_times(lab: Lab) -> Experiment:
    """The exact derivative of the aligned run, resolved by when items are shown, against its closed form."""
    steps, exact = list(lab.settings.two_times_steps), lab.in_two_times
    names = lab.items.names
    value = exact["value"].transpose("trained", "asked", "train", "query").sel(train=names, query=names).values
    predicted, rises = _theory(lab, RATE * np.array(steps))
    kinds = _kinds(lab, exact, value)
    left, old = _left(kinds["value"]), _old(kinds["value"])
    off, there = lab.off_diagonal, (exact["trained"] < exact["asked"]).values
    title = "influence in two times, aligned start"
    checks = [
        Check.at_least(
            f"{title}, closed form vs exact derivative, off-diagonal: r",
            correlation(predicted[there][:, off], value[there][:, off]),
            0.999,
        ),
        Check.at_most(f"{title}: largest miss of a retrained change of weight", float(exact["miss"].max()), 0.1, ".3f"),
        Check.reported(
            f"{title}: share of the peak that is left at the end, {', '.join(left)}", [*left.values()], ".1e"
        ),
        Check.reported(
            f"{title}: share that is of items shown before half of the time, {', '.join(old)}", [*old.values()], ".2f"
        ),
    ]
    caption = (
        f"When an item is shown (across) and when the loss is asked for (up): influence of weight on an item during "
        f"{steps[1] - steps[0]} updates on the mean pair of each kind, by the exact derivative of the run. Lines: "
        "half-rises of the modes. Colour turns along the vertical: the same lesson helps and hurts by turns, as what "
        "the items share and what tells them apart are learnt. Along the horizontal it matters little when the item "
        "was shown; the newest lessons turn harmful first, and helpful last."
    )
    plate = Plate("two-times", caption, _draw(kinds, rises))
    return Experiment(Section("Influence in two times", [plate]), [_finding(checks[0].text, left, old, steps)], checks)


def _theory(lab: Lab, edges: Floats) -> tuple[Floats, Floats]:
    """Closed form ``(bin, asked, train, query)``, and the half-rises of the modes."""
    modes, start = lab.predicted_strengths(lab.aligned, edges[:1])
    a0 = np.diagonal(start[0])
    rises = half_rise(modes.s, a0)
    return binned_influence(modes, a0, edges, edges[1:]), np.unique(rises[np.isfinite(rises)].round(3))


def _kinds(lab: Lab, exact: xr.Dataset, value: Floats) -> xr.Dataset:
    """The mean pair of each kind, in training time: ``value`` ``(kind, trained, asked)``."""
    curves = np.stack([np.tensordot(value, lab.of_kind(level), axes=2) for level in KINDS])
    coords = {
        "kind": list(KINDS.values()),
        "trained": RATE * exact["trained"].values,
        "asked": RATE * exact["asked"].values,
        "trained_stop": ("trained", RATE * exact["trained_stop"].values),
    }
    return xr.Dataset({"value": (("kind", "trained", "asked"), curves)}, coords)


def _left(curves: xr.DataArray) -> dict[str, float]:
    """The largest influence on the last losses that are asked for, over the largest on any, of every kind."""
    most = abs(curves).max("trained")
    return _by_kind(most.isel(asked=-1) / most.max("asked"))


def _old(curves: xr.DataArray) -> dict[str, float]:
    """Of all influence, the share of what was shown before half of the time at which the loss is asked for."""
    size, both = abs(curves), ("trained", "asked")
    return _by_kind(size.where(size["trained"] < size["asked"] / 2).sum(both) / size.sum(both))


def _by_kind(numbers: xr.DataArray) -> dict[str, float]:
    return dict(zip(numbers["kind"].values.tolist(), numbers.values.tolist(), strict=True))


def _finding(r: str, left: dict[str, float], old: dict[str, float], steps: list[int]) -> str:
    shares = ", ".join(f"{share:.1g} ({kind})" for kind, share in left.items())
    older = ", ".join(f"{share:.0%} ({kind})" for kind, share in old.items())
    return (
        "When an item is shown, and when the loss is asked for, can be told apart: the derivative of the run in two "
        f"times has a closed form (r = {r}). Lessons do not fade with age, they wait for the transition that they "
        f"speed up: of all influence, what was shown before half of the time makes {older}, where lessons that all "
        "count alike would make 50%. They pass with that transition: at t = "
        f"{RATE * steps[-1]:g} the share of the peak that is left is {shares}."
    )


@style.styled
def _draw(kinds: xr.Dataset, rises: Floats) -> Figure:
    figure = style.canvas(3.35)
    axes = figure.subplots(1, len(KINDS), sharey=True)
    limit = triangle_figure.largest(kinds)
    for ax, kind in zip(axes, reversed(KINDS.values()), strict=True):
        pair = kinds.sel(kind=kind)
        mesh = triangle_figure.draw_triangle(ax, pair, limit)
        across, up = triangle_figure.edges(pair)
        drawing.time_axis(ax, across, zero=False)
        ax.set_ylim(up[0], up[-1])
        triangle_figure.mark_stages(ax, [(float(rise), "") for rise in rises if rise < up[-1]])
        ax.set_title(f"{kind} pairs")
    style.name_axes(figure, f"shown at: {drawing.TIME}", "asked at t")
    triangle_figure.colour_bar(figure, list(axes), mesh, limit)
    return figure
