"""Cells on a Ray cluster that is running already, as ``ray start`` makes it."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field

from stagewise.run.executors.base import Ends, Setup, Told, Worker, WorkerDiedError, begin_worker, give_out

C = TypeVar("C", bound=Hashable)

_EXTRA = "executor ray needs Ray: pip install 'stagewise[ray]'"


class Ray(BaseModel):
    """Workers of a Ray cluster. They share the run folder with this process, or an object store.

    Example:
        >>> import stagewise as sw
        >>> sw.Ray(cpus=4, gpus=0.5).address
        'auto'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["ray"] = "ray"
    address: str = Field("auto", description="of the cluster; auto: the one that this machine is part of")
    cpus: int = Field(1, gt=0, description="cores of each worker, and threads of PyTorch in it")
    gpus: float = Field(0, ge=0, description="GPUs of each worker; those of one GPU that is shared have a part each")
    memory: float | None = Field(None, gt=0, description="GiB that each worker is to find free")
    retries: int = Field(2, ge=0, description="how often a cell is tried again whose worker was lost, or failed")

    @property
    def threads(self) -> int:
        """Of PyTorch in each worker."""
        return self.cpus

    def map(
        self, setup: Setup[C], cells: Sequence[C], workers: int | None = None, folder: Path | None = None
    ) -> Ends[C]:
        """See :class:`stagewise.run.executors.base.Executor`.

        Raises:
            ImportError: Ray is not installed.
            ValueError: there is no such cluster, or it has no room for a worker.
        """
        del folder
        self._connect()
        import cloudpickle
        import ray

        self._check_room()
        options: dict[str, Any] = {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_retries": 0}
        if self.memory:
            options["memory"] = self.memory * 2**30
        work_on = ray.remote(_work_on).options(**options)
        pickled = cloudpickle.dumps(setup)  # what a script defines goes with it
        given, key = ray.put(pickled), hashlib.sha256(pickled).hexdigest()
        tasks = set[Any]()

        def begin(cell: C) -> Any:
            tasks.add(task := work_on.remote(given, key, self.cpus, cell))
            return task

        def told(task: Any) -> Told:
            tasks.remove(task)
            return self._told(task)

        try:
            yield from give_out(
                cells, workers, self.retries, begin, lambda busy: ray.wait([*busy], num_returns=1)[0], told
            )
        finally:
            for task in tasks:
                ray.cancel(task, force=True)

    def _connect(self) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError(_EXTRA) from error
        if ray.is_initialized():
            return
        try:
            ray.init(address=self.address, log_to_driver=False, configure_logging=False)
        except ConnectionError as error:
            raise ValueError(
                f"there is no Ray cluster at {self.address!r}: start one with `ray start --head` here and "
                "`ray start --address=HOST:6379` on the other machines, or give executor.address"
            ) from error

    def room(self) -> int:
        """How many workers the cluster holds at the same time, if nobody else works there.

        Raises:
            ImportError: Ray is not installed.
            ValueError: there is no such cluster, or it has no room for a worker.
        """
        self._connect()
        return self._check_room()

    def _check_room(self) -> int:
        """A task that fits no node would wait for ever."""
        import ray

        wanted = {"CPU": self.cpus, "GPU": self.gpus, "memory": (self.memory or 0) * 2**30}
        nodes: list[dict[str, float]] = [node["Resources"] for node in cast(Any, ray).nodes() if node["Alive"]]
        room = sum(int(min(node.get(name, 0) // of for name, of in wanted.items() if of)) for node in nodes)
        if not room:
            there = "; ".join(", ".join(f"{name} {node.get(name, 0):g}" for name in wanted) for node in nodes)
            asked = ", ".join(f"{name} {amount:g}" for name, amount in wanted.items())
            raise ValueError(
                f"no node of the Ray cluster has room for a worker, which needs {asked}; the nodes have: {there}. "
                "Lower executor.cpus, executor.gpus or executor.memory, or add a node"
            )
        return room

    @staticmethod
    def _told(task: Any) -> Told:
        import ray

        try:
            told: Told = ray.get(task)
            return told
        except ray.exceptions.RayTaskError as error:  # what came before the cell: e.g. stagewise is not installed there
            return Told(RuntimeError(str(error)), started=False)
        except ray.exceptions.RayError as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            return Told(WorkerDiedError(f"a Ray worker or its node was lost: {first}"))


_workers: dict[str, Worker] = {}  # of this process, by what they were set up with; the last alone is kept


def _work_on(setup: bytes, key: str, threads: int, cell: Any) -> Told:
    if key not in _workers:
        begin_worker(threads)
        _workers.clear()
        _workers[key] = Worker(setup)
    return _workers[key](cell)
