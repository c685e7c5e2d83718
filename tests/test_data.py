"""Data are what the user means: every form that training code takes gives the batches that it would give there."""

from collections import UserDict, namedtuple
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
)

from stagewise.check import check
from stagewise.checkpoint import Checkpoint
from stagewise.data import Samples
from stagewise.sampling import Chains, LocalPosterior, sample_block
from stagewise.task import Task

N = 6
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % 3
Pair = namedtuple("Pair", ["x", "y"])


class Pairs(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, index):
        return X[index], int(Y[index])


class Scaled(TensorDataset):
    """With a transformation of its own."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x / 50, y


class Table:
    """As those of the Hugging Face hub: by row a dict of plain values, by name a column."""

    def __init__(self):
        self.column_names = ["x", "y", "text"]

    def __len__(self):
        return N

    def __getitem__(self, key):
        if isinstance(key, str):
            raise KeyError(key)
        return {"x": X[key].tolist(), "y": int(Y[key]), "text": f"sample {key}"}


class Encoding(UserDict):
    """As a tokenizer returns it: it holds columns, knows how to move, and is no dict."""

    def to(self, device):
        return Encoding({key: value.to(device) for key, value in self.data.items()})


def rows(batch):
    """Values of x and y of a batch, whatever its form."""
    first, second = (batch["x"], batch["y"]) if hasattr(batch, "keys") else (batch[0], batch[1])
    return torch.as_tensor(first).float(), torch.as_tensor(second)


FORMS = {
    "a tuple of tensors": (X, Y),
    "a list of tensors": [X, Y],
    "arrays": (X.numpy(), Y.numpy()),
    "a dict of tensors": {"x": X, "y": Y},
    "a dict of arrays": {"x": X.numpy(), "y": Y.numpy()},
    "a named tuple of tensors": Pair(X, Y),
    "an encoding": Encoding({"x": X, "y": Y}),
    "a TensorDataset": TensorDataset(X, Y),
    "a map-style dataset": Pairs(),
    "a subset": Subset(TensorDataset(torch.cat([X + 1, X]), torch.cat([Y, Y])), range(N, 2 * N)),
    "two datasets as one": ConcatDataset([TensorDataset(X[:4], Y[:4]), TensorDataset(X[4:], Y[4:])]),
    "a list of tuples": [(x, y) for x, y in zip(X, Y, strict=True)],
    "a list of tuples with plain labels": [(x, int(y)) for x, y in zip(X, Y, strict=True)],
    "a tuple of tuples": tuple((x, int(y)) for x, y in zip(X, Y, strict=True)),
    "a list of lists": [[x, int(y)] for x, y in zip(X, Y, strict=True)],
    "a list of dicts": [{"x": x, "y": y} for x, y in zip(X, Y, strict=True)],
    "a list of dicts with plain labels": [{"x": x, "y": int(y)} for x, y in zip(X, Y, strict=True)],
    "a list of arrays in tuples": [(x.numpy(), y.numpy()) for x, y in zip(X, Y, strict=True)],
    "a list of named tuples": [Pair(x, int(y)) for x, y in zip(X, Y, strict=True)],
    "a list of encodings": [Encoding({"x": x, "y": y}) for x, y in zip(X, Y, strict=True)],
    "a dict with a list of labels": {"x": X, "y": Y.tolist()},
    "a tuple with a list of labels": (X, Y.tolist()),
    "samples already": Samples((X, Y)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_its_samples_one_by_one_and_in_any_order(form):
    samples = Samples(FORMS[form])
    assert len(samples) == N
    for index in (torch.tensor([4, 0, 4]), torch.tensor([5]), slice(1, 3), slice(None)):
        x, y = rows(samples.batch(index))
        torch.testing.assert_close(x, X[index], rtol=0, atol=0)
        assert torch.equal(y, Y[index])
    x, y = rows(samples.subset(torch.tensor([5, 2])).batch(slice(0, 2)))
    assert torch.equal(y, Y[[5, 2]])


@pytest.mark.parametrize("form", ["an encoding", "a list of encodings", "a list of named tuples", "a dict of arrays"])
def test_a_loss_meets_the_container_that_training_gave_it(form):
    batch = Samples(FORMS[form]).batch(slice(0, 2))
    if "named" in form:
        assert isinstance(batch, Pair)
        assert torch.equal(batch.y, Y[:2])
    else:
        assert torch.equal(batch["y"], Y[:2])


def test_tables_of_plain_values_need_no_more_than_training_code_does():
    samples = Samples(
        Table(), collate=lambda items: {"x": torch.tensor([i["x"] for i in items]), "text": [i["text"] for i in items]}
    )
    batch = samples.batch(torch.tensor([3, 1]))
    torch.testing.assert_close(batch["x"], X[[3, 1]])
    assert batch["text"] == ["sample 3", "sample 1"]


def test_a_subclass_of_tensor_dataset_is_asked_for_its_items():
    data = Scaled(50 * X, Y)
    samples = Samples(data)
    torch.testing.assert_close(samples.batch(slice(None))[0], default_collate([data[i] for i in range(N)])[0])
    assert samples.digest != Samples(TensorDataset(50 * X, Y)).digest


def test_pairs_of_equal_shape_are_samples_and_not_columns():
    pairs = [(torch.randn(4), torch.randn(4)) for _ in range(10)]
    assert len(Samples(pairs)) == 10
    assert [part.shape for part in Samples(pairs).batch(slice(0, 3))] == [(3, 4), (3, 4)]
    triples = [(torch.randn(3), torch.randn(3), torch.randn(3)) for _ in range(3)]  # as many samples as fields
    assert torch.equal(Samples(triples).batch(torch.tensor([1]))[2][0], triples[1][2])


def test_a_list_of_tuples_of_numbers_is_a_list_of_samples():
    numbers = [(0.5 * i, i % 2) for i in range(5)]
    x, y = Samples(numbers).batch(torch.tensor([4, 1]))
    assert x.tolist() == [2.0, 0.5]
    assert y.tolist() == [0, 1]


def test_one_tensor_is_one_column():
    assert torch.equal(Samples(X).batch(torch.tensor([2, 0])), X[[2, 0]])
    assert Samples(np.arange(4.0)).batch(slice(1, 3)).tolist() == [1.0, 2.0]


def test_nested_columns_are_cut_together():
    data = {"inputs": {"ids": X, "more": (X + 1, X + 2)}, "y": Y}
    batch = Samples(data).batch(torch.tensor([3]))
    assert torch.equal(batch["inputs"]["more"][1], X[[3]] + 2)
    assert torch.equal(batch["y"], Y[[3]])


def test_texts_pass_to_the_loss():
    items = [{"x": x, "text": f"sample {i}"} for i, x in enumerate(X)]
    assert Samples(items).batch(torch.tensor([4, 2]))["text"] == ["sample 4", "sample 2"]
    columns = {"x": X, "text": [f"sample {i}" for i in range(N)]}
    assert Samples(columns).batch(torch.tensor([4, 2]))["text"] == ["sample 4", "sample 2"]
    words = {"x": X, "text": np.array([f"sample {i}" for i in range(N)])}
    assert list(Samples(words).batch(torch.tensor([4, 2]))["text"]) == ["sample 4", "sample 2"]


def ragged():
    random = torch.Generator().manual_seed(0)
    return [torch.randint(1, 9, (length,), generator=random) for length in (3, 7, 2, 5, 4)]


def padded(items):
    return pad_sequence(items, batch_first=True)


def test_ragged_samples_work_through_collate_and_only_there():
    sequences = ragged()
    with pytest.raises(
        ValueError, match=r"train: 2 samples cannot be made into one batch .*pass Task\(collate=\.\.\.\)"
    ):
        Samples([(s, 1) for s in sequences], "train").batch(slice(0, 2))
    samples = Samples([(s,) for s in sequences], collate=lambda items: padded([item[0] for item in items]))
    assert samples.batch(torch.tensor([2, 1])).shape == (2, 7)
    assert torch.equal(samples.batch(torch.tensor([2]))[0], sequences[2])


def test_a_list_of_tensors_of_unequal_length_is_a_list_of_samples_where_collate_is_given():
    sequences = ragged()
    samples = Samples(sequences, collate=padded)
    assert len(samples) == 5
    assert samples.batch(torch.tensor([0, 2])).shape == (2, 3)


def test_collate_is_honoured_for_columns_too():
    seen = []

    def collate(items):
        seen.append(len(items))
        return default_collate(items)

    samples = Samples((X, Y), collate=collate)
    assert torch.equal(samples.batch(torch.tensor([3, 1]))[0], X[[3, 1]])
    assert seen == [2]


def test_collate_of_a_task_serves_all_its_data_sets():
    sequences = [(s,) for s in ragged()]

    def loss(model, batch):
        return model.weight[batch].mean((1, 2))

    task = Task(
        nn.Embedding(9, 2),
        loss,
        train=sequences,
        queries={"q": sequences[:2]},
        collate=lambda items: padded([item[0] for item in items]),
    )
    assert task.queries["q"].batch(slice(0, 2)).shape == (2, 7)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            (X, Y[:5]),
            r"disagree on the number of samples, got first axes of \[5, 6\].*A list of samples is a list of tuples",
        ),
        ({"x": X, "y": Y.tolist()[:5]}, r"columns disagree on the number of samples, got lengths of \[5, 6\]"),
        ((X[:0], Y[:0]), "holds no samples"),
        ([], "holds no samples"),
        ((X, torch.tensor(1.0)), r"got first axes of \[0, 6\]"),
        (iter([1, 2]), "expected a map-style dataset, a list of samples, or a tuple, list or dict of tensors, got"),
        ("text", "got str"),
        (7, "got int"),
        (
            DataLoader(TensorDataset(X, Y)),
            r"got DataLoader, which cannot be asked for sample i.*its \.dataset.*collate_fn",
        ),
    ],
)
def test_what_cannot_be_addressed_by_sample_is_refused_by_name_and_with_the_way_out(data, message):
    with pytest.raises(ValueError, match=message) as error:
        Samples(data, "queries['val']")
    assert str(error.value).startswith("queries['val']: ")


def test_streams_and_data_frames_are_refused_with_the_way_out():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from zip(X, Y, strict=True)

        def __len__(self):
            return N

    with pytest.raises(ValueError, match="got Stream, which cannot be asked for sample i; pass a map-style dataset"):
        Samples(Stream(), "train")
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"x": [1.0, 2.0], "y": [0, 1]})
    with pytest.raises(ValueError, match=r"train: got DataFrame.*to_numpy\(\)"):
        Samples(frame, "train")


def test_a_sample_that_cannot_be_read_is_named():
    class Broken(Pairs):
        def __getitem__(self, index):
            if index == 4:
                raise OSError("no such file")
            return super().__getitem__(index)

    with pytest.raises(ValueError, match=r"train: sample 4 cannot be read \(OSError: no such file\)"):
        Samples(Broken(), "train").batch(slice(None))


@pytest.mark.parametrize("random_from", [0, 4])
@pytest.mark.parametrize("where", ["dataset", "collate"])
def test_data_that_differ_each_time_they_are_read_are_refused(random_from, where):
    class Noisy(Pairs):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x + torch.randn(3) * (index >= random_from), y

    def collate(items):
        x, y = default_collate(items)
        return x + torch.randn_like(x), y

    samples = Samples(Noisy(), "train") if where == "dataset" else Samples(Pairs(), "train", collate)
    with pytest.raises(
        ValueError, match=r"train: sample \d is another one each time it is read; switch off random aug"
    ):
        samples.check_steady()
    Samples(Pairs()).check_steady()
    Samples((X, Y)).check_steady()


@pytest.mark.parametrize(
    "other",
    [
        pytest.param((X + 1e-6, Y), id="one bit of a value"),
        pytest.param((X.double(), Y), id="type"),
        pytest.param((X[:5], Y[:5]), id="length"),
        pytest.param((X.flip(0), Y.flip(0)), id="order"),
        pytest.param((X.reshape(N, 3, 1), Y), id="shape"),
        pytest.param((Y, X), id="fields the other way round"),
        pytest.param({"x": X, "y": Y}, id="names"),
        pytest.param([(x, int(y), "text") for x, y in zip(X, Y, strict=True)], id="a text more"),
    ],
)
def test_the_digest_sees_every_difference(other):
    assert Samples(other).digest != Samples((X, Y)).digest


def test_the_digest_sees_texts_and_numbers_beside_tensors():
    def digest(**fields):
        return Samples([{"x": x, **fields} for x in X]).digest

    assert len({digest(t="a"), digest(t="b"), digest(t=1), digest(t=1.5), digest(t=True), digest(t=2)}) == 6


class Tree:
    """A sample's field that is no tensor, text or number."""

    def __init__(self, value, parent=None):
        self.value, self.parent = value, parent or self


