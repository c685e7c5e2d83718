"""A share of a run's cells, for jobs that know nothing of each other: slice 3 of 16."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Slice:
    """Which share.

    Attributes:
        number: of the slice, from 1.
        of: how many there are.
    """

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """As it is written, ``"3/16"``.

        Raises:
            ValueError: it is not.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(
                f"--cells takes a slice, the first of sixteen being 1/16 and the last 16/16, got {text!r}; an array "
                "job of sixteen numbers its tasks so with --array=1-16"
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def name(self) -> str:
        """For files."""
        return f"slice-{self.number}-of-{self.of}"

    def part(self, cells: Sequence[T]) -> Sequence[T]:
        """The cells of the slice: every so many-th, as neighbours cost alike."""
        return cells[self.number - 1 :: self.of]
