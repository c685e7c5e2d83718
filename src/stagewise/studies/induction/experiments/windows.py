"""Does exact influence say what happens? Windows trained again with a class at another weight, in every run."""

from __future__ import annotations

from stagewise.studies.experiment import Experiment
from stagewise.studies.induction.influence import exact, gradients
from stagewise.studies.induction.lab import Lab
from stagewise.studies.windows import windows as held


def windows(lab: Lab) -> Experiment:
    """Exact influence and products of gradients against retraining, where the settings' windows begin."""
    estimators = {"exact influence": exact, "products of gradients": gradients}
    return held(lab, estimators, "the excess and to the loss on every class", apart=False)
