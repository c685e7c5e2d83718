import pytest
import torch
from torch import nn

from stagewise.task import Task
from stagewise.vector import ParameterVector


class Tied(nn.Module):
    """Two names for one parameter, one that is not trained, and a buffer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(3, 2)
        self.head = nn.Linear(2, 3)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
        self.register_buffer("shift", torch.zeros(3))

    def forward(self, x):
        return self.scale * self.head(self.embedding(x)) + self.shift + self.frozen.sum()


def task():
    data = (torch.tensor([0, 1, 2]),)
    return Task(Tied(), lambda model, b: model(b[0]).sum(-1), train=data, queries={"val": data})


def test_all_trainable_parameters_move_by_default_each_once():
    vector = ParameterVector.of(task())
    assert vector.names == ("scale", "embedding.weight", "head.bias")
    assert vector.shapes == ((), (3, 2), (3,))
    assert vector.size == 10


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (("head.*",), ("head.bias",)),
        ((".*weight", "scale"), ("scale", "embedding.weight")),
        (("scale", ".*"), ("scale", "embedding.weight", "head.bias")),
    ],
)
def test_patterns_choose_by_full_name_in_the_order_of_the_model(patterns, names):
    assert ParameterVector.of(task(), patterns).names == names


@pytest.mark.parametrize("pattern", ["head", "weight", "frozen", "shift"])
def test_pattern_that_names_no_trainable_parameter_is_refused_with_those_there_are(pattern):
    with pytest.raises(ValueError, match=rf"matches '{pattern}'; there are \['embedding.weight', 'head.bias'"):
        ParameterVector.of(task(), ("scale", pattern))


def test_flatten_and_unflatten_are_inverse_for_any_leading_axes():
    vector = ParameterVector.of(task())
    flat = torch.randn(2, 4, vector.size, generator=torch.Generator().manual_seed(0))
    named = vector.unflatten(flat)
    assert {name: tuple(t.shape) for name, t in named.items()} == {
        "scale": (2, 4),
        "embedding.weight": (2, 4, 3, 2),
        "head.bias": (2, 4, 3),
    }
    one = {name: tensor[1, 3] for name, tensor in named.items()}
    assert torch.equal(vector.flatten(one), flat[1, 3])


def test_flatten_ignores_other_names_copies_and_follows_the_asked_dtype():
    vector = ParameterVector.of(task(), ("head.bias",))
    tensors = {"head.bias": torch.ones(3), "scale": torch.tensor(7.0)}
    flat = vector.flatten(tensors, like=torch.zeros(1, dtype=torch.float64))
    assert flat.dtype == torch.float64
    vector.flatten(tensors).zero_()
    assert torch.equal(tensors["head.bias"], torch.ones(3))


def test_tied_parameters_move_together():
    studied = task()
    vector = ParameterVector.of(studied)
    flat = vector.flatten(studied.state()) + 1
    moved = Tied()
    moved.load_state_dict(studied.model.state_dict())
    with torch.no_grad():
        for parameter in (moved.scale, moved.embedding.weight, moved.head.bias):
            parameter += 1
    batch = studied.train.batch(slice(None))
    losses = studied.losses(studied.state() | vector.unflatten(flat), batch)
    torch.testing.assert_close(losses, moved(batch[0]).sum(-1))


def test_fixed_is_everything_that_does_not_move():
    studied = task()
    fixed = ParameterVector.of(studied, ("head.bias",)).fixed(studied.state())
    assert set(fixed) == {"scale", "frozen", "embedding.weight", "shift"}
