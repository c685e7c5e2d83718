"""Curvature of losses whose operations can be differentiated once only."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from stagewise.checkpoint import Checkpoint, Optimizer
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.derivatives import hessian_product
from stagewise.influence.damped import damped_influence
from stagewise.retraining.schedule import BatchOrder
from stagewise.retraining.unrolling import unrolled_influence
from stagewise.sampling import Chains, LocalPosterior, sample_block
from stagewise.task import Task


class Places(nn.Module):
    def __init__(self, distance):
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.places = nn.Parameter(torch.randn(6, 4, generator=random))
        self.head = nn.Parameter(torch.randn(6, 3, generator=random))
        self.distance = distance

    def forward(self, x):
        return self.distance(x, self.places) @ self.head


def kernel(x, places):
    return torch.cdist(x, places, compute_mode="donot_use_mm_for_euclid_dist")


def by_definition(x, places):
    return (x[:, None] - places).square().sum(-1).sqrt()


def cross_entropy(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def margin(model, batch):
    return functional.multi_margin_loss(model(batch[0]), batch[1], reduction="none")


def margin_by_definition(model, batch):
    logits = model(batch[0])
    own = logits.gather(1, batch[1][:, None])
    return ((1 - own + logits).clamp(min=0).sum(1) - 1) / logits.shape[1]


ONCE = {"cdist": (Places(kernel), cross_entropy), "margin": (Places(by_definition), margin)}
TWICE = {
    "cdist": (Places(by_definition), cross_entropy),
    "margin": (Places(by_definition), margin_by_definition),
}


def density(model, loss, dtype):
    random = torch.Generator().manual_seed(1)
    data = torch.randn(30, 4, generator=random).to(dtype), torch.randint(3, (30,), generator=random)
    task = Task(model.to(dtype), loss, train=data, queries={"val": data})
    checkpoint = Checkpoint(3, task.state(), Optimizer("sgd", 0.05, batch_size=0))
    return task, checkpoint, LocalPosterior(window=4).at(task, checkpoint)


@pytest.mark.parametrize(
    ("name", "dtype", "near"),
    # the step that float32 needs would meet kinks of the margin
    [("cdist", torch.float64, 1e-6), ("cdist", torch.float32, 2e-2), ("margin", torch.float64, 1e-6)],
)
def test_products_by_differences_are_those_of_the_same_loss_that_can_be_differentiated_twice(name, dtype, near):
    vectors = torch.randn(3, 42, generator=torch.Generator().manual_seed(2)).to(dtype)
    images = []
    for model, loss in (ONCE[name], TWICE[name]):
        local = density(model, loss, dtype)[2]
        images.append(hessian_product(local, local.origin)(vectors))
    assert (images[0] - images[1]).norm() < near * images[1].norm()


@pytest.mark.parametrize("name", ONCE)
def test_chains_go_where_those_of_the_same_loss_go(name):
    trees = []
    for model, loss in (ONCE[name], TWICE[name]):
        task, checkpoint, local = density(model, loss, torch.float64)
        trees.append(sample_block(task, checkpoint, local.posterior, Chains(chains=4, draws=8, batching="loop")))
    ours, theirs = trees
    assert ours.attrs["localised"]
    assert ours.attrs["curvature_max"] == pytest.approx(theirs.attrs["curvature_max"], rel=1e-3)
    torch.testing.assert_close(
        torch.from_numpy(ours["train"]["loss"].values),
        torch.from_numpy(theirs["train"]["loss"].values),
        rtol=0,
        atol=1e-3,
    )


def test_gauss_newton_curvature_of_a_loss_without_second_derivatives_is_refused_and_the_hessian_is_not():
    task, checkpoint, local = density(*ONCE["margin"], torch.float64)
    run = Trajectory.from_checkpoints([checkpoint])
    with pytest.raises(ValueError, match="operations with second derivatives.*curvature='hessian'"):
        damped_influence(task, run, local.posterior)
    assert damped_influence(task, run, local.posterior, curvature="hessian").value.isnull().sum() == 0


def test_unrolling_through_an_operation_without_second_derivatives_is_refused():
    task, checkpoint, _ = density(*ONCE["cdist"], torch.float64)
    with pytest.raises(ValueError, match="unrolling needs operations with second derivatives.*tracin and retraining"):
        unrolled_influence(task, checkpoint, BatchOrder(30), steps=[5])
