"""The network, its loss and its stages, against plain loops and networks that are known to do one thing."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad, vmap

from stagewise.studies.induction.chains import draw
from stagewise.studies.induction.network import Attention, loss, network
from stagewise.studies.induction.rules import bigram
from stagewise.studies.induction.settings import FULL
from stagewise.studies.induction.stages import Probes, stages
from stagewise.studies.measures import in_context, prefix_matching, previous_token


@pytest.fixture(scope="module")
def tokens():
    return draw(5, 12, 3, torch.Generator().manual_seed(0)).tokens


def small(seed=0, heads=2):
    return network(3, 11, width=8, heads=heads, seed=seed).double()


def test_attention_scores_are_those_of_content_and_distance_by_a_plain_loop():
    layer = Attention(8, 2, 11).double()
    torch.nn.init.normal_(layer.distance)
    x = torch.randn(2, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    added, pattern = layer(x)
    query, key, value = (part(x).view(2, 7, 2, 4) for part in (layer.query, layer.key, layer.value))
    for sample, head, t in ((0, 0, 0), (0, 1, 3), (1, 0, 6), (1, 1, 5)):
        at = query[sample, t, head]
        scores = [at @ (key[sample, s, head] + layer.distance[head, t - s]) / 2 for s in range(t + 1)]
        expected = torch.stack(scores).softmax(0)
        torch.testing.assert_close(pattern[sample, head, t, : t + 1], expected)
        assert (pattern[sample, head, t, t + 1 :] == 0).all()
    mixed = torch.einsum("bhts,bshd->bthd", pattern, value).reshape(2, 7, 8)
    torch.testing.assert_close(added, layer.out(mixed))


def test_a_token_does_not_see_later_ones_and_any_shorter_sequence_gives_the_same(tokens):
    model, inputs = small(), tokens[:, :-1]
    logits = model(inputs)
    changed = inputs.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 3
    torch.testing.assert_close(model(changed)[:, :6], logits[:, :6])
    torch.testing.assert_close(model(inputs[:, :6]), logits[:, :6])
    assert (model(changed)[:, 6:] - logits[:, 6:]).abs().max() > 1e-3


def test_loss_of_a_token_is_minus_its_log_probability_given_those_before(tokens):
    model = small()
    losses = loss(model, tokens)
    assert losses.shape == (5, 11)
    for sample, place in ((0, 1), (2, 5), (4, 11)):
        probabilities = model(tokens[sample, :place][None])[0, -1].softmax(-1)
        expected = -probabilities[tokens[sample, place]].log()
        torch.testing.assert_close(losses[sample, place - 1], expected)


def test_patterns_come_with_the_same_logits_and_are_distributions(tokens):
    model = small()
    logits, patterns = model.with_patterns(tokens[:, :-1])
    torch.testing.assert_close(logits, model(tokens[:, :-1]))
    assert patterns.shape == (2, 5, 2, 11, 11)
    torch.testing.assert_close(patterns.sum(-1), torch.ones(2, 5, 2, 11, dtype=torch.float64))


def test_second_derivatives_are_those_of_finite_differences(tokens):
    model = small()
    parameters = list(model.parameters())

    def slopes(create_graph=False):
        return torch.autograd.grad(loss(model, tokens).mean(), parameters, create_graph=create_graph)

    directions = [torch.randn_like(p) for p in parameters]
    along = sum((g * d).sum() for g, d in zip(slopes(create_graph=True), directions, strict=True))
    exact = torch.autograd.grad(along, parameters)
    step, moved = 1e-5, []
    for sign in (1, -2):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p += sign * step * d
        moved.append(slopes())
    for found, ahead, behind in zip(exact, *moved, strict=True):
        torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-8)


def test_replays_that_are_stacked_have_the_gradients_that_they_have_alone(tokens):
    model = small()
    states = [small(seed).state_dict() for seed in (1, 2)]

    def mean(state):
        logits = functional_call(model, state, (tokens[:, :-1],))
        return -logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).mean()

    together = vmap(grad(mean))({name: torch.stack([state[name] for state in states]) for name in states[0]})
    for place, state in enumerate(states):
        for name, alone in grad(mean)(state).items():
            torch.testing.assert_close(together[name][place], alone)


def test_the_studys_network_has_about_fifteen_thousand_parameters():
    model = network(FULL.vocabulary, FULL.length - 1, FULL.width, FULL.heads)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(15_000, rel=0.03)


def test_initial_weights_depend_on_the_seed_alone_and_leave_the_global_generator_as_it_is():
    state = torch.get_rng_state()
    first, same, other = (network(3, 11, 8, seed=seed).state_dict()["embedding.weight"] for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def looking(offset, length=8):
    """Attention of one head that looks a fixed number of tokens back, and of one that looks at all alike."""
    places = torch.arange(length)
    exact = torch.zeros(length, length)
    exact[places, (places - offset).clamp(min=0)] = 1
    even = torch.ones(length, length).tril() / torch.arange(1, length + 1)[:, None]
    return torch.stack([exact, even])[None, None]  # one layer, one sequence


def test_previous_token_score_is_one_for_a_head_that_looks_one_back_and_that_of_the_best_head():
    assert previous_token(looking(1)) == pytest.approx(1)
    even = previous_token(looking(0))
    assert even == pytest.approx(np.mean([1 / (t + 1) for t in range(1, 8)]))


def test_prefix_matching_is_that_of_a_head_that_looks_where_the_current_token_was_followed():
    tokens = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])  # period 4: what followed is 3 back
    found = prefix_matching(looking(3), tokens, first=4)
    assert found == pytest.approx(1 - np.mean([1 / (t + 1) for t in range(4, 8)]))
    assert prefix_matching(looking(4), tokens, first=4) == pytest.approx(0)  # the occurrence itself: not induction


def test_prefix_matching_of_even_attention_is_zero_however_often_tokens_repeat():
    tokens = torch.randint(2, (1, 8), generator=torch.Generator().manual_seed(0))
    even = looking(3)[:, :, 1:]
    assert prefix_matching(even, tokens) == pytest.approx(0, abs=1e-6)


def test_in_context_score_is_late_minus_early():
    losses = torch.linspace(2, 1, 20).repeat(3, 1)
    assert in_context(losses) == pytest.approx(float(losses[0, -2:].mean() - losses[0, :2].mean()))
    assert in_context(losses) < 0


def test_a_network_that_knows_nothing_is_at_no_distance_from_the_uniform_rule_and_at_gain_from_the_others(tokens):
    model = small()
    with torch.no_grad():
        model.unembedding.weight.zero_()
        model.unembedding.bias.zero_()
    found = stages(model, Probes.of(tokens, 3, torch.Generator().manual_seed(0)))
    assert found["kl_uniform"] == pytest.approx(0, abs=1e-12)
    assert found["in_context"] == pytest.approx(0, abs=1e-12)
    log_p = bigram(tokens, 3)
    assert found["kl_bigram"] == pytest.approx(float((log_p.exp() * (log_p + math.log(3))).sum(-1).mean()))


def test_checkpoints_begin_close_together_and_hold_what_windows_need():
    settings = replace(FULL, last=110, every=25)
    assert settings.steps == (0, 1, 3, 9, 25, 50, 75, 100, 110)
    assert len(FULL.steps) >= 24
    assert set(FULL.window_starts) <= set(FULL.steps)
    assert max(FULL.window_starts) + FULL.window <= FULL.last
