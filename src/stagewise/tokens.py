"""Do tokens fit the language model, and do their losses stay in their places.

A model from Hugging Face says how many tokens it knows and how long a context it was made for. A token beyond the first
ends in an error without a name (on a GPU, of the whole process); rotary positions beyond the second go on without a
word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from stagewise.data import Batch, Samples
from stagewise.labels import NONE
from stagewise.losses import IGNORED, causal_lm
from stagewise.plain import plain_losses
from stagewise.task import Losses, Params, Task

_ALIKE = 1e-2


def check_tokens(task: Task, data: Samples) -> None:
    """Refuse tokens that the model does not know, and sequences longer than it was made for. Nothing is evaluated.

    Looked at are batches that are tokens or a mapping with ``input_ids``, of a model from Hugging Face.

    Raises:
        ValueError: the first sample whose tokens do not fit.
    """
    embedding, context = _vocabulary(task.model), _context(task.model)
    if embedding is None:
        return
    causal = task.loss is causal_lm
    shortest = 2 if causal else 1
    # Another loss may give the model all tokens but the last, which is a target only.
    longest = context if context is None or causal else context + 1
    for first, batch in _batches(data, task.forward_batch):
        tokens, labels = _tokens(batch)
        if tokens is None:
            continue
        width = tokens.shape[1]
        if width < shortest:
            raise ValueError(
                f"{data.name}: sample {first} is of length {width}, too short for a loss (causal_lm predicts all "
                "tokens but the first); leave it out"
            )
        if longest is not None and width > longest:
            raise ValueError(
                f"{data.name}: sample {first} has {width} tokens, but the model was made for contexts of {context} "
                "(model.config.max_position_embeddings); cut the sequences, or set that number if the run was trained "
                "on longer ones"
            )
        _check_known(data, first, tokens, embedding.num_embeddings)
        if labels is not None and causal:
            _check_known(data, first, torch.where(labels == IGNORED, 0, labels), embedding.num_embeddings, "label")


def check_places(task: Task, data: Samples, query: str | None, params: Params) -> None:
    """Refuse losses of tokens that move when a longer sample is in the batch, as with padding on the left.

    Labels, texts and results name a token by its place among the losses of its sample.

    Raises:
        ValueError: the losses of the shortest or the longest sample, alone and together, are not in the same places.
    """
    rows = torch.stack([data.sizes.argmin(), data.sizes.argmax()])
    if data.sizes.min() == data.sizes.max():
        return
    model = task.pure.reference(params)
    together = plain_losses(task, model, data, query, data.batch(rows, task.device))
    if together.values.ndim == 1:
        return
    for place, row in enumerate(rows):
        alone = plain_losses(task, model, data, query, data.batch(row[None], task.device))
        if alone.weights is None and alone.values.shape[1] != together.values.shape[1]:
            raise ValueError(
                f"{data.name}: sample {int(row)} has {alone.values.shape[1]} losses alone and "
                f"{together.values.shape[1]} beside a longer one; return a pair of losses and weights, 0 for padding"
            )
        if not _in_place(alone, together, place):
            raise ValueError(
                f"{data.name}: beside a longer sample, the tokens of sample {int(row)} have their losses in other "
                "places, as with padding on the left, and could not be told by them; pad on the right "
                "(tokenizer.padding_side = 'right'), or all samples to one length"
            )


def check_classes(task: Task) -> None:
    """Refuse classes of tokens of which none counts: they would have no influence, or be missing from the results.

    Raises:
        ValueError: a label that only padding and ignored tokens have.
    """
    sets: list[tuple[str | None, Samples]] = [(None, task.candidate_samples), *task.queries.items()]
    for query, data in sets:
        labels = task.label_sets["train" if query is None else f"queries/{query}"]
        if labels is None or labels.ndim == 1:
            continue
        missing, row = set(np.unique(labels).tolist()) - {NONE}, 0
        for batch in data.batches(task.forward_batch, task.device):
            with torch.no_grad():
                counted = task.shares(task.weighted_losses(task.state(), batch, query)).cpu().numpy() > 0
            part = labels[row : row + len(counted), : counted.shape[-1]]
            if counted.ndim == 2:  # else the labels are refused where they are used
                missing -= set(part[counted[:, : part.shape[1]]].tolist())
            row += len(counted)
            if not missing or counted.ndim == 1:
                break
        else:
            argument = "train_groups" if query is None else f"query_groups[{query!r}]"
            raise ValueError(
                f"{argument}: no token with the label {min(missing)!r} counts in the loss (its weights there are 0: "
                "padding, a prompt, ignored labels); is every label at the place of its token's own loss? If so, give "
                "these tokens the label None"
            )


def _in_place(alone: Losses, together: Losses, place: int) -> bool:
    """Whether a sample's losses that count are the first ones of its row, as they are alone."""
    values, weights = (part[place] for part in _weighted(together))
    own_values, own_weights = (part[0] for part in _weighted(alone))
    width = len(own_values)
    if len(values) < width or weights[width:].any() or not torch.equal(weights[:width] > 0, own_weights > 0):
        return False
    return bool((values[:width] - own_values).norm() <= _ALIKE * own_values.norm() + 1e-6)


def _weighted(losses: Losses) -> tuple[Tensor, Tensor]:
    values, weights = losses
    return values, torch.ones_like(values) if weights is None else weights


def _check_known(data: Samples, first: int, tokens: Tensor, known: int, what: str = "token") -> None:
    unknown = (tokens < 0) | (tokens >= known)
    if unknown.any():
        row = int(unknown.any(1).nonzero()[0])
        number = int(tokens[row][unknown[row]][0])
        raise ValueError(
            f"{data.name}: sample {first + row} has the {what} {number}, but the model knows tokens from 0 to "
            f"{known - 1}; use the model's own tokenizer, and model.resize_token_embeddings(len(tokenizer)) if tokens "
            "were added to it"
        )


def _batches(data: Samples, size: int) -> Iterator[tuple[int, Batch]]:
    """Each with its first sample; one by one where they may differ in length."""
    size = size if data.collate is None else 1
    return ((row, data.batch(slice(row, row + size))) for row in range(0, len(data), size))


def _tokens(batch: Batch) -> tuple[Tensor | None, Tensor | None]:
    """The tokens of a batch and their labels ``(batch, tokens)``, where that is what it holds."""
    given = [batch.get("input_ids"), batch.get("labels")] if isinstance(batch, Mapping) else [batch, None]
    tokens, labels = (part if isinstance(part, Tensor) and part.ndim == 2 else None for part in given)
    return tokens, labels


def _vocabulary(model: nn.Module) -> nn.Embedding | None:
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return embedding if isinstance(embedding, nn.Embedding) else None


def _context(model: nn.Module) -> int | None:
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None
