"""Progress of long work: a callable ``progress(what, done, total)``, silent or bars in a terminal.

Rich is imported where bars are shown: processes that sample show none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Show nothing."""


@contextmanager
def progress_bars(console: Console) -> Iterator[Progress]:
    """One bar per kind of work, with elapsed and remaining time."""
    from rich import progress as rich

    columns = (
        rich.TextColumn("{task.description:<34}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TextColumn("left"),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=console) as bars:
        known: dict[str, TaskID] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in known:
                known[what] = bars.add_task(what, total=total)
            bars.update(known[what], completed=done, total=total)

        yield update
