"""Other people's estimators of the influence of single samples, from a task at a checkpoint.

TRAK is that of the library `traker`, EK-FAC that of `kronfluence`; both are optional. What they return has no scale of
a window: only order and sign are compared. As everywhere, negative is helpful.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.nn import functional
from torch.utils.data import TensorDataset

import stagewise as sw
from stagewise.groups import query_groups

Predict = Callable[[Any, Any], tuple[Tensor, Tensor, Tensor]]
"""``predict(model, batch)``: logits (..., classes), the classes that they are to predict (...), and weights (...)."""

_ROWS = 128  # gradients held at once
_SAMPLES_PER_FEATURE = 10
_SURE = 1e-7  # the margin of a sample without any loss would be infinite


def everything(samples: Any) -> tuple[Tensor, ...]:
    """A data set as one batch."""
    batch: tuple[Tensor, ...] = samples.batch(slice(None))
    return batch


def influence_of_samples(task: sw.Task, step: int, value: Tensor) -> xr.Dataset:
    """Values ``(train, query sample)`` as those of query groups, the weighted mean over the samples of each."""
    name, queried = next(iter(task.queries)), query_groups(task)
    weights = {name: sample_weights(task, name)}
    mean = queried.mean({name: value.double()}, weights).numpy()
    coords = {"step": [step], "train": [str(k) for k in range(len(value))], "query": list(queried.labels)}
    return xr.Dataset({"value": (("step", "train", "query"), mean[None])}, coords)


def sample_weights(task: sw.Task, query: str | None = None) -> Tensor:
    """Weight of every sample in its mean ``(samples,)``, float64: it depends on the data alone."""
    data = task.train if query is None else task.queries[query]
    with torch.no_grad():
        return task.sample_losses(task.state(), everything(data), query)[1].double()


# Cosine of gradients


def cosine(task: sw.Task, checkpoint: sw.Checkpoint) -> xr.Dataset:
    """Minus the cosine between the gradient of every sample and that of every query group."""
    params = task.fitted(checkpoint).params
    name, queried = next(iter(task.queries)), query_groups(task)
    train, query = gradients(task, params), gradients(task, params, name)
    means = queried.mean({name: query.T}).T.to(train)
    value = -functional.normalize(train, dim=1) @ functional.normalize(means, dim=1).T
    coords = {
        "step": [checkpoint.step],
        "train": [str(k) for k in range(len(train))],
        "query": list(queried.labels),
    }
    return xr.Dataset({"value": (("step", "train", "query"), value.double().numpy()[None])}, coords)


def gradients(task: sw.Task, params: Any, query: str | None = None) -> Tensor:
    """Gradient of every sample's loss times its weight ``(samples, parameters)``."""
    moving = {name: params[name].detach() for name in task.trainable}

    def loss(moved: dict[str, Tensor], row: tuple[Tensor, ...]) -> Tensor:
        losses, weights = task.sample_losses({**params, **moved}, tuple(part[None] for part in row), query)
        return (losses * weights).sum()

    data = everything(task.train if query is None else task.queries[query])
    per_row = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    pieces = zip(*(torch.split(part, _ROWS) for part in data), strict=True)
    return torch.cat([torch.cat([g.flatten(1) for g in per_row(moving, piece).values()], 1) for piece in pieces])


# TRAK


