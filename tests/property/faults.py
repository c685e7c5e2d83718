"""What goes wrong in people's tasks, and what a refusal has to name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from broken import (
    Apply,
    Broken,
    Complex,
    Counting,
    Detached,
    InAList,
    InATuple,
    Locked,
    Noisy,
    Once,
    Recomputed,
    Stream,
    Tied,
)
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from stagewise.checkpoint import Checkpoint, Optimizer, ParameterGroup

N = 10


def network(dtype=torch.float32):
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def cross_entropy(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Case:
    """A task without a fault: a fault changes one thing in it.

    Attributes:
        model: the user's.
        settings: further arguments of ``Task``.
        params: of the checkpoint.
        optimizer: its update rule.
        moments: what else the checkpoint holds.
        step: its step.
        order: the samples of every update.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        dtype = (torch.float32, torch.float64)[seed % 2]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model: nn.Module = network(dtype).eval()
        self.x, self.y = torch.randn(N, 3, generator=generator, dtype=dtype), torch.arange(N) % 3
        self.loss: Callable[..., Any] = cross_entropy
        self.settings: dict[str, Any] = {"train": (self.x, self.y), "queries": {"val": (self.x[:5] + 1, self.y[:5])}}
        self.settings["train_groups"] = ["a", "b"] * (N // 2)
        self.optimizer: Optimizer | None = Optimizer("sgd", 0.1, batch_size=0)
        self.moments: dict[str, Any] = {}
        self.params: dict[str, torch.Tensor] | None = None
        self.step = 3
        self.order = lambda _step: torch.arange(N)

    def use(self, model: nn.Module) -> None:
        self.model = model.to(self.x.dtype).eval()

    def checkpoint(self) -> Checkpoint:
        params = self.model.state_dict() if self.params is None else self.params
        return Checkpoint(self.step, params, self.optimizer, **self.moments)


@dataclass(frozen=True)
class Fault:
    """A fault.

    Attributes:
        plant: put it into a case.
        says: what the refusal names.
        spares: the doors that do not depend on what is at fault, and answer.
    """

    plant: Callable[[Case], None]
    says: str
    spares: tuple[str, ...] = ()


FIRST_ORDER = ("gradient_product", "tracin", "window_ablation", "leave_out")


def bad_sample(case: Case) -> None:
    x = case.x.clone()
    x[6, 1] = float("nan")
    case.settings["train"] = (x, case.y)


def bad_query(value: float) -> Callable[[Case], None]:
    def plant(case: Case) -> None:
        x = case.x.clone()
        x[7, 1] = value
        case.settings["queries"] = {"good": (case.x, case.y), "val": (x, case.y)}

    return plant


def loss_is(loss: Callable[..., Any]) -> Callable[[Case], None]:
    def plant(case: Case) -> None:
        case.loss = loss

    return plant


def model_is(make: Callable[[], nn.Module]) -> Callable[[Case], None]:
    return lambda case: case.use(make())


def set_to(**settings: Any) -> Callable[[Case], None]:
    return lambda case: case.settings.update(settings)


def optimizer_is(optimizer: Optimizer | None) -> Callable[[Case], None]:
    def plant(case: Case) -> None:
        case.optimizer = optimizer

    return plant


def square(model, batch):
    """Predictions (B, 1) against targets (B,)."""
    return functional.mse_loss(model(batch[0])[:, :1], batch[1].to(batch[0].dtype), reduction="none")


def with_dropout(model, batch):
    return functional.cross_entropy(functional.dropout(model(batch[0]), 0.5, training=True), batch[1], reduction="none")


def by_the_batch(model, batch):
    losses = cross_entropy(model, batch)
    return losses / losses.detach().mean()


def without_gradient(model, batch):
    with torch.no_grad():
        return cross_entropy(model, batch)


def another_model(case: Case) -> None:
    own = case.model
    case.loss = lambda _model, batch: cross_entropy(own, batch)


def a_stranger(case: Case) -> None:
    extra = torch.ones(3, dtype=case.x.dtype, requires_grad=True)
    case.loss = lambda model, batch: functional.cross_entropy(model(batch[0]) * extra, batch[1], reduction="none")


def words(case: Case, **settings: Any) -> None:
    case.use(nn.Sequential(nn.Embedding(5, 3, **settings), nn.Linear(3, 3)))
    ids = torch.arange(N) % 5
    case.settings |= {"train": (ids, case.y), "queries": {"val": (ids, case.y)}}


def in_train_mode(*layers: nn.Module) -> Callable[[Case], None]:
    def plant(case: Case) -> None:
        case.use(nn.Sequential(nn.Linear(3, 4), *layers, nn.Linear(4, 3)))
        case.model.train()

    return plant


def lacking(part: str, layer: Callable[[], nn.Module] | None = None) -> Callable[[Case], None]:
    def plant(case: Case) -> None:
        if layer is not None:
            case.use(nn.Sequential(nn.Linear(3, 4), layer(), nn.Linear(4, 3)))
        case.params = {name: tensor for name, tensor in case.model.state_dict().items() if name != part}

    return plant


def reshaped(case: Case) -> None:
    case.params = dict(case.model.state_dict()) | {"0.weight": torch.zeros(5, 3)}


def renamed(case: Case) -> None:
    case.params = {"encoder." + name: tensor for name, tensor in case.model.state_dict().items()}


def of_a_wider_type(case: Case) -> None:
    case.model, case.x = case.model.float(), case.x.float()
    case.settings |= {"train": (case.x, case.y), "queries": {"val": (case.x, case.y)}}
    case.params = {name: tensor.double() for name, tensor in case.model.state_dict().items()}


def untied(case: Case) -> None:
    case.use(Tied())
    weight = case.model.state_dict()["first.weight"]
    case.params = {"first.weight": weight, "second.weight": weight + 1}


def lost_in_float16(model, batch):
    return cross_entropy(model, batch).bfloat16()


def with_weights(weights: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Case], None]:
    def loss(model, batch):
        values = cross_entropy(model, batch)
        return values, weights(values.detach())

    return loss_is(loss)


