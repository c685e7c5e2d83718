"""What a run folder holds beside its traces, and how it is read back.

config.yaml        the resolved configuration; `stagewise run` continues from it
provenance.json    versions and times
results/           everything the report shows that is not in the traces, as JSON
imported/          scores of other tools by name, as influence of groups; running again leaves them as they are
kept/              results of single checkpoints, from which a killed run goes on
report.html        the report, and figures/
"""

from __future__ import annotations

import base64
import json
import platform
import shutil
import zlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from stagewise.results import BIF, EXACT, Exemplar

# Arrays with more numbers than this are no longer written for a person to read.
_READABLE = 2**16

_PACKAGES = ("stagewise", "torch", "numpy", "scipy", "xarray", "zarr", "arviz-stats")


def provenance() -> dict[str, Any]:
    """Versions and the time, for the record."""
    return {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        **{package: version(package) for package in _PACKAGES},
    }


def save_results(folder: Path, datasets: Mapping[str, xr.Dataset], found: Sequence[Exemplar]) -> None:
    """Write datasets and exemplars; written aside first, then put in the place of older ones."""
    partial = folder / ".results-partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, dataset in datasets.items():
        (partial / f"{name}.json").write_text(json.dumps(dataset_to_json(dataset)), encoding="utf-8")
    (partial / "exemplars.json").write_text(json.dumps([_exemplar_to_json(e) for e in found]), encoding="utf-8")
    target = folder / "results"
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def load_results(folder: Path) -> tuple[dict[str, xr.Dataset], list[Exemplar]]:
    """Read what :func:`save_results` wrote.

    Raises:
        FileNotFoundError: the run has no results yet.
    """
    target = folder / "results"
    if not target.is_dir():
        raise FileNotFoundError(f"{folder} has no results yet; run `stagewise run {folder / 'config.yaml'}` first")
    datasets = {
        path.stem: dataset_from_json(json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(target.glob("*.json"))
        if path.stem != "exemplars"
    }
    stored = json.loads((target / "exemplars.json").read_text(encoding="utf-8"))
    usual = EXACT if f"baseline {EXACT}" in datasets else BIF  # of folders that do not say by which they were picked
    return datasets, [_exemplar_from_json({"estimator": usual} | entry) for entry in stored]


def dataset_to_json(dataset: xr.Dataset) -> dict[str, Any]:
    """Values as nested lists, with the type and shape that lists do not tell: of no rows, or of text.

    Many numbers, as of single samples and tokens, are their bytes instead (little-endian, zlib, base64).
    """
    content: dict[str, Any] = dataset.to_dict(data=False)
    for part in ("coords", "data_vars"):
        for name, entry in content[part].items():
            values = dataset[name].values
            entry["dtype"], entry["shape"] = str(values.dtype), list(values.shape)
            if values.size > _READABLE and values.dtype.kind in "biuf":
                entry["bytes"] = _packed(values)
            else:
                entry["data"] = values.tolist()
    return content


def _packed(values: NDArray[Any]) -> str:
    raw = values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
    return base64.b64encode(zlib.compress(raw, 1)).decode("ascii")


def dataset_from_json(content: Mapping[str, Any]) -> xr.Dataset:
    """What :func:`dataset_to_json` was given."""
    variables = {
        part: {name: _variable(entry) for name, entry in content[part].items()} for part in ("coords", "data_vars")
    }
    return xr.Dataset(variables["data_vars"], variables["coords"], content["attrs"])


def _variable(entry: Mapping[str, Any]) -> xr.Variable:
    kind = np.dtype(entry["dtype"])
    if "bytes" in entry:
        raw = bytearray(zlib.decompress(base64.b64decode(entry["bytes"])))
        values = np.frombuffer(raw, kind.newbyteorder("<")).astype(kind, copy=False)
    else:
        values = np.array(entry["data"], kind)
    values = values.reshape(entry["shape"])
    return xr.Variable(entry["dims"], values, entry["attrs"])


def _exemplar_to_json(exemplar: Exemplar) -> dict[str, Any]:
    images = None if exemplar.images is None else np.round(exemplar.images, 4).tolist()
    return vars(exemplar) | {"images": images}


def _exemplar_from_json(entry: Mapping[str, Any]) -> Exemplar:
    images = entry["images"]
    return Exemplar(**{**entry, "images": None if images is None else np.asarray(images)})
