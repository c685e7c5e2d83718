"""The experiments of the study, one a file: ``name(lab) -> Experiment``."""
