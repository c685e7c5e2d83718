"""Models, losses, data and optimisers as strangers bring them: what `strangers.py` puts through `stagewise run`.

Each is built of a few parameters, so that the whole list takes minutes. What is unusual stands in its name.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, TensorDataset

import stagewise as sw

CLASSES, FEATURES, LENGTH, WORDS, PAD, IGNORED = 3, 6, 5, 9, 0, -100
TRAIN, QUERIES = 36, 18


@dataclass(frozen=True)
class Stranger:
    """One run.

    Attributes:
        model: builds the model.
        loss: ``loss(model, batch)``.
        data: ``data(count, seed)`` in the form in which the stranger keeps them.
        optimizer: from parameters.
        train_mode: the loop calls ``model.train()``.
        clip: norm of the gradient that the loop clips to.
        one_cycle: the loop has a OneCycle schedule.
        accumulate: backward passes per update.
        task: further arguments of the Task.
        posterior: the section of the configuration; default a window.
        weights_alone: the optimizer is none that can be recorded, so that there is no window and no retraining.
        dtype: of the model.
    """

    model: Callable[[], nn.Module]
    loss: Callable[[Any, Any], Any]
    data: Callable[[int, int], Any]
    optimizer: str = "SGD"
    train_mode: bool = True
    clip: float | None = None
    one_cycle: bool = False
    accumulate: int = 1
    task: dict[str, Any] = field(default_factory=dict)
    weights_alone: bool = False
    dtype: torch.dtype = torch.float32

    def built(self) -> nn.Module:
        """The model."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the weight norm of old is one of the strangers
            return self.model().to(self.dtype)

    def make_task(self) -> sw.Task:
        """What the stranger's `task()` would return."""
        return sw.Task(
            self.built().eval(),
            self.loss,
            train=self.data(TRAIN, 1),
            queries={"val": self.data(QUERIES, 2)},
            train_groups=labels(TRAIN, 1),
            query_groups={"val": labels(QUERIES, 2)},
            **self.task,
        )


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.05),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


# Data: the same three noisy classes in every form.


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def classes(count: int, seed: int) -> Tensor:
    return torch.randint(CLASSES, (count,), generator=random(seed))


def labels(count: int, seed: int) -> list[str]:
    return [f"class {c}" for c in classes(count, seed).tolist()]


def noisy(count: int, seed: int, *shape: int) -> Tensor:
    """Noise around a centre for each class."""
    centres = torch.randn(CLASSES, *shape, generator=random(0))
    return centres[classes(count, seed)] + 0.7 * torch.randn(count, *shape, generator=random(seed + 10))


def vectors(count: int, seed: int) -> tuple[Tensor, Tensor]:
    return noisy(count, seed, FEATURES), classes(count, seed)


def sequences(count: int, seed: int) -> tuple[Tensor, Tensor]:
    return noisy(count, seed, LENGTH, 2), classes(count, seed)


def images(count: int, seed: int) -> TensorDataset:
    return TensorDataset(noisy(count, seed, 1, 8, 8), classes(count, seed))


