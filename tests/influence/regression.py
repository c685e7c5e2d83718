"""Linear regression in float64: losses are quadratic, so posteriors are Gaussian and retraining has a closed form."""

import numpy as np
import torch
from torch import nn

from stagewise.checkpoint import Checkpoint, Optimizer
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.task import Task


def squared_error(model, batch):
    x, y = batch
    return 0.5 * (model(x)[:, 0] - y) ** 2


class Regression:
    """Losses 0.5 (x w - y)^2 of n training and q query samples."""

    def __init__(self, x, y, xq, yq, w, **labels):
        self.x, self.y, self.xq, self.yq, self.w = x, y, xq, yq, w
        data = [tuple(map(torch.from_numpy, pair)) for pair in ((x, y), (xq, yq))]
        model = nn.Linear(x.shape[1], 1, bias=False).double()
        self.task = Task(model, squared_error, train=data[0], queries={"val": data[1]}, **labels)

    @classmethod
    def random(cls, n=8, q=3, d=2, seed=0, **labels):
        random = np.random.default_rng(seed)
        x, xq, w = (random.normal(size=shape) for shape in ((n, d), (q, d), d))
        return cls(x, random.normal(size=n), xq, random.normal(size=q), w, **labels)

    def trajectory(self, rate=0.1, step=10):
        params = {"weight": torch.from_numpy(self.w)[None]}
        return Trajectory.from_checkpoints([Checkpoint(step, params, Optimizer("sgd", rate, batch_size=0))])

    def losses(self, w, query=False):
        x, y = (self.xq, self.yq) if query else (self.x, self.y)
        return 0.5 * (w @ x.T - y) ** 2

    @property
    def hessian(self):
        return self.x.T @ self.x / len(self.x)

    def posterior(self, kappa, gamma, beta):
        """Mean and covariance of exp(-kappa sum_i beta_i l_i(w) - gamma/2 |w - w*|^2)."""
        precision = kappa * self.x.T @ (beta[:, None] * self.x) + gamma * np.eye(len(self.w))
        covariance = np.linalg.inv(precision)
        return covariance @ (kappa * self.x.T @ (beta * self.y) + gamma * self.w), covariance

    def expected_query_losses(self, kappa, gamma, beta):
        mean, covariance = self.posterior(kappa, gamma, beta)
        return self.losses(mean, query=True) + 0.5 * np.einsum("qi,ij,qj->q", self.xq, covariance, self.xq)
