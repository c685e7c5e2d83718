"""Stretches of chains, whose spread is the standard error of what chains average."""

from __future__ import annotations

# Fewer replicates than this make the standard error itself too noisy, so long chains are cut into stretches.
MIN_REPLICATES = 16
MIN_STRETCH = 4


def stretches(chains: int, draws: int) -> int:
    """Into how many stretches each chain is cut, so that there are enough replicates of a useful length."""
    wanted = -(-MIN_REPLICATES // chains)
    return max(1, min(wanted, draws // MIN_STRETCH))
