"""Score folders of dattri-llm (TRAIS-Lab), as ``AttributionScore.save`` of version 0.1 writes them.

    scores.pt      a tensor (row, query), torch.save
    metadata.json  row_train_ids, row_steps, test_ids, algorithm; row_token_ids where rows are tokens

A row is what one training sample did at one training step, so a sample's score is a sum of rows. Samples go by the hash
of their content and stand in no order that could be relied on; those that are the same share their score evenly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stagewise.foreign.scores import Scores, read_json, read_tensor

METADATA, SCORES = "metadata.json", "scores.pt"


def read_dattri(
    folder: Path, train_ids: Sequence[str] | None, query_ids: Sequence[str] | None, trained: range | None
) -> Scores:
    """The scores in a folder of dattri-llm's, summed over training steps (and tokens) of every sample.

    Args:
        folder: that holds ``scores.pt`` and ``metadata.json``.
        train_ids: ``hash_sample`` of every training sample, in their order.
        query_ids: the same of the queries.
        trained: sum over these training steps only; a sample that was in no batch of theirs has 0.

    Raises:
        ValueError: it is not in this format, ids are not given or not among the folder's, or no row is of ``trained``.
    """
    metadata = read_json(folder / METADATA)
    table = read_tensor(folder / SCORES)
    try:
        of_train, of_query = metadata["row_train_ids"], metadata["test_ids"]
        steps = np.array(metadata["row_steps"], int)
        algorithm = str(metadata["algorithm"])
        expected = (len(of_train), len(of_query))
        if not all(isinstance(name, str) for name in [*of_train, *of_query]):
            raise TypeError("ids that are no texts")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / METADATA} cannot be read as that of dattri-llm ({type(error).__name__}: {error})"
        ) from error
    if table.shape != expected or steps.shape != expected[:1]:
        raise ValueError(
            f"{folder / SCORES}: expected shape {expected}, as {METADATA} says, got {tuple(table.shape)}; copy it again"
        )
    if train_ids is None or query_ids is None:
        raise ValueError(
            f"{folder} names samples by the hash of their content; give train_ids and query_ids, in the order of this "
            "run's samples: [dattri_llm.utils.hashing.hash_sample(sample) for sample in data]"
        )
    rows, columns = _places(train_ids, of_train, "train_ids"), _places(query_ids, of_query, "query_ids")
    kept = np.ones(len(steps), bool) if trained is None else np.isin(steps, np.array(trained))
    if trained is not None and not kept.any():
        raise ValueError(
            f"{folder} has no row of training steps {trained.start} to {trained.stop - 1}; it has some of "
            f"{steps.min()} to {steps.max()}"
        )
    first, copies = _first(of_train), Counter(train_ids)
    sums = np.zeros(expected)  # of all rows of a sample, in the place of its first
    np.add.at(sums, np.array([first[name] for name in of_train])[kept], table.double().numpy()[kept])
    shared = sums[rows] / np.array([copies[name] for name in train_ids])[:, None]
    about = {"tool": f"dattri-llm, {algorithm}", "of training steps": f"{steps[kept].min()} to {steps[kept].max()}"}
    return Scores(shared[:, columns], None, "positive", about)


def _first(names: Sequence[str]) -> dict[str, int]:
    """The place where each name stands first."""
    return {name: place for place, name in reversed([*enumerate(names)])}


def _places(wanted: Sequence[str], there: Sequence[str], called: str) -> list[int]:
    """Where each id first stands among those of the folder.

    Raises:
        ValueError: some are not there.
    """
    first = _first(there)
    if missing := [name for name in wanted if name not in first]:
        raise ValueError(
            f"{called}: {len(missing)} of {len(wanted)} are not in the folder, which has {len(first)}, the first of "
            f"them {missing[0]!r}; is it of the same data and tokenizer?"
        )
    return [first[name] for name in wanted]
