"""Where theory is exact: losses that are quadratic in the weights, so that the local posterior is Gaussian.

    l_i(w) = 1/2 w^T H_i w + b_i.w                      =>      w - w* ~ N(mean, covariance)
    covariance = (n_beta H + gamma P^-1)^-1,            mean = -n_beta covariance g  (0 if centred)
    Cov(l_i, l_j) = g_i^T covariance g_j + 1/2 tr(H_i covariance H_j covariance),   g_i taken at the mean

The query set "weights" has the linear losses l_k = w_k: its traces are the positions of the chains.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from stagewise.checkpoint import Checkpoint, Optimizer
from stagewise.influence.covariance import covariance_replicates, mean_and_stderr
from stagewise.sampling import Chains, LocalPosterior, sample_block
from stagewise.task import Task

D = 4


class Point(nn.Module):
    """A model that is its weights."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self):
        return self.w


def quadratic(model, batch):
    h, b = batch
    w = model()
    return 0.5 * h.flatten(1) @ torch.outer(w, w).flatten() + b @ w


@dataclass
class Law:
    """Mean and covariance of w - w*."""

    mean: np.ndarray
    covariance: np.ndarray


class Gaussian:
    """``n`` training losses whose Hessians differ by a relative spread of about ``1/sqrt(stiffness)``.

    The curvatures of all of them are smaller by ``down``.
    """

    def __init__(self, n=6, stiffness=4, seed=0, down=0.0):
        random = np.random.default_rng(seed)

        def losses(count):
            factors = random.standard_normal((count, D, stiffness)) / stiffness**0.5
            h = factors @ factors.transpose(0, 2, 1) - down * np.eye(D)
            return h, random.standard_normal((count, D))

        self.w = 0.3 * random.standard_normal(D)
        self.losses = {"train": losses(n), "val": losses(3)}
        self.losses["weights"] = (np.zeros((D, D, D)), np.eye(D))
        data = {name: tuple(map(torch.from_numpy, arrays)) for name, arrays in self.losses.items()}
        train = data.pop("train")
        self.task = Task(Point(torch.from_numpy(self.w)), quadratic, train=train, queries=data)
        moments = torch.from_numpy(random.uniform(0.5, 2.0, D) ** 2)
        self.checkpoint = Checkpoint(
            1000, {"w": torch.from_numpy(self.w)}, Optimizer("adam", 1e-3), second_moment={"w": moments}
        )

    @property
    def hessian(self):
        """Of the mean training loss."""
        return self.losses["train"][0].mean(0)

    def gradients(self, name, at=0.0):
        """Of every loss of a data set at w* + ``at``."""
        h, b = self.losses[name]
        return h @ (self.w + at) + b

    def precision(self, posterior):
        """Of the posterior in whitened coordinates, and the square root of the metric."""
        density = posterior.at(self.task, self.checkpoint)
        scale = density.scale.numpy()
        return density.n_beta * scale[:, None] * self.hessian * scale + density.gamma * np.eye(D), scale

    def law(self, posterior, covariance=None):
        """The posterior's, or that of a sampler with another whitened ``covariance`` but the same centre."""
        precision, scale = self.precision(posterior)
        density = posterior.at(self.task, self.checkpoint)
        pull = density.n_beta * scale * self.gradients("train").mean(0)
        mean = np.zeros(D) if posterior.centred else -scale * np.linalg.solve(precision, pull)
        covariance = np.linalg.inv(precision) if covariance is None else covariance
        return Law(mean, scale[:, None] * covariance * scale)

    def traces(self, name, positions):
        """Losses ``(chain, draw, column)`` of a data set at displacements ``(chain, draw, parameters)``."""
        h, b = self.losses[name]
        w = self.w + positions
        pairs = (w[..., :, None] * w[..., None, :]).reshape(*w.shape[:-1], -1)
        return 0.5 * pairs @ h.reshape(len(h), -1).T + w @ b.T

    def loss_covariance(self, law, a, b):
        """Exact Cov(l_i, l_j) for every pair of losses of two data sets, second order included."""
        first = self.gradients(a, law.mean) @ law.covariance @ self.gradients(b, law.mean).T
        ha, hb = (self.losses[name][0] @ law.covariance for name in (a, b))
        return first + 0.5 * np.einsum("aij,bji->ab", ha, hb)


def draw(gaussian: Gaussian, posterior: LocalPosterior, sampling: Chains):
    """Traces by data set ``(chain, draw, column)``, float64, of a block whose chains all ended ok."""
    tree = sample_block(gaussian.task, gaussian.checkpoint, posterior, sampling)
    assert (tree["chains"]["status"] == "ok").all()
    return {
        "train": tree["train"]["loss"].values.astype(float),
        "val": tree["queries/val"]["loss"].values.astype(float),
        "weights": tree["queries/weights"]["loss"].values.astype(float),
    }


def errors(replicates, truth):
    """Deviation of an estimate from the truth in its own standard errors, for every entry."""
    value, stderr = mean_and_stderr(replicates)
    return (value - truth) / stderr


def law_errors(gaussian, law, traces):
    """All errors of the draws of a sampler that should have this law: of means and covariances."""
    names = ("weights", "train", "val")
    deviations = [errors(traces["weights"].mean(1), gaussian.w + law.mean)]
    for a in names:
        for b in names:
            replicates = covariance_replicates(traces[a], traces[b])
            deviations.append(errors(replicates, gaussian.loss_covariance(law, a, b)))
    return np.concatenate([deviation.ravel() for deviation in deviations])


def walk(sampler, gradient, chains, draws, *, burn_in, thinning=1, seed=0, d=D):
    """Positions ``(chain, draw, parameters)`` of a sampler driven by any gradient function, from the origin."""
    noise = torch.Generator().manual_seed(seed)
    state = sampler.init(torch.zeros(chains, d, dtype=torch.float64), noise)
    positions = []
    for step in range(-burn_in, draws * thinning):
        if step == -(burn_in // 2):
            state = sampler.freeze(state)
        state = sampler.step(state, gradient, noise)
        if step >= 0 and (step + 1) % thinning == 0:
            positions.append(state.position)
    return torch.stack(positions, 1).numpy()
