"""The local posterior around a checkpoint: what is sampled.

    p(w) ~ exp( - n_beta L(w) - (gamma/2) (w - w*)^T P^-1 (w - w*) )

L is the mean training loss, w* the checkpoint, P the metric (identity, or Adam's 1/(sqrt(v)+eps)).
Everything downstream works in *whitened displacements* u, with w = w* + P^(1/2) u, where the localisation is
(gamma/2)|u|^2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat, takewhile
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stagewise.checkpoint import Checkpoint, Optimizer
from stagewise.evaluate import Point, at
from stagewise.sampling.metric import adam_metric, clip_factor, relative_rates
from stagewise.sampling.restricted import moving, names_of
from stagewise.task import Task

Metric = Literal["euclidean", "adam"]

LONGEST_WINDOW = 10**6

MAX_NEGATIVE_CURVATURE = 0.6
"""The most negative curvature, in units of the damping 1/T, at which a posterior stands for a window of reach T.

Along a curvature s the window responds by (1 - exp(-s T)) / s and the posterior by 1 / (s + 1/T): at s T = -0.6 that
is 1.8 times too much, at -0.75 already 2.7 times, and at -1 there is no posterior.
"""

# Fluctuations this much smaller than at n_beta = n keep the loss close to its quadratic form on ordinary
# networks. A pilot measures whether they do (the share of the even part), and changes n_beta if not.
DEFAULT_N_BETA_PER_SAMPLE = 10.0


@dataclass(frozen=True)
class LocalPosterior:
    """Which posterior is sampled at every checkpoint.

    Give either ``window``, the number of training steps whose influence is measured, or ``gamma``. With a
    window the localisation follows from the run,  gamma = n_beta / (learning_rate * W),  in the optimiser's
    metric: the local posterior then predicts what re-weighting data during W steps does to the losses.

    Attributes:
        window: length W of the training window, in steps.
        gamma: precision of the localisation, if set by hand.
        n_beta: inverse temperature times the number of samples; larger is closer to first order. Default:
            10 n, and with a window as much more as a pilot at each checkpoint finds necessary for that, or as
            much less as it takes for displacements not to be lost in rounding.
        metric: ``"euclidean"``, or ``"adam"``, which needs second moments in the checkpoints. Default: Adam's
            metric for Adam-trained runs with a window, Euclidean otherwise.
        centred: drop the gradient at the checkpoint, so that the posterior is centred there. Otherwise chains
            drift downhill to where training is going.
        parameters: regular expressions; trainable parameters that match one of them move, the others stay. A slice
            behind one chooses a part of a parameter, such as one attention head: ``"attn.out.weight[:, 16:32]"``.
        require_localised: do not sample where the curvature is more negative than the localisation can hold.

    Example:
        >>> import torch, stagewise as sw
        >>> x, y = torch.eye(4), torch.tensor([0.0, 0.0, 1.0, 1.0])
        >>> task = sw.Task(
        ...     torch.nn.Linear(4, 1),
        ...     lambda model, batch: (model(batch[0])[:, 0] - batch[1]) ** 2,
        ...     train=(x, y), queries={"same": (x, y)}, train_groups=list("aabb"),
        ... )
        >>> start = sw.Checkpoint(0, task.state(), sw.Optimizer("sgd", 0.1, batch_size=0))
        >>> density = sw.LocalPosterior(window=10).at(task, start)
        >>> density.n_beta, density.gamma
        (40.0, 40.0)
    """

    # a mistyped key in a config is an error
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    window: int | None = None
    gamma: float | None = None
    n_beta: float | None = None
    metric: Metric | None = None
    centred: bool = True
    parameters: tuple[str, ...] = (".*",)
    require_localised: bool = True

    def __post_init__(self) -> None:
        if (self.window is None) == (self.gamma is None):
            raise ValueError(f"give either window= or gamma=, got window={self.window} and gamma={self.gamma}")
        for name in ("window", "gamma", "n_beta"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.metric not in (None, "euclidean", "adam"):
            raise ValueError(f"metric must be 'euclidean' or 'adam', got {self.metric!r}")

    def metric_for(self, optimizer: Optimizer | None) -> Metric:
        """The metric as asked for, else Adam's for an Adam-trained run with a window, else Euclidean."""
        by_default = self.window is not None and optimizer is not None and optimizer.name == "adam"
        return self.metric or ("adam" if by_default else "euclidean")

    def at(self, task: Task, checkpoint: Checkpoint, *, curvature: bool = True) -> LocalDensity:
        """The posterior's numbers at one checkpoint.

        Args:
            task: the task.
            checkpoint: as it was recorded.
            curvature: check second derivatives too; only gradient products do without.

        Raises:
            ValueError: the checkpoint lacks what the window (optimiser) or the metric (second moments) needs.
        """
        return self.around(*at(task, checkpoint, names_of(self.parameters), curvature=curvature))

    def around(self, point: Point, checkpoint: Checkpoint) -> LocalDensity:
        """The same at a point, u being the parameters themselves, and the checkpoint under the model's own names."""
        task = point.task
        if task.pure.in_place and any("[" in pattern and ":" in pattern for pattern in self.parameters):
            raise ValueError(f"parameters {self.parameters}: of a sharded model parameters move whole, without slices")
        anchor = point.vector.flatten(point.state)
        n_beta = self.n_beta or DEFAULT_N_BETA_PER_SAMPLE * len(task.train)
        optimizer = checkpoint.optimizer
        metric = self.metric_for(optimizer)
        gamma = self._gamma(n_beta, checkpoint, point)
        # One copy of the parameters; and of a metric that is 1, no vector.
        state = {**point.state, **point.vector.unflatten(anchor)}
        checkpoint = checkpoint.holding(params={name: state[name] for name in checkpoint.params})
        scale = anchor.new_ones(()).expand_as(anchor)
        if metric == "adam":
            scale = adam_metric(point, checkpoint, self.window).sqrt().to(anchor)
        rates = relative_rates(point.vector, optimizer) if optimizer and self.window else None
        if rates is not None:
            scale = scale * rates.sqrt().to(anchor)
        if point.task.pure.still:
            scale = scale * _moving(point, anchor)
        if (chosen := moving(point, self.parameters, anchor)) is not None:
            scale = scale * chosen
        if not task.ranks.total((scale > 0).sum()):
            raise ValueError(
                f"at step {checkpoint.step} no parameter moves: no training sample has a gradient there, or every "
                "learning rate is 0"
            )
        return LocalDensity(
            point.task,
            point.vector,
            state,
            anchor=anchor,
            scale=scale,
            gamma=gamma,
            n_beta=n_beta,
            metric="adam, second moment estimated" if metric == "adam" and checkpoint.estimated else metric,
            posterior=self,
            checkpoint=checkpoint,
        )

    def _gamma(self, n_beta: float, checkpoint: Checkpoint, point: Point) -> float:
        optimizer = checkpoint.optimizer
        if self.window is None:
            return cast(float, self.gamma)
        if optimizer is None:
            raise ValueError(
                f"checkpoint at step {checkpoint.step} has no record of its optimiser, which window= needs; "
                "stagewise.Recorder records SGD, Adam and AdamW in their plain form. Without it set gamma= by hand"
            )
        if optimizer.learning_rate == 0:
            raise ValueError(
                f"the learning rate at step {checkpoint.step} is 0, as in front of a warm-up: no update follows that "
                "data could change; look at a later step"
            )
        reach = window_reach(self.window, optimizer, checkpoint.coming_rates)
        if reach == 0:
            raise ValueError(
                f"the learning rates of the {self.window} updates after step {checkpoint.step} are all 0: no update "
                "follows that data could change; look at an earlier step"
            )
        return n_beta / (reach * clip_factor(point, optimizer))


