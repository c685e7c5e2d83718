import linecache
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

from stagewise.checkpoint import tensors_digest
from stagewise.task import Samples, Task

RANDOM = torch.Generator().manual_seed(0)
X, Y = torch.randn(6, 3, generator=RANDOM), torch.tensor([0, 1, 0, 1, 1, 0])


def cross_entropy(model, batch):
    x, y = batch
    return functional.cross_entropy(model(x), y, reduction="none")


def task(loss=cross_entropy, model=None, train=(X, Y), **more):
    model = nn.Linear(3, 2) if model is None else model
    return Task(model, loss, train=train, **{"queries": {"val": (X[:2], Y[:2])}} | more)


class Pairs(Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return X[index], Y[index]


class TestSamples:
    """Every kind of data that users have."""

    @pytest.mark.parametrize("data", [(X, Y), [X, Y], TensorDataset(X, Y), Pairs(), Samples((X, Y))])
    def test_equal_content_gives_equal_batches_and_digest_whatever_carries_it(self, data):
        samples = Samples(data)
        assert len(samples) == 6
        assert samples.digest == Samples((X.clone(), Y.clone())).digest
        for index in (torch.tensor([4, 0, 4]), slice(1, 3)):
            x, y = samples.batch(index)
            assert torch.equal(x, X[index])
            assert torch.equal(y, Y[index])

    def test_dicts_stay_dicts(self):
        batch = Samples({"x": X, "y": Y}).batch(torch.tensor([2]))
        assert torch.equal(batch["x"], X[[2]])
        assert torch.equal(batch["y"], Y[[2]])

    def test_numpy_arrays_are_tensors(self):
        assert torch.equal(Samples(X.numpy()).batch(slice(0, 2)), X[:2])

    def test_batches_are_all_samples_in_order(self):
        batches = Samples((X, Y)).batches(4)
        assert [len(x) for x, _ in batches] == [4, 2]
        assert torch.equal(torch.cat([x for x, _ in batches]), X)

    @pytest.mark.parametrize(
        "other",
        [
            pytest.param((X + 1e-6, Y), id="one bit of a value"),
            pytest.param((X.double(), Y), id="dtype"),
            pytest.param((X[:5], Y[:5]), id="length"),
            pytest.param((X.flip(0), Y.flip(0)), id="order"),
            pytest.param((X.reshape(6, 3, 1), Y), id="shape"),
        ],
    )
    def test_digest_sees_every_difference(self, other):
        assert Samples(other).digest != Samples((X, Y)).digest

    def test_digest_does_not_depend_on_memory_layout(self):
        assert Samples(X.T.contiguous().T).digest == Samples(X).digest

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ((X, Y[:5]), r"disagree on the number of samples, got first axes of \[5, 6\]"),
            ((X[:0], Y[:0]), "holds no samples"),
            (iter([1, 2]), "expected a map-style dataset or a tuple, list or dict of tensors"),
        ],
    )
    def test_data_that_has_no_samples_is_refused_by_name(self, data, message):
        with pytest.raises(ValueError, match=message) as error:
            Samples(data, "train")
        assert "train" in str(error.value)


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

    def test_losses_from_outputs_complete_outputs(self):
        studied = task()
        params = {name: tensor + 1 for name, tensor in studied.state().items()}
        outputs = studied.outputs(params, (X, Y))
        assert outputs.shape == (6, 2)
        torch.testing.assert_close(studied.losses_from_outputs(outputs, (X, Y)), studied.losses(params, (X, Y)))

    def test_outputs_need_a_loss_that_calls_the_model_once(self):
        studied = task(lambda model, b: cross_entropy(model, b) + model(b[0]).square().mean(-1))
        with pytest.raises(ValueError, match="calls the model once, got 2 calls"):
            studied.outputs(studied.state(), (X, Y))

    def test_state_holds_buffers_and_needs_no_gradient(self):
        state = task(model=nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()).state()
        assert {"0.weight", "1.weight", "1.running_mean"} <= set(state)
        assert not any(tensor.requires_grad for tensor in state.values())


def noisy(model, batch):
    return functional.cross_entropy(functional.dropout(model(batch[0]), training=True), batch[1], reduction="none")


def centred_by_the_batch(model, batch):
    losses = cross_entropy(model, batch)
    return losses - 0.5 * losses.mean()


def infinite_for_the_second(model, batch):
    return cross_entropy(model, batch) / (batch[0] != X[1]).any(1)


