"""The digits, the network and its training run."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from stagewise.checkpoint import Optimizer
from stagewise.checkpoints.directory import write_checkpoint
from stagewise.retraining.schedule import BatchOrder
from stagewise.retraining.training import train_and_record
from stagewise.task import Task

TRAINING_SAMPLES = 1200
LEARNING_RATE = 2e-3
INITIALISATION_SEED = 0
ORDER_SEED = 0


def task() -> Task:
    """The task: 1,200 training digits, the other 597 as the query set, both grouped by class."""
    digits = load_digits()
    shuffled = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32)[shuffled] / 16
    classes = torch.tensor(digits.target)[shuffled]
    train = (images[:TRAINING_SAMPLES], classes[:TRAINING_SAMPLES])
    held_out = (images[TRAINING_SAMPLES:], classes[TRAINING_SAMPLES:])
    return Task(
        network(),
        cross_entropy,
        train=train,
        queries={"held-out": held_out},
        train_groups=train[1].tolist(),
        query_groups={"held-out": held_out[1].tolist()},
    )


def network() -> nn.Module:
    """A 64-32-10 tanh network with its initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(INITIALISATION_SEED)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).eval()


def cross_entropy(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Loss of every digit, nats."""
    images, classes = batch
    return functional.cross_entropy(model(images), classes, reduction="none")


def batch_order(batch_size: int) -> BatchOrder:
    """The batches of the training run; 0 is the whole training set."""
    return BatchOrder(TRAINING_SAMPLES, batch_size, ORDER_SEED)


def record(folder: Path, batch_size: int, steps: Sequence[int]) -> None:
    """Train the network with Adam and write checkpoints at ``steps``; batch size 0 is the whole training set."""
    partial = folder.with_name(f".{folder.name}-partial")  # a killed recording must not pass for a whole one
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    optimizer = Optimizer("adam", LEARNING_RATE, batch_size=batch_size)
    for checkpoint in train_and_record(task(), optimizer, batch_order(batch_size), steps):
        write_checkpoint(partial, checkpoint)
    partial.rename(folder)
