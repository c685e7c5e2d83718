"""What `stagewise run` does, in order: load, sample, analyse, prove, report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import xarray as xr

from stagewise.dynamics.events import events
from stagewise.dynamics.kernel_map import influence_map
from stagewise.explorer.page import write_explorer
from stagewise.influence.bif import bif
from stagewise.influence.loss_kernel import loss_kernel
from stagewise.influence.trusted import ReadOnce, untrusted
from stagewise.reporting.contents import write_report
from stagewise.results import BIF, EXACT, FIRST_ORDER, Exemplar, Results
from stagewise.run import yaml12
from stagewise.run.analysis import Analysis, in_two_times, mean_losses, measure, spread
from stagewise.run.cells_file import CellList, collect
from stagewise.run.config import RunConfig, load_config
from stagewise.run.estimators import (
    SAMPLED,
    Found,
    exact_samples,
    exact_tokens,
    of_chains,
    sampled_samples,
    without_chains,
)
from stagewise.run.exemplars import chosen, exemplars, from_untrusted, tokens_of
from stagewise.run.first_order import first_order, sampled_influence
from stagewise.run.folder import load_results, save_results
from stagewise.run.imported import fitting, groups_digest
from stagewise.run.opened import OpenedRun, open_run
from stagewise.run.per import asked
from stagewise.run.progress import Progress, silent
from stagewise.run.samples import described
from stagewise.run.slices import Slice
from stagewise.traces.draws import mean_losses_of_draws
from stagewise.traces.mirror import local, place_of
from stagewise.traces.remote import Remote
from stagewise.traces.store import TraceStore
from stagewise.varied import by_itself

_MAPS, _MOST_MAPPED = 8, 2048  # checkpoints; and samples, whose pairs are all computed
_NOT_SAMPLED = xr.Dataset({name: ("step", np.array([], dtype=str)) for name in ("verdict", "advice")}, {"step": []})


def run(config: RunConfig, progress: Progress = silent) -> Results:
    """Carry out a configuration; what the run folder already holds is not computed again.

    Returns:
        The results that the report in ``config.folder`` shows.

    Raises:
        ValueError: the configuration, task, checkpoints or run folder cannot be used, with the reason.
        CellsFailedError: some cells could not be computed; all others are.
    """
    opened = open_run(config, progress)
    with opened.alone():
        opened.crew.compute(opened.cells)
        return _finish(opened)


def run_slice(config: RunConfig, part: Slice, progress: Progress = silent) -> int:
    """Compute a slice of the cells of a run, beside others who do the same; :func:`merge` makes the results of all.

    Returns:
        The number of cells of the slice.

    Raises:
        ValueError: as :func:`run`, or the others work on other cells.
        CellsFailedError: some cells could not be computed; all others are.
    """
    opened = open_run(config, progress)
    with opened.beside_others(part):
        cells = part.part(opened.cells)
        opened.crew.compute(cells)
    return len(cells)


def merge(folder: str | Path, others: Sequence[str | Path] = (), progress: Progress = silent) -> Results:
    """Make the results and the report of a run whose slices are computed.

    Args:
        folder: the run folder, or its url.
        others: run folders of other slices, where they did not work in one: their cells are copied.
        progress: is told of what is left to do.

    Raises:
        ValueError: cells are missing, with their names; folders are not of one run; or ``others`` are given and one of
            the folders is a url.
    """
    if others and (urls := [place for place in map(place_of, (folder, *others)) if isinstance(place, Remote)]):
        raise ValueError(
            f"slices are copied between folders of this machine, and {urls[0]} is none; slices on an object store work "
            "in one url, out=..., and are merged there: give its url alone"
        )
    for other in others:
        collect(Path(other), Path(folder))
    opened = open_run(load_config(local(folder, "config.yaml") / "config.yaml"), progress)
    CellList.of(opened.cells).check_whole(opened.work.store)
    with opened.alone(again=False):
        return _finish(opened)


def _finish(opened: OpenedRun) -> Results:
    traces = ReadOnce.of(opened.work.store)
    return _report(traces, _analyse(opened.analysis, traces, opened.left_out, opened.work.unusable))


def _analyse(
    analysis: Analysis, traces: ReadOnce, left_out: Mapping[str, str], unusable: Mapping[int, str]
) -> xr.Dataset | None:
    """All that the report shows beside the traces, into the run folder; and the influence that the chains show."""
    task, config = analysis.task, analysis.config
    datasets = {"losses": mean_losses(task, analysis.trajectory, sorted({*analysis.digests, *unusable}))}
    known = first_order(analysis) if SAMPLED in config.estimators else None
    if known is not None:
        datasets[FIRST_ORDER] = known
    influence, found = sampled_influence(traces, known), without_chains(analysis)
    datasets |= {f"baseline {name}": curves for name, curves in found.curves.items()}
    failed, per = found.left_out, asked(task, config)
    if per == by_itself(task):
        datasets["losses"].attrs["curves"] = per  # those of samples are not kept twice
    else:
        single = found.single
        if influence is not None and SAMPLED in config.estimators and f"{BIF} of {per}s" not in left_out:
            single = single | {BIF: of_chains(analysis, traces)}
        datasets |= {f"single {name}": values for name, values in single.items()}
    try:
        datasets |= measure(analysis)
    except ValueError as error:
        failed["retraining"] = str(error)
    try:
        two_times = in_two_times(analysis)
        datasets |= {} if two_times is None else {"in two times": two_times}
    except ValueError as error:
        failed["influence in two times"] = str(error)
    datasets["samples"] = described(task)
    notes = [f"Without {name}: {reason}" for name, reason in {**left_out, **failed}.items()]
    of_run = {"groups": groups_digest(task), "checkpoints": json.dumps(analysis.digests)}
    datasets["losses"].attrs |= {"task": repr(task), "notes": json.dumps(notes)} | of_run
    save_results(config.folder, datasets, _exemplars(analysis, found, influence, traces))
    traces.push("results")
    return influence


def _exemplars(analysis: Analysis, found: Found, influence: xr.Dataset | None, traces: TraceStore) -> list[Exemplar]:
    """By the best estimator that there is."""

    def named(name: str, found: list[Exemplar]) -> list[Exemplar]:
        return [replace(exemplar, estimator=name) for exemplar in found]

    task, count, single = analysis.task, analysis.config.exemplars, found.single
    of_samples = {} if asked(task, analysis.config) == "token" else single
    if (exact := found.curves.get(EXACT)) is not None:
        samples = partial(chosen, single[EXACT]) if EXACT in of_samples else partial(exact_samples, analysis)
        tokens = partial(exact_tokens, analysis)
        if EXACT in single and EXACT not in of_samples:
            tokens = partial(tokens_of, single[EXACT])
        return named(EXACT, exemplars(task, samples, exact, count, of_tokens=tokens))
    if influence is not None:
        return named(BIF, exemplars(task, partial(sampled_samples, analysis, traces), influence, count))
    for name, values in of_samples.items():
        return named(name, exemplars(task, partial(chosen, values), found.curves[name], count))
    return []


def report(folder: str | Path) -> Results:
    """Write the report of a run folder again, from its traces and saved results.

    Raises:
        RunFolderError: it is no run folder.
        FileNotFoundError: the run has not got as far as results.

    Example:
        >>> results = sw.report("runs/first")
        >>> results.title, results.exact.step.values.tolist()
        ('Two classes', [5, 20, 40])
    """
    traces = ReadOnce.of(TraceStore.read_only(folder))
    known = load_results(traces.root)[0].get(FIRST_ORDER)  # else it says how to get them, before anything is computed
    return _report(traces, sampled_influence(traces, known))


def _report(traces: ReadOnce, influence: xr.Dataset | None) -> Results:
    folder = traces.root
    datasets, picked = load_results(folder)
    settings = yaml12.load((folder / "config.yaml").read_text(encoding="utf-8"))
    single = {name.removeprefix("single "): found for name, found in datasets.items() if name.startswith("single ")}
    baselines = {
        name.removeprefix("baseline "): found for name, found in datasets.items() if name.startswith("baseline ")
    }
    reasons = untrusted(traces.verdicts)  # perhaps more than there were when the results were written
    if BIF in single:
        drawn = single.pop(BIF)
        steps = [step for step in drawn["step"].values.tolist() if step not in reasons]
        single |= {BIF: drawn.sel(step=steps)} if steps else {}
    if datasets["losses"].attrs.get("curves") == "sample":
        single = baselines | ({} if influence is None else {BIF: influence})
    others, unfit = fitting(folder, datasets["losses"].attrs)
    results = Results(
        title=settings["title"],
        losses=datasets["losses"],
        diagnostics=traces.diagnostics if traces.steps else _NOT_SAMPLED,
        influence=influence,
        correlation=None if influence is None else bif(traces, kind="correlation"),
        positions=None if influence is None else _positions(traces, influence["step"].values.tolist()),
        baselines=baselines | others,
        single=single,
        measured=datasets.get("measured"),
        replay=datasets.get("replay"),
        in_two_times=datasets.get("in two times"),
        draws=mean_losses_of_draws(traces),
        samples=datasets.get("samples"),
        notes=json.loads(datasets["losses"].attrs.get("notes", "[]")) + unfit,
        exemplars=[exemplar for exemplar in picked if not from_untrusted(exemplar, reasons)],
        withheld={exemplar.step: reasons[exemplar.step] for exemplar in picked if from_untrusted(exemplar, reasons)},
        config=settings,
        provenance=json.loads((folder / "provenance.json").read_text(encoding="utf-8")),
    )
    if results.answered is not None:
        results = replace(results, events=events(results.answered))
    write_report(results, folder, explorer=write_explorer(results, folder))
    traces.push("explorer", "figures", "report.html")
    return results


def _positions(traces: ReadOnce, steps: list[int]) -> xr.Dataset | None:
    """The map of the training samples at a few checkpoints, where it has labels to show."""
    labels = (traces.labels or {}).get("train")
    if labels is None or np.ndim(labels) != 1 or not 2 < traces.load(steps[0])["train"].sizes["sample"] <= _MOST_MAPPED:
        return None
    return influence_map(loss_kernel(traces, steps=spread(steps, _MAPS)))
