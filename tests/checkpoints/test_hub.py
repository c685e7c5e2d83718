"""Checkpoints from the Hugging Face Hub, read from a cache laid out as its client does; no test uses a network."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file
from small_runs import assert_same, tensors

from stagewise.checkpoints import CheckpointError, Trajectory

pytest.importorskip("huggingface_hub")

from huggingface_hub import HfApi, errors

NAME = "org/tiny"


def commit_of(step):
    return f"{step:04d}" + "abcdef0123" * 3 + "abcdef"


def publish(cache, step, files, revision=None):
    """A revision in the cache: a ref, blobs, and a snapshot that links to them. ``files`` are name -> writer(path)."""
    folder = cache / "models--org--tiny"
    ref = folder / "refs" / (revision or f"step{step}")
    snapshot = folder / "snapshots" / commit_of(step)
    for made in (ref.parent, snapshot, folder / "blobs"):
        made.mkdir(parents=True, exist_ok=True)
    ref.write_text(commit_of(step))
    for name, write in files.items():
        blob = folder / "blobs" / f"{step}-{name}"
        write(blob)
        (snapshot / name).symlink_to(blob)
    return snapshot


def whole(step):
    return {"model.safetensors": lambda path: save_file(tensors(step), path)}


def in_parts(step, suffix):
    first, second = dict(list(tensors(step).items())[:1]), dict(list(tensors(step).items())[1:])
    stem, save = ("model", save_file) if suffix == "safetensors" else ("pytorch_model", torch.save)
    names = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    index = {"weight_map": dict.fromkeys(first, names[0]) | dict.fromkeys(second, names[1])}
    return {
        names[0]: lambda path: save(first, path),
        names[1]: lambda path: save(second, path),
        f"{stem}.{suffix}.index.json": lambda path: path.write_text(json.dumps(index)),
    }


@pytest.fixture(autouse=True)
def whatever_this_machine_is_set_to(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture
def cache(tmp_path):
    for step in (0, 16, 143000):
        publish(tmp_path, step, whole(step))
    publish(tmp_path, 7, whole(7), "main")
    return tmp_path


def local(cache, *args, **settings):
    return Trajectory.from_hub(NAME, *args, cache_dir=cache, local_files_only=True, **settings)


def test_without_a_network_steps_are_the_revisions_of_the_cache(cache):
    run = local(cache)
    assert run.steps == (0, 16, 143000)
    for step in run.steps:
        checkpoint = run.load(step)
        assert checkpoint.step == step
        assert_same(checkpoint.params, tensors(step))
        assert checkpoint.optimizer is None


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_weights_in_parts_are_read_by_their_index(tmp_path, suffix):
    publish(tmp_path, 5, in_parts(5, suffix))
    assert_same(local(tmp_path, [5]).load(5).params, tensors(5))


def test_a_pickled_file_of_weights_is_read(tmp_path):
    publish(tmp_path, 5, {"pytorch_model.bin": lambda path: torch.save(tensors(5), path)})
    assert_same(local(tmp_path, [5]).load(5).params, tensors(5))


def test_a_part_that_was_not_fetched_is_named(tmp_path):
    snapshot = publish(tmp_path, 5, in_parts(5, "safetensors"))
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00002.safetensors, which .* names in the cache"):
        local(tmp_path, [5]).load(5)


def test_the_trajectory_can_be_sent_to_another_process(cache):
    run = pickle.loads(pickle.dumps(local(cache, [16, 0])))
    assert run.steps == (0, 16)
    assert_same(run.load(16).params, tensors(16))


def test_a_revision_that_was_not_fetched_is_one_line_with_what_to_do(cache):
    with pytest.raises(
        CheckpointError, match=r"org/tiny at revision 'step99' has none of .*no network is used"
    ) as info:
        local(cache, [99]).load(99)
    assert "\n" not in str(info.value)


def test_hf_hub_offline_is_honoured(cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run = Trajectory.from_hub(NAME, cache_dir=cache)
    assert run.steps == (0, 16, 143000)
    assert_same(run.load(0).params, tensors(0))


def test_revisions_are_listed_online_and_others_than_steps_passed_over(cache, monkeypatch):
    class Ref:
        def __init__(self, name):
            self.name = name

    class Refs:
        branches = (Ref("main"), Ref("step16"), Ref("step0"), Ref("step3-old"))
        tags = (Ref("step8"), Ref("v1"))

    monkeypatch.setattr(HfApi, "list_repo_refs", lambda _, __: Refs)
    assert Trajectory.from_hub(NAME, cache_dir=cache).steps == (0, 8, 16)
    with pytest.raises(CheckpointError, match=r"has no revision 'ckpt\{step\}' .*|has no revision like 'ckpt"):
        Trajectory.from_hub(NAME, revision="ckpt{step}", cache_dir=cache)


def test_a_star_stands_for_what_a_step_does_not_tell(tmp_path):
    publish(tmp_path, 1, whole(1), "step1000-tokens4B")
    publish(tmp_path, 2, whole(2), "step2000-tokens8B")
    run = local(tmp_path, revision="step{step}-tokens*")
    assert run.steps == (1000, 2000)
    assert_same(run.load(2000).params, tensors(2))
    with pytest.raises(CheckpointError, match=r"has no revision 'step\{step\}-tokens\*' of step 3000; there are"):
        local(tmp_path, [1000, 3000], revision="step{step}-tokens*")
    publish(tmp_path, 3, whole(3), "step1000-tokens5B")
    with pytest.raises(CheckpointError, match="'step1000-tokens4B' and 'step1000-tokens5B', both of step 1000"):
        local(tmp_path, revision="step{step}-tokens*")


def test_one_file_under_two_steps_is_refused_for_both(cache):
    snapshot = publish(cache, 500, {})
    (snapshot / "model.safetensors").symlink_to(cache / "models--org--tiny" / "blobs" / "143000-model.safetensors")
    run = local(cache)
    for step, other in ((500, 143000), (143000, 500)):
        with pytest.raises(
            CheckpointError, match=rf"'step{step}' has the very file model.safetensors that 'step{other}'"
        ):
            run.load(step)
    run.load(16)


def test_the_first_update_of_a_warm_up_may_move_nothing(cache):
    snapshot = publish(cache, 1, {})
    (snapshot / "model.safetensors").symlink_to(cache / "models--org--tiny" / "blobs" / "0-model.safetensors")
    assert_same(local(cache).load(1).params, local(cache).load(0).params)


class Response:
    status_code, headers, request = 404, {}, None


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            errors.RevisionNotFoundError("no", response=Response()),
            "org/tiny has no revision 'step0' on the Hugging Face",
        ),
        (
            errors.RepositoryNotFoundError("no", response=Response()),
            "there is no model org/tiny on the Hugging Face Hub",
        ),
        (errors.GatedRepoError("no", response=Response()), "org/tiny is gated: ask for access"),
        (errors.LocalEntryNotFoundError("no\nnetwork"), "cannot reach the Hugging Face Hub for org/tiny at revision"),
        (
            ConnectionError("no route\nto host"),
            "cannot get org/tiny at revision 'step0' from the Hugging Face Hub: no route",
        ),
        (errors.HFValidationError("bad name"), "cannot get org/tiny at revision 'step0' .*: bad name"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line(cache, monkeypatch, error, said):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(CheckpointError, match=said) as info:
        Trajectory.from_hub(NAME, [0], cache_dir=cache).load(0)
    assert "\n" not in str(info.value)


def test_an_unknown_repository_without_a_network_is_said_when_its_steps_are_listed(tmp_path):
    with pytest.raises(CheckpointError, match=r"the cache .* of org/tiny has no revision like 'step\{step\}'"):
        local(tmp_path)


@pytest.mark.parametrize(("steps", "revision"), [([], "step{step}"), ([-1], "step{step}"), ([1], "main")])
def test_questions_without_an_answer_are_refused(tmp_path, steps, revision):
    with pytest.raises(ValueError, match="steps must be|revision must have"):
        local(tmp_path, steps, revision)


@pytest.mark.parametrize("inside", [".", "snapshots", "snapshots/" + commit_of(16)])
def test_hashes_in_the_cache_are_never_taken_for_steps(cache, inside):
    with pytest.raises(
        CheckpointError, match=r"from_hub\('org/tiny', local_files_only=True\), .*\(here: main, step0, "
    ):
        Trajectory.from_directory(cache / "models--org--tiny" / inside)


def test_folders_named_by_hashes_elsewhere_are_not_taken_for_steps_either(tmp_path):
    folder = tmp_path / ("abcdef0123" * 3 + "abcdef0500")
    folder.mkdir()
    save_file(tensors(), folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="named by the hashes of commits and not by steps"):
        Trajectory.from_directory(tmp_path)
