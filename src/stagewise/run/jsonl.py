"""The training samples that matter most as JSON lines, as the attribution viewer of PAIR reads them.

One line per query and checkpoint (https://github.com/PAIR-code/pretraining-tda). A *proponent* is a helpful training
sample, an *opponent* a harmful one, each list beginning with the strongest. The viewer's scores are positive for
proponents: they are **minus** the influence of all other results, in nats per unit weight. Fields that the viewer does
not know: ``step``, ``window``, ``proponent_stderrs``, ``opponent_stderrs``, ``score``, and ``untrusted``: why the
chains that picked the samples cannot be trusted, if they cannot.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stagewise.influence.trusted import ReadOnce, untrusted
from stagewise.results import Exemplar
from stagewise.run import yaml12
from stagewise.run.attribution import check
from stagewise.run.exemplars import from_untrusted
from stagewise.run.folder import load_results
from stagewise.traces.files import write_text
from stagewise.traces.store import TraceStore

_SCORE = "minus influence, nats per unit weight"


def write_jsonl(folder: str | Path, path: str | Path, trusted_only: bool = True) -> int:
    """Write the training samples that matter most in a run folder, for PAIR's attribution viewer.

    Args:
        folder: of a run with results.
        path: the file, which appears or is replaced as a whole.
        trusted_only: name no samples that were picked by chains which cannot be trusted; the line says why.

    Returns:
        How many lines there are: one per query and checkpoint.

    Raises:
        RunFolderError: it is no run folder.
        FileNotFoundError: the run has not got as far as results.
        ValueError: there are no such samples, or a number of theirs is not finite.

    Example:
        >>> sw.write_jsonl("runs/first", "attributions.jsonl")
        6
    """
    traces = ReadOnce.of(TraceStore.read_only(folder))
    root = traces.root
    _, exemplars = load_results(root)
    if not exemplars:
        raise ValueError(f"{root} holds no single training samples; run it with the setting exemplars=6, for instance")
    window = yaml12.load((root / "config.yaml").read_text(encoding="utf-8"))["posterior"]["window"]
    reasons = untrusted(traces.verdicts)
    lines = []
    for exemplar in exemplars:
        doubt = {"untrusted": reasons[exemplar.step]} if from_untrusted(exemplar, reasons) else {}
        named = replace(exemplar, samples=[]) if doubt and trusted_only else exemplar
        lines.append(_line(_record(named, window) | doubt))
    write_text(Path(path).expanduser(), "\n".join(lines) + "\n")
    return len(lines)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Read attributions: our own, or what others publish for the viewer.

    Returns:
        One mapping per line, with what the file says: at least ``example_id``, ``inputs_plaintext``,
        ``targets_plaintext`` and ``proponents``. Scores have the sign of the file: ours are minus the influence.

    Raises:
        ValueError: a line is no such record, with its number and the field.

    Example:
        >>> _ = sw.write_jsonl("runs/first", "attributions.jsonl")
        >>> sorted({record["step"] for record in sw.read_jsonl("attributions.jsonl")})
        [5, 20, 40]
    """
    records = []
    text = Path(path).expanduser().read_text(encoding="utf-8")
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(check(json.loads(line, parse_constant=_not_finite)))
        except ValueError as error:
            raise ValueError(f"{path}: line {number}: {error}") from None
    return records


def _record(exemplar: Exemplar, window: int | None) -> dict[str, Any]:
    of_sample = dict(zip(exemplar.samples, range(len(exemplar.samples)), strict=True))  # one may be in both lists
    ranked = sorted(of_sample.values(), key=lambda k: exemplar.values[k])
    record: dict[str, Any] = {
        "example_id": f"{exemplar.query} at step {exemplar.step}",
        "inputs_plaintext": exemplar.query,
        "targets_plaintext": f"(step {exemplar.step})",
        "step": exemplar.step,
        "window": window,
        "score": _SCORE,
    }
    helpful = [k for k in ranked if exemplar.values[k] < 0]
    harmful = [k for k in reversed(ranked) if exemplar.values[k] > 0]
    for side, chosen in (("proponent", helpful), ("opponent", harmful)):
        record |= {
            f"{side}s": [_text(exemplar, k) for k in chosen],
            f"{side}_ids": [str(exemplar.samples[k]) for k in chosen],
            f"{side}_scores": [-exemplar.values[k] for k in chosen],
            f"{side}_stderrs": [exemplar.stderrs[k] for k in chosen],
        }
    if not all(map(math.isfinite, (*exemplar.values, *exemplar.stderrs))):
        raise ValueError(f"{record['example_id']}: the influence of a sample is not finite; it cannot be exported")
    return record


def _text(exemplar: Exemplar, k: int) -> str:
    words = "".join(exemplar.texts[k]) if exemplar.texts else exemplar.labels[k]
    return words or f"sample {exemplar.samples[k]}"


def _line(record: Mapping[str, Any]) -> str:
    """ASCII, on one line and without "<", so that no text of the data is anything but text wherever the line stands."""
    return json.dumps(record, allow_nan=False).replace("<", "\\u003c")


def _not_finite(name: str) -> float:
    raise ValueError(f"{name} is no number")
