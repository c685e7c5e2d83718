"""What a notebook shows: objects as small tables, datasets as figures by ``data.sw.plot()``.

Matplotlib is imported when something is drawn.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INFLUENCE = {"step", "train", "query"}
_TWO_TIMES = {"trained", "asked", "train", "query"}
_KERNEL = {"step", "sample", "other"}
_MAP = {"step", "sample", "axis"}
_FEW = 8


def table(title: str, rows: Iterable[tuple[str, object]]) -> str:
    """Names and what they are, as HTML; the texts are escaped."""
    cell = '<td style="text-align:left;vertical-align:top">'
    body = "".join(
        f'<tr><th style="text-align:left;vertical-align:top">{escape(name)}</th>{cell}{escape(str(value))}</td></tr>'
        for name, value in rows
    )
    return f"<table><caption><b>{escape(title)}</b></caption><tbody>{body}</tbody></table>"


def listed(items: Iterable[Any]) -> str:
    """All of a few; of many the first ones, the last, and how many."""
    texts = [str(item) for item in items]
    if len(texts) <= _FEW:
        return ", ".join(texts) or "none"
    return f"{', '.join(texts[: _FEW - 2])}, ... {texts[-1]} ({len(texts)})"


@xr.register_dataset_accessor("sw")  # type: ignore[no-untyped-call]
class Drawn:
    """A dataset of stagewise as a figure; ``data.sw`` is there once stagewise has been imported.

    Example:
        >>> import numpy as np, stagewise as sw, xarray as xr
        >>> value = np.array([0.0, -2.0, 1.0, 3.0]).reshape(4, 1, 1)
        >>> dims = ("step", "train", "query")
        >>> influence = xr.Dataset(
        ...     {"value": (dims, value), "stderr": (dims, np.full_like(value, 0.1))},
        ...     {"step": [0, 10, 100, 1000], "train": ["cats"], "query": ["dogs"]},
        ... )
        >>> influence.sw.plot().savefig("cats-on-dogs.svg")
    """

    def __init__(self, data: xr.Dataset) -> None:
        self._data = data

    def plot(self, train: Any = None, query: Any = None) -> Figure:
        """The figure that a report would show of this dataset.

        * Influence ``(step, train, query)``: curves with 95 % bands, flips and peaks; steps left out are shaded.
        * Influence in two times ``(trained, asked, train, query)``: the triangle of one pair.
        * Diagnostics, of :func:`stagewise.diagnose_run`: what the verdicts rest on.
        * A loss kernel, or the map of one: the samples in a plane at every step.

        Args:
            train: influence of this train group alone. In two times: default the pair of different labels with the
                largest influence.
            query: influence on this query alone.

        Returns:
            A matplotlib figure, which a notebook shows; ``.savefig(path)`` writes it.

        Raises:
            ValueError: the dataset is none of these, there is no such label, or it has no train groups and queries.
        """
        data, draw = self._data, self._drawing()
        pair = {dim: label for dim, label in (("train", train), ("query", query)) if label is not None}
        if pair and "train" not in data.dims:
            raise ValueError(f"{' and '.join(pair)} can be chosen of influence only; this holds {_held(data)}")
        for dim, label in pair.items():
            if label not in (there := data[dim].values.tolist()):
                raise ValueError(f"no {dim} {label!r} among {listed(there)}")
            data = data.isel({dim: [there.index(label)]})
        # Events are those of all curves, whichever are shown: a choice made after looking must not find more of them.
        return draw(data, self._data) if draw is _curves else draw(data)

    def _drawing(self) -> Any:
        data = self._data
        if {"verdict", "chains_ok"} <= set(data.data_vars):
            return _diagnostics
        dims = set(data["value"].dims) if "value" in data else set()
        drawings: list[tuple[set[str], Any]] = [(_TWO_TIMES, _triangle), (_KERNEL, _kernel), (_MAP, _map)]
        if "stderr" in data:
            drawings.append((_INFLUENCE, _curves))
        for wanted, draw in drawings:
            if dims == wanted:
                return draw
        hint = "; of measured effects: sw.measured_influence(data).sw.plot()" if "effect" in data else ""
        raise ValueError(
            "plot draws influence (step, train, query) with its stderr, influence in two times, diagnostics, and loss "
            f"kernels or their maps; this holds {_held(data)}{hint}"
        )


def _held(data: xr.Dataset) -> str:
    return ", ".join(f"{name} {variable.dims}" for name, variable in data.data_vars.items()) or "nothing"


def _trusted(answered: Iterable[int], omitted: Iterable[int]) -> xr.DataArray:
    kept, left = set(answered), set(omitted)
    steps = sorted(kept | left)
    return xr.DataArray([step not in left for step in steps], {"step": steps}, ("step",))


def _curves(influence: xr.Dataset, whole: xr.Dataset) -> Figure:
    from stagewise.dynamics.events import events
    from stagewise.reporting.figures import influence_curves

    left_out = map(int, json.loads(influence.attrs.get("omitted", "{}")))
    trusted = _trusted(influence["step"].values.tolist(), left_out)
    return influence_curves(influence, events(whole), trusted)


def _triangle(influence: xr.Dataset) -> Figure:
    from stagewise.reporting.triangle_figure import time_triangle
    from stagewise.results import others

    size = abs(influence["value"]).fillna(0).max(["trained", "asked"]).transpose("train", "query").values
    row, column = np.unravel_index(np.where(others(influence), size, -1.0).argmax(), size.shape)
    return time_triangle(influence, influence["train"].values[row], influence["query"].values[column])


def _diagnostics(diagnostics: xr.Dataset) -> Figure:
    from stagewise.reporting.check_figures import chain_diagnostics
    from stagewise.traces.verdicts import UNTRUSTED

    steps, verdicts = diagnostics["step"].values.tolist(), diagnostics["verdict"].values.tolist()
    left_out = [step for step, verdict in zip(steps, verdicts, strict=True) if verdict in UNTRUSTED]
    return chain_diagnostics(diagnostics, _trusted(steps, left_out))


def _kernel(kernel: xr.Dataset) -> Figure:
    from stagewise.dynamics.kernel_map import influence_map

    return _map(influence_map(kernel))


def _map(positions: xr.Dataset) -> Figure:
    from stagewise.reporting.map_figure import sample_map

    if positions.sizes["axis"] != 2:
        raise ValueError(f"a map is drawn in a plane: expected 2 axes, got {positions.sizes['axis']}")
    if "label" not in positions.coords:
        positions = positions.assign_coords(label=("sample", ["samples"] * positions.sizes["sample"]))
    return sample_map(positions)
