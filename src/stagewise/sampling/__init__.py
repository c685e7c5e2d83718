"""The local posterior around a checkpoint, chains that draw from it, and independent draws beside them.

``posterior`` says what is sampled, ``curvature`` (and ``differenced``, for sharded models), ``pilot`` and ``heat`` what
a sampler must know before it starts, ``tuning`` what is chosen from that, ``noise`` and ``row_noise`` where chains have
theirs from, ``gradient`` what drives the chains, one file per sampler how they move, ``watch`` what they see, and
``chains`` runs a block. ``frozen_updates`` is a window's response, whose root ``window_gaussian`` draws by, with
``lanczos`` and ``krylov``.

Numerics are pure here: functions of tensors with a leading chain axis and an explicit generator. Nothing
logs, saves, seeds globally or changes the caller's model, and no influence is computed.
"""

from stagewise.sampling.chains import Chains, sample_block
from stagewise.sampling.posterior import LocalPosterior
from stagewise.sampling.rmsprop_sgld import RMSpropSGLD
from stagewise.sampling.sgld import SGLD
from stagewise.sampling.underdamped import Underdamped

__all__ = ["SGLD", "Chains", "LocalPosterior", "RMSpropSGLD", "Underdamped", "sample_block"]
