"""What the network has learnt when: its loss on every class, its distance from simple rules, and its attention."""

from __future__ import annotations

from collections.abc import Sequence

import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stagewise.reporting import style, words
from stagewise.reporting.page import Plate, Section
from stagewise.reporting.tables import Table
from stagewise.studies.chance import shares
from stagewise.studies.experiment import Check, Experiment
from stagewise.studies.language.classes import CLASSES
from stagewise.studies.language.lab import Lab
from stagewise.studies.language.stages import RULES
from stagewise.studies.seeds import t_interval

_LAST = {
    "loss": "loss at the end, nats",
    "kl_bigram": "KL(bigram rule || network) at the end, nats",
    "in_context": "loss of late tokens less that of early ones at the end, nats",
    "repetition": "loss of first occurrences less that of their repetitions at the end, nats",
    "previous_token": "attention to the token before of the best head at the end",
    "prefix_matching": "prefix matching of the best head at the end",
}


def stages(lab: Lab) -> Experiment:
    """Stages of all runs."""
    found = [lab.stages(seed) for seed in lab.seeds]
    checks = [*_when(lab), *(_last(found, name, what) for name, what in _LAST.items())]
    caption = (
        "Above left: loss on every class of tokens, mean of all runs; the dashed line is all tokens. Right: how far "
        "each run is from the rules that count in the training set. Below: attention of the best head in each run, and "
        "what late tokens gain over early ones and repetitions over first occurrences of the same pairs, nats."
    )
    plate = Plate("stages", caption, _draw(found))
    section = Section("What is learnt, and when", [plate, _table(lab, found)])
    return Experiment(section, [_finding(lab, found)], checks)


def _when(lab: Lab) -> list[Check]:
    """Steps of the network's transitions, of the seeds that have them."""
    steps: dict[str, list[float]] = {}
    for seed in lab.seeds:
        for one in lab.transitions(seed):
            steps.setdefault(f"{one.name}: {_meaning(one.kind)}", []).append(one.step)
    return [Check.reported(f"{what}, each seed that has one", some, ".0f") for what, some in steps.items()]


def _meaning(kind: str) -> str:
    return "step of 10 % of the last value" if kind == "rise" else "step at which a network is nearest to the rule"


def _last(found: Sequence[xr.Dataset], name: str, what: str) -> Check:
    return Check.reported(f"{what}, each seed", [float(one[name][-1]) for one in found], ".3f")


def _finding(lab: Lab, found: Sequence[xr.Dataset]) -> str:
    nearest = {
        rule: [one.step for seed in lab.seeds for one in lab.transitions(seed) if one.name == rule] for rule in RULES
    }
    matching = max(float(one["prefix_matching"].max()) for one in found)
    gained = [float(one["repetition"][-1]) for one in found]
    return (
        f"The networks are nearest to the unigram rule at {words.steps(nearest['unigram'])}, and to the bigram rule at "
        f"{words.steps(nearest['bigram'])}. At the end repetitions cost {_listed(gained)} nats less than first "
        f"occurrences of the same pairs. No head's prefix matching is ever above {matching:.2f}."
    )


def _listed(values: Sequence[float]) -> str:
    return words.enumeration([words.score(value) for value in values])


def _table(lab: Lab, found: Sequence[xr.Dataset]) -> Table:
    """Share and loss of every class, at the end and by the rules."""
    share, rules = shares(lab.data.classes, CLASSES), lab.rules
    rows = []
    for name in CLASSES:
        mean, lower, upper = t_interval([float(one[f"loss_{name}"][-1]) for one in found])
        last = Check.reported(name, mean, ".2f", lower=lower, upper=upper)
        by_rule = [f"{rules[rule][f'loss_{name}']:.2f}" for rule in RULES]
        rows.append([name, f"{100 * share[name]:.1f}", *by_rule, last.text])
    columns = ["Class", "Of all tokens, %", "Unigram rule", "Bigram rule", "Networks at the end"]
    title = (
        "Classes of tokens, and the loss on each, nats; of the networks the mean of all seeds, with its 95 % interval"
    )
    return Table(title, columns, rows, frozenset({"Class"}))


@style.styled
def _draw(found: Sequence[xr.Dataset]) -> Figure:
    figure = style.canvas(5.6)
    axes = figure.subplots(2, 2)
    (losses, rules), (attention, gains) = axes
    steps = found[0]["step"].values
    for name, colour in style.colours(CLASSES).items():
        losses.plot(steps, _mean(found, f"loss_{name}"), color=colour, linewidth=1.2, label=name)
    losses.plot(steps, _mean(found, "loss"), "--", color=style.INK, linewidth=1)
    _lines(rules, found, {f"kl_{name}": f"{name} rule" for name in RULES})
    _lines(attention, found, {"previous_token": "to the token before", "prefix_matching": "to what followed before"})
    _lines(gains, found, {"in_context": "late tokens", "repetition": "repetitions"})
    titles = ("loss, nats", "KL(rule || network), nats", "attention of the best head", "gain, nats")
    for ax, title in zip(axes.flat, titles, strict=True):
        style.step_axis(ax, steps)
        ax.set_title(title)
        ax.legend(frameon=False, fontsize=6.5)
    style.name_axes(figure, style.STEPS)
    return figure


def _lines(ax: Axes, found: Sequence[xr.Dataset], names: dict[str, str]) -> None:
    """One line for each seed; late tokens are told by what they gain."""
    for (name, label), colour in zip(names.items(), style.colours(list(names)).values(), strict=True):
        for number, one in enumerate(found):
            curve = -one[name] if name == "in_context" else one[name]
            ax.plot(one["step"], curve, color=colour, linewidth=1, label=label if number == 0 else None)


def _mean(found: Sequence[xr.Dataset], name: str) -> xr.DataArray:
    return xr.concat([one[name] for one in found], "seed").mean("seed")
