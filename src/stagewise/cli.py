"""The command line. Torch is imported inside the commands, so that help appears at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from stagewise.cli_import import add_import

if TYPE_CHECKING:
    from stagewise.run.config import RunConfig

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

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change a setting, e.g. `-s sampling.draws=200`."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only predict time, memory and disk; sample nothing.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, the `out` of a configuration.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, traces and report.")] = Path("runs/demo"),
    dry_run: DryRun = False,
) -> None:
    """Real handwritten digits: train, sample, retrain, report. A few minutes on two cores."""
    from stagewise.studies.digits.study import demo as settings

    with _readable_errors():
        _run(settings(out.expanduser()), dry_run)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML configuration; see examples/.")],
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Study your own model: sample at every checkpoint, analyse, retrain if asked to, report.

    A run that was interrupted continues where it was. A run folder's own `config.yaml` runs again.
    """
    from stagewise.run.config import load_config

    with _readable_errors():
        _run(load_config(config, overrides or ()), dry_run)


@app.command()
def study(
    name: Annotated[str, typer.Argument(metavar="NAME", help="`digits`, `hierarchy`, `induction` or `language`")],
    out: Annotated[Path, typer.Option(help="Folder for everything the study writes.")] = Path("runs"),
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="EXPERIMENT", help="Carry out this experiment alone, e.g. `intervention` of `induction`."),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """A complete experiment with its report.

    `digits`: real handwritten digits, 32 checkpoints each of a full-batch and a minibatch run, with retraining.

    `hierarchy`: a deep linear network learns a tree of concepts, and every estimator is held against exact answers.

    `induction`: a transformer learns in-context Markov chains in stages, and exact influence says what teaches it.

    `language`: the same of classes of tokens in a small GPT-NeoX on the source of Python's standard library.
    """
    from stagewise.run.engine import quiet_vmap
    from stagewise.run.progress import progress_bars
    from stagewise.studies import STUDIES

    with _readable_errors():
        if name not in STUDIES:
            raise ValueError(f"there is no study {name!r}; there are: {', '.join(STUDIES)}")
        quiet_vmap()
        out = out.expanduser()  # the shell leaves the ~ of --out=~/runs as it is
        if dry_run:
            for text in STUDIES[name].cost(out / name):
                console.print(text, highlight=False, markup=False)
            return
        with progress_bars(console) as progress:
            outcomes = list(STUDIES[name].carry_out(out / name, progress, only or ()))
        for outcome in outcomes:
            console.rule(outcome.title)
            _show(outcome.findings, outcome.report)


@app.command()
def doctor(folder: RunFolder) -> None:
    """Are these chains to be trusted, and if not, what to change. One line per checkpoint.

    Exit code 0: all verdicts are "ok" or "beyond first order", which is answered with a word of caution. 1: the chains
    of some checkpoint cannot be trusted, and it is not answered. 2: there is nothing to judge: no run folder, no
    traces, or arguments that are wrong.
    """
    from rich.table import Table

    from stagewise.run.pipeline import checkup

    with _readable_errors(code=2):
        verdicts = checkup(folder)
        products = ("R-hat of products", "ESS of products")
        last = ("loss rise", "even share", "chains ok", "exact: r / slope")
        table = Table("step", "verdict", "R-hat", "ESS", *products, *last, box=None)
        for row in verdicts.rows:
            table.add_row(*row)
        console.print(table)
        for line in verdicts.advice:
            console.print(line, highlight=False, markup=False)
        if verdicts.replay:
            console.print(f"retraining: {verdicts.replay}", highlight=False, markup=False)
    if verdicts.untrusted:
        raise typer.Exit(1)


@app.command()
def report(folder: RunFolder) -> None:
    """Write the report of a run again, without sampling."""
    from stagewise.run.pipeline import report as write

    with _readable_errors():
        write(folder)
        console.print(f"report: {folder / 'report.html'}", highlight=False, markup=False, soft_wrap=True)


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

    with _readable_errors():
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

    with _readable_errors():
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


@app.command()
def config(
    path: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="A configuration to check.")] = None,
    overrides: Overrides = None,
) -> None:
    """Check a configuration and show it with every default filled in; without CONFIG, list all settings."""
    from stagewise.run import yaml12
    from stagewise.run.config import describe, load_config, plain

    with _readable_errors():
        if path is None:
            console.print(describe(), highlight=False, markup=False)
        else:
            settings = plain(load_config(path, overrides or ()))
            console.print(yaml12.dump(settings), highlight=False, markup=False)


def _run(settings: RunConfig, dry_run: bool) -> None:
    """Predict the cost of a configuration or carry it out, and say what was found."""
    from stagewise.reporting.findings import findings
    from stagewise.run.cost import estimate
    from stagewise.run.engine import quiet_vmap
    from stagewise.run.pipeline import run as carry_out
    from stagewise.run.progress import progress_bars

    quiet_vmap()
    if dry_run:
        console.print(estimate(settings).text(), highlight=False, markup=False)
        return
    with progress_bars(console) as progress:
        results = carry_out(settings, progress)
    console.print()
    _show(findings(results), settings.out / "report.html")


def _show(found: Sequence[str], report: Path) -> None:
    """Findings, and where the report is."""
    for sentence in found:
        console.print(f"- {sentence}", highlight=False, markup=False)
    console.print(f"\nreport: {report}", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _readable_errors(code: int = 1) -> Iterator[None]:
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
    from stagewise.run.task_file import in_one_line, place_in_task_file
    from stagewise.traces.lock import RunLockedError

    if out_of_memory(error):
        return f"memory ran out ({in_one_line(error)}). {_LESS_MEMORY}"
    if isinstance(error, BrokenProcessPool):
        return f"a worker process was killed, most likely because memory ran out. {_LESS_MEMORY}"
    if place := place_in_task_file(error):
        return f"{place}: {in_one_line(error)}"
    if not isinstance(error, ValueError | OSError | RunLockedError):
        return None
    cause, place = error.__cause__, None
    while cause is not None and place is None:  # e.g. of a loss that cannot be evaluated
        place, cause = place_in_task_file(cause), cause.__cause__
    return f"{place}: {error}" if place and place not in str(error) else str(error)


add_import(app, console, _readable_errors)

if __name__ == "__main__":
    app()
