"""Bayesian influence by independent draws of a window's own Gaussian: that of its response, and the same each time."""

import numpy as np
import pytest
import xarray as xr
from small_networks import Problem

from stagewise.influence.bif import bif
from stagewise.influence.response import response_influence
from stagewise.influence.trusted import TracesInMemory
from stagewise.run.engine import sample
from stagewise.sampling.chains import Chains, sample_block
from stagewise.sampling.posterior import LocalPosterior

BY_SAMPLE = {"query_groups": {"val": range(4)}}
BLOCKS = 40
SMALL = Chains("window", chains=4, draws=8)


def cut(tree):
    """Blocks of 16 chains."""
    for block in range(BLOCKS):
        chains = slice(16 * block, 16 * (block + 1))
        groups = {node.path: node.to_dataset().isel(chain=chains, missing_dims="ignore") for node in tree.subtree}
        yield xr.DataTree.from_dict(groups)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_intervals_hold_the_response(optimizer):
    """On a network whose loss curves downwards along some directions; n_beta leaves only first order."""
    problem = Problem(optimizer=optimizer, rate=0.1, step=5, **BY_SAMPLE)
    posterior = LocalPosterior(window=20, n_beta=1e6)
    exact = response_influence(problem.task, problem.trajectory, posterior, at="checkpoint")["value"].values
    sampling = Chains("window", chains=16 * BLOCKS, draws=24, reflect=False, batching="stacked")
    whole = sample_block(problem.task, problem.checkpoint, posterior, sampling)
    blocks = [bif(TracesInMemory({5: tree}), trusted_only=False, **BY_SAMPLE) for tree in cut(whole)]
    errors = np.stack([(found["value"].values - exact) / found["stderr"].values for found in blocks])
    assert 0.92 < np.mean(abs(errors) < 2.13) < 0.98  # Student's t, of 16 chains
    mean = np.mean([found["value"].values for found in blocks], 0)
    assert np.corrcoef(mean.ravel(), exact.ravel())[0, 1] > 0.99
    assert (mean * exact).sum() / (exact * exact).sum() == pytest.approx(1, abs=0.05)


def test_a_block_that_is_added_later_is_the_same_and_what_is_there_is_not_drawn_again(tmp_path):
    problem = Problem(**BY_SAMPLE)

    def traces(folder, blocks):
        posterior = LocalPosterior(window=5)
        return sample(problem.task, problem.trajectory, posterior, out=tmp_path / folder, sampling=SMALL, blocks=blocks)

    traces("grown", 1)
    grown, whole = traces("grown", 2), traces("whole", 2)
    xr.testing.assert_identical(grown.load(5), whole.load(5))
    first = whole.load(5)["train"]["loss"].values
    assert (first[:4] != first[4:]).all()