def ragged(case: Case) -> None:
    samples = [(torch.randn(2 + i % 2, 3).to(case.x), int(case.y[i])) for i in range(N)]
    case.settings |= {"train": samples, "queries": {"val": samples}}
    case.loss = lambda model, batch: cross_entropy(model, (batch[0].mean(1), batch[1]))


def a_normalised_batch(case: Case) -> None:
    case.use(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)))


def other_batches(case: Case) -> None:
    case.optimizer = Optimizer("sgd", 0.1, batch_size=4)
    case.order = lambda _step: torch.arange(3)


def beyond_the_data(case: Case) -> None:
    case.order = lambda _step: torch.arange(N) + 1


def without_moments(case: Case) -> None:
    case.optimizer = Optimizer("adam", 0.1, batch_size=0)


def frozen_whole(case: Case) -> None:
    case.model.requires_grad_(False)


def of_nothing(case: Case) -> None:
    case.optimizer = replace(case.optimizer, groups=(ParameterGroup(("9.weight",), 0.1),))


AT_THE_CHECKPOINT = ("gradient_product", "damped_influence", "response_influence", "sample_block", "tracin")

FAULTS: dict[str, Fault] = {
    "NaN in a training sample": Fault(bad_sample, "train: the loss of sample 6 is not finite"),
    "NaN in a query": Fault(bad_query(float("nan")), r"queries\['val'\]: the loss of sample 7 is not finite"),
    # The loss of saturated units is finite, and all that needs no gradient of it is right.
    "infinity in a query": Fault(
        bad_query(float("inf")),
        r"queries\['val'\]: the loss of sample 7 is finite, but its gradient is not",
        ("sample_block", "window_ablation", "leave_out"),
    ),
    "mean loss": Fault(loss_is(lambda m, b: cross_entropy(m, b).mean()), "reduction='none'"),
    "sum over the batch": Fault(loss_is(lambda m, b: cross_entropy(m, b).sum()[None]), "one loss per sample"),
    "every prediction against every target": Fault(loss_is(square), "depends on the rest of its batch"),
    "dropout in the loss": Fault(loss_is(with_dropout), "dropout"),
    "divided by the batch's mean": Fault(loss_is(by_the_batch), "depends on the rest of its batch"),
    "statistics of the batch": Fault(a_normalised_batch, "train: .* more than 1 value per channel"),
    "dropout in train mode": Fault(in_train_mode(nn.Dropout(0.1)), r"train mode and contains Dropout \(1\)"),
    "BatchNorm in train mode": Fault(in_train_mode(nn.BatchNorm1d(4)), r"train mode and contains BatchNorm1d \(1\)"),
    "loss without gradient": Fault(loss_is(without_gradient), "does not depend on any parameter"),
    "loss of another model": Fault(another_model, "another model|not parameters of the model|does not depend"),
    "parameter in the loss": Fault(a_stranger, r"not parameters of the model it is given \(the first of shape \(3,\)"),
    "parameters in a list": Fault(lambda c: c.use(InAList(c.x.dtype)), "nn.ParameterList"),
    "parameter in a tuple": Fault(model_is(InATuple), "a parameter is kept somewhere else"),
    "forward counts its calls": Fault(model_is(Counting), "changes 'seen' of the model"),
    "model that cannot be copied": Fault(model_is(Locked), "the model cannot be copied"),
    "activations recomputed": Fault(model_is(lambda: Recomputed(False)), "switch activation checkpointing off"),
    "activations recomputed, old way": Fault(model_is(lambda: Recomputed(True)), "activation checkpointing|the loss"),
    "backward once": Fault(model_is(lambda: Apply(Once)), "twice differentiated|second derivative", FIRST_ORDER),
    "backward detaches": Fault(model_is(lambda: Apply(Detached)), "second derivatives", FIRST_ORDER),
    "complex parameter": Fault(lambda c: setattr(c, "model", Complex().eval()), "'phase' is torch.complex64"),
    "max_norm": Fault(lambda c: words(c, max_norm=1.0), r"Embedding \(0\) has max_norm"),
    "TorchScript": Fault(lambda c: setattr(c, "model", torch.jit.script(c.model)), "is TorchScript"),
    "lazy layer": Fault(
        lambda c: setattr(c, "model", nn.Sequential(nn.LazyLinear(3)).eval()), "lazy layer has no shape"
    ),
    "nothing trainable": Fault(frozen_whole, "no parameter of the model requires a gradient"),
    "losses in bfloat16": Fault(loss_is(lost_in_float16), "losses are torch.bfloat16"),
    "negative weights": Fault(with_weights(lambda v: v - 10), "weights that are negative"),
    "weights of another shape": Fault(with_weights(lambda v: v[:-1]), "returned weights of shape"),
    "no weight at all": Fault(with_weights(torch.zeros_like), "all weights that the loss returned are 0"),
    "random augmentation": Fault(
        lambda c: c.settings.update(train=Noisy(c.x, c.y, 0)), "train: sample 0 is another one each time it is read"
    ),
    "random augmentation of the last": Fault(
        lambda c: c.settings.update(train=Noisy(c.x, c.y, 9)), "train: sample 9 is another one each time it is read"
    ),
    "unreadable sample": Fault(lambda c: c.settings.update(train=Broken()), r"train: sample 9 cannot be read"),
    "a DataLoader": Fault(lambda c: c.settings.update(train=DataLoader(Noisy(c.x, c.y, 99))), "train: got DataLoader"),
    "a stream": Fault(set_to(train=Stream()), "train: got Stream"),
    "no samples": Fault(set_to(train=[], train_groups=None), "train: holds no samples"),
    "columns of unequal length": Fault(
        lambda c: c.settings.update(train=(c.x, c.y[:-1])), "train: tensors disagree on the number of samples"
    ),
    "ragged without collate": Fault(ragged, "train: .* cannot be made into one batch.*collate"),
    "one label too few": Fault(set_to(train_groups=["a"] * 9), "train_groups: expected one label for each of 10"),
    "candidate outside": Fault(set_to(candidates=[3, 10]), "candidates: expected indices from 0 to 9, got .10."),
    "slash in a name": Fault(lambda c: c.settings.update(queries={"a/b": (c.x, c.y)}), "cannot be called 'a/b'"),
    "names of another model": Fault(renamed, "checkpoint at step 3 has 'encoder.0.weight'"),
    "a parameter is missing": Fault(lacking("2.bias"), "lacks parameter '2.bias'"),
    "running statistics are missing": Fault(lacking("1.running_var", lambda: nn.BatchNorm1d(4)), "'1.running_var'"),
    "another shape": Fault(reshaped, r"'0.weight' has shape \(5, 3\)"),
    "a wider type": Fault(of_a_wider_type, r"'0.weight' is torch.float64, the model's is torch.float32"),
    "tied weights that differ": Fault(untied, "'first.weight' and 'second.weight' are one tensor"),
    "learning rate 0": Fault(
        optimizer_is(Optimizer("sgd", 0.0, batch_size=0)), "learning rate at step 3 is 0", ("tracin",)
    ),
    "no optimizer": Fault(optimizer_is(None), "no record of its optimiser|does not say which optimizer"),
    "Adam without moments": Fault(without_moments, "no (second|first) moment|moments of Adam|with adam"),
    "optimizer of other parameters": Fault(of_nothing, "no parameter moves|optimizer has .*, which the model does not"),
    "batches of another size": Fault(other_batches, "trained with 4 per update", AT_THE_CHECKPOINT),
    "batches beyond the data": Fault(beyond_the_data, "names sample 10", AT_THE_CHECKPOINT),
}
"""By what is at fault."""
