"""The hierarchy study: all experiments on one page, with the table of what they are held to."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from stagewise.reporting.page import Page, Section, write_page
from stagewise.reporting.tables import Table
from stagewise.run.folder import provenance
from stagewise.run.progress import Progress, silent
from stagewise.studies.hierarchy.experiment import Experiment
from stagewise.studies.hierarchy.experiments.adam import adam
from stagewise.studies.hierarchy.experiments.attribution import attribution
from stagewise.studies.hierarchy.experiments.learning import learning
from stagewise.studies.hierarchy.experiments.leaving_out import leaving_out
from stagewise.studies.hierarchy.experiments.localisation import localisation
from stagewise.studies.hierarchy.experiments.symmetry import symmetry
from stagewise.studies.hierarchy.experiments.transitions import transitions
from stagewise.studies.hierarchy.experiments.two_phases import two_phases
from stagewise.studies.hierarchy.experiments.two_times import two_times
from stagewise.studies.hierarchy.experiments.windows import windows
from stagewise.studies.hierarchy.lab import Lab
from stagewise.studies.hierarchy.settings import FULL, RATE, WINDOW, Settings

TITLE = "The semantic hierarchy: influence in a network that learns a tree of concepts"
EXPERIMENTS: tuple[Callable[[Lab], Experiment], ...] = (
    learning,
    windows,
    leaving_out,
    two_times,
    transitions,
    attribution,
    localisation,
    adam,
    symmetry,
    two_phases,
)


def study(
    folder: Path,
    progress: Progress = silent,
    settings: Settings = FULL,
    experiments: Sequence[Callable[[Lab], Experiment]] = EXPERIMENTS,
) -> list[Experiment]:
    """Carry out all experiments and write the report; what ``folder`` holds of sampled traces is not sampled again.

    Args:
        folder: for traces, ``checks.json`` and ``report.html``.
        progress: called with (what, done, in all).
        settings: how much is computed.
        experiments: what is carried out, in the order of the page.

    Raises:
        ValueError: the folder holds traces of another version or other settings of the study.
    """
    lab, parts = Lab(folder, settings, progress), []
    for done, experiment in enumerate(experiments, start=1):
        parts.append(experiment(lab))
        progress("experiments", done, len(experiments))
    folder.mkdir(parents=True, exist_ok=True)
    checks = [check.as_plain() for part in parts for check in part.checks]
    text = json.dumps(checks, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "checks.json").write_text(text, encoding="utf-8")
    write_page(_page(lab, parts), folder)
    return parts


def _page(lab: Lab, parts: Sequence[Experiment]) -> Page:
    settings = lab.settings.as_plain() | {
        "learning_rate_per_sample": RATE,
        "window": WINDOW,
        "checkpoints_sampled": lab.steps,
    }
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
    rows = [[c.what, c.text, c.target_text, verdict[c.reached]] for part in parts for c in part.checks]
    held = [c.reached for part in parts for c in part.checks if c.reached is not None]
    title = f"{sum(held)} of {len(held)} targets are reached; lines without a target are reported only"
    columns = ["What is compared", "Value", "Target", "Reached"]
    return Table(title, columns, rows, frozenset(columns))


def claims_table(parts: Sequence[Experiment]) -> Table:
    """What has been said about influence over training, beside the numbers of this network."""
    rows = [[claim.said, claim.found] for part in parts for claim in part.claims]
    columns = ["What has been claimed", "Here"]
    return Table("Claims about influence over training", columns, rows, frozenset(columns))
