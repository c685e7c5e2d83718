"""Scores of other tools as influence: whatever wrote them, negative = helpful."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xarray as xr

from stagewise.foreign import arrays, bergson, dattri
from stagewise.foreign.scores import Helpful, Scores
from stagewise.results import ARBITRARY

_SIGN = "negative = helpful: more weight on the training data lowers the query loss"


def read_scores(
    path: str | Path,
    *,
    helpful: Helpful | None = None,
    nats: bool = False,
    transpose: bool = False,
    train_ids: Sequence[str] | None = None,
    query_ids: Sequence[str] | None = None,
    trained: range | None = None,
) -> xr.DataArray:
    """Attribution scores of another tool as influence, negative = helpful.

    Nothing is unpickled: a file that asks for code to be run is refused.

    Args:
        path: a score folder of bergson 0.26 to 2.5 (``scores.bin``), one of dattri-llm 0.1 (``scores.pt`` and
            ``metadata.json``), or a file of one array: ``.npy``, TRAK's ``.mmap``, ``.npz``, ``.safetensors``, or a
            tensor in a ``.pt``.
        helpful: the sign of the score of a helpful sample, ``"positive"`` or ``"negative"``. Needed where files do not
            say: of arrays, and of bergson's MAGIC (negative). TRAK, TracIn and influence functions as most libraries
            write them are positive.
        nats: the scores are in nats per unit weight of one sample. Without it they have an arbitrary unit.
        transpose: the array is (query, train).
        train_ids: of dattri-llm, ``hash_sample`` of every training sample, in their order.
        query_ids: the same of the queries.
        trained: of dattri-llm, only what was scored of these training steps, e.g. ``range(1000, 1030)``. Default all.

    Returns:
        ``(train, query)``, float64: a row per training sample and a column per query, in the order of the tool's data.
        Coordinate ``train``, the samples' numbers, where the files say that not all were scored. Attributes ``tool``,
        ``source``, ``sign``, ``units``.

    Raises:
        ValueError: the format is not known or not whole, a score is not finite, the sign is not known or contradicts
            the files, or an option is not of this format.

    Example:
        >>> import tempfile, numpy as np, stagewise as sw
        >>> folder = tempfile.TemporaryDirectory()
        >>> np.save(f"{folder.name}/trak.npy", [[2.0, 0.0], [-1.0, 3.0], [0.5, 0.5]])
        >>> sw.read_scores(f"{folder.name}/trak.npy", helpful="positive").values.tolist()
        [[-2.0, -0.0], [1.0, -3.0], [-0.5, -0.5]]
        >>> folder.cleanup()
    """
    path = Path(path).expanduser()
    read = _read(path, transpose, train_ids, query_ids, trained)
    values = read.values if _sign(path, read, helpful) == "negative" else -read.values
    if not (finite := np.isfinite(values)).all():
        row, column = np.argwhere(~finite)[0].tolist()
        raise ValueError(
            f"{path}: {np.count_nonzero(~finite)} of {values.size} scores are not finite, the first at row {row}, "
            f"column {column}; score these samples again, or leave them out"
        )
    if not values.size:
        raise ValueError(f"{path}: expected scores (train, query), got shape {values.shape}")
    coords = {} if read.samples is None else {"train": list(read.samples)}
    units = "nats per unit weight" if nats else ARBITRARY
    attrs = {**read.about, "source": str(path), "sign": _SIGN, "units": units}
    return xr.DataArray(values, coords, ("train", "query"), "influence", attrs)


def _read(
    path: Path,
    transpose: bool,
    train_ids: Sequence[str] | None,
    query_ids: Sequence[str] | None,
    trained: range | None,
) -> Scores:
    of_hashes = train_ids is not None or query_ids is not None or trained is not None
    if (path / dattri.METADATA).is_file() and (path / dattri.SCORES).is_file():
        _refuse(transpose, path, "transpose", "an array in a file")
        return dattri.read_dattri(path, train_ids, query_ids, trained)
    _refuse(of_hashes, path, "train_ids, query_ids and trained", "a folder of dattri-llm")
    if (path / bergson.INFO).is_file() and (path / bergson.SCORES).is_file():
        _refuse(transpose, path, "transpose", "an array in a file")
        return bergson.read_bergson(path)
    if path.is_file() and path.suffix in arrays.SUFFIXES:
        return arrays.read_array(path, transpose)
    got = f"a folder of {sorted(p.name for p in path.iterdir())[:6]}" if path.is_dir() else "such a file"
    raise ValueError(
        f"{path}: expected a folder with {bergson.INFO} and {bergson.SCORES} (bergson) or {dattri.METADATA} and "
        f"{dattri.SCORES} (dattri-llm), or a file {', '.join(arrays.SUFFIXES)}, got "
        f"{got if path.exists() else 'nothing: there is no such path'}"
    )


def _refuse(given: bool, path: Path, option: str, what: str) -> None:
    if given:
        raise ValueError(f"{path}: {option} can be said of {what} only; leave it out")


def _sign(path: Path, read: Scores, helpful: Helpful | None) -> Helpful:
    if helpful not in (None, "positive", "negative"):
        raise ValueError(f"helpful must be 'positive' or 'negative', got {helpful!r}")
    if helpful is None and read.helpful is None:
        raise ValueError(
            f"{path} does not say whether helpful samples have positive or negative scores; say helpful='positive' "
            "(TRAK, TracIn, influence functions of most libraries) or 'negative' (bergson's MAGIC)"
        )
    if helpful and read.helpful and helpful != read.helpful:
        raise ValueError(f"{path} says that helpful is {read.helpful}, but {helpful} was given; leave it out")
    return helpful or read.helpful or "positive"
