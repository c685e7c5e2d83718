"""Small nonlinear networks in float64, and their derivatives by plain autograd and dense linear algebra."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev

from stagewise.checkpoint import Checkpoint, Optimizer
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.task import Task


def cross_entropy(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y, reduction="none")


def squared_error(model, batch):
    x, y = batch
    return 0.5 * (model(x) - nn.functional.one_hot(y, 3)).square().sum(-1)


def token_cross_entropy(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x).transpose(1, 2), y, reduction="none")


LOSSES = {"cross_entropy": cross_entropy, "squared_error": squared_error, "tokens": token_cross_entropy}


def network(hidden=4):
    layers = [nn.Linear(3, 3)] if hidden == 0 else [nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 3)]
    return nn.Sequential(*layers).double()


@dataclass
class Dense:
    """What a network's influence is made of, each by an independent road.

    Attributes:
        metric: diagonal P ``(parameters,)``.
        train: gradient of each training sample's loss ``(train, parameters)``.
        query: gradient of each query sample's loss ``(query, parameters)``.
        hessian: of the mean training loss.
        gauss_newton: J^T B J of the same.
    """

    metric: np.ndarray
    train: np.ndarray
    query: np.ndarray
    hessian: np.ndarray
    gauss_newton: np.ndarray

    def influence(self, curvature, damping):
        inverse = np.linalg.inv(curvature + damping * np.diag(1 / self.metric))
        return -self.train @ inverse @ self.query.T / len(self.train)


class Problem:
    """A network with 11 training and 4 query samples, at a checkpoint of an SGD or Adam run."""

    def __init__(self, loss="cross_entropy", hidden=4, optimizer="sgd", rate=0.1, step=5, **groups):
        random = torch.Generator().manual_seed(0)
        shape = (2,) if loss == "tokens" else ()
        x = torch.randn(15, *shape, 3, generator=random, dtype=torch.float64)
        y = torch.randint(3, (15, *shape), generator=random)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = network(hidden)
        self.task = Task(model, LOSSES[loss], train=(x[:11], y[:11]), queries={"val": (x[11:], y[11:])}, **groups)
        self.params = {name: p.detach().clone() for name, p in model.named_parameters()}
        second = {name: torch.rand(p.shape, generator=random).double() + 0.1 for name, p in self.params.items()}
        rule = Optimizer(optimizer, rate, batch_size=0)
        self.checkpoint = Checkpoint(step, self.params, rule, {}, second if optimizer == "adam" else {})
        self.trajectory = Trajectory.from_checkpoints([self.checkpoint])

    def dense(self):
        task, shapes = self.task, [p.shape for p in self.params.values()]
        flat = torch.cat([p.reshape(-1) for p in self.params.values()])

        def named(w):
            pieces = w.split([s.numel() for s in shapes])
            return {n: p.reshape(s) for n, p, s in zip(self.params, pieces, shapes, strict=True)}

        def outputs(w, batch):
            return functional_call(task.model, named(w), (batch[0],))

        def losses(w, batch):
            per_token = task.loss(lambda _: outputs(w, batch), batch)
            return per_token.reshape(len(batch[1]), -1).mean(1)

        train, query = (s.batch(slice(None)) for s in (task.train, task.queries["val"]))
        J = jacrev(outputs)(flat, train).flatten(0, -2)
        B = hessian(lambda z: task.loss(lambda _: z, train).mean())(outputs(flat, train))
        return Dense(
            self.metric(),
            *(self.gradients(losses, flat, batch) for batch in (train, query)),
            hessian(lambda w: losses(w, train).mean())(flat).numpy(),
            (J.T @ B.reshape(len(J), len(J)) @ J).numpy(),
        )

    def gradients(self, losses, flat, batch):
        w = flat.clone().requires_grad_()
        return np.stack([torch.autograd.grad(loss, w, retain_graph=True)[0] for loss in losses(w, batch)])

    def metric(self):
        checkpoint = self.checkpoint
        if not checkpoint.second_moment:
            return np.ones(sum(p.numel() for p in self.params.values()))
        v = torch.cat([checkpoint.second_moment[name].reshape(-1) for name in self.params])
        return 1 / (np.sqrt(v.numpy() / (1 - 0.999**checkpoint.step)) + 1e-8)
