"""Faulty tasks: every door refuses them before any work, in words that name what is at fault."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from faults import FAULTS, Case

from stagewise.baselines.tracin import tracin
from stagewise.checkpoint import Checkpoint
from stagewise.checkpoints.trajectory import Trajectory
from stagewise.influence.damped import damped_influence
from stagewise.influence.gradients import gradient_product
from stagewise.influence.response import response_influence
from stagewise.retraining.ablation import window_ablation
from stagewise.retraining.leave_out import leave_out
from stagewise.retraining.two_times import influence_in_time
from stagewise.retraining.unrolling import unrolled_influence
from stagewise.retraining.window_influence import window_influence
from stagewise.sampling.chains import Chains, sample_block
from stagewise.sampling.posterior import LocalPosterior
from stagewise.task import Task

pytestmark = pytest.mark.filterwarnings("ignore")

NUMBERS = range(max(50, len(FAULTS)))
POSTERIOR = LocalPosterior(window=2)
FEW = Chains(chains=2, draws=2, burn_in=1, batching="loop")


class SampledError(Exception):
    """Something was sampled although it should have been refused."""


def sampled(*_: int) -> None:
    raise SampledError


def doors(case: Case) -> dict[str, Callable[[], Any]]:
    """Every way in. A task is built anew at each, so that none profits from the checks of another."""

    def task() -> Task:
        return Task(case.model, case.loss, **case.settings)

    def start() -> Checkpoint:
        return case.checkpoint()

    def run() -> Trajectory:
        return Trajectory.from_checkpoints([start()])

    def drawn(stop: Callable[[int, int], None] | None) -> np.ndarray:
        tree = sample_block(task(), start(), POSTERIOR, FEW, on_step=stop)
        return tree["train"]["loss"].values

    last = case.step + 2
    return {
        "gradient_product": lambda: gradient_product(task(), run(), POSTERIOR).value.values,
        "damped_influence": lambda: damped_influence(task(), run(), POSTERIOR).value.values,
        "response_influence": lambda: response_influence(task(), run(), POSTERIOR).value.values,
        "sample_block": lambda: drawn(sampled),
        "tracin": lambda: tracin(task(), run()).value.values,
        "window_ablation": lambda: window_ablation(task(), run(), window=2, order=case.order).effect.values,
        "leave_out": lambda: leave_out(task(), start(), case.order, [last]).effect.values,
        "unrolled_influence": lambda: unrolled_influence(task(), start(), case.order, [last]).value.values,
        "influence_in_time": lambda: influence_in_time(task(), start(), case.order, [last], check=False).value.values,
        "window_influence": lambda: window_influence(task(), run(), window=2, order=case.order).value.values,
    }


@cache
def outcomes(number: int) -> dict[str, str]:
    """By door: ``"refused"``, ``"answered"`` where the fault does not matter, or what is wrong."""
    fault, case = list(FAULTS.values())[number % len(FAULTS)], Case(number)
    fault.plant(case)
    found = {}
    for door, enter in doors(case).items():
        try:
            answered = bool(np.isfinite(enter()).all())
            found[door] = "answered" if answered and door in fault.spares else "answered in spite of the fault"
        except ValueError as error:
            named = re.search(fault.says, str(error)) and door not in fault.spares
            found[door] = "refused" if named else f"refused by {type(error).__name__}: {error}"
        except SampledError:
            found[door] = "answered" if door in fault.spares else "sampled in spite of the fault"
        except Exception as error:
            found[door] = f"raised {type(error).__name__}: {error}"
    return found


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: f"{number} {list(FAULTS)[number % len(FAULTS)]}")
def test_a_faulty_task_is_refused_at_every_door_in_words_that_name_the_fault(number):
    wrong = {door: said for door, said in outcomes(number).items() if said not in ("refused", "answered")}
    assert not wrong


def test_refusals_are_most_and_answers_are_those_of_faults_that_do_not_matter():
    counts = Counter(said for number in NUMBERS for said in outcomes(number).values())
    assert counts["refused"] > 0.9 * counts.total()
    assert counts["refused"] + counts["answered"] == counts.total()


@pytest.mark.parametrize("seed", range(4))
def test_without_a_fault_every_door_answers(seed):
    case = Case(seed)
    before = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    for door, enter in doors(case).items():
        if door == "sample_block":
            with pytest.raises(SampledError):
                enter()
        else:
            assert np.isfinite(enter()).all(), door
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.model.state_dict().items())
