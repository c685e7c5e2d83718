"""The local learning coefficient where it is known: singular losses, whose curvature at the checkpoint says nothing."""

import numpy as np
import pytest
from synthetic_traces import Traces

from stagewise.influence.llc import llc
from stagewise.sampling.chains import Chains, sample_block
from stagewise.sampling.posterior import LocalPosterior
from stagewise.studies.singular import aoyagi_watanabe, crossing, reduced_rank
from stagewise.traces.diagnostics import diagnose

N_BETA, GAMMA = 100.0, 1.0
WITHIN = [crossing(2), reduced_rank(2, 1, 4, 0), reduced_rank(2, 1, 2, 1)]
BEYOND = [crossing(1, 1), reduced_rank(2, 2, 2, 1)]
named = {"ids": lambda problem: problem.name}


def sampled(problem, **changes):
    """A step that is stable in the arms of the singularity, ten times as steep as the prior is wide."""
    step = 1 / np.sqrt(10 * N_BETA)
    settings = {"chains": 256, "draws": 16, "burn_in": round(10 / step), "thinning": round(1 / step)} | changes
    posterior = LocalPosterior(gamma=GAMMA, n_beta=N_BETA, require_localised=False)
    sampling = Chains(step_size=step, options={"friction": 1.0}, reflect=False, batching="stacked", **settings)
    return sample_block(problem.task, problem.checkpoint, posterior, sampling)


@pytest.mark.parametrize("problem", WITHIN + BEYOND, **named)
def test_chains_give_the_exact_rise_of_a_singular_loss(problem):
    got = llc(Traces({0: sampled(problem)}))
    assert np.abs(got["value"] - problem.rise(N_BETA, GAMMA)).item() < 4 * got["stderr"].item()
    assert got["stderr"].item() < 0.04 * problem.coefficient
    if problem in WITHIN:
        assert got["value"].item() == pytest.approx(problem.coefficient, rel=0.1)


@pytest.mark.parametrize("problem", BEYOND, **named)
def test_where_the_coefficient_is_out_of_reach_of_n_beta_the_exact_rise_says_so(problem):
    assert problem.rise(N_BETA, GAMMA) < 0.9 * problem.coefficient + 0.01


@pytest.mark.parametrize("shape", [(1, 1, 1, 0), (2, 1, 4, 0), (2, 1, 2, 0), (2, 1, 2, 1)])
def test_the_formula_of_aoyagi_and_watanabe_is_what_the_integral_tends_to(shape):
    problem, logs = reduced_rank(*shape), np.log([1e2, 1e4])
    short = problem.coefficient - np.array([problem.rise(np.exp(log), GAMMA) for log in logs])
    if problem.multiplicity == 1:
        assert np.abs(short[1]) < 0.02 * problem.coefficient
    else:  # (m - 1) / (log n_beta + constant)
        assert np.diff(1 / short) == pytest.approx(np.diff(logs), rel=0.05)


def test_the_formula_has_all_four_cases():
    cases = {(3, 3, 3, 1): (4.0, 1), (3, 2, 3, 1): (3.5, 2), (1, 1, 4, 1): (2.0, 1), (4, 1, 1, 1): (2.0, 1)}
    assert {shape: aoyagi_watanabe(*shape) for shape in cases} == cases
    assert aoyagi_watanabe(1, 4, 1, 0) == (0.5, 1)


def test_a_crossing_has_the_integral_of_the_regression_that_is_the_same_loss():
    # 1/2 (a b)^2 at n_beta is (a b)^2 at half of it.
    exact = reduced_rank(1, 1, 1, 0).rise(2 * N_BETA, 2.0)
    assert crossing(1, 1).rise(N_BETA, 2.0) == pytest.approx(exact, rel=5e-3)


def test_burn_in_never_enters():
    problem, short = crossing(1, 1), {"chains": 8, "thinning": 5}
    late = sampled(problem, draws=8, burn_in=20, **short)["train"]["loss"]
    all_along = sampled(problem, draws=12, burn_in=0, **short)["train"]["loss"]
    np.testing.assert_array_equal(late, all_along[:, 4:])


def test_steps_by_the_curvature_at_a_singular_point_are_refused_and_give_no_number():
    problem = crossing(1, 1)
    cell = sample_block(problem.task, problem.checkpoint, LocalPosterior(gamma=GAMMA, n_beta=N_BETA), Chains())
    assert diagnose(cell)["verdict"].item() == "chains failed"
    with pytest.raises(ValueError, match="chains failed"):
        llc(Traces({0: cell}))
