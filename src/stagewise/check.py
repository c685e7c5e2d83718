"""Is what we differentiate what was trained? One check where a task meets a checkpoint.

On a few samples, at the checkpoint's weights and at slightly moved ones, losses and gradients of the pure function
agree with ``loss(model, batch).backward()`` on an ordinary copy of the model, and curvature with the differences of its
gradients. And every loss is finite. What disagrees is named, before anything is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.utils._pytree import tree_map

from stagewise.attention import plain_attention
from stagewise.checkpoint import Checkpoint
from stagewise.data import Samples
from stagewise.memory import out_of_memory
from stagewise.task import Batch, Losses, Task, checked_losses

_FEW = 4
_MOVED = 1e-2  # of the size of a parameter
_LOSSES, _GRADIENTS = 1e-3, 1e-2  # relative
# Steps of the finite differences, and the relative error up to which they agree: in float64, and in the model's type.
_DIFFERENCES = {True: ((1e-5, 1e-6), 1e-2), False: ((1e-2, 1e-3, 1e-1), 5e-2)}

_RECOMPUTED = (
    "the model recomputes activations in backward() (torch.utils.checkpoint), when its own parameters are in their "
    "place again; switch activation checkpointing off, which changes no number"
)


def check(task: Task, checkpoint: Checkpoint, *, curvature: bool = False) -> None:
    """Refuse what no estimator could use; what has been found in order is not looked at again.

    Args:
        task: the task.
        checkpoint: as :meth:`Task.fitted` returns it.
        curvature: also check second derivatives, for whatever uses them.

    Raises:
        ValueError: the data are others each time they are read; the losses have the wrong shape or type, are not
            finite, change between two evaluations (dropout) or depend on the rest of the batch (batch statistics), or
            the loss cannot be evaluated; the loss depends on parameters that are not the model's, or on another
            model than the one it is given; gradients or curvature are not those of training.
    """
    if not task.checked:
        task.pure.refuse()
    moved = _moved(task, checkpoint.params)
    if "model" not in task.checked:
        for data in (task.train, *task.queries.values()):
            data.check_steady()
        for data, query, batch in _few(task):
            _check_losses(task, data, query, batch, checkpoint.params)
            _check_agreement(task, data, query, batch, moved)
        _check_gradients(task, moved)
        task.checked.add("model")
    if curvature and "curvature" not in task.checked:
        _check_curvature(task, moved)
        task.checked.add("curvature")
    if checkpoint.digest not in task.checked:
        for data, query in _all(task):
            check_finite(task, checkpoint.params, data, query)
        task.checked.add(checkpoint.digest)


def check_finite(task: Task, params: Mapping[str, Tensor], data: Samples, query: str | None = None) -> None:
    """One pass over a data set.

    Raises:
        ValueError: the first sample whose loss is not finite.
    """
    done = 0
    for batch in data.batches(task.forward_batch, task.device):
        with torch.no_grad():
            values = task.losses(params, batch, query)
        bad = (~torch.isfinite(values)).reshape(len(values), -1).any(1)
        if bad.any():
            raise ValueError(
                f"{data.name}: the loss of sample {done + int(bad.nonzero()[0])} is not finite; check the data and "
                "the checkpoint"
            )
        done += len(values)


def _all(task: Task) -> Iterator[tuple[Samples, str | None]]:
    yield task.train, None
    for name, data in task.queries.items():
        yield data, name


def _few(task: Task) -> Iterator[tuple[Samples, str | None, Batch]]:
    for data, query in _all(task):
        yield data, query, data.batch(data.few(_FEW), task.device)


def _check_losses(task: Task, data: Samples, query: str | None, batch: Batch, params: Mapping[str, Tensor]) -> None:
    """Shape, type, repeatability, independence of samples, and no side effect, as the user's own code shows them."""
    model = task.pure.reference(params)
    before = {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}
    first = _plain(task, model, data, query, batch)
    _check_form(first, data)
    second = _plain(task, model, data, query, batch)
    if not torch.equal(first.values, second.values):
        raise ValueError(
            f"{data.name}: two evaluations of the same batch differ by up to "
            f"{(first.values - second.values).abs().max().item():.3g} nats; losses must be deterministic. Switch off "
            "dropout and random augmentation (model.eval(), F.dropout(..., training=False))"
        )
    for name, tensor in _tensors(model).items():
        if not torch.equal(tensor, before[name]):
            raise ValueError(
                f"{data.name}: evaluating the loss changes {name!r} of the model; a loss must leave the model as it "
                "is. Call model.eval(), and take the update out of forward()"
            )
    together = task.by_sample(first)[0]
    for position, row in enumerate(data.few(_FEW)):
        one = data.batch(row[None], task.device)
        alone = task.by_sample(_plain(task, model, data, query, one))[0][0]
        if not torch.allclose(together[position], alone, rtol=1e-3, atol=1e-4):
            raise ValueError(
                f"{data.name}: the loss of sample {int(row)} depends on the rest of its batch "
                f"({together[position].item():.5g} beside others, {alone.item():.5g} alone); batch statistics and "
                "losses averaged over the batch cannot be attributed to samples"
            )


