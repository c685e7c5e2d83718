"""The network's own stages: its loss on every class, its distance from simple rules, and what its attention does.

All are measured on fixed probes, so that what changes over a run is the network alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from stagewise.dynamics.stages import Transition, rise
from stagewise.studies.chance import Labels
from stagewise.studies.language.classes import CLASSES, FIRST, INDUCTION
from stagewise.studies.language.network import logits_and_patterns
from stagewise.studies.language.ngrams import NGrams
from stagewise.studies.measures import DESCRIPTIONS, Numbers, divergence, in_context, prefix_matching, previous_token

RULES = ("unigram", "bigram")

LEAST = 0.01
"""Share of attention, or nats, that a measure gains over a run, if it is to be called a rise."""

DESCRIBED = {
    "loss": "mean loss of the predicted tokens, nats",
    **{f"loss_{name}": f"the same of {name} tokens" for name in CLASSES},
    "repetition": "loss of first occurrences minus that of the induction patterns that repeat them, nats",
    **{f"kl_{name}": f"KL({name} rule || network), mean over tokens, nats" for name in RULES},
    **DESCRIPTIONS,
}


@dataclass(frozen=True, eq=False)
class Probes:
    """Fixed data to measure a network on.

    Attributes:
        tokens: sequences that no run is trained on ``(n, length)``.
        classes: of their predicted tokens ``(n, length - 1)``.
        rules: counted in the training set.
        repeated: random tokens, each sequence a piece that comes twice ``(n, 2 * piece)``.
    """

    tokens: Tensor
    classes: Labels
    rules: NGrams
    repeated: Tensor

    @classmethod
    def of(cls, tokens: Tensor, classes: Labels, rules: NGrams, generator: torch.Generator) -> Probes:
        """Those on some sequences; as many random pieces are drawn."""
        n, length = tokens.shape
        piece = torch.randint(len(rules.unigram), (n, length // 2), generator=generator)
        return cls(tokens, classes, rules, piece.repeat(1, 2))

    def of_class(self, losses: Tensor) -> Numbers:
        """Mean of losses ``(n, length - 1)`` of all tokens and of those of every class."""
        parts = {f"loss_{name}": losses[torch.from_numpy(self.classes == name)] for name in CLASSES}
        return {"loss": float(losses.mean())} | {name: float(part.mean()) for name, part in parts.items()}


@torch.no_grad()
def stages(model: Any, probes: Probes) -> Numbers:
    """All measures of a network, by name: see :data:`DESCRIBED`.

    Prefix matching is that in the second half of the repeated pieces, where every token has come before.
    """
    logits, patterns = logits_and_patterns(model, probes.tokens[:, :-1])
    log_probabilities = logits.log_softmax(-1)
    rules = probes.rules.log_probabilities(probes.tokens)
    losses = losses_of(log_probabilities, probes.tokens)
    of_class = probes.of_class(losses)
    matched = logits_and_patterns(model, probes.repeated[:, :-1])[1]
    return {
        **of_class,
        "repetition": of_class[f"loss_{FIRST}"] - of_class[f"loss_{INDUCTION}"],
        **{f"kl_{name}": float(divergence(rule, log_probabilities).mean()) for name, rule in rules.items()},
        "previous_token": previous_token(patterns),
        "prefix_matching": prefix_matching(matched, probes.repeated[:, :-1], probes.repeated.shape[1] // 2),
        "in_context": in_context(losses),
    }


def losses_of(log_probabilities: Tensor, tokens: Tensor) -> Tensor:
    """Minus the log probability of what came ``(n, length - 1)``, float64."""
    return -log_probabilities.gather(-1, tokens[:, 1:, None])[..., 0].double()


def transitions(found: xr.Dataset) -> list[Transition]:
    """What there is of stages in a run; a measure that does not rise has none.

    * ``unigram``, ``bigram``: the checkpoint at which the network is nearest to that rule, between its neighbours.
    * ``previous token``, ``prefix matching``, ``in context``, ``repetition``: the rise of the attention, or of what
      late tokens gain over early ones and repeated pairs over first ones, from 5 % to 90 % of the last value; onset at
      10 %. What has gained less than :data:`LEAST` has not risen.

    Args:
        found: measures along a run.
    """
    nearest = [_nearest(found, name) for name in RULES]
    gains = {
        "previous token": found["previous_token"],
        "prefix matching": found["prefix_matching"],
        "in context": -found["in_context"],
        "repetition": found["repetition"],
    }
    risen = [_rise(curve, name) for name, curve in gains.items()]
    return [*nearest, *(one for one in risen if one is not None)]


def _nearest(found: xr.Dataset, rule: str) -> Transition:
    steps, distance = found["step"].values.astype(float), found[f"kl_{rule}"].values
    place = int(distance.argmin())
    lower, upper = steps[max(0, place - 1)], steps[min(place + 1, len(steps) - 1)]
    return Transition(rule, "minimum", steps[place], lower, upper, {"value": float(distance[place])})


def _rise(curve: xr.DataArray, name: str) -> Transition | None:
    """Of what a curve has gained since the first checkpoint."""
    gained = curve - curve[0]
    return rise(gained, name, band=(0.05, 0.9)) if gained[-1] >= LEAST else None
