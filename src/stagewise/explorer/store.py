"""Arrays and documents that a browser reads piece by piece: one Zarr folder without compression.

Numbers are little-endian float32, so that a browser needs no decoder. An influence ``(step, train, query)`` is one
piece where it is small. A large one is written in orders that make every question one short read:

by_query   (query, train, step), a piece is some training data of one query at all steps: curves
strongest  (step, row, query), the rows of the training data ``row`` that reach furthest at each step: a matrix
by_step    (step, query, train), a piece is all training data of one query or a few at one step: a ranking; only where
           a query has so many numbers that those at all steps are too long a read

Documents are JSON files beside the arrays.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
from scipy.spatial.distance import squareform

from stagewise.results import others

LARGE = 2**15
"""Numbers, at most, in an influence that is read as a whole: a first look has to be short."""

_TOGETHER = 2**14  # numbers, at most, in a piece of several queries
_CURVES = 64  # training samples whose curves are one piece
_STRONGEST = 64
_ORDERED = 512  # labels, at most, that are put next to those like them


class Store:
    """A folder that is written once.

    Args:
        folder: is made; must be empty or absent.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._root = zarr.create_group(store=str(folder), zarr_format=3)

    def attributes(self, path: str, values: Mapping[str, Any]) -> None:
        """Plain values, those of a group."""
        group = self._root.require_group(path) if path else self._root
        group.update_attributes(plain(values))  # attrs.update writes all of them again for each

    def array(
        self,
        path: str,
        values: NDArray[Any],
        piece: tuple[int, ...] | None = None,
        file: tuple[int, ...] | None = None,
    ) -> None:
        """An array as float32 or uint8; all of it is one piece, or pieces of a shape in files of a shape."""
        values = values if values.dtype == np.uint8 else np.asarray(values, dtype="<f4")
        whole = tuple(max(1, size) for size in values.shape)
        array = self._root.create_array(
            path,
            shape=values.shape,
            dtype=values.dtype,
            chunks=piece or whole,
            shards=file,
            compressors=None,
            config={"write_empty_chunks": True},  # a page from disk cannot tell what is 0 from what is not there
        )
        array[...] = values

    def document(self, path: str, values: Any) -> None:
        """Plain values as a JSON file."""
        target = self.folder / f"{path}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(plain(values), allow_nan=False), encoding="utf-8")

    def influence(self, path: str, influence: xr.Dataset, about: Mapping[str, Any]) -> dict[str, Any]:
        """Values and standard errors, with the labels in the group's attributes.

        Args:
            path: of the group.
            influence: ``value`` and perhaps ``stderr`` ``(step, train, query)``.
            about: further attributes.

        Returns:
            What a reader must know before it opens the group.
        """
        arrays = {
            n: influence[n].transpose("step", "train", "query").values for n in ("value", "stderr") if n in influence
        }
        value = arrays["value"]
        large = value.size > LARGE
        labels = {dim: influence[dim].values.tolist() for dim in ("step", "train", "query")}
        sizes = influence["train_size"].values.tolist() if "train_size" in influence.coords else None
        order = {"train": _alike(value.transpose(1, 0, 2)), "query": _alike(value.transpose(2, 0, 1))}
        own = [np.flatnonzero(~column) for column in others(influence).T]  # by query: groups of the same label
        attrs = {**about, **labels, "train_size": sizes, "order": order, "own": own}
        self.attributes(path, attrs)
        known = {"path": path, **about, "step": labels["step"], "large": large}
        if not large:
            for name, values in arrays.items():
                self.array(f"{path}/{name}", values)
            return known | {"by_step": False}
        by_step = value[:, :, 0].size > LARGE
        for name, values in arrays.items():
            self._by_query(f"{path}/by_query/{name}", values.transpose(2, 1, 0), in_parts=by_step)
            if by_step:
                self._by_step(f"{path}/by_step/{name}", values.transpose(0, 2, 1))
        self._strongest(path, arrays)
        return known | {"by_step": by_step}

    def _by_query(self, path: str, values: NDArray[Any], in_parts: bool) -> None:
        queries, trains, steps = values.shape
        if in_parts:
            self.array(path, values, (1, _CURVES, steps), (1, _multiple(trains, _CURVES), steps))
        else:
            few = max(1, min(queries, _TOGETHER // (trains * steps)))
            self.array(path, values, (few, trains, steps), (_multiple(queries, few), trains, steps))

    def _by_step(self, path: str, values: NDArray[Any]) -> None:
        _, queries, trains = values.shape
        few = max(1, min(queries, _TOGETHER // trains))
        self.array(path, values, (1, few, trains), (1, _multiple(queries, few), trains))

    def _strongest(self, path: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        reach = np.nan_to_num(np.abs(arrays["value"])).max(2)
        rows = np.sort(np.argsort(-reach, axis=1, kind="stable")[:, :_STRONGEST], axis=1)
        self.array(f"{path}/strongest/row", rows)
        for name, values in arrays.items():
            chosen = np.take_along_axis(values, rows[:, :, None], 1)
            self.array(f"{path}/strongest/{name}", chosen, (1, *chosen.shape[1:]))


def _multiple(size: int, part: int) -> int:
    """The size of whole parts."""
    return -(-size // part) * part


def plain(value: Any) -> Any:
    """As JSON knows it: numpy's numbers are Python's, what is not finite is None."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)


def _alike(rows: NDArray[Any]) -> list[int] | None:
    """An order in which rows that are alike over all of training stand side by side; None where there are too many."""
    if not 2 < len(rows) <= _ORDERED:
        return None
    flat = np.nan_to_num(rows.reshape(len(rows), -1))
    products = flat @ flat.T
    squares = np.diag(products)
    between = np.sqrt(np.maximum(0, squares[:, None] + squares - 2 * products).astype(float))
    distances = squareform(between, checks=False)
    return [int(k) for k in leaves_list(optimal_leaf_ordering(linkage(distances, "average"), distances))]
