"""Commands that show results to people and to other tools, and take in those of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from stagewise.cli.application import RunFolder, app, console, readable_errors

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


@app.command()
def explore(
    folder: RunFolder,
    port: Annotated[int, typer.Option(help="0: any that is free.")] = 0,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open a browser at the page.")] = True,
) -> None:
    """Look around in the results of a run, in a browser, until Ctrl-C.

    Only this machine can reach the page, and only with the address that is printed.
    """
    import webbrowser

    from stagewise.explorer.serve import address, application, listen, new_token, serve

    with readable_errors():
        token = new_token()
        app_of_run = application(folder, token)
        listener = listen(port)
        console.print(f"{address(listener, token)}\nCtrl-C ends it", highlight=False, markup=False, soft_wrap=True)
        if browser:
            webbrowser.open(address(listener, token))
        serve(app_of_run, listener)


@app.command()
def export(
    folder: RunFolder,
    page: Annotated[Path | None, typer.Argument(metavar="[PAGE]", help="File for the page of `explore`.")] = None,
    jsonl: Annotated[
        Path | None, typer.Option(help="File for the samples that matter most, to be read by PAIR's viewer.")
    ] = None,
    untrusted: Annotated[
        bool,
        typer.Option("--untrusted", help="Name samples picked by chains that cannot be trusted, too (JSON lines)."),
    ] = False,
) -> None:
    """Bake the page of a run with its data into one file, which opens from disk; or write JSON lines.

    `stagewise export RUN page.html` makes the page of `stagewise explore`. `--jsonl FILE` writes the training samples
    that matter most for https://pair-code.github.io/pretraining-tda/demo.
    """
    from stagewise.explorer.page import export_page
    from stagewise.run.jsonl import read_jsonl, write_jsonl

    with readable_errors():
        if page is None and jsonl is None:
            raise ValueError(f"name what to write: `stagewise export {folder} page.html`, or --jsonl FILE")
        if page is not None:
            size = export_page(folder, page.expanduser()) / 1e6
            console.print(f"{page}: {size:.1f} MB", highlight=False, markup=False, soft_wrap=True)
        if jsonl is None:
            return
        lines = write_jsonl(folder, jsonl, trusted_only=not untrusted)
        console.print(f"{lines} lines: {jsonl}", highlight=False, markup=False, soft_wrap=True)
        doubts = {record["step"]: record["untrusted"] for record in read_jsonl(jsonl) if "untrusted" in record}
        for step, reason in doubts.items():
            what = "not to be trusted" if untrusted else "withheld"
            console.print(f"step {step}: {what}: {reason}", highlight=False, markup=False)


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


@app.command()
def validate(
    path: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="JSON lines, ours or other people's.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a line.")] = False,
) -> None:
    """Are these attributions, as `export --jsonl` writes them? Names the first line that is not, and why."""
    from stagewise.run.attribution import Attribution
    from stagewise.run.jsonl import read_jsonl

    with readable_errors():
        if schema:
            console.print_json(data=Attribution.model_json_schema())
        if path is not None:
            console.print(f"{path}: {len(read_jsonl(path))} lines, all right", highlight=False, markup=False)
        elif not schema:
            raise ValueError("name a file of JSON lines, or ask for the --schema")


def _lines(path: Path | None) -> list[str] | None:
    return None if path is None else path.expanduser().read_text(encoding="utf-8").split()


def _range(text: str | None) -> range | None:
    if text is None:
        return None
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise ValueError(f"--trained must be FIRST:END, e.g. 1000:1030 for 30 steps, got {text!r}")
    return range(int(first), int(end))
