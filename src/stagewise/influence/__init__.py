"""One checkpoint's traces or gradients to one labelled matrix (train x query) of influence, with its doubt.

Every estimator returns the same kind of dataset: ``value`` and ``stderr`` with the dimensions
``step, train, query``. Negative is helpful: more weight on the training data lowers the query's loss. The unit is
nats of query loss per unit of weight of one training sample, the mean over pairs where groups are asked for.
"""
