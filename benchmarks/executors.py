"""What spreading the cells of a run over workers costs, and whether its bits stay the same wherever they are computed.

    python benchmarks/executors.py                two single-thread workers against one, on the digits demo
    python benchmarks/executors.py --everywhere   the same run also by two nodes of Ray, jobs of submitit, four slices
    python benchmarks/executors.py --draws 512    a run of longer cells, beside which what is done once weighs less

Efficiency is the time of one worker by twice the time of two. That of the cells is what the executor is answerable
for, with the start of its workers; that of the whole run has the work in it that is done once: looking at the
checkpoints, what chains say of single samples, the report and its pages.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from rich.console import Console
from rich.table import Table

from stagewise.run.config import RunConfig
from stagewise.run.crew import Crew
from stagewise.run.executors import Local, Ray, Slurm
from stagewise.run.executors.base import quiet_vmap
from stagewise.run.pipeline import merge, run, run_slice
from stagewise.run.slices import Slice
from stagewise.studies.digits.study import demo

console = Console(width=120)


@dataclass(frozen=True)
class Timed:
    """One run.

    Attributes:
        cells: how many were computed.
        of_cells: seconds in which cells were computed.
        whole: seconds of the run.
        bits: hash of all that holds numbers.
    """

    cells: int
    of_cells: float
    whole: float
    bits: str


@contextmanager
def noted() -> Iterator[list[tuple[int, float]]]:
    """How many cells are asked for each time, and the seconds until they are complete."""
    seconds, compute = list[tuple[int, float]](), Crew.compute

    def timed_compute(crew: Crew, cells: Sequence[Any]) -> None:
        missing = sum(not crew.work.is_complete(cell) for cell in cells)
        start = perf_counter()
        compute(crew, cells)
        seconds.append((missing, perf_counter() - start))

    Crew.compute = timed_compute  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        Crew.compute = compute  # type: ignore[method-assign]


def bits(folder: Path) -> str:
    files = sorted(path for part in ("cells", "kept", "results") for path in (folder / part).rglob("[!.]*"))
    whole = hashlib.sha256()
    for path in files:
        if path.is_file():
            whole.update(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()[:12]


def timed(config: RunConfig, carry_out: Callable[[RunConfig], object]) -> Timed:
    start = perf_counter()
    with noted() as times:
        carry_out(config)
    cells, seconds = (sum(column) for column in zip(*times, strict=True))
    return Timed(int(cells), seconds, perf_counter() - start, bits(config.out))


def sliced(config: RunConfig) -> None:
    for number in range(1, 5):
        run_slice(config, Slice(number, 4))
    merge(config.out)


@contextmanager
def two_nodes() -> Iterator[None]:
    from ray.cluster_utils import Cluster

    home = os.environ["HOME"]
    os.environ["HOME"] = tempfile.mkdtemp()  # Ray writes a token there
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        yield
    finally:
        import ray

        ray.shutdown()
        cluster.shutdown()
        os.environ["HOME"] = home


def main(everywhere: bool, draws: int) -> None:
    quiet_vmap()
    with tempfile.TemporaryDirectory() as folder:
        recorded = demo(Path(folder) / "demo")

        def settings(name: str, **changes: object) -> RunConfig:
            sampling = replace(recorded.sampling, draws=draws)
            fixed = {"out": Path(folder) / name, "two_times": 0, "sampling": sampling}
            return recorded.model_copy(update=fixed | changes)

        found = {
            f"{workers} worker{'s' * (workers > 1)} here": timed(
                settings(f"local-{workers}", workers=workers, executor=Local(threads=1)), run
            )
            for workers in (1, 2)
        }
        if everywhere:
            with two_nodes():
                found["Ray, two nodes of one core"] = timed(settings("ray", executor=Ray()), run)
            local = Slurm(cluster="local", jobs=2, poll=0.2)
            found["submitit, two jobs of one core"] = timed(settings("slurm", executor=local), run)
            slices = settings("slices", workers=2, executor=Local(threads=1))
            found["four slices, merged"] = timed(slices, sliced)
    table = Table("where", "cells", "seconds of the cells", "seconds of the run", "bits", box=None)
    for name, one in found.items():
        table.add_row(name, str(one.cells), f"{one.of_cells:.1f}", f"{one.whole:.1f}", one.bits)
    console.print(table)
    one, two = [*found.values()][:2]
    console.print(
        f"efficiency of two workers: {one.of_cells / two.of_cells / 2:.2f} in the cells, "
        f"{one.whole / two.whole / 2:.2f} in the whole run"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--everywhere", action="store_true")
    parser.add_argument("--draws", type=int, default=64, help="of each chain")
    main(**vars(parser.parse_args()))
