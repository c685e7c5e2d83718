"""From numbers to words: what is wrong with the chains of a step, and which setting to change to what."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

UNTRUSTED = ("unusable", "not localised", "chains failed", "not converged", "heated", "cannot say", "unconstrained")
"""Verdicts under which a covariance of the draws says nothing about the posterior."""

MIN_CHAINS = 2
"""One chain cannot tell whether it has found the whole posterior."""

MIN_DRAWS = 8
"""Two draws in each quarter of a chain: the least from which R-hat and drift can be computed."""

MAX_RHAT = 1.1
MAX_DRIFT = 4.0
MIN_ESS_PER_CHAIN = 5
RHAT_BY_CHANCE = 2.5
"""Over the independent draws that a chain is worth: by how much the largest R-hat of many rows exceeds 1 by chance."""
MAX_BETWEEN_SHARE = 0.3
MAX_DRIFT_SHARE = 0.25
MIN_CHAINS_P = 1e-3
MAX_HEAT = 0.1
MAX_SOFT_SPREAD = 2.5
MAX_EVEN_SHARE = 0.2
MAX_QUERY_SPREAD = 10.0
MAX_QUERY_REACH = 1.0
_GOOD_EVEN_SHARE = 0.05
# Burn-in and thinning this many times the usual are no longer what is missing.
_LONG = 2

Numbers = Mapping[str, Any]
Settings = Mapping[Any, Any]


def judge(numbers: Numbers, statuses: Sequence[str], settings: Settings) -> tuple[str, str]:
    """The most severe thing that is wrong, as (verdict, advice); ``("ok", "")`` if nothing is.

    Args:
        numbers: the diagnostics of a step; those that could not be computed are absent.
        statuses: how every chain ended.
        settings: the facts of the step (``step_size``, ``burn_in``, ``thinning``, ``n_beta``,
            ``largest_window``, ``unusable``, ...), used where known to turn "more" into a number.
    """
    for verdict, rule in _RULES.items():
        if advice := rule(numbers, statuses, settings):
            return verdict, advice
    return "ok", ""


def _unusable(_numbers: Numbers, _statuses: Sequence[str], settings: Settings) -> str:
    return str(settings.get("unusable") or "")


def _not_localised(numbers: Numbers, _statuses: Sequence[str], settings: Settings) -> str:
    if not numbers["localised"]:
        reason = (
            "the loss curves downwards by too much beside the localisation: a posterior of that width would not stand "
            "for what the window does"
        )
        largest = settings.get("largest_window")
        if largest is None or not math.isfinite(largest):
            return f"{reason}; use a shorter window (a larger gamma)"
        if largest < 1:
            return f"{reason}, not even with a window of one training step; leave this step out"
        return f"{reason}; use a window of at most {math.floor(largest)} training steps"
    spread = numbers.get("soft_spread", 1.0)
    if spread <= MAX_SOFT_SPREAD:
        return ""
    return (
        f"along the softest direction the chains spread {spread:.1f} times as far (in variance) as the curvature at "
        f"the checkpoint says: away from it the loss curves otherwise, as at the kinks of ReLU; {_shorter(settings)}"
    )


def _chains_failed(_numbers: Numbers, statuses: Sequence[str], settings: Settings) -> str:
    failed = Counter(status for status in statuses if status != "ok")
    if 2 * failed.total() <= len(statuses):
        return ""
    kinds = ", ".join(f"{count} {status}" for status, count in failed.most_common())
    found = f"{failed.total()} of {len(statuses)} chains failed ({kinds})"
    if _independent(settings):
        return f"{found}; {_shorter(settings)}"
    step, stable = settings.get("step_size"), settings.get("stable_step")
    if step and stable and step <= stable:
        return f"{found}, with steps that are stable by the curvature at the checkpoint; {_shorter(settings)}"
    return f"{found}; {_stable_step(settings)}"


def _cannot_say(numbers: Numbers, _statuses: Sequence[str], settings: Settings) -> str:
    if numbers["chains_ok"] < MIN_CHAINS:
        return f"too few chains ended ok ({numbers['chains_ok']}); run at least {MIN_CHAINS}, better 4"
    if numbers["draws"] < MIN_DRAWS:
        return f"too few draws per chain ({numbers['draws']}); take at least {MIN_DRAWS}, better 100"
    if "rhat" not in numbers:
        remedy = "" if _independent(settings) else f", or {_stable_step(settings)}"
        return f"the training loss hardly changes from draw to draw; use a longer window{remedy}"
    return ""


def _not_converged(numbers: Numbers, _statuses: Sequence[str], settings: Settings) -> str:
    found = _of_means(numbers) or _of_products(numbers)
    if not found:
        return ""
    if _independent(settings):
        return f"{found}, which is chance, as every draw is independent of all others; take more draws"
    burn_in, thinning, relaxation = (settings.get(name) for name in ("burn_in", "thinning", "relaxation"))
    if relaxation and burn_in >= _LONG * 5 * relaxation and thinning >= _LONG * relaxation / 2:
        return f"{found}, although burn_in and thinning are long beside {relaxation:.0f} steps; {_shorter(settings)}"
    ess = min(numbers.get(name, math.inf) for name in ("ess_bulk", "ess_rows", "ess_products")) / numbers["chains_ok"]
    factor = max(2, math.ceil(2 * MIN_ESS_PER_CHAIN / ess))
    return f"{found}; use a longer {_times(settings, 'burn_in', 2)} and a larger {_times(settings, 'thinning', factor)}"


def _of_means(numbers: Numbers) -> str:
    """What is wrong with the mean losses."""
    drift, rhat, ess = numbers["drift"], numbers["rhat"], numbers["ess_bulk"] / numbers["chains_ok"]
    if abs(drift) > MAX_DRIFT:
        return f"the losses still drift ({drift:+.1f} standard errors)"
    if rhat <= MAX_RHAT and ess >= MIN_ESS_PER_CHAIN:
        return ""
    return (
        f"the chains have not all seen the same region (R-hat {rhat:.2f}, should be below {MAX_RHAT}; a chain is "
        f"worth {ess:.1f} independent draws, should be {MIN_ESS_PER_CHAIN})"
    )


def _of_products(numbers: Numbers) -> str:
    """What is wrong with the products that influence averages, where the mean losses are right."""
    drift, between = numbers.get("drift_share", 0.0), numbers.get("between_share", 0.0)
    if drift > MAX_DRIFT_SHARE:
        return f"the losses of a group still drift (a line over the draws explains {drift:.0%} of their variance)"
    for name, what in (
        ("rows", "the losses of groups"),
        ("products", "the products of losses that influence averages"),
    ):
        rhat = numbers.get(f"rhat_{name}", 1.0)
        ess = numbers.get(f"ess_{name}", math.inf) / numbers["chains_ok"]
        limit = max(MAX_RHAT, 1 + RHAT_BY_CHANCE / ess)
        if rhat > limit or ess < MIN_ESS_PER_CHAIN:
            return (
                f"the chains do not agree about {what} (R-hat {rhat:.2f}, should be below {limit:.2f}; a chain is "
                f"worth {ess:.1f} independent draws, should be {MIN_ESS_PER_CHAIN})"
            )
    if between > MAX_BETWEEN_SHARE:
        return f"{between:.0%} of the covariances lie between the means of chains, which stay where they are"
    if (p := numbers.get("chains_p", 1.0)) < MIN_CHAINS_P:
        return (
            "the covariances of the chains differ by more than those of stretches of one chain do "
            f"(F-test: p = {p:.0e}), and standard errors would be too small"
        )
    return ""


def _heated(_numbers: Numbers, _statuses: Sequence[str], settings: Settings) -> str:
    heat = settings.get("heat") or 0.0
    if heat <= MAX_HEAT:
        return ""
    return (
        f"{heat:.0%} of the variances come from the noise of minibatches; {_stable_step(settings)}, or use the whole "
        "training set (no batch_size)"
    )


def _unconstrained(numbers: Numbers, _statuses: Sequence[str], _settings: Settings) -> str:
    ratio, reach = numbers.get("query_spread", 0.0), numbers.get("query_reach", 0.0)
    # Training losses of a network that fits all of them hardly vary, and those of queries do: that alone is no fault.
    if ratio <= MAX_QUERY_SPREAD or reach <= MAX_QUERY_REACH:
        return ""
    return (
        f"the loss of {numbers['loosest']} varies {ratio:.3g} times as much over the draws as that of any training "
        f"sample, and {reach:.3g} times as much as losses differ at the checkpoint: the posterior reaches where the "
        "training data hold nothing. Leave the parameters that only such "
        "samples use out (parameters=...), or use a shorter window; a larger n_beta does not help"
    )


def _beyond_first_order(numbers: Numbers, _statuses: Sequence[str], settings: Settings) -> str:
    share = numbers.get("even_share", 0.0)
    if share <= MAX_EVEN_SHARE:
        return ""
    found = f"{share:.0%} of the spread of the losses is of second order"
    if raised := settings.get("n_beta_raised"):
        return f"{found}, although n_beta is {raised:g} times the usual; {_shorter(settings)}"
    # The variance of the odd part shrinks like 1/n_beta, that of the even part like its square.
    factor = (1 / _GOOD_EVEN_SHARE - 1) * share / max(1 - share, 0.01)
    raised = _times(settings, "n_beta", math.ceil(factor))
    return (
        f"{found}; raise n_beta at the same window: {raised}. If that changes nothing, what is seen is rounding, as "
        "under autocast: evaluate in float32, or lower n_beta"
    )


_RULES: dict[str, Callable[[Numbers, Sequence[str], Settings], str]] = {
    "unusable": _unusable,
    "not localised": _not_localised,
    "chains failed": _chains_failed,
    "cannot say": _cannot_say,
    "not converged": _not_converged,
    "heated": _heated,
    "unconstrained": _unconstrained,
    "beyond first order": _beyond_first_order,
}


def _independent(settings: Settings) -> bool:
    """Whether draws are, so that no setting of chains is at fault."""
    return settings.get("sampler") == "window"


def _shorter(settings: Settings) -> str:
    """The remedy where the posterior itself is at fault."""
    window = settings.get("window")
    if not window:
        return f"use a larger {_times(settings, 'gamma', 2)}"
    return f"use a window of at most {window // 2} training steps" if window > 1 else "leave this step out"


def _stable_step(settings: Settings) -> str:
    """The remedy where a step size that was set by hand is."""
    stable = settings.get("stable_step")
    return f"leave step_size out, or set it to {stable:.3g}" if stable else "leave step_size out"


def _times(settings: Settings, name: str, factor: float) -> str:
    value = settings.get(name)
    if not value:
        return f"{name} (about {factor:g} times)"
    return f"{name} (about {factor:g} times: {value:g} -> {value * factor:g})"
