"""The results in plain sentences, each with its numbers and their doubt."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
import xarray as xr

from stagewise.dynamics.curves import critical, degrees
from stagewise.dynamics.events import Event
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
from stagewise.results import BIF, DAMPED, EXACT, Results, headline, others
from stagewise.retraining.horizon import CHANGES, MOST

LEVEL = 0.95
_BATCHES = {
    "recorded": "the run's own batches",
    "given": "the run's own batches",
    "whole training set": "the whole training set in every update",
    "fresh": "fresh batches",
}
_CASES = 3
_MIN_PAIRS = 3
_CAUTION = "beyond first order"
# Fewer of the measured effects than this in their intervals, and sizes off by more than this, are worth a word.
_MIN_COVERAGE = 0.8
_MAX_SIZE_ERROR = 0.1
# The posterior of plain SGD's window is off by a little less than this along its middling directions, always.
_MAX_RESPONSE_ERROR = 0.35


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
        *_trust(results),
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
    if pairs < _MIN_PAIRS:
        were = "was" if pairs == 1 else "were"
        yield f"{count(pairs, 'pair')} of groups {were} retrained, too few for a correlation."
        return
    r, slope = (_median_and_range(scores, name) for name in ("correlation", "slope"))
    yield (
        f"Over {count(scores.sizes['step'], 'retrained checkpoint')} and {count(pairs, 'pair')} of groups at each, "
        f"measured effects and those predicted by {own} correlate with a median of {r}; the median slope measured / "
        f"predicted, 1 if the size in nats is right, is {slope}."
    )
    if BIF in results.agreements:
        yield from _sizes(results, results.agreements[BIF])
    if rest:
        numbers = [f"{_median(results.agreements[name], 'correlation')} ({name})" for name in rest]
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


def _responses(results: Results) -> Iterator[str]:
    """By how much sizes are off because the posterior is not the window, as far as the curvature tells."""
    diagnostics, answered = results.diagnostics, results.trusted.where(results.trusted, drop=True)["step"].values
    if "size_low" not in diagnostics or not len(answered):
        return
    known = diagnostics.sel(step=[step for step in answered.tolist() if step in diagnostics["step"].values])
    low, high = known["size_low"].min().item(), known["size_high"].max().item()
    if low < 1 - _MAX_RESPONSE_ERROR or high > 1 + _MAX_RESPONSE_ERROR:
        yield (
            f"Whatever the noise of the chains, the window responds {score(low)} to {score(high)} times as strongly as "
            "the posterior along single directions of curvature, and predicted sizes may be off by as much."
        )


def _imprecise(results: Results) -> Iterator[str]:
    """Where chains that were to be as long as it takes ended before."""
    diagnostics = results.diagnostics
    if "relative_error" not in diagnostics:
        return
    known = diagnostics.isel(step=np.flatnonzero(diagnostics["relative_error"] > diagnostics["precision"]))
    if known.sizes["step"]:
        low, high = (score(end.item()) for end in (known["relative_error"].min(), known["relative_error"].max()))
        where = f"{count(known.sizes['step'], 'checkpoint')} ({steps(known['step'].values.tolist())})"
        yield (
            f"At {where} chains ended at most_draws with standard errors of "
            f"{low if low == high else f'{low} to {high}'} times the influence's size, where "
            f"{score(known['precision'].max().item())} was asked for."
        )


def _first_order(results: Results) -> Iterator[str]:
    """How much of the sampled influence has no noise, and where all of it has."""
    attrs = {} if results.sampled is None else results.sampled.attrs
    missing = {int(step): reason for step, reason in json.loads(attrs.get("first_order_omitted", "{}")).items()}
    if attrs.get("first_order", "sampled") != "sampled":
        yield (
            "Sampled influence is what first order says of it without noise, and what the chains add to that; "
            "correlations and maps of samples are of the chains alone."
        )
    if missing:
        step, reason = next(iter(missing.items()))
        where = f"{count(len(missing), 'checkpoint')} ({steps([*missing])})"
        yield f"At {where} first order has no answer, and the chains alone have: at step {step_number(step)}, {reason}."


def _stand_in(results: Results) -> Iterator[str]:
    """What answers where the chains cannot, and how well."""
    if results.stand_in is None:
        return
    where = results.stand_in["step"].values.tolist()
    text = f"There {DAMPED} answers instead ({steps(where)}; open squares)"
    scores = results.agreements.get(DAMPED)
    shared = [] if scores is None else [step for step in where if step in scores["step"].values]
    if scores is None or not shared:
        yield f"{text}; it was not held against retraining at these."
        return
    r, slope = (_median_and_range(scores.sel(step=shared), name) for name in ("correlation", "slope"))
    yield f"{text}: with retraining it correlates with a median of {r} there, at a median slope of {slope}."


def _exact(results: Results) -> Iterator[str]:
    """Where the influence is exact, and how the others compare with it."""
    if results.exact is None:
        return
    known, batches = results.losses.sizes["step"], results.exact.attrs.get("batches", "")
    yield (
        f"{results.exact.sizes['step']} of {count(known, 'checkpoint')} are answered exactly, by the derivative of the "
        f"window, replayed with {_BATCHES.get(batches, f'{batches} batches')}: nothing is fitted, and what is left is "
        "the difference between a small change of weight and the one that is made."
    )
    reasons = json.loads(results.exact.attrs.get("omitted", "{}"))
    if reasons:
        step, reason = next(iter(reasons.items()))
        have = "has" if len(reasons) == 1 else "have"
        yield f"{count(len(reasons), 'checkpoint')} {have} none: at step {step_number(int(step))}, {reason}."
    for name, scores in results.size_checks.items():
        if scores[headline(scores, "correlation")].attrs["pairs"] >= _MIN_PAIRS:
            r, slope = (_median_and_range(scores, what) for what in ("correlation", "slope"))
            sized = np.isfinite(scores["slope"]).any()
            size = f"exact effects are {slope} times as large as its own" if sized else "its scores have no unit"
            yield (
                f"Held against it without any retraining, {name} correlates with a median of {r} at "
                f"{count(scores.sizes['step'], 'checkpoint')}; {size}."
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


def _median(scores: xr.Dataset, name: str) -> str:
    return score(scores[headline(scores, name)].median().item())


def _median_and_range(scores: xr.Dataset, name: str) -> str:
    values = scores[headline(scores, name)]
    if scores.sizes["step"] == 1:
        lower, upper = (scores[headline(scores, name) + end].item() for end in ("_lower", "_upper"))
        return f"{_median(scores, name)} (95% interval {score(lower)} to {score(upper)})"
    return f"{_median(scores, name)} (from {score(values.min().item())} to {score(values.max().item())})"


def _trust(results: Results) -> Iterator[str]:
    total = results.trusted.sizes["step"]
    yield from _exact(results)
    if not total:
        yield "No checkpoint has been sampled, so there are no chains to trust or to doubt."
        return
    how = " by sampling" if results.exact is not None else ""
    yield f"{total - len(results.omitted)} of {count(total, 'checkpoint')} can be answered{how}."
    causes: dict[str, dict[int, str]] = {}
    for step, reason in results.omitted.items():
        verdict, _, advice = reason.partition(": ")
        causes.setdefault(verdict, {})[step] = advice
    for verdict, remedies in causes.items():
        where = f"{count(len(remedies), 'checkpoint')} cannot be answered{how} ({steps([*remedies])})"
        yield f"{where}: {verdict}; {_remedy(remedies)}."
    yield from _first_order(results)
    yield from _stand_in(results)
    yield from _responses(results)
    yield from _imprecise(results)
    verdicts = results.diagnostics["verdict"].values
    doubtful = results.diagnostics.isel(step=np.flatnonzero(verdicts == _CAUTION))
    caution = dict(zip(doubtful["step"].values.tolist(), doubtful["advice"].values.tolist(), strict=True))
    if caution:
        yield (
            f"At {count(len(caution), 'answered checkpoint')} the posterior reaches {_CAUTION} ({steps([*caution])}), "
            f"so sizes there may be off: {_remedy(caution)}."
        )


def _remedy(advice: dict[int, str]) -> str:
    """The advice that some steps share, or else that of the first of them."""
    step, first = next(iter(advice.items()))
    return first if len(set(advice.values())) == 1 else f"at step {step_number(step)}, {first}"