def _moving(point: Point, anchor: Tensor) -> Tensor:
    """1 along parameters that have a gradient, 0 along the rows of embeddings that have none by definition."""
    ones = {name: torch.ones(shape) for name, shape in zip(point.vector.names, point.vector.shapes, strict=True)}
    for name, row in point.task.pure.still.items():
        if name in ones:
            ones[name][row] = 0.0
    return point.vector.flatten(ones, like=anchor)


@dataclass(frozen=True, eq=False, kw_only=True)
class LocalDensity(Point):
    """A :class:`LocalPosterior` at one checkpoint, in whitened displacements ``u (parameters,)``.

    Attributes:
        anchor: the checkpoint w* ``(parameters,)``.
        scale: square root of the metric P ``(parameters,)``; 0 along parameters that do not move.
        gamma: precision of the localisation of ``u``.
        n_beta: inverse temperature times the number of samples.
        metric: name of the metric, and whether it rests on an estimate.
        posterior: the settings this came from.
        checkpoint: what is recorded of the run there, under the model's own names.
    """

    anchor: Tensor
    scale: Tensor
    gamma: float
    n_beta: float
    metric: str
    posterior: LocalPosterior
    checkpoint: Checkpoint

    @property
    def optimizer(self) -> Optimizer | None:
        """The run's update rule at the checkpoint, if recorded."""
        return self.checkpoint.optimizer

    @property
    def kappa(self) -> float:
        """Weight of one sample in the exponent, n_beta / n."""
        return self.n_beta / len(self.task.train)

    @property
    def damping(self) -> float:
        """Ratio gamma / n_beta: with a window, 1 / (learning rate x effective window)."""
        return self.gamma / self.n_beta

    @property
    def origin(self) -> Tensor:
        """The displacement 0, the checkpoint itself ``(parameters,)``."""
        return torch.zeros_like(self.anchor)


