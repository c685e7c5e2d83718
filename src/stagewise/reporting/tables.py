"""The tables of a report: rows of finished text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from stagewise.dynamics.events import Event
from stagewise.reporting import words
from stagewise.reporting.exemplar_figure import PER_SIDE, extremes
from stagewise.reporting.words import label_text, number, plus_minus, step_number
from stagewise.results import Exemplar, headline

_OPEN_ROWS = 25


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        title: what it shows.
        columns: headers.
        rows: cells, one per column.
        words: the columns that hold words and not numbers.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: frozenset[str] = frozenset()

    @property
    def folded(self) -> bool:
        """Whether it is too long to lie open on the page."""
        return len(self.rows) > _OPEN_ROWS


def events_table(events: Sequence[Event], title: str) -> Table:
    """When which curve flipped, peaked or set in, with the 95% interval of the step."""
    columns = ["Step", "95% interval", "Train group", "Query", "Event", "Influence"]
    rows = [
        [
            step_number(event.step),
            f"{step_number(event.lower)} – {step_number(event.upper)}",
            label_text(event.train),
            label_text(event.query),
            _happened(event),
            plus_minus(event.detail["value"], event.detail["stderr"]) if "value" in event.detail else "",
        ]
        for event in sorted(events, key=lambda event: event.step)
    ]
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return Table(title, columns, rows, frozenset({"Train group", "Query", "Event"}))


def _happened(event: Event) -> str:
    edge = " (perhaps outside the checkpoints)" if event.detail.get("at_edge") else ""
    if event.kind == "flip":
        return "turns helpful" if event.detail["sign"] < 0 else "turns harmful"
    if event.kind == "onset":
        return f"sets in, {'helpful' if event.detail['sign'] < 0 else 'harmful'}{edge}"
    return f"{event.kind}{edge}"


def agreement_table(
    agreements: Mapping[str, xr.Dataset], title: str = "Agreement with retraining at every checkpoint"
) -> Table:
    """Correlation and slope with what estimators are held against, per checkpoint and estimator."""
    rows = {int(step): [step_number(step)] for step in sorted({*_steps(agreements.values())})}
    columns = ["Step"]
    for k, (name, scores) in enumerate(agreements.items()):
        columns += [f"{label_text(name)}: correlation", f"{label_text(name)}: slope"]
        there = {*_steps([scores])}
        for step, row in rows.items():
            at = scores.sel(step=step) if step in there else None
            row += ["", ""] if at is None else [_score(at, score, k == 0) for score in ("correlation", "slope")]
    return Table(title, columns, list(rows.values()))


def _steps(datasets: Iterable[xr.Dataset]) -> Iterator[int]:
    return (int(step) for data in datasets for step in data["step"].values)


def _score(score: xr.Dataset, name: str, with_interval: bool) -> str:
    variable = headline(score, name)
    value, lower, upper = (words.score(score[variable + end].item()) for end in ("", "_lower", "_upper"))
    return f"{value} [{lower}, {upper}]" if with_interval else value


def diagnostics_table(diagnostics: xr.Dataset) -> Table:
    """The verdict on every checkpoint's chains, the numbers behind it, and what to change."""
    numbers = {"R\u2011hat": "rhat", "ESS": "ess_bulk", "Drift": "drift", "Even share": "even_share"}
    numbers = {title: name for title, name in numbers.items() if name in diagnostics}
    rows = []
    for k, step in enumerate(diagnostics["step"].values):
        at = diagnostics.isel(step=k)
        row = [step_number(step), str(at["verdict"].item()), _chains(at)]
        row += [number(float(at[name].item())) for name in numbers.values()]
        if "loss_rise" in at:
            error = float(at["loss_rise_stderr"].item()) if "loss_rise_stderr" in at else 0.0
            row.append(plus_minus(float(at["loss_rise"].item()), error))
        rows.append((*row, str(at["advice"].item())))
    rise = ("Loss rise (nats)",) if "loss_rise" in diagnostics else ()
    columns = ("Step", "Verdict", "Chains ok", *numbers, *rise, "Advice")
    return Table("Verdict on the chains of every checkpoint", columns, rows, frozenset({"Verdict", "Advice"}))


def _chains(at: xr.Dataset) -> str:
    if "chains_ok" not in at or "chains_failed" not in at:
        return ""
    good, failed = int(at["chains_ok"].item()), int(at["chains_failed"].item())
    return f"{good} of {good + failed}"


def exemplars_table(exemplars: Sequence[Exemplar]) -> Table:
    """The samples that mattered most for one query, where they are not images."""
    rows = [
        (
            step_number(exemplar.step),
            "most helpful" if exemplar.values[k] < 0 else "most harmful",
            label_text(exemplar.labels[k], 120),
            str(exemplar.samples[k]),
            plus_minus(float(exemplar.values[k]), float(exemplar.stderrs[k])),
        )
        for exemplar in sorted(exemplars, key=lambda exemplar: exemplar.step)
        for side in extremes(exemplar)
        for k in side
    ]
    columns = ("Step", "", "Training sample", "Index", "Influence (nats per unit weight)")
    title = f"Training samples that mattered most for {label_text(exemplars[0].query)}"
    return Table(title, columns, rows, frozenset({"", "Training sample"}))


def tokens_table(influence: xr.Dataset, whom: str) -> Table:
    """The single tokens that matter most for one query at every step; ``influence`` is ``(step, train)``."""
    rows = []
    for step in influence["step"].values.tolist():
        at = influence.sel(step=step)
        order = np.argsort(at["value"].values, kind="stable")
        for k in dict.fromkeys([*order[:PER_SIDE].tolist(), *order[::-1][:PER_SIDE].tolist()]):
            value, stderr = float(at["value"][k]), float(at["stderr"][k])
            sample, token = str(at["train"][k].item()).split("/")
            if value:
                side = "most helpful" if value < 0 else "most harmful"
                rows.append((step_number(step), side, sample, token, plus_minus(value, stderr)))
    columns = ("Step", "", "Training sample", "Token", "Influence (nats per unit weight)")
    return Table(f"Training tokens that mattered most for {label_text(whom)}", columns, rows, frozenset({""}))
