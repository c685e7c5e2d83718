"""Runs in which some tokens have more weight for a while, at others' expense, and how soon they learn induction.

Which tokens: those of the kinds that :func:`stagewise.curriculum` names, exact influence on the excess being asked of
class and third of the sequence. When: while induction forms in the unchanged run of the same seed, from the onset to
half of the rise of prefix matching; as long before that; as long after it; thinly all the time; or as the schedule
decides that asks again every so often and knows nothing of what comes. The mean weight is 1 in all of them, and the
weight that is moved, summed over updates, is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from stagewise.checkpoint import Checkpoint
from stagewise.retraining.curriculum import curriculum
from stagewise.retraining.schedule import BatchOrder, Order, Schedule
from stagewise.retraining.start import start_at
from stagewise.retraining.training import train
from stagewise.studies.chance import Labels
from stagewise.studies.induction.classes import by_third
from stagewise.studies.induction.lab import Lab
from stagewise.studies.induction.network import Network
from stagewise.studies.induction.settings import Settings
from stagewise.studies.induction.training import EXCESS
from stagewise.studies.measures import divergence, previous_token

UNCHANGED, NAMED, CHANCE = "unchanged", "named, while it forms", "chance, while it forms"
ARMS = {
    UNCHANGED: "weight 1",
    NAMED: "kinds that exact influence names at the onset, while induction forms",
    "named, before": "the same kinds, as long before",
    "named, after": "the same kinds, as long after",
    "named, evenly": "the same kinds, thinly during all updates",
    CHANCE: "as many tokens at the same places drawn by chance, while it forms",
    "last, while it forms": "kinds that exact influence names at the last checkpoint, while it forms",
    "replaced, while it forms": "sequences with most tokens of the named kinds in place of others, while it forms",
    "chosen on the way": "kinds that exact influence names at every decision, thinly from the first one on",
}
"""The runs of a seed, and what has more weight in them when."""

EXCESS_LEFT, LOOKS_BACK = 0.06, 0.3
"""Nats, and attention to the token before: induction has formed once a run has crossed both, said before any run."""


@dataclass(frozen=True, eq=False)
class Arm:
    """One way to train.

    Attributes:
        schedule: the weights from here on, asked at each of ``decisions``.
        decisions: steps; the first is where the run departs from the unchanged one, or a step before that.
        order: the batches.
    """

    schedule: Callable[[Checkpoint], Schedule]
    decisions: tuple[int, ...]
    order: Order


def forming(lab: Lab, seed: int) -> range | None:
    """The updates from the onset of induction to half of it in the unchanged run; None if it does not learn it."""
    found = lab.transition(seed)
    return None if found is None else range(round(found.step), max(round(found.detail["half"]), round(found.step) + 1))


@lru_cache(maxsize=1)
def kinds(lab: Lab) -> tuple[Labels, np.ndarray[Any, np.dtype[np.int64]]]:
    """Names of kinds of tokens, class and third of the sequence; and which each predicted training token is of."""
    classes = lab.data.classes
    names, places = np.unique(by_third(classes), return_inverse=True)
    return names, places.reshape(classes.shape)


def chosen(lab: Lab, seed: int, checkpoint: Checkpoint) -> Tensor:
    """Weights of the training tokens that exact influence on the excess calls for at a checkpoint."""
    settings, (names, places) = lab.settings, kinds(lab)
    return curriculum(
        lab.task(seed),
        checkpoint,
        EXCESS,
        window=settings.window,
        budget=settings.budget,
        most=settings.most,
        groups=names[places],
        repeats=1,
        seed=seed,
    )


def named(lab: Lab, seed: int, step: int) -> Tensor:
    """The same at the last checkpoint of the run up to a step, from the folder where it holds them."""

    def compute() -> xr.Dataset:
        weights = chosen(lab, seed, lab.run(seed).load(here))
        firsts = np.unique(places, return_index=True)[1]
        return xr.Dataset({"weight": ("kind", weights.flatten()[firsts].numpy())}, {"kind": names})

    here, (names, places) = _checkpoint(lab, seed, step), kinds(lab)
    found = lab.kept(f"named-at-{here}", seed, compute)["weight"]
    return torch.from_numpy(found.values[places]).float()


def arms(lab: Lab, seed: int, window: range) -> Mapping[str, Arm]:
    """All ways to train a seed whose induction forms in a window."""
    settings, order = lab.settings, BatchOrder(lab.settings.sequences, lab.settings.batch_size, seed)
    length, steps = len(window), decisions(settings)
    picked = named(lab, seed, window.start)
    by_chance = torch.from_numpy(np.random.default_rng(seed).permuted(picked.numpy(), axis=0))
    before = range(max(0, window.start - length), window.start)

    def of(weights: Tensor, when: range = window) -> Arm:
        return Arm(lambda _: Schedule.of_weights(weights, when.start, len(when)), (when.start,), order)

    def again(checkpoint: Checkpoint) -> Schedule:
        weights = thinned(chosen(lab, seed, checkpoint), length / (settings.until - steps[0]))
        return Schedule.of_weights(weights, checkpoint.step, settings.choose_every)

    evenly = thinned(picked, length / settings.until)
    ways = [
        Arm(lambda _: Schedule(), (before.start,), order),
        of(picked),
        of(picked, before),
        of(picked, range(window.stop, window.stop + length)),
        of(evenly, range(settings.until)),
        of(by_chance),
        of(named(lab, seed, settings.last)),
        Arm(lambda _: Schedule(), (window.start,), replaced(order, picked, settings.budget, window, seed)),
        Arm(again, steps, order),
    ]
    return dict(zip(ARMS, ways, strict=True))


def decisions(settings: Settings) -> tuple[int, ...]:
    """The steps at which weights that are not set beforehand are chosen."""
    return tuple(range(settings.choose_every, settings.until, settings.choose_every))


def thinned(weights: Tensor, share: float) -> Tensor:
    """Weights of which only a share is moved."""
    return 1 + share * (weights - 1)


def replaced(order: Order, weights: Tensor, budget: float, window: range, seed: int) -> Order:
    """Batches in which a share ``budget`` of the sequences is replaced, during a window, by others of most weight.

    They are drawn from as many sequences as the tokens are that have the largest weight.
    """
    count = max(1, round(len(weights) * float((weights == weights.max()).float().mean())))
    best = weights.mean(1).argsort(descending=True)[:count]

    def batch(step: int) -> Tensor:
        samples = order(step)
        if step not in window:
            return samples
        drawn = torch.randint(count, samples.shape, generator=torch.Generator().manual_seed(seed * 100_003 + step))
        return torch.where(torch.arange(len(samples)) < round(budget * len(samples)), best[drawn], samples)

    return batch


def trained(lab: Lab, seed: int, name: str) -> xr.Dataset:
    """Looks at one of the :data:`ARMS` ``(step)``: ``excess``, nats, and ``previous_token``.

    Both are those of probes that are no queries, so that no weight was chosen for them. Looks begin where the run
    departs from the unchanged one, or a little before.

    Raises:
        ValueError: the unchanged run does not learn induction.
    """
    window = forming(lab, seed)
    if window is None:
        raise ValueError(f"the run of seed {seed} does not learn induction, so that there is no window to change")
    return lab.kept("arm-" + "-".join(name.replace(",", "").split()), seed, lambda: _trained(lab, seed, name, window))


def _trained(lab: Lab, seed: int, name: str, window: range) -> xr.Dataset:
    settings, task, arm = lab.settings, lab.task(seed), arms(lab, seed, window)[name]
    start = start_at(task, lab.run(seed).load(_checkpoint(lab, seed, arm.decisions[0])))
    looks = [step for step in range(0, settings.until + 1, settings.look_every) if step > start.step]
    state, told = start.state(), lab.told(name, seed)
    schedule, rows = arm.schedule(start.checkpoint), {start.step: _measures(lab, seed, start.checkpoint)}
    for before, step in pairwise(sorted({start.step, *arm.decisions, *looks})):
        if before in arm.decisions[1:]:
            schedule = arm.schedule(start.recorded(before, state))
        state = train(start, state, [schedule], arm.order, range(before, step))
        if step in looks:
            rows[step] = _measures(lab, seed, start.recorded(step, state))
            told(step, settings.until)
    columns = {key: ("step", [row[key] for row in rows.values()]) for key in next(iter(rows.values()))}
    return xr.Dataset(columns, {"step": list(rows)})


def _checkpoint(lab: Lab, seed: int, step: int) -> int:
    return max(there for there in lab.run(seed).steps if there <= step)


@torch.no_grad()
def _measures(lab: Lab, seed: int, checkpoint: Checkpoint) -> dict[str, float]:
    probes, n = lab.data.probes, lab.settings.queries
    with lab.task(seed).pure.holding(checkpoint.params) as model:
        logits, patterns = cast(Network, model).with_patterns(probes.tokens[n:, :-1])
    distance = divergence(probes.rules["bigram"][n:], logits.double().log_softmax(-1))
    return {"excess": float(distance.mean()), "previous_token": previous_token(patterns)}


def formed(found: xr.Dataset) -> float:
    """When a run has learnt induction: the excess has come down to :data:`EXCESS_LEFT` and a head looks back.

    Args:
        found: from :func:`trained`.

    Returns:
        The later of both steps, each interpolated between looks; NaN where one does not come.
    """
    crossings = _first_above(-found["excess"], -EXCESS_LEFT), _first_above(found["previous_token"], LOOKS_BACK)
    return float(np.max(crossings))


def _first_above(curve: xr.DataArray, level: float) -> float:
    above, steps = np.flatnonzero(curve.values >= level), curve["step"].values.astype(float)
    if not len(above) or above[0] == 0:
        return float("nan")
    around = slice(above[0] - 1, above[0] + 1)
    return float(np.interp(level, curve.values[around], steps[around]))
