"""Where cells are computed: processes of this machine, a Ray cluster, jobs of Slurm. Nothing here knows what a cell is.

All give a cell to some worker, once more if the worker dies, and tell how it ended. What a worker needs it makes
itself, once, from what is sent to it; results go to the run folder and not through here.
"""

from stagewise.run.executors.base import CellsFailedError, Executor, WorkerDiedError
from stagewise.run.executors.local import Local
from stagewise.run.executors.on_ray import Ray
from stagewise.run.executors.on_slurm import Slurm

__all__ = ["CellsFailedError", "Executor", "Local", "Ray", "Slurm", "WorkerDiedError"]
