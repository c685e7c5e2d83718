"""Influence of groups, samples or tokens, as a configuration asks for it, on springs whose coordinates are tokens."""

import numpy as np
import pytest
import springs
import torch
import xarray as xr

import stagewise as sw
from stagewise.checkpoint import Checkpoint, CheckpointError
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.influence.damped import damped_influence
from stagewise.influence.gradients import gradient_product
from stagewise.retraining.window_influence import window_influence
from stagewise.run import per as sizes
from stagewise.run.analysis import Analysis
from stagewise.run.before import look
from stagewise.run.config import ConfigError, load_config, make_config, plain, save_config
from stagewise.run.estimators import of_chains, without_chains
from stagewise.run.exemplars import tokens_of
from stagewise.run.per import check_per, no_chains_of_tokens
from stagewise.run.progress import silent
from stagewise.run.source import HubName, trajectory_of
from stagewise.sampling.chains import sample_block
from stagewise.sampling.posterior import LocalPosterior

CONTENT = {"task": "t.py:task", "checkpoints": "c", "out": "o", "posterior": {"window": 3}}
OWN = {"retraining": {"recorded_order_seed": 3}}
KINDS = [["up", "down"], ["up", None], ["up", "down"], ["down", "up"], ["up", "up"], ["down", "down"]]


def config(**changes):
    return make_config(CONTENT | changes)


class Forgetful:
    """Keeps nothing but the names of what was computed."""

    def __init__(self):
        self.names = []

    def get(self, name, _cause, compute):
        self.names.append(name)
        return compute()


def found(task, settings, kept=None):
    run = springs.trajectory()
    return without_chains(Analysis(task, run, settings, dict.fromkeys([0, 20], "digest"), kept or Forgetful(), silent))


@pytest.mark.parametrize(
    ("per", "groups"),
    [("sample", list("ababab")), ("token", list("ababab")), ("token", KINDS), ("token", None), ("sample", None)],
)
@pytest.mark.parametrize("own", [OWN, {}])
def test_curves_are_those_of_groups_whatever_single_members_are_asked_for(per, groups, own):
    task = springs.task(springs.by_token, train_groups=groups)
    single, whole = found(task, config(per=per, **own)), found(task, config(**own))
    assert list(single.curves) == list(whole.curves) == list(single.single)
    for name, curves in whole.curves.items():
        xr.testing.assert_allclose(single.curves[name], curves)
        assert single.curves[name].attrs | {"mode": ""} == curves.attrs | {"mode": ""}, name
        assert (single.single[name].attrs.get("member") == "token") == (per == "token")
        assert single.single[name].sizes["train"] == {"sample": 6, "token": 12}[per]


def test_errors_of_groups_are_not_made_of_those_of_samples_but_computed():
    kept = Forgetful()
    task = springs.task()
    fresh = found(task, config(per="sample", estimators=["exact"]), kept).curves["exact influence"]
    assert kept.names == ["exact influence of samples"] * 2 + ["exact influence"] * 2
    assert (fresh["stderr"] > 0).any()
    xr.testing.assert_allclose(fresh, window_influence(task, springs.trajectory(), window=3, steps=[0, 20], check=True))
    kept = Forgetful()
    found(task, config(per="sample", estimators=["exact"], **OWN), kept)
    assert kept.names == ["exact influence of samples"] * 2, "known batches have no error to compute"


@pytest.mark.parametrize("estimate", [gradient_product, damped_influence])
@pytest.mark.parametrize("objective", ["samples", "tokens"])
def test_tokens_add_up_to_their_samples_and_samples_to_their_groups(estimate, objective):
    def ragged(model, batch):
        losses = springs.by_token(model, batch)
        weights = torch.ones_like(losses)
        weights[:, 1] = (batch[0][:, 0] > 0).to(losses)
        return losses, weights

    task = springs.task(ragged, objective=objective)
    given = (task, springs.trajectory(), LocalPosterior(window=3))
    tokens, samples, groups = (estimate(*given, per=per) for per in ("token", "sample", "group"))
    assert tokens.train.values.tolist() == ["0/0", "0/1", "1/0", "2/0", "2/1", "3/0", "4/0", "4/1", "5/0"]
    of_sample = [int(label.split("/")[0]) for label in tokens.train.values.tolist()]
    summed = np.zeros_like(samples["value"])
    np.add.at(summed, (slice(None), of_sample), tokens["value"].values)
    np.testing.assert_allclose(summed, samples["value"], atol=1e-9)
    halves = [samples["value"].values[:, k::2].mean(1) for k in (0, 1)]
    np.testing.assert_allclose(np.stack(halves, 1), groups["value"], atol=1e-9)


class Drawn:
    """Traces of springs, as a store gives them."""

    def __init__(self, task, settings):
        checkpoint = springs.trajectory().load(10)
        self.tree = sample_block(task, checkpoint, settings.posterior, settings.sampling)
        self.labels = {"train": task.train_groups, "queries": task.query_groups}

    def load(self, _step):
        return self.tree


def test_chains_answer_for_samples_and_tokens_that_add_up():
    task, sampling = springs.task(springs.by_token), {"chains": 8, "draws": 64, "batching": "stacked"}
    values = {}
    for per in ("sample", "token"):
        settings, kept = config(per=per, sampling=sampling), Forgetful()
        analysis = Analysis(task, springs.trajectory(), settings, {10: "digest"}, kept, silent)
        values[per] = of_chains(analysis, Drawn(task, settings))
        assert kept.names == [f"BIF of {per}s"]
    summed = values["token"]["value"].values.reshape(1, 6, 2, 3).sum(2)
    np.testing.assert_allclose(summed, values["sample"]["value"], rtol=1e-6)
    assert values["token"].train.values.tolist()[:3] == ["0/0", "0/1", "1/0"]
    assert values["sample"].train.values.tolist() == list("012345")


