"""What every estimator of influence does alike: bad data are named first, and one name means one quantity."""

import numpy as np
import pytest
import torch
from regression import Regression, squared_error
from synthetic_traces import Traces
from torch import nn

from stagewise.checkpoint import Checkpoint, Optimizer
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.influence.bif import bif
from stagewise.influence.damped import damped_influence
from stagewise.influence.gradients import gradient_product
from stagewise.influence.response import response_influence
from stagewise.run.engine import sample
from stagewise.sampling.chains import Chains, sample_block
from stagewise.sampling.posterior import LocalPosterior
from stagewise.task import Task

SGD = Optimizer("sgd", 0.02, batch_size=0)
WINDOW = LocalPosterior(window=5)
ESTIMATES = {
    "gradient product": gradient_product,
    "Gauss-Newton": lambda *args: damped_influence(*args, curvature="gauss_newton", tolerance=1e-10),
    "Hessian": lambda *args: damped_influence(*args, curvature="hessian", tolerance=1e-10),
    "response": response_influence,
    "exact": lambda *args: damped_influence(*args, curvature="exact"),
}


def sampled(task, run, posterior=WINDOW, **chains):
    """The Bayesian influence function, in memory."""
    settings = Chains(**{"chains": 16, "draws": 200} | chains)
    cells = {step: sample_block(task, run.load(step), posterior, settings) for step in run.steps}
    return bif(Traces(cells, {"train": task.train_groups, "queries": task.query_groups}))


def at_start(task):
    return Trajectory.from_checkpoints([Checkpoint(0, task.state(), SGD)])


@pytest.mark.parametrize("estimate", [*ESTIMATES, "sampled"])
@pytest.mark.parametrize("where", ["train", "candidate", "queries['q']"])
@pytest.mark.parametrize("row", [11, 39])
def test_a_bad_sample_is_named_before_there_is_a_number(estimate, where, row):
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    broken = x.clone()
    broken[row, 1] = torch.inf
    train, query = (x, broken) if where.startswith("queries") else (broken, x)
    chosen = None if where == "candidate" else range(5)
    labels = {"train_groups": [0] * 40, "query_groups": {"q": [0] * 40}}
    y = x[:, 0]
    task = Task(
        nn.Linear(3, 1), squared_error, train=(train, y), queries={"q": (query, y)}, candidates=chosen, **labels
    )
    call = ESTIMATES.get(estimate, sampled)
    name = "train" if where == "candidate" else where
    with pytest.raises(ValueError, match=f"loss of sample {row} is not finite") as refused:
        call(task, at_start(task), WINDOW)
    assert str(refused.value).startswith(f"{name}: ")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("estimate", [*ESTIMATES, "sample"])
def test_the_mode_in_which_the_caller_computes_makes_no_difference(tmp_path, estimate, mode):
    def call(name):
        problem = Regression.random()
        if estimate != "sample":
            return ESTIMATES[estimate](problem.task, problem.trajectory(), WINDOW)["value"]
        return bif(sample(problem.task, problem.trajectory(), WINDOW, out=tmp_path / name, chains=8, draws=32))["value"]

    usual = call("usual")
    with mode():
        np.testing.assert_array_equal(call(mode.__name__), usual)


