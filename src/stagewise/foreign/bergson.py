"""Score stores of bergson (EleutherAI), as versions 0.26 to 2.5 write them.

    info.json       num_items, num_rows, num_scores, attribute_tokens, dtype: {names, formats, offsets, itemsize}
    scores.bin      one record per row: (score_0, written_0, score_1, written_1, ...), a column per query
    offsets.npy     where rows are tokens: those of document i are offsets[i] to offsets[i + 1]
    candidates.npy  where not all rows of the data set were scored: which were
    config.yaml     the command, with score_cfg.higher_is_better

What is missing: MAGIC writes no ``score_cfg``; its scores are derivatives of the query's loss, negative = helpful.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from stagewise.foreign.scores import Array, Helpful, Scores, read_json

INFO, SCORES = "info.json", "scores.bin"

_FORMATS = {"float16": "<f2", "float32": "<f4", "float64": "<f8", "bfloat16": "<u2"}  # NumPy has no bfloat16


def read_bergson(folder: Path) -> Scores:
    """The scores in a folder of bergson's; of tokens, the sum over each document's.

    Raises:
        ValueError: it is not in this format, not whole, or scoring has not finished.
    """
    info = read_json(folder / INFO)
    try:
        rows, columns = int(info["num_rows"]), int(info["num_scores"])
        kind = _kind(info["dtype"], columns)
        records = np.memmap(folder / SCORES, kind, "r")
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(
            f"{folder} cannot be read as scores of bergson 0.26 to 2.5 ({type(error).__name__}: {error})"
        ) from error
    if len(records) != rows:
        raise ValueError(f"{folder / SCORES} holds {len(records)} rows, where {INFO} says {rows}; copy it again")
    values = np.empty((rows, columns))
    for k in range(columns):
        missing = rows - int(np.count_nonzero(records[f"written_{k}"]))
        if missing:
            raise ValueError(
                f"{folder}: {missing} of {rows} scores of query {k} were never written; let bergson finish scoring"
            )
        values[:, k] = _numbers(records[f"score_{k}"], info["dtype"]["formats"][2 * k])
    if info.get("attribute_tokens"):
        values = _sums(values, _integers(folder / "offsets.npy"))
    candidates = folder / "candidates.npy"
    samples = _integers(candidates).tolist() if candidates.exists() else None
    if samples is not None and len(samples) != len(values):
        raise ValueError(f"{candidates} names {len(samples)} rows, where {SCORES} holds {len(values)}; copy it again")
    config = _config(folder)
    version = (config.get("metadata") or {}).get("bergson_version") or ""
    return Scores(values, samples, _helpful(config), {"tool": f"bergson {version}".strip()})


def _kind(dtype: dict[str, Any], columns: int) -> np.dtype[Any]:
    """The layout of a record: floats and flags, nothing else.

    Raises:
        ValueError: it is another.
    """
    names = [name for k in range(columns) for name in (f"score_{k}", f"written_{k}")]
    formats, flags = dtype["formats"][::2], dtype["formats"][1::2]
    if not columns or dtype["names"] != names or {*formats} - {*_FORMATS} or {*flags} != {"bool"}:
        raise ValueError(f"expected records of score_k and written_k, got {dtype['names'][:4]}, {dtype['formats'][:4]}")
    kinds = [_FORMATS.get(name, "?") for name in dtype["formats"]]
    return np.dtype({"names": names, "formats": kinds, "offsets": dtype["offsets"], "itemsize": dtype["itemsize"]})


def _numbers(column: np.ndarray[Any, Any], kind: str) -> Array:
    if kind == "bfloat16":  # the upper half of a float32
        column = (column.astype("<u4") << 16).view("<f4")
    return column.astype(np.float64)


def _sums(values: Array, offsets: np.ndarray[Any, Any]) -> Array:
    """Of each document's tokens."""
    if offsets[0] != 0 or offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
        raise ValueError(f"offsets.npy must lead from 0 to the {len(values)} rows of {SCORES}; copy it again")
    sums = np.zeros((len(offsets) - 1, values.shape[1]))
    np.add.at(sums, np.repeat(np.arange(len(sums)), np.diff(offsets)), values)
    return sums


def _integers(path: Path) -> np.ndarray[Any, Any]:
    try:
        numbers = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(numbers, np.ndarray) or numbers.ndim != 1 or numbers.dtype.kind not in "iu" or not len(numbers):
        raise ValueError(f"{path}: expected a row of whole numbers, got {getattr(numbers, 'shape', type(numbers))}")
    return numbers


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    if not path.exists():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        commands = [dict(command or {}) for step in content["steps"] for command in step.values()]
        [dict(command.get("score_cfg") or {}) for command in commands]
        dict(content.get("metadata") or {})
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as a configuration of bergson ({error})") from error
    return dict(content)


def _helpful(config: dict[str, Any]) -> Helpful | None:
    """As bergson itself reads it: of the first step that has a ``score_cfg``, where a missing field is its default."""
    for step in config.get("steps", []):
        for command in step.values():
            if (settings := (command or {}).get("score_cfg")) is not None:
                return "positive" if settings.get("higher_is_better", True) else "negative"
    return None