def test_tokens_of_picked_samples_are_found_among_all():
    single = found(springs.task(springs.by_token), config(per="token", estimators=["exact"], **OWN)).single
    picked = tokens_of(single["exact influence"], {20: [4, 1]}, ["far"])[20]
    assert picked.train.values.tolist() == ["1/0", "1/1", "4/0", "4/1"]
    assert (picked.step.values.tolist(), picked["query"].values.tolist()) == ([20], ["far"])


@pytest.mark.parametrize(
    ("per", "settings", "said"),
    [
        ("group", {"train_groups": None}, "per: group needs groups"),
        ("sample", {"train_groups": KINDS, "loss": springs.by_token}, "a sample has tokens of several: use per: token"),
        ("token", {}, r"needs a loss that returns \(batch, tokens\)"),
    ],
)
def test_what_has_no_answer_is_refused_in_one_line(per, settings, said):
    with pytest.raises(ValueError, match=said) as info:
        check_per(springs.task(**settings), config(per=per), 3)
    assert "\n" not in str(info.value)


def test_results_that_are_too_large_are_refused_with_their_size_and_what_to_do(monkeypatch):
    task = springs.task(springs.by_token)
    monkeypatch.setattr(sizes, "MOST_BYTES", 16 * 12 * 3 * 5)
    check_per(task, config(per="token"), 5)
    with pytest.raises(ValueError, match=r"12 tokens x 3 queries x 6 checkpoints, .* fewer queries .* or fewer steps"):
        check_per(task, config(per="token"), 6)
    check_per(task, config(per="sample"), 6)


def test_chains_that_kept_tokens_by_label_say_so_instead_of_giving_labels_for_tokens():
    task = springs.task(springs.by_token, train_groups=KINDS)
    assert "single_tokens=true" in no_chains_of_tokens(task, config(per="token"))
    assert not no_chains_of_tokens(task, config(per="token", sampling={"single_tokens": True}))
    assert not no_chains_of_tokens(task, config(per="group"))
    assert not no_chains_of_tokens(springs.task(springs.by_token), config(per="token"))


# Where checkpoints come from, and what is tried of them


def test_a_posterior_is_asked_of_a_checkpoint_only_where_it_will_be_sampled():
    bare = [Checkpoint(c.step, c.params) for c in map(springs.trajectory().load, (0, 10))]
    run, posterior = Trajectory.from_checkpoints(bare), LocalPosterior(window=3)
    assert list(look(springs.task(), run, posterior, [0, 10], sampled=False)[0]) == [0, 10]
    with pytest.raises(ValueError, match="no record of its optimiser"):
        look(springs.task(), run, posterior, [0, 10])


@pytest.mark.parametrize("name", ["hub:org/name", "hub:org/name@step{step}-tokens*"])
def test_the_name_of_a_repository_is_no_folder_and_survives_saving(tmp_path, name):
    settings = config(checkpoints=name, steps=[0, 16], out=str(tmp_path / "run"))
    assert (str(settings.checkpoints), plain(settings)["checkpoints"]) == (name, name)
    settings.out.mkdir()
    save_config(settings, settings.out / "config.yaml")
    assert load_config(settings.out / "config.yaml").checkpoints == HubName.parse(name)
    assert config(checkpoints="./hub:org/name").checkpoints.name == "name"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"checkpoints": "hub:org/name"}, "steps: name those to fetch from hub:org/name"),
        ({"checkpoints": "hub:name", "steps": [1]}, "expected hub:organisation/name"),
        ({"checkpoints": "hub:org/name@main", "steps": [1]}, r"a revision has \{step\} in it once"),
        ({"checkpoints": 3}, "checkpoints: expected a folder, or hub:organisation/name"),
        ({"per": "tokens"}, "'group', 'sample' or 'token'"),
    ],
)
def test_settings_that_cannot_be_meant_are_named(changes, said):
    with pytest.raises(ConfigError, match=said):
        config(**changes)


def test_a_revision_that_is_not_there_is_said_once_for_all_steps_in_one_line(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run = trajectory_of(HubName("org/tiny"), [0, 16])
    with pytest.raises(ValueError, match="org/tiny at revision 'step0' has none of .*no network is used") as info:
        look(springs.task(), run, LocalPosterior(gamma=1.0), run.steps)
    assert "\n" not in str(info.value)
    assert "step16" not in str(info.value)


def test_what_a_folder_does_not_say_of_its_updates_is_said_by_the_configuration(tmp_path):
    folder = tmp_path / "run" / "checkpoint-5"
    folder.mkdir(parents=True)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    content = CONTENT | {"checkpoints": str(tmp_path / "run"), "clip_norm": 0.5, "batch_size": 7}
    config = make_config(content)
    checkpoint = trajectory_of(config.checkpoints, config.steps, config.clip_norm, config.batch_size).load(5)
    assert checkpoint.optimizer.clip_norm == 0.5
    assert checkpoint.optimizer.batch_size == 7
    sw.write_checkpoint(tmp_path / "copied", checkpoint)  # says it itself
    assert sw.Trajectory.from_directory(tmp_path / "copied", batch_size=7).load(5).digest == checkpoint.digest
    with pytest.raises(CheckpointError, match="used 7 samples, not 8; leave out batch_size"):
        sw.Trajectory.from_directory(tmp_path / "copied", batch_size=8).load(5)
    with pytest.raises(ValueError, match="publishes no optimizer"):
        trajectory_of(HubName("org/tiny"), [0], batch_size=7)
    with pytest.raises(ConfigError, match="clip_norm"):
        make_config(content | {"clip_norm": -1})
