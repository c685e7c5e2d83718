import re
from dataclasses import replace

import numpy as np
import pytest

from stagewise.dynamics import events
from stagewise.reporting.findings import findings
from stagewise.results import ARBITRARY, EXACT


def text(results):
    return "\n".join(findings(results)).replace("\u00a0", " ")


def with_values(results, value, stderr=1e-6, effect=None):
    """The same run with other influence and other measured effects; nothing else to go by."""
    influence = results.influence.drop_vars("replicates")
    influence["value"] = influence["value"].dims, value
    influence["stderr"] = influence["value"].dims, np.full_like(value, stderr)
    measured = results.measured.sel(step=influence["step"]).drop_vars("effect_stderr")
    measured["effect"] = measured["effect"].dims, -28 * value if effect is None else effect
    return replace(
        results, influence=influence, measured=measured, events=events(influence), baselines={}, exemplars=()
    )


@pytest.fixture
def value(results):
    return 1e-5 * np.random.default_rng(0).normal(size=results.influence["value"].shape)


def test_the_largest_effect_is_told_with_its_numbers_and_their_signs(results, value):
    value[4, 8, 3], effect = -7.5e-4, -28 * value
    effect[4, 8, 3] = 0.0193
    # influence -0.00075, 140 samples, weight 0.8: +0.021; the stderr 5e-5 becomes 0.0014
    assert (
        "Taking 20% of the weight from train group “8” during steps 90 to 120 would have raised the loss on “3” by "
        "0.0210 ± 0.0014 nats; retraining measured a rise of 0.0193." in text(with_values(results, value, 5e-5, effect))
    )


def test_a_measurement_that_contradicts_the_prediction_is_told_as_it_is(results, value):
    value[0, 1, 2], effect = 1e-3, -28 * value
    effect[0, 1, 2] = 0.011
    assert re.search(
        "“1” during steps 20 to 50 would have lowered .* measured a rise of 0.011",
        text(with_values(results, value, effect=effect)),
    )


@pytest.mark.parametrize(("weight", "words"), [(0, "Leaving out train"), (1.5, "Adding 50% of the weight to train")])
def test_the_change_of_weight_is_named(results, weight, words):
    measured = results.measured.assign_attrs(weight=weight)
    assert words in text(replace(results, measured=measured))


def test_no_effect_is_claimed_that_noise_could_have_made(results, value):
    quiet = text(with_values(results, value, stderr=1e-5))
    assert "Not one of 900 predicted effects between groups can be told from noise." in quiet
    assert "Not one of 90 influence curves between groups changed its sign beyond doubt." in quiet
    assert "would have" not in quiet


def test_that_few_batch_orders_make_all_uncertain_is_told_with_what_to_do(results, value):
    noisy = with_values(results, value, stderr=1e-5)
    few = replace(noisy, influence=noisy.influence.assign_attrs(repeats=4))
    assert "told from noise of 4 batch orders; record the run's own batches, or set retraining.repeats" in text(few)


def test_the_influence_of_a_group_on_itself_is_no_headline(results, value):
    value[:, range(10), range(10)] = -1.0
    value[2, 0, 5] = 1e-3
    told = [line for line in text(with_values(results, value)).split("\n") if "would have" in line]
    assert told
    for line in told:
        train, query = re.findall("“(.)”", line)
        assert train != query


def test_flips_are_told_with_direction_and_interval(results, value):
    value[:] = 1e-7
    value[:, 4, 9] = 1e-3 * np.array([1, 1, 1, -1, -1, -1, -1, 1, 1, 1])
    told = text(with_values(results, value))
    assert "1 of 90 influence curves between groups changed its sign during training." in told
    # The answered steps are 20, 30, 45, 65, 90, 130, 190, 280, ...
    turned = "Train group “4” turned from harmful to helpful for “9” between steps 45 and 65"
    assert f"{turned} and back between steps 190 and 280." in told


