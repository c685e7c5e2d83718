"""A folder of checkpoints: the one layout that is written, and the layouts that are read.

Written: ``step_00000042.safetensors``, one file per checkpoint, which appears complete or not at all. Its
tensors are named ``params/<name>``, ``first_moment/<name>``, ``second_moment/<name>``, ``learning_rates``, and
``batches/samples`` with ``batches/sizes`` (the samples of all updates since the checkpoint before in a row, and how
many each update used); its header holds the format, the step, the optimiser, the update counts and the layers in train
mode.

Read as well:

* state dicts: ``model_500.safetensors``, or ``.pt``, ``.pth``, ``.bin``, ``.ckpt`` from ``torch.save``, where the
  state dict may sit under ``model``, ``state_dict`` or ``model_state_dict``;
* Hugging Face: ``checkpoint-500/`` or ``step512/`` with ``model.safetensors`` or ``pytorch_model.bin`` inside, or their
  parts with an index, and what the Trainer or accelerate saved of the optimiser, see
  :mod:`stagewise.checkpoints.trainer`;
* sharded training: ``step_500/`` as ``torch.distributed.checkpoint`` writes it (``.metadata`` and ``.distcp`` files),
  or ``checkpoint-500/`` with ``pytorch_model_fsdp_0/`` and ``optimizer_0/`` of a Trainer or accelerate with FSDP, see
  :mod:`stagewise.checkpoints.distributed`.

The step is the integer behind ``step``, ``checkpoint``, ``ckpt``, ``iter`` or ``iteration`` in the name of the file or
subfolder, or the only integer there.

State dicts say nothing of the optimiser, so theirs is None and the moments are empty. Pickled files are read
as weights only: a file that would run code is refused.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stagewise.checkpoint import Checkpoint, CheckpointError, Optimizer, ParameterGroup
from stagewise.checkpoints.batches import is_packed, packed, unpacked
from stagewise.checkpoints.distributed import folder_of, sharded_weights
from stagewise.checkpoints.entries import step_of, weights_in
from stagewise.checkpoints.hub_cache import refuse_hub_cache
from stagewise.checkpoints.shards import METADATA
from stagewise.checkpoints.trainer import logged_rates, with_optimizer
from stagewise.checkpoints.weights import INSIDE_FOLDER, read_weights, reason_of
from stagewise.piece import Wanted

FORMAT = "stagewise-checkpoint-1"

_RATES = "learning_rates"

_LOOKED_FOR = (
    "step_00000042.safetensors, other .safetensors, .pt, .pth, .bin or .ckpt files with the step in their name, "
    "and subfolders such as checkpoint-500 or step512 with model.safetensors, pytorch_model.bin or the .metadata "
    "of shards"
)


def write_checkpoint(directory: str | Path, checkpoint: Checkpoint) -> Path:
    """Write one checkpoint, replacing any that this folder holds for the same step.

    The file is renamed into place when its bytes are on disk: a crash leaves the old file or the new one,
    never half of one. Tensors on any device are written, in their own dtype.

    Returns:
        The path of the file, ``directory/step_00000042.safetensors``.

    Raises:
        CheckpointError: the folder cannot be made or written to, or the disk is full.

    Example:
        >>> import tempfile, torch, stagewise as sw
        >>> folder = tempfile.TemporaryDirectory()
        >>> sw.write_checkpoint(folder.name, sw.Checkpoint(42, torch.nn.Linear(4, 1).state_dict())).name
        'step_00000042.safetensors'
        >>> sw.Trajectory.from_directory(folder.name).steps
        (42,)
        >>> folder.cleanup()
    """
    path = make_folder(directory) / f"step_{checkpoint.step:08d}.safetensors"
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    optimizer = checkpoint.optimizer and asdict(checkpoint.optimizer)
    metadata = {
        "format": FORMAT,
        "step": str(checkpoint.step),
        "optimizer": json.dumps(optimizer),
        "update_counts": json.dumps(dict(checkpoint.update_counts)),
        "train_mode": json.dumps(checkpoint.train_mode),
        "estimated": json.dumps(checkpoint.estimated),
    }
    try:
        partial.touch()
        mode = partial.stat().st_mode
        save_file(_to_tensors(checkpoint), partial, metadata)
        partial.chmod(mode)  # safetensors makes files that only their owner may read
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {reason_of(error)}") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_checkpoint(
    path: str | Path, step: int, clip_norm: float | None = None, wanted: Wanted | None = None
) -> Checkpoint:
    """Read one file found by :func:`scan`.

    Half precision becomes float32; other dtypes are kept bit for bit. Names that share one tensor in a
    ``torch.save`` file (tied weights) are kept once, under the first name, as ``Module.named_parameters``
    does.

    Args:
        path: the file.
        step: number of updates made before it was saved.
        clip_norm: the norm to which a Trainer's or a sharded run clipped gradients, 0 if it did not; None: as the
            folder says.
        wanted: which rows of tensors are read, of shards and of safetensors files; default all. Of other files all are.

    Raises:
        CheckpointError: the file is missing, damaged, not weights, of another step, or holds values that are
            not finite. Entries of minus infinity are let through: attention masks are kept as buffers full of
            them.
    """
    path = Path(path)
    if path.name == METADATA:
        sharded = Checkpoint(step, {}).holding(params=sharded_weights(path, wanted))  # not copied: nobody else has them
        return with_optimizer(folder_of(path), sharded, clip_norm, wanted)
    tensors, metadata = read_weights(path, wanted)
    if not metadata.get("format", "").startswith("stagewise-checkpoint"):
        checkpoint = Checkpoint(step, tensors)
        return with_optimizer(path.parent, checkpoint, clip_norm) if path.name in INSIDE_FOLDER else checkpoint
    checkpoint = _from_tensors(tensors, metadata, path)
    if checkpoint.step != step:
        raise CheckpointError(f"{path} holds step {checkpoint.step}, not {step}; was it renamed?")
    return checkpoint


def read_learning_rates(path: Path) -> tuple[float, ...]:
    """``learning_rates`` of one file found by :func:`scan`, without its weights; none where it has none."""
    if path.name in INSIDE_FOLDER:
        return logged_rates(path.parent)
    if path.name == METADATA:
        return logged_rates(folder_of(path))
    return tuple(rate for rates in _read_some(path, _RATES.__eq__).values() for rate in rates.tolist())


def read_batches(path: Path) -> tuple[Tensor, ...]:
    """``batches`` of one file found by :func:`scan`, without its weights; none where it has none."""
    try:
        return unpacked(_read_some(path, is_packed))
    except ValueError:
        return ()  # damaged: reading the checkpoint says so


def scan(path: str | Path) -> dict[int, Path]:
    """The checkpoint files of a folder by step, ascending; only names are looked at.

    Hidden and ``tmp-`` entries (writes that were cut off) and what trainers save beside the weights are
    passed over.

    Raises:
        FileNotFoundError: the folder is missing, or holds no checkpoint.
        CheckpointError: ``path`` is a file, a name has no step or several, two files have the same step, or a subfolder
            named like a checkpoint holds no weights.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no such folder of checkpoints: {path}")
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file, expected the folder that holds the checkpoints")
    refuse_hub_cache(path)
    files: dict[int, Path] = {}
    for entry, file in weights_in(path):
        step = step_of(entry)
        if step in files:
            raise CheckpointError(f"{files[step]} and {file} are both of step {step}; keep one")
        files[step] = file
    if not files:
        raise FileNotFoundError(f"no checkpoints in {path}; looked for {_LOOKED_FOR}")
    return dict(sorted(files.items()))


