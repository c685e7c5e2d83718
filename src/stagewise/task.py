"""What is studied: a model, its losses and its data.

A :class:`Task` turns a PyTorch module and a loss into a *pure function of the parameters*, the only form in which
the rest of the package ever sees a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stagewise.checkpoint import Checkpoint
from stagewise.data import Batch, Collate, Samples
from stagewise.dtensors import is_sharded
from stagewise.fitting import fitted
from stagewise.functional import PureModel
from stagewise.in_place import InPlaceModel
from stagewise.labels import NONE, Labels, Texts, as_labels, as_texts
from stagewise.layers import in_train_mode
from stagewise.notebook import listed, table
from stagewise.ranks import Alone

__all__ = ["Batch", "Loss", "Losses", "Objective", "Params", "Samples", "Task"]

Loss = Callable[[Any, Batch], Any]
"""``loss(model, batch)``: values ``(batch,)`` or ``(batch, tokens)``, or a pair of values and weights of one shape."""

Params = Mapping[str, Tensor]

Objective = Literal["samples", "tokens"]


class Losses(NamedTuple):
    """What the loss says of a batch.

    Attributes:
        values: ``(batch,)`` or ``(batch, tokens)``, in nats; 0 where the weight is 0.
        weights: of the same shape, not negative; None where all count alike.
    """

    values: Tensor
    weights: Tensor | None = None


class Task:
    """A model, its per-sample (or per-token) losses, and the data they are evaluated on.

    The training objective is a mean,  sum_i a_i l_i / sum_i a_i.  With ``objective="samples"`` every sample counts
    alike (a_i = 1), and its loss l_i is the mean over its tokens; with ``"tokens"`` every token does (a_i = the sum of
    the weights of its tokens), as where a trainer averages over all tokens of a batch. Weights that the loss returns
    beside its values enter both: 0 is padding, a prompt, an ignored label.

    Args:
        model: a module in eval mode. It is never modified; one that is sharded by ``fully_shard`` is lent to
            :mod:`stagewise.sharded`, and has its own weights again afterwards.
        loss: ``loss(model, batch)`` returning losses in nats of shape ``(batch,)`` or ``(batch, tokens)``, or a pair of
            losses and weights of that shape. It must be deterministic, and the loss of a sample must not depend on
            the other samples of its batch.
        train: the training set, whose mean loss was minimised: it drives the chains and is trained on again.
        queries: named data sets whose losses are influenced.
        train_groups: optional label of every training sample, e.g. its class; or of every token ``(samples, tokens)``,
            as the loss returns them. What has the label None is in no group.
        query_groups: optional labels of every sample, or token, of each query set, by query name.
        query_losses: what is measured on a query set, by query name, where it is not the training loss: e.g. a margin
            or a probability. The same signature as ``loss``; influence on it is in its own units.
        candidates: indices (or a mask) of the training samples whose influence is asked for; default all. Only their
            losses are evaluated at every draw.
        objective: what training averages over, see above.
        train_texts: optional text of every predicted token of every training sample, one for each loss, e.g.
            ``[[tokenizer.decode([token]) for token in row[1:]] for row in tokens]``. Rows may end before losses of
            weight 0. It is shown in reports, and decides no number.
        collate: makes a batch of a list of samples, as ``DataLoader(collate_fn=)`` does.
        forward_batch: most samples in one forward pass, where a whole data set is evaluated or a window is replayed
            exactly; bounds the memory.

    Raises:
        ValueError: the model is in train mode although that changes its output, labels and data differ in length, or
            the model or the data cannot be used.

    Example:
        >>> task = Task(
        ...     nn.Linear(4, 3),
        ...     lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none"),
        ...     train=(torch.randn(8, 4), torch.arange(8) % 3),
        ...     queries={"val": (torch.randn(5, 4), torch.arange(5) % 3)},
        ... )
        >>> len(task.train), task.losses({}, task.train.batch(slice(0, 2))).shape
        (8, torch.Size([2]))
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        train: Any,
        queries: Mapping[str, Any],
        train_groups: Labels | None = None,
        query_groups: Mapping[str, Labels | None] | None = None,
        query_losses: Mapping[str, Loss] | None = None,
        candidates: Sequence[int] | Sequence[bool] | Tensor | None = None,
        objective: Objective = "samples",
        train_texts: Texts | None = None,
        collate: Collate | None = None,
        forward_batch: int = 2048,
    ) -> None:
        if forward_batch < 1:
            raise ValueError(f"forward_batch must be at least 1, got {forward_batch}")
        if objective not in ("samples", "tokens"):
            raise ValueError(f"objective must be 'samples' or 'tokens', got {objective!r}")
        if not isinstance(queries, Mapping) or not queries:
            raise ValueError(
                "queries: name at least one data set whose loss is studied, e.g. {'val': val_set}, got "
                f"{'none' if isinstance(queries, Mapping) else type(queries).__name__}"
            )
        if bad := [name for name in queries if not _is_name(name)]:
            raise ValueError(f"a query set cannot be called {bad[0]!r}: a name is text with a character and no '/'")
        _refuse_train_mode(model)
        self.model = model
        self.loss = loss
        self.objective: Objective = objective
        self.forward_batch = forward_batch
        self.pure = InPlaceModel(model) if is_sharded(model) else PureModel(model)
        self.train = Samples(train, "train", collate)
        self.queries = {name: Samples(data, f"queries[{name!r}]", collate) for name, data in queries.items()}
        self.candidates = _indices(candidates, len(self.train))
        self.train_groups = _labels(train_groups, len(self.train), "train_groups")
        self.train_texts = None if train_texts is None else as_texts(train_texts, len(self.train), "train_texts")
        for argument, given in (("query_groups", query_groups), ("query_losses", query_losses)):
            if unknown := sorted(set(given or {}) - set(self.queries)):
                raise ValueError(f"{argument} names {unknown}, but the queries are {sorted(self.queries)}")
        groups = query_groups or {}
        self.query_groups = {
            name: _labels(groups.get(name), len(data), f"query_groups[{name!r}]") for name, data in self.queries.items()
        }
        self.query_losses = dict(query_losses or {})
        self.checked: set[str] = set()
        """What :func:`stagewise.check.check` has found in order."""
        self.sample_weights: Tensor | None = None
        """Kept by :func:`stagewise.evaluate.sample_weights`."""
        self.grouped_queries: Any = None
        """Kept by :func:`stagewise.groups.query_groups`."""

    def __repr__(self) -> str:
        return "Task(\n  " + "\n  ".join(f"{name}: {what}" for name, what in self._facts()) + "\n)"

    def _repr_html_(self) -> str:
        labels = {name: set(words.ravel()) - {NONE} for name, words in self.label_sets.items() if words is not None}
        return table(
            "Task", [*self._facts(), *((f"labels of {name}", listed(sorted(labels[name]))) for name in labels)]
        )

    def _facts(self) -> Iterator[tuple[str, str]]:
        yield "train", repr(self.train)
        if len(self.candidates) < len(self.train):
            yield "candidates", f"{len(self.candidates):,} of them"
        for name, data in self.queries.items():
            yield f"queries[{name!r}]", repr(data)
        moving = sum(tensor.numel() for tensor in self.trainable.values())
        yield "model", f"{type(self.model).__name__}, {moving:,} trainable parameters"
        yield "objective", f"mean over {self.objective}"

    @property
    def device(self) -> torch.device:
        """Where the model lives; batches are moved there."""
        return next(iter(self.pure.state.values())).device

    @property
    def ranks(self) -> Alone:
        """The processes that hold the model."""
        return self.pure.ranks

    @property
    def trainable(self) -> Mapping[str, Tensor]:
        """The parameters that require a gradient, by name."""
        return self.pure.trainable

    @property
    def label_sets(self) -> dict[str, NDArray[np.str_] | None]:
        """Labels of the candidates (``"train"``) and of every query set (``"queries/<name>"``)."""
        train = None if self.train_groups is None else self.train_groups[self.candidates.numpy()]
        return {"train": train} | {f"queries/{name}": labels for name, labels in self.query_groups.items()}

    @property
    def candidate_samples(self) -> Samples:
        """The training samples whose influence is asked for."""
        return self.train if len(self.candidates) == len(self.train) else self.train.subset(self.candidates)

    def state(self) -> dict[str, Tensor]:
        """Parameters and buffers of the model as it was handed in, by name; of a sharded one the rows that are here."""
        return {name: tensor.detach() for name, tensor in self.pure.state.items()}

    def losses(self, params: Params, batch: Batch, query: str | None = None) -> Tensor:
        """Losses at ``params``: a pure function.

        Args:
            params: parameters and buffers by name; those left out keep the model's own value.
            batch: as given by ``Samples.batch``.
            query: measure what is measured on this query set; default the training loss.

        Returns:
            ``(batch,)`` or ``(batch, tokens)``, in nats.
        """
        return self.weighted_losses(params, batch, query).values

    def weighted_losses(self, params: Params, batch: Batch, query: str | None = None) -> Losses:
        """The same with the weights that the loss gives them."""
        loss = self.loss if query is None else self.query_losses.get(query, self.loss)
        with self.pure.holding(params) as model:
            return evaluated(loss, model, batch)

    def sample_losses(self, params: Params, batch: Batch, query: str | None = None) -> tuple[Tensor, Tensor]:
        """The loss l_i of every sample and its weight a_i in the objective, ``(batch,)`` each."""
        return self.by_sample(self.weighted_losses(params, batch, query))

    def by_sample(self, losses: Losses) -> tuple[Tensor, Tensor]:
        """From losses of samples or tokens to the loss l_i and the weight a_i of every sample ``(..., batch)``."""
        values, weights = losses
        if values.ndim == 1:
            return values, torch.ones_like(values) if weights is None else weights
        if weights is None:
            weight = float(values.shape[1]) if self.objective == "tokens" else 1.0
            return values.mean(1), torch.full_like(values[:, 0].detach(), weight)
        total = weights.sum(1)
        mean = (weights * values).sum(1) / torch.where(total > 0, total, 1.0)
        return mean, total if self.objective == "tokens" else (total > 0).to(total)

    def shares(self, losses: Losses) -> Tensor:
        """The weight of every single loss in the objective, before division by the sum of all a_i."""
        values, weights = losses
        weights = torch.ones_like(values) if weights is None else weights
        if values.ndim == 1 or self.objective == "tokens":
            return weights
        total = weights.sum(1, keepdim=True)
        return weights / torch.where(total > 0, total, 1.0)

    def fitted(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint as this model needs it, see :func:`stagewise.fitting.fitted`.

        Raises:
            CheckpointError: parameters or buffers are missing, unknown, or of another shape or a wider type.
        """
        return fitted(self.pure, checkpoint)


def evaluated(loss: Loss, model: nn.Module, batch: Batch) -> Losses:
    """What a loss says of a batch; it may itself differentiate (a gradient penalty) where its caller does not."""
    wanted = torch.is_grad_enabled()
    with torch.enable_grad():
        values, weights = checked_losses(loss(model, batch))
    return Losses(values if wanted else values.detach(), weights)


def checked_losses(result: Any) -> Losses:
    """What a user's loss returned, as values and weights.

    Raises:
        ValueError: it is neither a tensor nor a pair of tensors of one shape.
    """
    values, weights = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(values, Tensor) or values.ndim not in (1, 2):
        got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"the loss returned {got}, expected (batch,) or (batch, tokens): one loss per sample or token, not their "
            "mean (reduction='none'); or a pair of losses and weights of that shape"
        )
    if weights is None:
        return Losses(values)
    if not isinstance(weights, Tensor) or weights.shape != values.shape:
        got = f"shape {tuple(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"the loss returned weights of {got} beside losses of shape {tuple(values.shape)}")
    weights = weights.detach().to(values.dtype)
    return Losses(torch.where(weights > 0, values, 0.0), weights)


def _labels(labels: Labels | None, length: int, name: str) -> NDArray[np.str_] | None:
    return None if labels is None else as_labels(labels, length, name)


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and bool(name.strip()) and "/" not in name


def _refuse_train_mode(model: nn.Module) -> None:
    for name, module in in_train_mode(model).items():
        raise ValueError(
            f"the model is in train mode and contains {type(module).__name__} ({name or 'the model itself'}); its "
            "losses would be random or change the model. Call model.eval() before building the Task"
        )


def _indices(candidates: Any, n: int) -> Tensor:
    """Candidates as ascending indices of training samples."""
    if candidates is None:
        return torch.arange(n)
    chosen = torch.as_tensor(candidates).cpu()
    if chosen.dtype == torch.bool:
        if chosen.shape != (n,):
            raise ValueError(f"candidates: a mask needs one entry for each of {n} samples, got {tuple(chosen.shape)}")
        chosen = chosen.nonzero().flatten()
    outside = chosen[(chosen < 0) | (chosen >= n)]
    if chosen.ndim != 1 or chosen.is_floating_point() or not len(chosen) or len(outside):
        raise ValueError(
            f"candidates: expected indices from 0 to {n - 1}, got "
            f"{outside.tolist()[:3] if len(outside) else f'{chosen.dtype} of shape {tuple(chosen.shape)}'}"
        )
    if len(set(chosen.tolist())) != len(chosen):
        raise ValueError("candidates: every training sample can be named once only")
    return chosen.long().sort().values
