"""Two processes that hold a model together, against one, and against the rooms for models in one piece."""

import numpy as np
import pytest
import scenes
import torch
import torch.multiprocessing as mp
from apart import DIFFERING
from kinds import drawn, influence
from problem import (
    BATCHES,
    BY_HAND,
    POSTERIOR,
    checkpoint,
    language_model,
    language_run,
    language_task,
    made,
    normed,
    normed_run,
    run,
    task,
    task_of_unequal_lengths,
)

import stagewise as sw
from stagewise.derivatives import mean_gradient
from stagewise.evaluate import at

SECONDS = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def one(folder):
    return {name: getattr(scenes, name)(scenes.unsharded, folder / "one") for name in ("draws", "places", "windows")}


@pytest.fixture(scope="module")
def two(folder, one):
    sw.sample(task(made()), run(), POSTERIOR, out=folder / "ordinary", step_size=0.1, **BY_HAND)
    processes = mp.spawn(scenes.main, (folder,), 2, join=False)
    if not processes.join(SECONDS) and not processes.join(SECONDS):  # each returns when one of them has ended
        for process in processes.processes:
            process.kill()
        pytest.fail(f"the processes wait for one another after {SECONDS} seconds")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(scope="module")
def losses(folder, two):
    def of(name, who):
        tree = sw.TraceStore.read_only(folder / who / name).load(3)
        chains = slice(0, BY_HAND["chains"])  # of the first block
        return {path: tree[path].loss.values[chains] for path in ("train", "queries/val")}

    return of


def gathered(two, what):
    parts = [process["places"][what] for process in two]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("name", [name for name, (split, _) in scenes.DRAWN.items() if not split])
def test_draws_are_those_of_one_process_bit_for_bit_where_all_evaluate_the_same_samples(losses, name):
    together, alone = losses(name, "two"), losses(name, "one")
    for path in alone:
        np.testing.assert_array_equal(together[path], alone[path])


@pytest.mark.parametrize("name", [*(name for name, (split, _) in scenes.DRAWN.items() if split), "unequal", "tuned"])
def test_draws_are_those_of_one_process_but_for_rounding_where_samples_are_divided(losses, name):
    together, alone = losses(name, "two"), losses(name, "one")
    for path in alone:
        assert np.ptp(alone[path], 1).max() > 1e-4
        np.testing.assert_allclose(together[path], alone[path], rtol=0, atol=1e-5)


def test_no_rows_are_missing_or_twice_where_processes_have_unequal_numbers_of_them(two):
    here = [{name: len(part) for name, part in process["places"]["noise"].items()} for process in two]
    assert [part["layers.0.gate.weight"] for part in here] == [1, 0]
    assert [part["embed.weight"] for part in here] == [6, 5]


def test_noise_is_that_of_one_process_and_not_the_same_in_both(one, two):
    together = gathered(two, "noise")
    for name, alone in one["places"]["noise"].items():
        assert torch.equal(together[name], alone)
    first, second = (process["places"]["noise"]["layers.0.inner.weight"] for process in two)
    assert not torch.isclose(first, second).any()


def test_the_gradient_is_that_of_the_model_in_one_piece(two):
    point, _ = at(task(made()), checkpoint())
    plain = point.vector.unflatten(mean_gradient(point, point.vector.flatten(point.state), point.task.train))
    for name, slope in gathered(two, "gradient").items():
        torch.testing.assert_close(slope, plain[name], rtol=0, atol=1e-6)


def test_lengths_and_hashes_are_of_the_whole_model(one, two):
    place = torch.cat([tensor.flatten() for tensor in made().parameters()])
    for process in two:
        assert process["places"]["length"] == pytest.approx(float(place.detach().norm()), rel=1e-6)
        assert process["places"]["hash"] == one["places"]["hash"]


def test_cells_hold_what_those_of_ordinary_chains_hold(folder, two):
    trees = [sw.TraceStore.read_only(folder / who).load(3) for who in ("two/own minibatches, split", "ordinary")]
    sharded, ordinary = trees
    assert set(sharded.attrs) == set(ordinary.attrs)
    assert (sharded["chains"].status == "ok").all()
    for path in ("train", "queries/val"):
        assert sharded[path].sizes == ordinary[path].sizes
        assert set(sharded[path].variables) == set(ordinary[path].variables)
        for name in ("loss_anchor", "share"):
            np.testing.assert_allclose(sharded[path][name], ordinary[path][name], rtol=0, atol=1e-6)


