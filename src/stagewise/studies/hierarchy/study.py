"""The hierarchy study: all experiments on one page, with the table of what they are held to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import xarray as xr

from stagewise.dynamics.events import events
from stagewise.influence.damped import damped_influence
from stagewise.influence.trusted import NoTrustedCheckpointError
from stagewise.results import DAMPED, EXACT, Results
from stagewise.retraining.window_influence import window_influence
from stagewise.run.analysis import mean_losses
from stagewise.run.folder import provenance
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
from stagewise.traces.diagnostics import diagnose_run
from stagewise.traces.draws import mean_losses_of_draws

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
    whole = experiments == EXPERIMENTS
    write_study(page or folder, TITLE, when, parts, shown, explored=explored(lab) if whole else None)
    return parts


def _sampled(lab: Lab) -> xr.Dataset | None:
    """None where no chains can be trusted; experiments that need them say so themselves."""
    try:
        return lab.sampled_windows
    except NoTrustedCheckpointError:
        return None


def explored(lab: Lab) -> Results:
    """What there is to look around in: the aligned run."""
    run = lab.aligned
    solved = damped_influence(run.task, run.trajectory, lab.window_posterior, curvature="exact")
    exact = window_influence(run.task, run.trajectory, window=WINDOW, order=run.order)
    return Results(
        title=f"{TITLE}: the aligned run",
        losses=mean_losses(run.task, run.trajectory, lab.steps),
        diagnostics=diagnose_run(lab.window_traces),
        influence=_sampled(lab),
        baselines={EXACT: exact, DAMPED: solved},
        events=events(exact),
        measured=lab.removed_windows,
        in_two_times=lab.in_two_times,
        draws=mean_losses_of_draws(lab.window_traces),
        config=lab.settings.as_plain(),
        provenance=provenance(),
    )
