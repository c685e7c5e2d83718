"""What is studied: a model, its losses and its data.

A :class:`Task` turns a PyTorch module and a loss into a *pure function of the parameters*, the only form in which
the rest of the package ever sees a model.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence, Sized
from functools import cached_property, partial
from types import FunctionType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import MappingKey, tree_flatten, tree_flatten_with_path, tree_map
from torch.utils.data import Dataset, TensorDataset, default_collate

from stagewise.checkpoint import tensor_bytes
from stagewise.layers import MODE_DEPENDENT

Batch = Any
"""What the loss receives beside the model: a pytree of tensors whose first axis is the sample."""

Loss = Callable[[Any, Batch], Tensor]
"""``loss(model, batch) -> (batch,)`` or ``(batch, tokens)``, in nats, one value per sample or token."""

Params = Mapping[str, Tensor]


class Samples:
    """Data addressed by sample index.

    Args:
        data: a map-style dataset (``__len__`` and ``__getitem__``), or a tuple, list or dict of tensors that share
            their first axis. Tensors stay as they are; items of a dataset are collated when a batch is asked for.
        name: how error messages call this data.
    """

    def __init__(self, data: Any, name: str = "data") -> None:
        if isinstance(data, Samples):
            data = data.source
        elif isinstance(data, TensorDataset):
            data = data.tensors
        if not hasattr(data, "__getitem__") or isinstance(data, np.ndarray | tuple | list | dict):
            data = tree_map(lambda leaf: torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf, data)
        self.name = name
        self.source: Any = data
        self._dataset: Dataset[Any] | None = None
        leaves, _ = tree_flatten(data)
        if leaves and all(isinstance(leaf, Tensor) for leaf in leaves):
            lengths = sorted({len(leaf) if leaf.ndim else 0 for leaf in leaves})
            if len(lengths) != 1:
                raise ValueError(
                    f"{name}: tensors disagree on the number of samples, got first axes of {lengths}; "
                    "every tensor must have one row per sample"
                )
            self._length = lengths[0]
        elif hasattr(data, "__len__") and hasattr(data, "__getitem__"):
            self._dataset = cast("Dataset[Any]", data)
            self._length = len(cast(Sized, data))
        else:
            raise ValueError(
                f"{name}: expected a map-style dataset or a tuple, list or dict of tensors, got {type(data).__name__}"
            )
        if self._length == 0:
            raise ValueError(f"{name}: holds no samples")

    def __len__(self) -> int:
        return self._length

    def batch(self, index: Tensor | slice, device: torch.device | str = "cpu") -> Batch:
        """The samples ``index`` as one batch on ``device``."""
        if self._dataset is None:
            batch = tree_map(lambda leaf: leaf[index], self.source)
        else:
            rows = torch.arange(self._length)[index].tolist()
            batch = default_collate([self._dataset[row] for row in rows])
        return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)

    def batches(self, size: int, device: torch.device | str = "cpu") -> list[Batch]:
        """All samples in order, in batches of at most ``size``."""
        return [self.batch(slice(i, i + size), device) for i in range(0, self._length, size)]

    @cached_property
    def digest(self) -> str:
        """Hash of the content: equal for equal data, whatever object carries it."""
        digest = hashlib.sha256(str(self._length).encode())
        for batch in self.batches(1024):
            for path, leaf in tree_flatten_with_path(batch)[0]:
                keys = [str(part.key) for part in path if isinstance(part, MappingKey)]
                digest.update("/".join(keys).encode())  # which key of a dict holds what
                if isinstance(leaf, Tensor):
                    digest.update(tensor_bytes(leaf))
                else:
                    digest.update(repr(leaf).encode())
        return digest.hexdigest()


class Task:
    """A model, its per-sample (or per-token) losses, and the data they are evaluated on.

    Args:
        model: a module in eval mode. It is never modified.
        loss: ``loss(model, batch)`` returning losses in nats of shape ``(batch,)`` or ``(batch, tokens)``. It must be
            deterministic, and the loss of a sample must not depend on the other samples of its batch.
        train: the training set: the data whose influence is asked for. The training objective is the mean of the
            losses over samples (and tokens).
        queries: named data sets whose losses are influenced.
        train_groups: optional label of every training sample, e.g. its class.
        query_groups: optional labels of every sample of each query set, by query name.
        forward_batch: most samples in one forward pass, where a whole data set is evaluated; bounds the memory.

    Raises:
        ValueError: the model is in train mode although that changes its output, or labels and data differ in length.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        train: Any,
        queries: Mapping[str, Any],
        train_groups: Sequence[Any] | None = None,
        query_groups: Mapping[str, Sequence[Any]] | None = None,
        forward_batch: int = 2048,
    ) -> None:
        if forward_batch < 1:
            raise ValueError(f"forward_batch must be at least 1, got {forward_batch}")
        self.forward_batch = forward_batch
        _refuse_train_mode(model)
        if not queries:
            raise ValueError(
                "queries is empty: name at least one data set whose loss is studied, e.g. {'val': val_set}"
            )
        if bad := [name for name in queries if not name or "/" in name]:
            raise ValueError(f"a query set cannot be called {bad[0]!r}: names need a character and no '/'")
        self.model = model
        self.loss = loss
        self.train = Samples(train, "train")
        self.queries = {name: Samples(data, f"queries[{name!r}]") for name, data in queries.items()}
        self.train_groups = _labels(train_groups, len(self.train), "train_groups")
        groups = dict(query_groups or {})
        if unknown := sorted(set(groups) - set(self.queries)):
            raise ValueError(f"query_groups names {unknown}, but the queries are {sorted(self.queries)}")
        self.query_groups = {
            name: _labels(groups.get(name), len(data), f"query_groups[{name!r}]") for name, data in self.queries.items()
        }
        self._bound = _Bound(model, loss)

    @property
    def device(self) -> torch.device:
        """Where the model lives; batches are moved there."""
        return next(iter(self.model.parameters())).device

    def state(self) -> dict[str, Tensor]:
        """Parameters and buffers of the model as it was handed in, by name."""
        return {name: tensor.detach() for name, tensor in _named_state(self.model).items()}

    def losses(self, params: Params, batch: Batch) -> Tensor:
        """Losses at ``params``: a pure function, safe under ``torch.func``.

        Args:
            params: parameters and buffers by name; those left out keep the model's own value.
            batch: as given by ``Samples.batch``.

        Returns:
            ``(batch,)`` or ``(batch, tokens)``, in nats.
        """
        named = {f"model.{name}": tensor for name, tensor in params.items()}
        return cast(Tensor, functional_call(self._bound, named, (batch,)))

    def outputs(self, params: Params, batch: Batch) -> Any:
        """What the model returns inside the loss (a pytree of tensors), for Gauss-Newton curvature.

        Raises:
            ValueError: the loss does not call the model exactly once.
        """
        recorder = _CallRecorder(partial(functional_call, self.model, dict(params)))
        self.loss(recorder, batch)
        if len(recorder.outputs) != 1:
            raise ValueError(
                f"Gauss-Newton curvature needs a loss that calls the model once, got {len(recorder.outputs)} calls; "
                "use curvature='hessian'"
            )
        return recorder.outputs[0]

    def losses_from_outputs(self, outputs: Any, batch: Batch) -> Tensor:
        """The losses that follow from given outputs of the model: ``(batch,)`` or ``(batch, tokens)``."""
        return self.loss(lambda *_args, **_kwargs: outputs, batch)

    def check(self, params: Params) -> None:
        """Evaluate two small batches at ``params`` and refuse a loss that no estimator could use.

        Raises:
            ValueError: the losses have the wrong shape, are not finite, change between two evaluations (dropout,
                random augmentation) or depend on the rest of the batch (batch statistics).
        """
        for samples in (self.train, *self.queries.values()):
            size = min(4, len(samples))
            batch = samples.batch(slice(0, size), self.device)
            with torch.no_grad():
                first, second = self.losses(params, batch), self.losses(params, batch)
                alone = self.losses(params, samples.batch(slice(0, 1), self.device))
            _check_losses(first, size, samples.name)
            if not torch.equal(first, second):
                raise ValueError(
                    f"{samples.name}: two evaluations of the same batch differ by up to "
                    f"{(first - second).abs().max().item():.3g} nats; losses must be deterministic. "
                    "Switch off dropout and random augmentation (model.eval(), F.dropout(..., training=False))"
                )
            if not torch.allclose(first[:1], alone, rtol=1e-3, atol=1e-4):
                raise ValueError(
                    f"{samples.name}: the loss of sample 0 depends on the rest of its batch "
                    f"({first[0].mean().item():.5g} beside others, {alone[0].mean().item():.5g} alone); "
                    "batch statistics and losses averaged over the batch cannot be attributed to samples"
                )

    def identity(self) -> dict[str, str]:
        """What a stored number depends on, one hash per part, so that a mismatch can name the part."""
        parts = {
            "model": _digest(repr(self.model), *_state_shapes(self.model), *_layer_sources(self.model)),
            "loss": _digest(*_function_parts(self.loss)),
            "training data": self.train.digest,
        }
        return parts | {f"query {name!r}": data.digest for name, data in self.queries.items()}