def test_samples_padded_to_unequal_lengths_are_those_of_the_model_in_one_piece(folder, two):
    tree = sw.TraceStore.read_only(folder / "two" / "unequal").load(3)
    plain = sw.sampling.chains.sample_block(
        task_of_unequal_lengths(made()), checkpoint(), POSTERIOR, sw.Chains(step_size=0.1, **BY_HAND)
    )
    for name in ("loss_anchor", "share"):
        np.testing.assert_allclose(tree["train"][name], plain["train"][name], rtol=0, atol=1e-6)


def test_what_is_tuned_is_what_ordinary_chains_choose(folder, two):
    tuned = sw.TraceStore.read_only(folder / "two" / "tuned").attrs(3)
    density = sw.LocalPosterior(window=4).at(task(made()), checkpoint(clip_norm=0.2))
    assert tuned["gamma"] == pytest.approx(density.gamma, rel=1e-5)
    assert tuned["localised"]
    assert tuned["batch_size"] == 6
    curvature = sw.sampling.curvature.extreme_curvature(density)
    assert tuned["curvature_max"] == pytest.approx(curvature.largest, rel=0.02)
    assert tuned["curvature_min"] == pytest.approx(curvature.smallest, abs=0.02 * density.damping)


def test_influence_reads_what_was_sampled(folder, two):
    found = sw.bif(sw.TraceStore.read_only(folder / "two" / "own minibatches, split"), trusted_only=False)
    assert found.value.shape == (1, 3, 2)
    assert np.isfinite(found.value).all()


def test_the_model_has_its_own_weights_again(two):
    assert all(process["draws"]["kept"] for process in two)


@pytest.mark.parametrize("name", scenes.WINDOWS)
def test_exact_influence_is_that_of_the_model_in_one_piece(two, name):
    given = scenes.WINDOWS[name]
    plain = sw.window_influence(
        task(made(torch.float64)), run(**given), window=4, order=BATCHES, mode="reverse"
    ).value.values
    for process in two:
        found = process["windows"][name].values
        np.testing.assert_allclose(found, plain, rtol=0, atol=1e-9 * np.abs(plain).max())


def test_exact_influence_of_samples_and_in_float32_is_that_of_the_model_in_one_piece(two):
    given = scenes.WINDOWS["adam, clipped"]
    asked = {"window": 4, "order": BATCHES, "mode": "reverse"}
    single = sw.window_influence(task(made(torch.float64)), run(**given), per="sample", **asked).value.values
    whole = sw.window_influence(task(made(torch.float64)), run(**given), **asked).value.values
    for process in two:
        found = process["windows"]
        np.testing.assert_allclose(found["samples"].values, single, rtol=0, atol=1e-9 * np.abs(single).max())
        np.testing.assert_allclose(found["float32"].values, whole, rtol=0, atol=5e-4 * np.abs(whole).max())


def test_exact_influence_of_a_sharded_language_model_with_tied_embeddings_is_that_of_it_in_one_piece(two):
    asked = {"window": 2, "order": sw.BatchOrder(9, 3), "mode": "reverse"}
    plain = sw.window_influence(language_task(language_model()), language_run(), **asked).value.values
    for process in two:
        found = process["language"]["influence"].values
        np.testing.assert_allclose(found, plain, rtol=0, atol=1e-8 * np.abs(plain).max())


def test_of_saved_shards_no_process_reads_more_than_its_rows(two):
    whole = {name: tensor.numel() for name, tensor in made().named_parameters()}
    for process in two:
        read = [(key, int(np.prod(sizes))) for key, sizes in process["saved_shards"]["read"] if "scale" not in key]
        weights = {key.removeprefix("model."): size for key, size in read if key.startswith("model.") and size}
        moments = {key: size for key, size in read if key.startswith("optim.") and size > 1}
        assert len(moments) > 5
        assert weights["embed.weight"] <= 36
        assert weights["layers.1.inner.weight"] == moments["optim.state.layers.1.inner.weight.exp_avg"] == 18
        assert sum(weights.values()) < 0.6 * sum(whole.values())
        assert all(process["saved_shards"]["same"])


def test_saved_shards_give_the_influence_of_the_whole_checkpoint(folder, two):
    saved = sw.Trajectory.from_directory(folder / "shards", clip_norm=0, batch_size=5)
    whole = task(made(torch.float64))
    plain = sw.window_influence(whole, saved, window=2, order=BATCHES, mode="reverse").value.values
    for process in two:
        assert process["saved_shards"]["optimizer"].decoupled
        found = process["saved_shards"]["influence"].values
        np.testing.assert_allclose(found, plain, rtol=0, atol=1e-6 * np.abs(plain).max())


