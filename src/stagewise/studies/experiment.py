"""What an experiment of a study hands back: a section of the page, findings, checks, and claims that it tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from stagewise.reporting.page import Section

Comparison = Literal["at least", "at most", "near", "between"]
Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Check:
    """One line of the study's table: a number that was computed, and what it should reach.

    Made by :meth:`reported`, :meth:`at_least`, :meth:`at_most`, :meth:`near` and :meth:`between`.

    Attributes:
        what: what is compared, with its unit.
        values: the number; several where ``what`` names several places, as the times of a curve.
        form: how a number is written, as for ``format``.
        lower: lower ends of the numbers' intervals or ranges; empty if there are none.
        upper: upper ends.
        comparison: how the number is compared with the target; None if it is only reported.
        target: the bound; centre and tolerance if it should be near; both ends if it should be between.
    """

    what: str
    values: Numbers
    form: str = ".4f"
    lower: Numbers = ()
    upper: Numbers = ()
    comparison: Comparison | None = None
    target: Numbers = ()

    @classmethod
    def reported(
        cls, what: str, values: ArrayLike, form: str = ".4f", *, lower: ArrayLike = (), upper: ArrayLike = ()
    ) -> Check:
        """A number, or several, that need not reach anything."""
        return cls(what, _numbers(values), form, _numbers(lower), _numbers(upper))

    @classmethod
    def at_least(cls, what: str, value: float, bound: float, form: str = ".4f") -> Check:
        """A number that should be at least ``bound``."""
        return cls(what, _numbers(value), form, comparison="at least", target=_numbers(bound))

    @classmethod
    def at_most(cls, what: str, value: float, bound: float, form: str = ".4f") -> Check:
        """A number that should be at most ``bound``."""
        return cls(what, _numbers(value), form, comparison="at most", target=_numbers(bound))

    @classmethod
    def near(
        cls,
        what: str,
        value: float,
        centre: float,
        tolerance: float,
        form: str = ".4f",
        interval: tuple[float, float] | None = None,
    ) -> Check:
        """A number that should be within ``tolerance`` of ``centre``, which its interval, if given, should hold."""
        lower, upper = (_numbers(end) for end in interval or ((), ()))
        return cls(what, _numbers(value), form, lower, upper, "near", _numbers([centre, tolerance]))

    @classmethod
    def between(cls, what: str, value: float, lower: float, upper: float, form: str = ".4f") -> Check:
        """A number that should lie between two others."""
        return cls(what, _numbers(value), form, comparison="between", target=_numbers([lower, upper]))

    @property
    def value(self) -> float:
        """The number.

        Raises:
            ValueError: there are several.
        """
        if len(self.values) != 1:
            raise ValueError(f"{self.what!r} has {len(self.values)} numbers, not one; use .values")
        return self.values[0]

    @property
    def reached(self) -> bool | None:
        """Whether the number reaches its target, never if it is NaN; None if it is only reported."""
        match self.comparison, self.target:
            case "at least", (bound,):
                return self.value >= bound
            case "at most", (bound,):
                return self.value <= bound
            case "near", (centre, tolerance):
                inside = not self.lower or self.lower[0] <= centre <= self.upper[0]
                return inside and abs(self.value - centre) <= tolerance
            case "between", (lower, upper):
                return lower <= self.value <= upper
        return None

    @property
    def text(self) -> str:
        """The numbers as the page shows them, each with its interval: ``1.28 [1.25, 1.31]``."""
        if not self.lower:
            return ", ".join(map(self._written, self.values))
        each = zip(self.values, self.lower, self.upper, strict=True)
        return ", ".join(f"{self._written(v)} [{self._written(low)}, {self._written(up)}]" for v, low, up in each)

    @property
    def target_text(self) -> str:
        """What the number should reach, as the page shows it; empty if it is only reported."""
        match self.comparison, self.target:
            case "at least", (bound,):
                return f"≥ {bound:g}"
            case "at most", (bound,):
                return f"≤ {bound:g}"
            case "near", (centre, tolerance):
                return f"{centre:.3g} ± {tolerance:g}" + (", in the interval" if self.lower else "")
            case "between", (lower, upper):
                return f"{self._written(lower)} to {self._written(upper)}"
        return ""

    def _written(self, number: float) -> str:
        """With a true minus sign; a dash if not finite."""
        text = f"{number:z{self.form}}" if math.isfinite(number) else "–"
        return f"−{text[1:]}" if text.startswith("-") else text

    def as_plain(self) -> dict[str, Any]:
        """For JSON: the numbers, unrounded (None where not finite), and how they compare."""
        ends = {"lower": _finite(self.lower), "upper": _finite(self.upper)} if self.lower else {}
        target = {"comparison": self.comparison, "target": _finite(self.target)} if self.comparison else {}
        return {"what": self.what, "values": _finite(self.values), **ends, **target, "reached": self.reached}


def _numbers(values: ArrayLike) -> Numbers:
    return tuple(np.atleast_1d(np.asarray(values, dtype=float)).tolist())


def _finite(numbers: Numbers) -> list[float | None]:
    return [number if math.isfinite(number) else None for number in numbers]


@dataclass(frozen=True)
class Claim:
    """Something that has been said about influence over training, and what is found here, with the numbers."""

    said: str
    found: str


@dataclass(frozen=True)
class Experiment:
    """One part of the study: what it shows, what it found, the numbers it is held to, and claims that it tests."""

    section: Section
    findings: Sequence[str]
    checks: Sequence[Check]
    claims: Sequence[Claim] = ()
