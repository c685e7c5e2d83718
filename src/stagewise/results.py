"""What a report is made of: the results of a run, and the few numbers that all of its parts derive from them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from stagewise.dynamics.curves import critical, degrees
from stagewise.dynamics.events import Event
from stagewise.dynamics.stages import Transition
from stagewise.groups import same_label
from stagewise.notebook import listed, table
from stagewise.retraining.scores import LEVEL, agreement, coverage, predicted_effect

EXACT = "exact influence"
"""The derivative of the replayed window: the best answer wherever there is one."""

DAMPED = "damped influence"
"""The baseline that answers where neither replay nor chains do."""

BIF = "BIF"
"""The influence that was sampled."""

ARBITRARY = "arbitrary unit"
"""The ``units`` of scores that say who matters more, but not how much."""

FIRST_ORDER = "first order"
"""What of the sampled influence is known without draws."""

_DIMS = {"step", "train", "query"}


@dataclass(frozen=True, eq=False)
class Exemplar:
    """The most helpful and the most harmful training samples of one query at one step.

    Attributes:
        query: label of the query.
        step: the checkpoint.
        samples: index of each sample in the training set, in any order.
        labels: what to call each sample, e.g. its class or its text.
        values: influence of each sample on the query, in nats per unit weight; negative = helpful.
        stderrs: standard error of each value.
        images: ``(sample, height, width)`` or ``(sample, height, width, 3)`` in [0, 1], if the data are images.
        texts: the text of every token of each sample, or of the stretch of it that matters, if the data are text.
        token_values: influence of every token on the query, in nats per unit weight; NaN where it does not count.
        estimator: whose influence it is, as a report calls it.
    """

    query: str
    step: int
    samples: Sequence[int]
    labels: Sequence[str]
    values: Sequence[float]
    stderrs: Sequence[float]
    images: NDArray[np.floating[Any]] | None = None
    texts: Sequence[Sequence[str]] | None = None
    token_values: Sequence[Sequence[float]] | None = None
    estimator: str = BIF


@dataclass(frozen=True, eq=False)
class Results:
    """Everything a report shows. It is only read.

    Attributes:
        title: headline of the report.
        losses: ``train`` (step) and ``queries`` (step, query), mean losses at the checkpoints in nats.
        diagnostics: along ``step``, one entry per sampled checkpoint: ``verdict``, ``advice`` and the numbers behind
            them, as from :func:`stagewise.traces.diagnostics.diagnose_run`.
        influence: ``value``, ``stderr`` (step, train, query) between groups, nats per unit weight, negative =
            helpful; coordinate ``train_size``; attribute ``omitted``, JSON of {step: reason}. None if no checkpoint
            could be answered.
        correlation: the same as minus the correlation of losses, without unit.
        positions: ``value`` (step, sample, axis) and ``share`` (step, axis) of the training samples by their loss
            kernel, coordinate ``label``, see :func:`stagewise.influence_map`. None where samples have no labels.
        events: of the influence curves.
        baselines: other estimators by name, as ``influence``, with stderr 0 where they have no noise; scores of other
            tools too, whose attribute ``units`` may be "arbitrary unit": of these nothing but the order is compared.
        single: influence of single samples ("12") or tokens ("12/3", token 3 of sample 12) by the name of its
            estimator, as ``influence``, where the configuration asks for it (``per``).
        measured: ``effect`` and perhaps ``effect_stderr`` (step, train, query) in nats, from retraining with each train
            group at the weight ``attrs["weight"]`` during ``attrs["window"]`` steps.
        replay: how well unchanged retraining repeats the run, see :func:`stagewise.retraining.replay.replay`.
        in_two_times: ``value`` (trained, asked, train, query), see :func:`stagewise.influence_in_time`.
        draws: (step, chain, draw) mean training loss along the draws of every chain, in nats.
        samples: what the training samples are: ``label`` and one of ``image`` (sample, height, width[, channel]) in 0
            to 255, ``row`` (sample, column) and ``text`` (sample), the JSON of a list of tokens.
        stages: of the model as a whole, whatever the query.
        notes: sentences on what had to be left out.
        exemplars: single training samples that matter most.
        withheld: steps at which chains picked some that are not among them, as these chains cannot be trusted, and why.
        config: the configuration of the run, of plain values.
        provenance: where the numbers come from (versions, hashes, times), of plain values.

    Raises:
        ValueError: a dataset lacks a variable or a dimension.
    """

    title: str
    losses: xr.Dataset
    diagnostics: xr.Dataset
    influence: xr.Dataset | None
    correlation: xr.Dataset | None = None
    positions: xr.Dataset | None = None
    events: Sequence[Event] = ()
    baselines: Mapping[str, xr.Dataset] = field(default_factory=dict)
    single: Mapping[str, xr.Dataset] = field(default_factory=dict)
    measured: xr.Dataset | None = None
    replay: xr.Dataset | None = None
    in_two_times: xr.Dataset | None = None
    draws: xr.DataArray | None = None
    samples: xr.Dataset | None = None
    stages: Sequence[Transition] = ()
    notes: Sequence[str] = ()
    exemplars: Sequence[Exemplar] = ()
    withheld: Mapping[int, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require("losses", self.losses, {"train": {"step"}, "queries": {"step", "query"}})
        _require("diagnostics", self.diagnostics, {"verdict": {"step"}, "advice": {"step"}})
        matrices = {"influence": self.influence, "correlation": self.correlation, **self.baselines}
        for name, dataset in [*matrices.items(), *self.single.items()]:
            if dataset is not None:
                _require(name, dataset, {"value": _DIMS, "stderr": _DIMS})
        if self.positions is not None:
            dims = {"step", "axis"}
            _require("positions", self.positions, {"value": {*dims, "sample"}, "share": dims, "label": {"sample"}})
        if self.in_two_times is not None:
            _require("in_two_times", self.in_two_times, {"value": {"trained", "asked", "train", "query"}})
        if self.measured is not None:
            _require("measured", self.measured, {"effect": _DIMS})
            if "weight" not in self.measured.attrs or "window" not in self.measured.attrs:
                raise ValueError(
                    "measured must say in its attributes 'weight' and 'window' what was changed for how long, "
                    f"got {sorted(self.measured.attrs)}"
                )

    def _repr_html_(self) -> str:
        verdicts = Counter(self.diagnostics["verdict"].values.tolist())
        at = {name: f"at {data.sizes['step']} checkpoints" for name, data in self.estimators.items()}
        rows = [
            ("checkpoints", listed(self.losses["step"].values.tolist())),
            ("verdicts on chains", ", ".join(f"{verdict}: {n}" for verdict, n in verdicts.items()) or "not sampled"),
            *at.items(),
            ("retraining", "none" if self.measured is None else f"at {self.measured.sizes['step']} checkpoints"),
            ("events", len(self.events)),
            *(("note", note) for note in self.notes),
        ]
        return table(self.title, rows)

    @cached_property
    def exact(self) -> xr.Dataset | None:
        """The exact influence, or None where not a single checkpoint has one."""
        exact = self.baselines.get(EXACT)
        return exact if exact is not None and exact.sizes["step"] else None

    @cached_property
    def sampled(self) -> xr.Dataset | None:
        """The influence that was sampled, or None where not a single checkpoint has one."""
        return self.influence if self.influence is not None and self.influence.sizes["step"] else None

    @cached_property
    def answered(self) -> xr.Dataset | None:
        """The best influence there is, exact or else sampled: what is drawn, put to the test and spoken of."""
        return self.sampled if self.exact is None else self.exact

    @cached_property
    def omitted(self) -> dict[int, str]:
        """Checkpoints whose chains cannot be trusted, and why."""
        attrs = {} if self.influence is None else self.influence.attrs
        reasons = {int(step): str(reason) for step, reason in json.loads(attrs.get("omitted", "{}")).items()}
        answered = set() if self.influence is None else set(self.influence["step"].values.tolist())
        for step, verdict, advice in zip(
            *(self.diagnostics[n].values for n in ("step", "verdict", "advice")), strict=True
        ):
            if step not in answered:
                reasons.setdefault(int(step), f"{verdict}: {advice}")
        return dict(sorted(reasons.items()))

    @cached_property
    def trusted(self) -> xr.DataArray:
        """For every checkpoint whether it can be answered: bool (step)."""
        answered = [] if self.influence is None else self.influence["step"].values.tolist()
        steps = sorted({*answered, *self.omitted})
        return xr.DataArray([step not in self.omitted for step in steps], {"step": steps}, ("step",), "trusted")

    @cached_property
    def stand_in(self) -> xr.Dataset | None:
        """Damped influence at the checkpoints that nothing better answers, or None where there is none.

        Its Gauss-Newton curvature is never negative, so that it exists where no posterior does.
        """
        damped = self.baselines.get(DAMPED)
        if damped is None or self.exact is not None:
            return None
        steps = [step for step in damped["step"].values.tolist() if step in self.omitted]
        return damped.sel(step=steps) if steps else None

    @cached_property
    def coverage(self) -> xr.DataArray | None:
        """How often the 95 % intervals of the chains hold what was measured (step); None where nothing was."""
        predicted = None if self.measured is None or self.sampled is None else _predict(self.sampled, self.measured)
        if predicted is None or self.measured is None or self.sampled is None:
            return None
        reach = critical(1 - LEVEL, degrees(self.sampled))
        return coverage(predicted, self.measured.sel(step=predicted["step"]), reach)

    @cached_property
    def estimators(self) -> dict[str, xr.Dataset]:
        """All estimates of influence by name, the report's own first."""
        own = {estimator(data): data for data in (self.exact, self.sampled) if data is not None}
        return own | {name: data for name, data in self.baselines.items() if data.sizes["step"]}

    @cached_property
    def predicted(self) -> xr.Dataset | None:
        """Predicted effect of the measured change, at the checkpoints where it was measured; None if there are none."""
        if self.measured is None or self.answered is None:
            return None
        return _predict(self.answered, self.measured)

    @cached_property
    def agreements(self) -> dict[str, xr.Dataset]:
        """Agreement of every estimator with retraining, at the checkpoints it shares with the measurement."""
        scores = {}
        for name, influence in self.estimators.items():
            predicted = None if self.measured is None else _predict(influence, self.measured)
            if predicted is not None and self.measured is not None:
                measured = self.measured["effect"].sel(step=predicted["step"])
                scores[name] = _with_unit(agreement(predicted["effect"], measured), influence)
        return scores

    @cached_property
    def size_checks(self) -> dict[str, xr.Dataset]:
        """Agreement of every other estimator with the exact influence, which takes no retraining."""
        if self.exact is None:
            return {}
        others = {name: data for name, data in self.estimators.items() if data is not self.exact}
        checks = {name: size_check(data, self.exact) for name, data in others.items()}
        return {name: check for name, check in checks.items() if check.sizes["step"]}


