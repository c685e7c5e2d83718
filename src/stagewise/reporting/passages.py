"""Single training samples that mattered most for one query, as text whose tokens are coloured by their influence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.colors import to_hex
from numpy.typing import NDArray

from stagewise.reporting import style, words
from stagewise.reporting.exemplar_figure import extremes
from stagewise.results import Exemplar

PER_SIDE = 3
_STRONGEST = 3
_SATURATED = 0.98  # of all tokens shown: beyond it a few would leave all others pale
_MARKED = 0.25  # of the scale: from here on a harmful token is underlined, for readers without colours
_STOPS = 9
_DARK = 0.179  # luminance at which black and white text have the same contrast, 4.6
_COUNTS_NOT = "not counted in the loss"


@dataclass(frozen=True)
class Token:
    """A token as it is shown; plain text, which is escaped.

    Attributes:
        text: with line breaks and unprintable characters made visible.
        title: its influence in words.
        style: its colours, in CSS; empty where it does not count.
        kind: ``"up"`` for a clearly harmful one, ``"un"`` for one that does not count.
    """

    text: str
    title: str
    style: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Passage:
    """A training sample: what it is, its influence, its tokens, and the strongest of them in words.

    Attributes:
        kind: ``"helpful"`` or ``"harmful"``.
        sample: which one.
        value: its influence.
        tokens: all that is shown.
        strongest: the tokens that are to be seen without colours.
    """

    kind: str
    sample: str
    value: str
    tokens: Sequence[Token]
    strongest: str


@dataclass(frozen=True)
class Panel:
    """One step: its most helpful passages, and its most harmful ones."""

    title: str
    sides: Sequence[Sequence[Passage]]


@dataclass(frozen=True)
class Passages:
    """The passages of one query over training, all in the colours of one scale.

    Attributes:
        title: what is shown.
        caption: how to read it.
        panels: one per step.
        low: the number at the helpful end of the scale, and beyond it.
        high: that at the harmful end.
        gradient: the colours between them, in CSS.
        unit: of the numbers.
    """

    title: str
    caption: str
    panels: Sequence[Panel]
    low: str
    high: str
    gradient: str
    unit: str


def passages_of(exemplars: Sequence[Exemplar]) -> Passages:
    """The most helpful and the most harmful training texts of one query, step by step.

    Args:
        exemplars: of one query; those without the influence of their tokens are left out.
    """
    shown = sorted((e for e in exemplars if e.texts and e.token_values), key=lambda exemplar: exemplar.step)
    scale = _Scale.of([value for exemplar in shown for value in _values(exemplar)])
    query = words.quoted(exemplars[0].query)
    steps = words.count(len(shown), "checkpoint")
    caption = (
        f"The training texts that mattered most for {query} at {steps}, up to {PER_SIDE} most helpful and {PER_SIDE} "
        "most harmful ones each, from the first token that is predicted. Every token is coloured by its own influence, "
        f"on one scale for all steps. Blue is helpful: more weight on the token lowers the loss of {query}. Red is "
        "harmful, underlined where it is clearly so. The number over a text is the influence of all its tokens "
        "together; point at a token for its own. Grey tokens do not count in the loss."
    )
    return Passages(
        f"What in the texts mattered for {query}",
        caption,
        [_panel(exemplar, scale) for exemplar in shown],
        f"≤ {words.number(-scale.end / scale.unit)}",
        f"≥ {words.number(scale.end / scale.unit)}",
        ",".join(to_hex(style.DIVERGING(place)) for place in np.linspace(0, 1, _STOPS)),
        scale.name,
    )


@dataclass(frozen=True)
class _Scale:
    """Colours symmetric about 0, and the unit of the numbers."""

    end: float
    unit: float
    name: str

    @classmethod
    def of(cls, values: Sequence[float]) -> _Scale:
        sizes = np.abs([value for value in values if np.isfinite(value) and value != 0])
        end = float(np.quantile(sizes, _SATURATED)) if sizes.size else 1.0
        return cls(end, *style.unit([end], "nats per unit weight", plain=0.1))

    def text(self, value: float, stderr: float = 0.0) -> str:
        """A number with its unit."""
        times = "" if self.unit == 1 else " ×"
        return f"{words.rounded(value / self.unit, stderr / self.unit)}{times} {self.name}"

    def colours(self, value: float) -> str:
        """Background and ink, in CSS."""
        red, green, blue, _ = style.DIVERGING(0.5 + 0.5 * float(np.clip(value / self.end, -1, 1)))
        ink = ";color:#fff" if _luminance((red, green, blue)) < _DARK else ""
        return f"background:{to_hex((red, green, blue))}{ink}"


def _luminance(colour: tuple[float, float, float]) -> float:
    """Relative luminance, as WCAG defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear))


def _panel(exemplar: Exemplar, scale: _Scale) -> Panel:
    sides = [[_passage(exemplar, k, scale) for k in side] for side in _sides(exemplar)]
    return Panel(f"Step {words.step_number(exemplar.step)}", [side for side in sides if side])


def _sides(exemplar: Exemplar) -> list[NDArray[np.intp]]:
    return [side[:PER_SIDE] for side in extremes(exemplar)]


def _values(exemplar: Exemplar) -> Iterator[float]:
    """Of all tokens that are shown."""
    for side in _sides(exemplar):
        for k in side:
            yield from (exemplar.token_values or [])[k]


def _passage(exemplar: Exemplar, k: int, scale: _Scale) -> Passage:
    value, texts, values = exemplar.values[k], (exemplar.texts or [])[k], (exemplar.token_values or [])[k]
    tokens = [_token(text, each, scale) for text, each in zip(texts, values, strict=True)]
    return Passage(
        "helpful" if value < 0 else "harmful",
        f"sample {exemplar.samples[k]:,}",
        scale.text(value, exemplar.stderrs[k]),
        tokens,
        _strongest(texts, values, scale),
    )


def _token(text: str, value: float, scale: _Scale) -> Token:
    if not np.isfinite(value):
        return Token(visible(text), _COUNTS_NOT, kind="un")
    marked = value >= _MARKED * scale.end
    return Token(visible(text), f"{_kind(value)}: {scale.text(value)}", scale.colours(value), "up" if marked else "")


def _kind(value: float) -> str:
    return "helpful" if value < 0 else "harmful" if value > 0 else "no influence"


def _strongest(texts: Sequence[str], values: Sequence[float], scale: _Scale) -> str:
    sizes = np.abs(np.nan_to_num(values))
    first = [k for k in np.argsort(-sizes, kind="stable")[:_STRONGEST].tolist() if sizes[k] > 0]
    tokens = [f"{words.quoted(texts[k])} {_kind(values[k])} {words.number(values[k] / scale.unit)}" for k in first]
    return f"Strongest: {', '.join(tokens)}." if tokens else ""


def visible(text: str) -> str:
    r"""A token's text as a reader can see it: a mark at every line break, unprintable characters written out."""
    shown = text.replace("\r\n", "\n").replace("\n", "↵\n")
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in shown)
