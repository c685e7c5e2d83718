"""Does exact influence say what happens, and what do estimators say that look at the checkpoint alone?"""

from __future__ import annotations

from stagewise.studies.experiment import Experiment
from stagewise.studies.language.influence import exact
from stagewise.studies.language.lab import Lab
from stagewise.studies.windows import windows as held


def windows(lab: Lab) -> Experiment:
    """Estimators against retraining, and what chains can answer, where the settings' windows begin."""
    return held(lab, exact, "the loss on every other class", apart=True)
