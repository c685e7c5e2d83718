"""A model whose every number is known: a point w in the plane, and samples x that pull at it.

The loss of a sample is |w - x|^2 / 2, so that gradients are w - x, the Hessian is 1, and SGD is a line of arithmetic.
"""

import numpy as np
import torch
from torch import nn

from stagewise.checkpoint import Checkpoint, Optimizer
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.task import Task

RATE = 0.1
TRAIN = np.array([[3.0, 4.0], [-3.0, 4.0], [0.5, 4.0], [-0.5, 4.0], [1.5, 4.0], [-1.5, 4.0]])
NEAR, FAR = np.array([[1.0, 0.0], [2.0, 0.0]]), np.array([[-4.0, 0.0]])
PLACES = {0: (0.0, 0.0), 10: (0.5, -0.5), 20: (1.0, 2.0)}


class Point(nn.Module):
    """Where the springs pull."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x):
        return self.w - x


def losses(model, batch):
    return by_token(model, batch).sum(-1)


def by_token(model, batch):
    """Each coordinate is a token."""
    return model(batch[0]) ** 2 / 2


def task(loss=losses, **settings) -> Task:
    near, far = torch.tensor(NEAR), torch.tensor(FAR)
    given = {
        "train": (torch.tensor(TRAIN),),
        "queries": {"near": (near,), "far": (far,)},
        "train_groups": ["a", "b", "a", "b", "a", "b"],
        "query_groups": {"near": ["first", "second"]},
    }
    return Task(Point(), loss, **given | settings)


def trajectory(batch_size: int = 2) -> Trajectory:
    optimizer = Optimizer("sgd", RATE, batch_size=batch_size)
    return Trajectory.from_checkpoints(
        Checkpoint(step, {"w": torch.tensor(place, dtype=torch.float64)}, optimizer) for step, place in PLACES.items()
    )


def loss(step: int, samples) -> np.ndarray:
    """Of every sample at the checkpoint of a step."""
    return ((np.array(PLACES[step]) - samples) ** 2).sum(-1) / 2
