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
        self._batches = {name: data.batches(task.forward_batch, task.device) for name, data in sets.items()}
        self._signs = {"loss": 1.0} | ({"loss_reflected": -1.0} if reflect else {})
        self._draws: dict[tuple[str, str], list[Tensor]] = {
            (name, variable): [] for name in sets for variable in self._signs
        }
        self._losses = over_chains(density.losses, batching)
        self._origin = torch.zeros_like(density.anchor)

    def draw(self, u: Tensor) -> Tensor:
        """Record the losses at ``u (chain, parameters)``; returns whether they are finite ``(chain,)``."""
        finite = torch.ones(len(u), dtype=torch.bool, device=u.device)
        for (name, variable), draws in self._draws.items():
            losses = self._evaluate(self._signs[variable] * u, self._batches[name])
            finite &= torch.isfinite(losses).flatten(1).all(1)
            draws.append(losses.float().cpu())
        return finite

    def traces(self) -> dict[str, dict[str, Tensor]]:
        """All that was recorded: data set -> variable -> ``(chain, draw, sample[, token])``, float32.

        And ``loss_anchor (sample[, token])``, the losses at the checkpoint.
        """
        traces: dict[str, dict[str, Tensor]] = {
            name: {"loss_anchor": self._evaluate(self._origin[None], batches)[0].float().cpu()}
            for name, batches in self._batches.items()
        }
        for (name, variable), draws in self._draws.items():
            traces[name][variable] = torch.stack(draws, dim=1)
        return traces

    @torch.no_grad()
    def _evaluate(self, u: Tensor, batches: list[Batch]) -> Tensor:
        """Losses of a whole data set at ``u (chain, parameters)``: ``(chain, sample[, token])``."""
        return torch.cat([self._losses(u, batch) for batch in batches], dim=1)
