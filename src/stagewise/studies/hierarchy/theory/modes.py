"""What the deep linear network learns, and when, in closed form. One function per equation.

A network y = W2 W1 x on one-hot items learns the singular modes of the targets Y = U S V^T one after the other, the
strongest first (Saxe, McClelland & Ganguli, PNAS 2019). Time is t = step x learning rate per sample, losses are
l_i = 1/2 |y_i - W2 W1 e_i|^2, and the objective is their sum.

Arrays: items n, features O, modes n (modes without strength are kept, so that V is a basis of all items).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stagewise.baselines.source import saturation
from stagewise.studies.hierarchy.theory.tree import Floats

# Singular values closer than this, relative to the largest, are one.
SAME = 1e-9


@dataclass(frozen=True, eq=False)
class Modes:
    """The singular modes of the targets, Y = u diag(s) v^T.

    Attributes:
        u: output vectors ``(feature, mode)``; zero for modes beyond the number of features.
        s: strengths ``(mode,)``, descending.
        v: input vectors ``(item, mode)``, orthogonal: row p is item p in mode coordinates.
    """

    u: Floats
    s: Floats
    v: Floats

    @classmethod
    def of(cls, targets: Floats) -> Modes:
        """Of targets Y ``(feature, item)``."""
        features, items = targets.shape
        u, s, vt = np.linalg.svd(targets, full_matrices=True)
        missing = max(0, items - features)
        s = np.concatenate([s, np.zeros(missing)])
        u = np.concatenate([u[:, :items], np.zeros((features, missing))], 1)
        return cls(u, np.where(s > SAME * max(s.max(), 1e-300), s, 0.0), vt.T)

    def initial(self, first: Floats, second: Floats) -> Floats:
        """Initial strengths of the modes: ``(mode, mode)``, symmetric.

        Small weights soon align: of W1 and W2 only the sum W1 V + W2^T U grows, and what has grown by then is as if the
        weights had started balanced with W2 W1 = U A0 V^T,

            A0 = 1/4 (W1 V + W2^T U)^T (W1 V + W2^T U).

        The diagonal holds the effective a0 of every mode.
        """
        grows = first @ self.v + second.T @ self.u
        strengths: Floats = grows.T @ grows / 4
        return strengths


def aligned_strengths(s: Floats, a0: Floats, t: Floats) -> Floats:
    """Strength of modes that start aligned: ``(time, mode)``  (Saxe et al. 2019).

        da/dt = 2 a (s - a),        a(t) = s / (1 + (s/a0 - 1) e^(-2 s t));    a0 / (1 + 2 a0 t) at s = 0

    Args:
        s: singular values ``(mode,)``.
        a0: strengths at t = 0, positive ``(mode,)``.
        t: times ``(time,)``.
    """
    t = np.asarray(t, dtype=float)[:, None]
    strengths: Floats = 1 / (np.exp(-2 * s * t) / a0 + _saturation(s, t))
    return strengths


def mixed_strengths(s: Floats, a0: Floats, t: Floats) -> Floats:
    """Strength of modes that start mixed, W2 W1 = U A(t) V^T: ``(time, mode, mode)``.

        A(t) = [ e^(-S t) A0^-1 e^(-S t) + S^-1 (1 - e^(-2 S t)) ]^-1

    the solution of dA/dt = S A + A S - 2 A^2, which is gradient descent from balanced weights. For a diagonal A0 it is
    :func:`aligned_strengths`; in general modes of equal strength turn into the ones that A0 prefers, and strong modes
    pull weaker ones along.

    Args:
        s: singular values ``(mode,)``.
        a0: strengths at t = 0 ``(mode, mode)``, positive definite.
        t: times ``(time,)``.

    Raises:
        ValueError: ``a0`` is singular: there are fewer hidden units than modes.
    """
    scale = np.sqrt(np.diagonal(a0))
    if np.linalg.cond(a0 / np.outer(scale, scale)) > 1e12:
        raise ValueError(
            f"the closed form needs a hidden unit for each of {len(s)} modes, but the initial strengths have rank "
            f"{np.linalg.matrix_rank(a0)}; use a wider network"
        )
    decay = np.exp(-s * np.asarray(t, dtype=float)[:, None])
    unlearnt = decay[:, :, None] * np.linalg.inv(a0) * decay[:, None, :]
    saturated = _saturation(s, np.asarray(t, dtype=float)[:, None])
    matrix: Floats = np.linalg.inv(unlearnt + saturated[:, :, None] * np.eye(len(s)))
    return matrix


def _saturation(s: Floats, t: Floats) -> Floats:
    """(1 - e^(-2 s t)) / s, with its limit 2 t at s = 0."""
    return 2 * t * saturation(2 * s * t)


def half_rise(s: Floats, a0: Floats) -> Floats:
    """When modes reach half their strength: ln(s/a0 - 1) / (2 s); infinite for modes without strength."""
    safe = np.where(s > a0, s, 1.0)
    times: Floats = np.where(s > a0, np.log(np.maximum(safe / a0 - 1, 1e-300)) / (2 * safe), np.inf)
    return times


def item_losses(modes: Modes, a: Floats) -> Floats:
    """Loss of every item: l_p = 1/2 |(S - A) x_p|^2, x_p the item in mode coordinates: ``(time, item)``.

    Args:
        modes: of the targets.
        a: strengths ``(time, mode, mode)``, or ``(time, mode)`` of aligned modes.
    """
    losses: Floats = (residuals(modes, a) ** 2).sum(-1) / 2
    return losses


def residuals(modes: Modes, a: Floats) -> Floats:
    """What is not yet learnt of every item, in mode coordinates (S - A) x_p: ``(time, item, mode)``."""
    if a.ndim == 2:
        return (modes.s - a)[:, None, :] * modes.v
    missing: Floats = np.einsum("tjk,pk->tpj", np.diag(modes.s) - a, modes.v)
    return missing
