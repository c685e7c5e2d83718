"""Ground truth: change the data, train again, and see what the queries lose.

``schedule`` says what every training step sees, ``updates`` repeats the run's own optimiser, ``training``
trains many counterfactuals at once, ``ablation`` measures the effect of a changed window, ``scores`` compares
it with a prediction. Nothing here estimates influence: this room may import ``checkpoints``, never
``sampling``, ``traces`` or ``influence``.
"""
