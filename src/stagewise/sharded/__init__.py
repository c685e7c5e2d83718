"""Models that are larger than one GPU: chains, and exact influence of windows, on models that FSDP2 has sharded.

Every process holds some rows of each parameter and runs the same script, started by ``torchrun``. ``lent`` is the door
through which a task comes in, ``alike`` whether all were given the same, ``check`` and ``precision`` what is looked
at there, ``fingerprint`` by which checkpoints are known; ``chains`` and ``window`` are what :func:`sample` and
:func:`window_influence` do, ``backwards`` one update of the latter.

What is computed is what the other rooms compute: this one only says how, where no process has the whole model.
"""

from stagewise.sharded.chains import sample
from stagewise.sharded.window import window_influence

__all__ = ["sample", "window_influence"]
