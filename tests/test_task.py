import linecache
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from stagewise.checkpoint import Checkpoint, CheckpointError, Optimizer, ParameterGroup, tensors_digest
from stagewise.identity import identity
from stagewise.task import Losses, Task

RANDOM = torch.Generator().manual_seed(0)
X, Y = torch.randn(6, 3, generator=RANDOM), torch.tensor([0, 1, 0, 1, 1, 0])


def cross_entropy(model, batch):
    x, y = batch
    return functional.cross_entropy(model(x), y, reduction="none")


def task(loss=cross_entropy, model=None, train=(X, Y), **more):
    model = nn.Linear(3, 2) if model is None else model
    return Task(model, loss, train=train, **{"queries": {"val": (X[:2], Y[:2])}} | more)


class TestLosses:
    """Losses are a pure function of the parameters."""

    def test_losses_at_given_parameters_are_those_of_a_model_that_has_them(self):
        studied = task()
        params = {name: tensor + 1 for name, tensor in studied.state().items()}
        other = nn.Linear(3, 2)
        other.load_state_dict(params)
        torch.testing.assert_close(studied.losses(params, (X, Y)), cross_entropy(other, (X, Y)))

    def test_parameters_left_out_keep_the_models_own_value(self):
        studied = task()
        torch.testing.assert_close(studied.losses({}, (X, Y)), cross_entropy(studied.model, (X, Y)))

    def test_state_holds_buffers_and_needs_no_gradient(self):
        state = task(model=nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()).state()
        assert {"0.weight", "1.weight", "1.running_mean"} <= set(state)
        assert not any(tensor.requires_grad for tensor in state.values())


class TestLabels:
    """Groups are labels, one per sample."""

    def test_labels_of_any_type_become_text(self):
        studied = task(train_groups=Y, query_groups={"val": ["dog", "cat"]})
        assert studied.train_groups.tolist() == ["0", "1", "0", "1", "1", "0"]
        assert studied.query_groups["val"].tolist() == ["dog", "cat"]
        assert task().query_groups == {"val": None}

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"train_groups": [1, 2]}, r"train_groups: expected one label for each of 6 samples, got shape \(2,\)"),
            ({"query_groups": {"test": [1, 2]}}, r"query_groups names \['test'\], but the queries are \['val'\]"),
            ({"query_groups": {"val": [1]}}, r"query_groups\['val'\]: expected one label for each of 2"),
            ({"queries": {}}, "name at least one data set whose loss is studied.*got none"),
        ],
    )
    def test_labels_that_do_not_fit_are_refused(self, settings, message):
        with pytest.raises(ValueError, match=message):
            task(**settings)


def padded(model, batch):
    """Token losses of sequences of unequal length, and weights of a prompt and of padding."""
    x, weights = batch
    return (x @ model.weight.T).square().sum(-1), weights


TOKENS = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(1))
WEIGHTS = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 2.0, 1.0], [0.0, 0.0, 0.0]])


