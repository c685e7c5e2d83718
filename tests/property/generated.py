"""Tasks as people would write them, one for every number: what they are made of is drawn, and always the same."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from forms import FORMS, Form
from measures import CARRIERS, CLASSES, CRITERIA, output_size
from networks import NETWORKS, WORDS, Network, built
from torch import Tensor, nn
from training import RULES, Rule, Training

from stagewise.checkpoint import Checkpoint
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.sampling.posterior import LocalPosterior
from stagewise.task import Task

TOKENS = 3


@dataclass(frozen=True)
class Choice:
    """All that was drawn."""

    seed: int
    network: str
    form: str
    criterion: str
    carrier: str
    rule: str
    weighted: bool
    objective: str
    start: int
    batch_size: int
    n: int
    posterior: LocalPosterior
    queries: tuple[str, ...]
    labelled: tuple[bool, bool]
    candidates: bool
    measured: bool
    forward_batch: int
    names: str

    def __str__(self) -> str:
        parts = [self.network, self.form, self.criterion, self.carrier, self.rule, self.objective]
        return ", ".join(parts + ["weighted"] * self.weighted)


def choice(seed: int, network: str) -> Choice:
    """What a task with this network is made of."""
    draw = random.Random(seed)
    kind = NETWORKS[network]
    names = sorted(set(CRITERIA) - (set() if kind.per_token else {"summed"}))
    criterion = draw.choice(names)
    forms = sorted(set(FORMS) - (set() if kind.per_token and criterion != "summed" else {"ragged"}))
    form = "ragged" if "ragged" in forms and draw.random() < 0.3 else draw.choice(forms)
    rule = draw.choice(sorted(RULES)) if kind.dense else "SGD"
    weighted = form == "ragged" or draw.random() < 0.4
    n = draw.randint(6, 8)
    batch_size = draw.choice((0, 0, 4, 5))
    start = 3 if RULES[rule].late else draw.choice((0, 2))
    return Choice(
        seed=seed,
        network=network,
        form=form,
        criterion=criterion,
        carrier=draw.choice(sorted(CARRIERS)),
        rule=rule,
        weighted=weighted,
        objective=draw.choice(("samples", "tokens")),
        start=start,
        batch_size=batch_size,
        n=n,
        posterior=_posterior(draw, rule, batch_size, start),
        queries=draw.choice((("other",), ("train",), ("other", "train"))),
        labelled=(draw.random() < 0.75, draw.random() < 0.5),
        candidates=draw.random() < 0.25,
        measured=draw.random() < 0.2,
        forward_batch=draw.choice((2048, 5)),
        names=draw.choice(("state_dict", "module.", "_orig_mod.")),
    )


def _posterior(draw: random.Random, rule: str, batch_size: int, start: int) -> LocalPosterior:
    adam = "Adam" in rule or rule == "unfrozen late"
    # Squares of the gradients of minibatches are estimated with random signs: no exact value is known.
    if draw.random() < 0.4 or (batch_size and (adam or RULES[rule].clip)):
        metric = "adam" if adam and start and draw.random() < 0.5 else None
        return LocalPosterior(gamma=draw.choice((3.0, 50.0)), n_beta=draw.choice((None, 20.0)), metric=metric)
    return LocalPosterior(window=draw.randint(1, 4), metric=draw.choice((None, None, "euclidean")))


@dataclass
class Problem:
    """A task with a run of its own, and the same things by hand.

    Attributes:
        choice: what was drawn.
        model: the user's, in the state in which it is handed over.
        task: what is studied.
        training: the run, arrived at its start checkpoint.
        window: updates of the windows that are retrained.
        start: its checkpoint.
        later: the checkpoint ``window`` updates later.
        data: training data and query sets as the user has them.
        trained: the samples of every train group, in the order of the answers.
        queried: query set and samples of every query group, alike.
    """

    choice: Choice
    model: nn.Module
    task: Task
    training: Training
    window: int
    start: Checkpoint
    later: Checkpoint
    later_model: nn.Module
    data: dict[str, Any]
    trained: list[list[int]]
    queried: list[tuple[str, list[int]]]
    before: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def network(self) -> Network:
        return NETWORKS[self.choice.network]

    @property
    def rule(self) -> Rule:
        return RULES[self.choice.rule]

    @property
    def form(self) -> Form:
        return FORMS[self.choice.form]

    @property
    def run(self) -> Trajectory:
        return Trajectory.from_checkpoints([self.start, self.later])

    def batch(self, name: str, rows: Sequence[int]) -> Any:
        return self.form.batch(self.data[name], list(rows))

    def untouched(self) -> bool:
        """Whether the user's model is the one that was handed over: the same tensors with the same bits."""
        now = _tensors(self.model)
        return now.keys() == self.before.keys() and all(
            now[name] is tensor and torch.equal(tensor, bits) and tensor.grad is None
            for name, (tensor, bits) in self.before.items()
        )


