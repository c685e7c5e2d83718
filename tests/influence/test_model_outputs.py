"""Gauss-Newton curvature differentiates what the model returns, in whatever container."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_networks import Problem
from torch import nn

from stagewise.checkpoint import Checkpoint, Optimizer
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.derivatives import directional_derivatives, hessian_product
from stagewise.gauss_newton import gauss_newton_product
from stagewise.influence.damped import damped_influence
from stagewise.influence.gradients import gradient_product
from stagewise.sampling.posterior import LocalPosterior
from stagewise.task import Task


@dataclass
class Output:
    logits: torch.Tensor
    cache: object = None
    count: int = 3


CONTAINERS = {
    "tuple": (lambda z: (z, None), lambda out: out[0]),
    "dict of several": (
        lambda z: {"a": z[:, :1], "rest": [z[:, 1:], z.argmax(1)]},
        lambda out: torch.cat([out["a"], out["rest"][0]], 1),
    ),
    "dataclass": (lambda z: Output(z, object()), lambda out: out.logits),
    "dataclass that holds a tuple": (lambda z: Output((z, "text")), lambda out: out.logits[0]),
}


class Wrapped(nn.Module):
    def __init__(self, network, wrap):
        super().__init__()
        self.network, self.wrap = network, wrap

    def forward(self, x):
        return self.wrap(self.network(x))


def product(task, model, loss, vectors):
    other = Task(model, loss, train=task.train, queries=task.queries)
    checkpoint = Checkpoint(5, other.state(), Optimizer("sgd", 0.1, batch_size=0))
    density = LocalPosterior(window=5).at(other, checkpoint)
    return gauss_newton_product(density, density.origin)(vectors)


@pytest.fixture
def plain():
    problem = Problem()
    vectors = torch.randn(2, 31, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return problem.task, vectors, product(problem.task, problem.task.model, problem.task.loss, vectors)


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_container_of_the_outputs_makes_no_difference(plain, container):
    task, vectors, expected = plain
    wrap, unwrap = CONTAINERS[container]

    def loss(model, batch):
        return nn.functional.cross_entropy(unwrap(model(batch[0])), batch[1], reduction="none")

    got = product(task, Wrapped(task.model, wrap), loss, vectors)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_outputs_without_a_tensor_are_refused_with_the_way_out(plain):
    task, vectors, _ = plain

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]).logits, batch[1], reduction="none")

    with pytest.raises(ValueError, match=r"returned SimpleNamespace, in which no tensors were found.*'hessian'"):
        product(task, Wrapped(task.model, lambda z: SimpleNamespace(logits=z)), loss, vectors)


def test_a_loss_that_calls_the_model_twice_is_refused_with_the_way_out(plain):
    task, vectors, _ = plain

    def loss(model, batch):
        both = model(batch[0]) + model(2 * batch[0])
        return nn.functional.cross_entropy(both, batch[1], reduction="none")

    with pytest.raises(ValueError, match=r"once, as model\(...\), got 2 calls; .*curvature='hessian'"):
        product(task, task.model, loss, vectors)


def test_a_loss_that_needs_more_than_the_outputs_is_refused_with_the_way_out(plain):
    """A penalty on the slope by the inputs, and one that the forward pass leaves in an attribute."""
    task, vectors, _ = plain

    def by_inputs(model, batch):
        x = batch[0].clone().requires_grad_()
        values = nn.functional.cross_entropy(model(x), batch[1], reduction="none")
        return values + torch.autograd.grad(values.sum(), x, create_graph=True)[0].square().sum(1)

    def by_attribute(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none") + model.penalty

    class Penalised(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            self.penalty = 0.1 * self.inner(x).square().sum(1)
            return self.inner(x)

    for model, loss in ((task.model, by_inputs), (Penalised(task.model), by_attribute)):
        with pytest.raises(ValueError, match=r"from the model's outputs alone.*Error: .*curvature='hessian'"):
            product(task, model, loss, vectors)


def next_token_loss(model, tokens):
    logits = model(input_ids=tokens).logits[:, :-1]
    return nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


def language_model(attention):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.GPTNeoXConfig(
        **sizes, intermediate_size=8, max_position_embeddings=8, attn_implementation=attention
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GPTNeoXForCausalLM(config).double().eval()
    tokens = torch.randint(11, (6, 5), generator=torch.Generator().manual_seed(0))
    task = Task(model, next_token_loss, train=tokens, queries={"val": tokens[:2]})
    checkpoint = Checkpoint(5, task.state(), Optimizer("sgd", 0.1, batch_size=0))
    return LocalPosterior(window=5).at(task, checkpoint)


def test_language_models_are_differentiated_through_fused_attention_and_key_value_caches():
    fused, written_out = language_model("sdpa"), language_model("eager")
    vectors = torch.randn(2, fused.vector.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for derivative in (gauss_newton_product, hessian_product):
        got, expected = (derivative(density, density.origin)(vectors) for density in (fused, written_out))
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-7)  # parts of the model work in float32
    got, expected = (
        directional_derivatives(density, density.origin, vectors, density.task.train)
        for density in (fused, written_out)
    )
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-7)


class Attention(torch.nn.Module):
    """Torch's own attention layer, which in eval mode takes a fused path without second derivatives."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(5, 4)
        self.attend = torch.nn.MultiheadAttention(4, 2, batch_first=True)
        self.read_out = torch.nn.Linear(4, 5)

    def forward(self, words):
        hidden = self.embed(words)
        return self.read_out(self.attend(hidden, hidden, hidden, need_weights=False)[0])


def next_word(model, words):
    return torch.nn.functional.cross_entropy(model(words[:, :-1]).transpose(1, 2), words[:, 1:], reduction="none")


def test_torchs_attention_layer_is_differentiated_in_eval_mode():
    words = torch.randint(5, (6, 4), generator=torch.Generator().manual_seed(0))
    task = Task(Attention().eval(), next_word, train=words, queries={"val": words})
    trajectory = Trajectory.from_checkpoints([Checkpoint(0, task.state())])
    posterior = LocalPosterior(gamma=1.0, n_beta=1.0)
    product = gradient_product(task, trajectory, posterior)
    solved = damped_influence(task, trajectory, posterior)
    assert np.isfinite(product["value"]).all()
    assert np.isfinite(solved["value"]).all()
    assert torch.backends.mha.get_fastpath_enabled()
