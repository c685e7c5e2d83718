"""Complete experiments: each a task, how its model was trained, and the settings it is studied with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stagewise.run.config import RunConfig
from stagewise.studies.digits.study import study as digits

STUDIES: dict[str, Callable[[Path], list[RunConfig]]] = {"digits": digits}
"""Study name to a function of its folder that gives the runs to make."""
