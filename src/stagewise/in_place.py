"""A module as a function of its tensors that are written into it: for models that are too large to be copied.

The parameters of a model that FSDP2 has sharded (``torch.distributed.fsdp.fully_shard``) are DTensors, of which this
process holds some rows. FSDP gathers whole layers while they are computed, from storage of its own: other tensors
cannot stand in their place, as :class:`stagewise.functional.PureModel` lets them. So they are written into the rows
that are here, and gradients are read from ``parameter.grad``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from stagewise.checkpoint import CheckpointError
from stagewise.dtensors import check_precision, fsdp_modules, is_cut, is_sharded, piece_of, ranks_of, rows_here
from stagewise.functional import PureModel, unchanged, unwrapped, with_bare_names
from stagewise.piece import Piece, Wanted
from stagewise.ranks import Ranks

_MOMENT = re.compile(r"\.(exp_avg|exp_avg_sq|momentum_buffer)$")


class InPlaceModel(PureModel):
    """Stands in for a model whose tensors are written in place; tensors are those rows that are here.

    Args:
        model: sharded by ``fully_shard``, or a plain module in a process of its own.
        split: whether the samples of a batch are divided among the processes.

    Attributes:
        pieces: the part of every parameter that is here, by name.
        ranks: the processes that hold the model.
        tied_padding: embeddings of which a row has no gradient by definition, but has one by another layer.

    Raises:
        ValueError: it is sharded in a way that is not supported, or not at all although there are several processes.
    """

    in_place = True
    ranks: Ranks

    def __init__(self, model: nn.Module, split: bool = True) -> None:
        self.module = model = unwrapped(model)
        self.leftovers: list[str] = []
        sharded = is_sharded(model)
        self._sharded_modules = fsdp_modules(model) if sharded else []
        check_precision(self._sharded_modules)
        self._reshard()
        self._read: set[str] = set()
        """Parameters of which the files being read gave the rows that are here."""
        self.canonical: dict[str, str] = {}
        self._tensors: dict[str, Tensor] = {}
        names: dict[int, str] = {}
        for name, tensor in [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]:
            self.canonical[name] = names.setdefault(id(tensor), name)
            self._tensors.setdefault(self.canonical[name], tensor)
        places = Counter(self.canonical.values())
        self.canonical = with_bare_names(self.canonical)
        self._parameters = {name: t for name, t in self._tensors.items() if isinstance(t, nn.Parameter)}
        self.ranks = ranks_of(self._tensors, sharded, bool(self._sharded_modules), split)
        self.pieces = {name: piece_of(name, tensor, self.ranks) for name, tensor in self._parameters.items()}
        kept = model.state_dict(keep_vars=True)
        self.persistent = {self.canonical[name] for name in kept if name in self.canonical}
        self.padding = _padding_rows(model, names, self.pieces)
        self.still = {name: row for name, row in self.padding.items() if places[name] == 1}
        # An EmbeddingBag leaves such rows out of what it returns.
        padded = [module for module in _padded(model) if isinstance(module, nn.Embedding)]
        self.tied_padding = [module for module in padded if places[names[id(module.weight)]] > 1]

    @property
    def state(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Parameters and buffers by name: views of what is in the module now."""
        return {name: rows_here(tensor) for name, tensor in self._tensors.items()}

    @property
    def trainable(self) -> dict[str, Tensor]:  # type: ignore[override]
        """The parameters that require a gradient, by name."""
        return {name: rows_here(tensor) for name, tensor in self._parameters.items() if tensor.requires_grad}

    def entries(self, name: str) -> int:
        """How many numbers a tensor is, on all processes together."""
        return self._tensors[name].numel()

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """The rows of a tensor of this name that are here: of a whole one, of a DTensor, or as a file gave them.

        Raises:
            CheckpointError: it has another shape, or is cut in another way.
        """
        piece, shape = self.pieces.get(name), tuple(tensor.shape)
        if piece is None or (name in self._read and shape == piece.own):
            return tensor
        if shape != piece.shape:
            hint = "; whole tensors are expected, or those of model.state_dict()" if shape == piece.own else ""
            raise CheckpointError(f"{name!r} has shape {shape}, the model expects {piece.shape}{hint}")
        if is_cut(tensor):
            if piece_of(name, tensor, self.ranks) != piece:
                raise CheckpointError(f"{name!r} is cut among the processes in another way than the model's")
            return rows_here(tensor)
        return tensor if piece.own == shape else piece.of(tensor)

    @contextmanager
    def reading_rows(self) -> Iterator[Wanted]:
        """What chooses the rows that are here while a checkpoint is read; inside they are taken as such."""
        try:
            yield self._rows_of
        finally:
            self._read.clear()

    def _rows_of(self, key: str, shape: tuple[int, ...]) -> Piece | None:
        """The part that is here of what a file keeps under a name that ends like a parameter's; None: all of it.

        Raises:
            CheckpointError: what the file keeps is as long as that part.
        """
        words = (
            key.rpartition("/")[2]
            .removesuffix(".exp_avg")
            .removesuffix(".exp_avg_sq")
            .removesuffix(".momentum_buffer")
            .split(".")
        )
        names = (self.canonical.get(".".join(words[first:]), "") for first in range(len(words)))
        piece = self.pieces.get(name := next(filter(None, names), ""))
        if piece is None or shape not in (piece.shape, piece.own):
            return None
        if shape != piece.shape:
            raise CheckpointError(f"{name!r} has shape {shape}, the model expects {piece.shape}")
        self._read.add(name)
        return piece

    @contextmanager
    def holding(self, tensors: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """The module, into which ``tensors`` are written and stay; see :meth:`borrowed`."""
        self._reshard()
        with torch.no_grad():
            for name, tensor in tensors.items():
                rows_here(self._tensors[name]).copy_(tensor)
        with unchanged(self.module):
            yield self.module

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Context after which the module has the tensors that it has now; they are kept on the CPU."""
        kept = {name: tensor.to("cpu", copy=True) for name, tensor in self.state.items()}
        try:
            yield
        finally:
            with self.holding(kept):
                pass

    def slopes(
        self, params: Mapping[str, Tensor], values: Sequence[Callable[[Mapping[str, Tensor]], Tensor]]
    ) -> dict[str, Tensor]:
        """Gradient of a sum of numbers by the rows that are here, by name, of those parameters that have one.

        Every process has numbers of its own samples, where these are divided, and as many numbers as the others.
        """
        self._forget()
        try:
            for value in values:
                if (found := value(params)).requires_grad:
                    torch.autograd.backward(found)
            slopes = {n: rows_here(p.grad) for n, p in self._parameters.items() if p.grad is not None}
        finally:
            self._forget()
        if self.ranks.divided > 1:  # FSDP takes the mean over processes
            for slope in slopes.values():
                slope.mul_(self.ranks.divided)
        return slopes

    def add_slopes(
        self,
        params: Mapping[str, Tensor],
        values: Sequence[Callable[[Mapping[str, Tensor]], Tensor]],
        parts: Mapping[str, Tensor],
    ) -> None:
        """Add the gradient of a sum of numbers, which are computed from ``params``, to ``parts`` by name."""
        found = self.slopes(params, values)
        for name, part in parts.items():
            if name in found:
                part.add_(found[name])

    def reference(self, *_: Any) -> nn.Module:
        """Refuse: there is no second model of this size."""
        raise ValueError("a model that is sharded has no copies; use stagewise.sharded")

    def _reshard(self) -> None:
        """Let go of gathered layers, which would be used again although their rows have changed."""
        for module in self._sharded_modules:
            module.reshard()

    def _forget(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None


def _padding_rows(model: nn.Module, names: Mapping[int, str], pieces: Mapping[str, Piece]) -> dict[str, int]:
    """Rows of embeddings that have no gradient by their definition, by name, where some of their entries are here."""
    rows = {}
    for module in _padded(model):
        piece = pieces[name := names[id(module.weight)]]
        row = cast(int, module.padding_idx) - (piece.start if piece.axis == 0 else 0)
        if 0 <= row < piece.own[0]:
            rows[name] = row
    return rows


def _padded(model: nn.Module) -> Iterator[nn.Embedding | nn.EmbeddingBag]:
    """The embeddings of which a row has no gradient by definition."""
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.padding_idx is not None:
            yield module
