"""How far the results can be trusted, in plain sentences."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import xarray as xr

from stagewise.reporting.words import count, score, step_number, steps
from stagewise.results import DAMPED, Results, headline

_BATCHES = {
    "recorded": "the run's own batches",
    "given": "the run's own batches",
    "whole training set": "the whole training set in every update",
    "fresh": "fresh batches",
}
MIN_PAIRS = 3  # for a correlation
_CAUTION = "beyond first order"
# The posterior of plain SGD's window is off by a little less than this along its middling directions, always.
_MAX_RESPONSE_ERROR = 0.35


def trust(results: Results) -> Iterator[str]:
    """Which checkpoints are answered, by what, and with how much doubt about sizes."""
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
        if scores[headline(scores, "correlation")].attrs["pairs"] >= MIN_PAIRS:
            r, slope = (median_and_range(scores, what) for what in ("correlation", "slope"))
            sized = np.isfinite(scores["slope"]).any()
            size = f"exact effects are {slope} times as large as its own" if sized else "its scores have no unit"
            yield (
                f"Held against it without any retraining, {name} correlates with a median of {r} at "
                f"{count(scores.sizes['step'], 'checkpoint')}; {size}."
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
    r, slope = (median_and_range(scores.sel(step=shared), name) for name in ("correlation", "slope"))
    yield f"{text}: with retraining it correlates with a median of {r} there, at a median slope of {slope}."


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


def _remedy(advice: dict[int, str]) -> str:
    """The advice that some steps share, or else that of the first of them."""
    step, first = next(iter(advice.items()))
    return first if len(set(advice.values())) == 1 else f"at step {step_number(step)}, {first}"


def median(scores: xr.Dataset, name: str) -> str:
    """Of a score over checkpoints."""
    return score(scores[headline(scores, name)].median().item())


def median_and_range(scores: xr.Dataset, name: str) -> str:
    """The same with its extremes, or the interval of the only checkpoint."""
    values = scores[headline(scores, name)]
    if scores.sizes["step"] == 1:
        lower, upper = (scores[headline(scores, name) + end].item() for end in ("_lower", "_upper"))
        return f"{median(scores, name)} (95% interval {score(lower)} to {score(upper)})"
    return f"{median(scores, name)} (from {score(values.min().item())} to {score(values.max().item())})"
