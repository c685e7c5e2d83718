import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from gaussian import Gaussian, Point
from torch import nn

from live import Live
from stagewise.checkpoint import Checkpoint
from stagewise.influence.bif import bif
from stagewise.influence.trusted import TracesInMemory
from stagewise.reporting.tables import diagnostics_table
from stagewise.sampling import SGLD, Chains, LocalPosterior, RMSpropSGLD, block, sample_block, tuning
from stagewise.sampling.tuning import tune
from stagewise.sampling.watch import Watch
from stagewise.task import Task
from stagewise.traces.cells import check_cell
from stagewise.traces.diagnostics import diagnose

GAUSSIAN = Gaussian()
POSTERIOR = LocalPosterior(gamma=3.0, n_beta=5.0)
SHORT = Chains(chains=3, draws=4, burn_in=3, thinning=2, batching="stacked")


def sample(sampling=SHORT, task=GAUSSIAN.task, checkpoint=GAUSSIAN.checkpoint, posterior=POSTERIOR, **more):
    tree = sample_block(task, checkpoint, posterior, sampling, **more)
    check_cell(tree)
    return tree


def positions(tree):
    """Weights of every draw ``(chain, draw, parameters)``, seen through linear losses."""
    return tree["queries/weights"]["loss"].values.astype(float)


def task_of(loss, model=None, data=None):
    data = (torch.zeros(2, 1, dtype=torch.float64),) if data is None else data
    model = Point(torch.zeros(1, dtype=torch.float64)) if model is None else model
    task = Task(model, loss, train=data, queries={"val": data})
    return task, Checkpoint(0, task.state())


def test_cell_has_the_losses_of_every_data_set_under_their_names():
    tree = sample(replace(SHORT, chains=2), block=3)
    assert set(tree.children) == {"train", "queries", "chains"}
    assert dict(tree["queries/val"].sizes) == {"chain": 2, "draw": 4, "sample": 3}
    assert dict(tree["train"].sizes) == {"chain": 2, "draw": 4, "sample": 6}
    for group in (tree["train"], tree["chains"]):
        assert group["chain"].values.tolist() == [6, 7]
    assert tree["chains"]["status"].values.tolist() == ["ok", "ok"]
    assert tree["train"]["loss"].attrs["units"] == "nats"


def test_anchor_losses_are_those_of_the_checkpoint():
    tree = sample()
    for name, path in (("train", "train"), ("val", "queries/val")):
        expected = GAUSSIAN.traces(name, np.zeros(4))
        np.testing.assert_allclose(tree[path]["loss_anchor"], expected, rtol=1e-6)


def test_reflected_losses_are_those_on_the_other_side_of_the_checkpoint():
    tree = sample()
    displacement = positions(tree) - GAUSSIAN.w
    for name, path in (("train", "train"), ("val", "queries/val")):
        np.testing.assert_allclose(tree[path]["loss"], GAUSSIAN.traces(name, displacement), atol=2e-6)
        np.testing.assert_allclose(tree[path]["loss_reflected"], GAUSSIAN.traces(name, -displacement), atol=2e-6)
    assert "loss_reflected" not in sample(replace(SHORT, reflect=False))["train"]


def test_draws_come_after_burn_in_and_thinning_steps_apart(monkeypatch):
    visited = []
    step = SGLD.step

    def spy(self, state, gradient, generator):
        moved = step(self, state, gradient, generator)
        visited.append(GAUSSIAN.w + moved.position.numpy())
        return moved

    monkeypatch.setattr(SGLD, "step", spy)
    ticks = []
    tree = sample(replace(SHORT, sampler="sgld"), on_step=lambda *_: ticks.append(1))
    assert len(visited) == len(ticks) == 3 + 4 * 2
    np.testing.assert_allclose(positions(tree), np.stack(visited[4::2], 1), rtol=1e-6)


