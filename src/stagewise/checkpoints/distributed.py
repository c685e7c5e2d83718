"""Checkpoints of sharded training: folders that ``torch.distributed.checkpoint`` (DCP) wrote, by itself or for FSDP.

What was saved is a nested dict, see :mod:`stagewise.checkpoints.shards`: here the weights and the optimiser are found
in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor

from stagewise.checkpoint import CheckpointError
from stagewise.checkpoints.shards import METADATA, Index, Tree, read_index
from stagewise.checkpoints.weights import STATE_DICT_KEYS, usable
from stagewise.piece import Wanted

_OF_FSDP = "pytorch_model_fsdp_0"  # as accelerate calls it, and with it the Trainer

SHARDED = (METADATA, f"{_OF_FSDP}/{METADATA}")
"""The files by which the weights of a folder are known to be shards."""


def folder_of(file: Path) -> Path:
    """The folder of the checkpoint whose weights are known by this file, one of :data:`SHARDED`."""
    return file.parent.parent if file.parent.name == _OF_FSDP else file.parent


def sharded_weights(file: Path, wanted: Wanted | None = None) -> dict[str, Tensor]:
    """The weights by name, each tensor in one piece, at least float32: what ``model.state_dict()`` was.

    Args:
        file: the ``.metadata`` of a folder.
        wanted: which rows of each; default all.

    Raises:
        CheckpointError: it, or a file that it names, is missing, damaged or refused, holds no state dict, or values
            that are not finite.
    """
    index = read_index(file, wanted)
    return {name: usable(index.tensor(key), name, file) for name, key in _state_dict_in(index).items()}


def sharded_optimizer(file: Path, wanted: Wanted | None = None) -> dict[str, Any] | None:
    """The state of the optimiser, as ``Optimizer.state_dict`` has it, by name or number; None where there is none.

    Raises:
        CheckpointError: as :func:`sharded_weights`, or there are several optimisers.
    """
    index = read_index(file, wanted)
    found = [level for level in _levels(index.tree) if _is_nested(level) or _is_flat(level)]
    if not found:
        return None
    if len(found) > 1:
        raise CheckpointError(f"{file} holds {len(found)} optimizers; which of them trains this model?")
    content = index.loaded(found[0])
    try:
        return _nested(content) if _is_nested(content) else _unflattened(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} does not hold the state of a torch optimizer: {error!r}") from error


def _state_dict_in(index: Index) -> dict[str, str]:
    """Names of weights to keys: one level down, two, or at the top with other things beside them."""
    top = index.tree
    below = [level for level in top.values() if isinstance(level, dict)]
    found = [level[key] for level in below for key in STATE_DICT_KEYS if _is_state_dict(level.get(key), index)]
    plain = {name: key for name, key in top.items() if not isinstance(key, dict)}
    levels = [top.get(key) for key in STATE_DICT_KEYS] + (found or [plain])
    if not (named := [level for level in levels if _is_state_dict(level, index)]):
        raise CheckpointError(
            f"{index.file} holds {sorted(map(str, top))[:8]}, expected a state dict (names to tensors), alone or under "
            f"one of {STATE_DICT_KEYS}"
        )
    if len(named) > 1:
        raise CheckpointError(f"{index.file} holds {len(named)} models; save the one that was trained alone")
    return {str(name): key for name, key in named[0].items()}


def _is_state_dict(level: Any, index: Index) -> TypeGuard[Tree]:
    if not isinstance(level, dict) or not level:
        return False
    return all(isinstance(key, str) and key in index.layouts for key in level.values())


def _levels(tree: Tree, depth: int = 2) -> Iterator[Tree]:
    yield tree
    for below in tree.values() if depth else ():
        if isinstance(below, dict):
            yield from _levels(below, depth - 1)


def _is_nested(level: Tree) -> bool:
    return "param_groups" in level


def _is_flat(level: Tree) -> bool:
    return any(str(name).startswith("param_groups.") for name in level)


def _nested(content: Tree) -> dict[str, Any]:
    """Lists again, where the tree has numbers."""
    groups = content["param_groups"]
    groups = [groups[number] for number in sorted(groups)] if isinstance(groups, dict) else groups
    # The keys of what was saved have become text.
    numbers = {str(number): number for group in groups for number in group["params"]}
    return {
        "param_groups": groups,
        "state": {numbers.get(str(name), name): kept for name, kept in content.get("state", {}).items()},
    }


def _unflattened(content: Tree) -> dict[str, Any]:
    """A group for every parameter, from ``param_groups.<name>.lr`` and the like (``flatten_optimizer_state_dict``)."""
    parts: dict[str, dict[str, dict[str, Any]]] = {"param_groups": {}, "state": {}}
    for key, value in content.items():
        part, _, rest = str(key).partition(".")
        name, _, what = rest.rpartition(".")
        if part in parts:
            parts[part].setdefault(name, {})[what] = value
    groups = [settings | {"params": [name]} for name, settings in parts["param_groups"].items()]
    return {"param_groups": groups, "state": parts["state"]}
