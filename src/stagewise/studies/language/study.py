"""The study of a language model on real text: all experiments on one page, with the table of what they are held to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from stagewise.results import Results
from stagewise.run.progress import Progress, silent
from stagewise.studies.experiment import Experiment
from stagewise.studies.explored import first_run
from stagewise.studies.language.experiments.class_influence import class_influence
from stagewise.studies.language.experiments.stages import stages
from stagewise.studies.language.experiments.windows import windows
from stagewise.studies.language.influence import exact
from stagewise.studies.language.lab import Lab
from stagewise.studies.language.settings import FULL, Settings
from stagewise.studies.page import carry_out

TITLE = "A language model on Python's standard library: which kinds of tokens teach it what, and when"
EXPERIMENTS: tuple[Callable[[Lab], Experiment], ...] = (stages, windows, class_influence)


def study(
    folder: Path,
    progress: Progress = silent,
    settings: Settings = FULL,
    experiments: Sequence[Callable[[Lab], Experiment]] = EXPERIMENTS,
    page: Path | None = None,
) -> list[Experiment]:
    """Carry out all experiments and write the report; runs and results that ``folder`` holds are not made again.

    Args:
        folder: for checkpoints, results, ``checks.json`` and ``report.html``.
        progress: called with (what, done, in all).
        settings: how much is computed.
        experiments: what is carried out, in the order of the page.
        page: folder of ``checks.json`` and ``report.html``, if it is another.

    Raises:
        ValueError: the folder holds runs of other settings, or of another text.
    """
    whole = explored if experiments == EXPERIMENTS else None
    return carry_out(Lab(folder, settings, progress), TITLE, experiments, page or folder, whole)


def explored(lab: Lab) -> Results:
    """What there is to look around in: the first run."""
    seed = lab.seeds[0]
    return first_run(lab, TITLE, exact(lab, seed), lab.transitions(seed), False)