def test_adaptation_stops_halfway_through_burn_in(monkeypatch):
    seen = []
    step = RMSpropSGLD.step

    def spy(self, state, gradient, generator):
        seen.append(state.frozen)
        return step(self, state, gradient, generator)

    monkeypatch.setattr(RMSpropSGLD, "step", spy)
    sample(replace(SHORT, sampler="rmsprop_sgld", burn_in=6))
    assert seen == [False] * 3 + [True] * (3 + 4 * 2)


def test_sampler_that_adapts_in_burn_in_refuses_to_have_none():
    with pytest.raises(ValueError, match="burn_in=0"):
        Chains("rmsprop_sgld", burn_in=0)


@pytest.mark.parametrize("sampler", ["underdamped", "sgld"])
def test_no_burn_in_is_possible(sampler):
    tree = sample(replace(SHORT, sampler=sampler, burn_in=0))
    assert (tree["chains"]["status"] == "ok").all()
    assert np.ptp(positions(tree), 1).min() > 0


@pytest.mark.parametrize("batch_size", [None, 3])
def test_stacked_and_looped_chains_see_the_same_losses(batch_size):
    sampling = replace(SHORT, batch_size=batch_size)
    stacked, looped = sample(sampling), sample(replace(sampling, batching="loop"))
    np.testing.assert_allclose(stacked["train"]["loss"], looped["train"]["loss"], rtol=3e-7)


def test_same_seed_same_bits_whatever_the_global_generators_say():
    def run(seed):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        tree = sample(replace(SHORT, batch_size=3))
        assert torch.equal(before[0], torch.get_rng_state())
        assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
        return tree

    first, second = run(1), run(2)
    assert first.identical(second)


@pytest.mark.parametrize("batch_size", [None, 3])
def test_other_seeds_and_blocks_are_independent(batch_size):
    sampling = replace(SHORT, chains=200, batch_size=batch_size)
    displaced = [
        positions(tree).reshape(-1) - np.tile(GAUSSIAN.w, 800)
        for tree in (sample(sampling), sample(sampling, block=1), sample(replace(sampling, seed=1)))
    ]
    correlations = np.corrcoef(displaced)
    assert abs(correlations[np.triu_indices(3, 1)]).max() < 0.1


def test_checkpoints_share_their_noise():
    other = replace(GAUSSIAN.checkpoint, params={"w": GAUSSIAN.checkpoint.params["w"] + 1})
    here, there = positions(sample()), positions(sample(checkpoint=other))
    np.testing.assert_allclose(there - here, 1, atol=1e-6)


def test_model_and_its_buffers_are_left_alone():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).eval()
    before = copy.deepcopy(model.state_dict())
    data = (torch.randn(6, 2, generator=torch.Generator().manual_seed(0)),)
    task, checkpoint = task_of(lambda m, b: m(b[0])[:, 0] ** 2, model, data)
    moved = replace(checkpoint, params={name: tensor + 1 for name, tensor in checkpoint.params.items()})
    sample(task=task, checkpoint=moved)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))

    def forward(self):
        return torch.cat([self.left, self.right])


def test_only_the_chosen_parameters_move():
    def loss(model, batch):
        w = model()
        return batch[0] @ w + 0.5 * (w**2).sum()

    task, checkpoint = task_of(loss, Two(), (torch.eye(2, dtype=torch.float64),))
    tree = sample(task=task, checkpoint=checkpoint, posterior=replace(POSTERIOR, parameters=("right",)))
    left, right = np.moveaxis(tree["train"]["loss"].values.astype(float), -1, 0)
    # with left at 0 the first loss is right^2 / 2 and the second exceeds it by right itself
    np.testing.assert_allclose(left, 0.5 * (right - left) ** 2, atol=1e-6)
    assert left.min() > 0


