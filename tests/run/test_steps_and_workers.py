"""Which steps are sampled, and by how many processes."""

import os
from types import SimpleNamespace

import pytest
import springs
import torch

from stagewise.run.crew import default_workers
from stagewise.usable import chosen_steps


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_one_worker_uses_a_gpu_that_all_would_have_to_share(device):
    assert default_workers(SimpleNamespace(device=torch.device(device))) == 1


def test_every_core_that_this_process_may_use_gets_a_worker(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 3}, raising=False)
    assert default_workers(springs.task()) == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert default_workers(springs.task()) == 5


def test_steps_are_those_asked_for_in_their_order_or_all():
    run = springs.trajectory()
    assert chosen_steps(run, [20, 0]) == [20, 0]
    assert chosen_steps(run, None) == [0, 10, 20]
    for steps in ([0, 7], []):
        with pytest.raises(ValueError, match="no checkpoint"):
            chosen_steps(run, steps)
