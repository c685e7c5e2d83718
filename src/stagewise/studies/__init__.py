"""Complete experiments: each trains its networks, measures, and writes a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from stagewise.run.progress import Progress

if TYPE_CHECKING:
    from stagewise.studies.experiment import Experiment

T = TypeVar("T")


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
        carry_out: does it in a folder; what the folder holds already is not sampled again. Of studies of several
            experiments, all of them, or those that are named.
        cost: predicts its cost, as text; nothing is sampled.
    """

    carry_out: Callable[[Path, Progress, Sequence[str]], Iterator[Outcome]]
    cost: Callable[[Path], Iterator[str]]


def _digits(folder: Path, progress: Progress, only: Sequence[str] = ()) -> Iterator[Outcome]:
    from stagewise.reporting.findings import findings
    from stagewise.run.pipeline import run
    from stagewise.studies.digits.study import study

    named((), only)
    for settings in study(folder):
        yield Outcome(settings.title, findings(run(settings, progress)), settings.folder / "report.html")


def _digits_cost(folder: Path) -> Iterator[str]:
    from stagewise.run.cost import estimate
    from stagewise.studies.digits.study import study

    for settings in study(folder):
        yield f"{settings.title}\n{estimate(settings).text()}"


def _hierarchy(folder: Path, progress: Progress, only: Sequence[str] = ()) -> Iterator[Outcome]:
    from stagewise.studies.hierarchy.study import EXPERIMENTS, TITLE, study

    with _one_thread():
        parts = study(folder, progress, experiments=named(EXPERIMENTS, only), page=_page(folder, only))
    yield _outcome(TITLE, parts, _page(folder, only))


def _hierarchy_cost(folder: Path) -> Iterator[str]:
    from stagewise.studies.hierarchy.cost import cost

    yield cost(folder)


def _induction(folder: Path, progress: Progress, only: Sequence[str] = ()) -> Iterator[Outcome]:
    from stagewise.studies.induction.study import EXPERIMENTS, TITLE, study

    with _one_thread():
        parts = study(folder, progress, experiments=named(EXPERIMENTS, only), page=_page(folder, only))
    yield _outcome(TITLE, parts, _page(folder, only))


def _induction_cost(_: Path) -> Iterator[str]:
    from stagewise.studies.induction.cost import cost

    with _one_thread():
        yield cost()


def _language(folder: Path, progress: Progress, only: Sequence[str] = ()) -> Iterator[Outcome]:
    import stagewise.checkpoints.huggingface  # noqa: F401  (says what to install)
    from stagewise.studies.language.study import EXPERIMENTS, TITLE, study

    with _one_thread():
        parts = study(folder, progress, experiments=named(EXPERIMENTS, only), page=_page(folder, only))
    yield _outcome(TITLE, parts, _page(folder, only))


def _language_cost(_: Path) -> Iterator[str]:
    import stagewise.checkpoints.huggingface  # noqa: F401
    from stagewise.studies.language.cost import cost

    with _one_thread():
        yield cost()


def named(experiments: Sequence[T], only: Sequence[str]) -> Sequence[T]:
    """The experiments of these names, in their own order; all if there are no names.

    Raises:
        ValueError: no experiment is called so.
    """
    there = {getattr(one, "__name__", ""): one for one in experiments}
    if unknown := [name for name in only if name not in there]:
        which = f"there are: {', '.join(there)}" if there else "this study is carried out whole"
        raise ValueError(f"there is no experiment {unknown[0]!r}; {which}")
    return [one for name, one in there.items() if name in only or not only]


def _page(folder: Path, only: Sequence[str]) -> Path:
    """Where the report goes: that of some experiments does not take the place of that of all."""
    return folder / "-".join(only)


def _outcome(title: str, parts: Sequence[Experiment], page: Path) -> Outcome:
    return Outcome(title, [finding for part in parts for finding in part.findings], page / "report.html")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors as small as those of the studies gain nothing from more threads, and beside other work lose much."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


STUDIES = {
    "digits": Study(_digits, _digits_cost),
    "hierarchy": Study(_hierarchy, _hierarchy_cost),
    "induction": Study(_induction, _induction_cost),
    "language": Study(_language, _language_cost),
}
