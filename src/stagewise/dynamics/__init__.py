"""Influence over training: curves with bands, and the events on them that noise cannot explain.

Reads the labelled influence of the room before, never chains or checkpoints. Negative influence is helpful.
"""

from stagewise.dynamics.curves import curves, pair
from stagewise.dynamics.events import Event, events, table

__all__ = ["Event", "curves", "events", "pair", "table"]
