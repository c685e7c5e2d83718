"""Numbers, counts and steps as a reader wants to see them in a sentence or a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_LISTED_STEPS = 6
_DASH = "–"


def count(number: int, noun: str, nouns: str = "") -> str:
    """``1 checkpoint``, ``2 checkpoints``; irregular plurals are passed in."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"


def number(value: float, digits: int = 3) -> str:
    """To ``digits`` significant digits, with a true minus sign; a dash if not finite."""
    return f"{value:.{digits}g}".replace("-", "−") if math.isfinite(value) else _DASH


def score(value: float) -> str:
    """A correlation or a slope: two decimals; a dash if not finite."""
    return f"{value:z.2f}".replace("-", "−") if math.isfinite(value) else _DASH


def plus_minus(value: float, stderr: float) -> str:
    """Value ± standard error, with a power of ten for tiny numbers."""
    largest = max(abs(value), stderr)
    exponent = power_of_ten(largest) if math.isfinite(largest) and largest < 1e-3 else 0
    text = rounded(value / 10.0**exponent, stderr / 10.0**exponent)
    return f"({text}) × {superscript(exponent)}" if exponent else text


def rounded(value: float, stderr: float) -> str:
    """Value ± standard error, both cut where the doubt begins.

    The standard error keeps two digits if they are at most 35 and one otherwise, as particle physicists do. Without
    a standard error (0 or not finite) the value stands alone. No line breaks at the sign.
    """
    if not (math.isfinite(value) and math.isfinite(stderr) and stderr > 0):
        return number(value)
    magnitude = math.floor(math.log10(stderr))
    digits = 2 if stderr / 10.0**magnitude < 3.55 else 1
    decimals = max(0, digits - 1 - magnitude)
    return f"{value:z.{decimals}f}\u00a0±\u00a0{stderr:.{decimals}f}".replace("-", "−")


def power_of_ten(largest: float, plain: float = 0.01) -> int:
    """The exponent (0, -3, -6, ...) in whose unit ``largest`` is short to write; 0 from ``plain`` upwards."""
    if not math.isfinite(largest) or largest == 0 or largest >= plain:
        return 0
    return 3 * math.floor((math.log10(largest) + 1) / 3)


def superscript(exponent: int) -> str:
    """``10⁻³`` for -3."""
    return f"10{str(exponent).translate(_SUPERSCRIPT)}"


def step_number(step: float) -> str:
    """A step as a whole number with thousands separators; events lie between checkpoints."""
    return f"{round(step):,}"


def short_step(step: float) -> str:
    """A round step for an axis: ``300``, ``30k``."""
    return f"{step / 1000:g}k" if step >= 1000 and step % 1000 == 0 else step_number(step)


def steps(numbers: Sequence[float]) -> str:
    """``step 3``, ``steps 3, 5 and 9``; many steps as ``12 steps from 3 to 900``."""
    if len(numbers) > _LISTED_STEPS:
        return f"{len(numbers)} steps from {step_number(min(numbers))} to {step_number(max(numbers))}"
    return f"step{'' if len(numbers) == 1 else 's'} {enumeration([step_number(n) for n in numbers])}"


def interval(lower: float, upper: float) -> str:
    """``between steps 80 and 130``; one step if the interval is no wider."""
    if step_number(lower) == step_number(upper):
        return f"at step {step_number(lower)}"
    return f"between steps {step_number(lower)} and {step_number(upper)}"


def enumeration(words: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(part for part in (", ".join(words[:-1]), *words[-1:]) if part)


def quoted(label: Any) -> str:
    """A label of the data, marked as such."""
    return f"“{label_text(label)}”"


def label_text(label: Any, longest: int = 32) -> str:
    """A label that fits on a line: control characters written out, long ones cut."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(label))
    return text if len(text) <= longest else text[: longest - 1] + "…"
