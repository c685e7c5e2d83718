"""Saving checkpoints from a training loop."""

from __future__ import annotations

import operator
import sys
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stagewise.checkpoint import Checkpoint
from stagewise.checkpoints import optimizers
from stagewise.checkpoints.batches import Batches, sample_indices
from stagewise.checkpoints.directory import make_folder, write_checkpoint
from stagewise.checkpoints.models import names_of, state_of, unwrapped
from stagewise.checkpoints.snapshot import check_clip_norm, with_memory
from stagewise.checkpoints.updates import Updates, numbers, rates_of
from stagewise.checkpoints.weights import reason_of
from stagewise.checkpoints.when import check_steps
from stagewise.layers import acting_in_train_mode


class Recorder:
    """Saves the model, and all that its next update depends on, at chosen steps of any training loop.

    ``step`` is the number of updates made so far::

        record = Recorder("checkpoints", model, optimizer, steps=(0, *log_spaced(1000, 30)))
        record(0)
        for step, batch in enumerate(batches, start=1):
            ...                       # loss.backward(), optimizer.step(), scheduler.step()
            record(step)              # or record(step, indices), with the samples of the update

    Between the chosen steps a call costs next to nothing. The recorder only looks (at the optimiser by a hook in
    front of its ``step()``) and never changes the model, the optimiser's settings and memory or the state of a random
    generator, so a recorded run is the same run. A file of an earlier attempt at the same step is replaced. Once
    training has begun nothing stops it: what cannot be recorded (a full disk, an optimiser that has become another)
    is a warning, once of every kind.

    SGD (``momentum_buffer`` as first moment), Adam and AdamW (raw ``exp_avg`` and ``exp_avg_sq``) are recorded: which
    parameters they update, with which learning rates and weight decays; the moments of those that have had a gradient;
    how often Adam has updated a parameter, where that is not ``step``. An update rule that cannot be described
    leaves the weights alone, with a warning.

    The learning rate of a checkpoint is the optimiser's at the time of the call: after ``scheduler.step()``, that of
    the next update; where a schedule has come down to 0, that of the last update. ``Checkpoint.learning_rates`` are
    those the updates since the checkpoint before really had, wherever the scheduler is called.

    Which training samples an update used is recorded where the loop says so, ``record(step, indices)``: a tensor, array
    or list of their places in the training set, or the list of those of its micro-batches. ``Checkpoint.batches`` are
    those of the updates since the checkpoint before; where some came without, or calls were left out, none of them.
    Until the next checkpoint they take 8 bytes per sample and update.

    Args:
        directory: folder of the checkpoints, made if missing.
        model: the module, bare or in DataParallel, DistributedDataParallel or ``torch.compile``, whose prefixes are
            taken off the names; all of it in this process, not a shard.
        optimizer: the optimiser in use, or None to record weights alone.
        steps: which steps to save: :func:`log_spaced`, :func:`linear` or any integers.
        batch_size: samples per update (devices and accumulation counted), 0 for the whole training set, None if
            unknown.
        clip_norm: the norm to which the loop clips the gradient of all parameters together
            (``clip_grad_norm_(model.parameters(), clip_norm)``); None or 0 if it does not.

    Raises:
        ValueError: steps are empty, negative or repeated; ``clip_norm`` is negative or NaN.
        CheckpointError: the folder cannot be written to.

    Example:
        >>> import tempfile, torch, stagewise as sw
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        >>> folder = tempfile.TemporaryDirectory()
        >>> record = sw.Recorder(folder.name, model, optimizer, steps=sw.linear(10, every=5), batch_size=0)
        >>> record(0)
        >>> for step in range(1, 11):
        ...     optimizer.zero_grad()
        ...     model(torch.eye(4)).square().mean().backward()
        ...     optimizer.step()
        ...     record(step)
        >>> sw.Trajectory.from_directory(folder.name).steps
        (0, 5, 10)
        >>> folder.cleanup()
    """

    def __init__(
        self,
        directory: str | Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        steps: Iterable[int],
        batch_size: int | None = None,
        clip_norm: float | None = None,
    ) -> None:
        self._steps = check_steps(steps)
        self._last = max(self._steps)
        self._clip_norm = check_clip_norm(clip_norm)
        self._directory = make_folder(directory)
        self._model = unwrapped(model)
        self._optimizer = optimizers.unwrapped(optimizer)
        self._batch_size = batch_size
        self._updates = Updates(self._optimizer, self._model)
        self._batches = Batches()
        self._step: int | None = None  # of the last call
        self._made = 0  # updates seen until then
        self._first: int | None = None  # step of the first call
        self._saved: int | None = None  # step of the last checkpoint written
        self._warned: set[str] = set()
        self._is_recordable(names_of(self._model))

    def __call__(self, step: int, indices: Any = None) -> None:
        """Save if ``step``, the number of updates made so far, is one of the chosen ones.

        Args:
            step: number of updates made so far.
            indices: of the training samples that the last of them used ``(samples,)``, integers; or a sequence of
                those, one for every micro-batch. None: unknown.
        """
        try:
            number = operator.index(step)  # a tensor is never `in` a set of integers
        except TypeError:
            self._warn("step", f"expected the number of updates made so far, got {step!r}: nothing was recorded")
            return
        try:
            self._record(number, indices)
        except Exception as error:  # whatever it is, a run of days must not end because somebody looks at it
            self._warn(type(error).__name__, f"step {number} was not recorded: {reason_of(error)}")

    def _record(self, step: int, indices: Any) -> None:
        repeated = step == self._step == self._saved
        self._look_at_counts(step)
        self._step, self._made = step, self._updates.made
        self._first = step if self._first is None else self._first
        self._keep(step, indices)
        if step not in self._steps:
            return
        if repeated:
            self._warn("repeated", f"step {step} was recorded already; what was saved first stays")
            return
        write_checkpoint(self._directory, self._checkpoint(step))
        self._updates.restart(self._optimizer)
        self._batches.forget()
        self._saved = step

    def _keep(self, step: int, indices: Any) -> None:
        """Remember the samples of the update just made, if a checkpoint is to say them."""
        if indices is None or self._saved is None or step > self._last:
            return
        try:
            samples = sample_indices(indices)
        except Exception as error:  # then only the samples are not recorded
            self._warn("indices", f"the samples of the update to step {step} are taken for unknown: {error}")
            return
        if self._batch_size and len(samples) > self._batch_size:  # the last batch of an epoch may be smaller
            self._warn(
                "batch size",
                f"the update to step {step} used {len(samples)} samples, but batch_size is {self._batch_size}: it is "
                "the number of samples per update, accumulation counted",
            )
        self._batches.keep(step, samples)

    def _known_batches(self, step: int) -> tuple[Tensor, ...]:
        """The samples of the updates since the last checkpoint, empty where some are not known."""
        if self._saved is None:
            return ()
        since = range(self._saved + 1, step + 1)
        if (unknown := self._batches.gap(since)) is not None:
            self._warn(
                "batches",
                f"the samples of the update to step {unknown} were not given, so that none are recorded from step "
                f"{self._saved} to step {step}; give them at every call, record(step, indices)",
            )
        skipped = self._updates.watching and len(self._updates.rates) != len(since)
        return () if skipped else self._batches.of(since)

    def _look_at_counts(self, step: int) -> None:
        """Warn where steps and updates do not go together."""
        seen, expected = self._updates.made - self._made, step - (self._step or 0)
        if self._step is None:
            if seen > step:  # fewer may be: a run that was resumed
                self._warn("count", f"step {step} came after {seen} updates; step is the number of updates made so far")
        elif expected < 0:
            self._updates.restart(self._optimizer)
            self._batches.forget()
            self._saved = None
            self._warn("back", f"step {step} comes after step {self._step}: files of the same steps are replaced")
        elif seen != expected and self._updates.watching:
            self._warn(
                "count",
                f"from record({self._step}) to record({step}) the optimizer was seen to make {seen} updates, not "
                f"{expected}: step is the number of updates made so far (not of batches or epochs), and the optimizer "
                "the one in use. Learning rates and samples are not recorded where the numbers differ",
            )

    def _checkpoint(self, step: int) -> Checkpoint:
        """The state after ``step`` updates; weights alone where the optimiser cannot be recorded."""
        kinds = {*acting_in_train_mode(self._model), *self._updates.train_mode}
        batches = self._known_batches(step)
        bare = Checkpoint(step, state_of(self._model), train_mode=tuple(sorted(kinds)), batches=batches)
        names = names_of(self._model)
        if not self._is_recordable(names):
            return bare
        try:
            return self._with_optimizer(bare, names)
        except Exception as error:  # the weights are good all the same
            self._warn("state", f"the optimizer could not be recorded at step {step}, weights alone: {error!r}")
            return bare

    def _with_optimizer(self, checkpoint: Checkpoint, names: dict[Tensor, str]) -> Checkpoint:
        step, optimizer = checkpoint.step, self._optimizer
        rule = optimizers.describe(optimizer, names, self._rates(), self._batch_size, self._clip_norm)
        in_use = step == self._first or self._updates.made > 0
        known = with_memory(checkpoint, optimizer, names, rule, in_use)
        self._look_at_rule(step, max(optimizers.update_counts(optimizer, names).values(), default=None))
        since = () if self._saved is None else (step - self._saved, optimizers.group_sizes(optimizer, names))
        return replace(known, learning_rates=self._updates.learning_rates(*since) if since else ())

    def _rates(self) -> tuple[float, ...]:
        """By parameter group: of the next update; where a schedule has come down to 0, of the last."""
        now, last = numbers(rates_of(self._optimizer)), numbers(self._updates.last)
        return now if any(now) or len(last) != len(now) else last

    def _look_at_rule(self, step: int, counted: int | None) -> None:
        """Warn where a checkpoint is true and yet does not say all."""
        if counted is not None and abs(counted - step) == 1:
            self._warn(
                "off by one",
                f"the optimizer's own count of updates is {counted - step:+d} from the recorder's step {step}; pass "
                "the number of updates made so far, or batches will be taken for those of other updates",
            )
        if self._updates.moved():
            self._warn(
                "moved",
                f"the learning rate was changed between record({self._saved}) and the update after it, so that the one "
                "recorded with a checkpoint is not that of its next update; call scheduler.step() before the recorder. "
                "The rates that updates really had are recorded with the checkpoint after them",
            )
        for key in sorted(self._updates.varied):
            self._warn(
                key,
                f"{key} changes during this run: a checkpoint has that of its next update, and what repeats training "
                "from there keeps it, which this run did not",
            )

    def _is_recordable(self, names: dict[Tensor, str]) -> bool:
        """Whether the optimiser can be recorded; a warning says why not, or what is missing."""
        if self._optimizer is None:
            return False
        if reason := optimizers.why_unrecorded(self._optimizer, names):
            self._warn(
                "optimizer",
                f"{reason}: weights are recorded without the optimizer and its moments, so windows in training steps "
                "cannot be used on them",
            )
            return False
        if others := optimizers.foreign(self._optimizer, names):
            self._warn(
                "foreign",
                f"the optimizer also updates {others} parameters that are not this model's; they are not recorded, and "
                "what depends on them cannot be repeated",
            )
        return True

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            level, frame = 2, sys._getframe(1)
            while frame.f_back is not None and frame.f_code.co_filename == __file__:
                level, frame = level + 1, frame.f_back
            warnings.warn(message, stacklevel=level)
