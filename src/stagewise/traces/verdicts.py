"""From numbers to words: what is wrong with the chains of a step, and which setting to change to what."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MIN_CHAINS = 2
"""One chain cannot tell whether it has found the whole posterior."""

MIN_DRAWS = 8
"""Two draws in each quarter of a chain: the least from which R-hat and drift can be computed."""

MAX_RHAT = 1.1
MAX_DRIFT = 4.0
MIN_ESS_PER_CHAIN = 5
MAX_EVEN_SHARE = 0.2
MAX_QUERY_SPREAD = 10.0
MAX_QUERY_REACH = 1.0
_GOOD_EVEN_SHARE = 0.05

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
    if numbers["localised"]:
        return ""
    reason = "the loss curves downwards by more than the localisation holds back, so there is no local posterior"
    largest = settings.get("largest_window")
    if largest is None or not math.isfinite(largest):
        return f"{reason}; use a shorter window (a larger gamma)"
    if largest < 1:
        return f"{reason}, not even of a window of one training step; leave this step out"
    return f"{reason}; use a window of at most {math.floor(largest)} training steps"


def _chains_failed(_numbers: Numbers, statuses: Sequence[str], settings: Settings) -> str:
    failed = Counter(status for status in statuses if status != "ok")
    if 2 * failed.total() <= len(statuses):
        return ""
    kinds = ", ".join(f"{count} {status}" for status, count in failed.most_common())
    remedy = f"use a smaller {_times(settings, 'step_size', 0.5)}"
    return f"{failed.total()} of {len(statuses)} chains failed ({kinds}); {remedy}"


def _cannot_say(numbers: Numbers, _statuses: Sequence[str], _settings: Settings) -> str:
    if numbers["chains_ok"] < MIN_CHAINS:
        return f"too few chains ended ok ({numbers['chains_ok']}); run at least {MIN_CHAINS}, better 4"
    if numbers["draws"] < MIN_DRAWS:
        return f"too few draws per chain ({numbers['draws']}); take at least {MIN_DRAWS}, better 100"
    if "rhat" not in numbers:
        return "the training loss hardly changes from draw to draw; use a larger step_size or a longer window"
    return ""


def _not_converged(numbers: Numbers, _statuses: Sequence[str], settings: Settings) -> str:
    drift, rhat, ess = numbers["drift"], numbers["rhat"], numbers["ess_bulk"] / numbers["chains_ok"]
    longer = f"use a longer {_times(settings, 'burn_in', 2)}"
    if abs(drift) > MAX_DRIFT:
        return f"the losses still drift ({drift:+.1f} standard errors); {longer}, or a shorter window"
    if rhat > MAX_RHAT or ess < MIN_ESS_PER_CHAIN:
        thinning = _times(settings, "thinning", max(2, math.ceil(2 * MIN_ESS_PER_CHAIN / ess)))
        return (
            f"the chains have not all seen the same region (R-hat {rhat:.2f}, should be below {MAX_RHAT}; a chain is "
            f"worth {ess:.1f} independent draws, should be {MIN_ESS_PER_CHAIN}); {longer} and a larger {thinning}"
        )
    return ""


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
    # The variance of the odd part shrinks like 1/n_beta, that of the even part like its square.
    factor = (1 / _GOOD_EVEN_SHARE - 1) * share / max(1 - share, 0.01)
    return (
        f"{share:.0%} of the spread of the losses is of second order; raise n_beta at the same window: "
        f"{_times(settings, 'n_beta', math.ceil(factor))}"
    )


_RULES: dict[str, Callable[[Numbers, Sequence[str], Settings], str]] = {
    "unusable": _unusable,
    "not localised": _not_localised,
    "chains failed": _chains_failed,
    "cannot say": _cannot_say,
    "not converged": _not_converged,
    "unconstrained": _unconstrained,
    "beyond first order": _beyond_first_order,
}


def _times(settings: Settings, name: str, factor: float) -> str:
    value = settings.get(name)
    if not value:
        return f"{name} (about {factor:g} times)"
    return f"{name} (about {factor:g} times: {value:g} -> {value * factor:g})"
