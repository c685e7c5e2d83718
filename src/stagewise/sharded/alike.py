"""Were all processes given the same?

Numbers of a task that is one in this process and another in that would be finite, the same in both, and of neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from stagewise.content import content_digest
from stagewise.identity import identity
from stagewise.ranks import Ranks
from stagewise.task import Task


def alike(ranks: Ranks, make: Callable[[], Mapping[str, str]]) -> Mapping[str, str]:
    """What every process makes, by part, where it is the same in all.

    Raises:
        ValueError: in all processes, with the parts in which they differ.
    """
    first, *others = ranks.agreed(make)
    for number, other in enumerate(others, 1):
        if differing := [part for part in {**first, **other} if first.get(part) != other.get(part)]:
            raise ValueError(
                f"process {number} was given another {', another '.join(differing)} than process 0; all must be "
                "given the same. Does a seed, an order (of files, of a set) or the number of the process decide it?"
            )
    return first


def given(task: Task, **asked: Any) -> dict[str, str]:
    """What of a task and of arguments decides numbers, or the passes that are made to compute them: hashes by part."""
    own = {name: tensor for name, tensor in task.pure.state.items() if name not in task.pure.persistent}
    parts = {
        "list of queries": [*task.queries],
        "train_groups": task.train_groups,
        "query_groups": task.query_groups,
        "forward_batch": task.forward_batch,
        "buffer that is not in checkpoints": own,
    }
    return identity(task) | {part: content_digest(value) for part, value in (parts | asked).items()}
