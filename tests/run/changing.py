"""Tasks that can be changed in one way each: what a run folder must not take for the task it was sampled with.

Every change is a pair of builders of the model, the loss or the data; what is behind it is no text of the loss.
"""

import functools
from dataclasses import dataclass

import torch
from helpers_of_a_user import table, temperature
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

from stagewise.checkpoint import Checkpoint, Optimizer
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.task import Task

OPTIONS = {"smoothing": 0.0}
STRENGTH = [1.0]
INPUTS = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(12) % 3


class Net(nn.Module):
    factor = 1.0

    def __init__(self, scale=1.0, hidden=False, gain=1.0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.scale, self.hidden, self.options = scale, hidden, {"gain": gain}
        self.norm = nn.LayerNorm(5, eps=1e-5)

    def forward(self, x):
        inside = self.norm(torch.tanh(self.first(x)))
        inside = inside.detach() if self.hidden else inside
        return self.scale * self.factor * self.options["gain"] * self.last(inside)


def cross_entropy(model, batch, smoothing=0.0):
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none", label_smoothing=smoothing)


class Smoothed:
    def __init__(self, smoothing):
        self.smoothing = smoothing

    def __call__(self, model, batch):
        return cross_entropy(model, batch, self.smoothing)

    def measured(self, model, batch):
        return cross_entropy(model, batch, self.smoothing)


class SmoothedModule(nn.Module):
    def __init__(self, smoothing):
        super().__init__()
        self.inner = nn.CrossEntropyLoss(reduction="none", label_smoothing=smoothing)

    def forward(self, model, batch):
        return self.inner(model(batch[0]), batch[1])


def closure(constant):
    return lambda model, batch: cross_entropy(model, batch) * constant[0]


def with_option(model, batch):
    return cross_entropy(model, batch, OPTIONS["smoothing"])


def with_list(model, batch):
    return cross_entropy(model, batch) * STRENGTH[0]


def with_helper(model, batch):
    return cross_entropy(model, batch) / temperature()


def with_late_import(model, batch):
    from helpers_of_a_user import table as late

    return cross_entropy(model, batch) / late["temperature"]


def with_default(model, batch, inner=cross_entropy):
    return inner(model, batch)


def detached(model, batch):
    losses = cross_entropy(model, batch)
    return torch.cat([losses[:1].detach(), losses[1:]])


def doubled(model, batch):
    return 2 * cross_entropy(model, batch)


def weighted(weight):
    return lambda model, batch: (cross_entropy(model, batch), torch.where(batch[1] == 0, weight, 1.0))


class Transformed(Dataset):
    def __init__(self, factor):
        self.factor = factor

    def __len__(self):
        return len(INPUTS)

    def __getitem__(self, row):
        return self.factor * INPUTS[row], TARGETS[row]


def collated(factor):
    return lambda samples: (factor * torch.stack([s[0] for s in samples]), torch.stack([s[1] for s in samples]))


def task_of(loss=cross_entropy, model=None, data=(INPUTS, TARGETS), queries=(INPUTS[:5], TARGETS[:5]), **more):
    return Task((model or Net()).eval(), loss, train=data, queries={"val": queries}, **more)


@dataclass
class Setting:
    """A task whose loss reads a place that can be set."""

    loss: object
    holder: object
    key: str

    def __call__(self, value):
        if isinstance(self.holder, list):
            self.holder[0] = value
        elif isinstance(self.holder, dict):
            self.holder[self.key] = value
        else:
            setattr(self.holder, self.key, value)
        return task_of(self.loss)


# name: (build a task, what it is built with first, what then)
CHANGES = {
    "attribute of the model": (lambda v: task_of(model=Net(scale=v)), 1.0, 3.0),
    "attribute of the model's class": (Setting(cross_entropy, Net, "factor"), 1.0, 1.1),
    "dict of the model": (lambda v: task_of(model=Net(gain=v)), 1.0, 0.9),
    "attribute of a layer": (lambda v: task_of(model=with_eps(v)), 1e-5, 1e-1),
    "detach in the model": (lambda v: task_of(model=Net(hidden=v)), False, True),
    "detach in the loss": (task_of, cross_entropy, detached),
    "frozen parameter": (lambda v: task_of(model=frozen(v)), False, True),
    "callable object": (lambda v: task_of(Smoothed(v)), 0.0, 0.3),
    "bound method": (lambda v: task_of(Smoothed(v).measured), 0.0, 0.3),
    "loss that is a module": (lambda v: task_of(SmoothedModule(v)), 0.0, 0.3),
    "closure over a tensor": (lambda v: task_of(closure(torch.tensor([v]))), 1.0, 1.01),
    "closure over a list": (lambda v: task_of(closure([v])), 1.0, 1.01),
    "closure over an object": (lambda v: task_of(lambda m, b, s=Smoothed(v): s(m, b)), 0.0, 0.1),
    "keyword of a partial": (lambda v: task_of(functools.partial(cross_entropy, smoothing=v)), 0.0, 0.1),
    "function in a partial": (lambda v: task_of(functools.partial(with_default, inner=v)), cross_entropy, doubled),
    "default argument": (lambda v: task_of(lambda m, b, f=v: f(m, b)), cross_entropy, doubled),
    "global dict": (Setting(with_option, OPTIONS, "smoothing"), 0.0, 0.2),
    "global list": (Setting(with_list, STRENGTH, "0"), 1.0, 1.1),
    "imported helper's table": (Setting(with_helper, table, "temperature"), 1.0, 2.0),
    "helper imported late": (Setting(with_late_import, table, "temperature"), 1.0, 2.0),
    "weights beside the losses": (lambda v: task_of(weighted(v)), 1.0, 0.5),
    "objective": (lambda v: task_of(objective=v), "samples", "tokens"),
    "candidates": (lambda v: task_of(candidates=v), [0, 1, 2], [0, 1, 3]),
    "transform of the dataset": (lambda v: task_of(data=Transformed(v)), 1.0, 1.1),
    "transform of a query set": (lambda v: task_of(queries=Transformed(v)), 1.0, 1.1),
    "collate": (lambda v: task_of(data=Transformed(1.0), queries=Transformed(1.0), collate=collated(v)), 1.0, 1.1),
    "query loss that is an object": (lambda v: task_of(query_losses={"val": Smoothed(v)}), 0.0, 0.3),
}


def with_eps(eps):
    model = Net()
    model.norm.eps = eps
    return model


def frozen(yes):
    model = Net()
    model.first.requires_grad_(not yes)
    return model


def trajectory():
    """Two checkpoints of the net."""
    params = {name: tensor.detach().clone() for name, tensor in Net().state_dict().items()}
    moved = {name: tensor * 1.1 for name, tensor in params.items()}
    optimizer = Optimizer("sgd", 0.05, batch_size=0)
    return Trajectory.from_checkpoints([Checkpoint(0, params, optimizer), Checkpoint(5, moved, optimizer)])