class TestWeights:
    """The loss of a sample, and its weight in what training minimised."""

    def test_a_samples_loss_is_the_weighted_mean_over_its_tokens_whatever_the_objective(self):
        for objective, expected in (("samples", [1.0, 1.0, 1.0, 0.0]), ("tokens", [3.0, 1.0, 3.0, 0.0])):
            studied = task(padded, train=(TOKENS, WEIGHTS), queries={"q": (TOKENS, WEIGHTS)}, objective=objective)
            values, weights = studied.sample_losses({}, (TOKENS, WEIGHTS))
            tokens = padded(studied.model, (TOKENS, WEIGHTS))[0]
            by_hand = (tokens * WEIGHTS).sum(1) / torch.tensor([3.0, 1.0, 3.0, 1.0])
            torch.testing.assert_close(values, by_hand)
            assert weights.tolist() == expected

    def test_the_objective_is_that_of_a_trainer_which_averages_over_tokens_or_over_samples(self):
        tokens = padded(task().model, (TOKENS, WEIGHTS))[0].detach()
        flat = (tokens * WEIGHTS).sum() / WEIGHTS.sum()
        by_sample = ((tokens * WEIGHTS).sum(1)[:3] / WEIGHTS.sum(1)[:3]).mean()
        for objective, expected in (("tokens", flat), ("samples", by_sample)):
            studied = task(padded, train=(TOKENS, WEIGHTS), queries={"q": (TOKENS, WEIGHTS)}, objective=objective)
            values, weights = studied.by_sample(Losses(tokens, WEIGHTS))
            torch.testing.assert_close((weights * values).sum() / weights.sum(), expected)
            shares = studied.shares(Losses(tokens, WEIGHTS))
            torch.testing.assert_close((shares * tokens).sum() / shares.sum(), expected)

    def test_tokens_without_weights_count_alike(self):
        plain = task(objective="tokens").by_sample(Losses(torch.tensor([[1.0, 3.0], [0.0, 5.0]])))
        assert plain[0].tolist() == [2.0, 2.5]
        assert plain[1].tolist() == [2.0, 2.0]
        assert task().by_sample(Losses(torch.tensor([1.0, 3.0])))[1].tolist() == [1.0, 1.0]

    def test_a_loss_without_weight_may_be_anything(self):
        nan = torch.where(WEIGHTS > 0, TOKENS[..., 0], torch.nan)
        studied = task(lambda m, b: (nan + 0 * m.weight.sum(), WEIGHTS))
        values, _ = studied.weighted_losses({}, None)
        assert values.isfinite().all()
        gradient = torch.autograd.grad(
            studied.sample_losses({"weight": (w := torch.ones(2, 3, requires_grad=True))}, None)[0].sum(), w
        )[0]
        assert gradient.isfinite().all()

    def test_weights_may_be_integers_and_never_carry_a_gradient(self):
        studied = task(lambda m, b: (cross_entropy(m, b), b[1]))
        values, weights = studied.weighted_losses({}, (X, Y))
        assert weights.dtype == values.dtype
        assert not weights.requires_grad


class TestCandidates:
    def test_indices_and_masks_name_the_same_samples_in_ascending_order(self):
        for given in ([4, 1], torch.tensor([1, 4]), [False, True, False, False, True, False]):
            studied = task(candidates=given)
            assert studied.candidates.tolist() == [1, 4]
            assert torch.equal(studied.candidate_samples.batch(slice(None))[1], Y[[1, 4]])
        assert task().candidates.tolist() == list(range(6))

    @pytest.mark.parametrize(
        ("candidates", "message"),
        [
            ([0, 6], r"expected indices from 0 to 5, got \[6\]"),
            ([-1], r"got \[-1\]"),
            ([True, False], r"a mask needs one entry for each of 6 samples, got \(2,\)"),
            ([], "expected indices from 0 to 5"),
            ([0.5], "torch.float32"),
            ([1, 1], "named once only"),
        ],
    )
    def test_candidates_that_name_no_samples_are_refused(self, candidates, message):
        with pytest.raises(ValueError, match=message):
            task(candidates=candidates)