def words(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Each class has its favourite words; 0 is padding."""
    favourite = classes(count, seed)[:, None] * 3
    drawn = torch.randint(1, 4, (count, LENGTH), generator=random(seed + 10))
    drawn = (favourite + drawn).clamp(max=WORDS - 1)
    drawn[torch.rand(drawn.shape, generator=random(seed + 20)) < 0.2] = PAD
    drawn[:, 0] = 1 + favourite[:, 0]  # nobody is empty
    return drawn, classes(count, seed)


def samples(columns: Callable[[int, int], tuple[Tensor, ...]]) -> Callable[[int, int], list[tuple[Tensor, ...]]]:
    return lambda count, seed: list(zip(*columns(count, seed), strict=True))


def texts(count: int, seed: int) -> dict[str, Tensor]:
    """Next words to predict, in a dict as Hugging Face models want it; the first label is ignored."""
    ids = words(count, seed)[0]
    targets = ids.clone()
    targets[:, 1][classes(count, seed) == 0] = IGNORED
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": targets}


def values(count: int, seed: int) -> dict[str, Tensor]:
    x = noisy(count, seed, FEATURES)
    return {"x": x, "y": x.sin().sum(1)}


def binary(count: int, seed: int) -> tuple[Tensor, Tensor]:
    return noisy(count, seed, FEATURES), (classes(count, seed) == 1).float()


def several(count: int, seed: int) -> tuple[Tensor, Tensor]:
    c = classes(count, seed)
    return noisy(count, seed, FEATURES), torch.stack([c == 0, c != 1, c == 2], 1).float()


def pairs(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Two views of one thing, or of two things."""
    first, second = noisy(count, seed, FEATURES), noisy(count, seed + 1, FEATURES)
    same = (classes(count, seed) == classes(count, seed + 1)).float()
    return [{"a": a, "b": b, "same": s} for a, b, s in zip(first, second, same, strict=True)]


def ragged(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    ids, c = words(count, seed)
    return [(row[: 2 + i % (LENGTH - 1)], c[i]) for i, row in enumerate(ids)]


def padded(batch: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return pad_sequence([x for x, _ in batch], batch_first=True), torch.stack([y for _, y in batch])


class Records(Dataset[dict[str, Any]]):
    """A dataset class whose samples are dicts with a text."""

    def __init__(self, count: int, seed: int) -> None:
        self.x, self.y = vectors(count, seed)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.x[index], "y": self.y[index].item(), "name": f"sample {index}"}


# Models.


class Through(nn.Module):
    """Named parts, and a function of them and the inputs as forward pass."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


def mlp(
    *between: Callable[[], nn.Module], outputs: int = CLASSES, wrap: Callable[..., Any] = lambda layer: layer
) -> Any:
    """Builds two layers with something between them."""
    return lambda: nn.Sequential(wrap(nn.Linear(FEATURES, 8)), *(make() for make in between), nn.Linear(8, outputs))


def last_state(kind: type[nn.Module], **settings: Any) -> Callable[[], nn.Module]:
    return lambda: Through(
        lambda m, x: m.head(m.body(x)[0][:, -1]),
        body=kind(2, 4, batch_first=True, **settings),
        head=nn.Linear(4 * (1 + settings.get("bidirectional", False)), CLASSES),
    )


def recurrent_tagger() -> nn.Module:
    return Through(
        lambda m, ids: m.head(m.body(m.words(ids))[0]),
        words=nn.Embedding(WORDS, 4),
        body=nn.GRU(4, 4, batch_first=True),
        head=nn.Linear(4, WORDS),
    )


def bag_of_words() -> nn.Module:
    return Through(lambda m, ids: m.head(m.bag(ids)), bag=nn.EmbeddingBag(WORDS, 4, mode="mean"), head=nn.Linear(4, 3))


def padded_words() -> nn.Module:
    def forward(m: Any, ids: Tensor) -> Any:
        here = (ids != PAD)[:, :, None]
        return m.head(torch.tanh((m.words(ids) * here).sum(1) / here.sum(1)))

    return Through(forward, words=nn.Embedding(WORDS, 4, padding_idx=PAD), head=nn.Linear(4, CLASSES))


def tied_words() -> nn.Module:
    model = Through(lambda m, ids: m.head(torch.tanh(m.mix(m.words(ids)))), words=nn.Embedding(WORDS, 5))
    model.mix, model.head = nn.Linear(5, 5), nn.Linear(5, WORDS, bias=False)
    model.head.weight = model.words.weight
    return model


def convolutions_1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, 4, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(4 * ((FEATURES - 2) // 2), CLASSES)
    )


def convolutions_2d(norm: Callable[[], nn.Module] = nn.Identity) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), norm(), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 9, CLASSES)
    )


def attention() -> nn.Module:
    def forward(m: Any, ids: Tensor) -> Any:
        h = m.words(ids)
        mixed, _ = m.mix(h, h, h, key_padding_mask=ids == PAD)
        return m.head((h + mixed).mean(1))

    return Through(
        forward,
        words=nn.Embedding(WORDS, 4),
        mix=nn.MultiheadAttention(4, 2, batch_first=True),
        head=nn.Linear(4, CLASSES),
    )


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=8, batch_first=True)
    return Through(
        lambda m, x: m.head(m.body(m.embed(x)).mean(1)),
        embed=nn.Linear(2, 4),
        body=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        head=nn.Linear(4, CLASSES),
    )


def lists_and_dicts() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Any:
        h = sum(torch.tanh(layer(x)) for layer in m.layers)
        return m.heads["one"](h) + m.scales["one"] * m.heads["two"](h)

    return Through(
        forward,
        layers=nn.ModuleList([nn.Linear(FEATURES, 4) for _ in range(2)]),
        heads=nn.ModuleDict({"one": nn.Linear(4, CLASSES), "two": nn.Linear(4, CLASSES)}),
        scales=nn.ParameterDict({"one": nn.Parameter(torch.ones(()))}),
    )


def looks_at_numbers() -> nn.Module:
    """As many rounds as a number in the data says: vmap cannot follow."""

    def forward(m: Any, x: Tensor) -> Any:
        h = m.body(x)
        for _ in range(1 + int(x.abs().max().item() > 0)):
            h = torch.tanh(m.again(h))
        return m.head(h)

    return Through(forward, body=nn.Linear(FEATURES, 6), again=nn.Linear(6, 6), head=nn.Linear(6, CLASSES))


def top_expert() -> nn.Module:
    """Each sample goes to one of three experts."""

    def forward(m: Any, x: Tensor) -> Any:
        gate = m.gate(x).softmax(1)
        out = x.new_zeros(len(x), CLASSES)
        for k, expert in enumerate(m.experts):
            chosen = (gate.argmax(1) == k).nonzero()[:, 0]
            if len(chosen):
                out = out.index_add(0, chosen, gate[chosen, k, None] * expert(x[chosen]))
        return out

    return Through(
        forward,
        gate=nn.Linear(FEATURES, 3),
        experts=nn.ModuleList([nn.Linear(FEATURES, CLASSES) for _ in range(3)]),
    )


class Balanced(nn.Module):
    """Leaves a penalty on its gates in an attribute, as mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = (
            nn.Linear(FEATURES, 2),
            nn.ModuleList([nn.Linear(FEATURES, CLASSES) for _ in range(2)]),
        )

    def forward(self, x: Tensor) -> Any:
        gate = self.gate(x).softmax(1)
        self.penalty = (gate - 0.5).square().sum(1)
        return sum(gate[:, k, None] * expert(x) for k, expert in enumerate(self.experts))


class Own(nn.Module):
    """With a device, a configuration and a method of its own, as many classes have."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(temperature=0.7, num_labels=CLASSES)
        self.body, self.head = nn.Linear(FEATURES, 6), nn.Linear(6, CLASSES)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def encode(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.encode(x))


def frozen_body() -> nn.Module:
    model = mlp(nn.Tanh)()
    model[0].requires_grad_(False)
    nn.init.eye_(model[0].weight)  # a pretrained part: the same each time it is loaded
    nn.init.zeros_(model[0].bias)
    return model


class LowRank(nn.Module):
    """A frozen layer and a correction of rank 2."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(0.3 * torch.randn(2, layer.in_features))
        self.up = nn.Parameter(torch.zeros(layer.out_features, 2))

    def forward(self, x: Tensor) -> Any:
        return self.layer(x) + x @ self.down.T @ self.up.T


def adapters() -> nn.Module:
    return nn.Sequential(LowRank(nn.Linear(FEATURES, 8)), nn.Tanh(), LowRank(nn.Linear(8, CLASSES)))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_positions=8, n_embd=8, n_layer=1, n_head=2))


