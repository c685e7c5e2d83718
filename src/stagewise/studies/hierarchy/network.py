"""The deep linear network, its task, and its training runs, recorded at every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from stagewise.checkpoint import Checkpoint, Optimizer
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.retraining.schedule import BatchOrder, Schedule
from stagewise.retraining.start import start_at
from stagewise.retraining.training import train
from stagewise.retraining.updates import TrainingState
from stagewise.studies.hierarchy.theory.tree import Floats, Items
from stagewise.task import Task
from stagewise.vector import ParameterVector

Start = Literal["aligned", "random"]

FIRST, SECOND = "0.weight", "1.weight"


def task(
    items: Items,
    *,
    width: int = 32,
    start: Start = "random",
    a0: float = 1e-4,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Task:
    """Predict the features of an item from its name: y = W2 W1 x, loss 1/2 |y - W2 W1 x|^2.

    Args:
        items: the data; every item is a train group and a query.
        width: hidden units.
        start: initial weights. ``"random"``: N(0, 2 a0 / width). ``"aligned"``: along the singular vectors of the
            training data, every mode with strength ``a0``, the case that the theory solves exactly.
        a0: initial strength of the modes; small.
        seed: of the initial weights.
        dtype: of weights and data: float64 for exact comparisons, float32 for sampling.

    Raises:
        ValueError: ``a0`` is not positive, or the network is too narrow for an aligned start.
    """
    inputs = torch.eye(len(items.targets), dtype=dtype)
    shown = inputs[torch.from_numpy(items.shown)], torch.from_numpy(items.shown_targets).to(dtype)
    truth = inputs, torch.from_numpy(items.targets).to(dtype)
    names = np.array(items.names)
    return Task(
        network(items, width, start, a0, seed).to(dtype),
        squared_error,
        train=shown,
        queries={"items": truth},
        train_groups=names[items.shown].tolist(),
        query_groups={"items": names.tolist()},
    )


def network(items: Items, width: int, start: Start, a0: float, seed: int) -> nn.Module:
    """Two linear layers with their initial weights."""
    if not 0 < a0 < float("inf") or width < 1 or start not in get_args(Start):
        raise ValueError(
            f"need 0 < a0 < inf, width >= 1 and start in {get_args(Start)}, got {a0}, {width} and {start!r}"
        )
    outputs, inputs = items.targets.T.shape
    generator = np.random.default_rng(seed)
    if start == "aligned":
        first, second = _aligned(input_output_correlation(items), width, a0, generator)
    else:
        first = generator.standard_normal((width, inputs)) * np.sqrt(2 * a0 / width)
        second = generator.standard_normal((outputs, width)) * np.sqrt(2 * a0 / width)
    # torch draws initial weights of its own, which must not move the caller's random numbers on.
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Linear(inputs, width, bias=False), nn.Linear(width, outputs, bias=False)).double()
    model.load_state_dict({FIRST: torch.from_numpy(first), SECOND: torch.from_numpy(second)})
    return model.eval()


def input_output_correlation(items: Items) -> Floats:
    """Sum over training samples of target x input^T: ``(feature, item)``."""
    total = np.zeros(items.targets.T.shape)
    np.add.at(total.T, items.shown, items.shown_targets)
    return total


def _aligned(data: Floats, width: int, a0: float, generator: np.random.Generator) -> tuple[Floats, Floats]:
    u, s, vt = np.linalg.svd(data, full_matrices=False)
    if width < len(s):
        raise ValueError(f"an aligned start needs a hidden unit for each of {len(s)} modes, got width {width}")
    frame = np.linalg.qr(generator.standard_normal((width, len(s))))[0] * np.sqrt(a0)
    return frame @ vt, u @ frame.T


def squared_error(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Half the squared error of every item ``(batch,)``."""
    inputs, targets = batch
    error: Tensor = model(inputs) - targets
    return error.square().sum(-1) / 2


def optimizer(items: Items, name: Literal["sgd", "adam"], rate: float, batch_size: int = 0) -> Optimizer:
    """The update rule of a run: gradient descent or Adam, with the whole training set or with minibatches.

    Args:
        items: the data.
        name: of the rule.
        rate: of SGD per sample: the objective is a mean over samples, so it is given rate x n. Of Adam as it is.
        batch_size: samples per update; 0 is all.
    """
    learning_rate = rate * len(items.shown) if name == "sgd" else rate
    return Optimizer(name, learning_rate, batch_size=batch_size)


@dataclass(frozen=True, eq=False)
class Run:
    """A training run, with its weights at every step.

    Attributes:
        task: the task; its model holds the weights at step 0.
        optimizer: how it was trained.
        weights: ``(step, parameters)``, from step 0.
        trajectory: checkpoints at some of the steps, with the optimiser's memory.
    """

    task: Task
    optimizer: Optimizer
    weights: Tensor
    trajectory: Trajectory

    @property
    def start(self) -> Checkpoint:
        """The checkpoint before the first update."""
        return Checkpoint(0, self.task.state(), self.optimizer)

    @property
    def order(self) -> BatchOrder:
        """The samples of every update."""
        return batch_order(self.task, self.optimizer)

    def layers(self, steps: Sequence[int] | slice = slice(None)) -> tuple[Floats, Floats]:
        """Weights at the steps: W1 ``(step, hidden, item)`` and W2 ``(step, feature, hidden)``."""
        named = ParameterVector.of(self.task).unflatten(self.weights[steps])
        return named[FIRST].numpy(), named[SECOND].numpy()

    def representations(self, steps: Sequence[int] | slice = slice(None)) -> Floats:
        """Hidden representation of every item, ``(step, item, hidden)``."""
        return np.swapaxes(self.layers(steps)[0], 1, 2)


def batch_order(task: Task, optimizer: Optimizer) -> BatchOrder:
    """The samples of every update of a run with this rule."""
    return BatchOrder(len(task.train), optimizer.batch_size)


def record(task: Task, optimizer: Optimizer, last: int, kept: Sequence[int]) -> Run:
    """Train from the task's own weights for ``last`` steps, with checkpoints at ``kept``.

    Raises:
        ValueError: a checkpoint lies outside of the run.
    """
    if outside := sorted(step for step in kept if not 0 <= step <= last):
        raise ValueError(f"checkpoints must lie between step 0 and {last}, got {outside}")
    first, wanted = Checkpoint(0, task.state(), optimizer), set(kept)
    start = start_at(task, first)
    weights, checkpoints = [start.params], [first] if 0 in wanted else []

    def keep(step: int, state: TrainingState) -> None:
        weights.append(state.params[0])
        if step in wanted:
            checkpoints.append(start.recorded(step, state))

    train(start, start.state(), [Schedule()], batch_order(task, optimizer), range(last), keep)
    return Run(task, optimizer, torch.stack(weights).detach(), Trajectory.from_checkpoints(checkpoints))