def problem(drawn: Choice) -> Problem:
    """Build everything and train up to the start checkpoint, and from there through a window."""
    network, form, rule = NETWORKS[drawn.network], FORMS[drawn.form], RULES[drawn.rule]
    generator = torch.Generator().manual_seed(drawn.seed)
    data = {"train": form.of(_columns(drawn, network, drawn.n, generator))}
    data["other"] = form.of(_columns(drawn, network, size_of(drawn, "other"), generator))
    loss = CARRIERS[drawn.carrier](form.named, CRITERIA[drawn.criterion], drawn.weighted)
    training = Training(
        lambda: built(network, drawn.seed),
        rule,
        lambda rows: form.batch(data["train"], rows),
        lambda model, batch, beta: objective(loss(model, batch), beta, drawn.objective),
        lambda step: _rows(drawn, step),
    )
    start = training.run(drawn.start).recorded(drawn.batch_size)
    window = drawn.posterior.window or 2
    onwards = training.copied(double=False).run(window)
    model = built(network, drawn.seed + 1000)
    task, trained, queried = _task(drawn, network, form, model, loss, data)
    made = Problem(
        drawn,
        model,
        task,
        training,
        window,
        _renamed(start, drawn.names),
        _renamed(onwards.recorded(drawn.batch_size), drawn.names),
        onwards.model,
        data,
        trained,
        queried,
    )
    made.before = {name: (tensor, tensor.detach().clone()) for name, tensor in _tensors(model).items()}
    return made


def size_of(drawn: Choice, name: str) -> int:
    """Samples in a data set."""
    return drawn.n if name == "train" else 5


def objective(losses: Any, beta: Tensor, kind: str) -> Tensor:
    """The mean that training minimises, sample i counted beta_i times in the numerator."""
    values, weights = by_sample(losses, kind)
    return (beta.to(values) * weights * values).sum() / weights.sum()


def by_sample(losses: Any, kind: str) -> tuple[Tensor, Tensor]:
    """Loss and weight of every sample."""
    values, weights = losses if isinstance(losses, tuple) else (losses, torch.ones_like(losses))
    weights = weights.to(values)
    if values.ndim == 1:
        return values, weights
    total = weights.sum(1)
    mean = (weights * values).sum(1) / total.clamp(min=1e-9)
    return mean, total if kind == "tokens" else (total > 0).to(values)


def _task(drawn: Choice, network: Network, form: Form, model: nn.Module, loss: Any, data: dict[str, Any]):
    """The task, and the groups in which its answers come."""
    candidates = list(range(1, drawn.n, 2)) if drawn.candidates else list(range(drawn.n))
    labels = [i // 2 % 3 for i in range(drawn.n)] if drawn.labelled[0] else None
    trained = [[i] for i in candidates]
    if labels is not None:
        trained = [[i for i in candidates if labels[i] == k] for k in sorted({labels[i] for i in candidates})]
    queries, query_labels, queried = {}, {}, []
    for name in drawn.queries:
        queries[name] = data[name]
        size = size_of(drawn, name)
        if drawn.labelled[1]:
            query_labels[name] = ["u" if i % 3 else "v" for i in range(size)]
            queried += [(name, [i for i in range(size) if i % 3]), (name, [i for i in range(size) if not i % 3])]
        else:
            queried.append((name, list(range(size))))
    measured = {}
    if drawn.measured:
        measured[drawn.queries[0]] = CARRIERS[drawn.carrier](form.named, output_size, form is FORMS["ragged"])
    task = Task(
        model,
        loss,
        train=data["train"],
        queries=queries,
        train_groups=labels,
        query_groups=query_labels or None,
        query_losses=measured,
        candidates=candidates if drawn.candidates else None,
        objective=drawn.objective,
        collate=form.collate,
        forward_batch=drawn.forward_batch,
    )
    return task, trained, queried


def _columns(drawn: Choice, network: Network, n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random inputs, targets and weights."""
    shape = {"vector": (3,), "sequence": (TOKENS, 2), "words": (TOKENS,), "image": (1, 4, 4)}[network.takes]
    real = torch.float64 if network.dtype == torch.float64 else torch.float32
    if network.takes == "words":
        x = torch.randint(1, WORDS, (n, *shape), generator=generator)
    else:
        x = torch.randn(n, *shape, generator=generator, dtype=real)
    lead = (n, TOKENS) if network.per_token else (n,)
    if drawn.criterion in CLASSES:
        y = torch.randint(0, network.outputs, lead, generator=generator)
    elif drawn.criterion == "binary":
        y = torch.randint(0, 2, (*lead, network.outputs), generator=generator).to(real)
    else:
        y = torch.randn(*lead, network.outputs, generator=generator, dtype=real)
    if not drawn.weighted:
        return {"x": x, "y": y}
    w = torch.tensor([0.5, 1.0, 2.0])[torch.randint(0, 3, lead, generator=generator)].to(real)
    if network.per_token and drawn.criterion == "summed":
        w = w[:, 0]
    if w.ndim == 2:
        w[::3, 1] = 0
    w[1] = 0  # a whole sample that does not count
    return {"x": x, "y": y, "w": w}


def _rows(drawn: Choice, step: int) -> Tensor:
    """The samples of the update made at a step."""
    if not drawn.batch_size:
        return torch.arange(drawn.n)
    generator = torch.Generator().manual_seed(1000 * drawn.seed + step)
    return torch.randperm(drawn.n, generator=generator)[: drawn.batch_size]


def _renamed(checkpoint: Checkpoint, prefix: str) -> Checkpoint:
    """Under the names that a wrapped model would have."""
    if prefix == "state_dict":
        return checkpoint
    remembered = {*checkpoint.params, *checkpoint.first_moment, *checkpoint.second_moment, *checkpoint.update_counts}
    remembered |= checkpoint.optimizer.updated or set()
    return checkpoint.renamed({name: prefix + name for name in remembered})


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())
