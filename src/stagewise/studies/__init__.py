"""Complete experiments: each trains its networks, measures, and writes a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from stagewise.run.progress import Progress


@dataclass(frozen=True)
class Outcome:
    """What a part of a study has found.

    Attributes:
        title: headline.
        findings: a sentence or two each.
        report: the page.
    """

    title: str
    findings: list[str]
    report: Path


@dataclass(frozen=True)
class Study:
    """A study that can be named on the command line.

    Attributes:
        carry_out: does it in a folder; what the folder holds already is not sampled again.
        cost: predicts its cost, as text; nothing is sampled.
    """

    carry_out: Callable[[Path, Progress], Iterator[Outcome]]
    cost: Callable[[Path], Iterator[str]]


def _digits(folder: Path, progress: Progress) -> Iterator[Outcome]:
    from stagewise.reporting.findings import findings
    from stagewise.run.pipeline import run
    from stagewise.studies.digits.study import study

    for settings in study(folder):
        yield Outcome(settings.title, findings(run(settings, progress)), settings.out / "report.html")


def _digits_cost(folder: Path) -> Iterator[str]:
    from stagewise.run.cost import estimate
    from stagewise.studies.digits.study import study

    for settings in study(folder):
        yield f"{settings.title}\n{estimate(settings).text()}"


def _hierarchy(folder: Path, progress: Progress) -> Iterator[Outcome]:
    import torch

    from stagewise.studies.hierarchy.study import TITLE, study

    # Tensors this small gain nothing from more threads, and beside other work lose much.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        parts = study(folder, progress)
    finally:
        torch.set_num_threads(threads)
    yield Outcome(TITLE, [finding for part in parts for finding in part.findings], folder / "report.html")


def _hierarchy_cost(folder: Path) -> Iterator[str]:
    from stagewise.studies.hierarchy.cost import cost

    yield cost(folder)


STUDIES = {"digits": Study(_digits, _digits_cost), "hierarchy": Study(_hierarchy, _hierarchy_cost)}
