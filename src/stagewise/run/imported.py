"""Scores of other tools in a run folder: another estimator beside the run's own, which its reports judge.

``imported/NAME.json`` is influence of the run's train groups on its query groups at the steps that were imported, as
:func:`stagewise.run.folder.dataset_to_json` writes it. Running again leaves it as it is.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from stagewise.content import content_digest
from stagewise.groups import TRAIN, Groups, query_groups
from stagewise.identity import identity
from stagewise.labelled import Array, influence_dataset
from stagewise.reporting import words
from stagewise.results import ARBITRARY, BIF
from stagewise.run.config import load_config
from stagewise.run.estimators import NAMES
from stagewise.run.folder import dataset_from_json, dataset_to_json, load_results
from stagewise.run.task_file import load_task
from stagewise.task import Task
from stagewise.traces.files import explain_read, explain_write, write_text
from stagewise.traces.lock import run_lock
from stagewise.traces.store import RunMismatchError, TraceStore
from stagewise.varied import by_itself, varied

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9 ._+-]{0,38}[A-Za-z0-9+])?")
_OWN = {BIF, *NAMES.values()}
_SIDES = ("train", "query")
_ABOUT = ("tool", "source", "of training steps")


def import_scores(folder: str | Path, scores: xr.DataArray, *, name: str, step: int) -> xr.Dataset:
    """Put scores of single samples into a run folder as another estimator, which its reports then judge.

    A group's influence is the mean over its pairs of samples, a sample's effect on itself among them, as it is for
    :func:`stagewise.bif`. That is right where a score is of a sample's summed loss, or samples are of one length.

    Args:
        folder: of a run with results. Its task is loaded for the groups, and must be that of the run.
        scores: (train, query), negative = helpful, from :func:`stagewise.read_scores`. Columns are the samples of all
            query sets, one set after another in the order of the task, or the run's query groups in the order of
            its report. Rows are those of the whole training set, or of the candidates alone.
        name: what reports call the estimator.
        step: the checkpoint whose scores these are. Others of the same name can follow.

    Returns:
        ``value`` and ``stderr`` (0: unknown) (step, train, query) at all steps that ``name`` has now, in the unit of
        the scores, negative = helpful. ``imported/NAME.json`` in the folder holds them, and ``stagewise.report``
        shows how well they agree with retraining and with exact influence.

    Raises:
        RunFolderError: it is no run folder.
        FileNotFoundError: the run has not got as far as results.
        RunMismatchError: its task is of other data now.
        RunLockedError: a run is under way in the folder.
        ValueError: the scores do not fit the run, it has no such checkpoint, the name is taken, or groups are of
            tokens.

    Example:
        >>> np.save("scores.npy", np.eye(24, 16))
        >>> scores = sw.read_scores("scores.npy", helpful="positive")
        >>> sw.import_scores("runs/first", scores, name="TRAK", step=20).value.dims
        ('step', 'train', 'query')
    """
    store = TraceStore.read_only(os.path.expanduser(folder))
    losses = load_results(store.root)[0]["losses"]
    if not _NAME.fullmatch(name) or name.lower() in {own.lower() for own in _OWN}:
        raise ValueError(
            "name must be 1 to 40 letters, digits, spaces and . _ + -, with a letter or digit at both ends, and none "
            f"of {sorted(_OWN)}, got {name!r}"
        )
    if step not in losses["step"].values:
        raise ValueError(f"the run has no checkpoint at step {step}; it has {losses['step'].values.tolist()}")
    task = _task(store)
    if groups_digest(task) != losses.attrs.get("groups"):
        raise ValueError(
            f"the task's groups are not those of the results in {store.root}; run `stagewise run "
            f"{store.root / 'config.yaml'}` first"
        )
    checkpoint = json.loads(losses.attrs["checkpoints"]).get(str(step))
    added = _grouped(task, scores, step, checkpoint)
    with run_lock(store.root):
        before = imported(store.root)
        if like := [other for other in before if other != name and other.casefold() == name.casefold()]:
            raise ValueError(f"{like[0]} was imported before, in a file that {name} would share: choose another name")
        if (there := before.get(name)) is not None:
            added = _joined(there, added, name, store.root)
        with explain_write(store.root):
            (store.root / "imported").mkdir(exist_ok=True)
            write_text(_place(store.root, name), json.dumps(dataset_to_json(added)))
        store.push(f"imported/{name}.json")
    return added


def imported(root: Path) -> dict[str, xr.Dataset]:
    """What has been imported into a run folder, by name.

    Raises:
        RunFolderError: a file of it is damaged.
    """
    found = {}
    for path in sorted((root / "imported").glob("*.json")):
        with explain_read(root, f"imported/{path.name}"):
            found[path.name.removesuffix(".json")] = dataset_from_json(json.loads(path.read_text(encoding="utf-8")))
    return found


def groups_digest(task: Task) -> str:
    """Of who is in which group: labels and sizes may stay while members change."""
    return content_digest((task.train_groups, task.query_groups))


def fitting(root: Path, run: Mapping[Any, Any]) -> tuple[dict[str, xr.Dataset], list[str]]:
    """What has been imported for the groups and checkpoints that the run has now, and why the rest cannot be compared.

    Args:
        root: of the run folder.
        run: attributes of its ``losses``: ``groups`` and ``checkpoints`` as of now.
    """
    fit, notes, checkpoints = {}, [], json.loads(run.get("checkpoints", "{}"))
    for name, data in imported(root).items():
        again = f"delete imported/{name}.json and import it again."
        known = json.loads(data.attrs["imported"])
        same = [int(step) for step, about in known.items() if about.get("checkpoint") == checkpoints.get(step)]
        if data.attrs.get("groups") != run.get("groups"):
            notes.append(f"Without {name}: it was imported for other groups than the run has now; {again}")
        elif not same:
            notes.append(f"Without {name}: it was imported for other checkpoints than the run has now; {again}")
        else:
            fit[name] = data.sel(step=sorted(same))
            if gone := sorted(int(step) for step in known if int(step) not in same):
                notes.append(f"Without {name} at {words.steps(gone)}: other checkpoints now; {again}")
    return fit, notes


def _place(root: Path, name: str) -> Path:
    return root / "imported" / f"{name}.json"


def _task(store: TraceStore) -> Task:
    """The run's task, whose samples must still be those of the run: scores know them by their number alone.

    Raises:
        RunMismatchError: they are not.
    """
    config = load_config(store.root / "config.yaml")
    task = load_task(config.task, config.task_args)
    parts = identity(task)
    data = [part for part in {*parts, *store.identity} if part in ("training data", "candidates") or _is_data(part)]
    if differ := sorted(part for part in data if parts.get(part) != store.identity.get(part)):
        raise RunMismatchError(
            f"{store.root} is a run on other data than {config.task} gives now ({', '.join(differ)}): samples are "
            "known by their number, so scores cannot be told apart; bring back the data of the run"
        )
    return task


def _is_data(part: str) -> bool:
    return part.startswith("query '") or part.startswith('query "')


def _grouped(task: Task, scores: xr.DataArray, step: int, checkpoint: str | None) -> xr.Dataset:
    """Means over the pairs of samples of every train and every query group."""
    if {*scores.dims} != {*_SIDES}:
        raise ValueError(f"scores must have the dimensions train and query, got {[*scores.dims]}; see read_scores")
    trained, queried = varied(task, by_itself(task)), query_groups(task)
    if trained.widths or queried.widths:
        raise ValueError(
            "the run's groups are of tokens, and a sample has tokens of several: import into a run of samples"
        )
    scores = scores.transpose(*_SIDES).astype(np.float64)
    by_sample = torch.from_numpy(_of_samples(task, scores)).mT  # (query, sample)
    by_sample = trained.mean({TRAIN: by_sample})
    mean = _of_queries(task, queried, by_sample.mT)
    if not torch.isfinite(mean).all():
        raise ValueError("some scores are not finite; leave these samples out, or score them again")
    units = str(scores.attrs.get("units", ARBITRARY))
    about: dict[str, str | None] = {key: str(scores.attrs[key]) for key in _ABOUT if key in scores.attrs}
    by = "samples" if scores.sizes["query"] == sum(map(len, task.queries.values())) else "groups"
    about |= {"columns": by, "checkpoint": checkpoint}
    attrs = {"units": units, "groups": groups_digest(task), "imported": json.dumps({step: about})}
    found = influence_dataset(mean[None].numpy(), None, [step], trained, queried, attrs)
    for variable in found.data_vars.values():
        variable.attrs["units"] = units
    return found


def _of_samples(task: Task, scores: xr.DataArray) -> Array:
    """Rows of all training samples ``(sample, query)``; NaN where there are none, of which no group may have any.

    Raises:
        ValueError: rows are neither of the training set nor of the candidates.
    """
    n, rows, candidates = len(task.train), scores.sizes["train"], task.candidates.numpy()
    if "train" in scores.coords:
        index = scores["train"].values
    elif rows in (n, len(candidates)):
        index = np.arange(n) if rows == n else candidates
    else:
        of_candidates = "" if len(candidates) == n else f", or the {len(candidates)} candidates"
        raise ValueError(
            f"scores have {rows} rows, where the run has {n} training samples{of_candidates} (and "
            f"{sum(map(len, task.queries.values()))} query samples: transpose=True if rows are queries)"
        )
    if index.dtype.kind not in "iu" or not ((index >= 0) & (index < n)).all() or len(np.unique(index)) < rows:
        raise ValueError(
            f"train must number the rows of scores, each once, from 0 to {n - 1}, got {index[:6].tolist()}"
        )
    if missing := np.setdiff1d(candidates, index).tolist():
        raise ValueError(
            f"{len(missing)} of the run's {len(candidates)} candidates have no scores, the first of them sample "
            f"{missing[0]}; score them too"
        )
    found = np.full((n, scores.sizes["query"]), np.nan)
    found[index] = scores.values
    return found


def _of_queries(task: Task, queried: Groups, columns: torch.Tensor) -> torch.Tensor:
    """Means over query groups ``(..., group)``, of columns of all query samples or of the groups themselves.

    Raises:
        ValueError: columns are neither.
    """
    sizes, count = [len(data) for data in task.queries.values()], columns.shape[-1]
    if count == sum(sizes):
        return queried.mean(dict(zip(task.queries, torch.split(columns, sizes, -1), strict=True)))
    if count == len(queried):
        return columns
    of_sets = ", ".join(f"{size} of {name!r}" for name, size in zip(task.queries, sizes, strict=True))
    raise ValueError(
        f"scores have {count} columns, where the run has {sum(sizes)} query samples ({of_sets}) and {len(queried)} "
        f"query groups ({', '.join(queried.labels[:6])}): one for each of either is expected, in this order"
    )


def _joined(there: xr.Dataset, added: xr.Dataset, name: str, root: Path) -> xr.Dataset:
    """What has been imported before, with another step.

    Raises:
        ValueError: it has this step, or is of other groups or in another unit.
    """
    (step,), place = added["step"].values.tolist(), _place(root, name)
    if step in there["step"].values:
        raise ValueError(f"{name} of step {step} was imported before; choose another name, or delete {place} first")
    if there.attrs.get("groups") != added.attrs["groups"] or there.attrs["units"] != added.attrs["units"]:
        raise ValueError(
            f"{name} was imported before of other groups or in another unit ({there.attrs['units']}, now "
            f"{added.attrs['units']}); choose another name, or delete {place} first"
        )
    joined = xr.concat([there, added], "step", data_vars="minimal", coords="minimal", compat="override").sortby("step")
    both = json.loads(there.attrs["imported"]) | json.loads(added.attrs["imported"])
    return joined.assign_attrs(imported=json.dumps(both))
