"""Loss traces of a run, and the checkpoints whose chains can be trusted: what all estimators from draws share."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import xarray as xr

from stagewise.groups import Labels
from stagewise.traces.columns import Columns, Indices, Recorded, columns
from stagewise.traces.diagnostics import diagnose, diagnose_run
from stagewise.traces.store import TraceStore
from stagewise.traces.verdicts import UNTRUSTED


class NoTrustedCheckpointError(ValueError):
    """No checkpoint has chains that can be trusted; the message gives the reason for each."""


class Traces(Protocol):
    """Loss traces of a run: a store, or anything that loads one step's tree.

    It may carry ``labels``: ``{"train": labels or None, "queries": {name: labels or None}}``; and ``verdicts``, where
    the chains have been diagnosed before: ``{step: (verdict, advice)}``.
    """

    @property
    def steps(self) -> Sequence[int]:
        """The steps with complete cells, ascending."""
        ...

    def load(self, step: int) -> xr.DataTree:
        """All chains of one step, in the form that ``sample_block`` returns."""
        ...


@dataclass(frozen=True, eq=False)
class TracesInMemory:
    """Loss traces for a notebook, without a store: trees from :func:`stagewise.sampling.chains.sample_block`.

    Attributes:
        trees: by step.
        labels: as in :class:`Traces`; None where there are none.

    Example:
        >>> import torch, stagewise as sw
        >>> from stagewise.sampling.chains import sample_block
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.eye(4), torch.tensor([0.0, 0.0, 1.0, 1.0])
        >>> task = sw.Task(
        ...     torch.nn.Linear(4, 1),
        ...     lambda model, batch: (model(batch[0])[:, 0] - batch[1]) ** 2,
        ...     train=(x, y), queries={"same": (x, y)}, train_groups=list("aabb"),
        ... )
        >>> start = sw.Checkpoint(0, task.state(), sw.Optimizer("sgd", 0.1, batch_size=0))
        >>> tree = sample_block(task, start, sw.LocalPosterior(window=10), sw.Chains(chains=8, draws=64))
        >>> traces = sw.TracesInMemory({0: tree})
        >>> traces.steps, sw.bif(traces).value.shape
        ([0], (1, 4, 1))
    """

    trees: Mapping[int, xr.DataTree]
    labels: Mapping[str, Any] | None = None

    @property
    def steps(self) -> list[int]:
        """The steps that have a tree, ascending."""
        return sorted(self.trees)

    def load(self, step: int) -> xr.DataTree:
        """All chains of one step."""
        return self.trees[step]


def as_traces(traces: Traces | str | Path) -> Traces:
    """The traces, or those of a run folder or its url."""
    return TraceStore.read_only(traces) if isinstance(traces, str | Path) else traces


@dataclass(frozen=True)
class ReadOnce(TraceStore):
    """A store to look at several times while nothing is written: its steps are read once, as far as there is room.

    Attributes:
        room: bytes of memory for traces; what does not fit is read again.
    """

    room: int = 2**28
    _read: dict[int, xr.DataTree] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, store: TraceStore) -> ReadOnce:
        """The same store."""
        return cls(store.root, store.identity, writable=False, remote=store.remote)

    def load(self, step: int) -> xr.DataTree:
        """As the store's."""
        if step in self._read:
            return self._read[step]
        tree = super().load(step)
        if tree.nbytes + sum(other.nbytes for other in self._read.values()) <= self.room:
            self._read[step] = tree
        return tree

    @cached_property
    def labels(self) -> dict[str, Any]:
        """As the store's."""
        return super().labels

    def _files(self) -> dict[tuple[int, int], Path]:
        return self._found

    @cached_property
    def _found(self) -> dict[tuple[int, int], Path]:
        return super()._files()

    @cached_property
    def diagnostics(self) -> xr.Dataset:
        """Of all steps, see :func:`stagewise.traces.diagnostics.diagnose_run`."""
        return diagnose_run(self)

    @cached_property
    def verdicts(self) -> dict[int, tuple[str, str]]:
        """Verdict and advice of every step."""
        if not self.steps:
            return {}
        columns = (self.diagnostics[name].values.tolist() for name in ("step", "verdict", "advice"))
        return {step: (verdict, advice) for step, verdict, advice in zip(*columns, strict=True)}


def untrusted(verdicts: Mapping[int, tuple[str, str]]) -> dict[int, str]:
    """The steps whose chains cannot be trusted, with the reason, of verdicts and advice by step."""
    return {step: f"{verdict}: {advice}" for step, (verdict, advice) in verdicts.items() if verdict in UNTRUSTED}


def over_checkpoints(
    traces: Traces, steps: Sequence[int], trusted_only: bool, estimate: Callable[[int, xr.DataTree], xr.Dataset]
) -> xr.Dataset:
    """What ``estimate(step, tree)`` makes of every checkpoint whose chains can be used, along ``step``.

    The attributes say which checkpoints were ``omitted`` and why, and what the posterior is.

    Raises:
        NoTrustedCheckpointError: no checkpoint can be used, with the reasons.
    """
    results: list[xr.Dataset] = []
    omitted: dict[str, str] = {}
    facts: dict[Any, Any] = {}
    verdicts: Mapping[int, tuple[str, str]] = getattr(traces, "verdicts", {})
    for step in steps:
        tree = traces.load(step)
        if reason := _reason_to_omit(tree, trusted_only, verdicts.get(step), getattr(traces, "labels", None)):
            omitted[str(step)] = reason
            continue
        results.append(_along_step(estimate(step, tree), step))
        facts = tree.attrs
    if not results:
        reasons = "; ".join(f"step {step}: {reason}" for step, reason in omitted.items())
        raise NoTrustedCheckpointError(
            f"no checkpoint has chains that can be trusted. {reasons or 'The store is empty'}"
        )
    stacked = joined(results, "step")
    stacked.attrs = {"omitted": json.dumps(omitted)} | {
        name: facts[name] for name in ("n_beta", "window", "metric", "centred") if facts.get(name) is not None
    }
    return stacked


