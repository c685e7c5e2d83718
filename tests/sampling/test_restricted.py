import numpy as np
import pytest
import torch
from torch import nn

from stagewise.checkpoint import Checkpoint, Optimizer
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.influence.bif import bif
from stagewise.influence.gradients import gradient_product
from stagewise.run.engine import sample
from stagewise.sampling.posterior import LocalPosterior
from stagewise.task import Task

SHAPES = {"0.weight": (5, 3), "0.bias": (5,), "2.weight": (1, 5), "2.bias": (1,)}


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x = torch.randn(8, 3, dtype=torch.float64)
    return Task(
        model,
        lambda model, batch: (model(batch[0])[:, 0] - batch[1]) ** 2,
        train=(x, x[:, 0].sin()),
        queries={"other": (x.flip(1), x[:, 1])},
        train_groups=list("aabbccdd"),
    )


@pytest.fixture(scope="module")
def start(task):
    return Checkpoint(0, task.state(), Optimizer("sgd", 0.1, batch_size=0))


def moved(task, start, *patterns):
    """Where each parameter moves, by name."""
    density = LocalPosterior(window=3, parameters=patterns).at(task, start)
    return {name: tensor.numpy() for name, tensor in density.vector.unflatten(density.scale > 0).items()}


def test_a_slice_moves_what_it_names_of_a_parameter_and_nothing_else(task, start):
    found = moved(task, start, r"0.weight[1:3, :2]", "2.bias")
    expected = np.zeros((5, 3), bool)
    expected[1:3, :2] = True
    np.testing.assert_array_equal(found["0.weight"], expected)
    assert found["2.bias"].all()
    assert set(found) == {"0.weight", "2.bias"}


def test_a_parameter_that_another_pattern_names_whole_moves_whole(task, start):
    assert moved(task, start, "0.weight[0:1]", "0.*")["0.weight"].all()


def test_a_class_of_characters_is_no_slice(task, start):
    assert set(moved(task, start, r"[02]\.weight", "0.bia[s]")) == {"0.weight", "2.weight", "0.bias"}


def test_influence_through_the_parts_of_a_network_sums_to_that_through_all_of_it(task, start):
    run = Trajectory.from_checkpoints([start])

    def through(*patterns):
        return gradient_product(task, run, LocalPosterior(window=3, parameters=patterns)).value

    parts = [("0.weight[0:2]", "0.bias[:2]"), ("0.weight[2:]", "0.bias[2:]"), ("2.*",)]
    np.testing.assert_allclose(sum(through(*part) for part in parts), through(".*"), rtol=1e-9)


def test_chains_of_a_slice_know_nothing_of_the_other_parameters(task, start, tmp_path):
    """Along one weight the losses of all samples are functions of one number: their covariance has rank one, nearly."""
    run = Trajectory.from_checkpoints([start])
    posterior = LocalPosterior(window=3, parameters=("2.bias[0:1]",), n_beta=1e6)
    store = sample(task, run, posterior, out=tmp_path, chains=4, draws=64)
    found = bif(store).value[0].values
    exact = gradient_product(task, run, posterior).value[0].values
    ratio = found / exact
    np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-2)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("0.weight[0:9]", r"chooses nothing, or more than there is, of '0.weight' of shape \(5, 3\)"),
        ("0.weight[3:3]", "chooses nothing, or more"),
        ("0.bias[:, 0:1]", r"has 2 slices, but '0.bias' has the shape \(5,\)"),
        ("0.bias[0:4:2]", "expected start:stop"),
        ("nothing[0:1]", "no trainable parameter matches 'nothing'"),
    ],
)
def test_a_slice_that_does_not_fit_is_refused(task, start, pattern, message):
    with pytest.raises(ValueError, match=message):
        LocalPosterior(window=3, parameters=(pattern,)).at(task, start)
