"""What the chains see: the losses of the candidates and of every query set at every draw."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import vmap
from torch.nn.functional import pad

from stagewise.content import content_digest
from stagewise.data import Batch, Samples
from stagewise.derivatives import directional_derivatives
from stagewise.evaluate import Batching, sample_weights
from stagewise.labels import TokenClasses
from stagewise.sampling.draws import Draws
from stagewise.sampling.posterior import LocalDensity
from stagewise.task import Losses, Params

DRAWN = ("loss", "loss_reflected", "loss_linear")
"""Fields of :class:`Seen` that are of every draw."""


class Seen(NamedTuple):
    """One data set as the chains have seen it.

    Where tokens have labels, what stands for a token is the mean over all tokens of a sample that have one label, in
    the order of :func:`stagewise.labels.token_classes`.

    Attributes:
        loss: ``(chain, draw, sample[, token])``, float64, as ``loss_anchor`` plus its change in float32.
        loss_reflected: the same at the reflected points, or None.
        loss_linear: the same to first order in the displacement, along the draws or coupled chains; or None.
        loss_anchor: at the checkpoint ``(sample[, token])``, float64.
        share: of every loss in the mean over the data set ``(sample[, token])``, float64: in the training objective for
            candidates. 0 where the loss has no weight, and where a shorter sample is padded.
        tokens: how many tokens with weight a mean is over ``(sample, token)``; None where each stands for itself.
    """

    loss: Tensor
    loss_reflected: Tensor | None
    loss_linear: Tensor | None
    loss_anchor: Tensor
    share: Tensor
    tokens: Tensor | None


class Watch:
    """Evaluates and keeps the losses of the candidates and of every query set.

    Args:
        density: whose losses, in which coordinates.
        batching: stack the chains, or loop over them.
        reflect: also evaluate at the reflected points.
        single_tokens: keep the losses of single tokens, also of those that have labels.
        linear: also keep the losses to first order.
        looks: numbers of draws up to which room is made at a time.
    """

    def __init__(
        self,
        density: LocalDensity,
        batching: Batching,
        reflect: bool,
        single_tokens: bool = False,
        linear: bool = False,
        looks: Sequence[int] = (),
    ) -> None:
        self._density, self._batching = density, batching
        task = density.task
        sets = {"train": (task.candidate_samples, None)} | {
            f"queries/{name}": (data, name) for name, data in task.queries.items()
        }
        labels = {
            name: of_set if of_set is not None and of_set.ndim == 2 and not single_tokens else None
            for name, of_set in task.label_sets.items()
        }
        # Equal data have equal losses: a query set that is the training set is evaluated once.
        self._key = {
            name: f"{data.digest}/{query if query in task.query_losses else ''}/{content_digest(labels[name])}"
            for name, (data, query) in sets.items()
        }
        self._sets = {self._key[name]: _Set(density, data, query, labels[name]) for name, (data, query) in sets.items()}
        self._signs, self._linear = (1.0, -1.0) if reflect else (1.0,), linear
        self._draws = {key: Draws(looks) for key in self._sets}

    def draw(self, u: Tensor | Sequence[Tensor], coupled: Tensor | Sequence[Tensor] | None = None) -> Tensor:
        """Record the losses at ``u (chain, parameters)``; returns whether they are finite ``(chain,)``.

        ``coupled``: where they are recorded to first order, default ``u``.
        """
        finite = torch.ones(len(u), dtype=torch.bool, device=u[0].device)
        places: Tensor | Sequence[Tensor] = _Mirrored(u, self._signs)
        if self._batching == "stacked" and isinstance(u, Tensor):
            places = torch.cat([sign * u for sign in self._signs])
        for (key, data), values in zip(self._sets.items(), self._losses(places), strict=True):
            losses = data.kept(values.double())
            change = (losses - data.anchor.to(losses.device)).float()
            finite &= torch.isfinite(change).flatten(1).all(1).reshape(len(self._signs), -1).all(0)
            seen = change.cpu().reshape(len(self._signs), len(u), *change.shape[1:])
            if self._linear:
                along = data.kept(data.linear(u if coupled is None else coupled)).float().cpu()
                seen = torch.cat([seen, along[None]])
            self._draws[key].add(seen)
        return finite

    @torch.no_grad()
    def _losses(self, places: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """Of every set ``(place, sample[, token])``."""
        if self._batching == "stacked" and isinstance(places, Tensor) and len(places) > 1:
            return list(vmap(self._at)(places))
        return [torch.stack(of_places) for of_places in zip(*map(self._at, places), strict=True)]

    def _at(self, u: Tensor) -> tuple[Tensor, ...]:
        """Losses of every set at one place, whose parameters are made once: for large models that is work."""
        params = self._density.params(u)
        return tuple(data.losses(params) for data in self._sets.values())

    def state(self) -> dict[str, Tensor]:
        """All draws of every set so far."""
        return {key: draws.state() for key, draws in self._draws.items()}

    def go_on(self, kept: dict[str, Tensor]) -> None:
        """Take up what :meth:`state` gave."""
        for key, draws in self._draws.items():
            draws.go_on(kept[key])

    def traces(self) -> dict[str, Seen]:
        """All that was recorded, by data set."""
        seen = {}
        for key, data in self._sets.items():
            kind = partial(self._draws[key].kind, anchor=data.anchor.cpu())  # of draws (sign or linear, chain, ...)
            reflected, linear = kind(1) if len(self._signs) > 1 else None, kind(-1) if self._linear else None
            seen[key] = Seen(kind(0), reflected, linear, data.anchor.cpu(), data.share.cpu(), data.tokens)
        total = float(sample_weights(self._density).sum())
        return {
            name: seen[key]._replace(share=seen[key].share / (total if name == "train" else seen[key].share.sum()))
            for name, key in self._key.items()
        }


class _Mirrored(Sequence[Tensor]):
    """Rows and their reflections, made when they are asked for: of large models every copy counts."""

    def __init__(self, rows: Tensor | Sequence[Tensor], signs: Sequence[float]) -> None:
        self._rows, self._signs = rows, signs

    def __len__(self) -> int:
        return len(self._signs) * len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        sign, row = divmod(index, len(self._rows))
        if sign >= len(self._signs):
            raise IndexError(index)
        return self._rows[row] if self._signs[sign] == 1 else self._signs[sign] * self._rows[row]


class _Set:
    """A data set in batches on the device, with its losses at the checkpoint."""

    def __init__(
        self, density: LocalDensity, data: Samples, query: str | None, labels: NDArray[np.str_] | None
    ) -> None:
        self._density, self._data, self._query, self._ranks = density, data, query, density.task.ranks
        parts = self._ranks.parts(torch.arange(len(data)), density.task.forward_batch)
        self._batches: list[Batch] = [data.batch(part, density.task.device) for part, _ in parts]
        with torch.no_grad():
            params = density.params(density.origin)
            first = [self._evaluated(params, batch) for batch in self._batches]
        del params  # of large models every copy counts
        widest = max(losses.values.shape[1] if losses.values.ndim == 2 else 0 for losses in first)
        self._width = self._ranks.most(widest)
        # float64 before anything is subtracted: losses may be large beside their fluctuations.
        anchor = self._joined([losses.values for losses in first]).double()
        shares = self._joined([density.task.shares(losses) for losses in first]).double()
        self._classes = None if labels is None else TokenClasses.of(labels, shares)
        self.anchor = self.kept(anchor)
        self.share = shares if self._classes is None else self._classes.total
        self.tokens = None if self._classes is None else self._classes.sums((shares > 0).double()).cpu()

    def losses(self, params: Params) -> Tensor:
        """At one place: ``(sample[, token])``."""
        return self._joined([self._evaluated(params, batch).values for batch in self._batches])

    def linear(self, places: Tensor | Sequence[Tensor]) -> Tensor:
        """Change to first order at every place ``(place, sample[, token])``, float64."""
        groups = [places] if isinstance(places, Tensor) else [place[None] for place in places]
        of_set = (self._density, self._density.origin)
        along = [directional_derivatives(*of_set, u, self._data, self._query, self._width)[0] for u in groups]
        changes = torch.cat(along).to(self.anchor.device)
        return changes.reshape(len(places), -1, self._width) if self._width else changes

    def kept(self, losses: Tensor) -> Tensor:
        """What is recorded of losses ``(..., sample[, token])``: where tokens have labels, their means."""
        return losses if self._classes is None else self._classes.means(losses)

    def _evaluated(self, params: Params, batch: Batch) -> Losses:
        return self._density.task.weighted_losses(params, batch, self._query)

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Of all samples, from those of this process's batches."""
        return self._ranks.joined([self._padded(part) for part in parts], len(self._data))

    def _padded(self, values: Tensor) -> Tensor:
        """Losses of tokens as wide as those of the longest sample."""
        return pad(values, (0, self._width - values.shape[-1])) if self._width else values
