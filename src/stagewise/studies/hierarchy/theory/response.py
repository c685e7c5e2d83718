"""First-order response of the deep linear network's losses to the weight of an item: the exact influence function.

Notation, time and units as in :mod:`stagewise.studies.hierarchy.theory.modes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from stagewise.studies.hierarchy.theory.modes import SAME, Modes, aligned_strengths, residuals
from stagewise.studies.hierarchy.theory.tree import Floats

# Spacing times the largest s at which the integration errs by a few parts in a thousand.
_LONGEST = 0.8


def first_order_response(modes: Modes, a0: Floats, t: Floats) -> Floats:
    """dl_q / dbeta_p of weight beta_p on item p during the whole run: ``(time, p, q)``, negative = helpful.

    In mode coordinates balanced weights are W1 = X, W2 = X^T with A = X^T X. With E = S - A, the residual
    r_p = E x_p and the derivatives P, Q of W1, W2 by beta_p,

        dX/dt = X E
        dP/dt = Q^T E + X (r_p x_p^T - M)
        dQ/dt = E P^T + (r_p x_p^T - M) X^T               M = Q X + X^T P
        dl_q/dbeta_p = - r_q^T M x_q

    integrated by the classical Runge-Kutta method between the times given; their spacing must resolve 1 / (2 s).

    Args:
        modes: of the targets.
        a0: initial strengths ``(mode, mode)``, positive definite.
        t: times from 0, ascending ``(time,)``.

    Raises:
        ValueError: the times are too far apart.
    """
    count = len(modes.v)
    if (spacing := float(np.diff(t).max(initial=0.0)) * modes.s.max()) > _LONGEST:
        raise ValueError(
            f"times must be closer than {_LONGEST:g} / s for the strongest mode, s = {modes.s.max():.3g}; the largest "
            f"spacing is {spacing:.3g} / s. Pass more times and keep those you need"
        )

    def slope(state: Floats) -> Floats:
        x, p, q = state[0], state[1 : count + 1], state[count + 1 :]
        e = np.diag(modes.s) - x.T @ x
        r = modes.v @ e
        pull = r[:, :, None] * modes.v[:, None, :] - (q @ x + x.T @ p)
        return np.concatenate([(x @ e)[None], q.swapaxes(1, 2) @ e + x @ pull, e @ p.swapaxes(1, 2) + pull @ x.T])

    start = np.concatenate([np.linalg.cholesky(a0).T[None], np.zeros((2 * count, *a0.shape))])
    response = []
    for state in _runge_kutta(slope, start, t):
        x, p, q = state[0], state[1 : count + 1], state[count + 1 :]
        r = modes.v @ (np.diag(modes.s) - x.T @ x)
        response.append(-np.einsum("qj,pjk,qk->pq", r, q @ x + x.T @ p, modes.v, optimize=True))
    return np.stack(response)


def _runge_kutta(slope: Callable[[Floats], Floats], state: Floats, t: Floats) -> Iterator[Floats]:
    """The solution of dy/dt = slope(y) at the times ``t``, from ``state`` at the first."""
    yield state
    for h in np.diff(t):
        k1 = slope(state)
        k2 = slope(state + h / 2 * k1)
        k3 = slope(state + h / 2 * k2)
        k4 = slope(state + h * k3)
        state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        yield state


def whitened_response(modes: Modes, a0: float, t: Floats) -> Floats:
    """The response if item p changes its target but not its input's weight (whitened inputs): ``(time, p, q)``.

    Only the input-output correlation moves, by F = (U^T y_p)(V^T e_p)^T in mode coordinates. With G(s) the strength
    of a mode as a function of its singular value,

        M_jk = (F_jk + F_kj)/2 (G_k - G_j)/(s_k - s_j)  +  (F_jk - F_kj)/2 (G_k + G_j)/(s_k + s_j)
        dl_q/deps = - r_q^T M x_q

    where modes of equal strength, and j = k, take dG/ds for the first quotient. Modes turn because of F's symmetric
    *and* antisymmetric part; for one-hot items F is not symmetric.

    Args:
        modes: of the targets.
        a0: initial strength of all modes.
        t: times ``(time,)``.
    """
    s, t = modes.s, np.asarray(t, dtype=float)
    g = aligned_strengths(s, np.full(len(s), a0), t)
    apart, together = s[None, :] - s[:, None], s[None, :] + s[:, None]
    equal = np.abs(apart) <= SAME * max(s.max(), 1e-300)
    slope = _strength_slope(s, a0, t)
    difference = np.where(equal, slope[:, :, None], (g[:, None, :] - g[:, :, None]) / np.where(equal, 1, apart))
    # Two modes without strength have F = 0, so that their quotient does not matter.
    mean = (g[:, None, :] + g[:, :, None]) / np.where(together > 0, together, 1)
    f = (modes.v * s)[:, :, None] * modes.v[:, None, :]
    even, odd = (f + f.swapaxes(1, 2)) / 2, (f - f.swapaxes(1, 2)) / 2
    m = difference[:, None] * even + mean[:, None] * odd
    response: Floats = -np.einsum("tqj,tpjk,qk->tpq", residuals(modes, g), m, modes.v, optimize=True)
    return response


def _strength_slope(s: Floats, a0: float, t: Floats) -> Floats:
    """dG/ds of the strength G(s) = 1 / (e^(-2 s t)/a0 + (1 - e^(-2 s t))/s): ``(time, mode)``."""
    t = t[:, None]
    g, decay, safe = aligned_strengths(s, np.full(len(s), a0), t[:, 0]), np.exp(-2 * s * t), np.where(s > 0, s, 1.0)
    saturation_slope = np.where(s > 0, 2 * t * decay / safe + np.expm1(-2 * s * t) / safe**2, -2 * t**2)
    slope: Floats = -(g**2) * (-2 * t * decay / a0 + saturation_slope)
    return slope
