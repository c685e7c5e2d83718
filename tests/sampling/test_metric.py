"""Directions that training never takes do not move, and the others move as far as the optimiser takes them."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from stagewise.checkpoint import Checkpoint, Optimizer, ParameterGroup
from stagewise.evaluate import at
from stagewise.sampling import LocalPosterior
from stagewise.sampling.metric import squared_gradient
from stagewise.task import Task

WORDS, SIZE, N = 6, 3, 12
ADAM = Optimizer("adam", 0.01, betas=(0.9, 0.99), batch_size=0)
SGD = Optimizer("sgd", 0.05, batch_size=0)


class Words(nn.Module):
    def __init__(self, padding=None, tied=False):
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, SIZE, padding_idx=padding), nn.Linear(SIZE, WORDS, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x).mean(1))


def task(model=None, words=range(1, 5), **more):
    """Sentences of some of the words, the others are in the query set only."""
    random = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (Words() if model is None else model()).double()
    x = torch.tensor(list(words))[torch.randint(len(words), (N, 4), generator=random)]
    y = torch.randn(N, generator=random, dtype=torch.float64)
    return Task(
        model,
        lambda m, b: 0.5 * (m(b[0])[:, 0] - b[1]) ** 2,
        train=(x, y),
        queries={"q": (torch.arange(WORDS)[:, None].expand(-1, 4), torch.ones(WORDS).double())},
        **{"query_groups": {"q": range(WORDS)}} | more,
    )


def moments(studied, value=1.0):
    return {name: torch.full(tensor.shape, value, dtype=torch.float64) for name, tensor in studied.trainable.items()}


def metric(studied, checkpoint, window=10, **settings):
    """P by parameter."""
    density = LocalPosterior(window=window, **settings).at(studied, checkpoint)
    return density.vector.unflatten(density.scale**2)


def test_rows_of_words_that_training_never_met_do_not_move_under_adam():
    studied = task()
    v = moments(studied)
    v["embed.weight"][[0, 5]] = 0.0
    got = metric(studied, Checkpoint(100, studied.state(), ADAM, second_moment=v))["embed.weight"]
    assert (got[[0, 5]] == 0).all()
    assert (got[1:5] > 0).all()


def test_a_row_that_was_met_long_ago_does_not_move_although_its_moment_is_not_quite_zero():
    studied = task()
    v = moments(studied)
    v["embed.weight"][5] = 1e-30
    assert (metric(studied, Checkpoint(100, studied.state(), ADAM, second_moment=v))["embed.weight"][5] == 0).all()


@pytest.mark.parametrize("faded", [0.0, 1e-30, 1e-12])
def test_a_moment_that_has_faded_is_no_reason_to_move_far(faded):
    studied = task()
    checkpoint = Checkpoint(10_000, studied.state(), ADAM, second_moment=moments(studied, faded))
    point, _ = at(studied, checkpoint)
    squared, _ = squared_gradient(point, 0)
    got = metric(studied, checkpoint, window=20)
    expected = point.vector.unflatten(1 / (((1 - 0.99**20) * squared + 0.99**20 * faded).sqrt() + 1e-8))
    alive = expected["embed.weight"][1:5]
    torch.testing.assert_close(got["embed.weight"][1:5], alive, rtol=1e-9, atol=0)


@pytest.mark.parametrize("window", [1, 7, 300])
def test_where_gradients_stay_as_they_are_the_metric_is_that_of_adams_memory_alone(window):
    studied = task(words=range(WORDS))
    point, _ = at(studied, Checkpoint(50, studied.state()))
    squared, _ = squared_gradient(point, 0)
    count = 50
    v = point.vector.unflatten(squared * (1 - 0.99**count))
    got = metric(studied, Checkpoint(count, studied.state(), ADAM, second_moment=v), window)
    for name, tensor in point.vector.unflatten(squared).items():
        moves = tensor > 0
        torch.testing.assert_close(got[name][moves], (1 / (tensor.sqrt() + 1e-8))[moves], rtol=1e-9, atol=0)


@pytest.mark.parametrize("batch_size", [0, 3])
def test_how_many_samples_are_evaluated_together_does_not_change_the_metric(batch_size):
    adam = replace(ADAM, batch_size=batch_size)
    found = []
    for forward_batch in (N, 5):
        studied = task(forward_batch=forward_batch)
        found.append(metric(studied, Checkpoint(100, studied.state(), adam, second_moment=moments(studied, 1e-9))))
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-9, atol=0)


def test_what_one_update_sees_is_the_mean_square_over_batches_of_its_size():
    studied = task()
    point, _ = at(studied, Checkpoint(0, studied.state()))
    leaf = point.vector.flatten(point.state).requires_grad_()
    losses = point.sample_losses(leaf, studied.train.batch(slice(None)))[0]
    slopes = torch.stack([torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in losses])
    full, touched = squared_gradient(point, 0)
    torch.testing.assert_close(full, slopes.mean(0) ** 2)
    assert torch.equal(touched, (slopes != 0).any(0))
    single, _ = squared_gradient(point, 1)
    total = slopes.square().mean(0).sum()
    assert float(single.sum()) == pytest.approx(float(total), rel=0.5)  # random signs: right on average
    rare = (slopes != 0).sum(0) == 1
    torch.testing.assert_close(single[rare], slopes.square().mean(0)[rare])


def test_groups_with_their_own_rates_move_in_proportion():
    studied = task()
    groups = (ParameterGroup(("embed.weight",), 0.2), ParameterGroup(("head.weight",), 0.05))
    got = metric(studied, Checkpoint(3, studied.state(), replace(SGD, groups=groups)))
    assert got["embed.weight"].unique().tolist() == pytest.approx([4.0])
    assert got["head.weight"].unique().tolist() == pytest.approx([1.0])


def test_parameters_that_the_optimiser_does_not_update_do_not_move():
    studied = task()
    alone = replace(SGD, groups=(ParameterGroup(("head.weight",), 0.05),))
    assert set(metric(studied, Checkpoint(3, studied.state(), alone))) == {"head.weight"}


def test_clipping_shortens_the_reach_by_as_much_as_it_shortens_the_gradient():
    studied = task()
    point, _ = at(studied, Checkpoint(0, studied.state()))
    norm = float(squared_gradient(point, 0)[0].sum().sqrt())
    damping = {
        clip: LocalPosterior(window=5).at(studied, Checkpoint(3, studied.state(), replace(SGD, clip_norm=clip))).damping
        for clip in (None, 2 * norm, norm / 4)
    }
    assert damping[2 * norm] == pytest.approx(damping[None])
    assert damping[norm / 4] == pytest.approx(4 * damping[None])


@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
def test_padding_does_not_move_as_no_update_moves_it(optimizer):
    studied = task(lambda: Words(padding=2))
    second = moments(studied) if optimizer.name == "adam" else {}
    got = metric(studied, Checkpoint(3, studied.state(), optimizer, second_moment=second))["embed.weight"]
    assert (got[2] == 0).all()
    assert (got[[1, 3, 4]] > 0).all()


def test_padding_moves_where_a_tied_head_trains_it():
    studied = task(lambda: Words(padding=2, tied=True))
    assert (metric(studied, Checkpoint(3, studied.state(), SGD))["embed.weight"] > 0).all()


def test_where_nothing_moves_the_checkpoint_is_refused_in_words():
    studied = task()
    nothing = Checkpoint(3, studied.state(), ADAM, second_moment=moments(studied, 0.0))
    with pytest.raises(ValueError, match="at step 3 no parameter moves: no training sample has a gradient"):
        LocalPosterior(gamma=1.0, metric="adam").at(studied, nothing)