def test_token_losses_keep_their_axis_and_their_mean_is_the_objective():
    data = (torch.arange(6.0, dtype=torch.float64).reshape(2, 3),)
    task, checkpoint = task_of(lambda m, b: (m() - b[0]) ** 2, None, data)
    tree = sample(replace(SHORT, reflect=True), task=task, checkpoint=checkpoint)
    assert tree["train"]["loss"].dims == ("chain", "draw", "sample", "token")
    assert tree["train"]["loss_reflected"].dims == ("chain", "draw", "sample", "token")
    assert tree["train"]["loss_anchor"].dims == ("sample", "token")
    np.testing.assert_allclose(tree["train"]["loss_anchor"], data[0] ** 2)
    assert tree.attrs["curvature_max"] == pytest.approx(2.0)


def wall(model, batch):
    """No loss beyond w = 0.6: a chain that gets there is lost."""
    w = model()
    return (0.5 * w**2 + 0 * torch.sqrt(0.6 - w)).expand(len(batch[0]))


def test_chain_that_is_lost_is_named_and_the_others_are_kept():
    task, checkpoint = task_of(wall)
    sampling = Chains(chains=40, draws=10, burn_in=5, thinning=1)
    tree = sample(sampling, task, checkpoint, LocalPosterior(gamma=3.0, n_beta=5.0))
    status = tree["chains"]["status"].values
    assert 2 < (status == "diverged").sum() < 38
    assert set(status) == {"ok", "diverged"}
    kept, lost = (tree["train"]["loss"].values[status == which] for which in ("ok", "diverged"))
    assert np.isfinite(kept).all()
    assert np.ptp(kept, 1).min() > 0
    # after the draw that lost it, a chain waits at the checkpoint
    assert np.isnan(lost).any((1, 2)).any()
    assert np.isnan(lost).any(2).sum(1).max() == 1


