"""Ordinary models, losses and data: nothing in here may ever be refused."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

SAMPLES = 9


@dataclass
class Animal:
    """A model with data for it.

    Attributes:
        model: in eval mode.
        loss: ``loss(model, batch)``.
        data: 9 samples.
    """

    model: nn.Module
    loss: Callable[[Any, Any], Any]
    data: Any


def cross_entropy(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def next_token(model, batch):
    return functional.cross_entropy(model(batch[0])[:, :-1].mT, batch[0][:, 1:], reduction="none")


def scalar(kind):
    """Losses of a model with one output."""

    def loss(model, batch):
        x, y = batch
        z = model(x).flatten(1)[:, 0]
        sign = 2.0 * (y > 0).to(z) - 1
        match kind:
            case "mse":
                return functional.mse_loss(z, y.to(z), reduction="none")
            case "l1":
                return functional.l1_loss(z, y.to(z), reduction="none")
            case "huber":
                return functional.huber_loss(z, y.to(z), reduction="none", delta=0.5)
            case "bce":
                return functional.binary_cross_entropy_with_logits(z, (y > 0).to(z), reduction="none")
            case "hinge":
                return functional.relu(1 - sign * z)
        raise ValueError(kind)

    return loss


class Residual(nn.Module):
    def __init__(self, channels=4):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))

    def forward(self, x):
        hidden = functional.relu(self.norms[0](self.first(x)), inplace=True)
        return functional.relu(x + self.norms[1](self.second(hidden)))


class Block(nn.Module):
    """A block of a transformer, written by hand."""

    def __init__(self, width, heads, activation):
        super().__init__()
        self.heads, self.activation = heads, activation
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(2, 3)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(self.activation(self.up(self.norms[1](x))))


class Language(nn.Module):
    def __init__(self, block, width=8, words=11):
        super().__init__()
        self.embed, self.place = nn.Embedding(words, width), nn.Parameter(0.02 * torch.randn(6, width))
        self.block, self.norm = block, nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.norm(self.block(self.embed(tokens) + self.place[: tokens.shape[1]])))


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.embed = nn.Embedding(11, 5, padding_idx=0)
        self.layer, self.head = kind(5, 6, batch_first=True, **options), nn.LazyLinear(3)

    def forward(self, tokens):
        return self.head(self.layer(self.embed(tokens))[0][:, -1])


def recurrent(kind, **options):
    model = Recurrent(kind, **options)
    model(torch.zeros(1, 5, dtype=torch.long))
    return model


class Pooled(nn.Module):
    """Means over words of which some are padding, whose row never gets a gradient."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 4, padding_idx=0), nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(torch.tanh(self.embed(tokens).mean(1)))


def flat(*sizes, activation=nn.Tanh):
    layers = [nn.Flatten()]
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


def convolutional(bias=0.0):
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.constant_(parameter, bias)
    return model


def normalised(model, shape):
    """Running statistics as training leaves them, and eval mode."""
    model.train()
    for _ in range(5):
        model(torch.randn(8, *shape))
    return model.eval()


def images():
    """With large black areas, as digits have them."""
    x = torch.rand(SAMPLES, 1, 8, 8)
    x[:, :, :3] = 0
    return x, torch.arange(SAMPLES) % 3


def vectors(size=5):
    return torch.randn(SAMPLES, size), torch.arange(SAMPLES) % 3


def sentences():
    tokens = torch.randint(1, 11, (SAMPLES, 5))
    tokens[::2, -2:] = 0
    return tokens, torch.arange(SAMPLES) % 3