class TestCheck:
    """Losses that no estimator could use are refused before anything is computed."""

    @pytest.mark.parametrize(
        ("loss", "message"),
        [
            pytest.param(lambda m, b: cross_entropy(m, b).mean(), r"returned \(\) for a batch of 4", id="mean"),
            pytest.param(lambda m, b: cross_entropy(m, b).mean()[None], r"returned \(1,\)", id="mean of a batch"),
            pytest.param(lambda m, b: cross_entropy(m, b)[:, None, None], r"returned \(4, 1, 1\)", id="3 axes"),
            pytest.param(lambda m, b: cross_entropy(m, b).tolist(), "returned list", id="no tensor"),
            pytest.param(lambda m, b: cross_entropy(m, b).bfloat16(), "losses are torch.bfloat16", id="bf16"),
            pytest.param(infinite_for_the_second, "the loss of sample 1 is not finite", id="infinite"),
            pytest.param(noisy, "two evaluations of the same batch differ", id="dropout in the loss"),
            pytest.param(centred_by_the_batch, "depends on the rest of its batch", id="batch mean"),
        ],
    )
    def test_unusable_loss_is_refused_with_the_data_and_the_reason(self, loss, message):
        studied = task(loss)
        with pytest.raises(ValueError, match=message) as error:
            studied.check(studied.state())
        assert "train" in str(error.value)

    def test_query_losses_are_checked_too(self):
        nan = torch.full((3, 3), torch.nan)
        studied = task(queries={"good": (X, Y), "bad": (nan, Y[:3])})
        with pytest.raises(ValueError, match=r"queries\['bad'\]: the loss of sample 0 is not finite"):
            studied.check(studied.state())

    def test_batch_norm_that_uses_the_batch_is_refused(self):
        model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)).eval()
        studied = task(model=model)
        with pytest.raises(ValueError, match=r"depends on the rest of its batch|more than 1 value per channel"):
            studied.check(studied.state())

    @pytest.mark.parametrize(
        "model",
        [
            nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout()).eval(),
            nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)),
        ],
    )
    def test_model_in_eval_mode_passes(self, model):
        studied = task(model=model)
        studied.check(studied.state())

    def test_token_losses_pass(self):
        studied = task(lambda m, b: m(b[0]) ** 2)
        studied.check(studied.state())

    def test_data_of_one_sample_pass(self):
        studied = task(train=(X[:1], Y[:1]))
        studied.check(studied.state())

    @pytest.mark.parametrize("layer", [nn.Dropout(), nn.BatchNorm1d(2), nn.RReLU()])
    def test_layers_that_change_in_train_mode_are_refused_there(self, layer):
        with pytest.raises(ValueError, match=rf"train mode and contains {type(layer).__name__} \(1\)"):
            task(model=nn.Sequential(nn.Linear(3, 2), layer))


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
            ({"queries": {}}, "queries is empty"),
        ],
    )
    def test_labels_that_do_not_fit_are_refused(self, settings, message):
        with pytest.raises(ValueError, match=message):
            task(**settings)


def weighted(model, batch, weight=1.0):
    return weight * cross_entropy(model, batch)


class TestIdentity:
    """What decides a number is part of its task's identity, part by part."""

    def changed(self, other):
        before, after = task(weighted).identity(), other.identity()
        return {part for part in before if before[part] != after.get(part)}

    def test_equal_tasks_have_equal_identities(self):
        assert self.changed(task(weighted)) == set()

    def test_each_change_names_its_part(self):
        assert self.changed(task(cross_entropy)) == {"loss"}
        assert self.changed(task(partial(weighted, weight=2.0))) == {"loss"}
        assert self.changed(task(weighted, model=nn.Linear(3, 2, bias=False))) == {"model"}
        assert self.changed(task(weighted, train=(X[:5], Y[:5]))) == {"training data"}
        assert self.changed(task(weighted, queries={"val": (X[:3], Y[:3])})) == {"query 'val'"}

    def test_loss_that_closes_over_a_number_is_told_apart(self):
        def scaled(by):
            return lambda model, batch: by * cross_entropy(model, batch)

        assert task(scaled(1)).identity() != task(scaled(2)).identity()

    def test_tensors_are_identified_by_name_and_content_not_order(self):
        assert tensors_digest({"a": X, "b": Y}) == tensors_digest({"b": Y, "a": X})
        assert tensors_digest({"a": X, "b": Y}) != tensors_digest({"b": X, "a": Y})


def test_a_pair_of_arrays_is_one_data_set_and_not_two_samples():
    assert len(Samples((np.zeros((5, 2)), np.arange(5)))) == 5


def test_swapped_keys_are_other_data():
    first, second = torch.zeros(3), torch.ones(3)
    assert Samples({"x": first, "y": second}).digest != Samples({"y": first, "x": second}).digest


def test_scalars_are_refused_as_data():
    with pytest.raises(ValueError, match=r"first ax|no samples"):
        Samples((torch.zeros(3), torch.tensor(1.0)))


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
    inner, other = task_with(Inner).identity(), task_with(OtherInner).identity()
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
        digests.add(task_with(Inner, space["loss"]).identity()["loss"])
    assert len(digests) == 3
