"""Commands that make and judge runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from stagewise.cli.application import RunFolder, app, console, readable_errors

if TYPE_CHECKING:
    from stagewise.run.config import RunConfig
    from stagewise.run.slices import Slice
    from stagewise.run.status import Status

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change a setting, e.g. `-s sampling.draws=200`."),
]
ExecutorName = Annotated[
    str | None,
    typer.Option(
        "--executor", metavar="NAME", help="Where cells are computed: `local`, `ray` or `slurm`; `-s executor.KEY=...`."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only predict time, memory and disk; sample nothing.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, traces and report.")] = Path("runs/demo"),
    dry_run: DryRun = False,
) -> None:
    """Real handwritten digits: train, sample, retrain, report. A few minutes on two cores."""
    from stagewise.studies.digits.study import demo as settings

    with readable_errors():
        _run(settings(out.expanduser()), dry_run)


@app.command()
def run(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML configuration; see examples/.")],
    overrides: Overrides = None,
    executor: ExecutorName = None,
    cells: Annotated[
        str | None,
        typer.Option(metavar="K/N", help="Compute a slice of the cells alone, `3/16`, and no report: then `merge`."),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Study your own model: sample at every checkpoint, analyse, retrain if asked to, report.

    A run that was interrupted continues where it was. A run folder's own `config.yaml` runs again.
    """
    from stagewise.run.config import load_config
    from stagewise.run.slices import Slice
    from stagewise.traces.mirror import local_file

    with readable_errors():
        settings = load_config(local_file(config), _with_executor(overrides, executor))
        part = None if cells is None else Slice.parse(cells)
        if part is None or dry_run:
            _run(settings, dry_run, part)
        else:
            _run_slice(settings, part)


@app.command()
def merge(
    folder: RunFolder,
    others: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SLICES]...", help="Folders of other slices, where they did not work in one."),
    ] = None,
) -> None:
    """Report of a run whose slices were computed by `stagewise run --cells`; names the cells that are missing."""
    from stagewise.reporting.findings import findings
    from stagewise.run.pipeline import merge as carry_out
    from stagewise.run.progress import progress_bars
    from stagewise.traces.mirror import local

    with readable_errors():
        with progress_bars(console) as progress:
            results = carry_out(folder, others or (), progress)
        _show(findings(results), local(folder) / "report.html")


@app.command()
def status(folder: RunFolder) -> None:
    """How far a run is, who works on it and what failed. Exit code 1: something is missing still."""
    from rich.table import Table

    from stagewise.run.status import status as look

    with readable_errors(code=2):
        found = look(folder)
        table = Table("stage", "complete", "of", box=None)
        for stage, (done, total) in found.stages.items():
            table.add_row(stage, str(done), str(total))
        console.print(table)
        lines = [f"at work: {who}" for who in found.at_work]
        lines += [f"under way: {cell}, kept {age:.0f} s ago" for cell, age in found.underway.items()]
        lines += [f"{who}: {what}" for who, what in found.failures.items()]
        lines.append(_what_is_next(found, folder))
        for line in lines:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    if found.missing or not found.reported:
        raise typer.Exit(1)


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
    from stagewise.run.executors.base import quiet_vmap
    from stagewise.run.progress import progress_bars
    from stagewise.studies import STUDIES

    with readable_errors():
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

    from stagewise.run.checkup import checkup

    with readable_errors(code=2):
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
    from stagewise.traces.mirror import local

    with readable_errors():
        write(folder)
        console.print(f"report: {local(folder) / 'report.html'}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def config(
    path: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="A configuration to check.")] = None,
    overrides: Overrides = None,
) -> None:
    """Check a configuration and show it with every default filled in; without CONFIG, list all settings."""
    from stagewise.run import yaml12
    from stagewise.run.config import describe, load_config, plain

    with readable_errors():
        if path is None:
            console.print(describe(), highlight=False, markup=False)
        else:
            settings = plain(load_config(path, overrides or ()))
            console.print(yaml12.dump(settings), highlight=False, markup=False)


def _with_executor(overrides: Sequence[str] | None, executor: str | None) -> list[str]:
    """An executor named on the command line takes the place of the configuration's; its settings come after it."""
    return [*([f"executor={executor}"] if executor else []), *(overrides or ())]


def _what_is_next(found: Status, folder: str) -> str:
    if found.missing:
        return f"{found.missing} cells are missing: `stagewise run {quote(f'{folder}/config.yaml')}` computes them"
    if found.reported:
        return f"complete; report: {folder}/report.html"
    return f"all cells are complete: `stagewise merge {quote(folder)}` makes the report"


def _run_slice(settings: RunConfig, part: Slice) -> None:
    """Compute a slice, and say what comes then."""
    from stagewise.run.executors.base import quiet_vmap
    from stagewise.run.pipeline import run_slice
    from stagewise.run.progress import progress_bars

    quiet_vmap()
    with progress_bars(console) as progress:
        count = run_slice(settings, part, progress)
    command = f"stagewise merge {quote(str(settings.out))}"
    line = f"slice {part}: its {count} cells are complete; when all slices are, `{command}`"
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _run(settings: RunConfig, dry_run: bool, part: Slice | None = None) -> None:
    """Predict the cost of a configuration or carry it out, and say what was found."""
    from stagewise.reporting.findings import findings
    from stagewise.run.cost import estimate
    from stagewise.run.executors.base import quiet_vmap
    from stagewise.run.pipeline import run as carry_out
    from stagewise.run.progress import progress_bars

    quiet_vmap()
    if dry_run:
        console.print(estimate(settings, part).text(), highlight=False, markup=False)
        return
    with progress_bars(console) as progress:
        results = carry_out(settings, progress)
    console.print()
    _show(findings(results), settings.folder / "report.html")


def _show(found: Sequence[str], report: Path) -> None:
    """Findings, where the report is, and how to look around."""
    for sentence in found:
        console.print(f"- {sentence}", highlight=False, markup=False)
    console.print(f"\nreport: {report}", highlight=False, markup=False, soft_wrap=True)
    if (report.parent / "explorer").is_dir():
        line = f"look around: stagewise explore {report.parent}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
