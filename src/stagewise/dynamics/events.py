"""Sign flips, peaks and onsets of influence curves: those that noise cannot have made, with intervals.

Two questions are kept apart. *Was there an event?* is decided over all steps and all curves at once, so
that a table of hundreds of curves holds no accidents. *When was it?* is answered for each event on its own,
by the steps that t-tests on contrasts of the replicates cannot rule out. These are exact for any number of
replicates and profit from what steps have in common, such as shared random numbers. (A bootstrap does the
latter only: with four replicates its percentiles are far too narrow.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from stagewise.dynamics.curves import checked, critical, degrees

ONSET = 0.1
"""An influence has set in once it exceeds this fraction of its peak."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Event:
    """Something that happened to one curve.

    Attributes:
        kind: ``"flip"``, ``"helpful peak"``, ``"harmful peak"`` or ``"onset"``.
        train: label of the training sample or group.
        query: label of the query.
        step: when. Flips and onsets are interpolated between checkpoints, linear in log(1 + step).
        lower: the interval starts at this checkpoint ...
        upper: ... and ends at this one.
        detail: ``sign`` of the influence, of a flip after it (-1 helpful, +1 harmful). Peaks: ``value`` and
            ``stderr`` in nats per unit weight. Peaks and onsets: ``at_edge``, the event cannot be told from
            the first (a peak: or last) checkpoint, so it may lie outside what was measured.

    Example:
        >>> import numpy as np, stagewise as sw, xarray as xr
        >>> value = np.array([0.0, -2.0, 1.0, 3.0]).reshape(4, 1, 1)
        >>> dims = ("step", "train", "query")
        >>> influence = xr.Dataset(
        ...     {"value": (dims, value), "stderr": (dims, np.full_like(value, 0.1))},
        ...     {"step": [0, 10, 100, 1000], "train": ["cats"], "query": ["dogs"]},
        ... )
        >>> flip = next(event for event in sw.events(influence) if event.kind == "flip")
        >>> flip.train, flip.query, round(flip.step), flip.detail
        ('cats', 'dogs', 47, {'sign': 1.0})
    """

    kind: str
    train: Any
    query: Any
    step: float
    lower: float
    upper: float
    detail: Mapping[str, float | bool]


def events(influence: xr.Dataset, level: float = 0.95) -> list[Event]:
    """All flips, peaks and onsets that noise cannot have made, in the order of the curves.

    A value has a sign if ``|value| > c stderr``, with c the two-sided quantile of Student's t (R-1 degrees of
    freedom for R replicates, or R batch orders; normal without) at error (1 - level) / (steps * curves). By
    Bonferroni's inequality all signs of all curves passed in are right together with probability ``level``,
    however they depend.

    * flip: a signed value followed by one of the other sign;
    * helpful (harmful) peak: the most negative (positive) signed value;
    * onset: where the curve last rises through 10 % of its largest peak on the way there.

    The interval of each event covers with probability ``level`` or more, provided the checkpoints resolve the
    curve: between two of them it turns or crosses at most once. With stderr 0 every non-zero value has a
    sign, and the intervals are the spacing of the checkpoints. A handful of replicates or orders makes c large (for a
    thousand values 35 with four, 5.6 with sixteen): to speak of many curves at once takes tens of them.

    Args:
        influence: ``value``, ``stderr`` and perhaps ``replicates``, as for :func:`stagewise.dynamics.curves`.
            Replicate r of different steps may share random numbers. Without replicates, errors of different
            steps are taken to be independent.
        level: probability that no event of a wrong sign is reported, and coverage of each interval.

    Raises:
        ValueError: the influence is malformed or not finite, or the level is not between 0 and 1.

    Example:
        >>> import numpy as np, stagewise as sw, xarray as xr
        >>> value = np.array([0.0, -2.0, 1.0, 3.0]).reshape(4, 1, 1)
        >>> dims = ("step", "train", "query")
        >>> influence = xr.Dataset(
        ...     {"value": (dims, value), "stderr": (dims, np.full_like(value, 0.1))},
        ...     {"step": [0, 10, 100, 1000], "train": ["cats"], "query": ["dogs"]},
        ... )
        >>> [(event.kind, event.lower, event.upper) for event in sw.events(influence)]
        [('flip', 10.0, 100.0), ('helpful peak', 0.0, 100.0), ('harmful peak', 100.0, 1000.0), ('onset', 10.0, 100.0)]
    """
    influence = checked(influence, level)
    error, dof = 1 - level, degrees(influence)
    steps, value, stderr = (influence[name].values.astype(float) for name in ("step", "value", "stderr"))
    replicates = influence["replicates"].values.astype(float) if "replicates" in influence else None
    signs = np.sign(value) * (np.abs(value) > critical(error / value.size, dof) * stderr)

    trains, queries = influence["train"].values.tolist(), influence["query"].values.tolist()
    found: list[Event] = []
    for i, j in np.argwhere(signs.any(axis=0)).tolist():
        parts = None if replicates is None else replicates[:, :, i, j]
        curve = _Curve(trains[i], queries[j], steps, value[:, i, j], stderr[:, i, j], parts, error, dof)
        found += _events(curve, signs[:, i, j])
    return found


