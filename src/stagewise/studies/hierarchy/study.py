"""The hierarchy study: all experiments on one page, with the table of what they are held to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from stagewise.run.progress import Progress, silent
from stagewise.studies.experiment import Experiment
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
from stagewise.studies.page import write_study

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
    page: Path | None = None,
) -> list[Experiment]:
    """Carry out all experiments and write the report; what ``folder`` holds of sampled traces is not sampled again.

    Args:
        folder: for traces, ``checks.json`` and ``report.html``.
        progress: called with (what, done, in all).
        settings: how much is computed.
        experiments: what is carried out, in the order of the page.
        page: folder of ``checks.json`` and ``report.html``, if it is another.

    Raises:
        ValueError: the folder holds traces of another version or other settings of the study.
    """
    lab, parts = Lab(folder, settings, progress), []
    for done, experiment in enumerate(experiments, start=1):
        parts.append(experiment(lab))
        progress("experiments", done, len(experiments))
    when = f"during the {WINDOW} training steps after a checkpoint (or during what a figure says)"
    shown = settings.as_plain() | {"learning_rate_per_sample": RATE, "window": WINDOW, "checkpoints_sampled": lab.steps}
    write_study(page or folder, TITLE, when, parts, shown)
    return parts
