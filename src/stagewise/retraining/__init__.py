"""Ground truth: change the data, train again, and see what the queries lose.

``start`` is the door: a checked task at a checkpoint, with its update rule. ``schedule`` says what every training step
sees and ``orders`` with which batches, ``updates`` repeats the run's own optimiser, ``training`` trains many replays
at once, ``losses`` looks at their queries. ``ablation`` measures the effect of a changed window, ``extremes`` that of
single samples in it, ``halves`` that of random halves, all by ``window_effects``; ``leave_out`` that of a changed run;
``unrolling`` is the limit of small changes, exact. ``adjoint`` is the same backwards, one ``rewind`` of the replay
for all data, with ``scratch`` for states that memory does not hold: ``window_influence`` of a window, ``expected`` of
what its batches need not hold, ``curriculum`` the weights that it calls for, ``two_times`` by when data were trained
on and when the model was asked, as far back as ``horizon`` finds that training bears it out. ``replay`` measures
whether training repeats the run at all. ``scores`` and ``lds``
compare what was measured with predictions.

All this differentiates or repeats the run itself and knows no posterior: this room may import ``checkpoints``, never
``sampling``, ``traces`` or ``influence``.
"""
