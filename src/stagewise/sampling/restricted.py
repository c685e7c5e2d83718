"""Which parameters of a model move: whole ones by their names, and slices of them, as one attention head is.

A pattern is a regular expression for whole names, with a slice behind it or not: ``layers.0.attn.*`` or
``layers.0.attn.out.weight[:, 16:32]``. A slice has a colon; ``[01]`` is a regular expression's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from stagewise.evaluate import Point

_SLICED = re.compile(r"(.+)\[([\d:, ]*:[\d:, ]*)\]")

Place = tuple[slice, ...]


def names_of(patterns: Sequence[str]) -> tuple[str, ...]:
    """The regular expressions, without slices."""
    return tuple(_parsed(pattern)[0] for pattern in patterns)


def moving(point: Point, patterns: Sequence[str], like: Tensor) -> Tensor | None:
    """1 along what the patterns choose of the vector, else 0 ``(parameters,)``; None where they choose all of it.

    Raises:
        ValueError: a slice does not fit a parameter whose name matches, or chooses nothing of it.
    """
    parsed = [(pattern, *_parsed(pattern)) for pattern in patterns]
    if not any(place for *_, place in parsed):
        return None
    chosen = {}
    for name, shape in zip(point.vector.names, point.vector.shapes, strict=True):
        chosen[name] = torch.zeros(shape)
        for pattern, expression, place in parsed:
            if re.fullmatch(expression, name):
                _check(pattern, place, name, shape)
                chosen[name][place] = 1.0
    return point.vector.flatten(chosen, like=like)


def _parsed(pattern: str) -> tuple[str, Place]:
    """The expression for names, and which part of a parameter; all of it is an empty place."""
    sliced = _SLICED.fullmatch(pattern)
    if sliced is None:
        return pattern, ()
    expression, text = sliced.groups()
    return expression, tuple(_slice(pattern, part) for part in text.split(","))


def _slice(pattern: str, text: str) -> slice:
    ends = text.strip().split(":")
    if len(ends) != 2:
        raise ValueError(f"parameters: {pattern!r} has {text.strip()!r} in its slice, expected start:stop")
    first, stop = (int(end) if end else None for end in ends)
    return slice(first, stop)


def _check(pattern: str, place: Place, name: str, shape: tuple[int, ...]) -> None:
    if len(place) > len(shape):
        raise ValueError(f"parameters: {pattern!r} has {len(place)} slices, but {name!r} has the shape {shape}")
    for one, size in zip(place, shape, strict=False):
        if (one.stop or size) > size or (one.start or 0) >= (one.stop or size):
            raise ValueError(
                f"parameters: {pattern!r} chooses nothing, or more than there is, of {name!r} of shape {shape}"
            )
