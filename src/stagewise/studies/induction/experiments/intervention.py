"""Do the tokens that exact influence names bring induction forward, and does it matter when they have more weight?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from stagewise.reporting import style, words
from stagewise.reporting.page import Plate, Section
from stagewise.reporting.tables import Table
from stagewise.studies.experiment import Check, Experiment
from stagewise.studies.induction import drawing
from stagewise.studies.induction.arms import (
    ARMS,
    CHANCE,
    EXCESS_LEFT,
    LOOKS_BACK,
    UNCHANGED,
    formed,
    forming,
    trained,
)
from stagewise.studies.induction.lab import Lab
from stagewise.studies.seeds import t_interval
from stagewise.studies.transitions import BAND

_TITLE = "Bringing it forward"
_GAINED, _BEYOND, _END = (
    "steps earlier than unchanged",
    "steps earlier than chance",
    "excess at the end, 10⁻³ nats more",
)


def intervention(lab: Lab) -> Experiment:
    """Every way to train, in all runs that learn induction, beside the unchanged run of the seed and beside chance."""
    learnt = [seed for seed in lab.seeds if forming(lab, seed) is not None]
    if not learnt:
        return Experiment(Section(_TITLE, []), ["No run learns induction: there is nothing to bring forward."], [])
    found = {arm: [trained(lab, seed, arm) for seed in learnt] for arm in ARMS}
    when = {arm: np.array([formed(one) for one in runs]) for arm, runs in found.items()}
    left = {arm: np.array([float(one["excess"][-1]) for one in runs]) for arm, runs in found.items()}
    checks, rows, told = [_said_of(UNCHANGED, "step at which induction has formed", when[UNCHANGED])], [], []
    for arm in list(ARMS)[1:]:
        gained, beyond = when[UNCHANGED] - when[arm], when[CHANCE] - when[arm]
        numbers = [_said_of(arm, _GAINED, gained)]
        numbers += [] if arm == CHANCE else [_said_of(arm, _BEYOND, beyond)]
        numbers += [_said_of(arm, _END, 1e3 * (left[arm] - left[UNCHANGED]), ".2f")]
        checks += numbers
        never = int(np.isnan(when[arm]).sum())
        texts = [
            f"never in {never} of {len(learnt)} runs" if "–" in one.text and never else one.text for one in numbers
        ]
        rows.append([arm, ARMS[arm], texts[0], "" if arm == CHANCE else texts[1], texts[-1]])
        told.append(
            f"{arm}: {', '.join(f'{text} {_unit(check)}' for text, check in zip(texts, numbers, strict=True))}."
        )
    table = Table(
        f"Means over {words.count(len(learnt), 'run')} with 95 % t-intervals, each seed beside its own runs",
        ["Arm", "More weight on", _GAINED, _BEYOND, _END],
        rows,
        frozenset({"Arm", "More weight on"}),
    )
    plate = Plate("intervention", _caption(len(learnt)), _draw(lab, found, when))
    return Experiment(Section(_TITLE, [plate, table]), [_finding(lab, when[UNCHANGED]), *told], checks)


def _said_of(arm: str, what: str, values: np.ndarray, form: str = ".1f") -> Check:
    mean, lower, upper = t_interval(values)
    return Check.reported(f"{arm}: {what}, mean over seeds", mean, form, lower=lower, upper=upper)


def _unit(check: Check) -> str:
    return check.what.split(": ")[1].removesuffix(", mean over seeds")


def _finding(lab: Lab, unchanged: np.ndarray) -> str:
    settings, mean = lab.settings, float(unchanged.mean())
    formed_at = f"at step {words.step_number(mean)} on average" if np.isfinite(mean) else "not in all"
    return (
        f"Induction has formed once the excess is below {EXCESS_LEFT:g} nats and a head gives the token before "
        f"{LOOKS_BACK:g} of its attention: {formed_at} of {words.count(len(unchanged), 'unchanged run')}. In the other "
        f"runs {100 * settings.budget:g} % of all weight is moved onto some tokens, up to weight {settings.most:g}, "
        "for as many updates as pass from the onset to half of the rise of prefix matching, or as much in all spread "
        "thinly. Means over seeds with 95 % t-intervals:"
    )


def _caption(runs: int) -> str:
    return (
        f"Left: the excess of the first run with other weights in it, on probes that no weight was chosen for; black: "
        f"unchanged; dashed: the level that counts as formed. Shaded: from the onset to half of the rise of prefix "
        f"matching. Right: steps by which induction forms earlier than in the unchanged run of the seed; small dots "
        f"are the {words.count(runs, 'run')}, bars 95 % t-intervals of their mean. The same weight is moved in all."
    )


@style.styled
def _draw(lab: Lab, found: Mapping[str, Sequence[xr.Dataset]], when: Mapping[str, np.ndarray]) -> Figure:
    figure = style.canvas(3.8)
    left, right = figure.subplots(1, 2)
    changed = [arm for arm in ARMS if arm != UNCHANGED]
    colours = {**style.colours(changed), UNCHANGED: style.INK, CHANCE: style.MUTED}
    for arm, runs in found.items():
        curve = runs[0]["excess"]
        left.plot(curve["step"], curve, color=colours[arm], linewidth=1.4 if arm == UNCHANGED else 0.9)
    left.axhline(EXCESS_LEFT, color=style.MUTED, linewidth=0.7, linestyle="--")
    first = next(seed for seed in lab.seeds if forming(lab, seed) is not None)
    window = forming(lab, first) or range(0)
    left.axvspan(window.start, window.stop, color=BAND, alpha=0.13, linewidth=0)
    left.set_xlim(max(0, window.start - 2 * len(window)), lab.settings.until)
    left.set_ylim(0, 1.1 * lab.plateau)
    left.set_xlabel(drawing.STEPS)
    left.set_title("excess (nats)")
    for row, arm in enumerate(changed):
        gained = when[UNCHANGED] - when[arm]
        mean, lower, upper = t_interval(gained)
        reach = np.nan_to_num([[mean - lower], [upper - mean]])
        right.errorbar(mean, row, xerr=reach, fmt="o", color=colours[arm], markersize=4, capsize=2)
        right.plot(gained, np.full(len(gained), row + 0.22), ".", color=colours[arm], markersize=2.5)
    right.axvline(0, color=BAND, linewidth=0.7)
    right.set_yticks(range(len(changed)), changed)
    right.invert_yaxis()
    right.set_title(_GAINED)
    return figure
