"""What a Hugging Face Trainer, or accelerate, saves of the optimiser beside the weights.

``optimizer.pt`` (``optimizer.bin`` of accelerate) has moments, counts, rates and decays by the number of a parameter;
the model gives them names, see :mod:`stagewise.numbered`. Sharded training writes shards instead, see
:mod:`stagewise.checkpoints.distributed`. ``trainer_state.json`` has the step, the batch and what was logged. The norm
to which gradients were clipped stands in ``training_args.bin`` alone, a pickle of classes that is never loaded: its
numbers are read off the list of its opcodes, which runs nothing.

Weights are good without an optimiser: what cannot be read, or has no words here, is a warning.
"""

from __future__ import annotations

import json
import math
import pickletools
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from stagewise.checkpoint import Checkpoint, CheckpointError, ParameterGroup
from stagewise.checkpoints import optimizers
from stagewise.checkpoints.distributed import sharded_optimizer
from stagewise.checkpoints.shards import METADATA
from stagewise.checkpoints.weights import load_tensors_only, reason_of, usable
from stagewise.numbered import place
from stagewise.piece import Wanted

_OPTIMIZERS = ("optimizer.pt", "optimizer.bin", f"optimizer_0/{METADATA}", METADATA)
_STATE, _SCHEDULE, _ARGUMENTS = "trainer_state.json", "scheduler.pt", "training_args.bin"

# What a group of torch's own must say and may say; others are of another optimiser.
_ADAM = {"params", "lr", "weight_decay", "betas", "eps", "amsgrad"}
_SGD = {"params", "lr", "weight_decay", "momentum", "dampening", "nesterov"}
_MAYBE = {"param_names", "initial_lr", "maximize", "foreach", "differentiable", "fused"}
_MAYBE_ADAM = _MAYBE | {"capturable", "decoupled_weight_decay"}
_ADAM_KEEPS = {"step", "exp_avg", "exp_avg_sq"}

_MEMO = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_TEXT = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE"}
_NUMBER = {"INT", "BININT", "BININT1", "BININT2", "LONG1", "FLOAT", "BINFLOAT"}


def with_optimizer(
    folder: Path, checkpoint: Checkpoint, clip_norm: float | None, wanted: Wanted | None = None
) -> Checkpoint:
    """The checkpoint with what the folder says of its optimiser, parameters by number; as it is where it says nothing.

    Args:
        folder: of one checkpoint.
        checkpoint: its weights.
        clip_norm: the norm to which gradients were clipped, 0: they were not; None: as ``training_args.bin`` says.
        wanted: which rows of sharded moments are read; default all.

    Raises:
        CheckpointError: the folder's own step is another than its name's.
    """
    state = _state(folder)
    if state.get("global_step", checkpoint.step) != checkpoint.step:
        raise CheckpointError(
            f"{folder} is called after step {checkpoint.step}, but its {_STATE} says {state['global_step']}; rename it"
        )
    files = [folder / name for name in _OPTIMIZERS if (folder / name).is_file()]
    if not files:
        return checkpoint
    try:
        return _with_optimizer(folder, files[0], checkpoint, clip_norm, state, wanted)
    except CheckpointError as error:
        warnings.warn(f"{error}. The checkpoint is used without its optimizer", stacklevel=2)
        return checkpoint


def logged_rates(folder: Path) -> tuple[float, ...]:
    """Learning rates of the last updates that led to a Trainer's checkpoint, as far back as each of them was logged.

    Some versions log the rate of the update just made, others that of the next one, which the schedule's own file has
    too. Where it cannot be told which, the rates that are the same either way are returned.
    """
    try:
        state, schedule = _state(folder), load_tensors_only(folder / _SCHEDULE)
        step, following = int(state["global_step"]), {float(rate) for rate in schedule["_last_lr"]}
        entries = [entry for entry in state["log_history"] if "learning_rate" in entry]
        logged = {int(entry["step"]): float(entry["learning_rate"]) for entry in entries}
    except (CheckpointError, KeyError, TypeError, ValueError):
        return ()
    if len(following) > 1:  # groups of their own: one rate does not tell them
        return ()
    known = [logged[s] for s in takewhile(logged.__contains__, range(step, 0, -1))]
    if known and known[0] in following:
        known = list(takewhile(following.__contains__, known))[1:]
    return tuple(reversed(known))


def _with_optimizer(
    folder: Path,
    file: Path,
    checkpoint: Checkpoint,
    clip_norm: float | None,
    state: Mapping[str, Any],
    wanted: Wanted | None,
) -> Checkpoint:
    own = file if file.parent == folder else file.parent
    if others := sorted(other.name for other in folder.glob(f"optimizer_*{own.suffix}") if other != own):
        raise CheckpointError(f"{folder} has {others[0]} beside {own.name}; which optimizer trains this model?")
    content = sharded_optimizer(file, wanted) if file.name == METADATA else load_tensors_only(file)
    if content is None:
        return checkpoint
    optimizer, names = _rebuilt(content, file, is_trainers=bool(state))
    if reason := optimizers.why_unrecorded(optimizer, names):
        raise CheckpointError(f"{file}: {reason}")
    known = _arguments(folder / _ARGUMENTS)
    clip_norm = known.get("max_grad_norm") if clip_norm is None else clip_norm
    if clip_norm is None:
        raise CheckpointError(
            f"{folder} does not say whether gradients were clipped; pass their norm, "
            "Trajectory.from_directory(..., clip_norm=1.0) as is the Trainer's default, or 0 if they were not"
        )
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    clipped = clip_norm if 0 < clip_norm < math.inf else None
    rule = optimizers.describe(optimizer, names, rates, _batch_size(folder, state, known), clipped)
    if not rule.groups:  # whether these are all of the model's, it will tell
        rule = replace(rule, groups=(ParameterGroup(tuple(names.values()), rule.learning_rate, rule.weight_decay),))
    counts = optimizers.update_counts(optimizer, names)
    return checkpoint.holding(
        optimizer=rule,
        first_moment=_usable(optimizers.moments(optimizer, names, "momentum_buffer", "exp_avg"), file),
        second_moment=_usable(optimizers.moments(optimizer, names, "exp_avg_sq"), file),
        update_counts={name: count for name, count in counts.items() if count != checkpoint.step},
        learning_rates=logged_rates(folder),
    )


