"""Which batches a window is replayed with: the run's own where they are known, else fresh ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stagewise.retraining.schedule import BatchOrder, Order
from stagewise.retraining.start import Start, check_order, own_order

FRESH_ORDERS = 4
"""Batch orders that are drawn where the run's own are not known: enough for a standard error."""

_KINDS = ("given", "whole training set", "recorded", "fresh")


class Orders(NamedTuple):
    """Batch orders of a window.

    Attributes:
        orders: one or more.
        kind: which they are, in words: ``"given"``, ``"whole training set"``, ``"recorded"``, ``"fresh"``, or
            ``"recorded and fresh"``.
    """

    orders: list[Order]
    kind: str

    @property
    def known(self) -> bool:
        """Whether there is but one, and it is the run's own."""
        return len(self.orders) == 1 and self.kind != "fresh"


def window_orders(start: Start, given: Order | None, window: int, repeats: int | None, seed: int) -> Orders:
    """The batch orders of the ``window`` updates from a checkpoint on.

    Args:
        start: the checkpoint.
        given: the run's own order, if the caller knows it.
        window: number of updates.
        repeats: how many orders; the first is the run's own where it is known. None: that one alone, or
            :data:`FRESH_ORDERS` fresh ones. If the batch is the whole training set there is one.
        seed: of the fresh ones.

    Raises:
        ValueError: the order does not fit the data or the checkpoint, or nothing says how large a batch is.
    """
    n, size = len(start.task.train), start.rule.optimizer.batch_size
    own = own_order(start, window) if given is None else None
    if given is not None:
        check_order(start, given)
        size = len(given(start.step))
    elif own is not None:  # the last batch of an epoch may be smaller than those of its other updates
        size = max(size or 0, *(len(batch) for batch in own.batches))
    if size is None:
        raise ValueError(
            f"the checkpoint at step {start.step} does not say how many samples its updates used; pass "
            "order=BatchOrder(n, batch_size), or say batch_size (0 = all samples) where the folder is read: "
            "Trajectory.from_directory(..., batch_size=...), batch_size: in a configuration"
        )
    first, kind = given or own, "given" if given else "recorded"
    if size == 0 or size >= n:
        return Orders([first or BatchOrder(n)], kind if first else "whole training set")
    count = repeats or (1 if first else FRESH_ORDERS)
    # Seeds are hashed so that a fresh order is not by accident the one the run was recorded with.
    seeds = np.random.SeedSequence(seed).generate_state(count)
    fresh: list[Order] = [BatchOrder(n, size, int(state)) for state in seeds]
    if first is None:
        return Orders(fresh, "fresh")
    return Orders([first, *fresh[1:]], kind if given or count == 1 else f"{kind} and fresh")


def all_kinds(kinds: Sequence[str]) -> str:
    """Which batches were used, of several windows together."""
    return " and ".join(kind for kind in _KINDS if any(kind in used.split(" and ") for used in kinds))
