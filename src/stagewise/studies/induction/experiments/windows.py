"""Does exact influence say what happens, and what do estimators say that look at the checkpoint alone?"""

from __future__ import annotations

from stagewise.studies.experiment import Experiment
from stagewise.studies.induction.influence import exact_at_starts
from stagewise.studies.induction.lab import Lab
from stagewise.studies.windows import windows as held


def windows(lab: Lab) -> Experiment:
    """Estimators against retraining, and what chains can answer, where the settings' windows begin."""
    return held(lab, exact_at_starts, "the excess and to the loss on every class", apart=False)
