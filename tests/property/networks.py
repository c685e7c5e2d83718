"""Tiny networks of every make: 5 to 60 parameters, and all that keeps weights in unusual places."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from broken import Apply, Detached, Once
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

WORDS = 6


@dataclass(frozen=True)
class Network:
    """How a model is built and what it is for.

    Attributes:
        build: the model.
        takes: ``"vector"`` (B, 3), ``"sequence"`` (B, T, 2), ``"words"`` (B, T) or ``"image"`` (B, 1, 4, 4).
        outputs: numbers per sample, or per token.
        per_token: whether there is one output per token.
        dtype: of the model.
        dense: gradients are dense; sparse ones go with plain SGD only.
        curved: second derivatives are those of training; else curvature is to be refused.
        linear: the outputs are linear in the parameters.
    """

    build: Callable[[], nn.Module]
    takes: str = "vector"
    outputs: int = 3
    per_token: bool = False
    dtype: torch.dtype = torch.float32
    dense: bool = True
    curved: bool = True
    linear: bool = False


class Through(nn.Module):
    """Named parts, and a function of them and the input as forward pass."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def weight(*shape):
    return nn.Parameter(0.6 * torch.randn(*shape))


def frozen(module):
    return module.requires_grad_(False)


def used_twice():
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(3, 3))


def reached_by_two_paths():
    body = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    return Through(lambda m, x: m.whole(x) + m.body(x), body=body, whole=nn.Sequential(body, nn.Linear(3, 3)))


def two_names():
    model = Through(lambda m, x: torch.tanh(x @ m.first) @ m.second.T, first=weight(3, 3))
    model.second = model.first
    return model


def tied_words():
    model = Through(lambda m, i: m.head(torch.tanh(m.words(i))), words=nn.Embedding(WORDS, 3))
    model.head = nn.Linear(3, WORDS, bias=False)
    model.head.weight = model.words.weight
    return model


def batch_norm():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 3))
    model.train()
    for _ in range(20):
        model(2 * torch.randn(16, 3) + 1)
    return model.eval()


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3))


def low_rank():
    return Through(
        lambda m, x: m.head(torch.tanh(m.base(x) + x @ m.down @ m.up)),
        base=frozen(nn.Linear(3, 4)),
        down=weight(3, 1),
        up=weight(1, 4),
        head=frozen(nn.Linear(4, 3)),
    )


def recurrent(kind, **settings):
    def forward(m, x):
        return m.head(m.body(x)[0])

    return lambda: Through(forward, body=kind(2, 2, batch_first=True, **settings), head=nn.Linear(2, 3))


def last_state(kind):
    return lambda: Through(
        lambda m, x: m.head(m.body(x)[0][:, -1]), body=kind(2, 2, batch_first=True), head=nn.Linear(2, 3)
    )


def cell():
    def forward(m, x):
        state = x.new_zeros(len(x), 2)
        for t in range(x.shape[1]):
            state = m.cell(x[:, t], state)
        return m.head(state)

    return Through(forward, cell=nn.GRUCell(2, 2, bias=False), head=nn.Linear(2, 3))


def causal(x):
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)


def attention():
    def forward(m, i):
        h = m.words(i)
        return m.head(h + m.mix(h, h, h, attn_mask=causal(h), need_weights=False)[0])

    mix = nn.MultiheadAttention(2, 1, batch_first=True)
    return Through(forward, words=nn.Embedding(WORDS, 2), mix=mix, head=nn.Linear(2, WORDS))


def encoder_layer():
    layer = nn.TransformerEncoderLayer(2, 1, dim_feedforward=3, dropout=0.0, batch_first=True)
    return Through(lambda m, x: m.head(m.layer(x).mean(1)), layer=layer, head=nn.Linear(2, 2))


def scaled_attention():
    def forward(m, x):
        q, k, v = m.project(x).chunk(3, -1)
        return m.head(functional.scaled_dot_product_attention(q, k, v, is_causal=True))

    return Through(forward, project=nn.Linear(2, 6), head=nn.Linear(2, 3))


