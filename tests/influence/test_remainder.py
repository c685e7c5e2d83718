"""Covariances of losses whose first order is known: what is left for the draws has no bias, and less noise."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from small_networks import Problem
from synthetic_traces import Traces

from stagewise.checkpoint import Checkpoint, Optimizer
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.influence.bif import bif
from stagewise.influence.damped import damped_influence
from stagewise.influence.remainder import NoFirstOrderError
from stagewise.influence.response import response_influence
from stagewise.run.engine import sample
from stagewise.sampling import block
from stagewise.sampling.chains import Chains, sample_block
from stagewise.sampling.posterior import LocalPosterior
from stagewise.task import Task

LABELS = {"train": list("aabbcc"), "queries": {"val": list("xyx")}}
GROUPS = {"train_groups": LABELS["train"], "query_groups": LABELS["queries"]}
CHAINS = Chains(chains=16, draws=64, linear=True)


class Line(torch.nn.Module):
    """A model that is its weights."""

    def __init__(self, size):
        super().__init__()
        self.w = torch.nn.Parameter(0.2 * torch.ones(size, dtype=torch.float64))

    def forward(self):
        return self.w


def polynomial(model, batch):
    """b.w + 1/2 h.w^2 + q.w^4, and a weight."""
    w, (b, h, q, a) = model(), batch
    return b @ w + 0.5 * h @ w**2 + q @ w**4, a


def problem(size=2, quartic=0.0, weights=None):
    """Six training losses and three of queries, by random coefficients; and the checkpoint of a run."""
    random = torch.Generator().manual_seed(0)

    def losses(count):
        b = torch.randn(count, size, generator=random, dtype=torch.float64)
        h = torch.rand(count, size, generator=random, dtype=torch.float64)
        return [b, 0.2 + h, quartic * h.flip(0), torch.ones(count, dtype=torch.float64)]

    train, val = losses(6), losses(3)
    if weights is not None:
        train[-1] = torch.tensor(weights, dtype=torch.float64)
    task = Task(Line(size), polynomial, train=tuple(train), queries={"val": tuple(val)}, **GROUPS)
    return task, Checkpoint(5, task.state(), Optimizer("sgd", 0.1, batch_size=0)), (train, val)


def first_order(task, checkpoint, posterior, sampler):
    run = Trajectory.from_checkpoints([checkpoint])
    if sampler == "window":
        return response_influence(task, run, posterior, at="checkpoint")
    return damped_influence(task, run, posterior, curvature="hessian", tolerance=1e-9)


def both(task, checkpoint, posterior, sampling, **asked):
    """Sampled alone, with first order, and that."""
    traces = Traces({5: sample_block(task, checkpoint, posterior, sampling)}, LABELS)
    known = first_order(task, checkpoint, posterior, sampling.sampler)
    plain = bif(traces, trusted_only=False, **asked)
    return plain, bif(traces, first_order=known, trusted_only=False, **asked), known


QUADRATIC = {
    "underdamped": {},
    "loop": {"batching": "loop"},
    "minibatches": {"batch_size": 4, "step_size": 0.02, "burn_in": 20, "thinning": 5},
    "sgld": {"sampler": "sgld"},
    "window": {"sampler": "window"},
}


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("name", QUADRATIC)
def test_the_odd_part_of_quadratic_losses_leaves_nothing_to_sample(name, centred):
    """Coupled chains with other noise, minibatches, weights or centre would leave something."""
    if name == "window" and not centred:
        return
    task, checkpoint, _ = problem(weights=[1, 2, 0.5, 1, 3, 1])
    posterior = LocalPosterior(window=10, centred=centred)
    plain, found, known = both(task, checkpoint, posterior, replace(CHAINS, draws=16, **QUADRATIC[name]), part="odd")
    np.testing.assert_allclose(found["value"], known["value"], rtol=1e-5, atol=1e-6 * float(abs(known["value"]).max()))
    assert (found["stderr"] < 1e-4 * plain["stderr"]).all()
    assert (plain["stderr"] > 0.02 * abs(plain["value"])).any()
    assert found.attrs["first_order"] == known.attrs["estimator"]
    np.testing.assert_allclose(found["replicates"].mean("replicate"), found["value"], rtol=1e-9)


def quadrature(data, density):
    """Cov(l_i, l_j) of the posterior of one weight, ``(train, val)``, by a fine grid."""
    u = np.linspace(-6, 6, 20001) / np.sqrt(density.gamma)
    w = density.anchor.numpy() + u

    def losses(of):
        b, h, q, _ = (part.numpy() for part in of)
        return b * w + 0.5 * h * w**2 + q * w**4

    train, val = map(losses, data)
    mean, middle = train.mean(0), len(u) // 2
    slope = np.gradient(mean, u)[middle]
    density_of = np.exp(-density.n_beta * (mean - mean[middle] - slope * u) - density.gamma * u**2 / 2)
    density_of /= density_of.sum()
    train, val = (losses - (losses * density_of).sum(1, keepdims=True) for losses in (train, val))
    return (train * density_of) @ val.T


@pytest.mark.parametrize("sampler", ["underdamped", "sgld"])
def test_beyond_second_order_it_is_the_covariance_by_quadrature_with_less_noise(sampler):
    task, checkpoint, data = problem(size=1, quartic=0.5)
    posterior = LocalPosterior(gamma=50.0, n_beta=30.0)
    step = {"underdamped": 0.05, "sgld": 0.003}[sampler]  # so short that steps add nothing to be seen
    sampling = replace(CHAINS, sampler=sampler, step_size=step, chains=64, batching="stacked")
    plain, found, known = both(task, checkpoint, posterior, sampling)
    density = posterior.at(task, checkpoint)
    exact = quadrature(data, density).reshape(3, 2, 3).mean(1)
    truth = -density.kappa * np.stack([exact[:, [0, 2]].mean(1), exact[:, 1]], 1)
    for estimate in (plain, found):
        assert (abs(estimate["value"][0].values - truth) < 4 * estimate["stderr"][0].values).all()
    assert (abs(known["value"][0].values - truth) > 4 * found["stderr"][0].values).any()
    assert (plain["stderr"] > 2 * found["stderr"]).all()


def test_draws_of_a_window_have_their_second_order_by_the_reflected_ones_too():
    """Products of odd and even parts, which the symmetric law has no use for, are most of the noise that is left."""
    task, checkpoint, (train, val) = problem()
    posterior = LocalPosterior(window=10, n_beta=60.0)
    sampling = replace(CHAINS, sampler="window", batching="stacked")
    plain, found, known = both(task, checkpoint, posterior, sampling)
    _, alone, _ = both(task, checkpoint, posterior, replace(sampling, reflect=False))
    h = np.average(train[1], axis=0)
    response = (1 - (1 - 0.1 * h) ** 10) / h / 60
    even = np.einsum("ik,k,jk->ij", train[1], response**2, val[1]).reshape(3, 2, 3).mean(1) / 2
    truth = known["value"][0].values - 10 * np.stack([even[:, [0, 2]].mean(1), even[:, 1]], 1)
    for estimate in (plain, alone, found):
        assert (abs(estimate["value"][0].values - truth) < 4 * estimate["stderr"][0].values).all()
    assert (plain["stderr"] / alone["stderr"]).median() > 2
    assert (alone["stderr"] / found["stderr"]).median() > 2


TOKENS = {"train_groups": [["a", "b"]] * 11, "query_groups": {"val": [["a", "a"]] * 4}}


@pytest.mark.parametrize("groups", [{}, TOKENS], ids=["single tokens", "labels"])
@pytest.mark.parametrize(
    "settings", [{}, {"batching": "loop"}, {"sampler": "window"}], ids=["stacked", "loop", "window"]
)
def test_near_the_checkpoint_first_order_is_all(monkeypatch, groups, settings):
    """In every form that losses of tokens are kept, with chains that move one by one."""
    own = Problem(loss="tokens", **groups)
    monkeypatch.setattr(block, "_MOST_NUMBERS", 1)
    cold = LocalPosterior(window=5, n_beta=1e10)
    tree = sample_block(own.task, own.checkpoint, cold, Chains(chains=3, draws=2, linear=True, **settings))
    for path in ("train", "queries/val"):
        loss, linear = (tree[path][name].values - tree[path]["loss_anchor"].values for name in ("loss", "loss_linear"))
        assert abs(loss).min() > 0
        np.testing.assert_allclose(linear, loss, rtol=1e-3, atol=1e-3 * abs(loss).max())
        assert tree[path]["loss_linear"].dims == tree[path]["loss"].dims


@pytest.fixture(scope="module")
def sampled():
    task, checkpoint, _ = problem()
    posterior = LocalPosterior(gamma=50.0, n_beta=30.0)
    traces = Traces({5: sample_block(task, checkpoint, posterior, CHAINS)}, LABELS)
    return traces, first_order(task, checkpoint, posterior, "underdamped")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"kind": "correlation"}, "kind='covariance' only, got 'correlation'"),
        ({"centring": "between"}, "centring='pooled' only, got 'between'"),
        ({"self_pairs": False}, "self_pairs=True only, got False"),
        ({"part": "even"}, "no part of part='even'"),
        ({"train_groups": list("aaaabb")}, r"train groups a \(2\), b \(2\), c \(2\), these traces are of a \(4\), b"),
    ],
)
def test_questions_without_a_first_order_are_refused(sampled, asked, words):
    traces, known = sampled
    with pytest.raises(ValueError, match=words):
        bif(traces, first_order=known, **asked)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda known: known.assign_attrs(gamma=51.0), "has gamma 51.0, these traces need 50.0"),
        (lambda known: known.assign_attrs(n_beta=20.0), "has n_beta 20.0, these traces need 30.0"),
        (lambda known: known.assign_attrs(metric="adam"), "has metric 'adam', these traces need 'euclidean'"),
        (lambda known: known.assign_attrs(estimator="gradient product"), "use damped_influence"),
        (lambda known: known.assign_coords(step=[6]), "lacks step 5"),
        (lambda known: known.assign(value=2 * known["value"]), "0.5 times as large, with a standard error of 0.0"),
        (lambda known: known.assign(value=np.nan * known["value"]), "not finite at step 5"),
    ],
)
def test_first_order_of_other_draws_is_refused(sampled, change, words):
    traces, known = sampled
    with pytest.raises(ValueError, match=words):
        bif(traces, first_order=change(known))


def test_first_order_of_a_path_and_traces_without_linear_losses_are_refused():
    task, checkpoint, _ = problem()
    posterior, run = LocalPosterior(window=10), Trajectory.from_checkpoints([checkpoint])
    for linear, words in ((True, "has at 'path', these traces need 'checkpoint'"), (False, "linear=True")):
        sampling = Chains("window", chains=4, draws=8, linear=linear)
        traces = Traces({5: sample_block(task, checkpoint, posterior, sampling)}, LABELS)
        with pytest.raises(ValueError, match=words):
            bif(traces, first_order=response_influence(task, run, posterior), trusted_only=False)


def test_blocks_of_a_run_folder_are_completed_as_those_in_memory(tmp_path):
    task, checkpoint, _ = problem()
    posterior, run = LocalPosterior(window=10), Trajectory.from_checkpoints([checkpoint])
    sampling, known = replace(CHAINS, draws=8), first_order(task, checkpoint, posterior, "underdamped")
    sample(task, run, posterior, out=tmp_path, sampling=sampling, blocks=2, workers=1)
    found = bif(tmp_path, first_order=known, trusted_only=False)
    blocks = [
        bif(Traces({5: sample_block(task, checkpoint, posterior, sampling, block=k)}, LABELS), trusted_only=False)
        for k in range(2)
    ]
    assert found.sizes["replicate"] == 32
    assert (found["stderr"] < 0.5 * blocks[0]["stderr"]).all()
    mean = sum(block["value"] for block in blocks) / 2
    assert (abs(found["value"] - mean) < 5 * blocks[0]["stderr"]).all()


def test_chains_without_a_law_that_is_known_are_refused():
    with pytest.raises(ValueError, match="rmsprop_sgld adapts"):
        Chains("rmsprop_sgld", linear=True)
    with pytest.raises(ValueError, match="leave out control_variate=False"):
        Chains(batch_size=8, control_variate=False, linear=True)


def test_a_step_that_first_order_says_it_lacks_is_of_the_draws_alone_and_named(sampled):
    traces, known = sampled
    lacking = known.isel(step=[]).assign_attrs(omitted='{"5": "negative curvature"}')
    found = bif(traces, first_order=lacking)
    assert found.attrs["first_order_omitted"] == '{"5": "negative curvature"}'
    np.testing.assert_array_equal(found["value"], bif(traces)["value"])
    assert bif(traces, first_order=known).attrs["first_order_omitted"] == "{}"


def test_all_steps_that_the_draws_contradict_are_named_at_once_also_by_another_process(sampled):
    """So that a run without them needs no attempt for each."""
    traces, known = sampled
    both = Traces({step: traces.load(5).assign() for step in (5, 6, 7)}, LABELS)
    for step, tree in both.trees.items():
        tree.attrs = tree.attrs | {"step": step}
    three = xr.concat([known.assign_coords(step=[step]) for step in (5, 6, 7)], "step")
    three["value"][1:] *= 2
    with pytest.raises(NoFirstOrderError, match="step 6 is not what.*step 7 is not what") as caught:
        bif(both, first_order=three)
    assert set(pickle.loads(pickle.dumps(caught.value)).steps) == {6, 7}