def trak(task: sw.Task, checkpoint: sw.Checkpoint) -> xr.Dataset:
    """TRAK (Park et al. 2023, arXiv 2303.14186) of this one checkpoint.

    The output is the margin log(p / (1 - p)) with p = exp(-loss). Scores of margins become those of losses by the chain
    rule. Features are a tenth of the samples in number, about the paper's ratio: with more features than samples and
    no damping the kernel cannot be inverted, and nothing says so.
    """
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput
    from trak.projectors import BasicProjector, ProjectionType

    class Margin(AbstractModelOutput):  # type: ignore[misc]
        def __init__(self) -> None:
            """The library's own is abstract."""

        @staticmethod
        def get_output(_model: Any, weights: Any, buffers: Any, *row: Tensor) -> Tensor:
            losses, _ = task.sample_losses({**weights, **buffers}, tuple(part[None] for part in row))
            losses = losses.clamp(min=_SURE)
            return (-losses - torch.log(-torch.expm1(-losses))).sum()

        @staticmethod
        def get_out_to_loss_grad(_model: Any, weights: Any, buffers: Any, batch: Any) -> Tensor:
            with torch.no_grad():
                losses, shares = task.sample_losses({**weights, **buffers}, tuple(batch))
            return (shares * -torch.expm1(-losses))[:, None]

    model = at_checkpoint(task, checkpoint)
    state = model.state_dict()
    size, count = sum(p.numel() for p in model.parameters()), len(task.train)
    name = next(iter(task.queries))
    train, query = everything(task.train), everything(task.queries[name])
    with quiet(), tempfile.TemporaryDirectory() as folder:
        # Two blocks or more: the library throws a single one away before the targets, and does not make it again.
        width = count // _SAMPLES_PER_FEATURE
        features = BasicProjector(size, width, 0, ProjectionType.rademacher, "cpu", block_size=width // 2)
        traker = TRAKer(
            model,
            Margin(),
            count,
            save_dir=folder,
            device="cpu",
            projector=features,
            proj_dim=None,
            use_half_precision=False,
            logging_level=logging.ERROR,
        )
        traker.load_checkpoint(state, model_id=0)
        for piece in zip(*(torch.split(part, _ROWS) for part in train), strict=True):
            traker.featurize(piece, num_samples=len(piece[0]))
        traker.finalize_features()
        traker.start_scoring_checkpoint("query", state, model_id=0, num_targets=len(query[0]))
        for piece in zip(*(torch.split(part, _ROWS) for part in query), strict=True):
            traker.score(piece, num_samples=len(piece[0]))
        scores = torch.from_numpy(np.array(traker.finalize_scores("query")))
    with torch.no_grad():
        losses, _ = task.sample_losses(task.fitted(checkpoint).params, query, name)
    return influence_of_samples(task, checkpoint.step, scores * torch.expm1(-losses))


# EK-FAC


def ekfac(task: sw.Task, checkpoint: sw.Checkpoint, predict: Predict) -> xr.Dataset:
    """Influence functions with EK-FAC curvature (Grosse et al. 2023, arXiv 2308.03296).

    Of linear and convolutional layers, with labels drawn from the model and the damping of the paper, a tenth of the
    mean eigenvalue.
    """
    from kronfluence import Analyzer, FactorArguments, ScoreArguments, prepare_model
    from kronfluence import Task as Described

    def losses(model: Any, batch: Any, drawn: bool) -> Tensor:
        logits, classes, weights = predict(model, batch)
        logits = logits.flatten(0, -2)
        if drawn:
            classes = torch.multinomial(logits.detach().softmax(-1), 1)
        return (weights.flatten() * functional.cross_entropy(logits, classes.flatten(), reduction="none")).sum()

    class Classes(Described):  # type: ignore[misc]
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Tensor:
            return losses(model, batch, sample)

        def compute_measurement(self, batch: Any, model: Any) -> Tensor:
            return losses(model, batch, False)

    name, described = next(iter(task.queries)), Classes()
    model = prepare_model(at_checkpoint(task, checkpoint), described)
    train, query = (TensorDataset(*everything(data)) for data in (task.train, task.queries[name]))
    with quiet(), tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        analyzer = Analyzer(
            "ekfac", model, described, cpu=True, log_level=logging.ERROR, disable_tqdm=True, output_dir=folder
        )
        analyzer.fit_all_factors("ekfac", train, per_device_batch_size=_ROWS, factor_args=FactorArguments("ekfac"))
        analyzer.compute_pairwise_scores(
            "scores",
            "ekfac",
            query,
            train,
            per_device_query_batch_size=_ROWS,
            per_device_train_batch_size=_ROWS,
            score_args=ScoreArguments(damping_factor=None),
        )
        found = analyzer.load_pairwise_scores("scores")
    scores: Tensor = found["all_modules"].double().T  # (train, query), of sums of weighted losses
    return influence_of_samples(task, checkpoint.step, -scores / sample_weights(task, name).clamp(min=1e-30))


def at_checkpoint(task: sw.Task, checkpoint: sw.Checkpoint) -> Any:
    """A copy of the model with the weights of a checkpoint."""
    model = copy.deepcopy(task.model)
    model.load_state_dict(task.fitted(checkpoint).params)
    return model.eval()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Neither progress bars nor warnings about a library's own calls between the rows of a table."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
