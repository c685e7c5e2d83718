"""A checkpoint as the model needs it, whoever wrote it: its names, its device, nothing missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from stagewise.checkpoint import Checkpoint, CheckpointError, lifted
from stagewise.functional import PureModel

_WRAPPERS = ("module.", "_orig_mod.")


def fitted(model: PureModel, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint under the model's own names, on its device, in at least float32.

    Any name of a tied weight will do (several if they are equal), and the prefixes of ``torch.compile`` and data
    parallelism are taken off. Persistent buffers are required, others come from the model.

    Raises:
        CheckpointError: parameters or buffers are missing, unknown, or of another shape or a wider type.
    """
    where = f"checkpoint at step {checkpoint.step}"
    own = _own_names(model, checkpoint, where)
    for name, ours in own.items():
        _check_tensor(checkpoint.params[name], model.state[ours], name, where)
    _check_complete(model, set(own.values()), where)
    known = checkpoint.renamed(_remembered_names(model, checkpoint) | own)
    device = next(iter(model.state.values())).device
    params = {
        # what the checkpoint lacks is the model's own, which may change
        name: (known.params[name] if name in known.params else lifted(tensor)).to(device, _lifted_type(tensor))
        for name, tensor in model.state.items()
    }
    return known.holding(params=params)


def _own_names(model: PureModel, checkpoint: Checkpoint, where: str) -> dict[str, str]:
    """The checkpoint's names of the model's tensors, each tensor once, to ours."""
    bare = {name: _bare(name, model.canonical) for name in checkpoint.params}
    if unknown := [name for name, short in bare.items() if short not in model.canonical]:
        raise CheckpointError(f"{where} has {_some(unknown)}, which the model does not; is it of another model?")
    first: dict[str, str] = {}
    for name, short in bare.items():
        other = first.setdefault(model.canonical[short], name)
        if name != other and not torch.equal(checkpoint.params[name], checkpoint.params[other]):
            raise CheckpointError(
                f"{where}: {other!r} and {name!r} are one tensor of the model, but differ in the checkpoint; is it of "
                "a model whose weights are not tied?"
            )
    return {name: ours for ours, name in first.items()}


def _remembered_names(model: PureModel, checkpoint: Checkpoint) -> dict[str, str]:
    """The same for what the optimiser remembers, which may know a tied weight by another name."""
    names = [*checkpoint.first_moment, *checkpoint.second_moment, *checkpoint.update_counts]
    names += [name for group in checkpoint.optimizer.groups for name in group.names] if checkpoint.optimizer else []
    bare = {name: _bare(name, model.canonical) for name in names}
    return {name: model.canonical[short] for name, short in bare.items() if short in model.canonical}


def _check_tensor(tensor: Tensor, expected: Tensor, name: str, where: str) -> None:
    if tensor.shape != expected.shape:
        raise CheckpointError(
            f"{where}: {name!r} has shape {tuple(tensor.shape)}, the model expects {tuple(expected.shape)}"
        )
    widest = _lifted_type(expected)
    if torch.promote_types(tensor.dtype, widest) != widest:
        raise CheckpointError(
            f"{where}: {name!r} is {tensor.dtype}, the model's is {expected.dtype}; build the Task with a model of the "
            "checkpoint's type (e.g. model.double())"
        )


def _check_complete(model: PureModel, present: set[str], where: str) -> None:
    needed = [n for n, t in model.state.items() if n in model.persistent or isinstance(t, nn.Parameter)]
    if lacking := [name for name in needed if name not in present]:
        kind = "parameter" if isinstance(model.state[lacking[0]], nn.Parameter) else "buffer"
        raise CheckpointError(
            f"{where} lacks {kind} {_some(lacking)}; is it of another model? Save the whole model.state_dict(), in "
            "which running statistics are too"
        )


def _lifted_type(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype


def _bare(name: str, known: Mapping[str, str]) -> str:
    """The name without the wrappers' prefixes, wherever they stand, and without Lightning's in front."""
    for prefix in _WRAPPERS:
        if name not in known:
            name = name.replace(prefix, "")
    return name if name in known else name.removeprefix("model.")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
