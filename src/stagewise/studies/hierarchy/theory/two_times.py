"""Influence of an item that is shown at time t, on the losses at a later time T, in closed form.

Notation and time as in :mod:`stagewise.studies.hierarchy.theory.modes`; modes start aligned, with strengths a.

Weight on item p moves the weights along its gradient, which keeps W1 W1^T - W2^T W2, so that the layers stay balanced
in what follows. Of a change M of W2 W1, in mode coordinates, the symmetric part then moves as the solution of
dA/dt = S A + A S - 2 A^2 does when its start is changed, and the antisymmetric part, which turns both layers alike,
obeys a linear equation of its own. With e = s - a, x = x_p and tau = T - t,

    M_jk(T, t) = 1/2 x_j x_k e^(-(s_j + s_k) tau) (  a_j(T) a_k(T) (1/a_j(t) + 1/a_k(t)) (e_j(t) + e_k(t))
                                                   + (a_j(T) + a_k(T)) (e_j(t) - e_k(t))  )
    d l_q(T) / d beta_p(t) = - sum_jk e_j(T) x_qj M_jk x_qk

which at T = t is minus the gradient kernel, and summed over t the first-order response to a weight held.
"""

from __future__ import annotations

import numpy as np

from stagewise.studies.hierarchy.theory.modes import Modes, aligned_strengths
from stagewise.studies.hierarchy.theory.tree import Floats

_NODES = 6  # of Gauss-Legendre quadrature in a bin: bins are short beside the stages


def influence_density(modes: Modes, a0: Floats, shown: Floats, asked: float) -> Floats:
    """dl_q(T) / dbeta_p per time at which item p has the weight: ``(shown, p, q)``, negative = helpful; 0 from T on.

    Args:
        modes: of the targets.
        a0: strengths at time 0 ``(mode,)``.
        shown: times t at which an item is shown ``(time,)``.
        asked: the time T of the losses.
    """
    before, after = aligned_strengths(modes.s, a0, shown), aligned_strengths(modes.s, a0, np.array([asked]))[0]
    missing, inverse = modes.s - before, 1 / before
    decay = np.exp(-(modes.s[:, None] + modes.s) * np.maximum(asked - shown, 0)[:, None, None])
    even = np.outer(after, after) * _outer_sum(inverse, inverse) * _outer_sum(missing, missing)
    odd = np.add.outer(after, after) * _outer_sum(missing, -missing)
    change = np.where((shown < asked)[:, None, None], decay * (even + odd) / 2, 0.0)
    density: Floats = -np.einsum(
        "j,qj,pj,tjk,pk,qk->tpq", modes.s - after, modes.v, modes.v, change, modes.v, modes.v, optimize=True
    )
    return density


def binned_influence(modes: Modes, a0: Floats, edges: Floats, asked: Floats) -> Floats:
    """Influence of weight during each of the bins between ``edges`` on the losses at ``asked``: ``(bin, asked, p, q)``.

    Args:
        modes: of the targets.
        a0: strengths at time 0 ``(mode,)``.
        edges: of the bins, ascending; none holds a time that is asked for.
        asked: the times of the losses.
    """
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    middle, half = (edges[1:] + edges[:-1]) / 2, np.diff(edges) / 2
    times = (middle[:, None] + half[:, None] * nodes).ravel()
    densities = np.stack([influence_density(modes, a0, times, float(end)) for end in asked], 1)
    densities = densities.reshape(len(half), _NODES, *densities.shape[1:])
    influence: Floats = np.einsum("b,n,bn...->b...", half, weights, densities)
    return influence


def _outer_sum(left: Floats, right: Floats) -> Floats:
    """Of every time: ``(time, mode, mode)``."""
    total: Floats = left[:, :, None] + right[:, None, :]
    return total
