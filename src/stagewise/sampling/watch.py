"""What the chains see: the losses of every data set at every draw."""

from __future__ import annotations

import torch
from torch import Tensor

from stagewise.sampling.gradient import Batching, over_chains
from stagewise.sampling.posterior import LocalDensity
from stagewise.task import Batch


class Watch:
    """Evaluates and keeps the losses of the training set and of every query set.

    Args:
        density: whose losses, in which coordinates.
        batching: see ``over_chains``.
        reflect: also evaluate at the reflected points.
    """

    def __init__(self, density: LocalDensity, batching: Batching, reflect: bool) -> None:
        task = density.task
        sets = {"train": task.train} | {f"queries/{name}": data for name, data in task.queries.items()}
        # Equal data have equal losses: a query set that is the training set is evaluated once.
        self._content = {name: data.digest for name, data in sets.items()}
        self._batches = {data.digest: data.batches(task.forward_batch, task.device) for data in sets.values()}
        self._signs = {"loss": 1.0} | ({"loss_reflected": -1.0} if reflect else {})
        self._draws: dict[tuple[str, str], list[Tensor]] = {
            (content, variable): [] for content in self._batches for variable in self._signs
        }
        self._losses = over_chains(density.losses, batching)
        self._origin = torch.zeros_like(density.anchor)

    def draw(self, u: Tensor) -> Tensor:
        """Record the losses at ``u (chain, parameters)``; returns whether they are finite ``(chain,)``."""
        finite = torch.ones(len(u), dtype=torch.bool, device=u.device)
        places = torch.cat([sign * u for sign in self._signs.values()])
        for content, batches in self._batches.items():
            seen = torch.split(self._evaluate(places, batches), len(u))
            for variable, losses in zip(self._signs, seen, strict=True):
                finite &= torch.isfinite(losses).flatten(1).all(1)
                self._draws[content, variable].append(losses.float().cpu())
        return finite

    def traces(self) -> dict[str, dict[str, Tensor]]:
        """All that was recorded: data set -> variable -> ``(chain, draw, sample[, token])``, float32.

        And ``loss_anchor (sample[, token])``, the losses at the checkpoint.
        """
        recorded = {
            content: {"loss_anchor": self._evaluate(self._origin[None], batches)[0].float().cpu()}
            for content, batches in self._batches.items()
        }
        for (content, variable), draws in self._draws.items():
            recorded[content][variable] = torch.stack(draws, dim=1)
        return {name: recorded[content] for name, content in self._content.items()}

    @torch.no_grad()
    def _evaluate(self, u: Tensor, batches: list[Batch]) -> Tensor:
        """Losses of a whole data set at ``u (chain, parameters)``: ``(chain, sample[, token])``."""
        return torch.cat([self._losses(u, batch) for batch in batches], dim=1)
