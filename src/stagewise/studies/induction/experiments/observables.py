"""What the local posterior tells over training, from one set of draws per checkpoint, beside the network's own stages.

Three observables: the local learning coefficient; the share of the top eigenvalue of the covariance of losses, between
kinds of tokens (class and third of the sequence); and the influence of induction tokens on the excess.

What was said before they were computed over training (a pilot at steps 300 to 375 of the first run, made to choose
n_beta by its diagnostics, had shown the coefficient at these): over the transition, from 5 % to 90 % of the last prefix
matching, the local learning coefficient rises, and within it the share of the top eigenvalue is largest and the
influence of induction tokens on the excess most helpful, in every run.
"""