def _check_form(losses: Losses, data: Samples) -> None:
    values, weights = losses
    size = len(data.few(_FEW))
    if values.shape[0] != size:
        raise ValueError(
            f"{data.name}: the loss returned {tuple(values.shape)} for a batch of {size}, expected ({size},) or "
            f"({size}, tokens): one loss per sample or token, not their mean (reduction='none')"
        )
    if values.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{data.name}: losses are {values.dtype}, whose rounding would drown the covariances; return float32 or "
            "float64 (logits.float() before the cross-entropy)"
        )
    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).reshape(size, -1).any(1).nonzero()[0])
        raise ValueError(
            f"{data.name}: the loss of sample {int(data.few(_FEW)[bad])} is not finite; check the data and the "
            "checkpoint"
        )
    if weights is not None and (not torch.isfinite(weights).all() or (weights < 0).any()):
        raise ValueError(f"{data.name}: the loss returned weights that are negative or not finite")


def _check_agreement(task: Task, data: Samples, query: str | None, batch: Batch, params: Mapping[str, Tensor]) -> None:
    """Losses of the pure function against those of an ordinary model, at moved weights."""
    plain = _plain(task, task.pure.reference(params), data, query, batch).values
    try:
        with torch.no_grad():
            pure = task.losses(params, batch, query)
    except Exception as error:
        if out_of_memory(error):
            raise
        raise ValueError(f"{data.name}: {_cannot(error, 'with exchanged parameters')}") from error
    if not _close(pure, plain, _LOSSES):
        raise ValueError(
            f"{data.name}: with other parameters in their place the losses are not those of the model ("
            f"{pure.flatten()[0].item():.5g}, expected {plain.flatten()[0].item():.5g}): a parameter is kept "
            "somewhere else too (a tuple, a closure, a cache), or the loss uses another model than the one it is given"
        )


def _check_gradients(task: Task, params: Mapping[str, Tensor]) -> None:
    """The gradient of the objective on a few training samples."""
    batch = task.train.batch(task.train.few(_FEW), task.device)
    model = task.pure.reference(params)
    with disable_saved_tensors_hooks(_RECOMPUTED):
        objective = _objective(task, _plain(task, model, task.train, None, batch, grad=True))
    if any("CheckpointFunction" in node.name() for node in _graph(objective)):
        raise ValueError(f"train: {_RECOMPUTED}")
    own = dict(model.named_parameters())
    if strangers := [leaf for leaf in _graph_leaves(objective) if not any(leaf is tensor for tensor in own.values())]:
        raise ValueError(
            f"train: the loss depends on {len(strangers)} tensor(s) that require a gradient and are not parameters of "
            f"the model it is given (the first of shape {tuple(strangers[0].shape)}): register them in the model "
            "(nn.Parameter, nn.ParameterList), use the model that the loss is handed, or detach them"
        )
    if not objective.requires_grad:
        raise ValueError(
            "train: the loss does not depend on any parameter that requires a gradient; does it use the model that it "
            "is handed, and outside of torch.no_grad()?"
        )
    plain = torch.autograd.grad(objective, [own[name] for name in task.trainable], allow_unused=True)
    leaves = {name: params[name].detach().requires_grad_() for name in task.trainable}
    with torch.enable_grad():
        value = _objective(task, task.weighted_losses({**params, **leaves}, batch))
    pure = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    for name, ours, theirs in zip(task.trainable, pure, plain, strict=True):
        expected = torch.zeros_like(leaves[name]) if theirs is None else theirs.to_dense()
        if not _close(torch.zeros_like(expected) if ours is None else ours, expected, _GRADIENTS):
            raise ValueError(
                f"train: the gradient by {name!r} is not that of loss(model, batch).backward(); the model keeps this "
                "parameter in a place where it cannot be exchanged. Use it as a registered nn.Parameter only"
            )


def _check_curvature(task: Task, params: Mapping[str, Tensor]) -> None:
    """Hessian products against differences of plain gradients, and gradients against differences of losses.

    In float64 where the model can: there the differences are sharp, and steps so small that no kink is met.
    """
    for double in (True, False):
        steps, tolerance = _DIFFERENCES[double]
        try:
            faults = [_disagreement(task, params, step, tolerance, double) for step in steps]
        except (RuntimeError, TypeError, ValueError) as error:
            if out_of_memory(error):
                raise
            if double:
                continue  # the model or its data do not know float64
            raise ValueError(f"train: {_cannot(error, 'twice differentiated')}") from error
        if all(faults):
            raise ValueError(
                f"train: {faults[0]}. Something in the model or the loss is hidden from differentiation "
                "(torch.no_grad, detach, .data, rounding with a straight-through gradient) or has no second "
                "derivative, so that curvature and chains would not be those of training. gradient_product, tracin and "
                "retraining can be used"
            )
        return


