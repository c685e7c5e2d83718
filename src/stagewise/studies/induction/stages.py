"""The network's own stages: how far it is from each exact rule, and what its attention does.

All are measured on fixed probes, so that what changes over a run is the network alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
import xarray as xr
from torch import Tensor

from stagewise.checkpoints.trajectory import Trajectory
from stagewise.dynamics.stages import Transition, rise
from stagewise.studies.induction.network import Network
from stagewise.studies.induction.rules import RULES, divergence
from stagewise.task import Task

_DESCRIPTIONS = {
    **{f"kl_{name}": f"KL({name} rule || network), mean over tokens, nats" for name in RULES},
    "previous_token": "attention to the token before, mean over places, of the head that has most",
    "prefix_matching": "attention to what followed the current token before, beyond even attention, of the best head",
    "in_context": "loss at the last tenth of the places minus that at the first tenth, nats",
}


@dataclass(frozen=True, eq=False)
class Probes:
    """Fixed data to measure a network on.

    Attributes:
        tokens: sequences as those it is trained on ``(n, length)``.
        rules: log probabilities of every rule on them, by name, each ``(n, length - 1, vocabulary)``.
        repeated: random tokens, each sequence a piece that comes twice ``(n, 2 * piece)``.
    """

    tokens: Tensor
    rules: Mapping[str, Tensor]
    repeated: Tensor

    @classmethod
    def of(cls, tokens: Tensor, vocabulary: int, generator: torch.Generator) -> Probes:
        """Those on some sequences; as many random pieces are drawn."""
        n, length = tokens.shape
        piece = torch.randint(vocabulary, (n, length // 2), generator=generator)
        rules = {name: rule(tokens, vocabulary) for name, rule in RULES.items()}
        return cls(tokens, rules, piece.repeat(1, 2))


@torch.no_grad()
def stages(model: Network, probes: Probes) -> dict[str, float]:
    """All measures of a network, by name.

    Returns:
        ``kl_uniform``, ``kl_unigram``, ``kl_bigram``: KL(rule || network), the mean over all predicted tokens, nats.
        Of the bigram rule, which is exact, it is what the network's expected loss is above the least possible.
        ``previous_token``: see :func:`previous_token`, on the probes. ``prefix_matching``: see :func:`prefix_matching`,
        on the second half of the repeated pieces, where every token has come before. ``in_context``: see
        :func:`in_context`, nats.
    """
    inputs, targets = probes.tokens[:, :-1], probes.tokens[:, 1:]
    logits, patterns = model.with_patterns(inputs)
    log_probabilities = logits.double().log_softmax(-1)
    distances = {f"kl_{name}": float(divergence(rule, log_probabilities).mean()) for name, rule in probes.rules.items()}
    losses = -log_probabilities.gather(-1, targets[..., None])[..., 0]
    matched = model.with_patterns(probes.repeated[:, :-1])[1]
    return {
        **distances,
        "previous_token": previous_token(patterns),
        "prefix_matching": prefix_matching(matched, probes.repeated[:, :-1], probes.repeated.shape[1] // 2),
        "in_context": in_context(losses),
    }


def previous_token(patterns: Tensor) -> float:
    """Mean attention from each place but the first to the one before, of the head that has most.

    Args:
        patterns: ``(layers, batch, heads, tokens, tokens)``.
    """
    return float(patterns.diagonal(-1, -2, -1).mean((1, 3)).max())


def prefix_matching(patterns: Tensor, tokens: Tensor, first: int = 1) -> float:
    """Attention to what came after earlier occurrences of the current token, less the share that even attention has.

    With as few tokens as here an induction head has many places to look at, and is best if it looks at all of them, not
    only at the one a period ago. Where tokens are many there is only that one, and this is the usual score but for the
    even share.

    Args:
        patterns: ``(layers, batch, heads, tokens, tokens)``.
        tokens: ``(batch, tokens)``.
        first: first place from which attention counts.

    Returns:
        The mean over places of the head that has most: 0 for even attention, below 1.
    """
    length = tokens.shape[1]
    before = torch.zeros(len(tokens), length, length, dtype=torch.bool)
    before[:, :, 1:] = tokens[:, :, None] == tokens[:, None, :-1]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    wanted = (before & seen).to(patterns.dtype)
    even = wanted.sum(-1) / torch.arange(1, length + 1)
    excess = (patterns * wanted[:, None]).sum(-1) - even[:, None]
    return float(excess[..., first:].mean((1, 3)).max())


def in_context(losses: Tensor) -> float:
    """How much better late tokens of a sequence are predicted than early ones: negative if they are.

    Args:
        losses: ``(batch, tokens)``, nats.
    """
    tenth = max(1, losses.shape[1] // 10)
    return float(losses[:, -tenth:].mean() - losses[:, :tenth].mean())


def stages_along(task: Task, run: Trajectory, probes: Probes) -> xr.Dataset:
    """All measures at every checkpoint of a run: variables ``(step)``, each with its ``description``."""
    rows = []
    for step in run.steps:
        with task.pure.holding(task.fitted(run.load(step)).params) as model:
            rows.append(stages(cast(Network, model), probes))
    variables = {name: ("step", [row[name] for row in rows], {"description": _DESCRIPTIONS[name]}) for name in rows[0]}
    return xr.Dataset(variables, {"step": list(run.steps)})


def induction(found: xr.Dataset) -> Transition:
    """When induction is learnt: the rise of prefix matching from 5 % (``lower``) to 90 % (``upper``) of its last value.

    ``step`` is its onset, at 10 %, and ``detail["half"]`` its middle.

    Args:
        found: measures along a run, from :func:`stages_along`.

    Raises:
        ValueError: there is no rise: the run ended on the plateau.
    """
    return rise(found["prefix_matching"], "induction", band=(0.05, 0.9))


def counts_best(found: xr.Dataset) -> int:
    """The checkpoint at which a network is nearest to the unigram rule: the end of the first stage.

    Args:
        found: measures along a run, from :func:`stages_along`.
    """
    return int(found["step"][int(found["kl_unigram"].argmin("step"))])
