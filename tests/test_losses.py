"""Losses of language models: equal to plain cross entropy, in all that is differentiated."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BatchEncoding,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

import stagewise as sw
from live import Live
from stagewise import vocabulary
from stagewise.attention import plain_attention
from stagewise.derivatives import directional_derivatives, hessian_product, mean_gradient
from stagewise.evaluate import at
from stagewise.losses import causal_lm

VOCABULARY, TOKENS = 23, 7


def language_model(tied=False, seed=0):
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPTNeoXForCausalLM(config).double().eval()
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def batch(form):
    ids = torch.randint(0, VOCABULARY, (3, TOKENS), generator=torch.Generator().manual_seed(1))
    mask, labels = torch.ones_like(ids), ids.clone()
    if form == "tensor":
        return ids
    if form == "padded":
        mask[0, 5:], mask[1, :2] = 0, 0
        return BatchEncoding({"input_ids": ids, "attention_mask": mask})
    labels[0, :3], labels[2, 4] = -100, -100
    return {"input_ids": ids, "labels": labels}


def plain(model, batch):
    """Plain cross entropy of all logits."""
    inputs = {"input_ids": batch} if isinstance(batch, torch.Tensor) else dict(batch)
    labels = inputs.pop("labels", inputs["input_ids"])[:, 1:]
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    weights = (labels != -100) & (mask[:, 1:] == 1) & (mask[:, :-1] == 1)
    logits = model(**inputs).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.mT, labels, reduction="none")  # 0 where the label is -100
    return losses, weights.to(losses)


@pytest.fixture(autouse=True)
def few_at_a_time(monkeypatch):
    """Two tokens at a time: pieces that do not divide the tokens."""
    monkeypatch.setattr(vocabulary, "_BYTES", 2 * 8 * VOCABULARY)


def both(tied, form):
    """The task with either loss, at the same point."""
    model, data = language_model(tied), batch(form)
    for loss in (causal_lm, plain):
        train = dict(data.items()) if form != "tensor" else data
        task = sw.Task(model, loss, train=train, queries={"q": train}, objective="tokens")
        yield at(task, sw.Checkpoint(0, task.state()))[0]


@pytest.mark.parametrize("form", ["tensor", "padded", "labels"])
@pytest.mark.parametrize("tied", [True, False])
def test_values_gradients_and_second_derivatives_are_those_of_plain_cross_entropy(tied, form):
    ours, theirs = both(tied, form)
    u = ours.vector.flatten(ours.state)
    data = ours.task.train.batch(slice(None))
    losses, expected = ours.losses(u, data), theirs.losses(u, data)
    torch.testing.assert_close(losses.values, expected.values, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(losses.weights, expected.weights)
    vectors = torch.randn(2, len(u), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for found, right in zip(derivatives(ours, u, vectors), derivatives(theirs, u, vectors), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-11)


def derivatives(point, u, vectors):
    """Gradient, products with the Hessian (one vector, and several together), losses along directions."""
    train, product = point.task.train, hessian_product(point, u)
    yield mean_gradient(point, u, train)
    yield product(vectors)
    yield product(vectors[:1])
    yield directional_derivatives(point, u, vectors, train)


@pytest.mark.parametrize("form", ["tensor", "padded"])
def test_several_models_are_stacked_as_plain_cross_entropy_is(form):
    ours, theirs = both(False, form)
    u = ours.vector.flatten(ours.state)
    rows, data = torch.stack([u, 1.1 * u, 0.9 * u]).requires_grad_(), ours.task.train.batch(slice(None))
    found = []
    for point in (ours, theirs):
        with plain_attention():
            values = vmap(lambda row, point=point: point.sample_losses(row, data)[0])(rows)
        slope = torch.autograd.grad(values.square().sum(), rows, create_graph=True)[0]
        found.append((values, slope, torch.autograd.grad(slope.square().sum(), rows)[0]))
    for mine, right in zip(*found, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-11)


def test_bias_of_the_head_is_a_parameter_like_any_other():
    random = torch.Generator().manual_seed(0)
    h, w, b = (torch.randn(*s, generator=random, dtype=torch.float64) for s in ((5, 3), (VOCABULARY, 3), (VOCABULARY,)))
    inputs, y = [t.requires_grad_() for t in (h, w, b)], torch.arange(5)
    assert torch.autograd.gradcheck(lambda *t: vocabulary.token_losses(*t, y), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: vocabulary.token_losses(*t, y), inputs)
    right = nn.functional.cross_entropy(h @ w.mT + b, y, reduction="none")
    torch.testing.assert_close(vocabulary.token_losses(h, w, b, y), right)


class Largest(TorchDispatchMode):
    """The largest number of entries of anything that is computed."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in result if isinstance(result, tuple | list) else [result]:
            if isinstance(leaf, torch.Tensor):
                self.size = max(self.size, leaf.numel())
        return result


