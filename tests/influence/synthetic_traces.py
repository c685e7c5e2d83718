"""Traces held in memory, in the form that sampling leaves them."""

import numpy as np
import xarray as xr

from stagewise.influence.trusted import TracesInMemory as Traces

__all__ = ["Traces", "losses", "tree"]


def tree(train, queries, *, reflected=None, failed=(), training_sets=(), kappa=2.0, **attrs):
    """A step's tree; losses ``(chain, draw, sample[, token])``, reflected ones by path."""
    chains = np.arange(len(train))
    status = np.where(np.isin(chains, failed), "diverged", "ok")
    groups = {"chains": xr.Dataset({"status": ("chain", status)}, {"chain": chains})}
    for path, loss in {"train": train, **{f"queries/{name}": q for name, q in queries.items()}}.items():
        dims = ("chain", "draw", "sample", "token")[: loss.ndim]
        # n_beta / n is kappa, for samples and for all tokens of one together.
        share = np.full(loss.shape[2:], 0.1 / np.prod(loss.shape[3:]))
        variables = {"loss": (dims, loss), "loss_anchor": (dims[2:], loss[0, 0]), "share": (dims[2:], share)}
        if reflected is not None:
            variables["loss_reflected"] = (dims, reflected[path])
        groups[path] = xr.Dataset(variables, {"chain": chains})
        if path.removeprefix("queries/") in training_sets:
            groups[path].attrs["is_training_set"] = True
    result = xr.DataTree.from_dict(groups)
    result.attrs = {"kappa": kappa, "n_beta": 10 * kappa, "localised": True, "metric": "euclidean"} | attrs
    return result


def losses(*shape, chains=16, draws=20, seed=0):
    """Independent draws of losses that share a common cause."""
    random = np.random.default_rng(seed)
    cause = random.normal(size=(chains, draws, *[1] * len(shape)))
    return 1 + random.uniform(-1, 1, shape) * cause + 0.5 * random.normal(size=(chains, draws, *shape))
