"""The influence of single tokens of the samples that matter most, on springs whose coordinates are tokens."""

from functools import partial

import numpy as np
import pytest
import springs
import torch
import xarray as xr

from stagewise.groups import query_groups
from stagewise.retraining.window_influence import window_influence
from stagewise.run import estimators, exemplars
from stagewise.run.analysis import Analysis
from stagewise.run.config import make_config
from stagewise.run.preflight import miniature, preflight
from stagewise.run.progress import silent

WINDOW = 3
HOSTILE = ["</span><script>alert(1)</script>", '" onload="x']
TEXTS = [[f"x{k}", f"y{k}"] for k in range(5)] + [HOSTILE]
NEAR = ["near:first", "near:second"]


class Forgetful:
    """Keeps nothing."""

    def get(self, _name, _cause, compute):
        return compute()


def config():
    return make_config({"task": "t.py:task", "checkpoints": "c", "out": "o", "posterior": {"window": WINDOW}})


def task(**settings):
    return springs.task(springs.by_token, **{"train_texts": TEXTS, "train_groups": None} | settings)


def weighted(model, batch):
    """The second coordinate of samples to the left does not count."""
    losses = springs.by_token(model, batch)
    weights = torch.ones_like(losses)
    weights[:, 1] = (batch[0][:, 0] > 0).to(losses)
    return losses, weights


def of(this, estimate):
    run = springs.trajectory()
    return partial(estimate, Analysis(this, run, config(), dict.fromkeys(run.steps, "digest"), Forgetful(), silent))


def found(this, **options):
    steps = springs.trajectory().steps
    curves = xr.DataArray(np.arange(9.0).reshape(3, 1, 3), dims=("step", "train", "query"))
    curves = curves.assign_coords(step=list(steps), train=["a"], query=list(query_groups(this).labels))
    samples, tokens = of(this, estimators.exact_samples), of(this, estimators.exact_tokens)
    return exemplars.exemplars(this, samples, xr.Dataset({"value": curves}), 2, of_tokens=tokens, **options)


def test_tokens_of_picked_samples_are_those_that_all_candidates_have():
    picked = {0: [4, 1], 20: [2]}
    tokens = of(task(), estimators.exact_tokens)(picked, NEAR)
    whole = window_influence(task(), springs.trajectory(), window=WINDOW, per="token")
    for step, samples in picked.items():
        expected = [f"{k}/{t}" for k in sorted(samples) for t in range(2)]
        assert tokens[step]["train"].values.tolist() == expected
        assert tokens[step]["query"].values.tolist() == NEAR
        xr.testing.assert_allclose(tokens[step]["value"], whole["value"].sel(step=[step], train=expected, query=NEAR))


def test_samples_are_asked_about_the_queries_that_are_shown_alone_and_the_task_is_as_it_was():
    this = task()
    samples = of(this, estimators.exact_samples)([10], NEAR)
    expected = window_influence(this, springs.trajectory(), window=WINDOW, per="sample", steps=[10])
    xr.testing.assert_allclose(samples, expected.sel(query=NEAR))
    assert query_groups(this).labels == (*NEAR, "far")
    assert len(this.candidates) == 6


@pytest.mark.parametrize("loss", [springs.by_token, weighted])
def test_tokens_of_an_exemplar_add_up_to_it_and_carry_their_own_texts(loss):
    this = springs.task(loss, train_texts=TEXTS, train_groups=None)
    every = found(this)
    assert len(every) == 9
    for exemplar in every:
        for sample, value, texts, tokens in zip(
            exemplar.samples, exemplar.values, exemplar.texts, exemplar.token_values, strict=True
        ):
            uncounted = loss is weighted and springs.TRAIN[sample, 0] < 0
            assert texts == TEXTS[sample][: 1 if uncounted else 2]
            assert len(tokens) == len(texts)
            np.testing.assert_allclose(sum(tokens), value, rtol=2e-3, atol=1e-12)


def test_a_sample_without_label_is_called_by_its_text():
    names = {label for exemplar in found(task()) for label in exemplar.labels}
    assert "x0y0" in names
    assert names <= {"".join(row) for row in TEXTS}
    labelled = found(task(train_groups=list("ababab")))
    assert {label for exemplar in labelled for label in exemplar.labels} == {"a", "b"}


def test_without_texts_or_exact_influence_there_are_no_tokens():
    assert all(exemplar.token_values is None for exemplar in found(task(train_texts=None)))
    given = of(task(), estimators.exact_samples)
    curves = xr.Dataset({"value": (("step", "train", "query"), np.ones((1, 1, 1)))}, {"step": [0], "query": ["far"]})
    (exemplar,) = exemplars.exemplars(task(), given, curves, 2)
    assert exemplar.token_values is None


def test_of_a_long_sample_the_stretch_with_most_influence_is_kept_and_where_it_was_cut_is_seen():
    texts, length = [str(k) for k in range(1000)], exemplars.LONGEST
    values = dict.fromkeys(range(900), 0.0) | {500: -7.123456, 600: 1.0}
    words, numbers = exemplars._passage(texts, values)
    assert len(words) == len(numbers) == length + 2
    assert (words[0], words[-1]) == ("…", "…")
    assert numbers[words.index("500")] == -7.123
    assert numbers[words.index("600")] == 1
    assert np.isnan([numbers[0], numbers[-1]]).all()
    whole, _ = exemplars._passage(texts[:length], dict.fromkeys(range(length), 1.0))
    assert whole == texts[:length]


def test_tokens_before_the_last_that_counts_stay_in_their_text():
    words, numbers = exemplars._passage(["prompt", "answer", "<pad>"], {1: 2.0})
    assert words == ["prompt", "answer"]
    np.testing.assert_array_equal(numbers, [np.nan, 2.0])
    assert exemplars._passage(["<pad>"], {}) == ([], [])


def test_texts_that_are_not_those_of_the_losses_are_refused_before_the_work():
    exemplars.check_texts(task())
    exemplars.check_texts(task(train_texts=None))
    exemplars.check_texts(miniature(task()))
    shifted = [["first", *row] for row in TEXTS]
    with pytest.raises(
        ValueError, match=r"3 texts of sample 0, but the loss returns 2 losses .* no loss for the first"
    ):
        preflight(task(train_texts=shifted), springs.trajectory(), config(), [0])
    with pytest.raises(ValueError, match="2 texts of sample 0, but the loss returns one loss per sample"):
        exemplars.check_texts(springs.task(train_texts=TEXTS))


def test_texts_may_end_before_what_does_not_count():
    exemplars.check_texts(
        springs.task(weighted, train_texts=[row[: 2 if k in (0, 2, 4) else 1] for k, row in enumerate(TEXTS)])
    )
