"""Small training runs, and how to go on from a checkpoint with nothing but what it says."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from stagewise.checkpoints import Checkpoint, Recorder, Trajectory

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def tensors(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"layer.weight": (3, 4), "layer.bias": (3,), "scale": ()}
    return {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in shapes.items()}


def assert_same(got, want):
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


class Net(nn.Module):
    """With a layer that no loss uses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 8)
        self.head = nn.Linear(8, 3)
        self.pooler = nn.Linear(8, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(inputs).tanh())


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def batches(count: int) -> Batches:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            3 * torch.randn(8, 5, generator=generator, dtype=torch.float64),
            torch.randint(3, (8,), generator=generator),
        )
        for _ in range(count)
    ]


def update(model, optimizer, batch, clip_norm=None) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    if clip_norm:
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()


def recorded_run(folder: Path, model, optimizer, steps, last: int, **loop) -> tuple[Trajectory, dict]:
    """A run of ``last`` updates, and copies of the parameters it had after each.

    ``loop`` may hold clip_norm, before(step) and after(step) (called around an update, before the recorder) and
    late(step) (called behind the recorder).
    """
    nothing: Callable[[int], None] = lambda _: None  # noqa: E731
    before, after, late = (loop.get(name, nothing) for name in ("before", "after", "late"))
    clip_norm = loop.get("clip_norm")
    record = Recorder(folder, model, optimizer, steps, batch_size=8, clip_norm=clip_norm)
    record(0)
    held = {0: copy.deepcopy(dict(model.named_parameters()))}
    for step, batch in enumerate(batches(last), start=1):
        before(step)
        update(model, optimizer, batch, clip_norm)
        after(step)
        record(step)
        late(step)
        held[step] = copy.deepcopy(dict(model.named_parameters()))
    return Trajectory.from_directory(folder), held


def continued(start: Checkpoint, end: Checkpoint) -> dict[str, torch.Tensor]:
    """The parameters at the step of ``end``, by torch's own optimisers, from what the two files say."""
    model, rule = net(), start.optimizer
    names = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in names.items():
            parameter.copy_(start.params[name])
    for name, parameter in names.items():
        parameter.requires_grad_(rule.updated is None or name in rule.updated)
    # Rates come with the checkpoint at the end, so that it says how groups share them.
    ratio = {n: g.learning_rate / (end.optimizer.learning_rate or 1) for g in end.optimizer.groups for n in g.names}
    decay = {name: group.weight_decay for group in rule.groups for name in group.names}
    groups = [
        {"params": [parameter], "weight_decay": decay.get(name, rule.weight_decay), "ratio": ratio.get(name, 1.0)}
        for name, parameter in names.items()
    ]
    if rule.name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=rule.momentum)
    else:
        kind = torch.optim.AdamW if rule.decoupled else torch.optim.Adam
        optimizer = kind(groups, lr=0.0, betas=rule.betas, eps=rule.eps)
    for name, moment in start.first_moment.items():
        state = {"momentum_buffer": moment.clone()}
        if rule.name == "adam":
            count = torch.tensor(float(start.update_counts.get(name, start.step)))
            state = {"exp_avg": moment.clone(), "exp_avg_sq": start.second_moment[name].clone(), "step": count}
        optimizer.state[names[name]] = state
    for rate, batch in zip(end.learning_rates, batches(end.step)[start.step :], strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        update(model, optimizer, batch, rule.clip_norm)
    return {name: parameter.detach() for name, parameter in names.items()}
