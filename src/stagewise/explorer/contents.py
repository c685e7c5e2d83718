"""What of a run's results a browser is given, and under which name."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from stagewise.dynamics.curves import critical, degrees
from stagewise.dynamics.events import Event, events
from stagewise.dynamics.stages import Transition, half_learnt
from stagewise.explorer.store import Store
from stagewise.results import ARBITRARY, EXACT, Exemplar, Results, headline, others
from stagewise.retraining.scores import LEVEL
from stagewise.traces.verdicts import MAX_EVEN_SHARE, MAX_RHAT, MIN_ESS_PER_CHAIN, UNTRUSTED

FORMAT = 1
"""Of the store; a page of another number says that it cannot read it."""

_TEXTS = 128  # samples whose texts are one document
_IMAGES = 2**14  # bytes, at most, of images that are one piece, unless one is larger
_SEARCHED = 2**16  # numbers in an influence, at most, of which events are looked for
_SCORES = ("correlation", "slope")


def write_store(results: Results, folder: Path) -> None:
    """Write all that the page shows; an older store is replaced as a whole.

    Args:
        results: of a run.
        folder: of the store, which appears when it is complete.
    """
    partial = folder.with_name(f".{folder.name}-partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    store = Store(partial)
    influences = [
        store.influence(f"influence/{k}", data, about) for k, (data, about) in enumerate(_influences(results))
    ]
    store.attributes("", _about(results) | {"influences": influences} | _parts(results, store))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _about(results: Results) -> dict[str, Any]:
    answered = results.answered
    window = None if answered is None else answered.attrs.get("window")
    return {
        "format": FORMAT,
        "id": uuid4().hex,
        "title": results.title,
        "window": window,
        "losses": {
            "step": results.losses["step"].values,
            "query": results.losses["query"].values,
            "train": results.losses["train"].values,
            "of": results.losses.attrs.get("train_samples"),
        },
        "stages": [
            _stage(query, stage)
            for query in results.losses["query"].values.tolist()
            for stage in half_learnt(results.losses, query)
        ]
        + [_stage(None, stage) for stage in results.stages],
        "omitted": {step: reason for step, reason in results.omitted.items() if reason.split(":")[0] in UNTRUSTED},
        "notes": list(results.notes),
        "configuration": results.config,
        "provenance": results.provenance,
    }


def _influences(results: Results) -> Iterator[tuple[xr.Dataset, dict[str, Any]]]:
    """The curves first, by the best estimator first, then what is of single samples or tokens beside them."""
    curves = list(results.estimators.items())
    seen = [data for _, data in curves]
    single = [(name, data) for name, data in results.single.items() if not any(data is other for other in seen)]
    of_groups = results.losses.attrs.get("curves", "group") == "group"
    for k, (name, data) in enumerate([*curves, *single]):
        if not data.sizes["step"]:
            continue
        is_curve = k < len(curves)
        member = "group" if is_curve and of_groups else _member(data)
        imported = "imported" in data.attrs
        known = results.events if data is results.answered else [] if imported else _events(data)
        yield (
            data,
            {
                "name": name,
                "rung": "imported" if imported else "exact" if name == EXACT else "estimated",
                "checked": is_curve and _checked(data, results.measured),
                "unit": data.attrs.get("units", "nats per unit weight"),
                "of": member,
                "events": [_event(event) for event in known],
                "reach": critical(1 - LEVEL, degrees(data)),
                "largest": _largest(data),
                "noisy": bool("stderr" in data and np.nan_to_num(data["stderr"].values).any()),
            },
        )


def _checked(curves: xr.Dataset, measured: xr.Dataset | None) -> bool:
    """Whether effects can be predicted by it, in nats, of the rows whose effects were measured."""
    if measured is None or curves.attrs.get("units") == ARBITRARY or "train_size" not in curves.coords:
        return False
    return {*curves["train"].values.tolist()} == {*measured["train"].values.tolist()}


def _largest(influence: xr.Dataset) -> float:
    """Where colours are fullest: the largest magnitude between different labels; a group's own influence dwarfs it."""
    sizes = np.nan_to_num(np.abs(influence["value"].transpose("step", "train", "query").values)).max(0)
    return float((sizes * others(influence)).max(initial=0.0)) or 1.0


def _member(influence: xr.Dataset) -> str:
    """Of rows that are no groups: samples are called "12", tokens "12/3"."""
    return "token" if all("/" in str(label) for label in influence["train"].values.tolist()) else "sample"


def _events(influence: xr.Dataset) -> list[Event]:
    if influence["value"].size > _SEARCHED or not np.isfinite(influence["value"].values).all():
        return []
    return events(influence)


def _event(event: Event) -> dict[str, Any]:
    return vars(event) | {"detail": dict(event.detail)}


def _stage(query: Any, stage: Transition) -> dict[str, Any]:
    return {"query": query, "name": stage.name, "step": stage.step, "lower": stage.lower, "upper": stage.upper}