def make_folder(directory: str | Path) -> Path:
    """The folder, made if it is missing.

    Raises:
        CheckpointError: it cannot be made or written to, so that a run fails before its first step and not
            after.
    """
    path = Path(directory).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the folder {path}: {reason_of(error)}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise CheckpointError(f"cannot write checkpoints to {path}: permission denied")
    return path


def _read_some(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118
    except (OSError, SafetensorError):
        return {}  # of another kind, or damaged: reading the checkpoint says so


def _to_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    parts = {
        "params": checkpoint.params,
        "first_moment": checkpoint.first_moment,
        "second_moment": checkpoint.second_moment,
    }
    # A checkpoint holds copies, so that no two tensors share memory, which safetensors would refuse.
    named = {
        f"{part}/{name}": tensor.cpu().contiguous()
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }
    if checkpoint.learning_rates:  # as many as updates: too many for the header
        named[_RATES] = torch.tensor(checkpoint.learning_rates, dtype=torch.float64)
    return named | packed(checkpoint.batches)


def _from_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> Checkpoint:
    if metadata["format"] != FORMAT:
        raise CheckpointError(
            f"{path} is in the format {metadata['format']!r}, this version of stagewise reads {FORMAT!r}"
        )
    parts: dict[str, dict[str, Tensor]] = {"params": {}, "first_moment": {}, "second_moment": {}}
    rates: list[float] = []
    try:
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            if key == _RATES:
                rates = tensor.tolist()
            elif not is_packed(key):
                parts[part][name] = tensor
        fields = json.loads(metadata["optimizer"])
        return Checkpoint(
            int(metadata["step"]),
            parts["params"],
            _optimizer(fields) if fields else None,
            parts["first_moment"],
            parts["second_moment"],
            # Not in the files of early versions.
            update_counts=json.loads(metadata.get("update_counts", "{}")),
            train_mode=tuple(json.loads(metadata.get("train_mode", "[]"))),
            learning_rates=tuple(rates),
            batches=unpacked(tensors),
            estimated=json.loads(metadata.get("estimated", "false")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} claims the format {FORMAT} but does not follow it: {error!r}") from error


def _optimizer(fields: dict[str, Any]) -> Optimizer:
    groups = (ParameterGroup(**group | {"names": tuple(group["names"])}) for group in fields.get("groups", ()))
    return Optimizer(**fields | {"betas": tuple(fields["betas"]), "groups": tuple(groups)})


def _flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows keeps folders consistent by itself and cannot open them
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
