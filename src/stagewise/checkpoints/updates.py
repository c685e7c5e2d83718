"""What an optimiser does between two recorded checkpoints."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stagewise.checkpoints.optimizers import of_most
from stagewise.layers import acting_in_train_mode

Rates = tuple[float | Tensor, ...]
"""The learning rate of every parameter group."""


# What an update depends on besides the learning rate, and a checkpoint has but one value of.
_SETTINGS = ("momentum", "betas", "eps", "weight_decay")


class Updates:
    """Counts updates and keeps their learning rates, by a hook in front of ``optimizer.step()``.

    The rate that an update uses is the one seen there, wherever the loop sets it: a scheduler may be moved on before
    or after the recorder is called. The hook reads, never raises, and goes when this object does.

    Attributes:
        watching: whether updates can be seen.
        made: updates seen, since this object was made.
        rates: of the updates since :meth:`restart`, the last one made last.
        last: the rates of the last update; empty before the first.
        train_mode: kinds of layers that acted in train mode at the first update since :meth:`restart`.
        varied: names of other settings that have changed from one update to another, e.g. by a cycle of the momentum.
    """

    def __init__(self, optimizer: Any, model: nn.Module) -> None:
        self.watching = False
        self.made = 0
        self.rates: list[Rates] = []
        self.last: Rates = ()
        self.train_mode: tuple[str, ...] = ()
        self.varied: set[str] = set()
        self._settings: list[tuple[Any, ...]] = []
        self._expected: Rates = ()
        self._model = model
        if isinstance(optimizer, torch.optim.Optimizer):
            with suppress(AttributeError):  # a wrapper that is an optimiser in name only
                handle = optimizer.register_step_pre_hook(_hook(weakref.ref(self)))
                weakref.finalize(self, handle.remove)
                self.watching = True

    def restart(self, optimizer: Any) -> None:
        """Forget the rates seen so far: those of the updates from now on are asked for."""
        self.rates = []
        self.train_mode = ()
        self._expected = rates_of(optimizer) if self.watching else ()

    def see(self, optimizer: torch.optim.Optimizer) -> None:
        """An update is about to be made. No number is read off a GPU here: it may be recording a graph."""
        self.made += 1
        self.last = rates_of(optimizer)
        self.rates.append(self.last)
        if len(self.rates) == 1:
            self.train_mode = acting_in_train_mode(self._model)
        settings = [tuple(group.get(key) for key in _SETTINGS) for group in optimizer.param_groups]
        for before, now in zip(self._settings, settings, strict=False):
            self.varied |= {key for key, old, new in zip(_SETTINGS, before, now, strict=True) if old != new}
        self._settings = settings

    def moved(self) -> bool:
        """Whether learning rates were changed between a :meth:`restart` and the update after it."""
        if not self.rates or len(self.rates[0]) != len(self._expected):  # groups were added
            return False
        return numbers(self.rates[0]) != numbers(self._expected)

    def learning_rates(self, count: int, sizes: Sequence[int]) -> tuple[float, ...]:
        """The learning rates of the last ``count`` updates, that of most parameters where groups differ.

        Empty where not exactly so many were seen since :meth:`restart`, or where groups did not keep the ratios of
        their rates, so that one number per update does not tell them.

        Args:
            count: number of updates.
            sizes: number of parameters of every group.
        """
        if len(self.rates) != count:
            return ()
        rows = [numbers(row) for row in self.rates]
        if all(len(set(row)) == 1 for row in rows):
            return tuple(row[0] for row in rows)
        if {len(row) for row in rows} != {len(sizes)}:
            return ()
        table = np.array(rows)[:, np.array(sizes) > 0]
        largest = table[table.max(axis=1).argmax()]
        main = largest.argmax()
        if not np.allclose(table * largest[main], np.outer(table[:, main], largest), rtol=1e-6, atol=0):
            return ()
        return tuple(of_most(zip(row, sizes, strict=True)) for row in rows)


def rates_of(optimizer: torch.optim.Optimizer) -> Rates:
    """The learning rate of every parameter group; tensors are copied, because reading them would wait for a GPU."""
    rates = (group["lr"] for group in optimizer.param_groups)
    return tuple(rate.detach().clone() if isinstance(rate, Tensor) else float(rate) for rate in rates)


def numbers(rates: Rates) -> tuple[float, ...]:
    """Rates as plain numbers."""
    return tuple(float(rate) for rate in rates)


def _hook(watcher: weakref.ref[Updates]) -> Callable[..., None]:
    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        updates = watcher()
        if updates is not None:
            with suppress(Exception):  # then the numbers of updates and rates differ, and nothing is claimed
                updates.see(optimizer)

    return look