def _disagreement(task: Task, params: Mapping[str, Tensor], step: float, tolerance: float, double: bool) -> str:
    """What differs, in words; empty if nothing does."""
    dtype = torch.float64 if double else None
    batch = task.train.batch(task.train.few(_FEW), task.device)
    if double:
        batch, params = tree_map(_double, batch), {name: _double(tensor) for name, tensor in params.items()}
    names = list(task.trainable)
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(params[n].shape, generator=generator, dtype=torch.float64).to(params[n]) for n in names]
    sizes = [step * (params[n].square().mean().sqrt() + 0.01) for n in names]
    direction = [size * d for size, d in zip(sizes, direction, strict=True)]

    def there(sign: float) -> tuple[float, list[Tensor]]:
        displaced = {n: params[n] + sign * d for n, d in zip(names, direction, strict=True)}
        model = task.pure.reference({**params, **displaced}, dtype)
        value = _objective(task, _plain(task, model, task.train, None, batch, grad=True))
        if double and value.dtype != torch.float64:
            raise TypeError("the loss is not computed in float64")
        own = dict(model.named_parameters())
        gradient = torch.autograd.grad(value, [own[n] for n in names], materialize_grads=True, allow_unused=True)
        return value.item(), [g.to_dense() for g in gradient]

    (up, gradient_up), (down, gradient_down) = there(1.0), there(-1.0)
    leaves = [params[n].detach().clone().requires_grad_() for n in names]
    with torch.enable_grad(), plain_attention():
        value = _objective(task, task.weighted_losses({**params, **dict(zip(names, leaves, strict=True))}, batch))
        gradient = torch.autograd.grad(value, leaves, create_graph=True, materialize_grads=True, allow_unused=True)
        along = torch.stack([(g * d).sum() for g, d in zip(gradient, direction, strict=True)]).sum()
        image = _second(along, leaves)
    slope, difference = along.item(), (up - down) / 2
    noise = 1e-12 if double else 1e-5
    if abs(slope - difference) > tolerance * max(abs(slope), abs(difference)) + noise * abs(up):
        return f"along a direction the loss changes by {difference:.4g}, by its gradient it should by {slope:.4g}"
    flat = torch.cat([v.detach().reshape(-1) for v in image])
    expected = torch.cat([((u - d) / 2).reshape(-1) for u, d in zip(gradient_up, gradient_down, strict=True)])
    scale = torch.cat([u.reshape(-1) for u in gradient_up]).norm()
    if (flat - expected).norm() > tolerance * torch.maximum(flat.norm(), expected.norm()) + 100 * noise * scale:
        error = ((flat - expected).norm() / expected.norm()).item()
        return f"second derivatives miss the change of the gradient along a direction by {error:.0%}"
    return ""


def _second(along: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    if not along.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(torch.autograd.grad(along, leaves, materialize_grads=True, allow_unused=True))


def _plain(task: Task, model: nn.Module, data: Samples, query: str | None, batch: Batch, grad: bool = False) -> Losses:
    """The losses as the user's code computes them."""
    loss = task.loss if query is None else task.query_losses.get(query, task.loss)
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            return checked_losses(loss(model, batch))
    except Exception as error:
        if out_of_memory(error):
            raise
        if isinstance(error, ValueError) and str(error).startswith("the loss returned"):
            raise ValueError(f"{data.name}: {error}") from None
        raise ValueError(f"{data.name}: {_cannot(error, '')}") from error


def _cannot(error: Exception, how: str) -> str:
    line = str(error).strip().split("\n")[0]
    how = f" {how}" if how else ""
    return f"the loss cannot be evaluated{how}: {type(error).__name__}: {line}"


def _objective(task: Task, losses: Losses) -> Tensor:
    values, weights = task.by_sample(losses)
    return (weights * values).sum() / weights.sum().clamp(min=1e-30)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _graph(value: Tensor) -> Iterator[Any]:
    """All nodes of a value's graph."""
    seen, stack = {None}, [value.grad_fn]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        stack += [parent for parent, _ in node.next_functions]


def _graph_leaves(value: Tensor) -> list[Tensor]:
    """The tensors that a value is differentiated by: the leaves of its graph."""
    leaves = (getattr(node, "variable", None) for node in _graph(value))
    return [leaf for leaf in leaves if leaf is not None]


def _moved(task: Task, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters slightly displaced, the same way each time."""
    generator = torch.Generator().manual_seed(0)
    displaced = {}
    for name in sorted(task.trainable):
        tensor = params[name]
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
        displaced[name] = tensor + _MOVED * (tensor.square().mean().sqrt() + 0.01) * noise
    return {**params, **displaced}


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _close(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    return bool((ours - theirs).norm() <= tolerance * theirs.norm() + 1e-6 * max(1.0, theirs.numel() ** 0.5) * 1e-2)
