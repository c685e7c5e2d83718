"""``stagewise import``: scores of other tools into a run folder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder with results.")]
Scores = Annotated[
    Path,
    typer.Argument(
        metavar="SCORES",
        help="A score folder of bergson or dattri-llm, or a file of one array (train, query): .npy, .npz, "
        ".safetensors, .pt, TRAK's .mmap.",
    ),
]
Name = Annotated[str, typer.Option(help="What the report calls these scores.")]
Step = Annotated[int, typer.Option(help="The checkpoint whose scores they are; repeat the command for others.")]
Helpful = Annotated[
    Literal["positive", "negative"] | None,
    typer.Option(help="Sign of the score of a helpful sample, where the files do not say."),
]
Nats = Annotated[bool, typer.Option("--nats", help="They are in nats per unit weight; else only order is compared.")]
Transpose = Annotated[bool, typer.Option("--transpose", help="The array is (query, train).")]
Ids = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="dattri-llm: the samples' hashes in the run's order, one a line."),
]
Trained = Annotated[
    str | None,
    typer.Option(metavar="FIRST:END", help="dattri-llm: only what it scored of these training steps, e.g. 1000:1030."),
]


def add_import(app: typer.Typer, console: Console, readable_errors: Callable[[], AbstractContextManager[None]]) -> None:
    """Register the command."""

    @app.command("import")
    def import_scores(
        folder: RunFolder,
        scores: Scores,
        name: Name,
        step: Step,
        helpful: Helpful = None,
        nats: Nats = False,
        transpose: Transpose = False,
        train_ids: Ids = None,
        query_ids: Ids = None,
        trained: Trained = None,
    ) -> None:
        """Scores of another tool as one more estimator of a run: `stagewise report RUN` then judges them.

        Rows are the run's training samples, columns the samples of its query sets (or its query groups), in its order.
        """
        from stagewise.foreign.read import read_scores
        from stagewise.run.imported import import_scores as into

        with readable_errors():
            read = read_scores(
                scores,
                helpful=helpful,
                nats=nats,
                transpose=transpose,
                train_ids=_lines(train_ids),
                query_ids=_lines(query_ids),
                trained=_range(trained),
            )
            found = into(folder, read, name=name, step=step)
            steps = read.attrs.get("of training steps")
            tool = f"{read.attrs['tool']}, scored of training steps {steps}" if steps else read.attrs["tool"]
            text = (
                f"{name}, step {step}: {read.sizes['train']} x {read.sizes['query']} scores ({tool}) as influence of "
                f"{found.sizes['train']} train groups on {found.sizes['query']} queries, negative = helpful, "
                f"{read.attrs['units']}; `stagewise report {folder}` shows how they agree"
            )
            console.print(text, highlight=False, markup=False, soft_wrap=True)


def _lines(path: Path | None) -> list[str] | None:
    return None if path is None else path.expanduser().read_text(encoding="utf-8").split()


def _range(text: str | None) -> range | None:
    if text is None:
        return None
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise ValueError(f"--trained must be FIRST:END, e.g. 1000:1030 for 30 steps, got {text!r}")
    return range(int(first), int(end))
