"""Which training matters for what comes later: influence of a class at one time on what the network knows at another.

What was said before it was computed: what a head needs is learnt before it shows. So more weight on induction tokens on
the plateau, before any attention has formed, lowers the excess once it has.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stagewise.groups import train_groups
from stagewise.reporting import style, words
from stagewise.reporting.page import Plate, Section
from stagewise.retraining.leave_out import retrain
from stagewise.retraining.schedule import BatchOrder, Schedule
from stagewise.retraining.two_times import influence_in_time
from stagewise.studies.experiment import Check, Claim, Experiment
from stagewise.studies.induction import drawing
from stagewise.studies.induction.classes import CLASSES
from stagewise.studies.induction.lab import Lab
from stagewise.studies.induction.training import EXCESS
from stagewise.studies.seeds import t_interval
from stagewise.studies.transitions import mark

_ABOUT = "induction"


def in_time(lab: Lab, seed: int) -> xr.DataArray:
    """Influence of whole classes, in every bin of training, on the excess at every later step that is asked for.

    Returns:
        ``(trained, asked, train)``, nats per unit weight of all tokens of a class; negative is helpful.
    """
    found = between_bins(lab, seed)
    return (found["value"] * found["train_size"]).sel(query=EXCESS, drop=True).transpose("trained", "asked", "train")


def between_bins(lab: Lab, seed: int) -> xr.Dataset:
    """The same per token, on every query: see :func:`stagewise.influence_in_time`."""

    def compute() -> xr.Dataset:
        settings = lab.settings
        return influence_in_time(
            lab.task(seed),
            lab.run(seed).load(0),
            BatchOrder(settings.sequences, settings.batch_size, seed),
            settings.asked,
            bins=settings.bins,
            check=False,  # it would train 48 times again; held against one change instead, see changed()
            progress=lab.told("influence in two times", seed),
        )

    return lab.kept("two-times", seed, compute)


def changed(lab: Lab, seed: int) -> xr.DataArray:
    """The excess with another weight of induction tokens on the plateau, minus that without ``(asked,)``, nats."""

    def compute() -> xr.Dataset:
        settings, trained = lab.settings, train_groups(lab.task(seed))
        first, stop = settings.plateau
        induction = trained.indices[trained.labels.index(_ABOUT)]
        other = Schedule.window(induction, first, stop - first, settings.changed, trained.tokens)
        order = BatchOrder(settings.sequences, settings.batch_size, seed)
        start, asked = lab.run(seed).load(0), settings.asked
        losses = retrain(lab.task(seed), start, [Schedule(), other], order, asked).sel(query=EXCESS, drop=True)
        return (losses[:, 1] - losses[:, 0]).rename(step="asked").to_dataset(name="effect")

    return lab.kept("changed-on-the-plateau", seed, compute)["effect"]


def two_times(lab: Lab) -> Experiment:
    """Influence in two times of all runs, beside one change that is made."""
    settings, (first, stop) = lab.settings, lab.settings.plateau
    runs = [in_time(lab, seed) for seed in lab.seeds]
    plateau = [_within(run, first, stop) for run in runs]
    predicted = xr.concat(plateau, "seed").sel(train=_ABOUT) * (settings.changed - 1)
    measured = xr.concat([changed(lab, seed) for seed in lab.seeds], "seed")
    checks, lowered, last = [], 0, settings.asked[-1]
    for asked in settings.asked:
        each = [float(run.sel(asked=asked, train=_ABOUT)) for run in plateau]
        mean, low, high = t_interval(each)
        before = f"of induction tokens in steps {first} to {stop} on the excess at step {asked}, nats per unit weight"
        checks.append(Check.reported(f"influence {before}: mean of seeds", mean, lower=low, upper=high))
        pairs = [part.sel(asked=asked).values for part in (predicted, measured)]
        for what, part in zip(("predicted", "measured"), pairs, strict=True):
            name = f"{what} effect of weight {settings.changed:g} in those steps at step {asked}, 10⁻³ nats, each seed"
            checks.append(Check.reported(name, 1e3 * part, ".2f"))
        lowered += sum(value < 0 for value in each) if asked == last else 0
    correlation, slope = _agreement(predicted, measured)
    what = "exact influence in two times vs that change made, all seeds and steps:"
    checks += [Check.reported(f"{what} r", correlation, ".3f"), Check.reported(f"{what} slope", slope, ".3f")]
    runs_in_words = words.count(settings.seeds, "run")
    finding = (
        f"More weight on induction tokens in steps {first} to {stop} lowers the excess at step {last} in {lowered} of "
        f"{runs_in_words}, to first order; retraining with weight {settings.changed:g} then agrees with r "
        f"{words.score(correlation)} and slope {words.score(slope)} over all runs and steps asked for."
    )
    claim = Claim(
        "What a head needs is learnt before it shows",
        f"Said beforehand of induction tokens on the plateau. In {lowered} of {runs_in_words} their weight in steps "
        f"{first} to {stop} lowers the excess at step {last}.",
    )
    caption = (
        f"Influence of every class of training tokens during bins of {settings.bins[1] - settings.bins[0]} updates, at "
        "their middles, on the excess at a later step (dashed line): nats per unit weight of all tokens of the class, "
        "mean over seeds with 95 % t-intervals; negative is helpful. Shaded: the transition of the first run."
    )
    plate = Plate("two-times", caption, _draw(lab, runs))
    return Experiment(Section("What is learnt when, for later", [plate]), [finding], checks, [claim])


def _within(run: xr.DataArray, first: int, stop: int) -> xr.DataArray:
    """Influence of training in the bins between two edges: their sum."""
    return run.sel(trained=slice(first, stop - 1)).sum("trained")


def _agreement(predicted: xr.DataArray, measured: xr.DataArray) -> tuple[float, float]:
    x, y = (part.transpose("seed", "asked").values.ravel() for part in (predicted, measured))
    return float(np.corrcoef(x, y)[0, 1]), float(x @ y / (x @ x))


@style.styled
def _draw(lab: Lab, runs: Sequence[xr.DataArray]) -> Figure:
    asked = lab.settings.asked
    figure = style.canvas(3.0)
    axes = figure.subplots(1, len(asked), sharex=True, sharey=True, squeeze=False)[0]
    for ax, step in zip(axes, asked, strict=True):
        _panel(ax, lab, runs, step)
    axes[0].legend(frameon=False)
    style.name_axes(figure, f"trained on at {drawing.STEPS}", "influence on the excess")
    return figure


def _panel(ax: Axes, lab: Lab, runs: Sequence[xr.DataArray], asked: int) -> None:
    drawing.step_axis(ax, lab.settings.asked[-1], zero=True)
    mark(ax, lab.transition(0))
    edges = np.array(lab.settings.bins)
    earlier = edges[:-1] < asked
    middles = ((edges[:-1] + edges[1:]) / 2)[earlier]
    for name in CLASSES:
        each = np.stack([run.sel(asked=asked, train=name).values[earlier] for run in runs])
        mean, low, high = np.array([t_interval(column) for column in each.T]).T
        ax.fill_between(middles, low, high, color=drawing.CLASS_COLOURS[name], alpha=0.15, linewidth=0)
        ax.plot(middles, mean, color=drawing.CLASS_COLOURS[name], marker="o", markersize=2, linewidth=1.2, label=name)
    ax.axvline(asked, color=style.MUTED, linewidth=0.8, linestyle="--")
    ax.set_title(f"asked at step {asked}")
