"""The network's own stages: how far it is from each exact rule, and what its attention does.

All are measured on fixed probes, so that what changes over a run is the network alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import xarray as xr
from torch import Tensor

from stagewise.dynamics.stages import Transition, rise
from stagewise.studies.induction.network import Network
from stagewise.studies.induction.rules import RULES
from stagewise.studies.measures import DESCRIPTIONS, Numbers, divergence, in_context, prefix_matching, previous_token

DESCRIBED = {f"kl_{name}": f"KL({name} rule || network), mean over tokens, nats" for name in RULES} | DESCRIPTIONS


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
def stages(model: Network, probes: Probes) -> Numbers:
    """All measures of a network, by name.

    Returns:
        ``kl_uniform``, ``kl_unigram``, ``kl_bigram``: KL(rule || network), the mean over all predicted tokens, nats.
        Of the bigram rule, which is exact, it is what the network's expected loss is above the least possible.
        ``previous_token``, on the probes; ``prefix_matching``, on the second half of the repeated pieces, where every
        token has come before; ``in_context``, nats: see :mod:`stagewise.studies.measures`.
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


def induction(found: xr.Dataset) -> Transition:
    """When induction is learnt: the rise of prefix matching from 5 % (``lower``) to 90 % (``upper``) of its last value.

    ``step`` is its onset, at 10 %, and ``detail["half"]`` its middle.

    Args:
        found: measures along a run, from :func:`stagewise.studies.measures.along`.

    Raises:
        ValueError: there is no rise: the run ended on the plateau.
    """
    return rise(found["prefix_matching"], "induction", band=(0.05, 0.9))


def counts_best(found: xr.Dataset) -> int:
    """The checkpoint at which a network is nearest to the unigram rule: the end of the first stage.

    Args:
        found: measures along a run, from :func:`stagewise.studies.measures.along`.
    """
    return int(found["step"][int(found["kl_unigram"].argmin("step"))])
