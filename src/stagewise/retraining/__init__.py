"""Ground truth: change the data, train again, and see what the queries lose.

``schedule`` says what every training step sees, ``updates`` repeats the run's own optimiser, ``training``
trains many counterfactuals at once, ``runs`` looks at their queries. ``ablation`` measures the effect of a
changed window, ``leave_out`` that of a changed run; ``scores`` and ``lds`` compare them with predictions.

``unrolling`` is the limit of small changes, exact; ``tracin`` and ``source`` approximate it from checkpoints.
These differentiate the run itself and know no posterior: this room may import ``checkpoints``, never
``sampling``, ``traces`` or ``influence``.
"""
