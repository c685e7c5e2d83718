"""What the items of a deep linear network share at a moment of its training: gradients, residuals, representations.

Notation and time as in :mod:`stagewise.studies.hierarchy.theory.modes`; strengths ``a`` are ``(time, mode, mode)``, or
``(time, mode)`` of aligned modes.
"""

from __future__ import annotations

import numpy as np

from stagewise.studies.hierarchy.theory.modes import Modes, residuals
from stagewise.studies.hierarchy.theory.tree import Floats


def residual_kernel(modes: Modes, a: Floats) -> Floats:
    """R_pq = r_p . r_q: do items p and q still want the same correction? ``(time, item, item)``."""
    r = residuals(modes, a)
    kernel: Floats = r @ r.swapaxes(1, 2)
    return kernel


def hidden_kernel(modes: Modes, a: Floats) -> Floats:
    """K_pq = h_p . h_q: do they share a representation? ``(time, item, item)``."""
    weighted = modes.v * a[:, None, :] if a.ndim == 2 else modes.v @ a
    kernel: Floats = weighted @ modes.v.T
    return kernel


def gradient_kernel(modes: Modes, a: Floats) -> Floats:
    """g_p . g_q of the items' gradients: ``(time, item, item)``; minus it is the influence rate.

    R_pq K_pq for two different items (their inputs are orthogonal), and |W2^T r_p|^2 more for an item with itself. The
    sign changes where R does.
    """
    kernel = residual_kernel(modes, a) * hidden_kernel(modes, a)
    r = residuals(modes, a)
    full = a if a.ndim == 3 else a[:, :, None] * np.eye(a.shape[1])
    items = np.arange(kernel.shape[1])
    kernel[:, items, items] += np.einsum("tpj,tjk,tpk->tp", r, full, r, optimize=True)
    return kernel


def curvature_floor(modes: Modes, a: Floats, features: int) -> Floats:
    """tr(H_p H_q) of the items' Gauss-Newton curvatures, different items: features x K^2: ``(time, item, item)``.

    A posterior of variance 1/gamma in all directions adds -1/2 of it / gamma^2 to the influence whatever the gradients
    are: it always looks helpful, and hides sign flips where gamma is small. The diagonal is not meaningful.
    """
    floor: Floats = features * hidden_kernel(modes, a) ** 2
    return floor


def representation_distances(modes: Modes, a: Floats) -> Floats:
    """Squared distances |h_p - h_q|^2 of the items' hidden representations: ``(time, item, item)``."""
    kernel = hidden_kernel(modes, a)
    own = np.diagonal(kernel, axis1=1, axis2=2)
    distances: Floats = own[:, :, None] + own[:, None, :] - 2 * kernel
    return distances
