"""What the network has learnt when: its distance from every exact rule, and what its attention does."""

from __future__ import annotations

from collections.abc import Sequence

import xarray as xr
from matplotlib.figure import Figure

from stagewise.dynamics.stages import Transition
from stagewise.reporting import style, words
from stagewise.reporting.page import Plate, Section
from stagewise.studies.experiment import Check, Experiment
from stagewise.studies.induction import drawing
from stagewise.studies.induction.lab import Lab
from stagewise.studies.induction.rules import RULES
from stagewise.studies.induction.stages import counts_best
from stagewise.studies.transitions import BAND

_ATTENTION = {"previous_token": "to the token before", "prefix_matching": "to what followed before"}


def stages(lab: Lab) -> Experiment:
    """Stages of all runs."""
    found = [lab.stages(seed) for seed in lab.seeds]
    transitions = [lab.transition(seed) for seed in lab.seeds]
    learnt = [t for t in transitions if t is not None]
    onsets, halves = [t.step for t in learnt], [t.detail["half"] for t in learnt]
    counting = [counts_best(one) for one in found]
    left = [float(one["kl_bigram"][-1]) / lab.plateau for one in found]
    checks = [
        Check.at_least("seeds that learn induction", len(learnt), lab.settings.seeds, ".0f"),
        Check.reported("step at which a network is nearest to the unigram rule, each seed", counting, ".0f"),
        Check.reported("onset of induction: step of 10 % of the last prefix matching, each seed", onsets, ".0f"),
        Check.reported("half of it: step of 50 %, each seed", halves, ".0f"),
        Check.reported("KL(bigram rule || network) at the end / KL(bigram || unigram rule), each seed", left, ".2f"),
    ]
    caption = (
        "Every run, one line for each seed. Above: how far the network is from the exact rules; what is left to the "
        "bigram rule is what its expected loss is above the least possible, and the dashed line is what the unigram "
        "rule leaves. Below: attention to the token before, and to what followed the current token before, of the best "
        "head. Dotted: onset of induction; solid: half of it."
    )
    plate = Plate("stages", caption, _draw(lab, found, learnt))
    return Experiment(Section("What is learnt, and when", [plate]), [_finding(lab, counting, onsets, halves)], checks)


def _finding(lab: Lab, counting: Sequence[float], onsets: Sequence[float], halves: Sequence[float]) -> str:
    runs = words.count(lab.settings.seeds, "run")
    if not onsets:
        return f"None of {runs} learns induction in {lab.settings.last} steps."
    return (
        f"First the networks count tokens, and are nearest to the unigram rule at {words.steps(counting)}; then "
        f"{len(onsets)} of {runs} learn what follows the current token, from {words.steps(onsets)} on and half-way at "
        f"{words.steps(halves)}."
    )


@style.styled
def _draw(lab: Lab, found: Sequence[xr.Dataset], learnt: Sequence[Transition]) -> Figure:
    figure = style.canvas(5.0)
    above, below = figure.subplots(2, 1, sharex=True)
    colours = style.colours([*RULES, *_ATTENTION])
    for number, one in enumerate(found):
        steps = one["step"].values
        for name in RULES:
            label = f"{name} rule" if number == 0 else None
            above.plot(steps, one[f"kl_{name}"], color=colours[name], linewidth=1, label=label)
        for name, text in _ATTENTION.items():
            below.plot(steps, one[name], color=colours[name], linewidth=1, label=text if number == 0 else None)
    above.axhline(lab.plateau, color=style.MUTED, linewidth=0.7, linestyle="--")
    for ax in (above, below):
        drawing.step_axis(ax, lab.settings.last)
        for transition in learnt:
            ax.axvline(transition.step, color=BAND, linewidth=0.8, linestyle=":")
            ax.axvline(transition.detail["half"], color=BAND, linewidth=0.8)
        ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    # Before the first update networks are far from every rule.
    above.set_ylim(0, 1.1 * max(float(one[f"kl_{name}"][1:].max()) for one in found for name in RULES))
    above.set_title("KL(rule || network), nats")
    below.set_title("attention of the best head")
    below.set_xlabel(drawing.STEPS)
    return figure
