"""Which layers act differently in train mode: each answer is held against what the layer does."""

import pytest
import torch
from torch import nn
from torch.nn.functional import dropout

from stagewise.layers import acting_in_train_mode


class Functional(nn.Module):
    """nanoGPT's way: a probability and ``self.training``."""

    def __init__(self, dropout):
        super().__init__()
        self.dropout = dropout

    def forward(self, x):
        return dropout(x, self.dropout if self.training else 0.0)


class Helped(Functional):
    def forward(self, x):
        return self._noisy(x)

    def _noisy(self, x):
        return torch.stack([dropout(row, self.dropout, self.training) for row in x])


class Literal(nn.Module):
    def forward(self, x):
        return dropout(x, 0.5, self.training)


class Extended(Functional):
    def forward(self, x):
        return super().forward(x)


class Overridden(Functional):
    def forward(self, x):
        return x


class OwnDropout(nn.Module):
    """Hugging Face's way: the probability of a layer that it has, in attention of its own."""

    def __init__(self, p):
        super().__init__()
        self.attn_dropout = nn.Dropout(p)

    def forward(self, x):
        return dropout(x, p=self.attn_dropout.p if self.training else 0.0)


class Checkpointing(nn.Module):
    gradient_checkpointing = False

    def forward(self, x):
        if self.gradient_checkpointing and self.training:
            return torch.utils.checkpoint.checkpoint(torch.tanh, x)
        return torch.tanh(x)


class Wrapped(nn.LSTM):
    def forward(self, x):
        return super().forward(x)[0]


class Attention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


LAYERS = {
    "linear": nn.Linear(4, 4),
    "layer norm": nn.LayerNorm(4),
    "group norm": nn.GroupNorm(2, 4),
    "relu": nn.Sequential(nn.ReLU(), nn.GELU()),
    "dropout": nn.Dropout(0.5),
    "dropout of 0": nn.Dropout(0.0),
    "alpha dropout": nn.AlphaDropout(0.5),
    "batch norm": nn.BatchNorm1d(4),
    "batch norm of the batch": nn.BatchNorm1d(4, track_running_stats=False),
    "batch norm without parameters": nn.BatchNorm1d(4, affine=False),
    "rrelu": nn.RReLU(),
    "rrelu of one slope": nn.RReLU(0.2, 0.2),
    "attention": Attention(4, 2, dropout=0.5),
    "attention without dropout": Attention(4, 2),
    "lstm": Wrapped(4, 4, num_layers=2, dropout=0.5),
    "lstm without dropout": Wrapped(4, 4, num_layers=2),
    "transformer": nn.TransformerEncoderLayer(4, 2, dropout=0.5),
    "transformer without dropout": nn.TransformerEncoderLayer(4, 2, dropout=0.0),
    "functional": Functional(0.5),
    "functional of 0": Functional(0.0),
    "helped": Helped(0.5),
    "helped of 0": Helped(0.0),
    "literal": Literal(),
    "extended": Extended(0.5),
    "overridden": Overridden(0.5),
    "own dropout": OwnDropout(0.5),
    "own dropout of 0": OwnDropout(0.0),
    "checkpointing": Checkpointing(),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_named_exactly_if_its_two_modes_differ(name):
    layer = LAYERS[name]
    inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))

    def outputs(train):
        layer.train(train)
        torch.manual_seed(1)
        with torch.no_grad():
            return [layer(inputs) for _ in range(2)]

    differ = not all(
        torch.allclose(train, evaluated, atol=1e-5)
        for train, evaluated in zip(outputs(True), outputs(False), strict=True)
    )
    assert bool(acting_in_train_mode(layer.train())) == differ
    assert acting_in_train_mode(layer.eval()) == ()


def test_kinds_are_sorted_and_named_once():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2), nn.Dropout(), Functional(0.1), nn.Linear(2, 2))
    assert acting_in_train_mode(model) == ("BatchNorm1d", "Dropout", "Functional")
