"""A run on an object store, in a process of its own that notes what it computes; cells are uploaded in many parts."""

import os
from pathlib import Path

import s3fs

from hurried import without_pictures
from stagewise.run import engine, pipeline
from stagewise.run.config import load_config
from stagewise.run.kept import Kept


def drive(config: Path, settings: list[str], log: Path) -> None:
    os.setsid()  # its workers can be known by its group
    without_pictures()
    s3fs.core.calculate_chunksize = lambda size, chunksize=None, **_: 2000
    get, sample_block = Kept.get, engine.sample_block

    def note(name):
        with log.open("a") as file:
            file.write(f"{name}\n")

    def noted_get(kept, name, cause, compute):
        before = set(kept._store.root.glob("kept/*"))

        def noted():
            computed.append(name)
            return compute()

        computed = []
        found = get(kept, name, cause, noted)
        for path in set(kept._store.root.glob("kept/*")) - before if computed else ():
            note(f"kept/{path.name}")
        return found

    def noted_block(task, checkpoint, *rest):
        note(f"cells/{checkpoint.step:08d}-0000.zip")
        return sample_block(task, checkpoint, *rest)

    Kept.get, engine.sample_block = noted_get, noted_block
    pipeline.run(load_config(config, settings))
