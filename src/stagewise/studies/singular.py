"""Singular models whose learning coefficient is known, and the exact value at finite n_beta and gamma.

    crossing                L(w) = prod_k w_k^(2 p_k),  w* = 0              coefficient 1 / (2 max_k p_k)
    reduced-rank regression L(A, B) = 1/2 |B A - B* A*|^2                   Aoyagi & Watanabe (2005)

At n_beta the posterior exp(-n_beta L - gamma/2 |w - w*|^2) has  n_beta E[L] = coefficient - (m - 1) / log n_beta + ...
for multiplicity m, so that for m > 1 no n_beta within reach shows the coefficient itself: ``rise`` is the integral.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stagewise.checkpoint import Checkpoint
from stagewise.task import Task

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Singular:
    """A model at a point where its loss is zero.

    Attributes:
        name: in words.
        task: whose mean training loss is L, in float64.
        coefficient: the learning coefficient at the checkpoint.
        multiplicity: its multiplicity.
        rise: n_beta E[L] over the posterior of ``(n_beta, gamma)``, by quadrature or importance sampling.
    """

    name: str
    task: Task
    coefficient: float
    multiplicity: int
    rise: Callable[[float, float], float]

    @property
    def checkpoint(self) -> Checkpoint:
        """The point."""
        return Checkpoint(0, self.task.state())


def crossing(*powers: int) -> Singular:
    """The loss  prod_k w_k^(2 p_k)  of one or two weights at 0."""
    x = torch.tensor([[0.5], [1.0], [1.5], [4.5**0.5]], dtype=torch.float64)  # of mean square 2
    data = (x, torch.zeros_like(x))
    task = Task(_Monomial(powers), _squared_error, train=data, queries={"same": data})
    coefficient = 1 / (2 * max(powers))
    name = "crossing " + " ".join(f"w{k + 1}^{2 * p}" for k, p in enumerate(powers))
    return Singular(name, task, coefficient, powers.count(max(powers)), partial(_crossing_rise, powers))


def reduced_rank(inputs: int, hidden: int, outputs: int, rank: int) -> Singular:
    """A linear network that has learned a map of this rank, on whitened inputs, with no weight that it does not need.

    Of all networks that make this map it is the most singular one, which the coefficient is of.
    """
    model = nn.Sequential(nn.Linear(inputs, hidden, bias=False), nn.Linear(hidden, outputs, bias=False)).double()
    first, second = _diagonal(hidden, inputs, rank), _diagonal(outputs, hidden, rank)
    for layer, weight in zip(model, (first, second), strict=True):
        layer.weight.data = torch.from_numpy(weight)
    x = inputs**0.5 * torch.eye(inputs, dtype=torch.float64)
    data = (x, x @ torch.from_numpy(second @ first).T)
    task = Task(model, _squared_error, train=data, queries={"same": data})
    coefficient, multiplicity = aoyagi_watanabe(inputs, hidden, outputs, rank)
    name = f"rank {rank} by {inputs}-{hidden}-{outputs}"
    return Singular(name, task, coefficient, multiplicity, partial(_regression_rise, first, second))


def aoyagi_watanabe(inputs: int, hidden: int, outputs: int, rank: int) -> tuple[float, int]:
    """Learning coefficient and multiplicity of reduced-rank regression, at the most singular of its minima."""
    m, n, h, r = inputs, outputs, hidden, rank
    if m + h < n + r:
        return (h * m - h * r + n * r) / 2, 1
    if n + h < m + r:
        return (h * n - h * r + m * r) / 2, 1
    if m + n < h + r:
        return m * n / 2, 1
    eightfold = 2 * (h + r) * (m + n) - (m - n) ** 2 - (h + r) ** 2
    odd = (m + n + h + r) % 2
    return (eightfold + odd) / 8, 1 + odd


class _Monomial(nn.Module):
    def __init__(self, powers: tuple[int, ...]) -> None:
        super().__init__()
        self.powers = powers
        self.weights = nn.Parameter(torch.zeros(len(powers), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        for k, power in enumerate(self.powers):
            x = x * self.weights[k] ** power
        return x


def _squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    losses: Tensor = 0.5 * (model(x) - y).square().sum(1)
    return losses


def _diagonal(rows: int, columns: int, rank: int) -> Floats:
    return np.diag(np.ones(max(rows, columns)))[:rows, :columns] * (np.arange(columns) < rank)


def _crossing_rise(powers: tuple[int, ...], n_beta: float, gamma: float) -> float:
    """By the trapezoidal rule in log |w|: weights much smaller than any that count, to those nine widths out."""
    u = np.exp(np.linspace(-30, np.log(9), 3000))
    mass = u * np.exp(-(u**2) / 2)
    rise, weight = np.array(n_beta), np.array(1.0)
    for power in powers:
        rise, weight = np.multiply.outer(rise, (u / gamma**0.5) ** (2 * power)), np.multiply.outer(weight, mass)
    weight = weight * np.exp(-rise)
    return float((weight * rise).sum() / weight.sum())


def _regression_rise(first: Floats, second: Floats, n_beta: float, gamma: float, draws: int = 2**18) -> float:
    """The second layer is integrated out exactly; the first by importance sampling of each row at many widths.

    Raises:
        ValueError: fewer than a thousand draws count.
    """
    hidden, inputs = first.shape
    widths = np.geomspace(0.3 / n_beta**0.5, 1 / gamma**0.5, 12)
    random = np.random.default_rng(0)
    away = random.choice(widths, (draws, hidden, 1)) * random.normal(size=(draws, hidden, inputs))
    square = (away**2).sum(2)
    rows = np.exp(-square[..., None] / (2 * widths**2)) / widths**inputs
    # Of every row of the second layer b: n_beta/2 |A^T b - t|^2 + gamma/2 |b - b*|^2, a Gaussian in b - b*.
    there = first + away
    precision = n_beta * there @ there.swapaxes(1, 2) + gamma * np.eye(hidden)
    missing = -np.einsum("dhm,oh->dom", away, second)  # t - A^T b*
    pull = n_beta * np.einsum("dhm,dom->dho", there, missing)
    centre = np.linalg.solve(precision, pull)
    left = missing - np.einsum("dhm,dho->dom", there, centre)
    gram = there @ there.swapaxes(1, 2)
    spread = len(second) * np.trace(np.linalg.solve(precision, gram), axis1=1, axis2=2)
    rise = n_beta / 2 * ((left**2).sum((1, 2)) + spread)
    exponent = n_beta / 2 * (missing**2).sum((1, 2)) - (pull * centre).sum((1, 2)) / 2
    log_weight = -exponent - len(second) / 2 * np.linalg.slogdet(precision)[1]
    log_weight -= gamma / 2 * square.sum(1) + np.log(rows.mean(2)).sum(1)
    weight = np.exp(log_weight - log_weight.max())
    if (count := weight.sum() ** 2 / (weight**2).sum()) < 1000:
        raise ValueError(f"the integral rests on {count:.0f} draws, expected 1000; use a smaller n_beta")
    return float((weight * rise).sum() / weight.sum())
