"""The semantic hierarchy: a deep linear network learns a tree of concepts, coarse to fine.

Everything has an exact answer here, so every estimator of influence is judged against truth, stage by stage.
"""
