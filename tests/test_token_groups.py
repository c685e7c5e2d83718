"""Labels of tokens, of candidates and of queries: every estimator and measurement means the same tokens by them."""

import json
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import stagewise as sw
from stagewise.derivatives import group_gradients
from stagewise.evaluate import at
from stagewise.groups import query_groups, train_groups
from stagewise.retraining.scores import predicted_effect
from stagewise.retraining.training import train_and_record
from stagewise.sampling.chains import sample_block
from stagewise.traces.store import RunMismatchError

LENGTHS = (6, 3, 5, 6, 2, 4, 6, 5)
WIDTH = max(LENGTHS) - 1
WINDOW = 5


class Words(nn.Module):
    """Predicts the next word from a running sum of the words before."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, tokens):
        return self.head(torch.tanh(torch.cumsum(self.embedding(tokens), 1)))


def losses(model, batch):
    values = nn.functional.cross_entropy(model(batch[:, :-1]).mT, batch[:, 1:], reduction="none")
    return values, (batch[:, 1:] > 0).to(values)


def collate(rows):
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def sentences(seed, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 7, (length,), generator=generator) for length in lengths]


def kinds(data):
    """By the token that is predicted; 3 is of no kind. Rows are as long as the losses of their sentence."""
    return [[{0: "even", 1: "odd"}[int(t) % 2] if t != 3 else None for t in row[1:]] for row in data]


def task(objective="tokens", **changes):
    torch.manual_seed(0)
    train, val, other = sentences(0), sentences(1), sentences(2, (4, 4, 4))
    settings = {
        "train": train,
        "queries": {"val": val, "other": other},
        "train_groups": kinds(train),
        "query_groups": {"val": kinds(val), "other": ["x", "y", "y"]},
        "objective": objective,
        "collate": collate,
        "forward_batch": 3,
    }
    return sw.Task(Words().double(), losses, **settings | changes)


def trajectory(of, optimizer=None, order=None, step=3):
    optimizer = optimizer or sw.Optimizer("adam", 0.02, betas=(0.8, 0.95), eps=1e-4, batch_size=0)
    return sw.Trajectory.from_checkpoints(train_and_record(of, optimizer, order or sw.BatchOrder(len(LENGTHS)), [step]))


def tokens_of(of, checkpoint, data, query=None):
    """Of every single token the gradient ``(sample, token, parameters)`` and the weight ``(sample, token)``."""
    point, _ = at(of, checkpoint)
    u = point.vector.flatten(point.state)
    gradients = torch.zeros(len(data), WIDTH, len(u), dtype=torch.float64)
    weights = torch.zeros(len(data), WIDTH, dtype=torch.float64)
    for k in range(len(data)):
        batch = data.batch(torch.tensor([k]))
        leaf = u.clone().requires_grad_()
        values, _ = point.losses(leaf, batch, query)
        shares = of.shares(point.losses(u, batch, query))[0]
        for t, value in enumerate(values[0]):
            gradients[k, t] = torch.autograd.grad(value, leaf, retain_graph=True)[0]
        weights[k, : len(shares)] = shares
    return gradients, weights


def test_a_token_without_label_is_in_no_group_and_rows_may_be_as_long_as_their_sentences():
    of = task()
    groups = train_groups(of)
    assert groups.labels == ("even", "odd")
    named = [[label for label in row if label] for row in kinds(sentences(0))]
    assert groups.sizes == tuple(sum(row.count(label) for row in named) for label in groups.labels)
    places = groups.places(len(LENGTHS))
    for k, row in enumerate(kinds(sentences(0))):
        expected = [groups.labels.index(label) if label else 2 for label in row]
        assert places[k].tolist() == expected + [2] * (WIDTH - len(row))
    assert query_groups(of).labels == ("val:even", "val:odd", "other:x", "other:y")
    samples = task(train_groups=["a", None, "b", "a", None, "b", "b", "b"])
    assert [index.tolist() for index in train_groups(samples).indices] == [[0, 3], [2, 5, 6, 7]]


def test_influence_on_one_query_set_alone_is_that_beside_another_whose_groups_are_of_tokens():
    of = task()
    run = trajectory(of)
    every = sw.window_influence(of, run, window=WINDOW, mode="reverse").value
    for names in (["other:y", "other:x"], ["val:odd"], ["other:y", "val:even"]):
        some = sw.window_influence(of, run, window=WINDOW, queries=names, mode="reverse").value
        np.testing.assert_allclose(some, every.sel(query=names), rtol=1e-9)


def test_labels_that_are_shifted_by_one_are_refused_where_they_enter():
    shifted = [[*row, None] for row in kinds(sentences(0))]
    shifted[0] = [*shifted[0][:-1], "odd"]  # a label for each word, but no loss for the first
    with pytest.raises(ValueError, match=r"train: there are labels of 6 tokens .* returns 5 losses for sample 0"):
        train_groups(task(train_groups=shifted))
    with pytest.raises(ValueError, match=r"queries\['val'\]: there are labels of 4 tokens"):
        query_groups(task(query_groups={"val": [["a"] * 4] * len(LENGTHS)}))
    with pytest.raises(ValueError, match="no sample or token has a label"):
        train_groups(task(train_groups=[[None]] * len(LENGTHS)))
    with pytest.raises(ValueError, match="a label for each sample, or a row of labels for each, not both"):
        task(train_groups=["a", *kinds(sentences(0))[1:]])


@pytest.mark.parametrize("objective", ["samples", "tokens"])
def test_gradients_of_groups_of_tokens_are_those_of_their_single_tokens(objective):
    of = task(objective)
    checkpoint = trajectory(of).load(3)
    point, _ = at(of, checkpoint)
    u = point.vector.flatten(point.state)
    for groups, data, query in ((train_groups(of), of.train, None), (query_groups(of), of.queries["val"], "val")):
        found = group_gradients(point, u, groups)
        each, weights = tokens_of(of, checkpoint, data, query)
        whole = weights.sum() / len(data)  # mean a_i
        for number in range(2):
            index = groups.indices[number]
            total = (weights.flatten()[index, None] * each.flatten(0, 1)[index]).sum(0)
            size = weights.flatten()[index].sum() if query else len(index) * whole
            torch.testing.assert_close(found[number], total / size, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("objective", ["samples", "tokens"])
def test_gradient_products_of_tokens_are_those_of_their_gradients(objective):
    of, posterior = task(objective), sw.LocalPosterior(gamma=2.0, n_beta=50.0)
    run = trajectory(of)
    found = sw.gradient_product(of, run, posterior)
    point, _ = at(of, run.load(3))
    u = point.vector.flatten(point.state)
    products = group_gradients(point, u, train_groups(of)) @ group_gradients(point, u, query_groups(of)).T
    expected = -(50.0 / 2.0) / len(LENGTHS) * products
    np.testing.assert_allclose(found["value"][0], expected, rtol=1e-9)
    assert found["train_size"].values.tolist() == list(train_groups(of).sizes)


@pytest.mark.parametrize("objective", ["samples", "tokens"])
def test_exact_influence_of_tokens_on_tokens_is_what_retraining_with_their_weight_measures(objective):
    of, order = task(objective), sw.BatchOrder(len(LENGTHS), 3, seed=1)
    run = trajectory(of, order=order)
    exact = sw.window_influence(of, run, window=WINDOW, order=order)
    forwards = sw.window_influence(of, run, window=WINDOW, order=order, mode="forward")
    np.testing.assert_allclose(forwards["value"], exact["value"], atol=1e-12)
    step = 1e-3
    up, down = (
        sw.window_ablation(of, run, window=WINDOW, order=order, weight=1 + way * step)["effect"] for way in (1, -1)
    )
    np.testing.assert_allclose(predicted_effect(exact, 1 + step)["effect"], (up - down) / 2, rtol=1e-5, atol=1e-10)
    assert up["query"].values.tolist() == ["val:even", "val:odd", "other:x", "other:y"]


def test_damped_influence_of_tokens_is_that_of_their_gradients_and_the_curvature():
    of, posterior = task(), sw.LocalPosterior(window=4)
    optimizer = sw.Optimizer("sgd", 0.05, batch_size=0)
    run = trajectory(of, optimizer)
    found = sw.damped_influence(of, run, posterior, curvature="exact")
    density = posterior.at(of, run.load(3))
    matrix = torch.autograd.functional.hessian(
        lambda u: (
            sum(
                (of.shares(losses_) * losses_.values).sum()
                for losses_ in [density.losses(u, of.train.batch(slice(None)))]
            )
            / sum(length - 1 for length in LENGTHS)
        ),
        density.origin,
    )
    damped = matrix + density.damping * torch.eye(len(matrix))
    assert torch.linalg.eigvalsh(damped)[0] > 0
    sides = [group_gradients(density, density.origin, groups) for groups in (train_groups(of), query_groups(of))]
    expected = -sides[0] @ torch.linalg.solve(damped, sides[1].T) / len(LENGTHS)
    np.testing.assert_allclose(found["value"][0], expected, rtol=1e-6)


@cache
def drawn_by_class_and_singly(objective):
    """A task, and the same draws with losses by sample and label and with those of single tokens."""
    train = sentences(0)
    of = task(objective, queries={"val": sentences(1), "train": train}, query_groups={"train": kinds(train)})
    run, posterior = trajectory(of, sw.Optimizer("sgd", 0.05, batch_size=0)), sw.LocalPosterior(window=4)
    settings = {"chains": 4, "draws": 8, "batching": "loop"}
    return of, *(
        sample_block(of, run.load(3), posterior, sw.Chains(**settings, single_tokens=single))
        for single in (False, True)
    )


@pytest.mark.parametrize("objective", ["samples", "tokens"])
@pytest.mark.parametrize("options", [{}, {"self_pairs": False}, {"part": "odd"}], ids=str)
def test_losses_kept_by_sample_and_label_give_the_influence_that_single_tokens_give(objective, options):
    of, classes, single = drawn_by_class_and_singly(objective)
    assert classes["train/loss"].sizes["token"] == 3  # two kinds, and none
    assert single["train/loss"].sizes["token"] == WIDTH
    np.testing.assert_allclose(classes["train/tokens"].sum(), sum(length - 1 for length in LENGTHS))
    row = [["", "even", "odd"]]
    kept = sw.TracesInMemory({3: classes}, {"train": row, "queries": {"val": None, "train": row}})
    labels = of.label_sets
    all_tokens = sw.TracesInMemory(
        {3: single}, {"train": labels["train"], "queries": {"val": None, "train": labels["queries/train"]}}
    )
    found, expected = (sw.bif(traces, trusted_only=False, **options) for traces in (kept, all_tokens))
    assert found["train_size"].equals(expected["train_size"])
    assert found["query_size"].sel(query="train:odd").item() == expected["query_size"].sel(query="train:odd").item()
    np.testing.assert_allclose(found["value"], expected["value"], rtol=1e-5, atol=1e-9)
    by_sample = [sw.bif(sw.TracesInMemory({3: tree}), trusted_only=False) for tree in (classes, single)]
    np.testing.assert_allclose(by_sample[0]["value"], by_sample[1]["value"], rtol=1e-5, atol=1e-9)
    learned = [sw.llc(sw.TracesInMemory({3: tree}), trusted_only=False) for tree in (classes, single)]
    np.testing.assert_allclose(learned[0]["value"], learned[1]["value"], rtol=1e-5)


def test_kernels_and_susceptibilities_of_carried_labels_are_those_of_single_tokens_and_other_labels_are_refused():
    of, classes, single = drawn_by_class_and_singly("tokens")
    kept = sw.TracesInMemory({3: classes}, {"train": [["", "even", "odd"]], "queries": {}})
    labels = of.label_sets["train"]
    all_tokens, options = sw.TracesInMemory({3: single}, {"train": labels, "queries": {}}), {"trusted_only": False}
    kernel = [sw.loss_kernel(traces, grouped=True, **options) for traces in (kept, all_tokens)]
    chi = [sw.susceptibilities({"all": traces}, grouped=True, **options) for traces in (kept, all_tokens)]
    for one, other in (kernel, chi):
        assert one["sample"].values.tolist() == ["even", "odd"]
        np.testing.assert_allclose(one["value"], other["value"], rtol=1e-4, atol=1e-9)
    with pytest.raises(ValueError, match="sample with single_tokens=True"):
        sw.loss_kernel(kept, groups=labels, **options)
    with pytest.raises(ValueError, match=r"got \(2,\)$"):
        sw.bif(kept, train_groups=["a", "b"], **options)


@pytest.mark.parametrize("single", [False, True])
def test_a_folder_of_labelled_tokens_is_gone_on_with(tmp_path, single):
    of, posterior = task(), sw.LocalPosterior(window=4)
    run = trajectory(of, sw.Optimizer("sgd", 0.05, batch_size=0))
    settings = {"out": tmp_path / "run", "chains": 4, "draws": 8, "single_tokens": single}
    first = sw.bif(sw.sample(of, run, posterior, **settings), trusted_only=False)
    again = sw.bif(sw.sample(task(), run, posterior, **settings), trusted_only=False)
    np.testing.assert_array_equal(again["value"], first["value"])


def test_a_folder_knows_the_labels_of_its_tokens_and_refuses_others(tmp_path):
    of, posterior = task(), sw.LocalPosterior(window=4)
    run = trajectory(of, sw.Optimizer("sgd", 0.05, batch_size=0))
    settings = {"out": tmp_path / "run", "chains": 4, "draws": 8}
    store = sw.sample(of, run, posterior, **settings)
    assert json.loads((tmp_path / "run" / "labels.json").read_text())["train"] == [["", "even", "odd"]]
    influence = sw.bif(store, trusted_only=False)
    assert influence["train"].values.tolist() == ["even", "odd"]
    assert influence["query"].values.tolist() == list(query_groups(of).labels)
    assert influence["train_size"].values.tolist() == list(train_groups(of).sizes)
    moved = kinds(sentences(0))
    moved[0][0] = "odd" if moved[0][0] != "odd" else "even"
    with pytest.raises(RunMismatchError, match="labels of tokens"):
        sw.sample(task(train_groups=moved), run, posterior, **settings)
