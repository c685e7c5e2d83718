"""By which numbers the task of kept results is known again, at every checkpoint that has some.

No hash of a task says all: what counts may be the state of an object. Cells of chains hold numbers of their own, see
:func:`stagewise.run.before.check_reusable`; these stand beside all other results, of whichever worker.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xarray as xr

from stagewise.checkpoints.trajectory import Trajectory
from stagewise.identity import Probe, changes, probe
from stagewise.run.before import no_longer
from stagewise.run.folder import dataset_from_json
from stagewise.run.kept import Kept
from stagewise.task import Task
from stagewise.traces.files import explain_read
from stagewise.traces.store import RunMismatchError

_NAME = "numbers of the task"
_SAMPLES = 64  # of every data set: what changes for one class of ten only is met


def vouch(kept: Kept, task: Task, trajectory: Trajectory, digests: Mapping[int, str]) -> None:
    """Hold the task against the one whose results are kept; where there are none yet, it is this one.

    Args:
        kept: results of a run.
        task: the task as it is now.
        trajectory: its checkpoints.
        digests: the content hash of every checkpoint to look at, by step.

    Raises:
        RunMismatchError: its losses or gradients are others.
    """
    for step, digest in digests.items():
        checkpoint = task.fitted(trajectory.load(step))
        numbers = (probe(task, checkpoint, rounded=rounded, samples=_SAMPLES) for rounded in (False, True))
        now = _dataset(step, *numbers)
        _check(kept.place, step, kept.get(_NAME, digest, now.copy), now)


def check_kept(kept: Kept, task: Task, trajectory: Trajectory, digests: Mapping[int, str]) -> None:
    """As :func:`vouch`, at the checkpoints of which something is kept."""
    vouch(kept, task, trajectory, {step: digest for step, digest in digests.items() if kept.has(_NAME, digest)})


def check_alike(first: Path, second: Path) -> None:
    """Refuse two files of kept results, of one name in two folders, by which the tasks of these differ."""
    if first.name.startswith(_NAME.replace(" ", "-")):
        known, now = (_read(path) for path in (first, second))
        _check(second.parent.parent, int(now.attrs["step"]), known, now)


def _dataset(step: int, numbers: Probe, rounded: Probe) -> xr.Dataset:
    parts = [part for part, values in numbers.items() for _ in values]
    columns = {
        name: ("number", np.array([value for values in of.values() for value in values]))
        for name, of in (("value", numbers), ("rounded", rounded))
    }
    return xr.Dataset(columns, {"part": ("number", parts)}, {"step": step})


def _probe(dataset: xr.Dataset, name: str) -> Probe:
    found: Probe = {}
    for part, value in zip(dataset["part"].values.tolist(), dataset[name].values.tolist(), strict=True):
        found.setdefault(part, []).append(value)
    return found


def _check(place: object, step: int, known: xr.Dataset, now: xr.Dataset) -> None:
    differ = changes(_probe(known, "value"), _probe(now, "value"), _probe(now, "rounded"))
    if differ:
        raise RunMismatchError(no_longer(place, step, {*differ}))


def _read(path: Path) -> xr.Dataset:
    with explain_read(path.parent.parent, f"{path.parent.name}/{path.name}"):
        return dataset_from_json(json.loads(path.read_text(encoding="utf-8")))
