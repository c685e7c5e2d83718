"""Whether chains and replays are stacked is decided by a rule: the same for every run of a configuration."""

import pytest
import torch
from torch import nn

from stagewise import stacking
from stagewise.checkpoint import Checkpoint
from stagewise.evaluate import at
from stagewise.sampling.posterior import LocalPosterior
from stagewise.stacking import decided
from stagewise.task import Task


def losses(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def point(model=None, n=24, loss=losses, features=4, queries=None):
    x = torch.randn(n, features, generator=torch.Generator().manual_seed(0))
    y = torch.arange(n) % 3
    task = Task(model or nn.Linear(features, 3), loss, train=(x, y), queries=queries or {"q": (x, y)})
    return at(task, Checkpoint(0, task.state()))[0]


class Square(torch.autograd.Function):
    """An operation that torch.func cannot stack."""

    @staticmethod
    def forward(x):
        return x**2

    @staticmethod
    def setup_context(ctx, inputs, _output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.lstm(x[:, None])[0][:, -1])


def test_a_small_model_is_stacked_and_a_single_place_is_not():
    assert decided(point(), "auto", 8) == "stacked"
    assert decided(point(), "auto", 1) == "loop"


@pytest.mark.parametrize("choice", ["stacked", "loop"])
def test_what_is_asked_for_is_done(choice):
    assert decided(point(Recurrent()), choice, 8) == choice


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        (Recurrent(), losses),
        (None, lambda model, batch: Square.apply(model(batch[0]))[:, 0]),
        (None, lambda model, batch: losses(model, batch) * (1 if model.weight.sum().item() > -1e9 else 2)),
    ],
    ids=["LSTM", "a function of autograd", "a number taken from the weights"],
)
def test_a_model_that_cannot_be_traced_is_looped_over(model, loss):
    assert decided(point(model, loss=loss), "auto", 8) == "loop"


def test_it_depends_on_the_work_of_one_gradient_and_not_on_the_load_of_the_machine(monkeypatch):
    deep = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 3))
    # 2 x 82,688 operations for each sample
    assert decided(point(deep, n=100, features=64), "auto", 8) == "stacked"
    assert decided(point(deep, n=200, features=64), "auto", 8) == "loop"
    assert decided(point(deep, n=200, features=64), "auto", 8, batch_size=100) == "stacked"
    assert decided(point(deep, n=200, features=64), "auto", 8, batch_size=0) == "loop"
    monkeypatch.setattr(stacking, "_MOST_NUMBERS", 8 * 83_000)
    assert decided(point(deep, n=100, features=64), "auto", 8) == "loop"


def test_a_model_that_is_another_one_when_stacked_is_looped_over():
    def loss(model, batch):
        # Under vmap a tensor hides its first dimension: a rank seen from outside is that of a single place.
        extra = 1.0 if torch._C._functorch.is_batchedtensor(model.weight) else 0.0
        return losses(model, batch) + extra

    assert decided(point(loss=loss), "auto", 8) == "loop"


def test_a_density_is_judged_at_its_checkpoint():
    p = point()
    density = LocalPosterior(gamma=1.0).at(p.task, Checkpoint(0, p.task.state()))
    assert decided(density, "auto", 8) == "stacked"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_places_that_do_not_fit_are_not_taken_for_places_that_cannot_be_stacked(monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(stacking, "_is_same", fail)
    with pytest.raises(type(error)):
        decided(point(), "auto", 8)
