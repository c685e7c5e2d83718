"""A group of one process, and none: the same bits, and what is refused of a model in one piece."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from problem import BATCHES, BY_HAND, POSTERIOR, checkpoint, made, run, sharded, task
from torch import nn

import stagewise as sw
from stagewise.checkpoint import tensors_digest
from stagewise.converging import converging
from stagewise.sharded.fingerprint import fingerprint
from stagewise.sharded.lent import lent, loaded


@pytest.fixture
def group_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sampled(model, out):
    store = sw.sharded.sample(task(model), run(), POSTERIOR, out=out, step_size=0.1, batch_size=6, **BY_HAND)
    return store.load(3)["train"].loss.values


def test_a_model_that_one_process_has_sharded_has_the_bits_of_one_that_is_not(group_of_one, tmp_path):
    plain, one = sampled(made(), tmp_path / "plain"), sampled(sharded(made()), tmp_path / "one")
    np.testing.assert_array_equal(plain, one)
    assert np.ptp(plain, 1).max() > 1e-3


def test_the_model_is_what_it_was_even_if_something_fails(tmp_path):
    studied = task(made())
    before = tensors_digest(studied.model.state_dict())

    def stop(what, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sw.sharded.sample(studied, run(), POSTERIOR, out=tmp_path, progress=stop, step_size=0.1, **BY_HAND)
    assert tensors_digest(studied.model.state_dict()) == before


@pytest.mark.parametrize("kind", ["params", "first_moment", "second_moment"])
def test_a_checkpoint_in_which_two_numbers_have_changed_places_has_another_hash(kind):
    start = checkpoint()
    tensors = {name: tensor.clone() for name, tensor in getattr(start, kind).items()}
    tensors["embed.weight"][[0, 7]] = tensors["embed.weight"][[7, 0]]
    with lent(task(made()), True) as held:
        hashes = {
            fingerprint(held.pure, loaded(held, sw.Trajectory.from_checkpoints([each]), 3))
            for each in (start, start.holding(**{kind: tensors}), start)
        }
    assert len(hashes) == 2


def test_a_loss_that_hides_a_part_of_itself_is_refused(tmp_path):
    def hidden(model, batch):
        tokens, targets = batch
        logits = model(tokens)
        logits = logits.detach() + 0.5 * (logits - logits.detach())
        return nn.functional.cross_entropy(logits.mT, targets, reduction="none")

    studied = sw.Task(made(), hidden, train=task(made()).train, queries={"val": task(made()).train})
    with pytest.raises(ValueError, match="hidden from differentiation"):
        sw.sharded.sample(studied, run(), POSTERIOR, out=tmp_path, step_size=0.1, **BY_HAND)


def test_differences_in_float32_are_good_along_directions_of_low_rank(tmp_path):
    """As gradients are: a change of a matrix that is small beside it is large beside its largest singular value."""

    def influence(dtype, of, **given):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(5))).eval().to(dtype)
        x = torch.randn(8, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
        studied = sw.Task(
            model, lambda m, b: m(b).square().mean(1), train=x, queries={"q": x[:2]}, train_groups=list("aabbccdd")
        )
        start = sw.Checkpoint(0, model.state_dict(), sw.Optimizer("adam", 1e-4, batch_size=4))
        return of(studied, sw.Trajectory.from_checkpoints([start]), window=2, order=sw.BatchOrder(8, 4), **given)

    exact = influence(torch.float64, sw.window_influence, mode="reverse").value.values
    found = influence(torch.float32, sw.sharded.window_influence)
    np.testing.assert_allclose(found.value, exact, rtol=0, atol=1e-3 * np.abs(exact).max())
    assert float(found.differs.max()) < 0.05


class Breaking:
    """Samples of which one cannot be read any more once a checkpoint has been."""

    def __init__(self):
        self.plain, self.broken = task(made()).train.batch(slice(0, 15)), False

    def __len__(self):
        return 15

    def __getitem__(self, row):
        if self.broken and row == 13:
            raise OSError("the disk is away")
        return self.plain[0][row], self.plain[1][row]


@pytest.mark.parametrize("room", ["chains", "window"])
def test_a_sample_that_cannot_be_read_ends_the_process_and_is_no_unusable_checkpoint(room, tmp_path):
    """With which it would go on to the next one, while others wait for it."""
    samples = Breaking()

    def load(step):
        samples.broken = True
        return checkpoint()

    studied, steps = task(made(), train=samples), sw.Trajectory((3, 4), load)
    ask = {
        "chains": lambda: sw.sharded.sample(studied, steps, sw.LocalPosterior(window=4), out=tmp_path),
        "window": lambda: sw.sharded.window_influence(studied, steps, window=2, order=BATCHES),
    }
    with pytest.raises(RuntimeError, match=r"sample 13 cannot be read .*the disk is away"):
        ask[room]()


def test_a_sample_that_can_never_be_read_is_refused_before_anything_else():
    samples = Breaking()
    samples.broken = True
    with pytest.raises(ValueError, match="sample 13 cannot be read"):
        sw.sharded.window_influence(task(made(), train=samples), run(), window=2, order=BATCHES)


def test_longer_steps_are_taken_only_where_differences_have_converged_and_as_long_as_they_are_better():
    def best(rounding, bend):
        length, _ = converging(
            lambda h: 1 + rounding / h + bend * h * h, lambda near, far: abs(near - far) / max(near, far)
        )
        return length

    assert 20 < best(1e-2, 1e-9) < 500
    assert best(1e-6, 1e-3) < 1
    length, differs = converging(lambda h: h, lambda near, far: 0.5 if far <= 3 else 0.0)  # alike far away alone
    assert (differs, length <= 1) == (0.5, True)
