"""First order beside chains of tasks whose groups, or whose single members, are tokens."""

import numpy as np
import pytest
import springs

import stagewise as sw
from stagewise.run.analysis import Analysis
from stagewise.run.config import make_config
from stagewise.run.engine import sample
from stagewise.run.estimators import of_chains, sampled_samples
from stagewise.run.first_order import first_order
from stagewise.run.progress import silent


class Forgetful:
    """Keeps nothing."""

    def get(self, _name, _cause, compute):
        return compute()


@pytest.mark.parametrize("per", ["group", "token"])
def test_groups_and_single_tokens_are_completed(tmp_path, per):
    labels = np.array([["a", "b"]] * 6).tolist()
    task = springs.task(springs.by_token, train_groups=labels, query_groups={})
    asked = {"task": "t.py:t", "checkpoints": "c", "out": "o", "posterior": {"window": 3}, "per": per}
    config = make_config(
        asked | {"sampling": {"chains": 8, "draws": 32, "linear": True, "single_tokens": per == "token"}}
    )
    store = sample(task, springs.trajectory(), config.posterior, out=tmp_path, sampling=config.sampling)
    analysis = Analysis(task, springs.trajectory(), config, dict.fromkeys([0, 10, 20], "digest"), Forgetful(), silent)
    known = first_order(analysis, per)
    found = sw.bif(store, first_order=known) if per == "group" else of_chains(analysis, store)
    assert found.attrs["first_order_omitted"] == "{}"
    assert found.sizes["train"] == (2 if per == "group" else 12)
    samples = sampled_samples(analysis, store, [10], ["near", "far"])
    assert (samples.attrs["first_order"], samples.sizes["train"]) == (known.attrs["estimator"], 6)
    # Quadratic losses: what is beyond first order is even, and small.
    assert (abs(found["value"] - known["value"]) < 5 * found["stderr"] + 0.05 * abs(known["value"]).max()).all()
