"""What the training samples are, for someone who looks at them: images, texts, or rows of a table."""

from __future__ import annotations

import json

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.utils._pytree import tree_flatten

from stagewise.run.exemplars import images, label_of
from stagewise.task import Task

MOST = 2**25
"""Numbers or characters that are kept; of larger data only the samples that matter most are shown."""

_COLUMNS = 64


def described(task: Task) -> xr.Dataset:
    """The candidates of a task with their labels and, where they are not too many, with what they are.

    Returns:
        Along ``sample``: ``label``, and perhaps ``image``, ``row`` or ``text``, as in
        :class:`stagewise.results.Results`.
    """
    index = task.candidates.tolist()
    found = xr.Dataset({"label": ("sample", [label_of(task, k) for k in index])}, {"sample": index})
    if task.train_texts is not None:
        texts = [list(task.train_texts[k]) for k in index]
        if sum(map(len, (word for text in texts for word in text))) > MOST:
            return found
        return found.assign(text=("sample", [json.dumps(text) for text in texts]))
    first = _leaf(task, index[:1])
    if first is None or first[0].numel() * len(index) > MOST:
        return found
    if (pictures := images(task.train, index)) is not None:
        dims = ("sample", "height", "width", "channel")[: pictures.ndim]
        return found.assign(image=(dims, np.round(pictures * 255).astype(np.uint8)))
    if first.ndim == 2 and first.shape[1] <= _COLUMNS:
        rows = _leaf(task, index)
        return found if rows is None else found.assign(row=(("sample", "column"), rows.float().cpu().numpy()))
    return found


def _leaf(task: Task, index: list[int]) -> Tensor | None:
    """The first field of samples, if it holds real numbers."""
    leaf = tree_flatten(task.train.batch(torch.tensor(index)))[0][0]
    return leaf if isinstance(leaf, Tensor) and leaf.is_floating_point() else None
