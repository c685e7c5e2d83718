"""When the model itself changes: rises of a measure, and stage boundaries of a curve with errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from stagewise.dynamics.curves import checked, critical, degrees

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Transition:
    """Something that happened to the model.

    Attributes:
        name: what to call it; unique among the transitions of a run.
        kind: ``"rise"``, ``"maximum"`` or ``"minimum"``.
        step: when.
        lower: the band of a rise, or the interval of an extremum, starts here ...
        upper: ... and ends here.
        detail: of a rise: ``half``, the step at which half of the final value is reached, ``final``, that value, and
            ``spacing``, the steps between the checkpoints around the onset. Of an extremum: ``value`` and ``stderr``.

    Example:
        >>> import stagewise as sw
        >>> grokking = sw.Transition("grokking", "rise", step=1200.0, lower=1000.0, upper=1500.0, detail={})
        >>> sw.transition_table([grokking]).upper.item()
        1500.0
    """

    name: str
    kind: str
    step: float
    lower: float
    upper: float
    detail: Mapping[str, float]


def rise(
    curve: xr.DataArray, name: str, *, fraction: float = 0.1, band: tuple[float, float] = (0.05, 0.2)
) -> Transition:
    """Onset of a curve that starts near zero and rises: where it first reaches a fraction of its final value.

    Crossings are interpolated linearly between checkpoints. The band says how much the onset depends on the choice of
    the fraction, not on noise: a curve with errors should be clear of them at the lower edge.

    Args:
        curve: ``(step)``, in any unit.
        name: of the transition.
        fraction: of the final value, at the onset.
        band: the fractions at ``lower`` and ``upper``.

    Raises:
        ValueError: the curve is malformed or does not rise, or the fractions do not ascend.

    Example:
        >>> import stagewise as sw, xarray as xr
        >>> accuracy = xr.DataArray([0.0, 0.0, 0.5, 1.0], coords={"step": [0, 10, 20, 30]}, dims="step")
        >>> onset = sw.rise(accuracy, "accuracy")
        >>> round(onset.step, 3), round(onset.lower, 3), round(onset.upper, 3)
        (12.0, 11.0, 14.0)
    """
    low, high = band
    if not 0 < low <= fraction <= high < 1:
        raise ValueError(f"expected 0 < band[0] <= fraction <= band[1] < 1, got fraction={fraction} and band={band}")
    steps, values = _points(curve, name)
    final = float(values[-1])
    if final <= 0 or values[0] >= low * final:
        raise ValueError(
            f"{name!r} does not rise: it starts at {values[0]:g} and ends at {final:g}, but should start below {low:g} "
            "of a positive final value; subtract its first value, or change its sign if it falls"
        )
    crossings = {level: _first_crossing(steps, values, level * final) for level in (low, fraction, high, 0.5)}
    onset = crossings[fraction]
    after = int(np.searchsorted(steps, onset))
    detail = {"half": crossings[0.5], "final": final, "spacing": float(steps[after] - steps[after - 1])}
    return Transition(name, "rise", onset, crossings[low], crossings[high], detail)


def half_learnt(losses: xr.Dataset, query: object) -> list[Transition]:
    """When half of what a query's loss loses is gone; none where it does not fall.

    Args:
        losses: ``queries`` ``(step, query)``, in nats.
        query: its label.
    """
    loss = losses["queries"].sel(query=query)
    fall = (loss[0] - loss).drop_vars("query")
    return [rise(fall, "half learnt", fraction=0.5, band=(0.4, 0.6))] if fall[-1] > 0 and len(fall) > 2 else []


def extrema(curve: xr.Dataset, level: float = 0.95) -> list[Transition]:
    """Stage boundaries of a curve with errors, such as :func:`stagewise.llc`: the turns that noise cannot have made.

    A maximum lies between a rise and a fall, both shown by differences of more than c standard errors, with c the
    two-sided quantile of Student's t (R-1 degrees of freedom for R replicates or batch orders; normal without) at error
    (1 - level) / pairs of steps. By Bonferroni's inequality all differences that are called rises or falls are right
    together with probability ``level``, whatever the curve. An extremum of the curve is one along any time axis; along
    log(1 + step) it is a zero of d value / d log(1 + step).

    The interval of an extremum holds the checkpoints between its neighbours that a test at ``level`` cannot tell from
    it, and one more on either side, as for peaks in :func:`stagewise.events`.

    Args:
        curve: ``value`` and ``stderr`` ``(step)``, perhaps ``replicates`` ``(step, replicate)``, from which errors of
            differences are taken. Without replicates errors of different steps are taken to be independent.
        level: probability that no turn is reported that is not there, and coverage of each interval.

    Returns:
        Maxima and minima in turn, numbered by kind: ``"maximum 1"``, ``"minimum 1"``, ...

    Raises:
        ValueError: the curve is malformed or not finite, or the level is not between 0 and 1.

    Example:
        >>> import stagewise as sw, xarray as xr
        >>> curve = xr.Dataset(
        ...     {"value": ("step", [0.0, 1.0, 3.0, 1.0, 0.0]), "stderr": ("step", [0.1] * 5)},
        ...     {"step": [0, 1, 10, 100, 1000]},
        ... )
        >>> [(turn.name, turn.step, turn.lower, turn.upper) for turn in sw.extrema(curve)]
        [('maximum 1', 10.0, 1.0, 100.0)]
    """
    for name in ("value", "stderr"):
        if name not in curve or curve[name].dims != ("step",):
            got = curve[name].dims if name in curve else "nothing"
            raise ValueError(f"{name!r} must have dims ('step',), got {got}; choose one curve")
    curve = checked(curve.expand_dims(train=["curve"], query=["curve"]), level).isel(train=0, query=0)
    steps, value, stderr = (curve[name].values.astype(float) for name in ("step", "value", "stderr"))
    differences, doubt = value - value[:, None], _difference_stderr(curve)
    error, pairs = 1 - level, max(1, len(steps) * (len(steps) - 1) // 2)
    signs = np.sign(differences) * (np.abs(differences) > critical(error / pairs, degrees(curve)) * doubt)
    alike = np.abs(differences) <= critical(error, degrees(curve)) * doubt

    turns = list(_turns(value, signs))
    edges = [0, *(k for k, _ in turns), len(steps) - 1]
    found: list[Transition] = []
    for number, (k, kind) in enumerate(turns):
        start, end = edges[number], edges[number + 2]
        lower, upper = _interval(steps, start + np.flatnonzero(alike[k, start : end + 1]))
        detail = {"value": float(value[k]), "stderr": float(stderr[k])}
        name = f"{kind} {number // 2 + 1}"
        found.append(Transition(name, kind, float(steps[k]), lower, upper, detail))
    return found


def transition_table(transitions: Sequence[Transition]) -> xr.Dataset:
    """The transitions as columns along ``transition``, NaN where a kind lacks one; ``.to_dataframe()`` prints well.

    Example:
        >>> import stagewise as sw, xarray as xr
        >>> curve = xr.Dataset(
        ...     {"value": ("step", [0.0, 1.0, 3.0, 1.0, 0.0]), "stderr": ("step", [0.1] * 5)},
        ...     {"step": [0, 1, 10, 100, 1000]},
        ... )
        >>> sw.transition_table(sw.extrema(curve)).to_dataframe()[["name", "step"]].values.tolist()
        [['maximum 1', 10.0]]
    """
    names = ("name", "kind", "step", "lower", "upper")
    columns = {name: [getattr(t, name) for t in transitions] for name in names}
    for name in dict.fromkeys(name for t in transitions for name in t.detail):
        columns[name] = [t.detail.get(name, np.nan) for t in transitions]
    return xr.Dataset({name: ("transition", column) for name, column in columns.items()})


def _points(curve: xr.DataArray, name: str) -> tuple[Floats, Floats]:
    if curve.dims != ("step",) or curve.sizes["step"] < 2:
        raise ValueError(f"{name!r} must be a curve (step) of two steps or more, got {dict(curve.sizes)}")
    steps, values = curve["step"].values.astype(float), curve.values.astype(float)
    if (np.diff(steps) <= 0).any() or not np.isfinite(values).all():
        raise ValueError(f"{name!r} must be finite, with steps that ascend; sort them and leave out the others")
    return steps, values


def _first_crossing(steps: Floats, values: Floats, threshold: float) -> float:
    """Where a curve that starts below a threshold first reaches it."""
    k = int(np.argmax(values >= threshold))
    part = (threshold - values[k - 1]) / (values[k] - values[k - 1])
    return float(steps[k - 1] + part * (steps[k] - steps[k - 1]))


def _difference_stderr(curve: xr.Dataset) -> Floats:
    """Standard error of the difference of every two steps, ``(step, step)``."""
    if "replicates" not in curve:
        stderr = curve["stderr"].values.astype(float)
        independent: Floats = np.sqrt(stderr**2 + stderr[:, None] ** 2)
        return independent
    replicates = curve["replicates"].transpose("step", "replicate").values.astype(float)
    spreads = [(replicates - one).std(axis=1, ddof=1) for one in replicates]
    paired: Floats = np.stack(spreads) / np.sqrt(replicates.shape[1])
    return paired


def _interval(steps: Floats, rivals: NDArray[np.intp]) -> tuple[float, float]:
    """From the checkpoint before the first rival to the one after the last: between them the curve may go further."""
    return float(steps[max(rivals[0] - 1, 0)]), float(steps[min(rivals[-1] + 1, len(steps) - 1)])


def _turns(value: Floats, signs: Floats) -> Iterator[tuple[int, str]]:
    """Maxima and minima in turn, given the ``signs (from, to)`` of all differences that are clear, 0 for the others."""
    start, direction = 0, 0
    for now in range(len(value)):
        shown = [sign for sign in (1, -1) if sign != direction and (signs[start:now, now] == sign).any()]
        if not shown:
            continue
        if direction:
            start += int(np.argmax(direction * value[start : now + 1]))
            yield start, "maximum" if direction > 0 else "minimum"
        direction = shown[0]
