"""A training run as an ordered sequence of checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from stagewise.checkpoint import Checkpoint, CheckpointError
from stagewise.notebook import listed, table
from stagewise.piece import Wanted

if TYPE_CHECKING:
    from stagewise.task import Task

_LONGEST = 10_000  # coming updates that are looked for: more than any window has

T = TypeVar("T")


@dataclass(frozen=True)
class Trajectory:
    """Ordered checkpoints of one training run, read one at a time.

    Attributes:
        steps: the recorded steps, ascending.
        load: reads the checkpoint of a step; raises ``CheckpointError`` with the reason if it cannot be used.
        load_rows: the same, reading of every tensor only the rows that are wanted, where the files allow that.

    Example:
        >>> import torch, stagewise as sw
        >>> model = torch.nn.Linear(4, 1)
        >>> run = sw.Trajectory.from_checkpoints(sw.Checkpoint(step, model.state_dict()) for step in (10, 0))
        >>> run.steps, run.load(10).step
        ((0, 10), 10)
    """

    steps: tuple[int, ...]
    load: Callable[[int], Checkpoint] = field(repr=False)
    load_rows: Callable[[int, Wanted], Checkpoint] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"steps must ascend without repeats, got {self.steps}")

    def _repr_html_(self) -> str:
        return table("Trajectory", [("checkpoints", len(self.steps)), ("steps", listed(self.steps))])

    @classmethod
    def from_checkpoints(cls, checkpoints: Iterable[Checkpoint]) -> Trajectory:
        """Checkpoints held in memory, e.g. from a short training run in a notebook.

        Raises:
            ValueError: two of the same step differ.
        """
        by_step: dict[int, Checkpoint] = {}
        for checkpoint in checkpoints:
            first = by_step.setdefault(checkpoint.step, checkpoint)
            if first is not checkpoint and first.digest != checkpoint.digest:
                raise ValueError(
                    f"two different checkpoints are of step {checkpoint.step}; one run has one at a step: keep one of "
                    "them, or make a trajectory of each run"
                )
        return cls(tuple(sorted(by_step)), partial(_recall, by_step))

    @classmethod
    def from_directory(
        cls, path: str | Path, *, clip_norm: float | None = None, batch_size: int | None = None
    ) -> Trajectory:
        """A folder of checkpoints, in one of the layouts of :mod:`stagewise.checkpoints.directory`.

        Args:
            path: the folder.
            clip_norm: for folders of a Hugging Face Trainer, of accelerate or of ``torch.distributed.checkpoint``, the
                norm to which the run clipped gradients, 0 if it did not. None: as ``training_args.bin`` in them says;
                where it is missing, the optimiser is not known. Checkpoints that stagewise recorded say it themselves.
            batch_size: samples per update, devices and accumulation counted, 0 for all, where the folder does not say.

        Raises:
            FileNotFoundError: the folder is missing, or holds no checkpoint.
            CheckpointError: the folder cannot be understood; when a checkpoint is read, it says another batch size.
            ValueError: ``clip_norm`` or ``batch_size`` is negative or not finite.
        """
        from stagewise.checkpoints.directory import scan

        if clip_norm is not None and not 0 <= clip_norm < math.inf:
            raise ValueError(f"clip_norm must be positive, or 0 for no clipping, got {clip_norm}")
        if batch_size is not None and batch_size < 0:
            raise ValueError(f"batch_size must be positive, or 0 for all samples, got {batch_size}")
        files = scan(Path(path).expanduser().absolute())  # it may be read elsewhere
        read = partial(_read, files, clip_norm, batch_size)
        return cls(tuple(files), read, read)

    @classmethod
    def from_hub(
        cls,
        repository: str,
        steps: Iterable[int] | None = None,
        revision: str = "step{step}",
        *,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Trajectory:
        """A run whose checkpoints are revisions of a repository on the Hugging Face Hub, as those of Pythia are.

        Weights are fetched when they are asked for, into the hub's own cache (``HF_HOME``), and under the model's own
        names once a task meets them. Published runs have no optimiser state: windows in training steps need it, see
        :func:`stagewise.estimated_second_moment`. A step whose file is that of another step in the cache is refused, as
        published runs have such steps; step 0 and step 1 may be equal.

        Args:
            repository: ``organisation/name``.
            steps: which; None lists the revisions of the repository, or without a network those of the cache.
            revision: how a step's branch or tag is called; ``*`` stands for anything, as in OLMo's
                ``"step{step}-tokens*"``, which is looked up among all revisions.
            cache_dir: the hub's cache, if it is elsewhere.
            local_files_only: use no network, as ``HF_HUB_OFFLINE=1`` does.

        Raises:
            ImportError: huggingface_hub is missing; it comes with ``stagewise[hf]``.
            ValueError: ``revision`` has no ``{step}``, or no step is asked for.
            CheckpointError: the revisions had to be listed and could not, or none is as asked for.

        Example:
            >>> import stagewise as sw
            >>> run = sw.Trajectory.from_hub("EleutherAI/pythia-14m", steps=[0, 512, 143000])
            >>> run.steps
            (0, 512, 143000)
        """
        from stagewise.checkpoints.hub import hub_run

        run = hub_run(repository, steps, revision, cache_dir, local_files_only)
        return cls(tuple(run.revisions), run.load)


def as_trajectory(source: Trajectory | str | Path) -> Trajectory:
    """A trajectory as it is, or that of a folder of checkpoints.

    Raises:
        TypeError: it is neither.
        FileNotFoundError: the folder is missing, or holds no checkpoint.
        CheckpointError: the folder cannot be understood.
    """
    if isinstance(source, Trajectory):
        return source
    if isinstance(source, str | Path):
        return Trajectory.from_directory(source)
    raise TypeError(
        f"expected a Trajectory or the path of a folder of checkpoints, got {type(source).__name__}; for checkpoints "
        "in memory use Trajectory.from_checkpoints([...])"
    )


# Functions of this module, so that a trajectory can be sent to worker processes.


def _recall(by_step: Mapping[int, Checkpoint], step: int) -> Checkpoint:
    return _followed(
        by_step[step],
        sorted(by_step),
        lambda later: by_step[later].learning_rates,
        lambda later: by_step[later].batches,
    )


def _batched(checkpoint: Checkpoint, batch_size: int | None) -> Checkpoint:
    """With a batch size that the checkpoint itself does not know."""
    optimizer = checkpoint.optimizer
    if optimizer is None or batch_size is None or optimizer.batch_size == batch_size:
        return checkpoint
    if optimizer.batch_size is not None:
        raise CheckpointError(
            f"the checkpoint at step {checkpoint.step} says that its updates used {optimizer.batch_size} samples, not "
            f"{batch_size}; leave out batch_size"
        )
    return checkpoint.holding(optimizer=replace(optimizer, batch_size=batch_size))


def _read(
    files: Mapping[int, Path], clip_norm: float | None, batch_size: int | None, step: int, wanted: Wanted | None = None
) -> Checkpoint:
    from stagewise.checkpoints.directory import read_batches, read_checkpoint, read_learning_rates

    if step not in files:
        raise KeyError(f"no checkpoint of step {step}; there are {sorted(files)}")
    return _followed(
        _batched(read_checkpoint(files[step], step, clip_norm, wanted), batch_size),
        sorted(files),
        lambda later: read_learning_rates(files[later]),
        lambda later: read_batches(files[later]),
    )


def _followed(
    checkpoint: Checkpoint,
    steps: Sequence[int],
    rates_of: Callable[[int], Sequence[float]],
    batches_of: Callable[[int], Sequence[Tensor]],
) -> Checkpoint:
    """The checkpoint with the learning rates and samples of the updates that follow."""
    rates, batches = _coming(checkpoint.step, steps, rates_of), _coming(checkpoint.step, steps, batches_of)
    held = checkpoint.optimizer.learning_rate if checkpoint.optimizer else None
    changing = not all(rate == held for rate in rates)
    if changing or batches:
        checkpoint = checkpoint.followed_by(
            rates if changing else checkpoint.coming_rates, batches or checkpoint.coming_batches
        )
    return _sized(checkpoint)


def _sized(checkpoint: Checkpoint) -> Checkpoint:
    """With the batch size that its recorded updates show, where nothing else says it."""
    known, optimizer = [*checkpoint.batches, *checkpoint.coming_batches], checkpoint.optimizer
    if optimizer is None or optimizer.batch_size is not None or not known:
        return checkpoint
    size = max(map(len, known))  # the last batch of an epoch may be smaller than the others
    return checkpoint.holding(optimizer=replace(optimizer, batch_size=size))


def _coming(step: int, steps: Sequence[int], made: Callable[[int], Sequence[T]]) -> list[T]:
    """One for each update after ``step``, as far as later checkpoints know, ``made(later)``, of those before them."""
    coming: list[T] = []
    for here, later in pairwise(later for later in steps if later >= step):
        if len(coming) >= _LONGEST or len(known := made(later)) < later - here:
            break
        coming += known[here - later :]
    return coming


def check_fits(task: Task, checkpoint: Checkpoint, source: str | Path = "") -> None:
    """Refuse a checkpoint that is not of the task's model.

    Raises:
        CheckpointError: parameters or buffers are missing, unknown, or have another shape.
    """
    try:
        task.fitted(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"{error} ({source})" if source else str(error)) from None