def table(events: Sequence[Event]) -> xr.Dataset:
    """The events as columns along ``event``, NaN where a kind lacks one; ``.to_dataframe()`` prints well."""
    names = ("kind", "train", "query", "step", "lower", "upper")
    columns = {name: [getattr(event, name) for event in events] for name in names}
    for name in ("sign", "value", "stderr"):
        columns[name] = [event.detail.get(name, np.nan) for event in events]
    columns["at_edge"] = [event.detail.get("at_edge", False) for event in events]
    about = {"sign": "negative = helpful", "unit": "nats per unit weight"}
    return xr.Dataset({name: ("event", column) for name, column in columns.items()}, attrs=about)


@dataclass(frozen=True)
class _Curve:
    train: Any
    query: Any
    steps: Floats  # (step,)
    value: Floats  # (step,)
    stderr: Floats  # (step,)
    replicates: Floats | None  # (step, replicate)
    error: float  # 1 - level
    dof: float

    def minus(self, fraction: float, k: int) -> tuple[Floats, Floats]:
        """The contrast value - fraction * value[k] at every step, and its standard error."""
        contrast = self.value - fraction * self.value[k]
        if self.replicates is None:
            variance = self.stderr**2 + (fraction * self.stderr[k]) ** 2
            variance[k] = ((1 - fraction) * self.stderr[k]) ** 2
            return contrast, np.sqrt(variance)
        spread = (self.replicates - fraction * self.replicates[k]).std(axis=1, ddof=1)
        return contrast, spread / np.sqrt(self.replicates.shape[1])


def _events(curve: _Curve, signs: Floats) -> Iterator[Event]:
    signed = np.flatnonzero(signs)
    for a, b in pairwise(signed):
        if signs[a] != signs[b]:
            yield _flip(curve, float(signs[b]), slice(a, b + 1))
    for sign in (-1.0, 1.0):
        if sign in signs:
            yield _peak(curve, sign, _largest(curve, np.flatnonzero(signs == sign)))
    yield _onset(curve, _largest(curve, signed))


def _largest(curve: _Curve, among: NDArray[np.intp]) -> int:
    return int(among[np.abs(curve.value[among]).argmax()])


def _flip(curve: _Curve, sign: float, between: slice) -> Event:
    rise = _rise(curve, sign * curve.value[between], curve.stderr[between], curve.steps[between])
    return Event("flip", curve.train, curve.query, rise.step, rise.lower, rise.upper, {"sign": sign})


def _onset(curve: _Curve, peak: int) -> Event:
    contrast, stderr = curve.minus(ONSET, peak)
    sign, until = float(np.sign(curve.value[peak])), slice(0, peak + 1)
    rise = _rise(curve, sign * contrast[until], stderr[until], curve.steps[until])
    detail = {"sign": sign, "at_edge": rise.at_edge}
    return Event("onset", curve.train, curve.query, rise.step, rise.lower, rise.upper, detail)


def _peak(curve: _Curve, sign: float, top: int) -> Event:
    """The extremum of one sign, on its checkpoint: a parabola through it would add digits, not knowledge.

    The interval spans the steps not shown to lie below the extremum, and one checkpoint more on either side,
    because between checkpoints the curve may go higher than on them. The tests need not share the error: the
    interval misses the true peak only if every step on that side, up to the peak and past it, fails at once.
    """
    contrast, stderr = curve.minus(1.0, top)
    rivals = np.flatnonzero(-sign * contrast <= critical(curve.error, curve.dof) * stderr)
    last = len(contrast) - 1
    lower, upper = curve.steps[max(rivals[0] - 1, 0)], curve.steps[min(rivals[-1] + 1, last)]
    detail = {
        "sign": sign,
        "value": float(curve.value[top]),
        "stderr": float(curve.stderr[top]),
        "at_edge": bool(rivals[0] == 0 or rivals[-1] == last),
    }
    kind = "helpful peak" if sign < 0 else "harmful peak"
    return Event(kind, curve.train, curve.query, float(curve.steps[top]), float(lower), float(upper), detail)


class _Rise(NamedTuple):
    step: float
    lower: float
    upper: float
    at_edge: bool


def _rise(curve: _Curve, value: Floats, stderr: Floats, steps: Floats) -> _Rise:
    """Where a stretch of curve whose last value is positive became so.

    The interval runs from the last step shown to be below zero to the next one shown to be above. The tests
    of the stretch share the error, so it covers unless one of them shows the wrong sign. It never ends
    between checkpoints, because what the curve does there was not measured: to interpolate is good enough
    for the point estimate, but the doubt cannot be finer than the grid.
    """
    reach = critical(2 * curve.error / len(value), curve.dof) * stderr  # of each step one sign would mislead
    below = np.flatnonzero(value < -reach)
    above = np.union1d(np.flatnonzero(value > reach), len(value) - 1)
    start = below[-1] if below.size else 0
    end = above[above >= start][0]
    step = steps[start]
    if (not_yet := np.flatnonzero(value[start:end] <= 0)).size:
        k, x = start + not_yet[-1], np.log1p(steps)
        step = np.expm1(x[k] - value[k] * (x[k + 1] - x[k]) / (value[k + 1] - value[k]))
    step = np.clip(step, steps[start], steps[end])  # against rounding in log and exp
    return _Rise(float(step), float(steps[start]), float(steps[end]), below.size == 0)