def test_a_run_goes_on_with_the_cells_that_are_missing_whoever_began_it(folder, two):
    blocks = 2
    name = "sgld, same"
    settings = BY_HAND | scenes.DRAWN[name][1]
    alone = sw.sharded.sample(task(made()), run(), POSTERIOR, out=folder / "alone", blocks=blocks, **settings).load(3)
    together = sw.TraceStore.read_only(folder / "one" / name).load(3)
    np.testing.assert_array_equal(together["train"].loss, alone["train"].loss)
    assert [process["going_on"]["computed"] for process in two] == [[0, 1], [0, 0]]  # the first one writes


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("one model each", "2 processes, but the model is not sharded"),
        ("two dimensions", "mesh of 2 dimensions"),
        ("some of it", "'embed.weight' is not sharded"),
        ("bfloat16 shards", "is torch.bfloat16"),
        ("rounded losses", "differences do not converge"),
        ("rounded curvature", "curvature cannot be told"),
        ("autocast by hand", "computes linear in torch.bfloat16"),
        ("slices", "without slices"),
        ("one process fails", "the second process cannot read it"),
        ("ordinary chains", "stagewise.sharded.sample"),
        ("ordinary folder", "noise: new"),
        ("first order", "linear=True"),
        ("independent draws", "sampler='window'"),
    ],
)
def test_what_is_not_supported_is_refused_by_both_processes_with_the_reason(two, what, says):
    for process in two:
        assert says in process["refusals"][what]


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("param_dtype", "mp_policy= with param_dtype=torch.bfloat16"),
        ("reduce_dtype", "mp_policy= with reduce_dtype=torch.bfloat16"),
        ("elsewhere", "lies on meta, its mesh on cpu"),
    ],
)
def test_shards_that_would_be_rounded_or_are_not_on_the_device_are_refused(two, what, says):
    for process in two:
        assert says in process["precision"][what]


@pytest.mark.parametrize("what", DIFFERING)
def test_what_is_another_thing_in_one_process_is_named_by_both_before_a_number_is_of_neither(two, what):
    for process in two:
        said = process["differing"][what]
        assert said.startswith("ValueError: process 1 was given another ")
        assert what in said.split(" than process 0")[0]


@pytest.mark.parametrize(
    ("what", "own", "others"),
    [
        ("cannot be read", "ResponseError: the hub says 503", "RuntimeError: ResponseError: the hub says 503"),
        ("cannot be sent", "LockError: lock held", "RuntimeError: LockError: lock held"),
        ("made cannot be sent", "Can't pickle", "Can't pickle"),
        ("unsteady", "is another one each time it is read", "is another one each time it is read"),
    ],
)
def test_what_goes_wrong_in_one_process_is_the_reason_in_both_and_leaves_none_waiting(two, what, own, others):
    assert others in two[0]["failing"][what]
    assert own in two[1]["failing"][what]


def test_layers_that_recompute_activations_have_the_influence_and_the_names_of_those_that_do_not(two):
    plain = influence(sw.window_influence, normed(), mode="reverse")
    for process in two:
        np.testing.assert_allclose(process["kinds"]["recomputing"], plain, rtol=0, atol=1e-8 * np.abs(plain).max())


def test_exact_influence_of_adams_first_update_alone_is_found_over_longer_steps(two):
    """Its direction is so long where gradients are 0 that usual steps change too little elsewhere."""
    plain = influence(sw.window_influence, normed(), mode="reverse", window=1)
    for process in two:
        np.testing.assert_allclose(
            process["kinds"]["one update, in columns"], plain, rtol=0, atol=1e-6 * np.abs(plain).max()
        )


def test_a_padding_row_that_a_tied_head_moves_is_refused_only_where_looking_it_up_changes_losses(two):
    tied = {"run": normed_run(tied=True), "mode": "reverse", "looked_up": False, "window": 1}
    plain = influence(sw.window_influence, normed(tied=True), **tied)
    for process in two:
        np.testing.assert_allclose(process["kinds"]["tied"], plain, rtol=0, atol=1e-8 * np.abs(plain).max())
        assert "depend on looking up 0" in process["kinds"]["tied, looked up"]


def test_a_padding_row_stays_also_where_its_columns_are_in_different_processes(folder, two):
    alone = drawn(normed(), folder / "padded")
    assert np.ptp(alone, 1).max() > 1e-3
    for process in two:
        np.testing.assert_allclose(process["kinds"]["drawn, in columns"], alone, rtol=0, atol=1e-12)


def test_the_state_dict_of_a_sharded_model_is_a_checkpoint_like_any_other(two):
    whole = sw.Trajectory.from_checkpoints([checkpoint(dtype=torch.float64)])
    plain = influence(sw.window_influence, made(torch.float64), whole, mode="reverse", window=1)
    for process in two:
        np.testing.assert_allclose(process["kinds"]["of shards"], plain, rtol=0, atol=1e-9 * np.abs(plain).max())
