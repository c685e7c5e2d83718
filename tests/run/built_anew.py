"""A small task and its builders; workers import them, and so nothing else stands here: libraries take seconds."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional

from stagewise.task import Task


def losses(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def shifted(offset, model, batch):
    return losses(model, batch) + offset


def make_task(offset=0.0, split_seed=0, model_seed=0, **more):
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(24, 4, generator=generator).double(), torch.arange(24) % 3
    rows = torch.randperm(24, generator=(split_seed and torch.Generator().manual_seed(split_seed)) or generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(model_seed)
        model = nn.Linear(4, 3).double().eval()
    train, query = rows[:18], rows[18:]
    labels = {"train_groups": targets[train], "query_groups": {"q": targets[query]}}
    return Task(
        model,
        partial(shifted, offset),
        train=(inputs[train], targets[train]),
        queries={"q": (inputs[query], targets[query])},
        **(labels | more),
    )


def task_of_another_process(seed_here):
    """The same each time it is built in this process, and another one in a worker."""
    return make_task(split_seed=1 if torch.multiprocessing.parent_process() is None else 2 + seed_here)