def test_agreement_is_the_median_over_checkpoints(results):
    pairs = ~np.eye(10, dtype=bool)
    r, slope = [], []
    for step in results.influence["step"].values:
        x = results.influence["value"].sel(step=step).values[pairs] * 140 * -0.2
        y = results.measured["effect"].sel(step=step).values[pairs]
        r.append(np.corrcoef(x, y)[0, 1])
        slope.append(x @ y / (x @ x))
    told = text(results)
    assert "Over 10 retrained checkpoints and 90 pairs of groups at each" in told
    assert f"a median of {np.median(r):.2f} (from {min(r):.2f} to {max(r):.2f})" in told
    assert f"is {np.median(slope):.2f} (from {min(slope):.2f} to {max(slope):.2f})." in told


def test_one_checkpoint_has_an_interval_instead_of_a_range(results):
    one = replace(results, measured=results.measured.sel(step=[90]))
    assert "Over 1 retrained checkpoint and 90 pairs" in text(one)
    assert re.search(r"a median of 0\.\d\d \(95% interval 0\.\d\d to 0\.\d\d\)", text(one))


def test_what_cannot_be_answered_is_counted_with_its_remedy(results):
    told = text(results)
    assert "10 of 14 checkpoints can be answered." in told
    assert "3 checkpoints cannot be answered (steps 0, 5 and 10): not localised; the loss curves" in told
    assert "1 checkpoint cannot be answered (step 400): not converged; chains disagree" in told
    assert "At 1 answered checkpoint the posterior reaches beyond first order (step 20)" in told


def test_without_data_it_says_so_and_claims_nothing(results):
    bare = replace(results, influence=None, correlation=None, events=[], baselines={}, measured=None)
    told = text(bare)
    assert "No prediction was put to the test by retraining" in told
    assert "0 of 14 checkpoints can be answered." in told
    assert "turned" not in told
    unsampled = replace(bare, diagnostics=bare.diagnostics.isel(step=[]))
    assert "No checkpoint has been sampled" in text(unsampled)


def test_a_single_pair_has_no_correlation(make):
    told = text(make(steps=[30], labels=["a"]))
    assert "1 pair of groups was retrained, too few for a correlation." in told
    assert "median" not in told


