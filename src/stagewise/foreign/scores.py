"""What the readers of other tools' scores have in common."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

Array = np.ndarray[Any, np.dtype[np.float64]]

Helpful = Literal["positive", "negative"]
"""The sign of the score of a training sample that lowers the loss of a query."""


class Scores(NamedTuple):
    """Scores as a tool wrote them.

    Attributes:
        values: (train, query), in the tool's own unit.
        samples: the training sample of each row; None where row i is sample i.
        helpful: the sign of a helpful sample, None where the files do not say.
        about: what else they say of themselves, of plain values.
    """

    values: Array
    samples: Sequence[int] | None
    helpful: Helpful | None
    about: dict[str, Any]


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def read_tensor(path: Path) -> torch.Tensor:
    """A tensor that ``torch.save`` wrote alone; whatever would run code is refused.

    Raises:
        ValueError: it cannot be read, is refused, or holds something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load fails in many ways, none of which names the file
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{path} was not read ({reason}): only a plain tensor is, because unpickling anything else would run code; "
            "save the tensor alone, or as .npy or .safetensors"
        ) from error
    if not isinstance(content, torch.Tensor):
        raise ValueError(f"{path}: expected a tensor, got {type(content).__name__}; save the tensor alone")
    if content.layout != torch.strided or content.is_quantized or content.dtype == torch.bool:
        raise ValueError(f"{path}: expected a dense tensor of numbers, got {content.layout}, {content.dtype}")
    return content.detach()