@pytest.mark.parametrize(
    "field",
    [
        pytest.param(Tree, id="object"),
        pytest.param(lambda k: Tree(Tree(torch.tensor(k))), id="object in an object"),
        pytest.param(lambda k: {"a", "b", f"word {k}"}, id="set"),
        pytest.param(lambda k: np.array(["a", f"word {k}"], dtype=object), id="array of objects"),
        pytest.param(lambda k: Path(f"/data/{k}.png"), id="path"),
        pytest.param(lambda k: date(2024, 1, 1 + k), id="date"),
        pytest.param(lambda k: {"deep": [("er", k)]}, id="containers"),
    ],
)
def test_data_that_differ_in_a_field_of_any_kind_are_not_taken_for_equal(field):
    def samples(k):
        return Samples([{"x": torch.zeros(2), "field": field(k)} for _ in range(3)], collate=lambda items: items)

    assert samples(1).digest == samples(1).digest
    assert samples(1).digest != samples(2).digest


def test_the_digest_does_not_depend_on_what_carries_the_data():
    expected = Samples((X, Y)).digest
    for form in (
        "a list of tensors",
        "arrays",
        "a TensorDataset",
        "a map-style dataset",
        "a subset",
        "a list of tuples",
    ):
        assert Samples(FORMS[form]).digest == expected, form
    assert Samples(X.T.contiguous().T).digest == Samples(X).digest
    shuffled = Samples((X, Y)).subset(torch.tensor([2, 0]))
    assert shuffled.digest == Samples((X[[2, 0]], Y[[2, 0]])).digest
    assert shuffled.subset(torch.tensor([1])).digest == Samples((X[:1], Y[:1])).digest