@pytest.mark.parametrize("batching", ["stacked", "loop"])
def test_one_chain_of_four_that_leaves_is_counted_and_no_bit_of_the_others_knows_of_it(batching, monkeypatch):
    sampling = Chains(chains=4, draws=8, burn_in=3, thinning=2, batching=batching, linear=True)
    alone, distance = sample(sampling), block.Block.squared_distance

    def leaves(chains):
        return distance(chains).index_fill(0, torch.tensor([2]), torch.inf)

    monkeypatch.setattr(block.Block, "squared_distance", leaves)
    tree, kept = sample(sampling), [0, 1, 3]
    assert tree["chains"]["status"].values.tolist() == ["ok", "ok", "diverged", "ok"]
    for path in ("train", "queries/val", "queries/weights"):
        assert tree[path].to_dataset().isel(chain=kept).identical(alone[path].to_dataset().isel(chain=kept))
    found = diagnose(tree)
    assert (found["chains_ok"].item(), found["chains_failed"].item()) == (3, 1)
    table = diagnostics_table(found.expand_dims(step=[0]))
    assert dict(zip(table.columns, table.rows[0], strict=True))["Chains ok"] == "3 of 4"
    three = bif(TracesInMemory({0: tree}), trusted_only=False)
    assert set(three["replicate"].values // (three.sizes["replicate"] // 3)) == set(kept)


@pytest.mark.parametrize("sampler", ["underdamped", "sgld"])
@pytest.mark.parametrize("burn_in", [pytest.param(3, id="far"), pytest.param(300, id="overflow")])
def test_steps_that_are_too_long_end_as_diverged_chains_not_as_nan(sampler, burn_in):
    sampling = Chains(sampler, chains=3, draws=4, step_size=30.0, burn_in=burn_in, thinning=1)
    ticks = []
    tree = sample(sampling, on_step=lambda *at: ticks.append(at))
    assert (tree["chains"]["status"] == "diverged").all()
    assert np.isfinite(tree["train"]["loss"]).all()
    assert ticks == [(done + 1, burn_in + 4) for done in range(burn_in + 4)]
    # blocks of one step must have the same shape, whatever became of their chains
    assert {path: group.sizes for path, group in tree.to_dict().items()} == {
        path: group.sizes for path, group in sample(replace(sampling, step_size=0.01)).to_dict().items()
    }


def bowl(model, batch):
    w = model()
    return 0.5 * (w**2).sum() + batch[0] @ w


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("size", [1, 2, 30])
def test_healthy_chains_are_never_called_diverged(size, centred):
    # far from its minimum, at an n_beta at which the shift downhill is many times wider than the posterior
    data = (torch.full((1, size), 20.0, dtype=torch.float64),)
    task, checkpoint = task_of(bowl, Point(torch.ones(size, dtype=torch.float64)), data)
    sampling = Chains(chains=3000, draws=20, reflect=False)
    tree = sample(sampling, task, checkpoint, LocalPosterior(gamma=100.0, n_beta=100.0, centred=centred))
    assert (tree["chains"]["status"] == "ok").all()


def test_step_size_burn_in_and_thinning_follow_from_the_curvature():
    fast = np.linalg.eigvalsh(GAUSSIAN.precision(POSTERIOR)[0])[-1]
    facts = sample(Chains("sgld", chains=2, draws=2)).attrs
    relaxation = 2 / (facts["step_size"] * 3.0)
    assert facts["step_size"] == pytest.approx(0.1 / fast)
    assert facts["burn_in"] == np.ceil(5 * relaxation)
    assert facts["thinning"] == np.ceil(relaxation / 2)
    assert facts["curvature_max"] == pytest.approx((fast - 3.0) / 5.0)
    by_hand = sample(Chains("sgld", chains=2, draws=2, step_size=0.001, burn_in=7, thinning=3)).attrs
    assert (by_hand["step_size"], by_hand["burn_in"], by_hand["thinning"]) == (0.001, 7, 3)


def test_attributes_say_what_was_sampled():
    tree = sample(posterior=LocalPosterior(window=10, n_beta=5.0))
    facts = tree.attrs
    assert facts["step"] == 1000
    assert facts["metric"] == "adam"
    assert facts["window"] == 10
    assert facts["kappa"] == pytest.approx(5 / 6)
    assert facts["damping"] == pytest.approx(facts["gamma"] / 5)
    assert facts["largest_window"] >= 10
    assert facts["localised"] is True


def test_query_set_that_is_the_training_set_is_marked():
    train, part = (GAUSSIAN.task.train.batch(slice(0, size)) for size in (None, 5))
    task = Task(GAUSSIAN.task.model, GAUSSIAN.task.loss, train=train, queries={"same": train, "part": part})
    tree = sample(task=task)
    assert tree["queries/same"].attrs["is_training_set"] is True
    assert tree["queries/part"].attrs["is_training_set"] is False


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "hmc"}, "sampler must be one of"),
        ({"batching": "stack"}, "batching must be one of"),
        ({"chains": 0}, "chains must be positive, got 0"),
        ({"draws": -1}, "draws must be positive"),
        ({"step_size": 0.0}, "step_size must be positive"),
        ({"thinning": 0}, "thinning must be positive"),
        ({"batch_size": 0}, "batch_size must be positive"),
        ({"burn_in": -1}, "burn_in must not be negative, got -1"),
    ],
)
def test_plans_that_cannot_be_run_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Chains(**settings)


def test_unusable_losses_are_refused_before_any_step():
    task, checkpoint = task_of(lambda m, b: (m() ** 2).expand(len(b[0])).mean())
    with pytest.raises(ValueError, match="one loss per sample"):
        sample(task=task, checkpoint=checkpoint)


def test_options_reach_the_sampler_and_unknown_ones_are_refused():
    density = LocalPosterior(gamma=3.0, n_beta=5.0).at(GAUSSIAN.task, GAUSSIAN.checkpoint)
    tuning = tune(density, Chains("rmsprop_sgld", options={"start": 1}))
    assert tuning.sampler.start == 1
    with pytest.raises(ValueError, match=r"fraction.*friction"):
        Chains("underdamped", options={"fraction": 2.0})