def test_logits_of_all_tokens_are_never_held_even_in_second_derivatives():
    random, tokens, width = torch.Generator().manual_seed(0), 100, 3
    h, w = (torch.randn(size, width, generator=random).requires_grad_() for size in (tokens, VOCABULARY))
    with Largest() as largest:
        losses = vocabulary.token_losses(h, w, None, torch.arange(tokens) % VOCABULARY)
        slopes = torch.autograd.grad(losses.square().sum(), (h, w), create_graph=True)
        torch.autograd.grad(sum(slope.square().sum() for slope in slopes), (h, w))
    assert largest.size == tokens * width


class Scaled(GPT2LMHeadModel):
    """A model whose logits are more than its head's."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 3 * output.logits
        return output


@pytest.mark.parametrize(("second", "most"), [(False, 1), (True, 2)])
def test_logits_of_every_piece_are_computed_where_those_of_the_last_were(second, most, monkeypatch):
    tokens, words = 32, 1000
    monkeypatch.setattr(vocabulary, "_BYTES", 4 * 4 * words)  # 4 tokens
    hidden, weight = torch.linspace(-1, 1, tokens)[:, None], torch.linspace(-1, 1, words)[:, None].requires_grad_()
    with Live() as live:
        loss = vocabulary.token_losses(hidden, weight, None, torch.arange(tokens)).sum()
        (slope,) = torch.autograd.grad(loss, weight, create_graph=second)
        if second:
            torch.autograd.grad(slope.square().sum(), weight)
    assert live.made < most * tokens * words


def test_model_that_scales_its_logits_is_taken_as_it_is():
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    model = Scaled(config).eval()
    torch.testing.assert_close(causal_lm(model, batch("tensor")), plain(model, batch("tensor")))


def test_cap_of_logits_is_seen_where_they_are_too_small_to_reach_it():
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
        intermediate_size=16,
        tie_word_embeddings=False,
    )
    model = Gemma2ForCausalLM(config).double().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-2)
    causal_lm(model, batch("tensor"))
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    torch.testing.assert_close(causal_lm(model, batch("tensor")), plain(model, batch("tensor")))
    assert not model.lm_head._forward_hooks


def test_any_module_that_returns_logits_will_do():
    model = nn.Sequential(nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY))
    ids = batch("tensor")
    values, weights = causal_lm(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    right = nn.functional.cross_entropy(model(ids)[:, :-1].mT, ids[:, 1:], reduction="none")
    torch.testing.assert_close(values, right)
    assert values.shape == weights.shape == (3, TOKENS - 1)


def test_low_precision_gives_losses_in_float32():
    values, weights = causal_lm(language_model().bfloat16(), batch("padded"))
    assert values.dtype == weights.dtype == torch.float32
    assert weights.sum() == 3 * (TOKENS - 1) - 2 - 2


def test_batch_without_tokens_is_refused():
    with pytest.raises(ValueError, match="input_ids"):
        causal_lm(language_model(), {"tokens": batch("tensor")})


def test_parameters_can_be_exchanged():
    model, other = language_model(), language_model(seed=3)

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, data):
            return causal_lm(self.model, data)[0]

    there = {f"model.{name}": tensor for name, tensor in other.named_parameters()}
    values = functional_call(Loss(), there, (batch("tensor"),))
    torch.testing.assert_close(values, plain(other, batch("tensor"))[0], rtol=1e-10, atol=1e-12)
