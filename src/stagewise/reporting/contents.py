"""The report of a run: what stands in it, in which order and with which captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import xarray as xr

from stagewise.dynamics.events import Event
from stagewise.dynamics.stages import half_learnt
from stagewise.reporting import check_figures, figures, tables, triangle_figure
from stagewise.reporting.exemplar_figure import PER_SIDE, exemplar_grid
from stagewise.reporting.findings import clearest_flips, findings
from stagewise.reporting.map_figure import sample_map
from stagewise.reporting.page import Page, Plate, Section, write_page
from stagewise.reporting.passages import Passages, passages_of
from stagewise.reporting.tables import Table
from stagewise.reporting.words import count, label_text, number, quoted
from stagewise.results import DAMPED, Results, others
from stagewise.retraining.scores import measured_influence

_SHOWN_FLIPS = 15
_TRIANGLES = 2
_MOST_EVENTS = 500


def sections(results: Results) -> list[Section]:
    """All of the report but the findings, the configuration and the provenance."""
    in_two_times = [*_two_times(results)]
    return [
        Section("The training run", [_losses(results)]),
        Section("Influence over training", [*_influence(results)]),
        *([Section("Influence in two times", in_two_times)] if in_two_times else []),
        Section("Held against retraining", [*_comparison(results)]),
        Section("Held against the replayed window", [*_size_checks(results)]),
        Section("Samples that mattered most", [*_exemplars(results), *_tokens(results)]),
        *([Section("Samples that are alike to the model", [*_map(results)])] if results.positions is not None else []),
        Section("Can the chains be trusted?", [*_chains(results)]),
    ]


def _shading(results: Results) -> str:
    return " Shaded: checkpoints whose chains cannot be trusted." if results.omitted else ""


def _losses(results: Results) -> Plate:
    queries = results.losses.sizes["query"]
    lines = "grey" if queries > figures.MAX_QUERIES else "in colour"
    some = results.losses.attrs.get("train_samples")
    whose = "the training set" if some is None else f"{some:,} samples of the training set, evenly spaced"
    caption = (
        f"Mean loss on {whose} (black; dots are the checkpoints) and on {count(queries, 'query', 'queries')} ({lines})."
    )
    if results.exact is not None:
        return Plate("losses", caption, figures.loss_curves(results.losses))
    return Plate("losses", caption + _shading(results), figures.loss_curves(results.losses, results.trusted))


def _influence(results: Results) -> Iterator[Plate | Table]:
    influence, events = results.answered, results.events
    stand_in = results.stand_in
    if influence is None:
        if stand_in is None:
            yield Plate("influence", "There are no influence curves, because no checkpoint could be answered.")
            return
        caption = f"No checkpoint could be sampled: {DAMPED} in place of what the chains would say. "
        yield Plate(
            "influence", caption + _curves_caption(stand_in), figures.influence_curves(stand_in, losses=results.losses)
        )
        return
    if results.exact is None:
        drawn = figures.influence_curves(influence, events, results.trusted, stand_in, results.losses)
        squares = "" if stand_in is None else f" Open squares: {DAMPED}, at checkpoints that chains cannot answer."
        yield Plate("influence", _curves_caption(influence) + squares + _shading(results), drawn)
    else:
        beside, what = _beside(results)
        drawn = figures.influence_curves(influence, events, None, beside, results.losses)
        yield Plate("influence", _curves_caption(influence) + what, drawn)
    steps = figures.eventful_steps(influence, events)
    yield Plate("heatmaps", _matrices_caption(influence, steps), figures.influence_heatmaps(influence, steps))
    if results.correlation is not None and set(steps) <= set(results.correlation["step"].values.tolist()):
        caption = (
            "The same as minus the correlation of losses, which has no unit: how alike groups are, whatever the "
            "size of their losses."
        )
        yield Plate("correlations", caption, figures.influence_heatmaps(results.correlation, steps))
    if flips := clearest_flips(influence, events)[:_SHOWN_FLIPS]:
        yield tables.events_table(flips, "The clearest sign flips between different groups")
    if events:
        yield _events(influence, events)
    else:
        yield Plate("events", "There is no table of events: no curve has a sign that noise could not have made.")


def _events(influence: xr.Dataset, events: Sequence[Event]) -> Table:
    """All of them; of very many, as single samples have, those of the curves that reach furthest."""
    if len(events) <= _MOST_EVENTS:
        return tables.events_table(events, f"All {count(len(events), 'event')}")
    reach = abs(influence["value"]).max("step").transpose("train", "query").values
    rows, columns = ({label: k for k, label in enumerate(influence[d].values.tolist())} for d in ("train", "query"))
    first = sorted(events, key=lambda event: -float(reach[rows[event.train], columns[event.query]]))[:_MOST_EVENTS]
    title = f"{_MOST_EVENTS} of {len(events):,} events, those of the curves that reach furthest from zero"
    return tables.events_table(first, title)


def _beside(results: Results) -> tuple[xr.Dataset | None, str]:
    """What stands beside the exact influence: what was measured, else what was sampled; and how to call it."""
    if results.measured is not None and results.measured.attrs["weight"] != 1:
        return measured_influence(results.measured), " Open squares: measured by retraining the window."
    if results.sampled is not None:
        return results.sampled, " Open squares: sampled, at the checkpoints whose chains can be trusted."
    return None, ""


def member_of(influence: xr.Dataset) -> str:
    """Of what unit weight is: a sample, or a token."""
    return str(influence.attrs.get("member", "sample"))


def _curves_caption(influence: xr.Dataset) -> str:
    shown, queries, member = len(figures.strongest_queries(influence)), influence.sizes["query"], member_of(influence)
    which = "each query" if shown == queries else f"the {shown} most influenced of {queries} queries"
    most = min(figures.MAX_CURVES, influence.sizes["train"])
    groups = "the train group" if most == 1 else f"the {most} train groups that reach furthest from zero"
    own = "" if others(influence).all() else " (that of a group on itself, always large, is in the next figure)"
    return (
        f"Influence on {which} of {groups}{own}. Below zero a group is helpful: more weight on it lowers the loss of "
        f"the query. Values are means over pairs of one training {member} and one of the query; bands are pointwise "
        "95% intervals. Diamonds mark sign flips, triangles peaks that noise cannot have made; the bar through a mark "
        "is the 95% interval of its step."
    )


def _matrices_caption(influence: xr.Dataset, steps: Sequence[int]) -> str:
    rows = influence.sizes["train"]
    every = (
        "every train group" if rows <= figures.MAX_ROWS else f"the {figures.MAX_ROWS} of {rows:,} that reach furthest"
    )
    caption = (
        f"Influence of {every} (rows) on every query (columns) at {count(len(steps), 'checkpoint')}, those "
        "with most flips and peaks where there are any. Blue is helpful, red harmful; a dot marks cells within two "
        "standard errors of zero."
    )
    own = " The colours are scaled to pairs of different labels; the influence of a group on itself may lie beyond."
    return caption if others(influence).all() else caption + own


def _two_times(results: Results) -> Iterator[Plate]:
    """Triangles of the pairs that turn most clearly, else of those with the strongest influence."""
    influence = results.in_two_times
    if influence is None:
        return
    flips = [] if results.answered is None else clearest_flips(results.answered, results.events)
    strength = np.nan_to_num(abs(influence["value"]).transpose("train", "query", ...).values).max((2, 3))
    largest = np.dstack(np.unravel_index(np.argsort(-strength * others(influence), axis=None), strength.shape))[0]
    pairs = [(flip.train, flip.query) for flip in flips]
    pairs += [(influence["train"].values[i], influence["query"].values[j]) for i, j in largest]
    for k, (train, query) in enumerate([*dict.fromkeys(pairs)][:_TRIANGLES], start=1):
        caption = (
            f"When {quoted(train)} was trained on (across), and what that did to the loss on {quoted(query)} at a "
            "later step (up): exact, by differentiating the run itself. Read upwards what becomes of one lesson, "
            "across which lessons a loss is made of. Lines: when half of that loss had gone. Hatched: training again "
            "with changed weights did not bear the number out."
        )
        stages = half_learnt(results.losses, query)
        yield Plate(f"two-times-{k}", caption, triangle_figure.time_triangle(influence, train, query, stages))


def _comparison(results: Results) -> Iterator[Plate | Table]:
    scores = results.agreements
    if results.measured is None:
        reason = "No effect was measured by retraining, so predictions are not held against anything here."
        yield Plate("measured", reason)
        return
    if not scores:
        yield Plate("measured", "Retraining and the estimates of influence have no checkpoint in common.")
        return
    first, shared = next(iter(scores.items()))
    if results.predicted is not None:
        steps = [int(shared["step"][k]) for k in figures.evenly(shared.sizes["step"], check_figures.MAX_SCATTERS)]
        drawn = check_figures.predicted_against_measured(results.predicted, results.measured, shared, steps)
        yield Plate("predicted-measured", _scatter_caption(results.measured), drawn)
    caption = (
        "Agreement with retraining at every checkpoint: correlation over pairs of groups, and slope of measured on "
        f"predicted effects (1 = the right size). The band is the 95% bootstrap interval of {label_text(first)} over "
        "groups. A curve that leaves the panel is off by more than the axis shows."
    )
    drawn = check_figures.agreement_over_training(scores, results.trusted)
    yield Plate("agreement", caption + _shading(results), drawn)
    yield tables.agreement_table(scores)


def _scatter_caption(measured: xr.Dataset) -> str:
    weight, window = float(measured.attrs["weight"]), int(measured.attrs["window"])
    own = "" if others(measured).all() else " Pairs of a group with itself count only in “all pairs”."
    return (
        f"Change of the query losses after {count(window, 'training step')} with one train group at weight "
        f"{number(weight)}: measured by training again (vertical) against predicted, influence × group size × change "
        "of weight (horizontal). One point per train group and query; bars are one standard error; on the grey line "
        f"a prediction is right in nats. The extremes are named train→query.{own}"
    )


def _exemplars(results: Results) -> Iterator[Plate | Table | Passages]:
    for step, reason in results.withheld.items():
        yield Plate(f"withheld-{step}", f"Chains that cannot be trusted pick no samples. Step {step}: {reason}.")
    if not results.exemplars and not results.withheld:
        yield Plate("exemplars", "Single training samples were not looked at in this run.")
    by_query = sorted(results.exemplars, key=lambda exemplar: str(exemplar.query))
    for k, (query, group) in enumerate(groupby(by_query, key=lambda exemplar: exemplar.query)):
        chosen = list(group)
        if any(exemplar.token_values for exemplar in chosen):
            yield passages_of(chosen)
        if any(exemplar.images is None for exemplar in chosen):
            yield tables.exemplars_table(chosen)
            continue
        caption = (
            f"Training samples that mattered most for {quoted(query)} at {count(len(chosen), 'checkpoint')}: up to "
            f"{PER_SIDE} most helpful on the left, up to {PER_SIDE} most harmful on the right, each with its label and "
            "its influence ± one standard error. Extremes picked from many samples look larger than they are."
        )
        yield Plate(f"exemplars-{k + 1}", caption, exemplar_grid(chosen))


def _tokens(results: Results) -> Iterator[Table]:
    """The single tokens that matter most for the queries that are looked at, where no text shows them."""
    if any(exemplar.token_values for exemplar in results.exemplars):
        return
    looked_at = dict.fromkeys(exemplar.query for exemplar in results.exemplars)
    for name, single in results.single.items():
        if member_of(single) == "token":
            steps = sorted({exemplar.step for exemplar in results.exemplars} & {*single["step"].values.tolist()})
            for query in looked_at:
                yield tables.tokens_table(single.sel(step=steps, query=query), f"{query}, by {name}")
            return


def _map(results: Results) -> Iterator[Plate]:
    if results.positions is None:
        return
    caption = (
        f"The {count(results.positions.sizes['sample'], 'training sample')} by how their losses rise and fall together "
        "over the draws: near each other where their correlation R is high, by classical scaling of 1 − R, every "
        "checkpoint turned to the one before. Colours are labels, of which the map knows nothing. The percentage is "
        "the share of all spread that this plane holds; what is left lies outside of it, noise of the draws too. The "
        "cross is the median standard error of a position, where it is known."
    )
    yield Plate("map", caption, sample_map(results.positions))


def _chains(results: Results) -> Iterator[Plate | Table]:
    diagnostics = results.diagnostics
    if not diagnostics.sizes["step"]:
        yield Plate("chains", "There are no diagnostics, because no checkpoint was sampled.")
        return
    if check_figures.panels_there(diagnostics):
        caption = (
            "What the verdicts rest on; dashed lines are thresholds. R-hat compares chains (1 = they agree). Effective "
            "draws are what draws are worth without their autocorrelation. The rise of the loss says how far the "
            "posterior reaches, the share beyond first order how much of it a linear picture misses."
        )
        drawn = check_figures.chain_diagnostics(diagnostics, results.trusted)
        yield Plate("chains", caption + _shading(results), drawn)
    else:
        yield Plate("chains", "There is no figure of the chains: not one of their diagnostics could be computed.")
    yield tables.diagnostics_table(diagnostics)


def _size_checks(results: Results) -> Iterator[Plate | Table]:
    if not results.size_checks:
        reason = "There is no exact influence beside another estimate, so sizes were not checked without retraining."
        yield Plate("sizes", reason)
        return
    caption = (
        "Every other estimator against the exact influence at every checkpoint, without any retraining: correlation "
        "over pairs of groups, and slope of exact on estimated effects (1 = the right size)."
    )
    yield Plate("sizes", caption, check_figures.agreement_over_training(results.size_checks, results.trusted, "exact"))
    yield tables.agreement_table(results.size_checks, "Agreement with exact influence at every checkpoint")


def write_report(results: Results, folder: Path | str, explorer: Path | None = None) -> Path:
    """Write the report of a run into the folder; see :func:`stagewise.reporting.page.write_page`.

    Args:
        results: of the run.
        folder: of the run.
        explorer: the page to look around in, below the folder, if there is one.
    """
    influence = results.answered
    window = None if influence is None else influence.attrs.get("window")
    page = Page(
        results.title,
        f"during the {window} training steps after a checkpoint" if window else "around a checkpoint",
        findings(results),
        sections(results),
        results.config,
        results.provenance,
        "sample" if influence is None else member_of(influence),
        None if explorer is None else explorer.relative_to(folder).as_posix(),
    )
    return write_page(page, folder)
