"""Is what we differentiate what was trained? One check where a task meets a checkpoint.

On a few samples, at the checkpoint's weights and at slightly moved ones, losses and gradients of the pure function
agree with ``loss(model, batch).backward()`` on an ordinary copy of the model, and curvature with the differences of its
gradients. And every loss is finite. What disagrees is named, before anything is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from stagewise.attention import slow_path
from stagewise.checkpoint import Checkpoint
from stagewise.data import Samples
from stagewise.differences import check_differences, is_large
from stagewise.double import InDouble, doubled
from stagewise.memory import give_back, out_of_memory
from stagewise.plain import cannot, objective, plain_losses
from stagewise.strangers import check_strangers
from stagewise.task import Batch, Losses, Task
from stagewise.tokens import check_places, check_tokens

_FEW = 4
_MOVED = (1e-2, 1e-4, 1e-6, 0.0)  # of the size of a parameter
# Relative errors. What differs by more than rounding is looked at again in float64, where that is possible.
_SAME, _SAME_IN_DOUBLE, _ALIKE = 1e-5, 1e-3, 1e-2

Pair = Callable[[nn.Module, Mapping[str, Tensor], Batch], tuple[Tensor, Tensor]]
"""From an ordinary module, its parameters and a batch to two things that should be equal."""


def check(task: Task, checkpoint: Checkpoint, *, curvature: bool = False, train: bool = True) -> None:
    """Refuse what no estimator could use; what has been found in order is not looked at again.

    Args:
        task: the task.
        checkpoint: as :meth:`Task.fitted` returns it.
        curvature: also check second derivatives, for whatever uses them.
        train: also look for losses of the training set that are not finite, for whatever uses all of it. At the first
            checkpoint that is always done.

    Raises:
        ValueError: the data are others each time they are read; tokens are not the model's; the losses have the wrong
            shape or type, are not finite, change between two evaluations (dropout) or depend on the rest of the batch,
            in value (batch statistics) or place (padding on the left), or the loss cannot be evaluated; the loss
            depends on parameters that are not the model's, or on another model than the one it is given; gradients or
            curvature are not those of training.
    """
    with torch.inference_mode(False):
        _check(task, checkpoint, curvature, train)


def _check(task: Task, checkpoint: Checkpoint, curvature: bool, train: bool) -> None:
    if not task.checked:
        task.pure.refuse()
    if "model" not in task.checked:
        for data in (task.train, *task.queries.values()):
            data.check_steady()
            check_tokens(task, data)
        for data, query, batch in _few(task):
            _check_losses(task, data, query, batch, checkpoint.params)
            check_places(task, data, query, checkpoint.params)
        moved = _moved(task, checkpoint.params)
        for data, query, batch in _few(task):
            _check_agreement(task, data, query, batch, moved)
        check_strangers(task, checkpoint.params, lambda: task.train.batch(task.train.few(_FEW), task.device))
        _check_gradients(task, moved)
        task.checked.add("model")
    if curvature and "curvature" not in task.checked:
        give_back()
        rows = task.train.few(1 if is_large(task) else min(_FEW, task.forward_batch))  # with a graph of second order
        check_differences(task, _moved(task, checkpoint.params), task.train.batch(rows, task.device))
        task.checked.add("curvature")
    first = "steady" not in task.checked
    for data, query in _all(task):
        seen = f"{data.name} {checkpoint.digest}"
        if seen in task.checked or not (train or first or data is not task.train):
            continue
        losses = check_finite(task, checkpoint.params, data, query)
        if data is task.train and task.sample_weights is None:
            task.sample_weights = losses[1].double()  # one pass over the data is enough
        if first:
            _check_steady(data, losses, check_finite(task, checkpoint.params, data, query))
        task.checked.add(seen)
        give_back()
    task.checked.add("steady")


def check_finite(task: Task, params: Mapping[str, Tensor], data: Samples, query: str | None = None) -> Tensor:
    """One pass over a data set.

    Returns:
        Loss and weight of every sample ``(2, sample)``, on the CPU.

    Raises:
        ValueError: the first sample whose loss is not finite, a loss cannot be evaluated, or no sample has a weight.
    """
    done, weight = 0, 0.0
    found = []
    for batch in data.batches(task.forward_batch, task.device):
        try:
            with torch.no_grad():
                values, weights = task.weighted_losses(params, batch, query)
        except Exception as error:  # e.g. an index out of range in a sample that was not among the few
            if out_of_memory(error):
                raise
            last = min(done + task.forward_batch, len(data)) - 1
            raise ValueError(f"{data.name}: in samples {done} to {last} {cannot(error)}") from error
        bad = (~torch.isfinite(values)).reshape(len(values), -1).any(1)
        if bad.any():
            raise ValueError(
                f"{data.name}: the loss of sample {done + int(bad.nonzero()[0])} is not finite; check the data and "
                "the checkpoint"
            )
        done += len(values)
        weight += len(values) if weights is None else float(weights.sum())
        found.append(torch.stack(task.by_sample(Losses(values, weights))).cpu())
    if not weight > 0:
        raise ValueError(f"{data.name}: all weights that the loss returned are 0, so that there is nothing to average")
    return torch.cat(found, 1)


def _check_steady(data: Samples, first: Tensor, second: Tensor) -> None:
    """All samples, twice: noise may spare the few that are looked at more closely."""
    differ = ~torch.isclose(first, second, rtol=1e-5, atol=1e-6).all(0)
    if differ.any():
        sample = int(differ.nonzero()[0])
        raise ValueError(
            f"{data.name}: two evaluations of the same data differ, first at sample {sample} "
            f"({first[0, sample].item():.5g} and {second[0, sample].item():.5g} nats); losses and data must be "
            "deterministic. Switch off dropout and random augmentation (model.eval(), F.dropout(..., training=False))"
        )


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
    first = plain_losses(task, model, data, query, batch)
    check_form(task, first, data, data.few(_FEW))
    second = plain_losses(task, model, data, query, batch)
    if not torch.allclose(first.values, second.values, rtol=1e-5, atol=1e-6):
        raise ValueError(
            f"{data.name}: two evaluations of the same batch differ by up to "
            f"{(first.values - second.values).abs().max().item():.3g} nats; losses must be deterministic. Switch off "
            "dropout and random augmentation (model.eval(), F.dropout(..., training=False))"
        )
    for name, tensor in _tensors(model).items():
        # A buffer that has grown is a cache.
        if name in before and tensor.shape == before[name].shape and not _identical(tensor, before[name]):
            raise ValueError(
                f"{data.name}: evaluating the loss changes {name!r} of the model; a loss must leave the model as it "
                "is. Call model.eval(), and take the update out of forward()"
            )

    def both(model: nn.Module, params: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        del params
        alone = []
        for row in data.few(_FEW):
            try:
                losses = plain_losses(task, model, data, query, data.batch(row[None], task.device))
            except ValueError as error:
                raise ValueError(
                    f"{error}. It was given one sample; squeeze() takes the batch's axis away then"
                ) from None
            check_form(task, losses, data, row[None])
            alone.append(task.by_sample(losses)[0])
        return task.by_sample(plain_losses(task, model, data, query, batch))[0], torch.cat(alone)

    if not _agree(task, both, params, batch):
        together, alone = both(model, params, batch)
        worst = int((together - alone).abs().argmax())
        raise ValueError(
            f"{data.name}: the loss of sample {int(data.few(_FEW)[worst])} depends on the rest of its batch "
            f"({together[worst].item():.5g} beside others, {alone[worst].item():.5g} alone); batch statistics and "
            "losses averaged over the batch cannot be attributed to samples"
        )


def check_form(task: Task, losses: Losses, data: Samples, rows: Tensor) -> None:
    """Refuse losses of some samples that have another shape or type, or are not finite.

    Raises:
        ValueError: with what was got, and what to do.
    """
    values, weights = losses
    size = len(rows)
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
        left = task.pure.leftovers
        reason = f"check that {left[0]!r}, which the model keeps, is computed anew for other weights" if left else ""
        raise ValueError(
            f"{data.name}: the loss of sample {int(rows[bad])} is not finite; "
            f"{reason or 'check the data and the checkpoint'}"
        )
    if weights is not None and (not torch.isfinite(weights).all() or (weights < 0).any()):
        raise ValueError(f"{data.name}: the loss returned weights that are negative or not finite")


def _check_agreement(task: Task, data: Samples, query: str | None, batch: Batch, params: Mapping[str, Tensor]) -> None:
    """Losses of the pure function against those of an ordinary model, at moved weights."""

    def both(model: nn.Module, params: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        plain = plain_losses(task, model, data, query, batch).values
        with torch.no_grad():
            return task.losses(params, batch, query), plain

    try:
        agree = _agree(task, both, params, batch)
    except Exception as error:
        if out_of_memory(error):
            raise
        raise ValueError(f"{data.name}: {cannot(error, 'with exchanged parameters')}") from error
    if not agree:
        pure, plain = both(task.pure.reference(params), params, batch)
        raise ValueError(
            f"{data.name}: with other parameters in their place the losses are not those of the model ("
            f"{pure.flatten()[0].item():.5g}, expected {plain.flatten()[0].item():.5g}): a parameter is kept "
            "somewhere else too (a tuple, a closure, a cache), or the loss uses another model than the one it is given"
        )


def _check_gradients(task: Task, params: Mapping[str, Tensor]) -> None:
    """The gradient of the objective on a few training samples."""
    batch = task.train.batch(task.train.few(_FEW), task.device)

    def both(model: nn.Module, params: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        value = objective(task, plain_losses(task, model, task.train, None, batch, grad=True))
        own = dict(model.named_parameters())
        leaves = {name: params[name].detach().requires_grad_() for name in task.trainable}
        with slow_path(), torch.enable_grad():
            ours = objective(task, task.weighted_losses({**params, **leaves}, batch))
        return _gradient(ours, leaves), _gradient(value, {name: own[name] for name in task.trainable})

    if not _agree(task, both, params, batch):
        pure, plain = both(task.pure.reference(params), params, batch)
        sizes = [params[name].numel() for name in task.trainable]
        errors = [
            (a - b).norm().item() for a, b in zip(torch.split(pure, sizes), torch.split(plain, sizes), strict=True)
        ]
        name = list(task.trainable)[errors.index(max(errors))]
        raise ValueError(
            f"train: the gradient by {name!r} is not that of loss(model, batch).backward(); the model keeps this "
            "parameter in a place where it cannot be exchanged. Use it as a registered nn.Parameter only"
        )


def _gradient(value: Tensor, leaves: Mapping[str, Tensor]) -> Tensor:
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.to_dense().reshape(-1) for gradient in found])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _moved(task: Task, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters slightly displaced, the same way each time; less far where the losses do not exist there."""
    moved = dict(params)
    for size in _MOVED:
        generator = torch.Generator().manual_seed(0)
        for name in sorted(task.trainable):
            tensor = params[name]
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
            moved[name] = tensor + size * (tensor.square().mean().sqrt() + 0.01) * noise
        if _finite(task, moved):
            break
    return moved


def _finite(task: Task, params: Mapping[str, Tensor]) -> bool:
    model = task.pure.reference(params)
    try:
        values = [plain_losses(task, model, *which).values for which in _few(task)]
    except ValueError:  # arguments out of range, for instance
        return False
    return all(bool(torch.isfinite(v).all()) for v in values)


def _agree(task: Task, pair: Pair, params: Mapping[str, Tensor], batch: Batch) -> bool:
    """Whether two things are equal but for rounding."""
    single = pair(task.pure.reference(params), params, batch)
    if _close(*single, _SAME):
        return True
    try:
        with InDouble():
            params = doubled(dict(params))
            double = pair(task.pure.reference(params, torch.float64), params, doubled(batch))
    except (RuntimeError, TypeError, ValueError) as error:
        if out_of_memory(error):
            raise
        return _close(*single, _ALIKE)
    return _close(*double, _SAME_IN_DOUBLE)


def _close(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    return bool((ours - theirs).norm() <= tolerance * theirs.norm() + 1e-8 * theirs.numel() ** 0.5)


def _identical(ours: Tensor, theirs: Tensor) -> bool:
    return bool(((ours == theirs) | ((ours != ours) & (theirs != theirs))).all())