def zoo():
    """Every kind: name to a function that makes one from torch's global generator."""
    kinds = {
        "linear": lambda: Animal(nn.Linear(5, 3), cross_entropy, vectors()),
        "tanh": lambda: Animal(flat(5, 8, 3), cross_entropy, vectors()),
        "relu": lambda: Animal(flat(5, 30, 30, 3, activation=nn.ReLU), cross_entropy, vectors()),
        "relu without bias": lambda: Animal(
            nn.Sequential(nn.Linear(5, 9, bias=False), nn.ReLU(), nn.Linear(9, 3, bias=False)), cross_entropy, vectors()
        ),
        "convolutions": lambda: Animal(convolutional(), cross_entropy, images()),
        "batch norm": lambda: Animal(
            normalised(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)), (5,)),
            cross_entropy,
            vectors(),
        ),
        "residual": lambda: Animal(
            normalised(
                nn.Sequential(
                    nn.Conv2d(1, 4, 3), Residual(), Residual(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
                ),
                (1, 8, 8),
            ),
            cross_entropy,
            images(),
        ),
        "group norm": lambda: Animal(
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(144, 3)),
            cross_entropy,
            images(),
        ),
        "gelu transformer": lambda: Animal(Language(Block(8, 2, functional.gelu)), next_token, sentences()),
        "silu transformer": lambda: Animal(Language(Block(8, 2, functional.silu)), next_token, sentences()),
        "torch transformer": lambda: Animal(
            Language(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)), next_token, sentences()
        ),
        "lstm": lambda: Animal(recurrent(nn.LSTM), cross_entropy, sentences()),
        "deep lstm": lambda: Animal(recurrent(nn.LSTM, num_layers=2, bidirectional=True), cross_entropy, sentences()),
        "gru": lambda: Animal(recurrent(nn.GRU), cross_entropy, sentences()),
        "rnn": lambda: Animal(recurrent(nn.RNN, nonlinearity="relu"), cross_entropy, sentences()),
        "padded words": lambda: Animal(Pooled(), cross_entropy, sentences()),
        "bag of words": lambda: Animal(
            nn.Sequential(nn.EmbeddingBag(11, 4, padding_idx=0), nn.Tanh(), nn.Linear(4, 3)), cross_entropy, sentences()
        ),
        "weight norm": lambda: Animal(
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, 3)),
            cross_entropy,
            vectors(),
        ),
        "dropout in eval mode": lambda: Animal(
            nn.Sequential(nn.Linear(5, 6), nn.Dropout(), nn.ELU(), nn.Linear(6, 3)), cross_entropy, vectors()
        ),
        "kinks everywhere": lambda: Animal(
            nn.Sequential(nn.Linear(5, 40), nn.Hardtanh(), nn.Linear(40, 40), nn.LeakyReLU(), nn.Linear(40, 3)),
            cross_entropy,
            vectors(),
        ),
        "float64": lambda: Animal(
            flat(5, 8, 3, activation=nn.GELU).double(), cross_entropy, (vectors()[0].double(), vectors()[1])
        ),
        "casts to float32": lambda: Animal(
            flat(5, 30, 3, activation=nn.ReLU),
            lambda m, b: functional.cross_entropy(m(b[0].float()).float(), b[1], reduction="none"),
            vectors(),
        ),
        "casts inside": lambda: Animal(CastsInside(), cross_entropy, vectors()),
        "class weights": lambda: Animal(
            flat(5, 8, 3),
            lambda m, b, w=torch.tensor([1.0, 2.0, 0.5]): functional.cross_entropy(m(b[0]), b[1], w, reduction="none"),
            vectors(),
        ),
    }
    for kind in ("mse", "l1", "huber", "bce", "hinge"):
        kinds[kind] = lambda kind=kind: Animal(flat(5, 12, 1, activation=nn.ReLU), scalar(kind), vectors())
    return kinds


class CastsInside(nn.Module):
    """Works in float32 whatever the type of its parameters."""

    def __init__(self):
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(16, 5) / math.sqrt(5)), nn.Linear(16, 3)

    def forward(self, x):
        hidden = torch.relu(x.float() @ self.weight.float().T)
        return self.head(hidden.to(self.head.weight.dtype))


def make(name, seed=0, scale=1.0, updates=0):
    """One of the zoo, with weights times ``scale``, after some updates of training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        animal = zoo()[name]()
    model = animal.model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= scale
    if updates:
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        for _ in range(updates):
            optimizer.zero_grad()
            animal.loss(model, animal.data).mean().backward()
            optimizer.step()
        optimizer.zero_grad()
    return animal
