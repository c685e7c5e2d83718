"""Saving checkpoints from inside a ``transformers.Trainer``."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stagewise.checkpoints.directory import make_folder
from stagewise.checkpoints.recorder import Recorder, check_steps
from stagewise.checkpoints.weights import reason_of

try:
    import accelerate  # noqa: F401
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        "recording from a Hugging Face Trainer needs transformers and accelerate: pip install 'stagewise[hf]'"
    ) from error


class RecorderCallback(TrainerCallback):
    """A :class:`~stagewise.checkpoints.recorder.Recorder` for ``Trainer(..., callbacks=[...])``.

    ``step`` is the Trainer's ``global_step``: optimiser updates, not micro-batches. Step 0 is the state when
    training begins. The Trainer moves its learning rate schedule on before the callback is called, so the
    learning rate of a checkpoint is that of the next update; at the end of a schedule that comes down to 0,
    that of the last update. The norm to which the Trainer clips gradients (1 by default) is recorded with it. Once
    training has begun nothing raises: what cannot be recorded is a warning.

    Only the first process writes, and it must hold the whole model: data-parallel training works, sharded
    training (FSDP, DeepSpeed ZeRO-3) does not.

    Args:
        directory: folder of the checkpoints, made if missing.
        steps: which steps to save: ``log_spaced``, ``linear`` or any integers.
        batch_size: samples per update; None takes it from the training arguments (devices and accumulation
            counted).

    Raises:
        ValueError: steps are empty, negative or repeated.
        CheckpointError: the folder cannot be written to.
    """

    def __init__(self, directory: str | Path, steps: Iterable[int], batch_size: int | None = None) -> None:
        self._directory = make_folder(directory)
        self._steps = check_steps(steps)
        self._batch_size = batch_size
        self._record: Recorder | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """Record the state before the first update, or the one that training resumes from."""
        if not state.is_world_process_zero:
            return
        try:
            batch_size = self._batch_size
            if batch_size is None:
                batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            model, optimizer = kwargs["model"], kwargs["optimizer"]
            clip_norm = args.max_grad_norm
            self._record = Recorder(self._directory, model, optimizer, self._steps, batch_size, clip_norm)
        except Exception as error:  # training must not end because somebody looks at it
            warnings.warn(f"nothing will be recorded: {reason_of(error)}", stacklevel=2)
            return
        self._record(state.global_step)

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Record the state after an update."""
        if self._record is not None:
            self._record(state.global_step)