@pytest.mark.parametrize("sampler", ["underdamped", "sgld", "rmsprop_sgld"])
@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("control_variate", [True, False])
def test_chains_of_large_models_that_move_one_by_one_see_the_same(sampler, batch_size, control_variate, monkeypatch):
    size = 64  # noise comes in sixteens: that of one chain after another is that of all together
    data = (torch.randn(7, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),)
    curved = torch.linspace(0.5, 1, size, dtype=torch.float64)
    task, checkpoint = task_of(lambda m, b: bowl(m, b) + 0.5 * (curved * m() ** 2).sum(), Point(0 * curved), data)
    sampling = Chains(
        sampler, chains=3, draws=3, burn_in=4, thinning=2, batch_size=batch_size, control_variate=control_variate,
        batching="loop",
    )  # fmt: skip
    posterior = LocalPosterior(gamma=100.0, n_beta=100.0)
    together = sample(sampling, task, checkpoint, posterior)
    monkeypatch.setattr(block, "_MOST_NUMBERS", 2 * size)
    apart = sample(sampling, task, checkpoint, posterior)
    for name in ("loss", "loss_reflected"):
        np.testing.assert_allclose(apart["train"][name], together["train"][name], rtol=1e-6)
    np.testing.assert_allclose(apart["chains"]["soft_spread"], together["chains"]["soft_spread"], rtol=1e-3)


def test_curvature_is_not_looked_at_where_everything_is_given_and_the_facts_say_so(monkeypatch):
    monkeypatch.setattr(tuning, "extreme_curvature", None)
    by_hand = Chains(chains=4, draws=100, step_size=0.1, burn_in=20, thinning=5, batch_size=3)
    posterior = LocalPosterior(gamma=3.0, n_beta=5.0, require_localised=False)
    tree = sample(by_hand, posterior=posterior)
    assert all(tree.attrs[name] is None for name in ("localised", "curvature_min", "heat", "stable_step"))
    assert (tree["chains"]["status"] == "ok").all()
    assert diagnose(tree)["verdict"] == "ok"
    with pytest.raises(TypeError):
        sample(by_hand, posterior=replace(posterior, require_localised=True))


@pytest.mark.parametrize(("sampler", "vectors"), [("sgld", 9.75), ("underdamped", 12.75), ("rmsprop_sgld", 13.25)])
def test_chains_of_large_models_hold_few_copies_of_the_parameters(sampler, vectors, monkeypatch):
    """Those of 3 chains; model, checkpoint, the gradient of the minibatch there; a place, and a gradient on its way."""
    monkeypatch.setattr(block, "_MOST_NUMBERS", 0)
    width = 5000
    model = nn.Sequential(nn.Linear(1, width, bias=False), nn.Linear(width, 1, bias=False))
    data = (torch.linspace(-1, 1, 8)[:, None],)
    task = Task(model, lambda m, b: m(b[0])[:, 0] ** 2, train=data, queries={"q": data}, forward_batch=1)
    posterior = LocalPosterior(gamma=1e4, n_beta=1.0, require_localised=False)
    posterior.at(task, Checkpoint(0, task.state()))  # checks once
    sampling = Chains(
        sampler, chains=3, draws=2, step_size=1e-5, burn_in=2, thinning=1, batch_size=4, reflect=False, batching="loop"
    )
    with Live() as live:
        sample_block(task, Checkpoint(0, task.state()), posterior, sampling)
    assert live.most / (2 * width) < vectors


def test_parameters_at_a_place_are_made_once_however_many_sets_and_batches_are_evaluated_there(monkeypatch):
    model, data = nn.Linear(2, 1), (torch.linspace(-1, 1, 12).reshape(6, 2),)
    queries = {"a": (data[0] + 1,), "b": (data[0] - 1,)}
    task = Task(model, lambda m, b: m(b[0])[:, 0] ** 2, train=data, queries=queries, forward_batch=2)
    density = LocalPosterior(gamma=1.0, n_beta=1.0).at(task, Checkpoint(0, task.state()))
    watch, made, params = Watch(density, "loop", reflect=True), [], type(density).params
    monkeypatch.setattr(type(density), "params", lambda self, u: (made.append(u), params(self, u))[1])
    watch.draw(torch.ones(3, density.vector.size))
    assert len(made) == 6  # 3 places and their reflections