def test_a_loss_that_works_in_place_does_not_change_the_users_data():
    before = X.clone()

    def loss(model, batch):
        return model(batch[0].mul_(0.5)).square().mean(1)

    task = Task(nn.Linear(3, 2), loss, train=(X,), queries={"q": TensorDataset(X)})
    for data in (task.train, task.queries["q"]):
        task.losses({}, data.batch(slice(None)))
        task.losses({}, data.batch(torch.tensor([1, 2])))
    assert torch.equal(X, before)


def test_the_task_says_what_it_understood():
    images = torch.zeros(1200, 8, 8)
    labels = torch.zeros(1200, dtype=torch.long)
    task = Task(
        nn.Linear(64, 2),
        lambda m, b: m(b["image"].flatten(1))[:, 0],
        train={"image": images, "label": labels},
        queries={"val": [{"image": image, "name": "a"} for image in images[:3]]},
        candidates=range(10),
        objective="tokens",
    )
    assert repr(task).splitlines() == [
        "Task(",
        "  train: 1,200 samples, fields image (8, 8) float32, label () int64",
        "  candidates: 10 of them",
        "  queries['val']: 3 samples, fields image (8, 8) float32, name/0 str",
        "  model: Linear, 130 trainable parameters",
        "  objective: mean over tokens",
        ")",
    ]


