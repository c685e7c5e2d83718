"""Saving checkpoints from inside a ``transformers.Trainer``."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from stagewise.checkpoints.directory import make_folder
from stagewise.checkpoints.loader import DrawnBatches, watched
from stagewise.checkpoints.recorder import Recorder
from stagewise.checkpoints.weights import reason_of
from stagewise.checkpoints.when import check_steps

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

    The training samples of every update are recorded by themselves: their places in ``train_dataset``, accumulation and
    resumption counted. They are not known, and all else is recorded as before, where there are several processes, the
    data set is an ``IterableDataset``, a loader of one's own has no batch sampler or is not in order, or something else
    goes through the training loader while an epoch is under way.

    Only the first process writes, and it must hold the whole model: data-parallel training works, sharded
    training (FSDP, DeepSpeed ZeRO-3) does not; what the Trainer itself saves under FSDP is read by
    ``Trajectory.from_directory``.

    Args:
        directory: folder of the checkpoints, made if missing.
        steps: which steps to save: ``log_spaced``, ``linear`` or any integers.
        batch_size: samples per update; None takes it from the training arguments (devices and accumulation
            counted).

    Raises:
        ValueError: steps are empty, negative or repeated.
        CheckpointError: the folder cannot be written to.

    Example:
        >>> from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Trainer, TrainingArguments
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=5, **sizes))
        >>> rows = [{"input_ids": torch.arange(4), "labels": torch.arange(4)}] * 8
        >>> settings = TrainingArguments("trainer", max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True)
        >>> recorder = sw.RecorderCallback("checkpoints", steps=[0, 1, 2])
        >>> _ = Trainer(model, settings, train_dataset=rows, callbacks=[recorder]).train()  # doctest: +ELLIPSIS
        {'train_runtime': ...
        >>> sw.Trajectory.from_directory("checkpoints").steps
        (0, 1, 2)
    """

    def __init__(self, directory: str | Path, steps: Iterable[int], batch_size: int | None = None) -> None:
        self._directory = make_folder(directory)
        self._steps = check_steps(steps)
        self._batch_size = batch_size
        self._record: Recorder | None = None
        self._drawn: DrawnBatches | None = None
        self._micro_batches = 0  # done since the last update

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
        self._micro_batches, self._drawn = 0, None
        if args.world_size == 1:
            with suppress(Exception):  # a loader of another make: then batches are not known
                self._drawn = watched(kwargs["train_dataloader"])

    def on_epoch_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """A pass over the data begins."""
        if self._drawn is not None:
            self._drawn.begin()

    def on_substep_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """A micro-batch is done that no update follows yet."""
        self._micro_batches += 1

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """Record the state after an update."""
        count, self._micro_batches = self._micro_batches + 1, 0
        if self._record is None:
            return
        batches = None
        with suppress(Exception):  # a loader without a length
            batches = self._samples(state, len(kwargs["train_dataloader"]), count)
        self._record(state.global_step, batches)

    def _samples(self, state: TrainerState, length: int, count: int) -> list[Tensor] | None:
        """Those of the last ``count`` micro-batches in an epoch of ``length``."""
        if self._drawn is None or state.epoch is None:
            return None
        # The Trainer's own account of the epoch counts what a resumed run has skipped.
        place = round(state.epoch % 1 * length) or length
        return self._drawn.take(range(place - count, place))
