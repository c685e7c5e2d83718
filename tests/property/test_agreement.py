"""Tasks of all kinds, and every answer against brute force: a number that agrees, or a refusal where one is due."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from brute_force import BruteForce
from forms import FORMS
from generated import Choice, Problem, choice, problem
from measures import CARRIERS, CRITERIA
from networks import NETWORKS
from training import RULES

from stagewise.baselines.tracin import tracin
from stagewise.influence.bif import bif
from stagewise.influence.damped import damped_influence
from stagewise.influence.gradients import gradient_product
from stagewise.influence.trusted import TracesInMemory
from stagewise.retraining.ablation import window_ablation
from stagewise.retraining.leave_out import leave_out
from stagewise.retraining.window_influence import window_influence
from stagewise.sampling.chains import Chains, sample_block
from stagewise.sampling.posterior import LocalPosterior

pytestmark = pytest.mark.filterwarnings("ignore")

NUMBERS = range(141)
# What is said of networks whose second derivatives are not those of training.
NO_CURVATURE = "hidden from differentiation|twice differentiated"

Answers = dict[str, Callable[[], np.ndarray]]


def drawn(number: int) -> Choice:
    return choice(number, list(NETWORKS)[number % len(NETWORKS)])


def asked(p: Problem) -> Answers:
    """What stagewise says, at the start checkpoint."""
    first, last, order, posterior = p.start.step, p.later.step, p.training.order, p.choice.posterior
    left_out = cache(lambda: leave_out(p.task, p.start, order, [last]))
    return {
        "gradient_product": lambda: gradient_product(p.task, p.run, posterior, steps=[first]).value.values[0],
        "damped_influence": lambda: damped_influence(
            p.task, p.run, posterior, curvature="exact", steps=[first]
        ).value.values[0],
        "window_ablation": lambda: window_ablation(
            p.task, p.run, window=p.window, weight=0.8, steps=[first], order=order
        ).effect.values[0],
        "tracin": lambda: tracin(p.task, p.run).value.values[-1],
        "leave_out": lambda: left_out().effect.values[0],
        "unchanged": lambda: left_out().loss.values[0],
        "window_influence": lambda: window_influence(
            p.task, p.run, window=p.window, steps=[first], order=order, mode=("reverse", "forward")[p.choice.seed % 2]
        ).value.values[0],
    }


def known(p: Problem) -> Answers:
    """The same by brute force."""
    b = BruteForce(p)
    found: dict[str, Callable[[], torch.Tensor]] = {
        "gradient_product": b.gradient_product,
        "damped_influence": b.damped,
        "window_ablation": lambda: b.effects(p.window, 0.8),
        "tracin": lambda: b.tracin(p.window),
        "leave_out": lambda: b.effects(p.window, 0.0),
        # The run itself went on, in its own precision; that of bfloat16 is not what is repeated.
        "unchanged": lambda: (
            b.after(p.window, [], 1.0) if p.network.dtype == torch.bfloat16 else b.query_losses(p.later_model.double())
        ),
        "window_influence": lambda: b.unrolled(p.window),
    }
    return {name: lambda name=name: found[name]().detach().numpy() for name in found}


def questions(p: Problem) -> list[str]:
    """A third of the tasks is asked each of the longer questions; every network meets all of them."""
    some = ["gradient_product", "window_ablation"]
    some += (["damped_influence"], ["leave_out", "unchanged"], ["window_influence"])[p.choice.seed % 3]
    # The norm of a typical minibatch's gradient is estimated, where clipping asks for it.
    return some if p.choice.batch_size and p.rule.clip else [*some, "tracin"]


def refusal(p: Problem, question: str) -> str | None:
    """What a refusal would have to say; None if there must be a number."""
    if question in ("damped_influence", "window_influence") and not p.network.curved:
        return NO_CURVATURE
    if question == "tracin" and p.start.optimizer.name != "sgd":
        return "describe updates along the gradient"
    return None


def outcome(p: Problem, question: str, ask: Callable[[], np.ndarray], know: Callable[[], np.ndarray]) -> str:
    """``"number"``, ``"refused"``, or what is wrong."""
    due = refusal(p, question)
    try:
        got = ask()
    except ValueError as error:
        if due is not None and re.search(due, str(error)):
            return "refused"
        return f"a good task is refused: {error}"
    except Exception as error:
        return f"raised {type(error).__name__}: {error}"
    if due is not None:
        return "answered what cannot be answered"
    want = know()
    exact = p.network.dtype == torch.float64
    share, rounding = (1e-6, 1e-10) if exact else (2e-3, 2e-6)
    if question == "window_influence":
        # Finite differences; and Adam divides by small gradients, which magnifies the rounding of float32.
        share, rounding = (1e-3, 1e-8) if exact else (5e-3, rounding)
    if got.shape != want.shape or not np.abs(got - want).max() <= share * np.abs(want).max() + rounding:
        return f"got {got.tolist()}, expected {want.tolist()}"
    return "number"


@cache
def outcomes(number: int) -> dict[str, str]:
    """By question; and what became of the user's model."""
    p = problem(drawn(number))
    ask, know = asked(p), known(p)
    found = {question: outcome(p, question, ask[question], know[question]) for question in questions(p)}
    return found | {"model": "untouched" if p.untouched() else "changed"}


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: f"{number} {drawn(number)}")
def test_every_answer_is_that_of_plain_training_and_autograd(number):
    found = outcomes(number)
    wrong = {question: said for question, said in found.items() if said not in ("number", "refused", "untouched")}
    assert not wrong, f"{drawn(number)}: {wrong}"