@pytest.mark.parametrize("sampling", [{}, {"batch_size": 4}, {"batch_size": 4, "control_variate": False}])
@pytest.mark.parametrize("form", ["texts", "ragged", "encodings"])
def test_chains_run_on_data_that_are_not_tensors_alone(sampling, form):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(12, 3, generator=random)
    collate = None
    if form == "encodings":
        data = Encoding({"x": x, "y": torch.arange(12) % 2})
    elif form == "texts":
        data = [{"x": row, "y": i % 2, "text": f"sample {i}"} for i, row in enumerate(x)]
    else:
        data = [{"x": row[: 1 + i % 3], "y": i % 2} for i, row in enumerate(x)]

        def collate(items):
            return {"x": padded([i["x"] for i in items]), "y": torch.tensor([i["y"] for i in items])}

    def loss(model, batch):
        logits = batch["x"] @ model.weight.T[: batch["x"].shape[1]] + model.bias
        return nn.functional.cross_entropy(logits, batch["y"], reduction="none")

    task = Task(nn.Linear(3, 2), loss, train=data, queries={"q": data}, collate=collate)
    settings = Chains(chains=3, draws=3, burn_in=2, thinning=1, **sampling)
    tree = sample_block(task, Checkpoint(0, task.state()), LocalPosterior(gamma=1e3), settings)
    assert (tree["chains"]["status"] == "ok").all()
    assert tree["train"].sizes["sample"] == 12
    assert tree["queries/q"].attrs["is_training_set"]
    check(task, Checkpoint(0, task.state()), curvature=True)


def test_a_list_that_comes_with_collate_is_one_of_samples_also_where_all_are_of_one_length():
    rows = [torch.arange(4) + 10 * k for k in range(3)]
    samples = Samples(rows, collate=torch.stack)
    assert len(samples) == 3
    assert samples.batch(torch.tensor([2, 0])).tolist() == [rows[2].tolist(), rows[0].tolist()]
    assert len(Samples(tuple(rows))) == 4  # columns
