"""Cells with known content, for the tests of the store and of the diagnostics."""

import numpy as np
import xarray as xr

CHAINS, DRAWS, TRAIN, QUERY = 2, 6, 5, 3


def make_cell(step=10, block=0, *, tokens=(), reflected=False, statuses=("ok", "ok"), offset=0.0, **facts):
    """A cell whose losses depend on step and block only; the anchors on the step only."""
    chain = np.arange(CHAINS) + block * CHAINS

    def group(samples, salt):
        rng = np.random.default_rng([step, block, salt])
        shape = (CHAINS, DRAWS, samples, *tokens)
        dims = ("chain", "draw", "sample", "token")[: len(shape)]
        anchor = offset + np.random.default_rng([step, salt]).standard_normal(shape[2:])
        # As the sampler gives them: changes are seen in float32.
        names = ["loss", "loss_reflected"] if reflected else ["loss"]
        variables = {name: (dims, anchor + rng.standard_normal(shape).astype(np.float32)) for name in names}
        variables |= {"loss_anchor": (dims[2:], anchor), "share": (dims[2:], np.full(anchor.shape, 1 / anchor.size))}
        group = xr.Dataset(variables, coords={"chain": chain})
        group["loss"].attrs = {"units": "nats"}
        return group.assign_attrs(samples=samples)

    tree = xr.DataTree.from_dict(
        {
            "/train": group(TRAIN, 0),
            "/queries/val": group(QUERY, 1),
            "/chains": xr.Dataset({"status": ("chain", np.array(statuses))}, coords={"chain": chain}),
        }
    )
    tree.attrs = {"n_beta": 100.0, "window": 30, "localised": True, "sampler": "sgld"} | facts
    return tree


def make_empty_cell(block=0, status="not_localised", **facts):
    """A checkpoint at which nothing could be drawn."""
    chains = xr.Dataset(
        {"status": ("chain", np.array([status] * CHAINS))},
        coords={"chain": np.arange(CHAINS) + block * CHAINS},
    )
    tree = xr.DataTree.from_dict({"/chains": chains})
    tree.attrs = ({"localised": False} if status == "not_localised" else {}) | facts
    return tree


def bits(tree):
    """Everything in a tree, comparable bit by bit (``==`` would take NaN for different and -0 for 0)."""
    variables = {
        f"{node.path}/{name}": (v.dims, str(v.dtype), v.shape, v.values.tobytes(), v.attrs)
        for node in tree.subtree
        for name, v in node.to_dataset().variables.items()
    }
    return variables, {node.path: node.attrs for node in tree.subtree}
