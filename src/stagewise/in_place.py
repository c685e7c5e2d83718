"""A module as a function of its tensors that are written into it: for models that are too large to be copied.

The parameters of a model that FSDP2 has sharded (``torch.distributed.fsdp.fully_shard``) are DTensors, of which this
process holds some rows. FSDP gathers whole layers while they are computed, from storage of its own: other tensors
cannot stand in their place, as :class:`stagewise.functional.PureModel` lets them. So they are written into the rows
that are here, and gradients are read from ``parameter.grad``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stagewise.checkpoint import CheckpointError
from stagewise.functional import PureModel, unchanged, unwrapped
from stagewise.piece import Piece
from stagewise.ranks import Ranks


class InPlaceModel(PureModel):
    """Stands in for a model whose tensors are written in place; tensors are those rows that are here.

    Args:
        model: sharded by ``fully_shard``, or a plain module in a process of its own.
        split: whether the samples of a batch are divided among the processes.

    Attributes:
        pieces: the part of every parameter that is here, by name.
        ranks: the processes that hold the model.

    Raises:
        ValueError: it is sharded in a way that is not supported, or not at all although there are several processes.
    """

    in_place = True
    ranks: Ranks

    def __init__(self, model: nn.Module, split: bool = True) -> None:
        self.module = model = unwrapped(model)
        self.leftovers: list[str] = []
        self._sharded_modules = _fsdp_modules(model) if is_sharded(model) else []
        self._reshard()
        self.canonical: dict[str, str] = {}
        self._tensors: dict[str, Tensor] = {}
        names: dict[int, str] = {}
        for name, tensor in [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]:
            self.canonical[name] = names.setdefault(id(tensor), name)
            self._tensors.setdefault(self.canonical[name], tensor)
        self._parameters = {name: t for name, t in self._tensors.items() if isinstance(t, nn.Parameter)}
        self.ranks = _ranks_of(self._tensors, bool(self._sharded_modules), split)
        self.pieces = {name: _piece(name, tensor, self.ranks) for name, tensor in self._parameters.items()}
        kept = model.state_dict(keep_vars=True)
        self.persistent = {self.canonical[name] for name in kept if name in self.canonical}
        self.padding = {}
        self.still = _still_rows(model, names, self)

    @property
    def state(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Parameters and buffers by name: views of what is in the module now."""
        return {name: _here(tensor) for name, tensor in self._tensors.items()}

    @property
    def trainable(self) -> dict[str, Tensor]:  # type: ignore[override]
        """The parameters that require a gradient, by name."""
        return {name: _here(tensor) for name, tensor in self._parameters.items() if tensor.requires_grad}

    def entries(self, name: str) -> int:
        """How many numbers a tensor is, on all processes together."""
        return self._tensors[name].numel()

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """The rows of a tensor of this name that are here, of the whole or as they are.

        Raises:
            CheckpointError: it has another shape.
        """
        piece = self.pieces.get(name)
        if piece is None or tuple(tensor.shape) == piece.own:
            return tensor
        if tuple(tensor.shape) != piece.shape:
            raise CheckpointError(f"{name!r} has shape {tuple(tensor.shape)}, the model expects {piece.shape}")
        return piece.of(tensor)

    def rows_of(self, key: str, shape: tuple[int, ...]) -> Piece | None:
        """The part that is here of what a file keeps under a name that ends like a parameter's; None: all of it."""
        words = key.removesuffix(".exp_avg").removesuffix(".exp_avg_sq").removesuffix(".momentum_buffer").split(".")
        names = (self.canonical.get(".".join(words[first:]), "") for first in range(len(words)))
        piece = self.pieces.get(next(filter(None, names), ""))
        return piece if piece is not None and piece.shape == shape else None

    @contextmanager
    def holding(self, tensors: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """The module, into which ``tensors`` are written and stay; see :meth:`borrowed`."""
        self._reshard()
        with torch.no_grad():
            for name, tensor in tensors.items():
                _here(self._tensors[name]).copy_(tensor)
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
            slopes = {n: _here(p.grad) for n, p in self._parameters.items() if p.grad is not None}
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


def is_sharded(model: nn.Module) -> bool:
    """Whether some parameter is a DTensor."""
    return any(_mesh(parameter) is not None for parameter in unwrapped(model).parameters())


def _mesh(tensor: Tensor) -> Any:
    """The mesh of a DTensor, else None: its module takes as long to import as torch, and most models do without."""
    return getattr(tensor, "device_mesh", None)


def _fsdp_modules(model: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _here(tensor: Tensor) -> Tensor:
    """The rows of a parameter that are here, in the storage that it has."""
    own = tensor.detach()
    return own if _mesh(own) is None else cast(Any, own).to_local()


def _ranks_of(tensors: Mapping[str, Tensor], is_fsdp: bool, split: bool) -> Ranks:
    """The processes that hold the tensors.

    Raises:
        ValueError: these are not all parameters, cut once, among the processes of one mesh.
    """
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and tensor.dtype.itemsize < 4:
            raise ValueError(
                f"parameter {name!r} is {tensor.dtype}, in which steps would be rounded away; keep the shards in "
                "float32, and compute in bfloat16 by fully_shard(mp_policy=MixedPrecisionPolicy(param_dtype=...))"
            )
    meshes = {name: mesh for name, tensor in tensors.items() if (mesh := _mesh(tensor)) is not None}
    if not meshes:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                f"there are {dist.get_world_size()} processes, but the model is not sharded; call "
                "torch.distributed.fsdp.fully_shard on its layers and on itself"
            )
        return Ranks(split=split)
    if not is_fsdp:
        raise ValueError("parameters are DTensors, but not those of torch.distributed.fsdp.fully_shard; use that")
    name, mesh = next(iter(meshes.items()))
    for other, tensor in tensors.items():
        is_parameter = isinstance(tensor, nn.Parameter)
        if is_parameter != (other in meshes):
            what = "parameter {!r} is not sharded" if is_parameter else "buffer {!r} is sharded"
            raise ValueError(f"{what.format(other)}; shard all parameters and no buffer: fully_shard(model) at last")
    if any(each.ndim != 1 for each in meshes.values()):
        raise ValueError(
            f"parameter {name!r} lies on a mesh of {mesh.ndim} dimensions (hybrid sharding, tensor parallelism); only "
            "fully_shard over one dimension is supported"
        )
    if any(each != mesh for each in meshes.values()):
        raise ValueError("parameters lie on different meshes; give all fully_shard calls the same mesh=")
    return Ranks(mesh.get_local_rank(), mesh.size(), split and mesh.size() > 1, mesh.get_group())


def _piece(name: str, tensor: Tensor, ranks: Ranks) -> Piece:
    """Which part of a parameter is here, as ``torch.chunk`` cuts.

    Raises:
        ValueError: it is cut in another way.
    """
    shape = tuple(tensor.shape)
    if _mesh(tensor) is None:
        return Piece(shape, 0, shape[0] if shape else 1)
    placement = cast(Any, tensor).placements[0]
    axis = getattr(placement, "dim", None)
    if not placement.is_shard() or axis is None:
        raise ValueError(f"parameter {name!r} is placed by {placement}; expected it to be sharded by fully_shard")
    most = -(-shape[axis] // ranks.count)
    start = min(ranks.index * most, shape[axis])
    piece = Piece(shape, start, min(most, shape[axis] - start), axis)
    if tuple(_here(tensor).shape) != piece.own:
        raise ValueError(
            f"parameter {name!r} has {tuple(_here(tensor).shape)} of its {shape} here, expected {piece.own}: it is cut "
            "in another way than torch.chunk cuts"
        )
    return piece


def _still_rows(model: nn.Module, names: Mapping[int, str], own: InPlaceModel) -> dict[str, int]:
    """Rows of embeddings, among those that are here, that have no gradient by their definition, by name."""
    rows = {}
    for module in model.modules():
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag) or module.padding_idx is None:
            continue
        name = names[id(module.weight)]
        row, shared = module.padding_idx - own.pieces[name].start, [*own.canonical.values()].count(name) > 1
        if not shared and own.pieces[name].axis == 0 and 0 <= row < own.pieces[name].size:
            rows[name] = row
    return rows
