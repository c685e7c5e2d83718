"""A task at a point: gradients, products and per-sample derivatives, against autograd on the model itself."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev

from stagewise.checkpoint import Checkpoint, CheckpointError, Optimizer
from stagewise.derivatives import dense, directional_derivatives, group_gradients, hessian_product, mean_gradient
from stagewise.differentiate import differentiable, gradient, pull, push
from stagewise.evaluate import Point, at, over_rows, sample_weights, spread_rows
from stagewise.groups import query_groups, train_groups
from stagewise.task import Task

N = 11
SGD = Optimizer("sgd", 0.1, batch_size=0)


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def weighted(model, batch):
    """Samples count by their first feature; the third of them not at all."""
    return cross_entropy(model, batch), torch.where(batch[0][:, 0] == 0, 0.0, batch[0][:, 0].abs() + 0.1)


class Straight(torch.autograd.Function):
    """The identity, whose backward pass is detached from what it gets: nothing to differentiate twice."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, slope):
        return slope.detach()


class Network(nn.Module):
    def __init__(self, straight=False):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        self.straight = straight

    def forward(self, x):
        out = self.layers(x)
        return Straight.apply(out) if self.straight else out


def point(loss=cross_entropy, model=None, forward_batch=4, **changes):
    random = torch.Generator().manual_seed(1)
    x, y = torch.randn(N + 5, 3, generator=random).double(), torch.arange(N + 5) % 3
    x[2, 0] = 0
    data = {"train": (x[:N], y[:N]), "queries": {"q": (x[N:], y[N:])}, "forward_batch": forward_batch}
    task = Task(model or Network(), loss, **data | changes)
    return at(task, Checkpoint(0, task.state(), SGD))[0]


def where(p):
    return p.vector.flatten(p.state)


def losses_at(p, u, data=None, loss=cross_entropy):
    """The same losses by torch's own functional call."""
    batch = (data or p.task.train).batch(slice(None))
    named = p.vector.unflatten(u)
    return loss(lambda x: functional_call(p.task.model, named, (x,)), batch)


@pytest.mark.parametrize("forward_batch", [1, 4, 100])
@pytest.mark.parametrize("rows", [None, [7, 1, 1]])
def test_mean_gradients_are_those_of_the_mean_however_many_batches_there_are(forward_batch, rows):
    p = point(forward_batch=forward_batch)
    u, chosen = where(p), torch.tensor(rows or range(N))
    expected = jacrev(lambda v: losses_at(p, v)[chosen].mean())(u)
    got = mean_gradient(p, u, p.task.train, None if rows is None else chosen)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_weights_enter_means_and_groups_as_the_objective_has_them():
    p = point(weighted, train_groups=list("aab" * 3 + "ab"), query_groups={"q": list("xxyyy")})
    u = where(p)
    each = jacrev(lambda v: losses_at(p, v))(u)
    weights = weighted(p.task.model, p.task.train.batch(slice(None)))[1]
    torch.testing.assert_close(sample_weights(p), weights)
    torch.testing.assert_close(mean_gradient(p, u, p.task.train), weights @ each / weights.sum())
    trained = group_gradients(p, u, train_groups(p.task))
    for k, group in enumerate("ab"):
        rows = torch.tensor([label == group for label in p.task.train_groups])
        # n times the objective has the derivative a_i / mean(a) * gradient by the weight of sample i
        expected = (weights[rows, None] * each[rows]).sum(0) / weights.mean() / rows.sum()
        torch.testing.assert_close(trained[k], expected)
    asked = group_gradients(p, u, query_groups(p.task))
    data = p.task.queries["q"]
    each = jacrev(lambda v: losses_at(p, v, data))(u)
    weights = weighted(p.task.model, data.batch(slice(None)))[1]
    torch.testing.assert_close(asked[1], weights[2:] @ each[2:] / weights[2:].sum())


@pytest.mark.parametrize("straight", [False, True])
def test_derivatives_along_directions_are_products_with_sample_gradients_also_where_backward_is_not_differentiable(
    straight,
):
    p = point(model=Network(straight))
    u = where(p)
    directions = torch.randn(5, len(u), generator=torch.Generator().manual_seed(0)).double()
    model = Network()  # the identity in place of Straight
    each = jacrev(
        lambda v: cross_entropy(
            lambda x: functional_call(
                model.layers, {n.removeprefix("layers."): t for n, t in p.vector.unflatten(v).items()}, (x,)
            ),
            p.task.queries["q"].batch(slice(None)),
        )
    )(u)
    got, _ = directional_derivatives(p, u, directions, p.task.queries["q"], "q")
    torch.testing.assert_close(got, directions @ each.T, rtol=1e-10, atol=1e-12)