class _Bound(nn.Module):
    """The loss as the forward pass of a module that owns the model, so that ``functional_call`` reaches it."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Batch) -> Tensor:
        return self._loss(self.model, batch)


class _CallRecorder:
    """Stands in for the model inside the loss and keeps what the model returned."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self.outputs: list[Any] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._call(args, kwargs)
        self.outputs.append(output)
        return output


def _named_state(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _refuse_train_mode(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if module.training and isinstance(module, MODE_DEPENDENT):
            raise ValueError(
                f"the model is in train mode and contains {type(module).__name__} ({name or 'the model itself'}); "
                "its losses would be random. Call model.eval() before building the Task"
            )


def _labels(labels: Sequence[Any] | None, length: int, name: str) -> np.ndarray[Any, Any] | None:
    if labels is None:
        return None
    array = np.asarray([label.item() if isinstance(label, Tensor) else label for label in labels])
    if array.shape != (length,):
        raise ValueError(f"{name}: expected one label for each of {length} samples, got shape {array.shape}")
    return array.astype(str)


def _check_losses(losses: Any, size: int, name: str) -> None:
    if not isinstance(losses, Tensor) or losses.ndim not in (1, 2) or losses.shape[0] != size:
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"{name}: the loss returned {got} for a batch of {size}, expected ({size},) or ({size}, tokens): one "
            "loss per sample or token, not their mean (reduction='none')"
        )
    if losses.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name}: losses are {losses.dtype}, whose rounding would drown the covariances; "
            "return float32 or float64 (logits.float() before the cross-entropy)"
        )
    if not torch.isfinite(losses).all():
        bad = (~torch.isfinite(losses)).reshape(size, -1).any(1).nonzero()[0].item()
        raise ValueError(f"{name}: the loss of sample {bad} is not finite; check the data and the checkpoint")


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _state_shapes(model: nn.Module) -> list[str]:
    return [f"{name} {tuple(t.shape)} {t.dtype}" for name, t in _named_state(model).items()]


def _layer_sources(model: nn.Module) -> list[str]:
    """Source of every kind of layer; a change inside a block changes the model although its shapes stay."""
    return sorted({_source(type(module)) for module in model.modules()})


def _source(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', repr(type(thing)))}"


def _function_parts(function: Any, seen: frozenset[Any] = frozenset()) -> list[str]:
    """Everything visible that decides what a loss computes: source, defaults, bound and captured values.

    Functions of the same module that it calls are followed.
    """
    if isinstance(function, partial):
        bound = [repr(function.args), repr(sorted(function.keywords.items()))]
        return bound + _function_parts(function.func, seen)
    parts = [_source(function), repr(getattr(function, "__defaults__", None))]
    if not isinstance(function, FunctionType):
        return parts
    captured = [cell.cell_contents for cell in function.__closure__ or ()]
    named = [function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__]
    for value in captured + named:
        if isinstance(value, str | int | float | bool | tuple | type(None)):
            parts.append(repr(value))
        elif isinstance(value, FunctionType) and value.__module__ == function.__module__ and value not in seen:
            parts += _function_parts(value, seen | {function})
    return parts
