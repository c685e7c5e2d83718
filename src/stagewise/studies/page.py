"""What all studies of several experiments write: their page, with the table of what they are held to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from stagewise.explorer.page import write_explorer
from stagewise.reporting.page import Page, Section, write_page
from stagewise.reporting.tables import Table
from stagewise.results import Results
from stagewise.run.folder import provenance
from stagewise.studies.experiment import Experiment
from stagewise.studies.runs import Runs

L = TypeVar("L", bound=Runs[Any])


def carry_out(
    lab: L,
    title: str,
    experiments: Sequence[Callable[[L], Experiment]],
    page: Path,
    explored: Callable[[L], Results] | None = None,
) -> list[Experiment]:
    """Carry out experiments on influence of tokens, and write the report.

    Args:
        lab: the runs; what its folder holds already is not made again.
        title: headline.
        experiments: what is carried out, in the order of the page.
        page: folder of the report.
        explored: what there is to look around in, made of what the experiments keep.
    """
    parts = []
    for done, experiment in enumerate(experiments, start=1):
        parts.append(experiment(lab))
        lab.progress("experiments", done, len(experiments))
    when = f"during the {lab.settings.window} training steps after a checkpoint"
    results = None if explored is None else explored(lab)
    write_study(page, title, when, parts, lab.settings.as_plain(), "token", results)
    return parts


def write_study(
    folder: Path,
    title: str,
    when: str,
    parts: Sequence[Experiment],
    settings: Mapping[str, Any],
    member: str = "sample",
    explored: Results | None = None,
) -> None:
    """Write ``checks.json``, ``report.html`` and, where there is something to look around in, ``explorer/``.

    Args:
        folder: is made if it is not there.
        title: headline.
        when: when the weight is changed in the definition of influence.
        parts: what the experiments have found, in the order of the page.
        settings: plain values.
        member: of what unit weight is.
        explored: what there is to look around in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checks = [check.as_plain() for part in parts for check in part.checks]
    text = json.dumps(checks, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "checks.json").write_text(text, encoding="utf-8")
    tables = [("What is claimed, and what is found here", claims_table(parts)), ("All checks", checks_table(parts))]
    sections = [*(part.section for part in parts), *(Section(name, [table]) for name, table in tables)]
    findings = [finding for part in parts for finding in part.findings]
    explorer = None if explored is None else write_explorer(explored, folder).relative_to(folder).as_posix()
    write_page(Page(title, when, findings, sections, settings, provenance(), member, explorer), folder)


def checks_table(parts: Sequence[Experiment]) -> Table:
    """Every number that the study is held to, or only reports."""
    verdict = {True: "yes", False: "no", None: ""}
    rows = [[c.what, c.text, c.target_text, verdict[c.reached]] for part in parts for c in part.checks]
    held = [c.reached for part in parts for c in part.checks if c.reached is not None]
    title = f"{sum(held)} of {len(held)} targets are reached; lines without a target are reported only"
    columns = ["What is compared", "Value", "Target", "Reached"]
    return Table(title, columns, rows, frozenset(columns))


def claims_table(parts: Sequence[Experiment]) -> Table:
    """What has been said about influence over training, beside the numbers of this study."""
    rows = [[claim.said, claim.found] for part in parts for claim in part.claims]
    columns = ["What has been claimed", "Here"]
    return Table("Claims about influence over training", columns, rows, frozenset(columns))