def test_most_answers_are_numbers_and_nothing_that_was_meant_to_be_drawn_is_left_out():
    counts = Counter((question, said) for number in NUMBERS for question, said in outcomes(number).items())
    assert counts["gradient_product", "number"] == counts["window_ablation", "number"] == len(NUMBERS)
    for question in ("damped_influence", "window_influence", "leave_out", "unchanged"):
        assert counts[question, "number"] > 0.25 * len(NUMBERS), question
    assert counts["tracin", "number"] > 0.3 * len(NUMBERS)
    assert counts["model", "untouched"] == len(NUMBERS)
    choices = [drawn(number) for number in NUMBERS]
    for part, there_are in (("network", NETWORKS), ("form", FORMS), ("criterion", CRITERIA), ("carrier", CARRIERS)):
        assert {getattr(c, part) for c in choices} == set(there_are), part
    assert {c.rule for c in choices} == set(RULES)


@pytest.mark.parametrize("number", range(0, len(NUMBERS), 10))
def test_chains_start_at_the_checkpoints_losses_with_the_weights_of_the_objective(number):
    p = problem(replace(drawn(number), posterior=LocalPosterior(gamma=1e3)))
    if not p.network.curved:
        pytest.skip("is refused")
    tree = sample_block(p.task, p.start, p.choice.posterior, Chains(chains=2, draws=2, burn_in=1, batching="loop"))
    b = BruteForce(p)
    losses, weights = b.losses_of(b.model, "train", b.rows("train"), False)
    train, candidates = tree["train"], p.task.candidates
    anchor, share = train["loss_anchor"].values, train["share"].values
    if anchor.ndim == 2:
        anchor, share = (anchor * share).sum(1) / np.maximum(share.sum(1), 1e-12), share.sum(1)
    counted = (weights > 0).numpy()[candidates]
    expected = losses.detach().numpy()[candidates]
    rounding = 1e-9 if p.network.dtype == torch.float64 else 1e-4
    np.testing.assert_allclose(anchor[counted], expected[counted], rtol=rounding)
    np.testing.assert_allclose(share, (weights / weights.sum()).detach().numpy()[candidates], rtol=1e-5, atol=1e-9)
    assert p.untouched()


QUADRATIC = [name for name, network in NETWORKS.items() if network.linear]


@pytest.mark.parametrize("network", QUADRATIC)
def test_draws_of_a_quadratic_loss_give_exact_damped_influence(network):
    c = replace(
        choice(7, network),
        criterion="squares",
        form="tuple",
        rule="momentum",
        weighted=True,
        posterior=LocalPosterior(window=6, n_beta=1e6),
        labelled=(True, True),
        candidates=False,
        measured=False,
    )
    p = problem(c)
    tree = sample_block(p.task, p.start, c.posterior, Chains(chains=16, draws=128, batching="stacked"))
    labels = {"train_groups": p.task.train_groups, "query_groups": p.task.query_groups}
    found = bif(TracesInMemory({p.start.step: tree}), **labels)
    want = BruteForce(p).damped().numpy()
    value, stderr = found.value.values[0], found.stderr.values[0]
    assert (np.abs(value - want) <= 4.5 * stderr + 1e-12).all()
    assert stderr.max() < 0.3 * np.abs(want).max()  # else anything would agree
