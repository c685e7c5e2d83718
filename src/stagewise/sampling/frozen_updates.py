"""The updates of a window at fixed curvature and metric, in whitened displacements: their response, and their path."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stagewise.derivatives import Product, mean_gradient
from stagewise.sampling.metric import relative_rates, update_counts
from stagewise.sampling.posterior import LocalDensity, learning_rates, window_reach

# Along curvature -s the response of a time t is (exp(s t) - 1) / (s t) times that without curvature. Where that is 10,
# s t is 3.6, and a curvature that changes by a fifth on the way changes it by a factor of 2: no size is left to tell.
_MOST_GROWTH = 10


@dataclass(frozen=True, eq=False)
class FrozenUpdates:
    """A window's updates at fixed curvature and metric, of whitened displacements u from the unchanged run.

    A unit of a candidate's gradient g, held during the window, changes the run by

        m <- b m + push (clip (g - H u) - pull u),      u <- (1 - rate decay) u + rate / (1 - b^count) m.

    Attributes:
        rates: learning rate of each update.
        beta: b, how much of the first moment is kept.
        push: share of a gradient that enters it: 1 - b for Adam, 1 for SGD.
        clip: by how much clipping shortens a typical gradient.
        pull: L2 weight decay, which enters through the gradient ``(parameters,)``.
        decay: decoupled weight decay, relative to the learning rate ``(parameters,)``.
        counts: updates that Adam's first moment has seen ``(parameters,)``; of SGD, which corrects nothing, infinite.
    """

    rates: list[float]
    beta: float
    push: float
    clip: float
    pull: Tensor
    decay: Tensor
    counts: Tensor

    @classmethod
    def of(cls, density: LocalDensity) -> FrozenUpdates:
        """The updates of the run after a checkpoint whose optimiser is recorded."""
        checkpoint, optimizer, window = density.checkpoint, density.optimizer, density.posterior.window
        if optimizer is None or window is None:
            raise ValueError("updates need a window and a record of the optimiser")
        vector, scale, adam = density.vector, density.scale, optimizer.name == "adam"
        beta = optimizer.betas[0] if adam else optimizer.momentum
        decays = torch.tensor([optimizer.group_of(name).weight_decay for name in vector.names], dtype=torch.float64)
        decay, relative = vector.spread(decays).to(scale), relative_rates(vector, optimizer)
        return cls(
            rates=learning_rates(window, optimizer, checkpoint.coming_rates),
            beta=beta,
            push=1 - beta if adam else 1.0,
            # Clipping shortens the posterior's window as it does the updates.
            clip=1 / (density.damping * window_reach(window, optimizer, checkpoint.coming_rates)),
            pull=scale**2 * decay * (not optimizer.decoupled),
            decay=decay * (1.0 if relative is None else relative.to(scale)) * optimizer.decoupled,
            counts=update_counts(checkpoint, vector).to(scale) if adam else torch.full_like(scale, torch.inf),
        )

    def length(self, made: int, rate: float) -> Tensor:
        """Of the step by which u follows a unit of m in the update ``made``, counted from 1 ``(parameters,)``."""
        return rate / (1 - self.beta ** (self.counts + made))

    def respond(self, curvature: Product, gradients: Tensor) -> Tensor:
        """f(H) times the gradients of the queries ``(query, parameters)``, by the updates in reverse order.

        Where decays or counts differ between parameters f(H) is not symmetric, and backwards is how a query meets the
        candidates. ``ahead`` is the slope of a query's loss by u after an update, ``memory`` that by m, and ``slope``
        that by the loss's gradient in the update.
        """
        total = memory = torch.zeros_like(gradients)
        ahead = gradients
        for made, rate in reversed(list(enumerate(self.rates, start=1))):
            memory = self.beta * memory + self.length(made, rate) * ahead
            slope = self.push * memory
            total = total + self.clip * slope
            ahead = (1 - rate * self.decay) * ahead - self.clip * curvature(slope) - self.pull * slope
        return total

    def along(self, curvatures: Tensor) -> Tensor:
        """The response along eigen-directions of ``H + pull / clip``, whose curvatures may have any shape.

        Both are float64, on the CPU.
        Decoupled decay and counts are those of most parameters (their medians): where they differ f(H) is not symmetric
        and has no eigen-directions. Of what differs usually, the decay of biases is small beside 1 / (rate W), and a
        count matters in the first dozens of updates.
        """
        decay, counts = (value.median().double().cpu() for value in (self.decay, self.counts))
        alike = replace(self, pull=torch.zeros(()), decay=decay, counts=counts)
        return alike.respond(lambda slopes: curvatures * slopes, torch.ones_like(curvatures))


def runaway(window: int | None, growth: float) -> str:
    """Why updates have no response, where they run away: along negative curvature, or by steps too long for it.

    Args:
        window: how many.
        growth: how many times as far as without curvature they go. Empty where that is not too far.
    """
    if growth <= _MOST_GROWTH:
        return ""
    return (
        f"{window} updates run away at fixed curvature: they go {growth:.2g} times as far as without; use a shorter "
        "window, or window_influence"
    )


def path(density: LocalDensity, updates: FrozenUpdates, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Middle and end of the way that the mean gradient of some samples goes during a window, in whitened displacements.

    The middle is a mean over the updates, each with the weight by which what is trained on in it moves the end.
    """
    vector, known = density.vector, density.checkpoint.first_moment
    still = density.scale == 0
    anchor = torch.where(still, 0.0, density.anchor / density.scale)
    zeros = {name: torch.zeros(shape) for name, shape in zip(vector.names, vector.shapes, strict=True)}
    memory = density.scale * vector.flatten(zeros | {n: known[n] for n in vector.names if n in known}, like=anchor)
    u = passed = middle = weight = torch.zeros_like(anchor)
    followed = 0.0
    for made, rate in enumerate(updates.rates, start=1):
        length = updates.length(made, rate)
        passed, followed = updates.beta * passed + u, updates.beta * followed + 1
        middle, weight = middle + length * passed, weight + length * followed
        slope = updates.clip * mean_gradient(density, u, density.task.train, rows) + updates.pull * (u + anchor)
        memory = updates.beta * memory + updates.push * slope
        u = u - rate * updates.decay * (u + anchor) - length * memory
    return middle / weight, u
