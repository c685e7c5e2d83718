"""What a cell holds, and how the chain blocks of a step become one tree.

A cell is a tree of numbers with the groups

* ``train`` (the candidates) and ``queries/<name>``: ``loss (chain, draw, sample[, token])`` in nats, float64;
  ``loss_anchor (sample[, token])`` at the checkpoint itself; ``share``, of every loss in the mean over the data set
  (in the training objective); optionally ``loss_reflected``, the losses at ``2 w* - w``, and
  ``loss_linear``, those to first order in the displacement;
* ``chains``: ``status (chain)``, ``"ok"`` or the reason why a chain must be left out.

The root attributes are the facts of the cell. The loss groups are absent where nothing could be drawn
(``localised=False``, or ``unusable="..."`` at a checkpoint at which there is no posterior).

On disk a cell is packed: losses are float32 *changes* from ``loss_anchor``, so that those that are large beside their
fluctuations keep them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

# What defines the posterior must agree among the blocks of a step, or their chains could not be pooled.
_POSTERIOR = ("n_beta", "gamma", "kappa", "window", "metric", "localised", "unusable")
_DRAWN = ("loss", "loss_reflected", "loss_linear")
_RELATIVE = "relative_to"  # attribute of packed losses

Facts = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """The unit of work: a block of chains at one checkpoint.

    Attributes:
        step: the checkpoint's training step.
        block: number of the chain block.
        key: content hash of everything that decides the cell's numbers.
    """

    step: int
    block: int
    key: str

    def __post_init__(self) -> None:
        if self.step < 0 or self.block < 0 or not self.key:
            raise ValueError(f"a cell needs step >= 0, block >= 0 and a key, got {self}")

    def __str__(self) -> str:
        return f"{self.stage} at step {self.step}, block {self.block}"

    @property
    def stage(self) -> str:
        """Of what it is a result."""
        return "sampling"

    @property
    def name(self) -> str:
        """Name of the cell's file; names sort by step, then block."""
        return f"{self.step:08d}-{self.block:04d}.zip"

    @property
    def file(self) -> str:
        """Where it is in the run folder."""
        return f"cells/{self.name}"


def loss_groups(tree: xr.DataTree) -> dict[str, xr.Dataset]:
    """The groups that hold losses, by path: ``"train"``, ``"queries/val"``, ..."""
    return {node.path.strip("/"): node.to_dataset() for node in tree.subtree if "loss" in node.data_vars}


def pack(tree: xr.DataTree) -> xr.DataTree:
    """A cell as it is stored: losses as float32 changes from those at the checkpoint."""

    def packed(loss: xr.DataArray, anchor: xr.DataArray) -> xr.DataArray:
        change = (loss - anchor).astype(np.float32)
        change.attrs = loss.attrs | {_RELATIVE: "loss_anchor"}
        return change

    return _with_losses(tree, packed)


def unpack(tree: xr.DataTree) -> xr.DataTree:
    """What :func:`pack` has packed, as it was."""

    def unpacked(change: xr.DataArray, anchor: xr.DataArray) -> xr.DataArray:
        loss = change.astype(np.float64) + anchor
        loss.attrs = {name: value for name, value in change.attrs.items() if name != _RELATIVE}
        return loss

    return _with_losses(tree, unpacked)


def _with_losses(tree: xr.DataTree, function: Callable[[xr.DataArray, xr.DataArray], xr.DataArray]) -> xr.DataTree:
    """The tree with ``function(loss, loss_anchor)`` in the place of every loss of a draw."""
    groups = {node.path: node.to_dataset() for node in tree.subtree}
    for path, group in groups.items():
        # Nothing at all, or a diverged chain: what is not finite stays so, without a word.
        with np.errstate(invalid="ignore", over="ignore"):
            drawn = {name: function(group[name], group["loss_anchor"]) for name in _DRAWN if name in group}
        groups[path] = group.assign(drawn)
    return xr.DataTree.from_dict(groups)


def check_cell(tree: xr.DataTree) -> None:
    """Refuse a tree that is not a cell, packed or not.

    Raises:
        ValueError: a group, variable or coordinate is missing or malformed, or a chain is called ok although
            its losses are not finite.
    """
    if "chains" not in tree.children or "status" not in tree["chains"].data_vars:
        raise ValueError("a cell needs the group 'chains' with the variable 'status (chain)'")
    chains = tree["chains"].to_dataset()
    if chains["status"].dims != ("chain",) or "chain" not in chains.coords:
        raise ValueError(f"'chains/status' needs the dimension and coordinate 'chain', got {chains['status'].dims}")
    groups = loss_groups(tree)
    if "train" not in groups and tree.attrs.get("localised", True) and not tree.attrs.get("unusable"):
        raise ValueError(
            "a cell without 'train/loss' must say why: set the attribute localised=False, or unusable to the reason"
        )
    for path, group in groups.items():
        _check_losses(path, group, chains)


