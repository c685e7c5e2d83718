import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from stagewise.checkpoint import Checkpoint, Optimizer
from stagewise.retraining.schedule import BatchOrder, Schedule
from stagewise.retraining.start import start_at
from stagewise.retraining.training import train, train_and_record
from stagewise.task import Task
from stagewise.vector import ParameterVector

N, BATCH = 30, 8
ORDER = BatchOrder(N, BATCH, seed=3)
RULES = {
    "sgd": (Optimizer("sgd", 0.1), torch.optim.SGD, {}),
    "momentum": (
        Optimizer("sgd", 0.05, momentum=0.9, weight_decay=0.02),
        torch.optim.SGD,
        {"momentum": 0.9, "weight_decay": 0.02},
    ),
    "adam": (
        Optimizer("adam", 0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.03),
        torch.optim.Adam,
        {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.03},
    ),
    "adamw": (
        Optimizer("adam", 0.01, weight_decay=0.1, decoupled=True),
        torch.optim.AdamW,
        {"weight_decay": 0.1},
    ),
}


def cross_entropy(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y, reduction="none")


def classifier(dtype=torch.float64, frozen=None):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    for parameter in model.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    if frozen is not None:
        model[frozen].requires_grad_(False)
    x = torch.randn(N, 5, generator=generator, dtype=dtype)
    y = torch.randint(3, (N,), generator=generator)
    return Task(model, cross_entropy, train=(x, y), queries={"val": (x[:6], y[:6])})


def continued(task, checkpoint, schedules, until, **options):
    """Train on from a checkpoint; returns the stacked weights ``(replays, parameters)``."""
    start = start_at(task, checkpoint)
    steps = range(checkpoint.step, until)
    return train(start, start.state(len(schedules)), schedules, ORDER, steps, **options).params


@pytest.mark.parametrize("rule", RULES)
def test_weights_and_moments_are_those_of_torch_optim(rule):
    task, (optimizer, torch_class, options) = classifier(), RULES[rule]
    recorded = {c.step: c for c in train_and_record(task, optimizer, ORDER, [0, 1, 17, 40])}

    model = copy.deepcopy(task.model)
    theirs = torch_class(model.parameters(), lr=optimizer.learning_rate, **options)
    for step in range(40):
        theirs.zero_grad()
        cross_entropy(model, task.train.batch(ORDER(step))).mean().backward()
        theirs.step()
        if step + 1 not in recorded:
            continue
        for name, parameter in model.named_parameters():
            ours, memory = recorded[step + 1], theirs.state[parameter]
            torch.testing.assert_close(ours.params[name], parameter.data, rtol=1e-12, atol=1e-12)
            first = memory.get("exp_avg", memory.get("momentum_buffer"))
            if first is None:
                assert not ours.first_moment
            else:
                torch.testing.assert_close(ours.first_moment[name], first, rtol=1e-12, atol=1e-12)
            if "exp_avg_sq" in memory:
                second = memory["exp_avg_sq"]
                torch.testing.assert_close(ours.second_moment[name], second, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule", RULES)
def test_an_unchanged_replay_from_a_checkpoint_meets_the_later_one(rule):
    task = classifier(torch.float32)
    middle, end = train_and_record(task, RULES[rule][0], ORDER, [20, 45])
    expected = ParameterVector.of(task).flatten(end.params)
    replays = continued(task, middle, [Schedule()] * 3, 45)
    assert ((replays - expected).norm(dim=1) / expected.norm()).max() < 1e-6


def test_recording_leaves_the_model_alone_and_fills_in_the_batch_size():
    task = classifier()
    before = {name: tensor.clone() for name, tensor in task.state().items()}
    (end,) = train_and_record(task, RULES["adam"][0], ORDER, [5])
    (full,) = train_and_record(task, RULES["adam"][0], BatchOrder(N), [5])
    assert all(torch.equal(before[name], tensor) for name, tensor in task.state().items())
    assert (end.optimizer.batch_size, full.optimizer.batch_size) == (BATCH, 0)


def test_stacked_runs_and_a_loop_over_them_agree():
    task = classifier()
    start = Checkpoint(0, task.state(), RULES["adam"][0])
    schedules = [Schedule(), Schedule.window([0, 4, 9], 2, 5, 0.0), Schedule.window(range(9), 1, 9, 3.0)]
    stacked = continued(task, start, schedules, 12)
    looped = continued(task, start, schedules, 12, batching="loop")
    torch.testing.assert_close(stacked, looped, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(stacked[0], stacked[1])


def test_a_window_changes_its_own_steps_and_divides_by_the_batch_size_not_by_the_weights():
    task, rate = classifier(), 0.1
    start = Checkpoint(0, task.state(), Optimizer("sgd", rate))
    ours = continued(task, start, [Schedule.window(range(15), 3, 4, 0.0)], 10)

    model = copy.deepcopy(task.model)
    for step in range(10):
        beta = torch.ones(N, dtype=torch.float64)
        if step in (3, 4, 5, 6):
            beta[:15] = 0
        index = ORDER(step)
        objective = (beta[index] * cross_entropy(model, task.train.batch(index))).sum() / BATCH
        gradients = torch.autograd.grad(objective, list(model.parameters()))
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.data -= rate * gradient
    expected = nn.utils.parameters_to_vector(model.parameters())
    torch.testing.assert_close(ours[0], expected.data, rtol=1e-12, atol=1e-12)


def test_token_losses_train_on_their_mean_per_sample():
    task = classifier()
    tokens = Task(
        task.model,
        lambda model, batch: torch.stack([0.5 * cross_entropy(model, batch), 1.5 * cross_entropy(model, batch)], 1),
        train=task.train,
        queries={"val": task.queries["val"]},
    )
    start = Checkpoint(0, task.state(), RULES["adam"][0])
    schedules = [Schedule(), Schedule.window([1, 2], 0, 9, 0.3)]
    torch.testing.assert_close(
        continued(tokens, start, schedules, 9), continued(task, start, schedules, 9), rtol=1e-9, atol=1e-12
    )


def test_parameters_that_do_not_move_are_the_checkpoints_not_the_models():
    task = classifier(frozen=0)
    vector = ParameterVector.of(task)
    elsewhere = {name: tensor + 0.3 for name, tensor in task.state().items()}
    start = Checkpoint(0, elsewhere, Optimizer("sgd", 0.1))
    replays = continued(task, start, [Schedule()], 6)

    moved = copy.deepcopy(task.model)
    moved.load_state_dict(elsewhere)
    same = Task(moved, cross_entropy, train=task.train, queries={"val": task.queries["val"]})
    (end,) = train_and_record(same, start.optimizer, ORDER, [6])
    torch.testing.assert_close(replays[0], vector.flatten(end.params), rtol=1e-12, atol=1e-12)
    assert torch.equal(end.params["0.weight"], elsewhere["0.weight"])


def test_on_step_sees_every_update_once():
    task = classifier()
    seen = []
    start = Checkpoint(0, task.state(), Optimizer("sgd", 0.1))
    schedules = [Schedule.window([0], 2, 3, 0.5)]
    end = continued(task, start, schedules, 7, on_step=lambda step, state: seen.append((step, state.params)))
    assert [step for step, _ in seen] == list(range(1, 8))
    assert torch.equal(seen[-1][1], end)


def test_every_replay_needs_its_schedule():
    task = classifier()
    start = start_at(task, Checkpoint(0, task.state(), Optimizer("sgd", 0.1)))
    with pytest.raises(ValueError, match="each of 3 replays, got 1"):
        train(start, start.state(3), [Schedule()], ORDER, range(2))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ({"optimizer": None}, "does not say which optimizer"),
        ({"second_moment": {}}, "no second moment for any of its 4"),
        ({"first_moment": {}}, "no first moment for any of its 4"),
    ],
)
def test_a_checkpoint_that_cannot_be_continued_says_what_it_lacks_and_the_remedy(missing, message):
    task = classifier()
    (checkpoint,) = train_and_record(task, RULES["adam"][0], ORDER, [5])
    with pytest.raises(ValueError, match=rf"step 5 .*{message}.*Recorder"):
        start_at(task, replace(checkpoint, **missing)).state()


