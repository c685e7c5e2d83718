"""A loss that computes in bfloat16 with parameters in float32, as training on GPUs does."""

import pytest
import torch
from torch import nn

from stagewise.checkpoint import Checkpoint, Optimizer
from stagewise.influence.bif import bif
from stagewise.influence.trusted import TracesInMemory
from stagewise.sampling import Chains, LocalPosterior, sample_block
from stagewise.task import Task


def task(cast, seen):
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(40) % 3
    x = torch.randn(40, 6, generator=draw) + nn.functional.one_hot(y, 6)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    for parameter in model.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=draw)

    def loss(model, batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            outputs = model(batch[0])
        seen.add(outputs.dtype)
        return nn.functional.cross_entropy(outputs.to(batch[0].dtype), batch[1], reduction="none")

    return Task(model, loss, train=(x[:30], y[:30]), queries={"val": (x[30:], y[30:])})


@pytest.mark.parametrize("batching", ["stacked", "loop"])
def test_losses_under_autocast_fluctuate_as_those_of_float32(batching):
    def spread(cast):
        seen = set()
        studied = task(cast, seen)
        start = Checkpoint(0, studied.state(), Optimizer("sgd", 0.1, batch_size=0))
        sampling = Chains(chains=16, draws=24, batching=batching)
        tree = sample_block(studied, start, LocalPosterior(window=5, n_beta=1000.0), sampling)
        assert (torch.bfloat16 in seen) == cast
        assert (tree["chains"]["status"] == "ok").all()
        return tree["train"]["loss"].var(("chain", "draw")).mean().item()

    assert spread(True) == pytest.approx(spread(False), rel=0.02)


@pytest.mark.parametrize("sampler", ["underdamped", "window"])
def test_influence_after_a_tiny_learning_rate_is_not_the_rounding_of_weights_under_autocast(sampler):
    def influence(cast):
        studied = task(cast, set())
        start = Checkpoint(0, studied.state(), Optimizer("sgd", 1e-9, batch_size=0))
        sampling = Chains(sampler, chains=16, draws=64)
        tree = sample_block(studied, start, LocalPosterior(window=5), sampling)
        assert tree.attrs["n_beta_raised"] < 1 or not cast
        return bif(TracesInMemory({0: tree}), train_groups=[str(k % 3) for k in range(30)])

    rounded, exact = influence(True), influence(False)
    assert (abs(rounded["value"] - exact["value"]) < 5 * exact["stderr"]).all()
