"""Two small problems: one with a closed form, one with everything a real run has."""

import numpy as np
import torch
from torch import nn

from stagewise.checkpoint import Checkpoint, Optimizer
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.task import Task

N, D, RATE = 24, 4, 0.15
LABELS = np.array(list("abc") * (N // 3))


def squared_error(model, batch):
    x, y = batch
    return 0.5 * (model(x)[:, 0] - y) ** 2


class Regression:
    """Linear regression: every loss is quadratic, so gradient descent has a closed form."""

    def __init__(self, train_groups=LABELS):
        random = np.random.default_rng(0)
        self.x, self.xq = random.normal(size=(N, D)), random.normal(size=(9, D))
        self.y, self.yq = random.normal(size=N), random.normal(size=9)
        model = nn.Linear(D, 1, bias=False).double()
        data = [tuple(map(torch.from_numpy, pair)) for pair in ((self.x, self.y), (self.xq, self.yq))]
        self.task = Task(
            model,
            squared_error,
            train=data[0],
            queries={"val": data[1]},
            train_groups=train_groups,
            query_groups={"val": list("aaabbbccc")},
        )

    def trajectory(self, w, step=10, **optimizer):
        params = {"weight": torch.from_numpy(w)[None]}
        rule = Optimizer("sgd", RATE, **{"batch_size": 0, **optimizer})
        return Trajectory.from_checkpoints([Checkpoint(step, params, rule)])

    def minimiser(self):
        return np.linalg.lstsq(self.x, self.y, rcond=None)[0]

    def after(self, w, steps, beta):
        """Gradient descent on (1/n) sum_i beta_i l_i: w* + (1 - rate H)^steps (w - w*)."""
        hessian = self.x.T @ (beta[:, None] * self.x) / N
        target = np.linalg.solve(hessian, self.x.T @ (beta * self.y) / N)
        return target + np.linalg.matrix_power(np.eye(D) - RATE * hessian, steps) @ (w - target)

    def query_means(self, w):
        return (0.5 * (self.xq @ w - self.yq) ** 2).reshape(3, 3).mean(1)


def classifier(dtype=torch.float64, frozen=None, model=None):
    """Classes of 90 points in 6 dimensions; ``frozen`` is the number of a layer that does not move."""
    generator = torch.Generator().manual_seed(1)
    model = (model or nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))).to(dtype)
    for parameter in model.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    if frozen is not None:
        model[frozen].requires_grad_(False)
    y = torch.arange(90) % 3
    x = torch.randn(90, 6, generator=generator, dtype=dtype) + nn.functional.one_hot(y, 6)

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    return Task(
        model,
        loss,
        train=(x[:60], y[:60]),
        queries={"val": (x[60:], y[60:])},
        train_groups=y[:60],
        query_groups={"val": y[60:]},
    )
