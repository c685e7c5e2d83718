"""The hierarchy study: all experiments on one page, with the table of what they are held to."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from stagewise.reporting.page import Page, Section, write_page
from stagewise.reporting.tables import Table
from stagewise.run.folder import provenance
from stagewise.run.progress import Progress, silent
from stagewise.studies.hierarchy.adam import adam
from stagewise.studies.hierarchy.attribution import attribution
from stagewise.studies.hierarchy.lab import RATE, WINDOW, Experiment, Lab, Size
from stagewise.studies.hierarchy.learning import learning
from stagewise.studies.hierarchy.leaving_out import leaving_out
from stagewise.studies.hierarchy.localisation import localisation
from stagewise.studies.hierarchy.stages import stages
from stagewise.studies.hierarchy.symmetry import symmetry
from stagewise.studies.hierarchy.two_phases import two_phases
from stagewise.studies.hierarchy.windows import windows

TITLE = "The semantic hierarchy: influence in a network that learns a tree of concepts"
EXPERIMENTS: tuple[Callable[[Lab], Experiment], ...] = (
    learning,
    windows,
    leaving_out,
    stages,
    attribution,
    localisation,
    adam,
    symmetry,
    two_phases,
)


def study(folder: Path, progress: Progress = silent, size: Size | None = None) -> list[Experiment]:
    """Carry out all experiments and write the report; what ``folder`` holds of sampled traces is not sampled again.

    Args:
        folder: for traces, ``checks.json`` and ``report.html``.
        progress: called with (what, done, in all).
        size: how much is computed.

    Raises:
        ValueError: the folder holds traces of another version or size of the study.
    """
    lab, parts = Lab(folder, size, progress), []
    for done, experiment in enumerate(EXPERIMENTS, start=1):
        parts.append(experiment(lab))
        progress("experiments", done, len(EXPERIMENTS))
    folder.mkdir(parents=True, exist_ok=True)
    checks = [asdict(check) for part in parts for check in part.checks]
    (folder / "checks.json").write_text(json.dumps(checks, indent=1), encoding="utf-8")
    write_page(_page(lab, parts), folder)
    return parts


def _page(lab: Lab, parts: Sequence[Experiment]) -> Page:
    settings = asdict(lab.size) | {"learning_rate_per_sample": RATE, "window": WINDOW, "checkpoints_sampled": lab.steps}
    return Page(
        TITLE,
        f"during the {WINDOW} training steps after a checkpoint (or during what a figure says)",
        [finding for part in parts for finding in part.findings],
        [*(part.section for part in parts), Section("What is claimed, and what is found here", [claims_table(parts)]),
         Section("All checks", [checks_table(parts)])],
        settings,
        provenance(),
    )  # fmt: skip


def checks_table(parts: Sequence[Experiment]) -> Table:
    """Every number that the study is held to, or only reports."""
    verdict = {True: "yes", False: "no", None: ""}
    rows = [[c.what, c.value, c.target, verdict[c.reached]] for part in parts for c in part.checks]
    held = [c.reached for part in parts for c in part.checks if c.reached is not None]
    title = f"{sum(held)} of {len(held)} targets are reached; lines without a target are reported only"
    columns = ["What is compared", "Value", "Target", "Reached"]
    return Table(title, columns, rows, frozenset(columns))


def claims_table(parts: Sequence[Experiment]) -> Table:
    """What has been said about influence over training, beside the numbers of this network."""
    rows = [[claim.said, claim.found] for part in parts for claim in part.claims]
    columns = ["What has been claimed", "Here"]
    return Table("Claims about influence over training", columns, rows, frozenset(columns))
