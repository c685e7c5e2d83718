"""The doctor: whether the chains of a run can be trusted, and how far what they say is from what is exact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stagewise.influence.trusted import ReadOnce, untrusted
from stagewise.results import EXACT, FIRST_ORDER, headline, size_check
from stagewise.run.first_order import sampled_influence
from stagewise.run.folder import load_results
from stagewise.traces.store import TraceStore


@dataclass(frozen=True)
class Checkup:
    """The doctor's findings.

    Attributes:
        rows: words per checkpoint.
        advice: what to change.
        untrusted: the checkpoints whose chains cannot be trusted, and why.
        replay: whether retraining repeats the run.
    """

    rows: list[tuple[str, ...]]
    advice: list[str]
    untrusted: dict[int, str]
    replay: str = ""


def checkup(folder: str | Path) -> Checkup:
    """Verdict on the chains of every checkpoint of a run folder.

    Raises:
        RunFolderError: it is no run folder.
        ValueError: nothing has been sampled yet.
    """
    traces = ReadOnce.of(TraceStore.read_only(folder))
    verdicts, sizes = traces.diagnostics, _sizes(traces)
    rows, advice = [], []
    for step in verdicts["step"].values:
        one = verdicts.sel(step=step)
        numbers = [
            f"{float(one[name]):.3g}" if name in one and np.isfinite(float(one[name])) else "-"
            for name in ("rhat", "ess_bulk", "rhat_products", "ess_products", "loss_rise", "even_share")
        ]
        chains = f"{int(one['chains_ok'])}/{int(one['chains_ok']) + int(one['chains_failed'])}"
        rows.append((str(step), str(one["verdict"].item()), *numbers, chains, sizes.get(int(step), "-")))
        if text := str(one["advice"].item()):
            advice.append(f"step {step}: {text}")
    return Checkup(rows, advice, untrusted(traces.verdicts), _repeats(traces.root))


def _sizes(traces: ReadOnce) -> dict[int, str]:
    """Correlation and slope of exact on sampled influence, by step; empty where one of them was not computed."""
    try:
        datasets = load_results(traces.root)[0]
    except FileNotFoundError:
        return {}
    exact, sampled = datasets.get(f"baseline {EXACT}"), sampled_influence(traces, datasets.get(FIRST_ORDER))
    if exact is None or sampled is None:
        return {}
    scores = size_check(sampled, exact)
    pairs = zip(*(scores[headline(scores, name)].values for name in ("correlation", "slope")), strict=True)
    return {
        step: f"{r:.2f} / {slope:.2f}" for step, (r, slope) in zip(scores["step"].values.tolist(), pairs, strict=True)
    }


def _repeats(folder: Path) -> str:
    """What the replay of the run said; empty where nothing was retrained yet."""
    try:
        replay = load_results(folder)[0].get("replay")
    except FileNotFoundError:
        return ""
    return "" if replay is None else str(replay.attrs["verdict"])
