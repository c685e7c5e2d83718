"""In-context Markov chains: a small transformer that learns, in two sharp stages, to count and then to look back.

Every training sequence is drawn from a transition matrix of its own, so that all there is to learn is how to learn from
the context. What the best predictor does is known exactly, and so is which tokens each stage is about.

* ``chains``: the sequences. ``rules``: the exact predictors by counting. ``classes``: what kind of token each one is.
* ``network``: two layers of attention. ``training``: its task and its runs. ``stages``: what it has learnt so far.
* ``settings``: how much is computed. ``lab``: the runs and results that experiments share, kept in a folder.
* ``influence``: of classes of tokens, exact. ``arms``: runs with other weights.
* ``experiments/``: one a file, each takes the lab. ``study``: all of them on one page. ``cost``: how long it takes.
"""
