"""The application, and what all commands share: where they print, and how they end where something is wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Which training data mattered for what, **and when**: influence as a function of training time, "
    "with error bars, and an experiment to prove it.\n\nStart with `stagewise demo`. "
    "Then copy `examples/own_model` and `stagewise run` it on your own checkpoints.",
)
console = Console(stderr=False)

_LESS_MEMORY = (
    "Lower workers, the Task's forward_batch or sampling.chains (other chains need another run folder); what is "
    "complete is kept"
)

RunFolder = Annotated[
    str, typer.Argument(metavar="RUN", help="A run folder, the `out` of a configuration; or its url, s3://bucket/run.")
]


@contextmanager
def readable_errors(code: int = 1) -> Iterator[None]:
    """Faults of input end with their message and this code, Ctrl-C with how to go on; a bug keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        line = "interrupted; what is complete is kept, and the same command goes on from there"
        Console(stderr=True).print(line, highlight=False, markup=False, soft_wrap=True)
        sys.exit(130)
    except Exception as error:
        message = _explained(error)
        if message is None:
            raise
        Console(stderr=True).print(f"error: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(code)


def _explained(error: Exception) -> str | None:
    """What a person can do something about, in a line; None if it is a bug of stagewise."""
    from stagewise.memory import out_of_memory
    from stagewise.run.executors import CellsFailedError, WorkerDiedError
    from stagewise.run.task_file import in_one_line, place_in_task_file
    from stagewise.traces.lock import RunLockedError

    if out_of_memory(error):
        return f"memory ran out ({in_one_line(error)}). {_LESS_MEMORY}"
    if isinstance(error, WorkerDiedError):
        return f"{error}. {_LESS_MEMORY}"
    if isinstance(error, CellsFailedError) or (isinstance(error, ImportError) and error.name is None):  # an extra
        return str(error)
    if place := place_in_task_file(error):
        return f"{place}: {in_one_line(error)}"
    if not isinstance(error, ValueError | OSError | RunLockedError):
        return None
    cause, place = error.__cause__, None
    while cause is not None and place is None:  # e.g. of a loss that cannot be evaluated
        place, cause = place_in_task_file(cause), cause.__cause__
    return f"{place}: {error}" if place and place not in str(error) else str(error)