def _rebuilt(content: Any, file: Path, is_trainers: bool) -> tuple[torch.optim.Optimizer, dict[Tensor, str]]:
    """A torch optimiser in the state of a file, with parameters that have a shape and no values, and their names."""
    try:
        groups, memory = content["param_groups"], content["state"]
        if not {number for group in groups for number in group["params"]} >= set(memory):
            raise CheckpointError(f"{file} remembers parameters that are in none of its groups")
        kind = _kind(groups, file, is_trainers)
        if kind is not SGD and (lacking := [n for n, kept in memory.items() if not set(kept) >= _ADAM_KEEPS]):
            raise CheckpointError(f"{file} lacks one of {', '.join(sorted(_ADAM_KEEPS))} of parameter {lacking[0]}")
        parameters = {number: _placeholder(memory.get(number, {})) for group in groups for number in group["params"]}
        optimizer = kind([{"params": [parameters[number] for number in group["params"]]} for group in groups], lr=0.0)
        names: dict[Tensor, str] = {}
        for index, (ours, theirs) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
            ours.update({key: value for key, value in theirs.items() if key != "params"})
            # Sharded training saves names in the place of numbers.
            places = [number if isinstance(number, str) else place(index, number) for number in theirs["params"]]
            names |= zip(ours["params"], theirs.get("param_names") or places, strict=True)
        optimizer.state.update({parameters[number]: dict(kept) for number, kept in memory.items()})
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file} does not hold the state of a torch optimizer: {error!r}") from error
    return optimizer, names


def _kind(groups: list[dict[str, Any]], file: Path, is_trainers: bool) -> type[SGD] | type[Adam]:
    keys = {key for group in groups for key in group}
    if all(_SGD <= set(group) <= _SGD | _MAYBE for group in groups):
        return SGD
    if not all(_ADAM <= set(group) <= _ADAM | _MAYBE_ADAM for group in groups):
        unknown = ", ".join(sorted(keys - _ADAM - _MAYBE_ADAM)[:3]) or "other settings"
        raise CheckpointError(f"{file} is none of torch's SGD, Adam and AdamW, it has {unknown}")
    if "decoupled_weight_decay" in keys:
        return Adam
    if not is_trainers and any(group["weight_decay"] for group in groups):
        raise CheckpointError(f"{file} does not say whether it is of Adam or AdamW, whose weight decay differs")
    return AdamW  # the one that the Trainer has


def _placeholder(kept: Mapping[str, Any]) -> nn.Parameter:
    """A parameter as one group of settings needs it, with the shape of what is remembered of it."""
    moments = [kept[key] for key in ("exp_avg", "momentum_buffer") if isinstance(kept.get(key), Tensor)]
    shape, dtype = (moments[0].shape, moments[0].dtype) if moments else ((0,), torch.float32)
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))


def _usable(moments: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    if other := next((type(tensor).__name__ for tensor in moments.values() if type(tensor) is not Tensor), None):
        raise CheckpointError(f"{file} keeps moments as {other}, not as plain numbers")
    return {name: usable(tensor, name, file) for name, tensor in moments.items()}


def _batch_size(folder: Path, state: Mapping[str, Any], known: Mapping[str, float]) -> int | None:
    """Samples per update, devices and accumulation counted; None where one of them is not known."""
    size, accumulated = state.get("train_batch_size"), known.get("gradient_accumulation_steps")
    processes = len(list(folder.glob("rng_state*.pth")))
    return int(size * accumulated * processes) if size and accumulated and processes else None


def _state(folder: Path) -> dict[str, Any]:
    if not (folder / _STATE).is_file():
        return {}
    try:
        return dict(json.loads((folder / _STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"cannot read {folder / _STATE}, is it damaged? {reason_of(error)}") from error


def _arguments(file: Path) -> dict[str, float]:
    """Numbers that follow their names in a pickle, as attributes do; those with one value only."""
    try:
        with zipfile.ZipFile(file) as archive:
            [name] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            listed = pickletools.genops(archive.read(name))
            plain = [(op.name, value) for op, value, _ in listed if op.name not in _MEMO]
    except (OSError, ValueError, zipfile.BadZipFile):
        return {}
    found: dict[str, set[float]] = {}
    for (kind, text), (after, value) in pairwise(plain):
        if kind in _TEXT and after in _NUMBER:
            found.setdefault(str(text), set()).add(float(str(value)))
    return {name: values.pop() for name, values in found.items() if len(values) == 1}
