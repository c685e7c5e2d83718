import numpy as np
import pytest
import torch
from gaussian import D, Gaussian, walk
from torch import nn

from stagewise.checkpoint import Checkpoint
from stagewise.influence.covariance import mean_and_stderr
from stagewise.sampling import LocalPosterior, Underdamped
from stagewise.sampling.gradient import (
    BatchLoss,
    chain_gradients,
    full_gradient,
    potential_gradient,
    reshuffled,
)
from stagewise.task import Task

GAUSSIAN = Gaussian(n=24)
N_BETA, GAMMA = 100.0, 60.0


def density(centred=True, gaussian=GAUSSIAN):
    posterior = LocalPosterior(gamma=GAMMA, n_beta=N_BETA, centred=centred)
    return posterior.at(gaussian.task, gaussian.checkpoint)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def positions(chains, seed=1):
    return 0.3 * torch.randn(chains, D, generator=generator(seed), dtype=torch.float64)


def exact(u, centred):
    """Gradient of U in closed form."""
    pull = 0.0 if centred else GAUSSIAN.gradients("train").mean(0)
    return N_BETA * (u.numpy() @ GAUSSIAN.hessian + pull) + GAMMA * u.numpy()


def test_every_epoch_is_a_fresh_permutation_without_replacement():
    batches = reshuffled(10, 3, generator())
    epochs = [torch.cat([next(batches) for _ in range(3)]).tolist() for _ in range(40)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 40
    # the sample that does not fill a batch is another one each time: nobody is left out for good
    assert {next(iter(set(range(10)) - set(epoch))) for epoch in epochs} == set(range(10))


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("size", [None, 24, 1000])
def test_full_batch_gradient_is_exact(centred, size):
    u = positions(3)
    result = potential_gradient(density(centred), 3, size, True, "stacked", generator())(u)
    np.testing.assert_allclose(result.potential.numpy(), exact(u, centred), rtol=1e-12)
    loss = u.numpy() @ GAUSSIAN.hessian + GAUSSIAN.gradients("train").mean(0)
    np.testing.assert_allclose(result.loss.numpy(), loss, rtol=1e-12)


def test_gradients_do_not_depend_on_how_the_training_set_is_cut(monkeypatch):
    monkeypatch.setattr(GAUSSIAN.task, "forward_batch", 7)
    u = positions(2)
    result = potential_gradient(density(), 2, None, True, "stacked", generator())(u)
    np.testing.assert_allclose(result.potential.numpy(), exact(u, True), rtol=1e-12)
    np.testing.assert_allclose(full_gradient(density()).numpy(), GAUSSIAN.gradients("train").mean(0), rtol=1e-12)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("control_variate", [True, False])
def test_minibatch_gradients_average_to_the_exact_one_over_an_epoch(centred, control_variate):
    u = positions(3)
    gradient = potential_gradient(density(centred), 3, 6, control_variate, "stacked", generator())
    epoch = [gradient(u).potential for _ in range(24 // 6)]
    assert (epoch[0] - epoch[1]).abs().min() > 1e-3
    np.testing.assert_allclose(torch.stack(epoch).mean(0).numpy(), exact(u, centred), rtol=1e-10)


def test_anchored_gradient_is_the_change_since_the_checkpoint_on_one_shared_minibatch():
    u = positions(3)
    rows = next(reshuffled(24, 6, generator()))
    result = potential_gradient(density(), 3, 6, True, "stacked", generator())(u)
    hessian = GAUSSIAN.losses["train"][0][rows].mean(0)
    np.testing.assert_allclose(result.potential.numpy(), u.numpy() @ (N_BETA * hessian + GAMMA * np.eye(D)), rtol=1e-10)
    # RMSprop's metric wants the gradient itself, not its change
    loss = u.numpy() @ hessian + GAUSSIAN.gradients("train")[rows].mean(0)
    np.testing.assert_allclose(result.loss.numpy(), loss, rtol=1e-10)


def test_control_variate_leaves_no_noise_at_the_checkpoint():
    gradient = potential_gradient(density(), 2, 6, True, "stacked", generator())
    assert all((gradient(torch.zeros(2, D, dtype=torch.float64)).potential == 0).all() for _ in range(4))


def test_without_control_variate_every_chain_has_its_own_minibatches():
    same = positions(1).expand(4, -1)
    plain = potential_gradient(density(), 4, 6, False, "stacked", generator())(same).potential
    anchored = potential_gradient(density(), 4, 6, True, "stacked", generator())(same).potential
    assert len({tuple(row) for row in plain.tolist()}) == 4
    torch.testing.assert_close(anchored, anchored[:1].expand(4, -1))


@pytest.mark.parametrize(("size", "control_variate"), [(None, True), (6, True), (6, False)])
def test_stacked_and_looped_chains_have_the_same_gradients(size, control_variate):
    u = positions(3)
    stacked, looped = (
        potential_gradient(density(False), 3, size, control_variate, batching, generator())(u)
        for batching in ("stacked", "loop")
    )
    torch.testing.assert_close(stacked, looped, rtol=1e-12, atol=1e-12)


def classifier():
    """A posterior of a model whose losses are not quadratic, and its 12 samples."""
    inputs, targets = torch.randn(12, 3, generator=generator(2), dtype=torch.float64), torch.arange(12) % 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def losses(net, batch):
        return nn.functional.cross_entropy(net(batch[0]), batch[1], reduction="none")

    task = Task(model, losses, train=(inputs, targets), queries={"q": (inputs, targets)}, forward_batch=7)
    return LocalPosterior(gamma=2.0, n_beta=50.0).at(task, Checkpoint(0, task.state()))


def test_stacked_gradients_of_a_nonlinear_model_are_those_of_each_chain_alone():
    local, chains = classifier(), 3
    u = torch.randn(chains, local.vector.size, generator=generator(3), dtype=torch.float64)
    stacked, looped = (chain_gradients(BatchLoss(local), batching) for batching in ("stacked", "loop"))
    for rows in (torch.arange(4), torch.tensor([5, 11])):
        batch = local.task.train.batch(rows)
        together = stacked(u, batch)
        torch.testing.assert_close(together, looped(u, batch), rtol=1e-12, atol=1e-14)
        # a chain that has left is its own loss only
        gone = u.clone()
        gone[1] = float("nan")
        left = stacked(gone, batch)
        torch.testing.assert_close(left[[0, 2]], together[[0, 2]], rtol=1e-12, atol=1e-14)
        assert left[1].isnan().any()
    assert not u.requires_grad


@pytest.mark.parametrize(("size", "control_variate"), [(None, True), (5, True), (5, False)])
def test_stacked_and_looped_chains_of_a_nonlinear_model_have_the_same_gradients(size, control_variate):
    local = classifier()  # its full batch comes in two pieces
    u = torch.randn(3, local.vector.size, generator=generator(3), dtype=torch.float64)
    both = [potential_gradient(local, 3, size, control_variate, way, generator()) for way in ("stacked", "loop")]
    for _ in range(2):
        stacked, looped = (gradient(u) for gradient in both)
        torch.testing.assert_close(stacked, looped, rtol=1e-12, atol=1e-12)


def test_control_variate_saves_the_posterior_from_drowning_in_minibatch_noise():
    gaussian = Gaussian(n=64, stiffness=8)
    local = density(gaussian=gaussian)
    law = gaussian.law(local.posterior)
    slow, fast = np.linalg.eigvalsh(np.linalg.inv(law.covariance))[[0, -1]]

    def spread(control_variate, chains=300):
        gradient = potential_gradient(local, chains, 16, control_variate, "stacked", generator())
        u = walk(Underdamped.tuned(slow, fast), gradient, chains, 16, burn_in=16, thinning=2)
        return mean_and_stderr((u**2).mean(1) / np.diag(law.covariance))

    with_it, stderr = spread(control_variate=True)
    without, _ = spread(control_variate=False)
    assert (abs(with_it - 1) < 3 * stderr).all()
    assert (without > 2).all()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 8), nn.Linear(8, 7)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)

    def forward(self, tokens):
        return self.out(self.layer(self.embed(tokens)))


def attention_density():
    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]).mT, batch[0], reduction="none")

    tokens = torch.randint(0, 7, (6, 5), generator=generator())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        task = Task(Attention().eval(), loss, train=(tokens,), queries={"q": (tokens,)})
    return LocalPosterior(gamma=GAMMA).at(task, Checkpoint(0, task.state()))


def test_stacked_gradient_of_torchs_attention_layer_is_not_lost_to_its_fused_forward_pass():
    own = attention_density()
    u = 0.01 * torch.randn(3, own.vector.size, generator=generator())
    batch = own.task.train.batch(slice(None))
    stacked, looped = (chain_gradients(BatchLoss(own), batching)(u, batch) for batching in ("stacked", "loop"))
    torch.testing.assert_close(stacked, looped)


def test_stacked_gradient_does_not_depend_on_the_callers_gradient_mode():
    gradient, batch = chain_gradients(BatchLoss(density()), "stacked"), GAUSSIAN.task.train.batch(slice(None))
    expected = gradient(positions(2), batch)
    with torch.no_grad():
        torch.testing.assert_close(gradient(positions(2), batch), expected)


def test_stacked_gradient_of_a_loss_without_parameters_is_zero():
    gradient = chain_gradients(lambda _, batch: batch.sum(), "stacked")
    assert (gradient(positions(2), torch.ones(3)) == 0).all()
