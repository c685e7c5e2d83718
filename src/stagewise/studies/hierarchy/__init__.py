"""The semantic hierarchy: a deep linear network learns a tree of concepts, coarse to fine.

Everything has an exact answer here, so every estimator of influence is judged against truth, stage by stage.

* ``theory/``: the exact answers. It imports nothing else of the study.
* ``network``: the network and its training runs. ``settings``: how much is computed. ``lab``: the runs and measurements
  that experiments share. ``experiment``: what an experiment hands back. ``drawing``: what figures share.
  ``turns``, ``estimators``, ``resemblance``, ``embedding``: parts of experiments that are too long for their files.
* ``experiments/``: one a file, each takes the lab.
* ``study``: all of them on one page. ``cost``: what that will take.
"""