def remembering():
    """Keeps its activations, as people do who look at them."""

    def forward(m, x):
        m.seen = {"hidden": m.body(x)}
        m.last = torch.tanh(m.seen["hidden"])
        return m.head(m.last)

    return Through(forward, body=nn.Linear(3, 4), head=nn.Linear(4, 3))


def positions():
    model = Through(lambda m, i: m.head(torch.tanh(m.words(i) + m.place[: i.shape[1]])), words=nn.Embedding(WORDS, 3))
    model.register_buffer("place", torch.arange(24.0).reshape(8, 3).sin(), persistent=False)
    model.head = nn.Linear(3, WORDS, bias=False)
    return model


def detached_scale():
    return Through(lambda m, x: x @ (m.w / m.w.norm(dim=1, keepdim=True).detach()).T, w=weight(3, 3))


def no_grad_scale():
    def forward(m, x):
        with torch.no_grad():
            size = m.w.square().mean()
        return m.head(torch.tanh(x @ m.w.T / (1 + size)))

    return Through(forward, w=weight(3, 3), head=nn.Linear(3, 3))


def straight_through():
    def forward(m, x):
        h = m.body(x)
        return m.head(h + (h.sign() - h).detach())

    return Through(forward, body=nn.Linear(3, 3), head=nn.Linear(3, 3))


def temperature(dtype):
    def build():
        t = nn.ParameterList([nn.Parameter(torch.tensor(0.7, dtype=dtype))])
        return Through(lambda m, x: m.head(x) * m.scale[0].to(x.dtype), head=nn.Linear(3, 3), scale=t)

    return build


def mlp(*between):
    return lambda: nn.Sequential(nn.Linear(3, 4), *(make() for make in between), nn.Linear(4, 3))


