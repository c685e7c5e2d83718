"""Can these chains be trusted, and if not, what to change: one verdict per step.

The statistics of chains come from ``arviz-stats``. They look at series of mean losses, one per data set: the
mean loss of the candidates and that of each query set, over the chains that ended ok; and at products of losses, see
:mod:`stagewise.traces.products`. All is computed from changes since the checkpoint: losses may be large beside them.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import xarray as xr

from stagewise.traces.cells import loss_groups
from stagewise.traces.products import arviz, product_numbers
from stagewise.traces.store import TraceStore
from stagewise.traces.stretches import stretches
from stagewise.traces.verdicts import MIN_CHAINS, MIN_DRAWS, judge

_DIMS = ["chain", "draw"]
_FACTS = ("size_low", "size_high", "relative_error", "precision")


def diagnose(tree: xr.DataTree, labels: Mapping[str, Any] | None = None) -> xr.Dataset:
    """Diagnostics and verdict of one step.

    Args:
        tree: the traces of a step, see :meth:`stagewise.traces.store.TraceStore.load`.
        labels: of the groups whose influence is asked for, see :attr:`stagewise.traces.store.TraceStore.labels`.

    Returns:
        Scalars. Always there:

        * ``chains_ok``, ``chains_failed``, ``draws`` (per chain), ``localised``;
        * ``verdict``: the first that applies, in order of severity, of ``"unusable"``, ``"not localised"``,
          ``"chains failed"``, ``"cannot say"``, ``"not converged"``, ``"heated"``, ``"unconstrained"``,
          ``"beyond first order"``, ``"ok"``;
        * ``advice``: the reason and what to change; empty if ok.

        There where a window was asked for:

        * ``size_low``, ``size_high``: least and largest response of the window in units of the posterior's, over
          directions of curvature, by which predicted effects are off in size.

        There where ``draws="auto"`` was asked for:

        * ``relative_error``: of the influence between groups, see
          :func:`stagewise.influence.precision.relative_error`;
        * ``precision``: what was asked for.

        There unless nothing was drawn:

        * ``loss_rise``: mean training loss (of the candidates) over draws minus that at the checkpoint, in nats;
        * ``soft_spread``: mean square displacement along the softest direction in units of the variance that the
          curvature at the checkpoint gives it; where it was recorded;
        * ``query_spread``: the largest standard deviation over the draws of the loss of any query sample, in units of
          the largest of any training sample. Query sets with a loss of their own are not looked at;
        * ``query_reach``: the same in units of the range of all losses at the checkpoint.

        There unless the verdict on convergence is "cannot say":

        * ``rhat``: rank-normalised split R-hat, the largest of all series;
        * ``ess_bulk``: effective number of draws of all chains together, the smallest of all series;
        * ``mcse_mean``: Monte Carlo standard error of the mean training loss, in nats;
        * ``loss_rise_stderr``: that of ``loss_rise``, in nats: the same, as the checkpoint's loss is exact;
        * ``drift``: mean of the later half of the draws minus that of the earlier half in units of its
          standard error, for the series where it is largest in size;
        * ``rhat_rows``, ``ess_rows``, ``rhat_products``, ``ess_products``, ``mcse_products``, ``between_share``,
          ``drift_share``, ``chains_p``: of the products that influence averages and of what they are made of, see
          :func:`stagewise.traces.products.product_numbers`.

        There if the losses at the reflected points were recorded:

        * ``even_share``: see :func:`even_share`.
    """
    chains = tree["chains"].to_dataset()
    status = np.asarray(chains["status"])
    ok = status == "ok"
    groups = {path: group.isel(chain=ok) for path, group in loss_groups(tree).items()}
    drawn = "train" in groups and ok.any()
    facts = {
        "chains_ok": int(ok.sum()),
        "chains_failed": int((~ok).sum()),
        "draws": groups["train"].sizes["draw"] if drawn else 0,
        "localised": tree.attrs.get("localised", True) is not False,  # None: not looked at
    }
    numbers = _numbers(groups) if drawn else {}
    if "rhat" in numbers:
        numbers |= product_numbers(groups, labels or {}, stretches(len(status), facts["draws"]))
    if drawn and "soft_spread" in chains and chains["soft_spread"].notnull().any():
        numbers["soft_spread"] = float(chains["soft_spread"].values[ok].mean())
    numbers |= {name: float(tree.attrs[name]) for name in _FACTS if tree.attrs.get(name) is not None}
    loosest = _loosest(groups) if drawn else None
    if loosest is not None:
        numbers |= {"query_spread": loosest.spread, "query_reach": loosest.reach}
    known = facts | numbers | ({} if loosest is None else {"loosest": loosest.name})
    verdict, advice = judge(known, status.tolist(), tree.attrs)
    result = xr.Dataset(facts | numbers | {"verdict": verdict, "advice": advice})
    for name in {"loss_rise", "loss_rise_stderr", "mcse_mean"} & set(result):
        result[name].attrs["units"] = "nats"
    return result


def diagnose_run(traces: TraceStore | str | Path) -> xr.Dataset:
    """:func:`diagnose` for every step of a run, stacked along ``step``.

    A number that some steps have and others lack is NaN where it lacks; the verdict of that step says why.

    Args:
        traces: a run folder, or its store.

    Raises:
        RunFolderError: it is no run folder.
        ValueError: it holds no complete cell yet.

    Example:
        >>> import tempfile, torch, stagewise as sw
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.eye(4), torch.tensor([0.0, 0.0, 1.0, 1.0])
        >>> task = sw.Task(
        ...     torch.nn.Linear(4, 1),
        ...     lambda model, batch: (model(batch[0])[:, 0] - batch[1]) ** 2,
        ...     train=(x, y), queries={"same": (x, y)}, train_groups=list("aabb"),
        ... )
        >>> start = sw.Checkpoint(0, task.state(), sw.Optimizer("sgd", 0.1, batch_size=0))
        >>> run = sw.Trajectory.from_checkpoints([start])
        >>> folder = tempfile.TemporaryDirectory()
        >>> store = sw.sample(task, run, sw.LocalPosterior(window=10), out=folder.name, chains=8, draws=64)
        >>> sw.diagnose_run(store).verdict.values.tolist()
        ['ok']
        >>> folder.cleanup()
    """
    store = TraceStore.read_only(traces) if isinstance(traces, str | Path) else traces
    if not store.steps:
        raise ValueError(f"{store.root} holds no complete cell yet; run the sampling first")
    labels = store.labels
    results = [diagnose(store.load(step), labels) for step in store.steps]
    return xr.concat(results, xr.Variable("step", list(store.steps)), data_vars="all", join="outer")


def even_share(groups: dict[str, xr.Dataset]) -> float:
    """How much of the posterior's spread is beyond first order in the weights, between 0 and 1.

    With the losses of a draw split under reflection at the checkpoint, ``odd = [l(w) - l(2w* - w)] / 2`` and
    ``even = [l(w) + l(2w* - w)] / 2``, this is ``sum_i Var[even_i] / sum_i (Var[even_i] + Var[odd_i])`` over
    samples i, in the data set where it is largest. It goes per sample because at a minimum the mean loss has
    no first order, while the losses of single samples still have one.

    Args:
        groups: data sets with ``loss`` and ``loss_reflected``.
    """
    return max(_even_share(group) for group in groups.values())


def _even_share(group: xr.Dataset) -> float:
    there, mirrored = _change(group, "loss"), _change(group, "loss_reflected")
    even, odd = ((there + sign * mirrored).var(_DIMS, skipna=False).sum().item() for sign in (1, -1))
    return even / (even + odd) if even + odd > 0 else 0.0


class _Loosest(NamedTuple):
    """The query sample whose loss varies most; beside training samples, and beside the range of losses."""

    name: str
    spread: float
    reach: float


def _loosest(groups: dict[str, xr.Dataset]) -> _Loosest | None:
    """None where there is nothing to compare."""
    groups = {path: group for path, group in groups.items() if not group.attrs.get("own_loss")}
    spreads = {path: _sample_means(group, "loss").std(_DIMS, skipna=False).values for path, group in groups.items()}
    known = float(spreads.pop("train").max())
    anchors = np.concatenate([_sample_means(group, "loss_anchor").values for group in groups.values()])
    if not spreads or not known > 0 or not np.ptp(anchors) > 0:
        return None
    path = max(spreads, key=lambda path: float(spreads[path].max()))
    sample = int(spreads[path].argmax())
    largest = float(spreads[path][sample])
    return _Loosest(f"sample {sample} of {path.removeprefix('queries/')!r}", largest / known, largest / np.ptp(anchors))


def _numbers(groups: dict[str, xr.Dataset]) -> dict[str, float]:
    series = xr.concat([_mean(group) for group in groups.values()], xr.Variable("series", list(groups)))
    numbers = {"loss_rise": series.sel(series="train").mean().item()}
    if series.sizes["chain"] >= MIN_CHAINS and series.sizes["draw"] >= MIN_DRAWS:
        numbers |= _convergence(series)
    reflected = {path: group for path, group in groups.items() if "loss_reflected" in group}
    if reflected and series.sizes["draw"] >= MIN_DRAWS:
        numbers["even_share"] = even_share(reflected)
    return numbers


def _change(group: xr.Dataset, name: str) -> xr.DataArray:
    return group[name] - group["loss_anchor"]


def _mean(group: xr.Dataset) -> xr.DataArray:
    """Change of the mean loss over a data set, every loss by its share."""
    return _weighted(_change(group, "loss"), group["share"], [*group["share"].dims])


def _sample_means(group: xr.Dataset, name: str) -> xr.DataArray:
    """The losses of every sample, its tokens by their share; of draws, their changes."""
    losses = group[name] if name == "loss_anchor" else _change(group, name)
    return _weighted(losses, group["share"], ["token"]) if "token" in losses.dims else losses


def _weighted(losses: xr.DataArray, share: xr.DataArray, dims: Sequence[Hashable]) -> xr.DataArray:
    total = share.sum(dims)
    return (losses * share).sum(dims, skipna=False) / total.where(total > 0, 1.0)


def _convergence(series: xr.DataArray) -> dict[str, float]:
    # A loss that never changes, e.g. of a query solved exactly, has nothing to converge.
    moving = series[(series.max(_DIMS) > series.min(_DIMS)).values]
    if "train" not in moving["series"]:
        return {}
    az = arviz()
    with np.errstate(divide="ignore", invalid="ignore"):  # chains frozen at different values: R-hat is infinite
        mcse = _mcse(moving).sel(series="train").item()
        numbers = {
            "rhat": az.rhat(moving, sample_dims=_DIMS).max(skipna=False).item(),
            "ess_bulk": az.ess(moving, sample_dims=_DIMS, method="bulk").min(skipna=False).item(),
            "mcse_mean": mcse,
            "loss_rise_stderr": mcse,
            "drift": _drift(moving),
        }
    return {} if np.isnan(list(numbers.values())).any() else numbers


def _drift(series: xr.DataArray) -> float:
    half = series.sizes["draw"] // 2
    early, late = series[..., :half], series[..., -half:]
    # From the autocorrelation of all chains: a standard error from the scatter of a few chains' own differences has
    # heavy tails and raises false alarms.
    z = ((late.mean(_DIMS) - early.mean(_DIMS)) / np.hypot(_mcse(early), _mcse(late))).values
    return float(z[np.argmax(np.abs(z))])


def _mcse(series: xr.DataArray) -> xr.DataArray:
    return cast(xr.DataArray, arviz().mcse(series, sample_dims=_DIMS, method="mean"))
