"""Which entries of a folder are checkpoints, and of which step: only names are looked at."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from stagewise.checkpoint import CheckpointError
from stagewise.checkpoints.distributed import SHARDED
from stagewise.checkpoints.shards import METADATA
from stagewise.checkpoints.weights import INSIDE_FOLDER

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# What trainers put beside the weights under the same suffixes.
_NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state\w*)\.(bin|pt|pth)")
# Folders of shards inside that of a checkpoint.
_INSIDE = re.compile(r"(pytorch_model_fsdp|optimizer)_\d+")
_TRAINERS = re.compile(r"checkpoint-\d+")
# One of several files of a checkpoint.
_PART = re.compile(r".*-\d+-of-\d+\.(safetensors|bin)")
# The word, any separator and the integer that is the step.
_STEP = re.compile(
    r"(?<![a-z])(?:global[-_]?)?(?:step|checkpoint|ckpt|iter(?:ation)?)s?[-_=. ]*([0-9]+)", re.IGNORECASE
)


def weights_in(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Every entry that carries a step in its name, with its file of weights: itself, or one inside.

    Raises:
        CheckpointError: a subfolder named like a checkpoint holds no weights, or a file is part of a checkpoint, or the
            folder itself is one.
    """
    entries = sorted(folder.iterdir())
    of_trainer = any(_TRAINERS.fullmatch(entry.name) for entry in entries)
    if not of_trainer and any((folder / name).is_file() for name in SHARDED):
        raise CheckpointError(
            f"{folder} is one checkpoint of sharded training; pass the folder that holds it, and give it a name with "
            "the step, e.g. step_500"
        )
    for entry in entries:
        if entry.name.startswith((".", "tmp-")) or _NOT_WEIGHTS.fullmatch(entry.name) or _INSIDE.fullmatch(entry.name):
            continue
        if of_trainer and (entry.name in INSIDE_FOLDER or _PART.fullmatch(entry.name)):
            continue  # the model that a Trainer saves when it is done, beside its checkpoints
        if entry.is_dir():
            inside = [entry / name for name in (*INSIDE_FOLDER, *SHARDED) if (entry / name).is_file()]
            if inside:
                yield entry, inside[0]
            elif re.fullmatch(r"(checkpoint|step)[-_]?\d+", entry.name):
                raise CheckpointError(
                    f"{entry} holds neither model.safetensors nor pytorch_model.bin, nor an index of their parts, "
                    f"nor the {METADATA} of shards, which is written last; "
                    "adapters are not read: save the whole model, or remove the folder"
                )
        elif _PART.fullmatch(entry.name):
            raise CheckpointError(
                f"{entry} is one part of a checkpoint; put all parts and their index into a folder with the step in "
                "its name, e.g. step_500, and pass the folder that holds it"
            )
        elif entry.suffix in _SUFFIXES:
            yield entry, entry


def step_of(entry: Path) -> int:
    """The step in the name of a file or folder.

    Raises:
        CheckpointError: there is none, or several could be meant.
    """
    suffix = entry.suffix if entry.suffix in _SUFFIXES else ""
    name = entry.name.removesuffix(suffix)
    integers = {int(number) for number in re.findall(r"[0-9]+", name)}
    steps = {int(number) for number in _STEP.findall(name)} or integers
    if len(steps) == 1:
        return steps.pop()
    if not integers:
        raise CheckpointError(
            f"{entry} has no step in its name; rename it to e.g. step_500{suffix}, or move it elsewhere"
        )
    raise CheckpointError(
        f"{entry} could be of step {' or '.join(map(str, sorted(steps)))}; rename it to e.g. "
        f"step_{max(steps)}{suffix}, so that one integer stands behind 'step', or move it elsewhere"
    )