@pytest.mark.parametrize("shift", [0.0, 1e-12])
def test_a_groups_influence_on_itself_is_one_quantity_whether_or_not_the_queries_are_seen_to_be_the_training_set(shift):
    x = np.random.default_rng(0).normal(size=(12, 3))
    groups = ["a"] * 4 + ["b"] * 8
    problem = Regression(x, x[:, 0] + 0.5 * x[:, 1], x + shift, x[:, 0] + 0.5 * x[:, 1], np.zeros(3),
                         train_groups=groups, query_groups={"val": groups})  # fmt: skip
    run, posterior = problem.trajectory(rate=0.02), LocalPosterior(window=5, n_beta=1e4)
    got = sampled(problem.task, run, posterior)
    exact = damped_influence(problem.task, run, posterior, curvature="exact")
    error = np.abs(got["value"].values - exact["value"].values) / got["stderr"].values
    assert error.max() < 4
    assert got["stderr"].max() < 0.05 * np.abs(exact["value"]).min()  # a third of the value was missing once


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
@pytest.mark.parametrize("estimate", [damped_influence, response_influence])
def test_curvature_of_a_part_of_the_samples_says_how_far_it_is_off(estimate, curvature):
    random = np.random.default_rng(0)
    errors, relative = [], []
    for _ in range(4):
        # Samples of unequal weight, so that a subset is another curvature.
        x = random.normal(size=(600, 3)) * np.exp(0.5 * random.normal(size=(600, 1)))
        xq = random.normal(size=(8, 3))
        problem = Regression(x, random.normal(size=600), xq, random.normal(size=8), np.zeros(3),
                             train_groups=[k % 4 for k in range(600)], query_groups={"val": range(8)})  # fmt: skip
        run, posterior = problem.trajectory(rate=0.1), LocalPosterior(window=10)
        exact = estimate(problem.task, run, posterior, curvature=curvature, samples=600)["value"]
        part = estimate(problem.task, run, posterior, curvature=curvature, samples=200)
        errors.append(((part["value"] - exact) / part["stderr"]).values.ravel())
        relative.append(float(np.abs(part["value"] - exact).max() / np.abs(exact).max()))
    errors = np.concatenate(errors)
    assert max(relative) > 0.02  # there is something to be said
    assert (np.abs(errors) < 3).mean() > 0.85  # four parts are three degrees of freedom: 0.94
    assert 0.3 < np.sqrt(np.median(errors**2)) < 1.5


def test_candidates_are_rows_of_the_result_for_all():
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 4, generator=random).double(), torch.arange(30) % 3
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()

    def losses(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    data = {"train": (x[:24], y[:24]), "queries": {"q": (x[24:], y[24:])}}
    everything, few = Task(model, losses, **data), Task(model, losses, candidates=[20, 3, 11], **data)
    for estimate in ESTIMATES.values():
        all_rows, rows = (estimate(task, at_start(task), WINDOW) for task in (everything, few))
        assert rows["train"].values.tolist() == ["3", "11", "20"]
        np.testing.assert_allclose(rows["value"], all_rows["value"].sel(train=rows["train"]), rtol=1e-7, atol=1e-15)


def test_padding_with_weight_zero_is_as_if_it_were_not_there():
    """Sequences of unequal length, padded once to the longest of their batch and once far beyond."""
    random = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, 6, (n,), generator=random) for n in (3, 5, 2, 4, 5, 3, 4)]

    def padded(length):
        def collate(samples):
            return nn.utils.rnn.pad_sequence([*samples, torch.zeros(length).long()], batch_first=True)[:-1]

        return collate

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(6, 3), nn.Linear(3, 6)

        def forward(self, tokens):
            return self.head(torch.cumsum(self.embedding(tokens), 1))

    def losses(model, tokens):
        values = nn.functional.cross_entropy(model(tokens[:, :-1]).mT, tokens[:, 1:], reduction="none")
        return values, (tokens[:, 1:] > 0).double()

    torch.manual_seed(0)
    model = Reader().double()
    for objective in ("samples", "tokens"):
        settings = {"objective": objective, "train_groups": list("aabba")}
        data = {"train": texts[:5], "queries": {"q": texts[5:]}}
        tasks = [Task(model, losses, collate=padded(length), **data, **settings) for length in (1, 9)]
        for estimate in ESTIMATES.values():
            short, long = (estimate(task, at_start(task), WINDOW)["value"] for task in tasks)
            np.testing.assert_allclose(short, long, rtol=1e-9, atol=1e-15)
            assert np.abs(short).max() > 0