def gpt_neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=WORDS,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=8,
        )
    )


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=WORDS,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=8,
            num_labels=CLASSES,
        )
    )


# Losses.


def cross_entropy(model: Any, batch: Any) -> Tensor:
    x, y = batch
    return functional.cross_entropy(model(x), y, reduction="none")


def as_channel(model: Any, batch: Any) -> Tensor:
    x, y = batch
    return functional.cross_entropy(model(x[:, None]), y, reduction="none")


def squares(model: Any, batch: Any) -> Tensor:
    return (model(batch["x"]).squeeze(-1) - batch["y"]).square()


def squares_in_double(model: Any, batch: Any) -> Tensor:
    return (model(batch["x"].double()).squeeze(-1) - batch["y"].double()).square()


def yes_or_no(model: Any, batch: Any) -> Tensor:
    x, y = batch
    return functional.binary_cross_entropy_with_logits(model(x)[:, 0], y, reduction="none")


def each_label(model: Any, batch: Any) -> Tensor:
    x, y = batch
    return functional.binary_cross_entropy_with_logits(model(x), y, reduction="none").mean(1)


def tokens(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Next words; what is ignored has weight 0."""
    logits, targets = model(batch["input_ids"])[:, :-1], batch["labels"][:, 1:]
    losses = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)
    return losses, (targets != IGNORED).float()


def hugging_face_tokens(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    losses = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)
    return losses, (targets != IGNORED).float()


def hugging_face_classes(model: Any, batch: Any) -> Tensor:
    logits = model(input_ids=batch[0], attention_mask=(batch[0] != PAD).long()).logits
    return functional.cross_entropy(logits, batch[1], reduction="none")


def to_the_models_device(model: Any, batch: Any) -> Tensor:
    device = next(model.parameters()).device
    return functional.cross_entropy(model(batch["x"].to(device)), batch["y"].to(device), reduction="none")


def asks_device_and_config(model: Any, batch: Any) -> Tensor:
    x, y = (part.to(model.device) for part in batch)
    logits = model(x).view(-1, model.config.num_labels) / model.config.temperature
    return functional.cross_entropy(logits, y, reduction="none")


def encodes(model: Any, batch: Any) -> Tensor:
    x, y = batch
    return functional.cross_entropy(model.head(model.encode(x)), y, reduction="none")


def contrastive(model: Any, batch: Any) -> Tensor:
    distance = (model(batch["a"]) - model(batch["b"])).square().sum(1)
    return batch["same"] * distance + (1 - batch["same"]) * functional.relu(1 - (distance + 1e-6).sqrt()).square()


def depends_on_logits(model: Any, batch: Any) -> Tensor:
    x, y = batch
    logits = model(x)
    if (logits > 0).any():
        logits = logits.clamp(max=30.0)
    return functional.cross_entropy(logits, y, reduction="none")


def with_l2(model: Any, batch: Any) -> Tensor:
    x, y = batch
    return cross_entropy(model, (x, y)) + 1e-2 * sum(p.square().sum() for p in model.parameters())


def with_what_forward_leaves(model: Any, batch: Any) -> Tensor:
    return cross_entropy(model, batch) + 0.1 * model.penalty


def with_slope_penalty(model: Any, batch: Any) -> Tensor:
    """Differentiates by the inputs."""
    x = batch[0].clone().requires_grad_()
    losses = cross_entropy(model, (x, batch[1]))
    (slope,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
    return losses + 0.1 * slope.square().sum(1)


class Focal(nn.Module):
    """A loss that is a module."""

    def forward(self, model: Any, batch: Any) -> Tensor:
        likelihood = -cross_entropy(model, batch)
        return -((1 - likelihood.exp()) ** 2) * likelihood


def mean_of(losses: Any) -> Tensor:
    """What the training loops minimise."""
    if isinstance(losses, Tensor):
        return losses.mean()
    found, weights = losses
    return (found * weights).sum() / weights.sum()


BY_TOKEN = {"objective": "tokens"}

STRANGERS: dict[str, Stranger] = {
    "LSTM": Stranger(last_state(nn.LSTM), cross_entropy, sequences, "momentum"),
    "LSTM, two layers both ways": Stranger(
        last_state(nn.LSTM, num_layers=2, bidirectional=True), cross_entropy, sequences, "Adam"
    ),
    "GRU by token, dict batches": Stranger(recurrent_tagger, tokens, texts, "AdamW", task=BY_TOKEN),
    "weight norm of old, regression": Stranger(
        mlp(nn.Tanh, outputs=1, wrap=nn.utils.weight_norm), squares, values, "momentum"
    ),
    "weight norm, BCE": Stranger(mlp(nn.Tanh, outputs=1, wrap=parametrizations.weight_norm), yes_or_no, binary, "Adam"),
    "spectral norm, multi-label": Stranger(
        mlp(nn.Tanh, wrap=parametrizations.spectral_norm), each_label, several, "Adam"
    ),
    "spectral norm of old": Stranger(mlp(nn.Tanh, wrap=nn.utils.spectral_norm), cross_entropy, vectors, "SGD"),
    "EmbeddingBag": Stranger(bag_of_words, cross_entropy, words, "Adam"),
    "padding_idx, list of tuples": Stranger(padded_words, cross_entropy, samples(words), "Adam"),
    "tied words, OneCycle": Stranger(tied_words, tokens, texts, "AdamW", one_cycle=True, task=BY_TOKEN),
    "BatchNorm, trained in eval mode": Stranger(
        mlp(lambda: nn.BatchNorm1d(8), nn.ReLU), cross_entropy, vectors, train_mode=False
    ),
    "BatchNorm, trained in train mode": Stranger(
        mlp(lambda: nn.BatchNorm1d(8), nn.ReLU), cross_entropy, vectors, "momentum"
    ),
    "LayerNorm and dropout": Stranger(
        mlp(lambda: nn.LayerNorm(8), nn.GELU, lambda: nn.Dropout(0.1)), cross_entropy, vectors, "AdamW"
    ),
    "Conv1d, max pool": Stranger(convolutions_1d, as_channel, vectors),
    "Conv2d, max pool, TensorDataset": Stranger(convolutions_2d, cross_entropy, images, "momentum"),
    "GroupNorm, clipping": Stranger(
        lambda: convolutions_2d(lambda: nn.GroupNorm(2, 4)), cross_entropy, images, "SGD", clip=0.5
    ),
    "MultiheadAttention": Stranger(attention, cross_entropy, words, "Adam"),
    "TransformerEncoder with dropout": Stranger(transformer, cross_entropy, sequences, "AdamW", clip=1.0),
    "torch.compile": Stranger(lambda: torch.compile(mlp(nn.Tanh)()), cross_entropy, vectors, "Adam"),
    "module lists and dicts": Stranger(lists_and_dicts, cross_entropy, vectors),
    ".item() in forward": Stranger(looks_at_numbers, cross_entropy, vectors, "momentum"),
    "top-1 experts": Stranger(top_expert, cross_entropy, vectors, "Adam"),
    "device of the parameters, Dataset": Stranger(mlp(nn.Tanh), to_the_models_device, Records, "Adam"),
    "model.device, model.config": Stranger(Own, asks_device_and_config, vectors),
    "model.encode instead of forward": Stranger(Own, encodes, vectors, "Adam", accumulate=2),
    "siamese": Stranger(mlp(nn.Tanh, outputs=2), contrastive, pairs, "Adam"),
    "if (logits > 0).any()": Stranger(mlp(nn.Tanh), depends_on_logits, vectors),
    "L2 inside of the loss": Stranger(mlp(nn.Tanh), with_l2, vectors),
    "slope penalty": Stranger(mlp(nn.Tanh), with_slope_penalty, vectors, "Adam"),
    "penalty left in an attribute": Stranger(Balanced, with_what_forward_leaves, vectors, "Adam"),
    "focal loss as a module": Stranger(mlp(nn.SiLU), Focal(), vectors, "Adam"),
    "frozen part": Stranger(frozen_body, cross_entropy, vectors, "Adam"),
    "low-rank adapters": Stranger(adapters, cross_entropy, vectors, "AdamW"),
    "GPT-2": Stranger(gpt2, hugging_face_tokens, texts, "AdamW", task=BY_TOKEN),
    "GPT-NeoX": Stranger(gpt_neox, hugging_face_tokens, texts, "Adam", clip=1.0),
    "BERT": Stranger(bert, hugging_face_classes, words, "AdamW", one_cycle=True),
    "ragged samples with collate": Stranger(
        padded_words, cross_entropy, ragged, "Adam", task={"collate": padded}, accumulate=3
    ),
    "float64 regression": Stranger(mlp(nn.Tanh, outputs=1), squares_in_double, values, dtype=torch.float64),
    "nesterov": Stranger(mlp(nn.Tanh), cross_entropy, vectors, "nesterov", weights_alone=True),
    "RMSprop": Stranger(mlp(nn.Tanh), cross_entropy, vectors, "RMSprop", weights_alone=True),
}
"""By what is unusual about them."""


def batch_at(data: Any, rows: Sequence[int], collate: Callable[[list[Any]], Any] | None = None) -> Any:
    """The samples ``rows`` as the stranger's own loop makes a batch of them."""
    if isinstance(data, dict):
        return {name: column[list(rows)] for name, column in data.items()}
    if isinstance(data, tuple):
        return tuple(column[list(rows)] for column in data)
    return (collate or torch.utils.data.default_collate)([data[row] for row in rows])
