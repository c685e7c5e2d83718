"""The results in plain sentences, each with its numbers and their doubt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import xarray as xr

from stagewise.dynamics.curves import critical, degrees
from stagewise.dynamics.events import Event
from stagewise.reporting.trust import MIN_PAIRS, median, median_and_range, trust
from stagewise.reporting.words import (
    count,
    enumeration,
    interval,
    plus_minus,
    quoted,
    score,
    step_number,
    steps,
)
from stagewise.results import BIF, EXACT, Results, headline, others
from stagewise.retraining.horizon import CHANGES, MOST

LEVEL = 0.95
_CASES = 3
# Fewer of the measured effects than this in their intervals, and sizes off by more than this, are worth a word.
_MIN_COVERAGE = 0.8
_MAX_SIZE_ERROR = 0.1


def findings(results: Results) -> list[str]:
    """What the results say, the plainest first: effects, sign flips, agreement with retraining, trust.

    "±" is one standard error. Nothing is said that noise could have made: effects and flips hold for all
    pairs and steps together with probability 95%. Where there is nothing to report, that is said.
    """
    return [
        *_effects(results),
        *_flips(results),
        *_agreement(results),
        *_repeated(results),
        *_small(results),
        *trust(results),
        *_single(results),
        *results.notes,
    ]


def clearest_flips(influence: xr.Dataset, events: Sequence[Event]) -> list[Event]:
    """The sign flips between different labels, those first whose curves reach far to both sides of zero."""
    value = influence["value"].transpose("train", "query", "step").values
    reach, between = np.minimum(value.max(-1), -value.min(-1)), others(influence)
    rows, columns = ({label: k for k, label in enumerate(influence[d].values.tolist())} for d in ("train", "query"))

    def place(event: Event) -> tuple[int, int]:
        return rows[event.train], columns[event.query]

    flips = [event for event in events if event.kind == "flip" and between[place(event)]]
    return sorted(flips, key=lambda event: float(reach[place(event)]), reverse=True)


def _effects(results: Results) -> Iterator[str]:
    predicted, measured = results.predicted, results.measured
    if predicted is None or measured is None or results.answered is None:
        yield "No prediction was put to the test by retraining, so no effect in nats is claimed here."
        return
    cases, orders = _clearest_effects(predicted, degrees(results.answered)), results.answered.attrs.get("repeats", 1)
    if not cases:
        size = int(others(predicted).sum()) * predicted.sizes["step"]
        few = f" of {orders} batch orders; record the run's own batches, or set retraining.repeats to more"
        yield (
            f"Not one of {count(size, 'predicted effect')} between groups can be told from noise"
            f"{few if orders > 1 else ''}."
        )
    for step, train, query in cases:
        yield _effect(predicted, measured, step, train, query)


def _clearest_effects(predicted: xr.Dataset, degrees: float) -> list[tuple[int, str, str]]:
    """The largest effects that noise cannot have made, one per train group: (step, train, query)."""
    effect = predicted["effect"].transpose("step", "train", "query")
    error = predicted["effect_stderr"].transpose("step", "train", "query").values
    certain = np.abs(effect.values) > critical((1 - LEVEL) / effect.size, degrees) * error
    size = np.abs(effect.values) * (certain & others(predicted))
    cases: dict[str, tuple[int, str, str]] = {}
    for flat in np.argsort(-size, axis=None, kind="stable"):
        place = np.unravel_index(flat, size.shape)
        if size[place] == 0 or len(cases) == _CASES:
            break
        step, train, query = (effect[dim].values[k] for dim, k in zip(effect.dims, place, strict=True))
        cases.setdefault(str(train), (int(step), train, query))
    return list(cases.values())


def _effect(predicted: xr.Dataset, measured: xr.Dataset, step: int, train: str, query: str) -> str:
    where = {"step": step, "train": train, "query": query}
    guess, error = (predicted[name].sel(where).item() for name in ("effect", "effect_stderr"))
    truth = measured["effect"].sel(where).item()
    doubt = measured["effect_stderr"].sel(where).item() if "effect_stderr" in measured else 0.0
    weight, window = float(measured.attrs["weight"]), int(measured.attrs["window"])
    order = " to first order" if predicted.attrs.get("estimator") == EXACT else ""
    return (
        f"{_change(weight)} train group {quoted(train)} during steps {step_number(step)} to "
        f"{step_number(step + window)} would have {'raised' if guess > 0 else 'lowered'} the loss on "
        f"{quoted(query)} by {plus_minus(abs(guess), error)} nats{order}; retraining measured a "
        f"{'rise' if truth > 0 else 'fall'} of {plus_minus(abs(truth), doubt)}."
    )


def _change(weight: float) -> str:
    if weight == 0:
        return "Leaving out"
    return (
        f"{'Taking' if weight < 1 else 'Adding'} {abs(1 - weight):.0%} of the weight {'from' if weight < 1 else 'to'}"
    )


def _flips(results: Results) -> Iterator[str]:
    influence = results.answered
    if influence is None:
        return
    clearest = clearest_flips(influence, results.events)
    curves = count(int(others(influence).sum()), "influence curve")
    if not clearest:
        yield f"Not one of {curves} between groups changed its sign beyond doubt."
        return
    changed = len({(event.train, event.query) for event in clearest})
    yield f"{changed} of {curves} between groups changed {'its' if changed == 1 else 'their'} sign during training."
    for train, query in list(dict.fromkeys((event.train, event.query) for event in clearest))[:_CASES]:
        yield _turns([event for event in clearest if (event.train, event.query) == (train, query)])


def _turns(flips: Sequence[Event]) -> str:
    """All sign flips of one curve, with their 95% intervals."""
    first, *later = sorted(flips, key=lambda flip: flip.step)
    turn = "harmful to helpful" if first.detail["sign"] < 0 else "helpful to harmful"
    times = [interval(first.lower, first.upper)]
    times += [f"{'back' if k % 2 == 0 else 'again'} {interval(e.lower, e.upper)}" for k, e in enumerate(later)]
    return f"Train group {quoted(first.train)} turned from {turn} for {quoted(first.query)} {enumeration(times)}."


def _agreement(results: Results) -> Iterator[str]:
    if not results.agreements or results.answered is None:
        return
    own, *rest = results.agreements
    scores = results.agreements[own]
    pairs = scores[headline(scores, "correlation")].attrs["pairs"]
    if pairs < MIN_PAIRS:
        were = "was" if pairs == 1 else "were"
        yield f"{count(pairs, 'pair')} of groups {were} retrained, too few for a correlation."
        return
    r, slope = (median_and_range(scores, name) for name in ("correlation", "slope"))
    yield (
        f"Over {count(scores.sizes['step'], 'retrained checkpoint')} and {count(pairs, 'pair')} of groups at each, "
        f"measured effects and those predicted by {own} correlate with a median of {r}; the median slope measured / "
        f"predicted, 1 if the size in nats is right, is {slope}."
    )
    if BIF in results.agreements:
        yield from _sizes(results, results.agreements[BIF])
    if rest:
        numbers = [f"{median(results.agreements[name], 'correlation')} ({name})" for name in rest]
        yield f"For comparison, the median correlation of other estimators: {enumeration(numbers)}."


def _sizes(results: Results, scores: xr.Dataset) -> Iterator[str]:
    """Whether sizes are off by more than the stated errors allow, and where."""
    if results.coverage is None:
        return
    covered = results.coverage
    whose = f" of {BIF}" if results.exact is not None else ""
    text = f"The stated {LEVEL:.0%} intervals{whose} hold {covered.mean().item():.0%} of the measured effects"
    slope = scores[headline(scores, "slope")]
    off = (covered < _MIN_COVERAGE) & (abs(slope - 1) > _MAX_SIZE_ERROR)
    if not off.any():
        yield f"{text}."
        return
    wrong = slope.where(off, drop=True)
    low, high = (score(end.item()) for end in (wrong.min(), wrong.max()))
    times = low if low == high else f"{low} to {high}"
    where = f"{count(wrong.sizes['step'], 'checkpoint')} ({steps(wrong['step'].values.tolist())})"
    yield (
        f"{text}: at {where} measured effects are {times} times as large as predicted, which is more than the stated "
        "errors allow; they know of the chains' noise alone. Read the order of the effects there, not their sizes."
    )


def _small(results: Results) -> Iterator[str]:
    """Where changes of some per cent are too large for a derivative, though nothing was retrained to show it."""
    exact = results.exact
    if exact is None or "miss" not in exact or results.measured is not None:
        return
    missed = exact["step"].values[exact["miss"].values > MOST].tolist()
    size, known = " or ".join(f"{change:.0%}" for change in CHANGES), count(exact.sizes["step"], "checkpoint")
    if not missed:
        yield (
            f"At each of {known} weights changed by {size} in a random direction do what exact influence says, within "
            f"{MOST:.0%}."
        )
        return
    yield (
        f"At {steps(missed)} ({len(missed)} of {known}) weights changed by {size} in a random direction do something "
        f"else than exact influence says, by more than {MOST:.0%}: there it is of smaller changes still."
    )


def _single(results: Results) -> Iterator[str]:
    """What is known of single samples or tokens."""
    if results.single:
        first = next(iter(results.single.values()))
        kind = str(first.attrs.get("member", "sample"))
        yield (
            f"The run folder holds the influence of {count(first.sizes['train'], f'single {kind}')} on "
            f"{count(first.sizes['query'], 'query', 'queries')} by {enumeration([*results.single])}: "
            "stagewise.report(folder).single in Python."
        )


def _repeated(results: Results) -> Iterator[str]:
    """Whether it is this run that the retraining repeats."""
    if results.measured is not None and results.replay is not None:
        yield f"Is it this run that was retrained? {_sentence(str(results.replay.attrs['verdict']))}"


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}."
