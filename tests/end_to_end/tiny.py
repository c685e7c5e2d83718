"""A study small enough to run in a second: logistic regression on two noisy classes, trained with Adam."""

from pathlib import Path

import torch
import yaml
from torch import nn
from torch.nn import functional

from stagewise.checkpoint import Optimizer
from stagewise.checkpoints.directory import write_checkpoint
from stagewise.retraining.schedule import BatchOrder
from stagewise.retraining.training import train_and_record
from stagewise.task import Task


def losses(model, batch):
    inputs, targets = batch
    return functional.cross_entropy(model(inputs), targets, reduction="none")


def other_losses(model, batch):
    return losses(model, batch) * 2


def task(shift: float = 0.0, width: int = 3, loss: str = "losses", labelled: bool = True) -> Task:
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(40) % 2
    inputs = torch.randn(40, width, generator=generator) + targets[:, None] + shift
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Linear(width, 2)
    if not labelled:
        query = (inputs[24:], targets[24:])
        return Task(model, losses, train=(inputs[:24], targets[:24]), queries={"one": query, "two": query})
    labels = [f"class {target}" for target in targets[:24].tolist()]
    return Task(
        model,
        {"losses": losses, "other_losses": other_losses}[loss],
        train=(inputs[:24], targets[:24]),
        queries={"test": (inputs[24:], targets[24:])},
        train_groups=labels,
        query_groups={"test": [f"class {target}" for target in targets[24:].tolist()]},
    )


def write_run(folder: Path, **changes) -> Path:
    """Checkpoints at three steps and a configuration; returns the configuration's path."""
    optimizer = Optimizer("adam", 0.02, batch_size=8)
    for checkpoint in train_and_record(task(), optimizer, BatchOrder(24, 8, 0), [5, 20, 40]):
        write_checkpoint(folder / "checkpoints", checkpoint)
    content = {
        "task": f"{__file__}:task",
        "checkpoints": "checkpoints",
        "out": "run",
        "posterior": {"window": 10},
        "sampling": {"chains": 4, "draws": 40, "batching": "stacked"},
        "retraining": {"repeats": 2},
        "workers": 1,
    } | changes
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