def _along_step(estimate: xr.Dataset, step: int) -> xr.Dataset:
    """With a dimension of one step, of the same numbers: they can be most of the memory."""
    data = {name: (("step", *data.dims), data.values[None], data.attrs) for name, data in estimate.data_vars.items()}
    return xr.Dataset(data, {**estimate.coords, "step": [step]}, estimate.attrs)


def carried_labels(
    traces: Traces, train: Labels | None, queries: Mapping[str, Labels | None], grouped: bool
) -> tuple[Labels | None, dict[str, Labels | None]]:
    """Labels of the training set and of the query sets: those given, else those that the traces carry."""
    carried = getattr(traces, "labels", None) if grouped else None
    if not carried:
        return train, dict(queries)
    given = {name: labels for name, labels in queries.items() if labels is not None}
    return (carried["train"] if train is None else train), dict(carried["queries"]) | given


def _reason_to_omit(
    tree: xr.DataTree, trusted_only: bool, known: tuple[str, str] | None, labels: Mapping[str, Any] | None
) -> str:
    """Why a checkpoint cannot be used; empty if it can. ``known`` are its verdict and advice, if it was diagnosed."""
    drawn = "train" in tree.children and (tree["chains"]["status"] == "ok").any()
    if drawn and not trusted_only:
        return ""
    verdict, advice = known or _judged(tree, labels)
    return "" if drawn and verdict not in UNTRUSTED else f"{verdict}: {advice}"


def _judged(tree: xr.DataTree, labels: Mapping[str, Any] | None) -> tuple[str, str]:
    diagnosis = diagnose(tree, labels)
    return str(diagnosis["verdict"].item()), str(diagnosis["advice"].item())


def ok_chains(tree: xr.DataTree) -> Indices:
    """Positions of the chains that ended well."""
    return np.flatnonzero(tree["chains"]["status"].values == "ok")


class DataSets(NamedTuple):
    """The two sides of influence at one checkpoint.

    Attributes:
        train: the columns of the training set.
        queries: the columns of every query set, and whether pairs of a sample with itself are to be left out.
        weight: n_beta times the mean share of a training column in the objective; kappa where all count alike.
    """

    train: Columns
    queries: list[tuple[Columns, bool]]
    weight: float


def data_sets(
    tree: xr.DataTree,
    labels: tuple[Labels | None, dict[str, Labels | None]],
    grouped: bool,
    part: Recorded,
    tokens: bool,
    self_pairs: bool,
) -> DataSets:
    """Training and query columns of the chains that ended well, grouped by labels.

    Raises:
        ValueError: labels do not fit the traces, or two query groups share a name.
    """
    of_train, of_queries = labels
    names = list(tree["queries"].children)
    if unknown := sorted(set(of_queries) - set(names)):
        raise ValueError(f"query_groups names {unknown}, but the traces have the queries {names}")
    kept = ok_chains(tree)
    train = columns(tree["train"].to_dataset(), kept, of_train, "train_groups", part=part, tokens=tokens)
    queries = []
    for name in names:
        dataset = tree[f"queries/{name}"].to_dataset()
        argument = f"query_groups[{name!r}]"
        labels_here = of_queries.get(name)
        if grouped and labels_here is None:
            query = columns(dataset, kept, [name] * dataset.sizes["sample"], argument, part=part, tokens=tokens)
        else:
            query = columns(dataset, kept, labels_here, argument, part=part, tokens=tokens)
            if len(names) > 1:
                query = replace(query, names=[f"{name}:{row}" for row in query.names])
        queries.append((query, not self_pairs and bool(dataset.attrs.get("is_training_set"))))
    name, count = Counter(name for query, _ in queries for name in query.names).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{count} query groups are called {name!r}; rename a query set or its labels")
    return DataSets(train, queries, tree.attrs["n_beta"] * train.share)


def numbered(estimate: xr.Dataset, tree: xr.DataTree) -> xr.Dataset:
    """Number the replicates by chain and stretch, the same at every checkpoint."""
    if "replicates" not in estimate:
        return estimate
    chains = tree["chains"].to_dataset()["chain"].values[ok_chains(tree)]
    cut = estimate.sizes["replicate"] // len(chains)
    return estimate.assign_coords(replicate=(chains[:, None] * cut + np.arange(cut)).reshape(-1))


def joined(estimates: Sequence[xr.Dataset], dim: str) -> xr.Dataset:
    """One dataset, with the replicates that all have in common; the same if it is one."""
    if len(estimates) == 1:
        return estimates[0]
    numbers = [set(e["replicate"].values.tolist()) if "replicates" in e else set() for e in estimates]
    common = sorted(set.intersection(*numbers))
    if len(common) > 1:
        estimates = [estimate.sel(replicate=common) for estimate in estimates]
    else:
        estimates = [estimate.drop_dims("replicate", errors="ignore") for estimate in estimates]
    return xr.concat(estimates, dim, join="exact", data_vars="minimal", coords="minimal", compat="override")
