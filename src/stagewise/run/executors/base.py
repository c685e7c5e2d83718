"""What an executor is, how workers tell of a cell, and what becomes of cells that fail."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

C = TypeVar("C", bound=Hashable)
H = TypeVar("H", bound=Hashable)

Setup = Callable[[], Callable[[C], object]]
"""Called once in every worker: gives what computes a cell there. It is sent to the workers pickled."""

Ended = tuple[C, Exception | None]
"""A cell that is computed, or the error with which it ended for good."""

Ends = Generator[Ended[C], None, None]
"""The cells as they end. To be closed by whoever does not wait for all of them."""


class WorkerDiedError(RuntimeError):
    """The process that computed a cell came to its end without a word: it was killed, or its machine was lost."""


class CellsFailedError(RuntimeError):
    """Some cells could not be computed, and all others are complete; the message names each with its error."""


class Executor(Protocol):
    """Where cells are computed."""

    def map(
        self, setup: Setup[C], cells: Sequence[C], workers: int | None = None, folder: Path | None = None
    ) -> Ends[C]:
        """Compute cells, in any order, and yield each when it has ended.

        A cell whose worker dies, or that ends with an error that may not come again, is computed again, a bounded
        number of times. When the generator is closed the workers end, and what they are at is lost.

        Args:
            setup: makes what computes a cell, in every worker.
            cells: all different.
            workers: how many at the same time; default as many as there is room for.
            folder: of this run's alone, for what the executor itself has to write.

        Raises:
            Exception: of ``setup``: with it nothing can work.
        """
        ...


class Told(NamedTuple):
    """What a worker says of a cell.

    Attributes:
        error: how it failed; None if it is complete.
        started: whether the worker could be set up at all.
    """

    error: Exception | None = None
    started: bool = True


class Tries:
    """How often each cell was begun.

    Args:
        most: retries; a cell is begun once more than that.
    """

    def __init__(self, most: int) -> None:
        self._most, self._failed = most, Counter[Any]()

    def again(self, cell: Hashable, error: Exception) -> bool:
        """Whether to try once more. A ``ValueError`` is about what was given, and comes again."""
        self._failed[cell] += 1
        return not isinstance(error, ValueError) and self._failed[cell] <= self._most

    def failed(self, cell: Hashable) -> int:
        """How often it has failed."""
        return self._failed[cell]


def give_out(
    cells: Sequence[C],
    workers: int | None,
    retries: int,
    begin: Callable[[C], H],
    wait: Callable[[Sequence[H]], Iterable[H]],
    told: Callable[[H], Told],
) -> Ends[C]:
    """Give cells one by one to workers, and again those that may be tried again.

    They are tried again after all others, when what they failed of may be over; but as long as no cell is complete,
    after the next one: where nothing can work, that is known after a few cells and not after all of them.

    Args:
        cells: all different.
        workers: how many cells at the same time; None: whoever begins them knows.
        retries: how often a cell is tried again.
        begin: gives a cell to a worker, for a handle.
        wait: until some of these handles have ended, which are returned.
        told: what was said of the cell of a handle.
    """
    busy, waiting, tries, complete = dict[H, C](), deque(cells), Tries(retries), False
    while waiting or busy:
        while waiting and (workers is None or len(busy) < workers):
            cell = waiting.popleft()
            busy[begin(cell)] = cell
        for handle in wait([*busy]):
            cell, said = busy.pop(handle), told(handle)
            if said.error is None:
                complete = True
                yield cell, None
            elif not said.started:
                raise said.error
            elif tries.again(cell, said.error):
                waiting.insert(len(waiting) if complete else 1, cell)
            else:
                yield cell, said.error


def finish(ends: Ends[C], tell: Callable[[C], object], before: bool = False) -> None:
    """Go through the cells as they end; ``tell`` is called for each that is complete.

    Args:
        ends: the cells.
        tell: called with a cell.
        before: whether other cells like these were complete before.

    Raises:
        CellsFailedError: some failed; the others are complete.
        Exception: the first cells to end failed, with this error: nothing suggests that others would not.
    """
    complete, failed = 0, dict[C, Exception]()
    with closing(ends):
        for cell, error in ends:
            if error is None:
                complete += 1
                tell(cell)
            elif complete or (before and isinstance(error, ValueError)):  # which is about the cell, not the machine
                failed[cell] = error
            else:
                raise error
    if failed:
        named = "\n".join(f"  {cell}: {in_words(error)}" for cell, error in failed.items())
        raise CellsFailedError(
            f"{len(failed)} cells failed and {complete} are complete; the same command tries again what is missing:\n"
            f"{named}"
        ) from next(iter(failed.values()))


def in_words(error: Exception) -> str:
    """Kind and message of an error; those of faults in what was given speak for themselves."""
    known = isinstance(error, ValueError | WorkerDiedError | CellsFailedError)
    return str(error) if known else f"{type(error).__name__}: {error}"


class Worker:
    """In a worker: what computes cells, made with the first of them.

    Not before, where an error would not reach whoever waits for the cells.

    Args:
        setup: the pickled :data:`Setup`.
    """

    def __init__(self, setup: bytes) -> None:
        self._setup = setup
        self._compute: Callable[[Any], object] | None = None

    def __call__(self, cell: Any) -> Told:
        """Compute one."""
        try:
            if self._compute is None:
                self._compute = _unpickled(self._setup)()
        except Exception as error:
            return Told(_portable(error), started=False)
        try:
            self._compute(cell)
        except Exception as error:
            return Told(_portable(error))
        return Told()


def _unpickled(setup: bytes) -> Setup[Any]:
    try:
        made: Setup[Any] = pickle.loads(setup)
    except AttributeError as error:
        raise ValueError(
            f"a worker does not know what the task is made of ({error}): define it in a file that workers can import, "
            "not in a notebook or on the command line, or compute in this process: workers=1"
        ) from error
    return made


def begin_worker(threads: int) -> None:
    """What holds in every worker process, before anything is computed in it."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    torch.set_num_threads(threads)
    quiet_vmap()


def quiet_vmap() -> None:
    """Silence torch's notes on operations it cannot stack: stacking is tried, and not used where it does not pay."""
    warnings.filterwarnings("ignore", message="There is a performance drop because we have not yet implemented")


def _portable(error: Exception) -> Exception:
    """As it is if another process can read it, with where it happened; else its words."""
    where = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"In worker {os.getpid()} on {socket.gethostname()}:\n{where}")
    return error