def size_check(influence: xr.Dataset, exact: xr.Dataset) -> xr.Dataset:
    """Agreement of an estimate with the exact influence, group by group, at the checkpoints they share."""
    shared = np.intersect1d(influence["step"].values, exact["step"].values)
    if not len(shared):
        return xr.Dataset(coords={"step": shared})
    estimated, true = (predicted_effect(data.sel(step=shared), 0.0)["effect"] for data in (influence, exact))
    return _with_unit(agreement(estimated, true), influence)


def _with_unit(scores: xr.Dataset, influence: xr.Dataset) -> xr.Dataset:
    """Without slopes (NaN) where the influence has no unit: they would say how large that is, and nothing else."""
    if influence.attrs.get("units") != ARBITRARY:
        return scores
    return scores.assign({name: scores[name].where(False) for name in scores if str(name).startswith("slope")})


def estimator(influence: xr.Dataset) -> str:
    """What the estimator of an influence is called in a figure."""
    name = str(influence.attrs.get("estimator", "influence"))
    return BIF if name == "bif" else name


def others(matrix: xr.Dataset) -> NDArray[np.bool_]:
    """(train, query): the pairs of different labels, whatever the query set; all pairs if there are no such.

    The influence of a group on itself is large and no surprise; next to it nothing else can be seen.
    """
    different = ~same_label(matrix["train"].values, matrix["query"].values, matrix.coords.get("train_size"))
    return np.asarray(different if different.any() else np.ones_like(different))


def headline(scores: xr.Dataset, name: str) -> str:
    """The variable of an agreement to report: without the pairs of a group with itself, where that leaves any."""
    better = f"{name}_off_diagonal"
    return better if better in scores and scores[better].attrs["pairs"] > 0 else name


def _predict(influence: xr.Dataset, measured: xr.Dataset) -> xr.Dataset | None:
    shared = np.intersect1d(influence["step"].values, measured["step"].values)
    if not len(shared):
        return None
    return predicted_effect(influence.sel(step=shared), float(measured.attrs["weight"]))


def _require(name: str, dataset: xr.Dataset, variables: Mapping[str, set[str]]) -> None:
    for variable, dims in variables.items():
        got = set(dataset[variable].dims) if variable in dataset else None
        if got != dims:
            raise ValueError(f"{name} must hold {variable!r} with dimensions {sorted(dims)}, got {got or 'none'}")
