"""Do influence events line up with the model's own transitions?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from stagewise.dynamics.events import Event, table
from stagewise.dynamics.stages import Transition

Floats = NDArray[np.float64]

_POINTS = 1001
"""Of the span, at which the axis is checked."""


def alignment(
    events: Sequence[Event],
    transitions: Sequence[Transition],
    *,
    span: tuple[float, float],
    match: Callable[[Event], str | None] | None = None,
    axis: Callable[[Floats], Floats] = np.log1p,
    draws: int = 10_000,
    seed: int = 0,
) -> xr.Dataset:
    """How far every event is from its transition, and whether a chance placement would be as near.

    The statistic is the mean ``|distance|``. The null hypothesis is that of cyclic shifts of all events together (a
    permutation test over rotations): the pattern of events could have happened at any time, and moves as a whole by one
    random shift around the circle that the span is bent into, so that events keep their distances. (Curves of related
    pairs rise and fall together; shuffled one by one they would look like many independent witnesses.) The p-value is
    (1 + number of shifts at least as near) / (1 + draws).

    A small p-value says that the pattern fits the transitions better than the same pattern at another time of this
    run. It does not say that one causes the other, that any single event is aligned, or that another run would
    do the same: the pattern is one observation. It takes for granted that every time in the span is as likely as
    another on the axis; if all that happens in a run happens in its middle, that alone makes it small. It cannot be
    small if transitions are dense, or if they repeat at the distances of the pattern.

    Args:
        events: from :func:`stagewise.events`.
        transitions: of the model, with unique names.
        span: first and last step that could have held an event.
        match: name of the transition an event belongs to, or None to leave it out. Decide it without looking at the
            times. Default: the nearest, also in the null hypothesis.
        axis: on which distances are measured and shifts are uniform, a finite, strictly increasing function of the
            steps in the span; default log(1 + step).
        draws: random shifts.
        seed: of the shifts.

    Returns:
        A table along ``event``: the columns of ``table(events)``, ``transition``, ``transition_step``, ``distance``
        on the axis (negative = the event comes first), ``distance_lower`` and ``distance_upper`` to the ends of the
        event's interval, and ``inside``, whether ``step`` is in the band of the transition. Attributes:
        ``statistic``, ``null_median``, ``p_value`` and its Monte Carlo error ``p_value_stderr``, ``draws``, ``seed``,
        ``span``.

    Raises:
        ValueError: nothing to align, names that repeat, a match with an unknown transition, steps out of the span, or
            an axis that is not finite and strictly increasing there.

    Example:
        >>> import stagewise as sw
        >>> flip = sw.Event("flip", "cats", "dogs", step=30.0, lower=20.0, upper=40.0, detail={"sign": 1})
        >>> rise = sw.Transition("animals", "rise", step=25.0, lower=20.0, upper=35.0, detail={})
        >>> aligned = sw.alignment([flip], [rise], span=(0, 1000), draws=100)
        >>> aligned.transition.item(), aligned.inside.item(), 0 < aligned.attrs["p_value"] <= 1
        ('animals', True, True)
    """
    candidates = _candidates(events, _by_name(transitions), match)
    kept = [event for event, _ in candidates]
    _check_span(kept, transitions, span)
    _check_axis(axis, span)
    first, last = axis(np.asarray(span, float))
    when = axis(np.array([event.step for event in kept]))
    places = axis(np.array([[t.step for t in some] for _, some in candidates]))

    def distances(times: Floats) -> Floats:
        return np.abs(times[:, None] - places)

    observed = distances(when).min(1).mean()
    shifts = np.random.default_rng(seed).uniform(0, last - first, draws)
    null = [distances(first + (when - first + shift) % (last - first)).min(1).mean() for shift in shifts]
    p = (1 + (np.array(null) <= observed).sum()) / (1 + draws)
    nearest = distances(when).argmin(1)
    matched = [some[k] for (_, some), k in zip(candidates, nearest, strict=True)]
    attrs = {
        "statistic": float(observed),
        "null_median": float(np.median(null)),
        "p_value": float(p),
        "p_value_stderr": float(np.sqrt(p * (1 - p) / (1 + draws))),
        "draws": draws,
        "seed": seed,
        "span": list(span),
    }
    return _table(kept, matched, axis).assign_attrs(attrs)


def _table(events: list[Event], transitions: list[Transition], axis: Callable[[Floats], Floats]) -> xr.Dataset:
    """Every event beside its transition."""
    at = axis(np.array([t.step for t in transitions]))
    columns: dict[str, Any] = {
        "transition": [t.name for t in transitions],
        "transition_step": [t.step for t in transitions],
        "distance": axis(np.array([e.step for e in events])) - at,
        "distance_lower": axis(np.array([e.lower for e in events])) - at,
        "distance_upper": axis(np.array([e.upper for e in events])) - at,
        "inside": [t.lower <= e.step <= t.upper for e, t in zip(events, transitions, strict=True)],
    }
    return table(events).assign({name: ("event", column) for name, column in columns.items()})


def _candidates(
    events: Sequence[Event], by_name: dict[str, Transition], match: Callable[[Event], str | None] | None
) -> list[tuple[Event, list[Transition]]]:
    """The events to align, each with the transitions it may belong to: the one that it matches, or all."""
    if match is None:
        found = [(event, list(by_name.values())) for event in events]
    else:
        names = [match(event) for event in events]
        if unknown := sorted({name for name in names if name is not None} - set(by_name)):
            raise ValueError(f"match names {unknown}, but the transitions are {list(by_name)}")
        found = [(event, [by_name[name]]) for event, name in zip(events, names, strict=True) if name is not None]
    if not found:
        raise ValueError(f"no event to align: got {len(events)} events, and match leaves out all of them")
    return found


def _by_name(transitions: Sequence[Transition]) -> dict[str, Transition]:
    if not transitions:
        raise ValueError("no transition to align events with: expected at least one")
    name, count = Counter(t.name for t in transitions).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{count} transitions are called {name!r}; give each its own name")
    return {t.name: t for t in transitions}


def _check_span(events: Sequence[Event], transitions: Sequence[Transition], span: tuple[float, float]) -> None:
    first, last = span
    if not first < last:
        raise ValueError(f"span must be (first step, last step) with first < last, got {span}")
    steps = [event.step for event in events] + [transition.step for transition in transitions]
    if outside := sorted(step for step in steps if not first <= step <= last):
        raise ValueError(f"steps {outside[:10]} of events or transitions lie outside the span {span}; widen it")


def _check_axis(axis: Callable[[Floats], Floats], span: tuple[float, float]) -> None:
    steps = np.linspace(*span, _POINTS)
    with np.errstate(all="ignore"):
        values = np.asarray(axis(steps), float)
    if values.shape != steps.shape or not np.isfinite(values).all() or (np.diff(values) <= 0).any():
        raise ValueError(
            f"axis must be finite and strictly increasing on the span {span}, got values from {values.flat[0]:g} to "
            f"{values.flat[-1]:g} that are not; pass one that is, e.g. np.log1p"
        )
