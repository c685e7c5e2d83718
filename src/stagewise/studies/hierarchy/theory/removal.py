"""What the deep linear network learns without some of its items, and so the influence of every item, in closed form.

Notation, time and units as in :mod:`stagewise.studies.hierarchy.theory.modes`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stagewise.studies.hierarchy.theory.modes import Modes, item_losses, mixed_strengths
from stagewise.studies.hierarchy.theory.tree import Floats


def subset_losses(targets: Floats, first: Floats, second: Floats, kept: Sequence[int], t: Floats) -> Floats:
    """Losses of all items when training sees only some of them, exactly: ``(time, item)``.

    Without an item its column of Y is gone and its column of W1 gets no gradient; what is left is again a deep linear
    network with one-hot inputs, and has its own modes. An item that is left out is never learnt: its loss stays
    1/2 |y|^2, but for terms of the order of the initial weights.

    Args:
        targets: Y ``(feature, item)``.
        first: initial W1 ``(hidden, item)``.
        second: initial W2 ``(feature, hidden)``.
        kept: the items in the training set, at least one.
        t: times ``(time,)``.
    """
    if not len(kept) or len(set(kept)) < len(kept):
        raise ValueError(f"kept must name at least one item, and each once (white inputs), got {list(kept)}")
    chosen = np.asarray(kept)
    modes = Modes.of(targets[:, chosen])
    losses = np.tile((targets**2).sum(0) / 2, (len(t), 1))
    losses[:, chosen] = item_losses(modes, mixed_strengths(modes.s, modes.initial(first[:, chosen], second), t))
    return losses


def leave_one_out(targets: Floats, first: Floats, second: Floats, t: Floats) -> Floats:
    """Influence of every item by leaving it out of the whole run, exactly: ``(time, left out, query)``.

    LOO_pq(t) = l_q(t) - l_q(t) without p; negative = helpful. Arguments as for :func:`subset_losses`.
    """
    items = range(targets.shape[1])
    whole = subset_losses(targets, first, second, items, t)
    untrained = np.tile((targets**2).sum(0) / 2, (len(t), 1))  # what is left without the only item there is
    others = [[q for q in items if q != p] for p in items]
    without = [subset_losses(targets, first, second, kept, t) if kept else untrained for kept in others]
    influence: Floats = whole[:, None, :] - np.stack(without, 1)
    return influence
