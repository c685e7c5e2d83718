"""The derivative of a replayed window, against forward mode and against retraining with slightly changed weights."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from problems import LABELS, D, N, Regression, classifier
from torch import nn

from stagewise.checkpoint import Checkpoint, Optimizer, ParameterGroup
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.retraining import adjoint
from stagewise.retraining.ablation import window_ablation
from stagewise.retraining.schedule import BatchOrder
from stagewise.retraining.scores import predicted_effect
from stagewise.retraining.training import train_and_record
from stagewise.retraining.window_influence import window_influence
from stagewise.task import Task

WINDOW, START = 7, 12
RULES = {
    "SGD": Optimizer("sgd", 0.3),
    "momentum, decay": Optimizer("sgd", 0.1, momentum=0.9, weight_decay=0.02),
    "Adam, decay": Optimizer("adam", 0.02, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.03),
    "AdamW": Optimizer("adam", 0.02, eps=1e-4, weight_decay=0.1, decoupled=True),
}
ORDERS = {"full batch": BatchOrder(60), "minibatches": BatchOrder(60, 16, seed=5)}


class Attention(nn.Module):
    """Over the features of a point as if they were a sequence."""

    def __init__(self):
        super().__init__()
        self.embed, self.project, self.head = nn.Linear(1, 3), nn.Linear(3, 9), nn.Linear(3, 3)

    def forward(self, x):
        q, k, v = self.project(self.embed(x[..., None])).chunk(3, -1)
        return self.head(nn.functional.scaled_dot_product_attention(q, k, v).mean(1))


MODELS = {
    "layers": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)),
    "norm": lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3)),
    "attention": Attention,
    "kinks": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(8, 3)
    ),
}


def trajectory(task, optimizer, order, step=START, coming=()):
    """A checkpoint of the run, and one for the rates that the next updates had."""
    (checkpoint,) = train_and_record(task, optimizer, order, [step])
    later = replace(checkpoint, step=step + len(coming), learning_rates=tuple(coming))
    return Trajectory.from_checkpoints([checkpoint, later] if coming else [checkpoint])


def central_differences(task, run, delta=1e-5, **options):
    """Of retraining, by the weight of every group: per unit weight of one sample."""
    up, down = (window_ablation(task, run, weight=1 + d, **options) for d in (delta, -delta))
    return ((up.effect - down.effect) / (2 * delta * up.train_size)).transpose("step", "train", "query")


def both_modes(task, run, **options):
    return [window_influence(task, run, mode=mode, **options) for mode in ("reverse", "forward")]


def close(got, expected, within):
    np.testing.assert_allclose(got, expected, rtol=0, atol=within * float(abs(expected).max()))


@pytest.mark.parametrize(("schedule", "clip_norm"), [(False, None), (True, 0.05)])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rule", RULES)
def test_backwards_is_forwards_is_the_difference_of_retraining(rule, order, schedule, clip_norm):
    optimizer, task = replace(RULES[rule], clip_norm=clip_norm), classifier()
    rates = [optimizer.learning_rate * (1 - 0.1 * k) for k in range(WINDOW)] if schedule else []
    run = trajectory(task, optimizer, ORDERS[order], coming=rates)
    options = {"window": WINDOW, "order": ORDERS[order], "groups": [k % 5 for k in range(60)], "steps": [START]}
    reverse, forward = both_modes(task, run, **options)
    close(reverse.value, forward.value, 1e-12)
    close(reverse.value, central_differences(task, run, **options), 1e-6)
    assert (reverse.attrs["mode"], forward.attrs["mode"]) == ("reverse", "forward")
    assert not reverse.stderr.values.any()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_under_every_optimiser(model, rule):
    task, order = classifier(model=MODELS[model]()), ORDERS["minibatches"]
    run = trajectory(task, RULES[rule], order)
    reverse, forward = both_modes(task, run, window=WINDOW, order=order)
    close(reverse.value, forward.value, 1e-12)
    close(reverse.value, central_differences(task, run, window=WINDOW, order=order), 1e-6)


@pytest.mark.parametrize("memory", [1, 2e4])
def test_little_memory_costs_time_and_changes_nothing(memory):
    task, order = classifier(), ORDERS["minibatches"]
    run, options = trajectory(task, RULES["Adam, decay"], order), {"window": 15, "order": order}
    whole = window_influence(task, run, **options)
    close(window_influence(task, run, memory=memory, **options).value, whole.value, 1e-12)
    one_by_one = window_influence(task, run, batching="loop", **options)
    close(one_by_one.value, whole.value, 1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("free", [1e9, 2e4])
def test_states_on_disk_change_no_bit_spare_updates_and_leave_nothing(rule, free, tmp_path, monkeypatch):
    task, order = classifier(), ORDERS["minibatches"]
    run, options = trajectory(task, RULES[rule], order), {"window": 15, "order": order, "mode": "reverse"}
    made, update = [], adjoint.Replay._advance
    monkeypatch.setattr(adjoint.Replay, "_advance", lambda *at: made.append(at[1]) or update(*at))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))

    def found(**memory):
        made.clear()
        return window_influence(task, run, batching="loop", **options, **memory), len(made)

    (whole, once), (again, often) = found(), found(memory=1)
    kept, fewer = found(memory=1, scratch=tmp_path)
    assert once * len(whole["query"]) <= fewer < often  # without memory every query walks alone
    assert free < 1e9 or fewer == once * len(whole["query"])
    assert kept.value.identical(again.value)
    close(kept.value, whole.value, 1e-12)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    assert found(memory=1, scratch=tmp_path)[1] == often, "without room on the disk it is as without the disk"


def test_a_loss_that_is_not_finite_at_a_later_checkpoint_is_no_influence():
    """The training set is looked at whole at the first checkpoint only."""
    x, marked = torch.randn(8, 2, dtype=torch.float64), torch.eye(8, dtype=torch.float64)[3]
    task = Task(
        nn.Linear(2, 1).double(),
        lambda model, batch: model(batch[0])[:, 0] ** 2 + torch.sqrt(1 - batch[1] * model.bias),
        train=(x, marked),
        queries={"q": (x, torch.zeros(8, dtype=torch.float64))},
        train_groups=list("aabbaabb"),
    )
    good = Checkpoint(0, task.state() | {"bias": torch.zeros(1, dtype=torch.float64)}, Optimizer("sgd", 0.1))
    beyond = replace(good, step=9, params={**good.params, "bias": torch.full((1,), 2.0, dtype=torch.float64)})
    run = Trajectory.from_checkpoints([good, beyond])
    for mode, reason in (("reverse", "steps 9 to 11 ends with weights that are not finite"), ("forward", "not")):
        found = window_influence(task, run, window=2, order=BatchOrder(8), mode=mode)
        assert found.step.values.tolist() == [0]
        assert reason in json.loads(found.attrs["omitted"])["9"]


def test_a_window_costs_nothing_for_training_samples_that_are_not_in_its_batches():
    seen = []

    def loss(model, batch):
        seen.append(len(batch[0]))
        return model(batch[0])[:, 0] ** 2

    x = torch.randn(500, 2, dtype=torch.float64)
    task = Task(nn.Linear(2, 1).double(), loss, train=(x,), queries={"q": (x[:4],)}, train_groups=["a", "b"] * 250)
    first = Checkpoint(0, task.state(), Optimizer("sgd", 0.01, batch_size=4))
    later = replace(first, step=5, params={name: tensor + 0.1 for name, tensor in first.params.items()})
    options = {"window": 3, "order": BatchOrder(500, 4)}
    window_influence(task, Trajectory.from_checkpoints([first]), **options)
    seen.clear()
    window_influence(task, Trajectory.from_checkpoints([later]), **options)
    assert sum(seen) < 500


@pytest.mark.parametrize("clip_norm", [None, 0.05])
@pytest.mark.parametrize("per", ["sample", "token"])
def test_a_batch_that_is_evaluated_in_pieces_is_one_batch(per, clip_norm):
    """Pieces are padded to lengths of their own, and hold other numbers of tokens."""
    task, order = words(), BatchOrder(6, 5, seed=1)
    run, options = trajectory(task, replace(RULES["AdamW"], clip_norm=clip_norm), order), {"window": 6, "order": order}
    whole = window_influence(task, run, per=per, **options)
    task.forward_batch = 2
    close(window_influence(task, run, per=per, **options).value, whole.value, 1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_a_long_vector_is_moved_back_in_pieces(rule, clip_norm, monkeypatch):
    task, order = classifier(frozen=0), ORDERS["minibatches"]
    fast = ParameterGroup(frozenset({"2.bias"}), RULES[rule].learning_rate * 2, 0.1)
    run = trajectory(task, replace(RULES[rule], clip_norm=clip_norm, groups=(fast,)), order, coming=[0.01, 0.0, 0.02])
    whole = window_influence(task, run, window=WINDOW, order=order, steps=[START])
    monkeypatch.setattr(adjoint, "_PIECE", 5)
    pieces = window_influence(task, run, window=WINDOW, order=order, steps=[START])
    close(pieces.value, whole.value, 1e-12)


def test_a_group_is_the_mean_of_its_samples_and_a_sample_that_no_update_saw_has_no_influence():
    task, order = classifier(), ORDERS["minibatches"]
    run = trajectory(task, RULES["AdamW"], order)
    samples = window_influence(task, run, window=2, order=order, per="sample")
    groups = window_influence(task, run, window=2, order=order)
    for label in range(3):
        close(samples.value[:, label::3].mean("train"), groups.value.sel(train=str(label)), 1e-12)
    seen = set(torch.cat([order(START), order(START + 1)]).tolist())
    influential = {int(label) for label in samples.train.values[abs(samples.value[0]).sum("query") > 0]}
    assert influential == seen


def test_candidates_alone_have_an_influence_of_their_own():
    whole = classifier()
    task = Task(
        whole.model,
        whole.loss,
        train=whole.train.batch(slice(None)),
        queries={"val": whole.queries["val"].batch(slice(None))},
        candidates=[3, 40, 41],
    )
    run = trajectory(task, RULES["SGD"], ORDERS["full batch"])
    got = window_influence(task, run, window=3, per="sample")
    expected = window_influence(whole, run, window=3, per="sample").value.sel(train=["3", "40", "41"]).mean("query")
    close(got.value[..., 0], expected, 1e-12)


@pytest.mark.parametrize("rule", ["SGD", "Adam, decay"])
def test_frozen_layers_unused_parameters_and_groups_with_rates_of_their_own(rule):
    class Spare(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
            self.spare = nn.Parameter(torch.ones(2))

    task = classifier(frozen=0, model=Spare())
    slow = ParameterGroup(frozenset({"2.bias"}), RULES[rule].learning_rate / 10, 0.0)
    run = trajectory(task, replace(RULES[rule], groups=(slow,)), ORDERS["full batch"])
    reverse, forward = both_modes(task, run, window=WINDOW)
    close(reverse.value, forward.value, 1e-12)
    close(reverse.value, central_differences(task, run, window=WINDOW), 1e-6)


def test_one_update_of_gradient_descent_is_minus_rate_times_the_product_of_gradients():
    problem = Regression()
    w = np.array([1.0, -0.5, 2.0, 0.3])
    got = window_influence(problem.task, problem.trajectory(w), window=1, per="sample")
    after = problem.after(w, 1, np.ones(N))
    train = problem.x * (problem.x @ w - problem.y)[:, None]
    query = (problem.xq * (problem.xq @ after - problem.yq)[:, None]).reshape(3, 3, D).mean(1)
    close(got.value[0], -0.15 * train @ query.T / N, 1e-12)


def test_it_predicts_a_small_ablation_by_name():
    problem = Regression()
    run = problem.trajectory(np.array([1.0, -0.5, 2.0, 0.3]))
    exact = window_influence(problem.task, run, window=10)
    measured = window_ablation(problem.task, run, window=10, weight=0.999)
    close(predicted_effect(exact, 0.999).effect, measured.effect, 2e-3)
    assert exact.train.values.tolist() == measured.train.values.tolist() == sorted(set(LABELS))
    assert exact.train_size.values.tolist() == [8, 8, 8]


@pytest.mark.parametrize("rule", ["SGD", "AdamW"])
def test_expected_influence_is_that_of_the_whole_set_and_the_mean_over_many_batches(rule):
    task, options = classifier(), {"window": 15, "per": "sample"}
    whole = trajectory(task, RULES[rule], ORDERS["full batch"])
    exact = window_influence(task, whole, **options)
    expected = window_influence(task, whole, expected=True, **options)
    close(expected.value, exact.value, 0.01)
    assert (abs(expected.value - exact.value) <= expected.stderr + 1e-9).mean() > 0.9
    every = window_influence(task, whole, expected=True, window=6, per="sample")  # nine updates on the way are all
    close(every.value, window_influence(task, whole, window=6, per="sample").value, 1e-12)
    run = trajectory(task, replace(RULES[rule], batch_size=16), ORDERS["minibatches"])
    drawn = window_influence(task, run, window=8, repeats=12)
    mean = window_influence(task, run, window=8, expected=True, repeats=4)
    assert (abs(mean.value - drawn.value) < 4 * np.hypot(mean.stderr, drawn.stderr)).all()
    assert abs(mean.value).max() > 5 * mean.stderr.max()


def test_a_sample_that_no_update_saw_has_an_expected_influence():
    task, order = classifier(), ORDERS["minibatches"]
    run = trajectory(task, RULES["SGD"], order)
    trained, drawn = (window_influence(task, run, window=2, order=order, per="sample", expected=e) for e in (0, 1))
    unseen = (trained.value == 0).all("query")
    assert unseen.sum() == 60 - 2 * 16
    assert (abs(drawn.value.where(unseen, drop=True)) > 0).all()
    with pytest.raises(ValueError, match="leave out mode='forward'"):
        window_influence(task, run, window=2, expected=True, mode="forward")


@pytest.mark.parametrize("objective", ["tokens", "samples"])
def test_expected_influence_of_tokens_is_exact_where_every_batch_is_the_whole_set(objective):
    task = words(objective=objective)
    run = trajectory(task, RULES["AdamW"], BatchOrder(6))
    for options in ({"per": "token"}, {"groups": [[f"{(k + t) % 3}" for t in range(4)] for k in range(6)]}):
        exact, expected = (window_influence(task, run, window=5, expected=e, **options) for e in (False, True))
        assert expected.train.values.tolist() == exact.train.values.tolist()
        close(expected.value, exact.value, 1e-12)


def test_queries_that_are_asked_for_alone_have_the_influence_that_they_have_beside_all_others():
    labels = [[f"{t % 2}" for t in range(4)] for _ in range(6)]
    task = words(query_groups={"same": labels})
    run, options = trajectory(task, RULES["SGD"], BatchOrder(6)), {"window": 3, "per": "token"}
    every = window_influence(task, run, **options)
    assert every["query"].values.tolist() == ["0", "1"]
    close(window_influence(task, run, queries=["1"], **options).value, every.value.sel(query=["1"]), 1e-12)
    with pytest.raises(ValueError, match="no group is called .'nobody'.; there are"):
        window_influence(task, run, queries=["nobody"], **options)


def words(lengths=(5, 3, 4, 5, 2, 5), weights=True, dtype=torch.float64, objective="tokens", **fields):
    """Sequences that are padded by collate to the longest of a batch, and a model that reads them word by word."""
    generator = torch.Generator().manual_seed(0)
    data = [torch.randint(1, 7, (length,), generator=generator) for length in lengths]
    model = nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 7)).to(dtype)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=dtype)

    def loss(model, batch):
        losses = nn.functional.cross_entropy(model(batch[:, :-1]).mT, batch[:, 1:], reduction="none")
        return (losses, (batch[:, 1:] > 0).to(losses)) if weights else losses

    def collate(rows):
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    return Task(model, loss, train=data, queries={"same": data}, collate=collate, objective=objective, **fields)


def test_tokens_add_up_to_their_samples_and_padding_is_no_token():
    lengths = (5, 3, 4, 5, 2, 5)
    task, order = words(lengths), BatchOrder(6, 3, seed=1)
    run = trajectory(task, RULES["AdamW"], order)
    tokens = window_influence(task, run, window=6, order=order, per="token")
    samples = window_influence(task, run, window=6, order=order, per="sample")
    expected = [f"{k}/{t}" for k, length in enumerate(lengths) for t in range(length - 1)]
    assert tokens.train.values.tolist() == expected
    owner = [int(label.split("/")[0]) for label in expected]
    summed = [tokens.value[0].values[np.array(owner) == k].sum(0) for k in range(6)]
    close(np.array(summed), samples.value[0].values, 1e-12)


def test_classes_of_tokens_are_what_retraining_with_their_weight_measures():
    task, order = words(), BatchOrder(6, 3, seed=1)
    run = trajectory(task, RULES["Adam, decay"], order)
    classes = [["odd" if t % 2 else "even" for t in range(4)] for _ in range(6)]
    options = {"window": 6, "order": order, "groups": classes}
    reverse, forward = both_modes(task, run, **options)
    close(reverse.value, forward.value, 1e-12)
    close(reverse.value, central_differences(task, run, **options), 1e-6)


def test_labels_of_tokens_that_cannot_be_theirs_are_refused():
    task = words()
    run = trajectory(task, RULES["SGD"], BatchOrder(6))
    with pytest.raises(ValueError, match=r"labels of 3 tokens in a sample, but the loss returns 4 losses"):
        window_influence(task, run, window=2, groups=[["a"] * 3] * 6)
    with pytest.raises(ValueError, match=r"labels of 5 tokens in a sample, but the loss returns 4 losses for sample 0"):
        window_influence(task, run, window=2, groups=[["a"] * 5] * 6)
    points = classifier()
    with pytest.raises(ValueError, match="one loss per sample"):
        window_influence(points, trajectory(points, RULES["SGD"], BatchOrder(60)), window=2, groups=[["a"] * 4] * 60)
    with pytest.raises(ValueError, match=r"returns \(batch, tokens\)"):
        window_influence(points, trajectory(points, RULES["SGD"], BatchOrder(60)), window=2, per="token")


def test_fresh_batches_have_an_error_over_orders_and_one_fresh_order_has_none():
    task = classifier()
    run = trajectory(task, replace(RULES["SGD"], batch_size=16), ORDERS["minibatches"])
    four = window_influence(task, run, window=WINDOW)
    each = [window_influence(task, run, window=WINDOW, repeats=k) for k in (1, 2)]
    assert four.attrs["repeats"] == 4
    assert np.isfinite(four.stderr).all()
    assert (four.stderr > 0).all()
    assert each[0].stderr.isnull().all()
    second = 2 * each[1].value - each[0].value  # the first two orders are those of the measurement
    close(each[1].stderr, abs(second - each[0].value) / 2, 1e-9)
    measured = window_ablation(task, run, window=WINDOW, repeats=2, weight=0.999)
    close(predicted_effect(each[1], 0.999).effect, measured.effect, 5e-3)


def test_float32_is_float64_to_its_own_precision():
    wide = classifier()
    run = trajectory(wide, RULES["Adam, decay"], ORDERS["full batch"])
    data = [
        tuple(t.float() if t.is_floating_point() else t for t in samples.batch(slice(None)))
        for samples in (wide.train, wide.queries["val"])
    ]
    narrow = Task(
        MODELS["layers"](), wide.loss, train=data[0], queries={"val": data[1]}, train_groups=wide.train_groups
    )
    checkpoint = run.load(START)
    params = {name: tensor.float() for name, tensor in checkpoint.params.items()}
    got = window_influence(narrow, Trajectory.from_checkpoints([replace(checkpoint, params=params)]), window=WINDOW)
    expected = window_influence(wide, run, window=WINDOW).value.mean("query")
    close(got.value[..., 0], expected, 1e-4)


def test_the_users_model_is_the_same_afterwards():
    task, order = classifier(), ORDERS["full batch"]
    before = {name: (tensor, tensor.clone()) for name, tensor in task.model.named_parameters()}
    run = trajectory(task, RULES["Adam, decay"], order)
    with torch.no_grad():
        window_influence(task, run, window=2)
    for name, tensor in task.model.named_parameters():
        assert tensor is before[name][0]
        assert torch.equal(tensor, before[name][1])
        assert tensor.grad is None


def test_a_checkpoint_that_cannot_be_used_is_left_out_with_its_reason_and_counted():
    task, calls = classifier(), []
    good = trajectory(task, RULES["SGD"], BatchOrder(60)).load(START)
    bare = Checkpoint(20, good.params)
    run = Trajectory.from_checkpoints([good, bare])
    got = window_influence(task, run, window=2, progress=lambda *at: calls.append(at))
    assert got.step.values.tolist() == [START]
    assert "which optimizer" in json.loads(got.attrs["omitted"])["20"]
    assert calls == [(1, 2), (2, 2)]


def rough(model, batch):
    """Its slope changes sign many times over a change of a per cent."""
    return 1e-4 * torch.sin(2e4 * model(batch[0])[:, 0]) + (model(batch[0])[:, 0] - batch[0][:, 0]) ** 2


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_a_derivative_that_changes_of_some_per_cent_do_not_follow_says_so_and_another_that_it_is_right(mode):
    task, order = classifier(), ORDERS["minibatches"]
    run, options = trajectory(task, RULES["Adam, decay"], order), {"window": WINDOW, "mode": mode, "check": True}
    found = window_influence(task, run, order=order, **options)
    assert 0 < found.miss.item() < 0.02
    few = window_influence(task, run, order=order, queries=[str(found["query"].values[1])], **options)
    assert 0 < few.miss.item() < 0.05
    x = torch.randn(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hard = Task(nn.Linear(2, 1).double(), rough, train=(x,), queries={"q": (x + 1,)}, train_groups=list("aabbccddeeff"))
    start = Checkpoint(0, hard.state(), Optimizer("sgd", 0.05, batch_size=0))
    assert window_influence(hard, Trajectory.from_checkpoints([start]), **options).miss.item() > 0.1


def test_requests_that_exclude_one_another_are_refused():
    task = classifier()
    run = trajectory(task, RULES["SGD"], BatchOrder(60))
    with pytest.raises(ValueError, match="per='sample' every sample"):
        window_influence(task, run, window=2, per="sample", groups=range(60))
    with pytest.raises(ValueError, match="one derivative per train group"):
        window_influence(task, run, window=2, per="sample", mode="forward")
    with pytest.raises(ValueError, match="window >= 1"):
        window_influence(task, run, window=0)
    with pytest.raises(ValueError, match="no change that is made"):
        window_influence(task, run, window=2, expected=True, check=True)


def test_the_cheaper_mode_is_taken_and_named():
    task = classifier()
    run = trajectory(task, RULES["SGD"], BatchOrder(60))
    assert window_influence(task, run, window=1, groups=["one"] * 60).attrs["mode"] == "forward"
    assert window_influence(task, run, window=1, groups=range(60)).attrs["mode"] == "reverse"