def _parts(results: Results, store: Store) -> dict[str, Any]:
    """What not every run has."""
    parts: dict[str, Any] = {"agreements": _scores(results), "diagnostics": _diagnostics(results)}
    losses = results.losses["queries"].transpose("query", "step").values
    store.array("losses", losses, (1, losses.shape[1]), losses.shape)
    if results.measured is not None:
        parts["measured"] = _measured(results.measured, store)
    if results.replay is not None:
        parts["replay"] = results.replay.attrs.get("verdict")
    if results.in_two_times is not None:
        parts["two_times"] = _two_times(results.in_two_times, store)
    if results.positions is not None:
        parts["map"] = _map(results.positions, store)
    if results.draws is not None:
        store.array("draws", results.draws.transpose("step", "chain", "draw").values)
        parts["draws"] = {"step": results.draws["step"].values}
    if results.samples is not None:
        parts["samples"] = _samples(results.samples, store)
    _exemplars(results, store)
    return parts


def _scores(results: Results) -> list[dict[str, Any]]:
    """Agreement with retraining, and with the exact influence."""
    found = []
    for against, scores in (("retraining", results.agreements), (EXACT, results.size_checks)):
        for name, data in scores.items():
            columns = {kind: headline(data, kind) for kind in _SCORES}
            curves = {
                f"{kind}{end}": data[f"{column}{end}"].values
                for kind, column in columns.items()
                for end in ("", "_lower", "_upper")
            }
            found.append({"against": against, "name": name, "step": data["step"].values, **curves})
    return found


def _diagnostics(results: Results) -> dict[str, Any]:
    data = results.diagnostics
    columns = {name: data[name].values for name in data.data_vars if data[name].dims == ("step",)}
    limits = {"rhat": MAX_RHAT, "ess_bulk": MIN_ESS_PER_CHAIN, "even_share": MAX_EVEN_SHARE}
    return {"step": data["step"].values, "columns": columns, "limits": limits}


def _measured(measured: xr.Dataset, store: Store) -> dict[str, Any]:
    for name in ("effect", "effect_stderr"):
        if name in measured:
            store.array(f"measured/{name}", measured[name].transpose("step", "train", "query").values)
    labels = {dim: measured[dim].values for dim in ("step", "train", "query")}
    pairs = {"other": others(measured)}
    known = {name: measured.attrs[name] for name in ("weight", "window")}
    return labels | pairs | known | {"errors": "effect_stderr" in measured}


def _two_times(influence: xr.Dataset, store: Store) -> dict[str, Any]:
    value = influence["value"].transpose("train", "query", "asked", "trained").values
    store.array("two_times/value", value, (1, 1, *value.shape[2:]))
    dims = ("trained", "trained_stop", "asked", "train", "query")
    return {dim: influence[dim].values for dim in dims} | {"unit": "nats per unit weight in a bin"}


def _map(positions: xr.Dataset, store: Store) -> dict[str, Any]:
    """One piece for a step, and a document of all samples, which may be many."""
    values = positions["value"].transpose("step", "sample", "axis").values
    store.array("map/value", values, (1, *values.shape[1:]))
    names, label = np.unique(positions["label"].values.astype(str), return_inverse=True)
    share = positions["share"].transpose("step", "axis").values
    store.document("map/samples", {"names": names, "label": label, "sample": positions["sample"].values})
    reach = float(np.nan_to_num(np.abs(values)).max(initial=0.0))
    return {"step": positions["step"].values, "share": share, "reach": reach}


def _samples(samples: xr.Dataset, store: Store) -> dict[str, Any]:
    """What the training samples are: images, texts or rows of a table; their names are a document."""
    store.document("samples/names", {"sample": samples["sample"].values, "label": samples["label"].values})
    about: dict[str, Any] = {}
    if "image" in samples:
        image = samples["image"].values
        together = min(len(image), max(1, _IMAGES // image[0].size))
        store.array("samples/image", image, (together, *image.shape[1:]))
        about["image"] = image.shape[1:]
    if "row" in samples:
        store.array("samples/row", samples["row"].values)
        about["row"] = samples["row"].sizes["column"]
    if "text" in samples:
        texts = [json.loads(text) for text in samples["text"].values.tolist()]
        for k in range(0, len(texts), _TEXTS):
            store.document(f"samples/text/{k // _TEXTS}", texts[k : k + _TEXTS])
        about["text"] = _TEXTS
    return about


def _exemplars(results: Results, store: Store) -> None:
    listed = []
    for k, exemplar in enumerate(results.exemplars):
        store.document(f"exemplars/{k}", _exemplar(exemplar))
        listed.append({"query": exemplar.query, "step": exemplar.step, "estimator": exemplar.estimator, "document": k})
    store.document("exemplars", listed)


def _exemplar(exemplar: Exemplar) -> dict[str, Any]:
    images = None if exemplar.images is None else [_packed(image) for image in exemplar.images]
    known = {name: getattr(exemplar, name) for name in ("samples", "labels", "values", "stderrs", "texts")}
    return known | {"token_values": exemplar.token_values, "images": images}


def _packed(image: NDArray[Any]) -> dict[str, Any]:
    values = np.clip(np.asarray(image) * 255, 0, 255).round().astype(np.uint8)
    return {"shape": values.shape, "bytes": base64.b64encode(values.tobytes()).decode("ascii")}