def window_reach(window: int, optimizer: Optimizer, coming: Sequence[float] = ()) -> float:
    """How far a constant gradient moves the weights in ``window`` steps, in the metric: learning rate x W.

    Momentum delays the response: W is replaced by  W - b/(1-b) (1 - b^W).  SGD's buffer also multiplies the
    step by 1/(1-b), Adam's first moment is an average and does not. With ``coming``, the run's own learning rates, it
    is the sum of the responses of all updates; after the last known rate that one is held.
    """
    if any(rate != optimizer.learning_rate for rate in coming[:window]):
        return next(islice(_reaches(optimizer, coming), window - 1, None))
    b = optimizer.betas[0] if optimizer.name == "adam" else optimizer.momentum
    effective = window - b / (1 - b) * (1 - b**window)
    rate = optimizer.learning_rate / (1 - b) if optimizer.name == "sgd" else optimizer.learning_rate
    return rate * effective


def _reaches(optimizer: Optimizer, coming: Sequence[float]) -> Iterator[float]:
    """The reach of windows of 1, 2, ... updates with the coming learning rates."""
    b = optimizer.betas[0] if optimizer.name == "adam" else optimizer.momentum
    moved = memory = 0.0
    for rate in chain(coming, repeat(coming[-1])):
        memory = b * memory + (1 - b if optimizer.name == "adam" else 1.0)
        moved += rate * memory
        yield moved


def learning_rates(window: int, optimizer: Optimizer, coming: Sequence[float] = ()) -> list[float]:
    """Of the updates of a window: those that are known, and after the last one that one, held."""
    return list(islice(chain(coming, repeat(coming[-1] if coming else optimizer.learning_rate)), window))


def window_response(
    curvatures: NDArray[np.float64], window: int, optimizer: Optimizer, coming: Sequence[float] = ()
) -> NDArray[np.float64]:
    """How far a constant gradient of 1 moves the weights in ``window`` steps along directions of these curvatures.

    The optimiser's own linear response in the whitened coordinates, with curvature and metric held: what
    1 / (curvature + damping) stands for in the posterior, and :func:`window_reach` where the curvature is 0.
    """
    b = optimizer.betas[0] if optimizer.name == "adam" else optimizer.momentum
    moved = memory = np.zeros_like(curvatures)
    for rate in learning_rates(window, optimizer, coming):
        slope = 1 - curvatures * moved
        memory = b * memory + ((1 - b) * slope if optimizer.name == "adam" else slope)
        moved = moved + rate * memory
    return moved


def size_range(
    damping: float, smallest: float, largest: float, window: int, optimizer: Optimizer, coming: Sequence[float] = ()
) -> tuple[float, float]:
    """Least and largest response of the window in units of the posterior's, over directions of the curvatures between.

    Predicted effects are off in size by such factors, whatever the noise of the chains: (0.9, 1.3) is usual for plain
    SGD; momentum overshoots along stiff directions, and (0.7, 1.0) is what negative curvature does.
    """
    curvatures = np.unique(np.concatenate([np.linspace(smallest, 0, 50), np.geomspace(1e-3, 1, 150) * max(largest, 0)]))
    reach = window_reach(window, optimizer, coming)
    # Clipping shortens the window of the posterior as it does the updates.
    clipped = 1 / (damping * reach)
    response = clipped * window_response(clipped * curvatures, window, optimizer, coming)
    ratio = response * (curvatures + damping)
    return float(ratio.min()), float(ratio.max())


def largest_window(curvature_min: float, optimizer: Optimizer, coming: Sequence[float] = ()) -> int:
    """The longest window, in steps up to a million, whose posterior can be used at this most negative curvature.

    0 if not even that of one step does. The curvature is that of the whitened Hessian; ``coming`` as for
    :func:`window_reach`.
    """
    most = MAX_NEGATIVE_CURVATURE
    if coming:
        fit = takewhile(
            lambda reach: -curvature_min * reach < most, islice(_reaches(optimizer, coming), LONGEST_WINDOW)
        )
        return sum(1 for _ in fit)
    exists, too_long = 0, LONGEST_WINDOW + 1
    while too_long - exists > 1:
        middle = (exists + too_long) // 2
        if -curvature_min * window_reach(middle, optimizer) < most:
            exists = middle
        else:
            too_long = middle
    return exists