def off_by(results, value, factor, stderr=1e-7):
    """Effects that were measured ``factor`` times as large as predicted, at half of the checkpoints."""
    effect = -28 * value
    effect[: len(effect) // 2] *= factor
    return with_values(results, value, stderr, effect)


def test_sizes_that_are_off_by_more_than_their_errors_are_said_to_be_with_the_checkpoints(results, value):
    told = text(off_by(results, value, 1.5))
    assert "of the measured effects: at 5 checkpoints (steps 20, 30, 45, 65 and 90)" in told
    assert "measured effects are 1.50 times as large as predicted" in told
    assert "Read the order of the effects there, not their sizes." in told


@pytest.mark.parametrize(("factor", "stderr"), [(1.0, 1e-7), (1.5, 1e-3)])
def test_sizes_that_are_right_or_within_their_errors_raise_no_doubt(results, value, factor, stderr):
    told = text(off_by(results, value, factor, stderr))
    assert "The stated 95% intervals hold 100% of the measured effects." in told
    assert "not their sizes" not in told


def test_checkpoints_that_chains_cannot_answer_are_answered_by_damped_influence_which_is_said_and_scored(results):
    damped = results.baselines["gradient product (Adam)"].assign_attrs(estimator="damped influence")
    told = text(replace(results, baselines={"damped influence": damped}))
    assert "There damped influence answers instead (steps 0, 5, 10 and 400; open squares)" in told
    assert "with retraining it correlates with a median of" in told
    unmeasured = replace(results, baselines={"damped influence": damped}, measured=None)
    assert "it was not held against retraining at these" in text(unmeasured)
    assert "answers instead" not in text(results)


def test_a_window_that_answers_otherwise_than_its_posterior_is_said_to_without_any_retraining(results):
    def told(high):
        sizes = {"size_low": ("step", np.full(14, 0.9)), "size_high": ("step", np.linspace(1.1, high, 14))}
        return text(replace(results, measured=None, diagnostics=results.diagnostics.assign(sizes)))

    assert "the window responds 0.90 to 1.70 times as strongly as the posterior" in told(1.7)
    assert "as strongly as" not in told(1.3)
    assert "as strongly as" not in text(results)


def test_exact_influence_speaks_first_and_says_how_right_the_others_are_without_retraining(exact):
    told = text(exact)
    assert (
        "14 of 14 checkpoints are answered exactly, by the derivative of the window, replayed with the run's own"
        in told
    )
    assert "those predicted by exact influence correlate" in told
    assert "BIF correlates with a median of 1.00 (from 1.00 to 1.00) at 10 checkpoints; exact effects are 1.25" in told
    assert "The stated 95% intervals of BIF hold" in told
    assert "10 of 14 checkpoints can be answered by sampling." in told
    assert "answers instead" not in told
    unmeasured = text(replace(exact, measured=None))
    assert "exact effects are 1.25" in unmeasured


def test_scores_without_a_unit_are_given_their_correlation_and_no_size(exact):
    foreign = (1e6 * exact.influence).assign_attrs(units=ARBITRARY)
    told = text(replace(exact, baselines={**exact.baselines, "bergson": foreign}))
    assert "bergson correlates with a median of 1.00 (from 1.00 to 1.00) at 10 checkpoints; its scores have no" in told
    assert " (bergson)." in told  # with retraining
    assert "BIF correlates with a median of 1.00 (from 1.00 to 1.00) at 10 checkpoints; exact effects are 1.25" in told


def test_checkpoints_without_exact_influence_are_counted_with_the_reason(exact):
    data = exact.exact.isel(step=slice(1, None)).assign_attrs(omitted='{"0": "the learning rate at step 0 is 0"}')
    told = text(replace(exact, baselines={"exact influence": data}))
    assert "13 of 14 checkpoints are answered exactly" in told
    assert "1 checkpoint has none: at step 0, the learning rate at step 0 is 0." in told


def test_a_run_without_chains_says_so(exact):
    bare = replace(exact, influence=None, correlation=None, diagnostics=exact.diagnostics.isel(step=[]))
    told = text(bare)
    assert "14 of 14 checkpoints are answered exactly" in told
    assert "No checkpoint has been sampled" in told


def test_where_nothing_was_retrained_it_is_said_how_large_a_change_exact_influence_is_of(exact):
    influence = exact.exact
    right = influence["step"].values * 0.0 + 0.01

    def told(miss, **changes):
        baselines = {**exact.baselines, EXACT: influence.assign(miss=("step", miss))}
        return text(replace(exact, baselines=baselines, **{"measured": None} | changes))

    count = influence.sizes["step"]
    assert f"At each of {count} checkpoints weights changed by 1% or 10% in a random direction do what" in told(right)
    wrong = right.copy()
    wrong[-1] = 0.4
    last = influence["step"].values[-1]
    assert f"At step {last} (1 of {count} checkpoints) weights changed by 1% or 10%" in told(wrong)
    assert "in a random direction" not in told(wrong, measured=exact.measured)
    assert "in a random direction" not in text(replace(exact, measured=None))


def test_checkpoints_whose_chains_ended_before_they_were_precise_are_named(results):
    errors = np.full(results.diagnostics.sizes["step"], 0.05)
    errors[[6, 9]] = 0.31, np.nan
    exact = replace(
        results,
        diagnostics=results.diagnostics.assign(relative_error=("step", errors), precision=("step", errors * 0 + 0.1)),
    )
    assert (
        "At 1 checkpoint (step 65) chains ended at most_draws with standard errors of 0.31 times the influence's size, "
        "where 0.10 was asked for." in text(exact)
    )
    assert "most_draws" not in text(results)
