"""Where weights come from: a training run as ordered checkpoints, and the recorder that writes them.

``Recorder`` saves the model and the optimiser's moments from any training loop, ``snapshot`` holds them in memory;
``stagewise.checkpoints.huggingface.RecorderCallback`` does so inside a ``transformers.Trainer`` (imported
from there, because transformers is optional). ``Trajectory`` reads a run back, one checkpoint at a time, be
it recorded here, saved by somebody else's script, in one file or in shards, or published on the Hugging Face Hub;
``TokenBatches`` the tokens of a published run's updates.

This room knows files and optimisers. It may not know losses, data, posteriors or chains, and reading weights
never runs code that comes with them.
"""

from stagewise.checkpoint import Checkpoint, CheckpointError, Optimizer
from stagewise.checkpoints.directory import read_checkpoint, scan, write_checkpoint
from stagewise.checkpoints.recorder import Recorder
from stagewise.checkpoints.token_batches import TokenBatches
from stagewise.checkpoints.trajectory import Trajectory, as_trajectory, check_fits
from stagewise.checkpoints.when import linear, log_spaced

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Optimizer",
    "Recorder",
    "TokenBatches",
    "Trajectory",
    "as_trajectory",
    "check_fits",
    "linear",
    "log_spaced",
    "read_checkpoint",
    "scan",
    "write_checkpoint",
]
