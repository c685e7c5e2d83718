"""Covariances of loss traces, as replicates whose spread is their standard error.

Every estimator here returns *replicates* ``(replicate, A, B)``: one estimate per chain (or per stretch of a chain when
chains are few), whose mean is the estimate. Stretches are longer than the autocorrelation, so replicates are close to
independent and the standard error of the mean needs no model of the chain:  stderr = std / sqrt(replicates).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Self

import numpy as np

from stagewise.traces.columns import Array
from stagewise.traces.stretches import MIN_STRETCH, stretches

Centring = Literal["pooled", "within", "between"]
Groups = Sequence[np.ndarray[Any, np.dtype[np.intp]]] | None
"""The columns of each group; None where every column is a group of its own."""

# Deviations from a mean that are this small beside it are rounding: the column did not change.
_ROUNDING = 1e-13
# A spread of replicates whose square is less than this beside that of their mean is computed from their differences.
_CANCELLED = 1e-8


def covariance_replicates(a: Array, b: Array, centring: Centring = "pooled", pieces: int | None = None) -> Array:
    """Replicates of Cov(a, b) over the draws of all chains.

    Args:
        a: traces ``(chain, draw, A)``.
        b: traces ``(chain, draw, B)``.
        centring: ``"pooled"`` about the mean of all chains; ``"within"`` about each chain's own mean, blind to
            differences between chains; ``"between"`` the covariance of the chain means alone. With C chains of T draws
            (CT - 1) pooled = (CT - C) within + T (C - 1) between. Pooled and within agree where chains have mixed and
            are many times longer than their autocorrelation; within is too small where they are short.
        pieces: stretches per chain; default :func:`stretches`. The earliest draws that do not fill a stretch are left
            out.

    Returns:
        ``(replicate, A, B)``, the stretches of a chain one after the other.

    Raises:
        ValueError: between-chain covariance of fewer than two chains.
    """
    pieces = stretches(*a.shape[:2]) if pieces is None else pieces
    return covariances(deviations(a, centring, pieces), deviations(b, centring, pieces), centring, pieces)


def deviations(trace: Array, centring: Centring, pieces: int) -> Array:
    """Deviations of what fills stretches, or of the means of chains, from the mean: ``(chain, draw, column)``.

    Raises:
        ValueError: between-chain deviations of fewer than two chains.
    """
    return _centred(_cut(trace, centring, pieces), centring)


def covariances(a: Array, b: Array, centring: Centring, pieces: int) -> Array:
    """Replicates of the covariance, as :func:`covariance_replicates`, of deviations."""
    chains, draws = a.shape[:2]
    lost = chains if centring == "within" else 1
    return _product_replicates(a, b, 1 if centring == "between" else pieces, chains * draws - lost)


def correlation_replicates(
    a: Array,
    b: Array,
    groups_a: Groups = None,
    groups_b: Groups = None,
    centring: Centring = "pooled",
    pieces: int | None = None,
    controls: tuple[Array, Array] | None = None,
) -> Array:
    """Replicates of the sum of correlations over all pairs of a group of columns of ``a`` and one of ``b``.

    Uses  sum_(i in A, j in B) Corr(a_i, b_j) = Cov(sum_A z, sum_B z):  cost |A| + |B| instead of |A| |B|.
    The estimated variances fluctuate together with the covariance, so each replicate carries the linear response of
    the correlation to all three,  z_i z_j - (rho/2)(z_i^2 + z_j^2) + rho.  A column that never changes is correlated
    with nothing.

    With ``controls`` they are correlations of what is left of every column after regression on its own control,
    z = a - slope c. The slopes are estimated too, and enter the response where a control tells something of the other
    side's residuals; with one control for all it does not.

    Args:
        a: traces ``(chain, draw, columns)``.
        b: traces ``(chain, draw, columns)``.
        groups_a: columns of each group of ``a``.
        groups_b: the same for ``b``.
        centring: as in :func:`covariance_replicates`.
        pieces: the same.
        controls: of the columns of ``a`` and of ``b``, each of their shape.

    Returns:
        ``(replicate, groups of a, groups of b)``; divide by the number of pairs for the mean correlation.

    Raises:
        ValueError: between-chain correlation of fewer than two chains.
    """
    pieces = stretches(*a.shape[:2]) if pieces is None else pieces
    of_a, of_b = controls or (None, None)
    return correlations(Scores.of(a, groups_a, centring, pieces, of_a), Scores.of(b, groups_b, centring, pieces, of_b))


class Scores(NamedTuple):
    """One side of correlations: all that does not depend on the other.

    Attributes:
        z: z-scores ``(chain, draw, column)``.
        groups: columns of each group.
        sums: of the z-scores of each group ``(chain, draw, group)``.
        squares: means of z^2 in each stretch ``(replicate, column)``.
        control: z-scores of the control of every column, if there is one.
        slopes: means of z times its control in each stretch ``(replicate, column)``.
    """

    z: Array
    groups: Groups
    sums: Array
    squares: Array
    control: Array | None
    slopes: Array | None

    @classmethod
    def of(cls, trace: Array, groups: Groups, centring: Centring, pieces: int, control: Array | None) -> Self:
        """Of traces, as :func:`correlation_replicates` has them.

        Raises:
            ValueError: between-chain correlation of fewer than two chains.
        """
        if control is not None:
            control = _standardised(_cut(control, centring, pieces), centring)
        z = _standardised(_cut(trace, centring, pieces), centring, control)
        pieces = 1 if centring == "between" else pieces
        slopes = None if control is None else _piece_means(z * control, pieces)
        return cls(z, groups, group_sums(z, groups), _piece_means(z**2, pieces), control, slopes)


def correlations(a: Scores, b: Scores) -> Array:
    """Replicates of the summed correlations, as :func:`correlation_replicates`."""
    chains, draws = a.z.shape[:2]
    replicates: Array = _product_replicates(a.sums, b.sums, len(a.squares) // chains, chains * draws)
    mean = replicates.mean(0)
    replicates -= _response(a, b.sums, mean)
    replicates -= _response(b, a.sums, mean.T).transpose(0, 2, 1)
    replicates += mean
    return replicates


def group_sums(trace: Array, groups: Groups) -> Array:
    """Sum of the columns of each group, ``(..., columns)`` to ``(..., groups)``."""
    if groups is None:
        return trace
    return np.stack([trace[..., columns].sum(-1) for columns in groups], -1)


def mean_and_stderr(replicates: Array) -> tuple[Array, Array]:
    """Estimate and standard error from replicates along the first axis.

    Raises:
        ValueError: a single replicate, which has no spread.
    """
    if len(replicates) < 2:
        raise ValueError(
            f"one chain with fewer than {2 * MIN_STRETCH} draws leaves no spread to take a standard error from; run "
            "more chains or draws"
        )
    mean, count = replicates.mean(0), len(replicates)
    whole = count * mean**2
    squares = np.asarray(np.einsum("r...,r...->...", replicates, replicates) - whole)
    # One pass over the replicates instead of three, but where nearly all of it cancels.
    tight = squares < _CANCELLED * whole
    squares[tight] = ((replicates[:, tight] - mean[tight]) ** 2).sum(0)
    return mean, np.sqrt(squares / (count * (count - 1)))


def _cut(trace: Array, centring: Centring, pieces: int) -> Array:
    """Traces cut to whole stretches, or to the means of their chains."""
    chains, draws = trace.shape[:2]
    trace = trace[:, draws % pieces :]
    if centring != "between":
        return trace
    if chains < 2:
        raise ValueError("the between-chain covariance needs at least two chains, got 1")
    means: Array = trace.mean(1, keepdims=True)
    return means


def _centred(trace: Array, centring: Centring) -> Array:
    """Deviations of ``trace (chain, draw, column)`` from the mean of its own chain ("within") or of all chains."""
    deviations: Array = trace - trace.mean(1 if centring == "within" else (0, 1), keepdims=True)
    return deviations


def _standardised(trace: Array, centring: Centring, control: Array | None = None) -> Array:
    """z-scores of every column, or of what its standardised control leaves of it; zero where that never changes."""
    z = _centred(trace, centring)
    if control is not None:
        z = z - control * (z * control).mean((0, 1))
    spread = np.sqrt((z**2).mean((0, 1)))
    moves = spread > _ROUNDING * np.abs(trace).max((0, 1))
    scores: Array = np.divide(z, spread, out=np.zeros_like(z), where=moves)
    return scores


def _product_replicates(a: Array, b: Array, pieces: int, denominator: float) -> Array:
    """Replicates of sum(a b) / denominator over all draws, scaled so that their *mean* is the estimate."""
    chains, draws = a.shape[:2]
    a = a.reshape(chains * pieces, draws // pieces, -1)
    b = b.reshape(chains * pieces, draws // pieces, -1)
    # Factors go to the smaller side: the products are most of the work.
    products: Array = np.matmul((a * (len(a) / denominator)).transpose(0, 2, 1), b)
    return products


def _piece_means(trace: Array, pieces: int) -> Array:
    chains, draws = trace.shape[:2]
    means: Array = trace.reshape(chains * pieces, draws // pieces, -1).mean(1)
    return means


def _response(side: Scores, other: Array, correlation: Array) -> Array:
    """How the sum over each group responds to its columns' own estimates: ``(replicate, group, B)``.

    To their variances, with half the weight of their correlation with the ``other`` side's sums ``(chain, draw, B)``,
    which is the ``correlation (group, B)`` where every column is a group; and to the slopes on their controls, with the
    weight of the control's own correlation with these.
    """

    def with_other(columns: Array) -> Array:
        weights: Array = np.tensordot(columns, other, ((0, 1), (0, 1))) / (columns.shape[0] * columns.shape[1])
        return weights

    weights = correlation if side.groups is None else with_other(side.z)
    response = _summed(0.5 * side.squares, weights, side.groups)
    if side.control is not None and side.slopes is not None:
        response += _summed(side.slopes, with_other(side.control), side.groups)
    return response


def _summed(means: Array, weights: Array, groups: Groups) -> Array:
    """Sum over each group of ``(replicate, column)`` times ``(column, B)``: ``(replicate, group, B)``."""
    if groups is None:
        return means[:, :, None] * weights
    return np.stack([means[:, columns] @ weights[columns] for columns in groups], 1)
