"""Second moments estimated from gradients, against those that Adam had."""

import pytest
import torch
from torch import nn

import stagewise as sw
from stagewise.checkpoints import read_checkpoint

ROWS = 512


def losses(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def trained(steps, beta2=0.99, batch=16):
    """A network after so many updates of Adam: its task, and the checkpoint with the true moments."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(ROWS, 8, generator=generator), torch.randn(8, 4, generator=generator)
    y = (x @ w + 0.5 * torch.randn(ROWS, 4, generator=generator)).argmax(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, betas=(0.9, beta2))
    for _ in range(steps):
        rows = torch.randint(ROWS, (batch,), generator=generator)
        optimizer.zero_grad()
        losses(model, (x[rows], y[rows])).mean().backward()
        optimizer.step()
    first, second = (
        {name: optimizer.state[p][key] for name, p in model.named_parameters()} for key in ("exp_avg", "exp_avg_sq")
    )
    rule = sw.Optimizer("adam", 3e-3, betas=(0.9, beta2), batch_size=batch)
    task = sw.Task(model.eval(), losses, train=(x, y), queries={"val": (x[:8], y[:8])})
    return task, sw.Checkpoint(steps, model.state_dict(), rule, first, second)


def flat(moments):
    return torch.cat([moments[name].flatten() for name in sorted(moments)])


def test_late_in_a_noisy_run_it_is_near_what_adam_had():
    task, truth = trained(1000)
    known = sw.estimated_second_moment(task, truth)
    ours, theirs = flat(known.second_moment).log(), flat(truth.second_moment).log()
    correlation = torch.corrcoef(torch.stack([ours, theirs]))[0, 1]
    ratio, spread = (ours - theirs).median().exp(), (ours - theirs).std()
    print(f"log second moments: correlation {correlation:.3f}, median ratio {ratio:.3f}, spread {spread:.3f}")
    # Measured: 0.954, 0.983 and 0.173; a mean of 100 squares of normal numbers alone has a spread of 0.14.
    assert correlation > 0.92
    assert 0.9 < ratio < 1.1
    assert spread < 0.22


@pytest.mark.parametrize("batch_size", [1, 64])
def test_batches_of_any_size_have_the_mean_square_that_theory_says(batch_size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, generator=generator, dtype=torch.float64) + torch.tensor([0.0, 0.5, 2.0])
    model = nn.Linear(3, 1, bias=False).double()
    task = sw.Task(model, lambda m, b: m(b)[:, 0], train=x, queries={"q": x[:2]})  # the gradient is the sample
    rule = sw.Optimizer("adam", 1e-3, betas=(0.9, 0.95), batch_size=batch_size)
    known = sw.estimated_second_moment(task, sw.Checkpoint(7, model.state_dict(), rule), batches=3000)
    expected = (1 - 0.95**7) * (x.mean(0) ** 2 + x.var(0, correction=0) / batch_size)
    torch.testing.assert_close(known.second_moment["weight"][0], expected, rtol=0.06, atol=0.002)


def test_clipping_scales_it():
    task, truth = trained(100)
    whole = sw.estimated_second_moment(task, truth, batches=8)
    typical = (flat(whole.second_moment).sum() / (1 - 0.99**100)).sqrt()
    rule = sw.Optimizer("adam", 3e-3, betas=(0.9, 0.99), batch_size=16, clip_norm=float(typical) / 2)
    clipped = sw.estimated_second_moment(task, truth, rule, batches=8)
    torch.testing.assert_close(flat(clipped.second_moment), flat(whole.second_moment) / 4)


def test_results_and_files_say_that_it_is_an_estimate(tmp_path):
    task, truth = trained(100)
    bare = sw.Checkpoint(100, truth.params)
    known = sw.estimated_second_moment(task, bare, truth.optimizer, batches=8)
    posterior = sw.LocalPosterior(window=10)
    assert posterior.at(task, known).metric == "adam, second moment estimated"
    assert posterior.at(task, truth).metric == "adam"
    read = read_checkpoint(sw.write_checkpoint(tmp_path, known), 100)
    assert read.estimated
    assert read.digest == known.digest
    product = sw.gradient_product(task, sw.Trajectory.from_directory(tmp_path), posterior=posterior)
    assert product.attrs["metric"] == "adam, second moment estimated"


def test_what_repeats_updates_is_refused_for_want_of_the_first_moment():
    task, truth = trained(100)
    known = sw.estimated_second_moment(task, sw.Checkpoint(100, truth.params), truth.optimizer, batches=8)
    with pytest.raises(ValueError, match="first moment"):
        sw.window_influence(task, sw.Trajectory.from_checkpoints([known]), window=3, groups=["all"] * ROWS)


def test_the_same_seed_gives_the_same_and_the_caller_keeps_his():
    task, truth = trained(10)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = (sw.estimated_second_moment(task, truth, batches=4).digest for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("rule", "batches", "said"),
    [
        (None, 8, "pass the run's rule"),
        (sw.Optimizer("sgd", 0.1, batch_size=8), 8, "pass the run's rule"),
        (sw.Optimizer("adam", 0.1), 8, "pass the run's rule"),
        (sw.Optimizer("adam", 0.1, batch_size=8), 1, "batches must be 2 or more"),
    ],
)
def test_what_it_cannot_be_estimated_from_is_refused(rule, batches, said):
    task, truth = trained(1)
    with pytest.raises(ValueError, match=said):
        sw.estimated_second_moment(task, sw.Checkpoint(1, truth.params), rule, batches=batches)


def test_before_the_first_update_there_is_none():
    task, truth = trained(1)
    known = sw.estimated_second_moment(task, sw.Checkpoint(0, truth.params), truth.optimizer, batches=4)
    assert known.second_moment == {}