def test_momentum_needs_its_buffer_and_plain_sgd_nothing():
    task = classifier()
    (checkpoint,) = train_and_record(task, RULES["momentum"][0], ORDER, [5])
    bare = replace(checkpoint, first_moment={})
    with pytest.raises(ValueError, match="no first moment"):
        start_at(task, bare).state()
    plain = replace(bare, optimizer=Optimizer("sgd", 0.1))
    assert not start_at(task, plain).state().first_moment.any()


SCHEDULERS = {
    "step": lambda theirs: torch.optim.lr_scheduler.StepLR(theirs, step_size=7, gamma=0.3),
    "cosine": lambda theirs: torch.optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=40),
    "warm-up from zero": lambda theirs: torch.optim.lr_scheduler.LambdaLR(theirs, lambda step: min(1, step / 10)),
}


def trained_with(task, rule, scheduler):
    """A run of torch's own: weights after 40 updates, and the rate of each update."""
    optimizer, torch_class, options = RULES[rule]
    model = copy.deepcopy(task.model)
    theirs = torch_class(model.parameters(), lr=optimizer.learning_rate, **options)
    schedule, rates = SCHEDULERS[scheduler](theirs), []
    for step in range(40):
        theirs.zero_grad()
        cross_entropy(model, task.train.batch(ORDER(step))).mean().backward()
        rates.append(schedule.get_last_lr()[0])
        theirs.step()
        schedule.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach(), rates


@pytest.mark.parametrize("batching", ["stacked", "loop"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("rule", RULES)
def test_an_unchanged_replay_with_the_learning_rates_of_a_torch_scheduler_meets_its_run(rule, scheduler, batching):
    task = classifier()
    expected, rates = trained_with(task, rule, scheduler)
    start = Checkpoint(0, task.state(), RULES[rule][0])
    options = {"batching": batching, "learning_rate": rates.__getitem__}
    replays = continued(task, start, [Schedule(), Schedule()], 40, **options)
    torch.testing.assert_close(replays, expected.expand(2, -1), rtol=1e-10, atol=1e-12)
    held = continued(task, start, [Schedule()], 40)[0]
    assert (held - expected).norm() > 1e-2 * expected.norm()


@pytest.mark.parametrize("rule", ["momentum", "adamw"])
def test_a_replay_from_the_middle_of_a_run_takes_the_rates_of_its_own_steps(rule):
    task = classifier()
    expected, rates = trained_with(task, rule, "cosine")
    start = start_at(task, Checkpoint(0, task.state(), RULES[rule][0]))
    state = start.state()
    for steps in (range(17), range(17, 40)):
        state = train(start, state, [Schedule()], ORDER, steps, learning_rate=rates.__getitem__)
    torch.testing.assert_close(state.params[0], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rate", [-0.1, float("nan"), float("inf")])
def test_a_learning_rate_that_is_none_is_refused_with_its_step(rate):
    task = classifier()
    start = Checkpoint(0, task.state(), RULES["sgd"][0])
    with pytest.raises(ValueError, match=r"learning_rate\(3\) is .*, expected a finite number >= 0"):
        continued(task, start, [Schedule()], 5, learning_rate=lambda step: rate if step == 3 else 0.1)