def _check_losses(path: str, group: xr.Dataset, chains: xr.Dataset) -> None:
    dims = group["loss"].dims
    if dims[:3] != ("chain", "draw", "sample") or dims[3:] not in ((), ("token",)):
        raise ValueError(f"'{path}/loss' needs the dimensions (chain, draw, sample[, token]), got {dims}")
    if "chain" not in group.coords or not group["chain"].equals(chains["chain"]):
        raise ValueError(f"'{path}' needs the same coordinate 'chain' as 'chains/status'")
    expected = {"loss": dims, "loss_anchor": dims[2:], "share": dims[2:]}
    expected |= {name: dims for name in _DRAWN if name in group}
    ok = (chains["status"] == "ok").values
    for name, wanted in expected.items():
        dtype = np.dtype(np.float32 if name in group and _RELATIVE in group[name].attrs else np.float64)
        if name not in group or group[name].dims != wanted or group[name].dtype != dtype:
            got = f"{group[name].dtype} {group[name].dims}" if name in group else "nothing"
            raise ValueError(f"'{path}/{name}' must be {dtype} {wanted}, got {got}")
        values = group[name].values
        if not np.isfinite(values[ok] if "chain" in wanted else values).all():
            raise ValueError(
                f"'{path}/{name}' is not finite although the chains are called ok; a chain that produced it "
                "needs another status, e.g. 'diverged'"
            )


def join_facts(blocks: Sequence[Facts]) -> Facts:
    """The facts on which the blocks of a step agree.

    Raises:
        ValueError: the blocks sampled different posteriors.
    """
    first = blocks[0]
    for block in blocks[1:]:
        for name in _POSTERIOR:
            if not _same(block.get(name), first.get(name)):
                raise ValueError(f"chain blocks disagree on {name}: {first.get(name)!r} and {block.get(name)!r}")
    return {name: f for name, f in first.items() if all(_same(f, block.get(name)) for block in blocks)}


def _same(a: Any, b: Any) -> bool:
    return a == b or repr(a) == repr(b)  # NaN is the same as NaN


def join_blocks(blocks: Sequence[xr.DataTree]) -> xr.DataTree:
    """One tree with the chains of all blocks along ``chain``.

    Raises:
        ValueError: the blocks differ in groups, variables, sizes, anchors or posterior, or share a chain.
    """
    first = blocks[0]
    facts = join_facts([{str(name): fact for name, fact in block.attrs.items()} for block in blocks])
    for block in blocks[1:]:
        _check_fits(first, block)
    chain = np.concatenate([block["chains"]["chain"].values for block in blocks]).tolist()
    if len(set(chain)) != len(chain):
        raise ValueError(f"chain blocks share chain numbers: {sorted(chain)}")
    joined = {path: _concat([block[path].to_dataset() for block in blocks]) for path in first.groups}
    tree = xr.DataTree.from_dict(joined)
    tree.attrs = facts
    return tree


def _check_fits(first: xr.DataTree, other: xr.DataTree) -> None:
    if set(first.groups) != set(other.groups):
        raise ValueError(f"chain blocks hold different groups: {first.groups} and {other.groups}")
    for path in first.groups:
        ours, theirs = first[path].to_dataset(), other[path].to_dataset()
        if _sizes(ours) != _sizes(theirs):
            raise ValueError(f"{path}: chain blocks differ in size: {_sizes(ours)} and {_sizes(theirs)}")
        for name, variable in ours.variables.items():
            # Equal up to the arithmetic of different devices.
            if "chain" not in variable.dims and not np.allclose(variable, theirs[name], 1e-4, 1e-5):
                raise ValueError(f"{path}: chain blocks disagree on {name!r}; are they of the same checkpoint?")


def _sizes(group: xr.Dataset) -> dict[str, dict[str, int]]:
    return {
        str(name): {str(dim): size for dim, size in variable.sizes.items() if dim != "chain"}
        for name, variable in sorted(group.variables.items(), key=lambda item: str(item[0]))
    }


def _concat(blocks: list[xr.Dataset]) -> xr.Dataset:
    if "chain" not in blocks[0].dims:
        return blocks[0]
    return xr.concat(blocks, "chain", data_vars="minimal", coords="minimal", compat="override", join="override")
