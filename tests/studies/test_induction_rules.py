"""Sequences, exact rules and token classes, against brute force."""

from itertools import product

import numpy as np
import pytest
import torch

from stagewise.studies.chance import shares, shuffled
from stagewise.studies.induction import rules
from stagewise.studies.induction.chains import draw
from stagewise.studies.induction.classes import CLASSES, token_classes

EVERY = torch.tensor(list(product(range(2), repeat=6)))
"""All sequences of six of two tokens."""


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def legendre(nodes=8):
    """Nodes and weights on [0, 1]: exact for the polynomials that likelihoods of short sequences are."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    return torch.tensor((x + 1) / 2), torch.tensor(w / 2)


def two_token_matrices():
    """A grid of all matrices of two tokens, and weights that integrate over the uniform prior of their rows."""
    x, w = legendre()
    a, b = torch.cartesian_prod(x, x).T
    matrices = torch.stack([torch.stack([a, 1 - a], -1), torch.stack([b, 1 - b], -1)], -2)
    return matrices, torch.cartesian_prod(w, w).prod(-1)


def three_token_rows(nodes=3):
    """Distributions of three tokens, and weights that integrate over Dirichlet(1): the triangle as a folded square."""
    x, w = legendre(nodes)
    a, b = torch.cartesian_prod(x, x).T
    weights = 2 * (1 - a) * torch.cartesian_prod(w, w).prod(-1)
    return torch.stack([a, (1 - a) * b, (1 - a) * (1 - b)], -1), weights


def posterior_predictive(following, weights, tokens):
    """Probability of every next token, ``(n, length - 1, vocabulary)``: integrals over what may have been drawn from.

    Args:
        following: of each possible source, probabilities of the token after each ``(source, n, length - 1, token)``.
        weights: of the sources, in the integral over the prior.
        tokens: ``(n, length)``.
    """
    came = following.gather(-1, tokens[:, 1:, None].expand(len(weights), -1, -1, -1))[..., 0]
    before = torch.cat([torch.ones_like(came[..., :1]), came.cumprod(-1)[..., :-1]], -1)
    posterior = torch.einsum("m,mns->mns", weights, before)
    return torch.einsum("mns,mnsv->nsv", posterior, following) / posterior.sum(0)[..., None]


def assert_exact(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_bigram_rule_is_the_bayes_predictor_of_chains_with_dirichlet_rows_on_every_sequence_of_two_tokens():
    matrices, weights = two_token_matrices()
    assert_exact(rules.bigram(EVERY, 2).exp(), posterior_predictive(matrices[:, EVERY[:, :-1]], weights, EVERY))


def test_bigram_rule_is_the_bayes_predictor_of_three_tokens_by_integrating_over_whole_matrices():
    rows, weights = three_token_rows()
    index = torch.cartesian_prod(*[torch.arange(len(rows))] * 3)
    tokens = draw(30, 5, 3, generator()).tokens
    expected = posterior_predictive(rows[index][:, tokens[:, :-1]], weights[index].prod(-1), tokens)
    assert_exact(rules.bigram(tokens, 3).exp(), expected)


def test_unigram_rule_is_the_bayes_predictor_of_independent_tokens():
    distributions, weights = three_token_rows(nodes=5)
    tokens = torch.randint(3, (30, 6), generator=generator())
    # The first token is an independent draw too, unlike that of a chain: one in front lets it be predicted.
    from_the_start = torch.cat([torch.zeros(30, 1, dtype=torch.int64), tokens], 1)
    following = distributions[:, None, None].expand(-1, 30, 6, -1)
    expected = posterior_predictive(following, weights, from_the_start)
    assert_exact(rules.unigram(tokens, 3).exp(), expected[:, 1:])


@pytest.mark.parametrize("name", rules.RULES)
def test_a_rule_is_a_distribution_and_does_not_look_at_the_token_it_predicts_or_later_ones(name):
    tokens, rule = draw(20, 12, 4, generator()).tokens, rules.RULES[name]
    whole = rule(tokens, 4)
    assert whole.shape == (20, 11, 4)
    torch.testing.assert_close(whole.exp().sum(-1), torch.ones(20, 11, dtype=torch.float64))
    for place in (1, 5, 11):
        changed = tokens.clone()
        changed[:, place:] = 3 - changed[:, place:]
        torch.testing.assert_close(rule(changed, 4)[:, :place], whole[:, :place])


def test_counts_of_followers_are_those_of_a_plain_loop():
    tokens = draw(5, 15, 3, generator(1)).tokens
    counted = rules.followers(tokens, 3)
    for sequence, counts in zip(tokens.tolist(), counted.tolist(), strict=True):
        for place in range(1, 15):
            pairs = [sequence[k + 1] for k in range(place - 1) if sequence[k] == sequence[place - 1]]
            assert counts[place - 1] == [pairs.count(v) for v in range(3)]


def test_gain_is_what_the_bigram_rule_gains_on_drawn_sequences_on_average():
    """The prediction holds for chains as they are drawn: another prior of the rows or of the first token would show."""
    tokens = draw(5000, 12, 3, generator()).tokens
    gained, expected = rules.log_ratio(tokens, 3), rules.gain(tokens, 3)
    error = (gained - expected).std(0) / len(tokens) ** 0.5
    assert ((gained - expected).mean(0).abs() < 4.5 * error).all()
    assert expected.min() > -1e-12


def test_next_tokens_are_drawn_with_the_probabilities_of_the_sequences_own_matrix():
    tokens, matrices = draw(3, 4000, 3, generator(2))
    for sequence, matrix in zip(tokens, matrices, strict=True):
        counts = torch.zeros(3, 3, dtype=torch.float64)
        counts.index_put_((sequence[:-1], sequence[1:]), torch.ones(1, dtype=torch.float64), accumulate=True)
        torch.testing.assert_close(counts / counts.sum(-1, keepdim=True), matrix, rtol=0, atol=0.06)


def test_rows_of_matrices_are_uniform_among_distributions_and_first_tokens_uniform():
    tokens, matrices = draw(20_000, 1, 3, generator())
    torch.testing.assert_close(matrices.sum(-1), torch.ones(20_000, 3, dtype=torch.float64))
    assert (matrices.mean(0) - 1 / 3).abs().max() < 0.01
    assert (matrices.var(0) - 1 / 18).abs().max() < 0.003  # of Dirichlet(1, 1, 1): 1/3 * 2/3 / 4
    assert tokens[:, 0].bincount(minlength=3).min() > 6300


def test_sequences_depend_on_their_generator_and_not_on_the_global_one():
    first = draw(4, 10, 3, generator(5)).tokens
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(first, draw(4, 10, 3, generator(5)).tokens)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, draw(4, 10, 3, generator(6)).tokens)


@pytest.mark.parametrize("sizes", [(0, 5, 3), (4, 0, 3), (4, 5, 1)])
def test_sizes_that_make_no_sequences_are_refused(sizes):
    with pytest.raises(ValueError, match="vocabulary >= 2"):
        draw(*sizes, generator())


def test_every_token_has_the_one_class_that_its_rule_says():
    tokens = draw(200, 40, 3, generator()).tokens
    labels = token_classes(tokens, 3, threshold=0.05)
    assert labels.shape == (200, 39)
    assert set(labels.ravel().tolist()) == set(CLASSES)
    bigram, unigram = (rule(tokens, 3).numpy() for rule in (rules.bigram, rules.unigram))
    for k, place in ((0, 0), (0, 38), (7, 3), (7, 20), (150, 11), (150, 30), (199, 37)):
        p, q, came = np.exp(bigram[k, place]), np.exp(unigram[k, place]), tokens[k, place + 1]
        if tokens[k, place] not in tokens[k, :place]:
            expected = "early"
        elif (p * np.log(p / q)).sum() < 0.05:
            expected = "neither"
        else:
            expected = "induction" if p[came] > q[came] else "against"
        assert labels[k, place] == expected


def test_classes_of_a_sequence_that_can_be_checked_by_hand():
    # 0 1 0 1 0 1 0 0: after 0 came 1, after 1 came 0. Three times it goes on so; the last 0 breaks it.
    labels = token_classes(torch.tensor([[0, 1, 0, 1, 0, 1, 0, 0]]), 2)[0].tolist()
    assert labels[:2] == ["early", "early"]
    assert labels[3:] == ["induction", "induction", "induction", "against"]


def test_every_class_has_two_per_cent_of_the_tokens_and_shares_sum_to_one():
    tokens = draw(100, 100, 3, generator()).tokens
    usual = shares(token_classes(tokens, 3), CLASSES)
    assert sum(usual.values()) == pytest.approx(1)
    assert min(usual.values()) > 0.02
    none_alike = shares(token_classes(tokens, 3, threshold=-1.0), CLASSES)
    assert none_alike["neither"] == 0
    assert none_alike["early"] == usual["early"]


def test_shuffled_classes_keep_how_many_there_are_at_each_place_and_forget_which_tokens_they_were():
    labels = token_classes(draw(400, 30, 3, generator()).tokens, 3)
    chance = shuffled(labels, np.random.default_rng(0))
    for name in CLASSES:
        np.testing.assert_array_equal((chance == name).sum(0), (labels == name).sum(0))
    assert (chance[:, 10:] == labels[:, 10:]).mean() < 0.6
