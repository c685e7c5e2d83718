"""The study of in-context Markov chains: all experiments on one page, with the table of what they are held to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from stagewise.results import Results
from stagewise.run.progress import Progress, silent
from stagewise.studies.experiment import Experiment
from stagewise.studies.explored import first_run
from stagewise.studies.induction.experiments.class_influence import class_influence
from stagewise.studies.induction.experiments.intervention import intervention
from stagewise.studies.induction.experiments.observables import observables
from stagewise.studies.induction.experiments.stages import stages
from stagewise.studies.induction.experiments.two_times import between_bins, two_times
from stagewise.studies.induction.experiments.windows import windows
from stagewise.studies.induction.influence import exact
from stagewise.studies.induction.lab import Lab
from stagewise.studies.induction.settings import FULL, Settings
from stagewise.studies.page import carry_out

TITLE = "In-context Markov chains: which tokens teach a transformer induction, and when"
EXPERIMENTS: tuple[Callable[[Lab], Experiment], ...] = (
    stages,
    class_influence,
    observables,
    windows,
    two_times,
    intervention,
)


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
        ValueError: the folder holds runs of other settings.
    """
    whole = explored if experiments == EXPERIMENTS else None
    return carry_out(Lab(folder, settings, progress), TITLE, experiments, page or folder, whole)


def explored(lab: Lab) -> Results:
    """What there is to look around in: the first run."""
    seed = lab.seeds[0]
    transition = lab.transition(seed)
    stages = [] if transition is None else [transition]
    return first_run(lab, TITLE, exact(lab, seed), stages, False, between_bins(lab, seed))
