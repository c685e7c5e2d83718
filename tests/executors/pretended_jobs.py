"""Jobs that are calls in this process: the driver, the board and what a job does are the real ones."""

from contextlib import suppress

from stagewise.run.executors import Slurm
from stagewise.run.executors.local import Local
from stagewise.run.executors.share import Share
from stagewise.run.executors.slurm_job import Job


class KilledError(BaseException):
    """Takes the whole job with it."""


class Jobs:
    """Each ends as it is submitted; one that comes to a cell of these dies, with all that is under way beside it.

    Args:
        patch: the ``monkeypatch`` of the test.
        deadly: cells.
        at_once: whether they die before any cell.
    """

    def __init__(self, patch, deadly=(), at_once=False):
        self.deadly, self.at_once, self.submitted = set(deadly), at_once, 0
        patch.setattr(Slurm, "_submitted", lambda slurm, board, _, *given: [self.submit(slurm, board, *given)])
        patch.setattr(Local, "map_pickled", lambda _, setup, cells, processes, begun: self.run(cells, processes, begun))

    def submit(self, slurm, board, cells, alone, workers):
        self.submitted += 1
        _, processes, threads = slurm.shape(workers)
        with suppress(KilledError):
            Share(board, b"", cells, alone, processes, threads, slurm.retries)()
        return Job(str(self.submitted), set(cells), over=lambda: True, words=lambda: "killed")

    def run(self, cells, processes, begun):
        if self.at_once:
            raise KilledError
        for first in range(0, len(cells), processes):
            together = cells[first : first + processes]
            for cell in together:
                begun(cell)
            if self.deadly & {*together}:
                raise KilledError
            yield from ((cell, None) for cell in together)
