"""Which rows of a model's parameters are in this process: the DTensors of ``torch.distributed.fsdp.fully_shard``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn

from stagewise.functional import unwrapped
from stagewise.piece import Piece
from stagewise.ranks import Ranks


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP has it, or some parameter is a DTensor."""
    model = unwrapped(model)
    of_fsdp = any(type(module).__module__.startswith("torch.distributed.fsdp") for module in model.modules())
    return of_fsdp or any(_mesh(parameter) is not None for parameter in model.parameters())


def _mesh(tensor: Tensor) -> Any:
    """The mesh of a DTensor, else None: its module takes as long to import as torch, and most models do without."""
    return getattr(tensor, "device_mesh", None)


def is_cut(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which a part is here."""
    return _mesh(tensor) is not None


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules that ``fully_shard`` was called on."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def check_precision(modules: Sequence[Any]) -> None:
    """Refuse what FSDP was told to compute in less than float32.

    Weights are rounded to it whenever they are gathered, and with them the displacements of chains: all losses move by
    what is rounded away, and covary.

    Args:
        modules: as :func:`fsdp_modules` finds them.

    Raises:
        ValueError: with the type.
    """
    for module in modules:
        policy = module._get_fsdp_state()._mp_policy  # torch has no public way to ask
        for name in ("param_dtype", "reduce_dtype", "output_dtype"):
            dtype = getattr(policy, name)
            if dtype is not None and dtype.itemsize < 4:
                raise ValueError(
                    f"fully_shard was given mp_policy= with {name}={dtype}, to which displacements of the weights "
                    "would be rounded at every evaluation; leave out mp_policy=, so that the model is evaluated in "
                    "float32"
                )


def rows_here(tensor: Tensor) -> Tensor:
    """The rows of a parameter that are here, in the storage that it has."""
    own = tensor.detach()
    return own if _mesh(own) is None else cast(Any, own).to_local()


def ranks_of(tensors: Mapping[str, Tensor], sharded: bool, is_fsdp: bool, split: bool) -> Ranks:
    """The processes that hold the tensors.

    Args:
        tensors: parameters and buffers by name.
        sharded: as :func:`is_sharded` says of their model.
        is_fsdp: whether it has :func:`fsdp_modules`.
        split: whether the samples of a batch are divided.

    Raises:
        ValueError: these are not all parameters, cut once, among the processes of one mesh.
    """
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and tensor.dtype.itemsize < 4:
            raise ValueError(
                f"parameter {name!r} is {tensor.dtype}, in which steps would be rounded away; shard a model in float32 "
                "(model.float() before fully_shard)"
            )
    meshes = {name: mesh for name, tensor in tensors.items() if (mesh := _mesh(tensor)) is not None}
    if sharded and not (is_fsdp and meshes):
        raise ValueError(
            "the model is not sharded by torch.distributed.fsdp.fully_shard (FSDP2), but otherwise; use that"
        )
    if not meshes:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                f"there are {dist.get_world_size()} processes, but the model is not sharded; call "
                "torch.distributed.fsdp.fully_shard on its layers and on itself"
            )
        return Ranks(split=split)
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
    if (here := rows_here(tensors[name]).device.type) != mesh.device_type:
        raise ValueError(
            f"parameter {name!r} lies on {here}, its mesh on {mesh.device_type}; shard a model that is there, without "
            "fully_shard(offload_policy=CPUOffloadPolicy())"
        )
    return Ranks(mesh.get_local_rank(), mesh.size(), split and mesh.size() > 1, mesh.get_group())


def piece_of(name: str, tensor: Tensor, ranks: Ranks) -> Piece:
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
    piece = Piece.held(shape, ranks.index, ranks.count, axis)
    if tuple(rows_here(tensor).shape) != piece.own:
        raise ValueError(
            f"parameter {name!r} has {tuple(rows_here(tensor).shape)} of its {shape} here, expected {piece.own}: it is "
            "cut in another way than torch.chunk cuts"
        )
    return piece