def test_settings_without_a_meaning_are_refused():
    for settings, message in (
        ({"objective": "mean"}, "objective must be 'samples' or 'tokens', got 'mean'"),
        ({"forward_batch": 0}, "forward_batch must be at least 1, got 0"),
        ({"queries": [(X, Y)]}, "name at least one data set.*got list"),
        ({"queries": {" ": (X, Y)}}, "a query set cannot be called ' '"),
        ({"query_losses": {"test": cross_entropy}}, r"query_losses names \['test'\], but the queries are \['val'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            task(**settings)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.lm_head = nn.Linear(3, 3, bias=False)
        self.lm_head.weight = self.wte.weight
        self.register_buffer("places", torch.arange(3.0), persistent=False)

    def forward(self, x):
        return self.lm_head(self.norm(self.wte(x)) + self.places)


def tied():
    torch.manual_seed(0)
    return task(model=Tied().eval(), train=(Y, Y), queries={"val": (Y, Y)})


def whole():
    return {name: tensor + 1 for name, tensor in tied().model.state_dict().items()}


def without(*names):
    return {name: tensor for name, tensor in whole().items() if name not in names}


def prefixed(prefix, names=None):
    return {prefix + name: tensor for name, tensor in (names or whole()).items()}


def inside(state):
    """A wrapper around a part of the model, as fully sharded training leaves it."""
    return {name.replace("norm.", "norm._orig_mod."): tensor for name, tensor in state.items()}


class TestFitted:
    """A checkpoint as the model needs it: every name that is meant is understood, what is missing is named."""

    @pytest.mark.parametrize(
        "params",
        [
            pytest.param(whole(), id="state_dict"),
            pytest.param({n: t.clone() for n, t in whole().items()}, id="clones"),
            pytest.param(without("wte.weight"), id="the alphabetically first name"),
            pytest.param(without("lm_head.weight"), id="the other name"),
            pytest.param(prefixed("module."), id="data parallel"),
            pytest.param(prefixed("_orig_mod."), id="compiled"),
            pytest.param(prefixed("_orig_mod.module."), id="both"),
            pytest.param(prefixed("module._orig_mod."), id="both the other way round"),
            pytest.param(inside(whole()), id="a compiled part"),
            pytest.param(
                {n: t.double().float() for n, t in whole().items() if t.is_floating_point()}
                | {"norm.num_batches_tracked": torch.tensor(1)},
                id="through float64",
            ),
        ],
    )
    def test_every_way_of_saving_the_same_weights_is_the_same_checkpoint(self, params):
        studied = tied()
        fitted = studied.fitted(Checkpoint(5, params))
        expected = tied().model
        expected.load_state_dict(whole())
        assert set(fitted.params) == set(studied.pure.state)
        torch.testing.assert_close(studied.losses(fitted.params, (Y, Y)), cross_entropy(expected, (Y, Y)))
        assert fitted.digest == studied.fitted(Checkpoint(5, whole())).digest

    @pytest.mark.parametrize(
        ("params", "message"),
        [
            (without("norm.running_mean"), r"step 5 lacks buffer 'norm.running_mean'.*model.state_dict\(\)"),
            (without("norm.running_mean", "norm.running_var"), "lacks buffer 'norm.running_mean', 'norm.running_var'"),
            (without("norm.weight"), "lacks parameter 'norm.weight'"),
            (without("wte.weight", "lm_head.weight"), "lacks parameter 'wte.weight'"),
            (whole() | {"more": torch.ones(1)}, "has 'more', which the model does not"),
            (prefixed("transformer."), "has 'transformer.wte.weight', .* and 4 more, which the model does not"),
            (whole() | {"norm.weight": torch.ones(4)}, r"'norm.weight' has shape \(4,\), the model expects \(3,\)"),
            (
                whole() | {"lm_head.weight": torch.zeros(3, 3)},
                "'wte.weight' and 'lm_head.weight' are one tensor of the",
            ),
            (
                whole() | {"norm.weight": torch.ones(3).double()},
                "'norm.weight' is torch.float64, the model's is torch.float32",
            ),
            ({}, "lacks parameter"),
        ],
    )
    def test_what_is_missing_unknown_or_different_is_named(self, params, message):
        with pytest.raises(CheckpointError, match=message) as error:
            tied().fitted(Checkpoint(5, params))
        assert "step 5" in str(error.value)

    def test_buffers_that_do_not_persist_come_from_the_model(self):
        assert tied().fitted(Checkpoint(5, whole())).params["places"].tolist() == [0.0, 1.0, 2.0]

    @pytest.mark.parametrize("model_type", [torch.float32, torch.bfloat16, torch.float64])
    def test_half_precision_weights_are_computed_with_in_at_least_float32(self, model_type):
        studied = task(model=nn.Linear(3, 2).to(model_type), train=(X.to(model_type), Y))
        half = {name: tensor.to(torch.bfloat16) for name, tensor in studied.state().items()}
        fitted = studied.fitted(Checkpoint(0, half))
        wanted = torch.promote_types(model_type, torch.float32)
        assert {tensor.dtype for tensor in fitted.params.values()} == {wanted}
        assert torch.equal(fitted.params["weight"], half["weight"].to(wanted))

    def test_what_the_optimiser_remembers_follows_the_names_of_the_model(self):
        group = ParameterGroup(("_orig_mod.lm_head.weight",), 0.2)
        moments = {"_orig_mod.lm_head.weight": torch.full((3, 3), 2.0), "_orig_mod.norm.weight": torch.ones(3)}
        checkpoint = Checkpoint(
            5,
            prefixed("_orig_mod."),
            Optimizer("adam", 0.1, groups=(group, ParameterGroup(("_orig_mod.norm.weight",), 0.1))),
            moments,
            moments,
            {"_orig_mod.lm_head.weight": 3},
        )
        fitted = tied().fitted(checkpoint)
        assert fitted.optimizer.updated == {"wte.weight", "norm.weight"}
        assert fitted.first_moment["wte.weight"].mean() == fitted.second_moment["wte.weight"].mean() == 2
        assert fitted.update_counts == {"wte.weight": 3}

    def test_neither_the_checkpoint_nor_the_model_is_changed(self):
        studied, checkpoint = tied(), Checkpoint(5, whole())
        before = {name: tensor.clone() for name, tensor in checkpoint.params.items()}
        studied.fitted(checkpoint)
        assert all(torch.equal(checkpoint.params[name], tensor) for name, tensor in before.items())
        assert set(checkpoint.params) == set(whole())


def weighted(model, batch, weight=1.0):
    return weight * cross_entropy(model, batch)


class TestIdentity:
    """What decides a number is part of its task's identity, part by part."""

    def changed(self, other):
        before, after = identity(task(weighted)), identity(other)
        return {part for part in before if before[part] != after.get(part)}

    def test_equal_tasks_have_equal_identities(self):
        assert self.changed(task(weighted)) == set()

    def test_each_change_names_its_part(self):
        assert self.changed(task(cross_entropy)) == {"loss"}
        assert self.changed(task(partial(weighted, weight=2.0))) == {"loss"}
        assert self.changed(task(weighted, model=nn.Linear(3, 2, bias=False))) == {"model"}
        assert self.changed(task(weighted, train=(X + 1, Y))) == {"training data"}
        assert self.changed(task(weighted, queries={"val": (X[:3], Y[:3])})) == {"query 'val'"}

    def test_loss_that_closes_over_a_number_is_told_apart(self):
        def scaled(by):
            return lambda model, batch: by * cross_entropy(model, batch)

        assert identity(task(scaled(1))) != identity(task(scaled(2)))

    def test_tensors_are_identified_by_name_and_content_not_order(self):
        assert tensors_digest({"a": X, "b": Y}) == tensors_digest({"b": Y, "a": X})
        assert tensors_digest({"a": X, "b": Y}) != tensors_digest({"b": X, "a": Y})


def test_texts_are_a_row_for_each_sample_of_any_length():
    rows = [["a", np.str_("b")], [], *[["c"]] * (len(X) - 2)]
    found = task(train_texts=rows).train_texts
    assert found == [["a", "b"], [], *[["c"]] * (len(X) - 2)]
    assert type(found[0][1]) is str
    with pytest.raises(ValueError, match=rf"a row of texts for each of {len(X)} samples, got 2 rows"):
        task(train_texts=[["a"], ["b"]])
    for wrong in (["a b"] * len(X), [["a", 3]] * len(X)):
        with pytest.raises(ValueError, match="train_texts: expected a row of texts for each sample"):
            task(train_texts=wrong)


def test_query_names_that_would_split_a_path_are_refused():
    data = (torch.zeros(3, 1), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"cannot be called 'a/b'"):
        Task(torch.nn.Linear(1, 2), lambda model, batch: model(batch[0])[:, 0], train=data, queries={"a/b": data})


class Inner(torch.nn.Linear):
    pass


class OtherInner(torch.nn.Linear):
    def forward(self, inputs):
        return 2 * super().forward(inputs)


OtherInner.__name__ = "Inner"  # the same printed model


def task_with(inner, loss=lambda model, batch: model(batch[0])[:, 0]):
    data = (torch.zeros(3, 2), torch.zeros(3))
    return Task(torch.nn.Sequential(inner(2, 1)), loss, train=data, queries={"val": data})


def test_a_change_inside_a_block_is_another_model():
    inner, other = identity(task_with(Inner)), identity(task_with(OtherInner))
    assert inner["model"] != other["model"]
    assert inner["loss"] == other["loss"]


def test_a_changed_helper_or_constant_of_the_loss_is_another_loss():
    source = (
        "{constant}\ndef helper(x):\n    return {body}\n"
        "def loss(model, batch):\n    return helper(model(batch[0])[:, 0]) * C\n"
    )
    digests = set()
    for number, (constant, body) in enumerate([("C = 1", "x"), ("C = 2", "x"), ("C = 1", "x**2"), ("C = 1", "x")]):
        text, file = source.format(constant=constant, body=body), f"<loss {number}>"
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        space = {"__name__": "losses"}
        exec(compile(text, file, "exec"), space)
        digests.add(identity(task_with(Inner, space["loss"]))["loss"])
    assert len(digests) == 3