def test_hessian_products_are_those_of_the_dense_hessian_of_all_or_of_some_samples():
    p = point()
    u = where(p)
    for rows in (None, torch.tensor([0, 3, 9, 10, 5])):
        chosen = torch.arange(N) if rows is None else rows
        expected = hessian(lambda v, chosen=chosen: losses_at(p, v)[chosen].mean())(u)
        torch.testing.assert_close(dense(hessian_product(p, u, rows), u, rows=7), expected, rtol=1e-9, atol=1e-12)


def test_the_sample_whose_gradient_alone_is_not_finite_is_named():
    def rooted(model, batch):
        return (model(batch[0]).sum(1) * batch[0][:, 0]).square().sqrt() + 1.0

    p = point(rooted, forward_batch=100)
    with pytest.raises(ValueError, match="train: the loss of sample 2 is finite, but its gradient is not"):
        mean_gradient(p, where(p), p.task.train)


def test_push_and_pull_are_products_with_the_jacobian_and_its_transpose():
    random = torch.Generator().manual_seed(0)
    weights = torch.randn(4, 6, generator=random).double()

    def function(v):
        return [(weights @ v).tanh(), v.square().sum(), torch.ones(2).double()]

    at_v = torch.randn(6, generator=random).double()
    jacobians = [jacrev(lambda v, k=k: function(v)[k])(at_v) for k in range(3)]
    directions = torch.randn(3, 6, generator=random).double()
    with differentiable(at_v) as leaf:
        outputs = function(leaf)
        pushed = push(outputs, leaf, directions)
        sides = [torch.randn(3, *o.shape, generator=random).double() for o in outputs]
        (pulled,) = pull(outputs, [leaf], sides)
    for image, jacobian in zip(pushed, jacobians, strict=True):
        torch.testing.assert_close(image, torch.tensordot(directions, jacobian, ([1], [jacobian.ndim - 1])))
    expected = sum(s.reshape(3, -1) @ j.reshape(-1, 6) for s, j in zip(sides, jacobians, strict=True))
    torch.testing.assert_close(pulled, expected)


def test_what_does_not_depend_on_the_parameters_has_gradient_zero():
    u = torch.ones(3)
    with differentiable(u) as leaf:
        assert not gradient(torch.tensor(2.0), leaf).any()
        assert not gradient(torch.ones(1, requires_grad=True).sum(), leaf).any()
        assert not pull([torch.ones(2)], [leaf], [torch.ones(4, 2)])[0].any()
        assert push([torch.ones(2)], leaf, torch.ones(4, 3))[0].shape == (4, 2)


def test_a_row_at_a_time_is_the_same_as_stacked():
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    stacked, loop = (over_rows(lambda r: (r * r).sum(), rows, batching) for batching in ("stacked", "loop"))
    torch.testing.assert_close(stacked, loop)


@pytest.mark.parametrize(("count", "n"), [(4, 4), (9, 4), (3, 10), (1, 5)])
def test_rows_are_spread_over_all_of_a_sorted_data_set_without_repeats(count, n):
    rows = spread_rows(count, n).tolist()
    assert len(rows) == min(count, n) == len(set(rows))
    assert rows == sorted(rows)
    assert rows[0] == 0
    assert rows[-1] >= n - n / len(rows) - 1


def test_u_is_measured_from_the_anchor_in_units_of_the_scale():
    p = point()
    u, scale = where(p), torch.linspace(0.5, 2, len(where(p))).double()
    moved = Point(p.task, p.vector, p.state, anchor=u, scale=scale)
    step = 0.01 * torch.ones_like(u)
    batch = p.task.train.batch(slice(None))
    torch.testing.assert_close(moved.losses(step, batch).values, losses_at(p, u + scale * step))
    torch.testing.assert_close(
        mean_gradient(moved, step, p.task.train), scale * mean_gradient(p, u + scale * step, p.task.train)
    )


def test_the_door_refuses_another_models_checkpoint_and_moves_only_what_is_asked_for_and_updated():
    p = point()
    with pytest.raises(CheckpointError):
        at(p.task, Checkpoint(0, {"w": torch.ones(2)}))
    only_head = at(p.task, Checkpoint(0, p.task.state(), SGD), [r"layers\.2\..*"])[0]
    assert list(only_head.vector.names) == ["layers.2.weight", "layers.2.bias"]
    torch.testing.assert_close(only_head.params(where(only_head))["layers.0.weight"], p.state["layers.0.weight"])
