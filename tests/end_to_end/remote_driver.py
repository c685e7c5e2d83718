"""A run on an object store, in a process of its own that notes what it computes; cells are uploaded in many parts."""

import os
from pathlib import Path

import s3fs

from hurried import without_pictures
from stagewise.run import pipeline, work
from stagewise.run.config import load_config
from stagewise.traces.store import TraceStore


def drive(config: Path, settings: list[str], log: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)  # which is not that of the process that this one was forked from
    os.setsid()  # its workers can be known by its group
    without_pictures()
    s3fs.core.calculate_chunksize = lambda size, chunksize=None: 2000
    sample_block, push = work.sample_block, TraceStore.push

    def note(name):
        with log.open("a") as file:
            file.write(f"{name}\n")

    def noted_block(task, checkpoint, *rest):
        note(f"cells/{checkpoint.step:08d}-0000.zip")
        return sample_block(task, checkpoint, *rest)

    def noted_push(store, *names):  # of what was computed, before anybody else sees it
        for name in names:
            note(name)
        push(store, *names)

    work.sample_block, TraceStore.push = noted_block, noted_push
    pipeline.run(load_config(config, settings))
