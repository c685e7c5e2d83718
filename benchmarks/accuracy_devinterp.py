"""RMSprop-SGLD by `devinterp`, in its own environment: losses along its draws of the posterior of a checkpoint.

`sample` of devinterp 2.0.1 as it comes: `sampling_method="rmsprop_sgld"`, alpha 0.99, eps 0.1, no burn-in, chains one
after the other on the same minibatches, losses observed at every draw. Its posterior has a Euclidean localisation at
the weights that it is given and no way to be centred there, so that it is given a network of one vector x, zero at the
checkpoint, which makes it the posterior that all others sample:

whitened    the weights are w* + P^(1/2) x, with n_beta and localization = gamma: the better for it, since the metric
            is Adam's already
weights     they are w* + x, with n_beta; the localisation in the metric is a term of the loss

In both the loss that it differentiates, not the ones that it observes, has the slope at the checkpoint subtracted.
"""

from __future__ import annotations

import math
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

DRAWS = 100  # of a chain


class Network(nn.Module):
    """A network as a function of one vector ``x (parameters,)``; called with numbers of rows of the data.

    Args:
        given: see ``accuracy_samplers.exported``.
        whitened: whether x is u, or the displacement of the weights.
    """

    def __init__(self, given: dict[str, Any], whitened: bool) -> None:
        super().__init__()
        scale = given["scale"]
        self.x, self.model = nn.Parameter(torch.zeros_like(scale)), given["model"]
        self.given = {name: value for name, value in given.items() if name != "model"}
        self.to_u = torch.ones_like(scale) if whitened else torch.where(scale > 0, 1 / scale, 0.0)
        self.localised = 0.0 if whitened else given["gamma"] / given["n_beta"]

    def forward(self, rows: Tensor) -> Tensor:
        """Losses ``(rows, tokens)``."""
        given, u = self.given, self.x * self.to_u
        parts = (given["anchor"] + given["scale"] * u).split([math.prod(shape) for shape in given["shapes"]])
        params = {n: p.view(s) for n, p, s in zip(given["names"], parts, given["shapes"], strict=True)}
        logits, targets = functional_call(self.model, params, (given["inputs"][rows],)), given["targets"][rows]
        losses = functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
        return losses.view(len(rows), -1)

    def added(self) -> Tensor:
        """To the mean loss, where it is differentiated."""
        u = self.x * self.to_u
        return self.localised / 2 * u.square().sum() - self.given["slope"] @ u


def loss(model: Network, input_ids: Tensor) -> Tensor:
    """Of every token of the rows; the library observes without gradients."""
    losses: Tensor = model(input_ids[:, 0])
    return losses + model.added() if torch.is_grad_enabled() else losses


def drawn(given: dict[str, Any], whitened: bool, rate: float, chains: int) -> dict[str, np.ndarray[Any, Any]]:
    """Losses of the training set and of the queries ``(chain, draw, row, token)``; nan where a chain fails."""
    from datasets import Dataset
    from devinterp.slt.sampling import sample

    model, batch = Network(given, whitened), given["batch"]
    sizes = {"train": given["train"], "query": len(given["inputs"]) - given["train"]}
    tokens = model(torch.arange(1)).shape[1]

    def dataset(rows: np.ndarray[Any, Any]) -> Any:
        return Dataset.from_dict({"input_ids": rows[:, None].repeat(tokens + 1, 1)}).with_format("torch")

    # Whole batches are observed: the last is filled up with the first rows.
    rows = {name: np.arange(-(-size // batch) * batch) % size for name, size in sizes.items()}
    rows["query"] += given["train"]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Chain failed")
        traces = sample(
            model,
            dataset(np.arange(given["train"])),
            {name: (dataset(numbers), len(numbers) // batch) for name, numbers in rows.items()},
            lr=rate,
            n_beta=given["n_beta"],
            localization=given["gamma"] if whitened else 0.0,
            param_masks={"x": None},
            sampling_method="rmsprop_sgld",
            num_chains=chains,
            num_draws=DRAWS,
            num_steps_bw_draws=given["steps"] // DRAWS,
            batch_size=batch,
            device="cpu",
            output_path=Path(folder) / "traces.zarr",
            loss_fn=loss,
        ).load()
    found = {}
    for name, size in sizes.items():
        numbers = traces[f"input_ids_{name}"].values[:, 0] - (given["train"] if name == "query" else 0)
        losses = traces[f"loss_{name}"].values
        found[name] = np.empty((*losses.shape[:2], size, tokens), np.float32)
        found[name][:, :, numbers] = losses
    return found


def main() -> None:
    """Arguments: what is given, where the losses go, and settings ``whitened:rate:chains``."""
    torch.set_num_threads(1)
    given = torch.load(sys.argv[1], weights_only=False)
    found = {}
    for setting in sys.argv[3:]:
        name, rate, chains = setting.split(":")
        for data, losses in drawn(given, name == "whitened", float(rate), int(chains)).items():
            found[f"{name}:{rate}:{data}"] = losses
    np.savez(sys.argv[2], **found)


if __name__ == "__main__":
    main()
