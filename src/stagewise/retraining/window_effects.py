"""What changes of the data during one window do to the queries: the measurement that all proofs by retraining share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stagewise.labelled import Array
from stagewise.retraining.losses import paired_losses
from stagewise.retraining.orders import Orders
from stagewise.retraining.schedule import Schedule
from stagewise.retraining.start import Start
from stagewise.stacking import BatchingChoice


def window_effects(
    start: Start, schedules: Sequence[Schedule], orders: Orders, window: int, max_replays: int, batching: BatchingChoice
) -> Array:
    """What each schedule does to every query group after the window: changed minus unchanged loss, with like batches.

    Returns:
        ``(order, schedule, query)``, in nats.
    """
    way = start.decided(batching, min(max_replays, len(schedules) + 1))
    end = [start.step + window]
    effects = [
        paired_losses(start, schedules, order, end, max_replays=max_replays, batching=way)[0][0].numpy()
        for order in orders.orders
    ]
    return np.stack(effects)
