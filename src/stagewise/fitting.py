"""A checkpoint as the model needs it, whoever wrote it: its names, its device, nothing missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from stagewise.checkpoint import Checkpoint, CheckpointError, lifted
from stagewise.functional import WRAPPERS_OF_LAYERS, PureModel, without_wrappers
from stagewise.numbered import with_names
from stagewise.translation import is_of_transformers, translated


def fitted(model: PureModel, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint under the model's own names, on its device, in at least float32.

    Any name of a tied weight will do (several if they are equal), and the prefixes of ``torch.compile`` and data
    parallelism are taken off. Names in the files of transformers become those of its models. Persistent buffers are
    required, others come from the model.

    Raises:
        CheckpointError: parameters or buffers are missing, unknown, or of another shape or a wider type.
    """
    where = f"checkpoint at step {checkpoint.step}"
    if is_of_transformers(model.module):
        checkpoint = _translated(model, checkpoint, where)
    checkpoint = with_names(model.module, checkpoint)
    own = _own_names(model, checkpoint, where)
    remembered = _remembered_names(model, checkpoint, where)
    known = _parts(model, checkpoint.renamed(remembered | own))
    for name, ours in own.items():
        _check_tensor(known.params[ours], model.state[ours], name, where)
    _check_complete(model, set(own.values()), where)
    device = next(iter(model.state.values())).device
    params = {
        # what the checkpoint lacks is the model's own, which may change
        name: (known.params[name] if name in known.params else lifted(tensor)).to(device, _lifted_type(tensor))
        for name, tensor in model.state.items()
    }
    return known.holding(params=params)


def _parts(model: PureModel, known: Checkpoint) -> Checkpoint:
    """What of its tensors is here."""
    if not model.in_place:
        return known
    kinds = ("params", "first_moment", "second_moment")
    return known.holding(
        **{kind: {name: model.part(name, t) for name, t in getattr(known, kind).items()} for kind in kinds}
    )


def _translated(model: PureModel, checkpoint: Checkpoint, where: str) -> Checkpoint:
    """The checkpoint as transformers would read it, where its names are not the model's as they are."""
    known = [model.canonical.get(_bare(name, model.canonical)) for name in checkpoint.params]
    if None not in known and model.persistent <= set(known):
        return checkpoint
    names = [*checkpoint.params, *_remembered(checkpoint)]
    short = {name: _without_wrappers(name, model.canonical) for name in names}
    ours = translated(model.module, set(short.values()))
    target = {name: ours[short[name]] for name in names if short[name] in ours}
    _check_rotary(model, {name: t for name, t in checkpoint.params.items() if name not in target}, where)
    first: dict[str, str] = {}
    for name in checkpoint.params:
        other = first.setdefault(target.get(name, name), name)
        if not torch.equal(checkpoint.params[name], checkpoint.params[other]):
            raise CheckpointError(f"{where}: {other!r} and {name!r} are both {target[name]!r} of the model, but differ")
    return checkpoint.renamed(target)


def _check_rotary(model: PureModel, passed_over: Mapping[str, Tensor], where: str) -> None:
    """Frequencies come from the model's configuration, of which no shape of a weight says that it is the run's."""
    own = {tuple(tensor.shape) for name, tensor in model.state.items() if name.endswith("rotary_emb.inv_freq")}
    for name, tensor in passed_over.items():
        if own and name.endswith("rotary_emb.inv_freq") and tuple(tensor.shape) not in own:
            raise CheckpointError(
                f"{where}: {name!r} has {len(tensor)} rotary frequencies, the model {sorted(own)[0][0]}; is "
                "its configuration the run's (number of heads, rotary share)?"
            )


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


def _remembered_names(model: PureModel, checkpoint: Checkpoint, where: str) -> dict[str, str]:
    """The same for what the optimiser remembers, which may know a tied weight by another name."""
    bare = {name: _bare(name, model.canonical) for name in _remembered(checkpoint)}
    if unknown := [name for name, short in bare.items() if short not in model.canonical]:
        raise CheckpointError(f"{where}: its optimizer has {_some(unknown)}, which the model does not")
    return {name: model.canonical[short] for name, short in bare.items()}


def _remembered(checkpoint: Checkpoint) -> list[str]:
    names = [*checkpoint.first_moment, *checkpoint.second_moment, *checkpoint.update_counts]
    groups = checkpoint.optimizer.groups if checkpoint.optimizer else ()
    return names + [name for group in groups for name in group.names]


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
    name = _without_wrappers(name, known)
    return name if name in known else name.removeprefix("model.")


def _without_wrappers(name: str, known: Mapping[str, str]) -> str:
    for wrapper in (*WRAPPERS_OF_LAYERS, "module"):
        if name not in known:
            name = without_wrappers(name, [wrapper])
    return name


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