NETWORKS: dict[str, Network] = {
    "linear": Network(lambda: nn.Linear(3, 3), linear=True, dtype=torch.float64),
    "linear without bias": Network(lambda: nn.Linear(3, 3, bias=False), linear=True),
    "tanh": Network(mlp(nn.Tanh)),
    "relu in float64": Network(mlp(nn.ReLU), dtype=torch.float64),
    "bfloat16": Network(mlp(nn.Tanh), dtype=torch.bfloat16),
    "used twice": Network(used_twice),
    "reached by two paths": Network(reached_by_two_paths),
    "one parameter of two names": Network(two_names, dtype=torch.float64),
    "tied words": Network(tied_words, "words", WORDS, per_token=True),
    "RNN": Network(recurrent(nn.RNN), "sequence", 3, per_token=True),
    "LSTM": Network(last_state(nn.LSTM), "sequence"),
    "GRU": Network(recurrent(nn.GRU), "sequence", 3, per_token=True, dtype=torch.float64),
    "two layers of RNN": Network(last_state(lambda *a, **k: nn.RNN(*a, num_layers=2, **k)), "sequence"),
    "both directions": Network(
        lambda: Through(
            lambda m, x: m.head(m.body(x)[0].mean(1)),
            body=nn.RNN(2, 2, batch_first=True, bidirectional=True),
            head=nn.Linear(4, 3),
        ),
        "sequence",
    ),
    "GRU cell": Network(cell, "sequence"),
    "LayerNorm": Network(mlp(lambda: nn.LayerNorm(4), nn.Tanh)),
    "RMSNorm": Network(mlp(lambda: nn.RMSNorm(4), nn.Tanh), dtype=torch.float64),
    "BatchNorm": Network(batch_norm),
    "GroupNorm": Network(mlp(lambda: nn.GroupNorm(2, 4), nn.SiLU)),
    "weight norm": Network(
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3))
    ),
    "weight norm of old": Network(old_weight_norm),
    "spectral norm": Network(
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3)),
        dtype=torch.float64,
    ),
    "frozen body": Network(lambda: nn.Sequential(frozen(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3)), linear=True),
    "low rank": Network(low_rank),
    "attention": Network(attention, "words", WORDS, per_token=True),
    "encoder layer": Network(encoder_layer, "sequence", 2),
    "scaled attention": Network(scaled_attention, "sequence", 3, per_token=True),
    "mean of words": Network(
        lambda: Through(lambda m, i: m.head(m.words(i).mean(1)), words=nn.Embedding(WORDS, 3), head=nn.Linear(3, 3)),
        "words",
    ),
    "sparse words": Network(
        lambda: Through(
            lambda m, i: m.head(m.words(i).mean(1)), words=nn.Embedding(WORDS, 3, sparse=True), head=nn.Linear(3, 3)
        ),
        "words",
        dense=False,
    ),
    "bag of words": Network(
        lambda: Through(lambda m, i: m.head(torch.tanh(m.bag(i))), bag=nn.EmbeddingBag(WORDS, 3), head=nn.Linear(3, 3)),
        "words",
    ),
    "positions": Network(positions, "words", WORDS, per_token=True),
    "conv 1d": Network(
        lambda: Through(
            lambda m, x: m.head(torch.tanh(m.conv(x.transpose(1, 2))).mean(2)),
            conv=nn.Conv1d(2, 3, 2),
            head=nn.Linear(3, 3),
        ),
        "sequence",
    ),
    "conv 2d": Network(
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)),
        "image",
        dtype=torch.float64,
    ),
    "average pool": Network(
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.Softplus(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3, 3)),
        "image",
    ),
    "parameter list": Network(
        lambda: Through(
            lambda m, x: torch.tanh(x @ m.ws[0]) @ m.ws[1], ws=nn.ParameterList([weight(3, 4), weight(4, 3)])
        )
    ),
    "parameter dict": Network(
        lambda: Through(
            lambda m, x: torch.sin(x @ m.ws["in"]) @ m.ws["out"],
            ws=nn.ParameterDict({"in": weight(3, 4), "out": weight(4, 3)}),
        ),
        dtype=torch.float64,
    ),
    "detached scale": Network(detached_scale, curved=False),
    "scale under no_grad": Network(no_grad_scale, curved=False),
    "straight-through": Network(straight_through, curved=False),
    "backward once": Network(lambda: Apply(Once), curved=False),
    "backward detaches": Network(lambda: Apply(Detached), curved=False),
    "keeps activations": Network(remembering),
    "never used": Network(
        lambda: Through(lambda m, x: m.head(x), pooler=nn.Linear(3, 2), head=nn.Linear(3, 3)), linear=True
    ),
    "temperature": Network(temperature(torch.float32)),
    "one float64 parameter": Network(temperature(torch.float64)),
    "module list": Network(
        lambda: Through(
            lambda m, x: sum(layer(x) for layer in m.layers), layers=nn.ModuleList([nn.Linear(3, 3), mlp(nn.Tanh)()])
        )
    ),
    "PReLU": Network(mlp(nn.PReLU)),
    "residual": Network(
        lambda: Through(
            lambda m, x: m.head(x + m.body(x)), body=nn.Sequential(nn.Linear(3, 3), nn.GELU()), head=nn.Linear(3, 3)
        ),
        dtype=torch.float64,
    ),
    "data parallel": Network(lambda: nn.DataParallel(mlp(nn.Tanh)())),
    "many words, few used": Network(
        lambda: Through(
            lambda m, i: m.head(torch.tanh(m.words(i).mean(1))),
            words=nn.Embedding(WORDS + 4, 2, padding_idx=0),
            head=nn.Linear(2, 3),
        ),
        "words",
    ),
}
"""By what is unusual about them."""


def built(network: Network, seed: int) -> nn.Module:
    """The model with weights of its own, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network.build()
        if network.dtype != torch.float32:
            model = model.to(network.dtype)
    return model.eval()
