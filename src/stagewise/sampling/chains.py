"""Run a block of chains at one checkpoint and collect what they see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from math import isfinite
from typing import Any, ClassVar, Literal, cast, get_args

import numpy as np
import xarray as xr

from stagewise.checkpoint import Checkpoint
from stagewise.memory import release
from stagewise.sampling.drawing import Drawing, Underway
from stagewise.sampling.posterior import LocalDensity, LocalPosterior, largest_window, size_range
from stagewise.sampling.tuning import LANGEVIN, SamplerName, Tuning, tune
from stagewise.sampling.watch import DRAWN, Seen
from stagewise.stacking import BatchingChoice
from stagewise.task import Task

FIRST_DRAWS = 64
"""Draws of each chain after which ``draws="auto"`` looks for the first time whether they are enough."""


@dataclass(frozen=True)
class Chains:
    """How the posterior is sampled at every checkpoint.

    Attributes:
        sampler: ``"underdamped"``, ``"sgld"`` or ``"rmsprop_sgld"``, of the local posterior; ``"window"``: independent
            draws from the Gaussian whose covariance is the optimiser's own response to a held gradient during the
            window, at the curvature of the checkpoint, of either sign. Nothing of chains applies to these, and no
            checkpoint need be localised; a draw costs ten curvature products or a few dozen.
        chains: chains in a block; they run together.
        blocks: blocks per checkpoint.
        draws: draws kept of each chain. ``"auto"``: 64, and twice as many until the chains agree and the standard error
            of the influence between groups, root mean square over the pairs, is at most ``precision`` of its size; as
            many at every checkpoint as it needs.
        precision: what ``draws="auto"`` stops at.
        most_draws: what it stops at in any case; the report says where that was.
        step_size: of the sampler; default from the curvature at the checkpoint.
        options: other fields of the sampler, e.g. ``{"start": 1}`` for RMSprop's V, or ``{"friction": 5.0}``.
        burn_in: steps before the first draw; default five relaxation times.
        thinning: steps per draw; default half a relaxation time.
        batch_size: samples per gradient; default the whole training set. Steps are made so short that the noise of
            minibatches adds 1 % to the variances at most; where the whole training set costs less, it is used.
        control_variate: subtract each minibatch's gradient at the checkpoint.
        reflect: also record losses at the reflected point 2w* - w, for odd and even parts.
        linear: also record the losses to first order in the displacement, for ``bif(first_order=)``: along the draws of
            ``sampler="window"``; else along chains of the quadratic form of the posterior that move by the same noise
            and minibatches, at about the price of the chains themselves.
        single_tokens: record the losses of single tokens where these have labels; by default only their means over the
            tokens of a sample that have one label.
        batching: stack the chains or loop over them; ``"auto"`` stacks small models that allow it.
        seed: of the noise and the minibatches. Checkpoints share it, so that their differences are less
            noisy.

    Example:
        >>> import torch, stagewise as sw
        >>> x, y = torch.eye(4), torch.tensor([0.0, 0.0, 1.0, 1.0])
        >>> task = sw.Task(
        ...     torch.nn.Linear(4, 1),
        ...     lambda model, batch: (model(batch[0])[:, 0] - batch[1]) ** 2,
        ...     train=(x, y), queries={"same": (x, y)}, train_groups=list("aabb"),
        ... )
        >>> start = sw.Checkpoint(0, task.state(), sw.Optimizer("sgd", 0.1, batch_size=0))
        >>> from stagewise.sampling.chains import sample_block
        >>> tree = sample_block(task, start, sw.LocalPosterior(window=10), sw.Chains(chains=4, draws=8, sampler="sgld"))
        >>> dict(tree["train"].sizes)
        {'chain': 4, 'draw': 8, 'sample': 4}
    """

    # a mistyped key in a config is an error
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    sampler: SamplerName = "underdamped"
    chains: int = 16
    blocks: int = 1
    draws: int | Literal["auto"] = 64
    precision: float = 0.1
    most_draws: int = 1024
    step_size: float | None = None
    options: dict[str, float] = field(default_factory=dict)
    burn_in: int | None = None
    thinning: int | None = None
    batch_size: int | None = None
    control_variate: bool = True
    reflect: bool = True
    linear: bool = False
    single_tokens: bool = False
    batching: BatchingChoice = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sampler not in (names := get_args(SamplerName)):
            raise ValueError(f"sampler must be one of {sorted(names)}, got {self.sampler!r}")
        if self.batching not in (names := get_args(BatchingChoice)):
            raise ValueError(f"batching must be one of {sorted(names)}, got {self.batching!r}")
        if isinstance(self.draws, str) and self.draws != "auto":
            raise ValueError(f"draws must be a number or 'auto', got {self.draws!r}")
        for name in ("chains", "blocks", "draws", "precision", "most_draws", "step_size", "thinning", "batch_size"):
            value = getattr(self, name)
            if value not in (None, "auto") and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.draws == "auto" and self.blocks > 1:
            raise ValueError(
                f"draws='auto' makes chains longer instead of adding blocks; leave out blocks={self.blocks}"
            )
        own = fields(cast(Any, LANGEVIN[self.sampler])) if self.sampler in LANGEVIN else ()
        valid = [f.name for f in own if f.name != "step_size"]
        if unknown := sorted(set(self.options) - set(valid)):
            raise ValueError(f"options {unknown} are not of sampler {self.sampler!r}, which has {valid}")
        if self.burn_in is not None and self.burn_in < 0:
            raise ValueError(f"burn_in must not be negative, got {self.burn_in}")
        if self.burn_in == 0 and self.sampler == "rmsprop_sgld":
            raise ValueError("rmsprop_sgld adapts in the first half of burn_in, and with burn_in=0 never; use 'sgld'")
        if self.linear and self.sampler == "rmsprop_sgld":
            raise ValueError("linear=True needs chains whose law is known; rmsprop_sgld adapts, use 'underdamped'")
        if self.linear and self.batch_size and not self.control_variate:
            raise ValueError("linear=True needs chains that share their minibatches; leave out control_variate=False")
        given = [n for n in ("step_size", "burn_in", "thinning", "batch_size") if getattr(self, n) is not None]
        if self.sampler == "window" and given:
            raise ValueError(f"sampler='window' draws independently, and has no {', '.join(given)}; leave that out")

    @property
    def looks(self) -> list[int]:
        """Draws of each chain after which it is asked whether they are enough; the last are so in any case."""
        if self.draws != "auto":
            return [self.draws]
        doublings = (FIRST_DRAWS << k for k in range(self.most_draws.bit_length()))
        return [*(draws for draws in doublings if draws < self.most_draws), self.most_draws]


def sample_block(
    task: Task,
    checkpoint: Checkpoint,
    posterior: LocalPosterior,
    sampling: Chains,
    block: int = 0,
    on_step: Callable[[int, int], object] | None = None,
    underway: Underway | None = None,
    error: Callable[[xr.DataTree], float] | None = None,
) -> xr.DataTree:
    """One cell of work: a block of chains at one checkpoint.

    Args:
        task: the task.
        checkpoint: where.
        posterior: what is sampled.
        sampling: how.
        block: which block; it seeds the noise together with ``sampling.seed``.
        on_step: called after every sampler step with (steps done, steps in all, as far as is known).
        underway: where the chains are kept meanwhile, to go on from when the process was killed.
        error: relative error of the draws so far, for ``draws="auto"``, which goes on while it is above
            ``sampling.precision``: see :func:`stagewise.influence.precision.relative_error`.

    Returns:
        Groups ``train`` (the candidates, by their number in the training set) and ``queries/<name>`` with
        ``loss (chain, draw, sample[, token])`` in nats, the same at the reflected points (``loss_reflected``), to
        first order (``loss_linear``) and at the checkpoint (``loss_anchor``), the ``share`` of every loss in the mean
        over its data set (in the training objective), and the attributes ``is_training_set``, true of a query set whose
        samples are the candidates, and ``own_loss``, true of one on which something else than the training loss is
        measured; group ``chains`` with
        the ``status`` of every chain, and its ``soft_spread``, the mean square displacement along the softest
        direction in units of the variance that the curvature at the checkpoint gives it; attributes with every
        number that was chosen. Where all of them are given by hand and the posterior need not be localised, the
        curvature is not looked at: ``localised``, the curvatures and what follows from them are None. A chain that
        left the posterior is ``"diverged"``, and its later draws are the losses at the checkpoint. Where the posterior
        does not exist nothing is drawn and every chain's status is ``"not_localised"``; where the updates of a window
        run away, which ``sampler="window"`` asks about, it is ``"unusable"``, and an attribute says why.

    Raises:
        ValueError: the losses are unusable (see ``Task.check``), the checkpoint lacks what the posterior
            needs, the sampler needs another posterior, or ``draws="auto"`` has no ``error`` to go by.
    """
    if sampling.draws == "auto" and error is None:
        raise ValueError("draws='auto' needs to know the error of the draws so far: pass error=")
    density = posterior.at(task, checkpoint)
    del checkpoint  # the density has its own; this copy is free unless the caller keeps it
    return draw_block(density, sampling, block, on_step, underway, error)


def draw_block(
    density: LocalDensity,
    sampling: Chains,
    block: int = 0,
    on_step: Callable[[int, int], object] | None = None,
    underway: Underway | None = None,
    error: Callable[[xr.DataTree], float] | None = None,
) -> xr.DataTree:
    """As :func:`sample_block`, of a posterior whose numbers at the checkpoint are known."""
    task, posterior, tuning = density.task, density.posterior, tune(density, sampling)
    facts = _facts(tuning, sampling)
    numbers = np.arange(block * sampling.chains, (block + 1) * sampling.chains)
    if tuning.localised is False and posterior.require_localised:
        status = np.full(sampling.chains, "not_localised")
        return _tree({}, status, numbers, facts)
    if tuning.refused:
        return _tree({}, np.full(sampling.chains, "unusable"), numbers, facts | {"unusable": tuning.refused})
    drawing = Drawing(tuning, sampling, block, underway.load() if underway else None)
    for draws in sampling.looks:
        steps = tuning.burn_in + draws * tuning.thinning
        if drawing.done > steps:  # a killed process has looked there
            continue
        while drawing.done < steps:
            drawing.step()
            if on_step is not None:
                on_step(drawing.done, steps)
            if underway is not None:
                underway.keep(drawing.state)
        tree = _seen(drawing, task, numbers, facts)
        if error is None or sampling.draws != "auto":
            break
        reached = error(tree)
        tree.attrs |= {"precision": sampling.precision, "relative_error": reached if isfinite(reached) else None}
        if not reached > sampling.precision or draws == sampling.looks[-1]:
            break
        release(tree)
    return tree


def unusable_block(step: int, reason: str, sampling: Chains, block: int = 0) -> xr.DataTree:
    """The cell of a checkpoint at which the posterior cannot be defined: no draws, and the reason why."""
    numbers = np.arange(block * sampling.chains, (block + 1) * sampling.chains)
    return _tree({}, np.full(sampling.chains, "unusable"), numbers, {"step": step, "unusable": reason})


def _seen(drawing: Drawing, task: Task, numbers: np.ndarray[Any, Any], facts: dict[str, Any]) -> xr.DataTree:
    """All that the chains saw so far."""
    traces = drawing.traces()
    tree = _tree(traces, drawing.status(), numbers, dict(facts), drawing.soft_spread(), task.candidates.numpy())
    # An effect of a sample on itself is known by its position: the same samples in the same order.
    for name, data in task.queries.items():
        if f"queries/{name}" in traces:
            same = data.digest == task.candidate_samples.digest
            tree[f"queries/{name}"].attrs |= {"is_training_set": same, "own_loss": name in task.query_losses}
    return tree


def _tree(
    traces: dict[str, Seen],
    status: np.ndarray[Any, Any],
    numbers: np.ndarray[Any, Any],
    facts: dict[str, Any],
    soft_spread: np.ndarray[Any, Any] | None = None,
    candidates: np.ndarray[Any, Any] | None = None,
) -> xr.DataTree:
    spread = np.full(len(numbers), np.nan) if soft_spread is None else soft_spread
    chains = {"status": ("chain", status.astype(str)), "soft_spread": ("chain", spread)}
    tree = {"chains": xr.Dataset(chains, {"chain": numbers})}
    for name, seen in traces.items():
        data = ("sample", "token")[: seen.loss_anchor.ndim]
        variables = {
            key: ((*(("chain", "draw") if key in DRAWN else ()), *data), value.numpy())
            for key, value in seen._asdict().items()
            if value is not None
        }
        coords = {"chain": numbers} | ({"sample": candidates} if name == "train" else {})
        tree[name] = xr.Dataset(variables, coords)
        for key in set(variables) - {"share", "tokens"}:
            tree[name][key].attrs["units"] = "nats"
    result = xr.DataTree.from_dict(tree)
    result.attrs = facts
    return result


def _facts(tuning: Tuning, sampling: Chains) -> dict[str, Any]:
    density, curvature = tuning.density, tuning.curvature
    optimizer, window, coming = density.optimizer, density.posterior.window, density.checkpoint.coming_rates
    largest = low = high = None
    if optimizer and window and curvature and tuning.localised is not None:  # of a posterior
        largest = largest_window(curvature.smallest, optimizer, coming)
        low, high = size_range(density.damping, curvature.smallest, curvature.largest, window, optimizer, coming)
    return {
        "step": density.checkpoint.step,
        "n_beta": density.n_beta,
        "n_beta_raised": tuning.n_beta_raised,
        "gamma": density.gamma,
        "kappa": density.kappa,
        "metric": density.metric,
        "centred": density.posterior.centred,
        "window": window,
        "learning_rate": optimizer.learning_rate if optimizer else None,
        "sampler": sampling.sampler,
        "step_size": tuning.sampler.step_size,
        "burn_in": tuning.burn_in,
        "thinning": tuning.thinning,
        "batch_size": tuning.batch_size,
        "heat": tuning.heat,
        "stable_step": tuning.stable_step,
        "relaxation": tuning.relaxation,
        "curvature_min": curvature.smallest if curvature else None,
        "curvature_max": curvature.largest if curvature else None,
        "damping": density.damping,
        "localised": tuning.localised,
        "largest_window": largest,
        "size_low": low,
        "size_high": high,
    }
