"""A run folder is reused by the task it was sampled with, and by no other, whatever has changed."""

import json
import subprocess
import sys
from pathlib import Path

import changing
import pytest
import torch
from changing import CHANGES, Smoothed, task_of, trajectory

from stagewise.content import content_digest
from stagewise.identity import changes, identity, probe
from stagewise.run.before import check_reusable
from stagewise.run.engine import sample
from stagewise.sampling.posterior import LocalPosterior
from stagewise.traces.store import RunMismatchError, TraceStore

POSTERIOR = LocalPosterior(gamma=1e5, n_beta=100.0, require_localised=False)  # the curvature need not be looked at


def sampled(task, out, steps=(0,)):
    settings = {"chains": 2, "draws": 2, "burn_in": 1, "thinning": 1, "step_size": 1e-3, "batching": "loop"}
    store = sample(task, trajectory(), POSTERIOR, out=out, steps=steps, **settings)
    assert all((store.load(step)["chains/status"] == "ok").all() for step in store.steps)
    return store


@pytest.fixture(params=list(CHANGES))
def change(request):
    build, before, after = CHANGES[request.param]
    yield build, before, after
    build(before)  # what is global is as it was


def test_the_same_task_built_anew_goes_on_in_its_folder_and_one_that_has_changed_is_refused(change, tmp_path):
    build, before, after = change
    for _ in range(2):
        sampled(build(before), tmp_path)
    with pytest.raises(ValueError, match=r"holds another run|the loss or the model has changed|detach") as error:
        sampled(build(after), tmp_path)
    # What is hidden from differentiation is refused in any folder, before this one is opened.
    assert isinstance(error.value, RunMismatchError) != ("hidden from differentiation" in str(error.value))
    assert "out=" in str(error.value) or "detach" in str(error.value)
    assert TraceStore.read_only(tmp_path).steps == (0,)


def test_what_stays_in_the_folder_is_compared_though_other_steps_are_asked_for(tmp_path):
    sampled(task_of(Smoothed(0.0)), tmp_path, steps=(0,))
    with pytest.raises(RunMismatchError, match=r"losses at step 0 .*the loss or the model has changed"):
        sampled(task_of(Smoothed(0.3)), tmp_path, steps=(5,))
    assert TraceStore.read_only(tmp_path).steps == (0,)


def test_a_change_that_no_probed_sample_shows_is_seen_in_the_pass_over_all_data(tmp_path):
    loss = Smoothed(0.0)
    rows = torch.linspace(0, 99, 8).round().long()
    inputs = torch.randn(100, 4, generator=torch.Generator().manual_seed(3))
    marked = torch.arange(100)[~torch.isin(torch.arange(100), rows)][40]

    def measured(model, batch):
        losses = changing.cross_entropy(model, (batch[0], batch[1]))
        return torch.where(batch[2] == marked, losses + loss.smoothing, losses)

    data = (inputs, torch.arange(100) % 3, torch.arange(100))
    for smoothing in (0.0, 0.0, 2.0):
        loss.smoothing = smoothing
        task = task_of(Holder(measured), data=data, queries=data)
        if smoothing:
            with pytest.raises(RunMismatchError, match="losses at step 0"):
                sampled(task, tmp_path)
        else:
            sampled(task, tmp_path)


class Holder:
    """Hides a function, so that only numbers can tell."""

    def __init__(self, function):
        self.function = function

    def __call__(self, model, batch):
        return self.function(model, batch)


def test_a_changed_gradient_with_the_same_losses_is_called_so(tmp_path):
    store = sampled(task_of(Holder(changing.cross_entropy)), tmp_path)
    other = task_of(Holder(changing.detached))
    assert identity(other) == identity(task_of(Holder(changing.cross_entropy)))
    with pytest.raises(RunMismatchError, match=r"gradient of the objective at step 0 .*loss or the model has changed"):
        check_reusable(store, other, trajectory())


def test_counters_and_caches_of_objects_are_no_change(tmp_path):
    class Counting(Smoothed):
        calls = 0

        def __call__(self, model, batch):
            type(self).calls += 1
            self.seen = batch
            return super().__call__(model, batch)

    loss = Counting(0.1)
    before = identity(task_of(loss))
    sampled(task_of(loss), tmp_path)
    assert Counting.calls > 0
    assert identity(task_of(loss)) == before
    sampled(task_of(loss), tmp_path)


ELSEWHERE = """
import json, sys
sys.path.insert(0, {folder!r})
import torch
torch.set_num_threads(2)
from changing import CHANGES, Net, trajectory
from stagewise.identity import identity, probe
found = {{}}
for name, (build, before, _) in CHANGES.items():
    task = build(before)
    found[name] = identity(task), probe(task, task.fitted(trajectory().load(5)))
print(json.dumps(found))
"""


def test_every_task_is_the_same_in_another_process_with_other_threads_and_another_hash_seed(monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "12345")
    script = ELSEWHERE.format(folder=str(Path(changing.__file__).parent))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for name, (there, numbers) in json.loads(done.stdout).items():
        build, before, _ = CHANGES[name]
        task = build(before)
        checkpoint = task.fitted(trajectory().load(5))
        assert there == identity(task), name
        assert changes(numbers, probe(task, checkpoint), probe(task, checkpoint, rounded=True)) == [], name


# Hashes of content.


def test_lambdas_of_one_line_are_told_apart_and_their_surroundings_do_not_count():
    first, second = lambda x: x + 1, lambda x: x - 1
    assert content_digest(first) != content_digest(second)
    again = [lambda x: x + 1, "on another line, among other things"][0]
    assert content_digest(first) == content_digest(again)


def test_functions_without_source_are_known_by_their_instructions():
    def made(text):
        space = {}
        exec(text, space)
        return space["f"]

    same = [made("def f(x): return x + 1") for _ in range(2)]
    assert content_digest(same[0]) == content_digest(same[1])
    others = ["def f(x): return x - 1", "def f(x): return x + 2", "def f(x): return x in {'a', 'b'}"]
    assert len({content_digest(made(text)) for text in others} | {content_digest(same[0])}) == 4


def test_what_calls_itself_or_each_other_comes_to_an_end():
    def even(n):
        return n == 0 or odd(n - 1)

    def odd(n):
        return n > 0 and even(n - 1)

    knot = [1]
    knot.append(knot)
    assert content_digest(even) == content_digest(even)
    assert content_digest(knot) == content_digest(knot)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}),
        ({"a", "b"}, {"a", "c"}),
        ([1, 2], [2, 1]),
        (["ab", "c"], ["a", "bc"]),
        (1, 1.0),
        ("1", 1),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.sin, torch.cos),
        (torch.nn.functional.relu, torch.nn.functional.gelu),
        (torch.nn.Linear(2, 3), torch.nn.Linear(2, 4)),
        (torch.nn.Dropout(0.1), torch.nn.Dropout(0.2)),
        (Smoothed, changing.SmoothedModule),
    ],
)
def test_different_content_has_different_hashes(one, other):
    assert content_digest(one) != content_digest(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (object(), object()),
        (Smoothed(0.1), Smoothed(0.2)),
        (torch.zeros(2), torch.zeros(4)[::2]),
        (torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)),
        (torch.Generator(), torch.Generator()),
    ],
)
def test_equal_content_and_other_addresses_have_equal_hashes(one, other):
    assert content_digest(one) == content_digest(other)
