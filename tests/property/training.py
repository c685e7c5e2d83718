"""Training by hand: ``torch.optim``, ``backward()`` and ``clip_grad_norm_``, as a user's script has them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stagewise.checkpoint import Checkpoint, Optimizer, ParameterGroup


@dataclass(frozen=True)
class Rule:
    """An optimiser and what a script does around it.

    Attributes:
        make: parameters to the optimiser.
        clip: norm to which gradients are clipped.
        split: the parameters are two groups; those of the second half have three times the rate and decay.
        head: only the parameters of the second half are in the optimiser.
        late: the first half has no gradient in the first two updates.
    """

    make: Callable[[Any], torch.optim.Optimizer]
    clip: float | None = None
    split: bool = False
    head: bool = False
    late: bool = False


RULES: dict[str, Rule] = {
    "SGD": Rule(lambda p: torch.optim.SGD(p, lr=0.2)),
    "momentum": Rule(lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8)),
    "SGD with decay": Rule(lambda p: torch.optim.SGD(p, lr=0.2, weight_decay=0.1)),
    "Adam": Rule(lambda p: torch.optim.Adam(p, lr=0.03)),
    "AdamW": Rule(lambda p: torch.optim.AdamW(p, lr=0.03, weight_decay=0.3, betas=(0.8, 0.9))),
    "Adam with L2": Rule(lambda p: torch.optim.Adam(p, lr=0.03, weight_decay=0.1, eps=1e-4)),
    "SGD, clipped": Rule(lambda p: torch.optim.SGD(p, lr=0.3), clip=0.1),
    "AdamW, clipped": Rule(lambda p: torch.optim.AdamW(p, lr=0.03), clip=0.1),
    "SGD, two groups": Rule(lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.05, momentum=0.5), split=True),
    "AdamW, two groups": Rule(lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1), split=True),
    "head only": Rule(lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.5), head=True),
    "head only, clipped": Rule(lambda p: torch.optim.SGD(p, lr=0.3), head=True, clip=0.1),
    "head only, Adam": Rule(lambda p: torch.optim.Adam(p, lr=0.03), head=True),
    "unfrozen late": Rule(lambda p: torch.optim.Adam(p, lr=0.03), late=True),
}

Order = Callable[[int], Tensor]
BatchOf = Callable[[list[int]], Any]
Objective = Callable[[nn.Module, Any, Tensor], Tensor]
"""The objective on a batch in which sample i counts beta_i times."""


class Training:
    """A model in training.

    Args:
        fresh: makes the model that is trained, the same each time.
        rule: how.
        batch_of: rows to a batch.
        objective: what is minimised.
        order: the rows of the update made at a step.
    """

    def __init__(
        self, fresh: Callable[[], nn.Module], rule: Rule, batch_of: BatchOf, objective: Objective, order: Order
    ) -> None:
        self.fresh, self.rule, self.batch_of, self.objective, self.order = fresh, rule, batch_of, objective, order
        self.model = fresh()
        self.named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        names = list(self.named)
        first, second = names[: len(names) // 2], names[len(names) // 2 :]
        self.late = first if rule.late else []
        groups = [[self.named[n] for n in (second if rule.head else names)]]
        if rule.split and first:
            groups = [[self.named[n] for n in half] for half in (first, second)]
        self.optimizer = rule.make([{"params": group} for group in groups])
        if len(groups) == 2:
            self.optimizer.param_groups[1]["lr"] *= 3
            self.optimizer.param_groups[1]["weight_decay"] *= 3
        self.step = 0

    def copied(self, double: bool = True) -> Training:
        """The same moment in another model, from which training can go on, in float64 or as it is."""
        fresh = (lambda: self.fresh().double()) if double else self.fresh
        return Training(fresh, self.rule, self.batch_of, self.objective, self.order).at(self)

    def at(self, other: Training) -> Training:
        """Go to the moment of another training."""
        self.model.load_state_dict(other.model.state_dict())
        self.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))
        self.step = other.step
        return self

    def run(self, updates: int, beta: Tensor | None = None) -> Training:
        """Make some updates with ``beta (n,)`` as weights of the samples."""
        for _ in range(updates):
            rows = self.order(self.step).tolist()
            weights = torch.ones(len(rows)).double() if beta is None else beta[rows]
            self.optimizer.zero_grad()
            for parameter in self.model.parameters():
                parameter.grad = None
            self.objective(self.model, self.batch_of(rows), weights).backward()
            for name in self.late if self.step < 2 else ():
                self.named[name].grad = None
            if self.rule.clip is not None:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.rule.clip)
            self.optimizer.step()
            self.step += 1
        return self

    def recorded(self, batch_size: int) -> Checkpoint:
        """What a recorder would write down."""
        state = {name: self.optimizer.state.get(p, {}) for name, p in self.named.items()}

        def of(key: str) -> dict[str, Tensor]:
            return {name: kept[key] for name, kept in state.items() if kept.get(key) is not None}

        groups, names = [], {id(p): name for name, p in self.named.items()}
        for group in self.optimizer.param_groups:
            own = tuple(names[id(p)] for p in group["params"])
            groups.append(ParameterGroup(own, group["lr"], group["weight_decay"]))
        most = max(groups, key=lambda group: sum(self.named[n].numel() for n in group.names))
        whole = len(groups) == 1 and len(most.names) == len(self.named)
        facts = self.optimizer.param_groups[0]
        adam = isinstance(self.optimizer, torch.optim.Adam | torch.optim.AdamW)
        optimizer = Optimizer(
            "adam" if adam else "sgd",
            most.learning_rate,
            momentum=facts.get("momentum", 0.0),
            betas=facts.get("betas", (0.9, 0.999)),
            eps=facts.get("eps", 1e-8),
            weight_decay=most.weight_decay,
            decoupled=isinstance(self.optimizer, torch.optim.AdamW),
            batch_size=batch_size,
            clip_norm=self.rule.clip,
            groups=() if whole else tuple(groups),
        )
        return Checkpoint(
            self.step,
            self.model.state_dict(),
            optimizer,
            first_moment=of("exp_avg") if adam else of("momentum_buffer"),
            second_moment=of("exp_avg_sq"),
            update_counts={n: int(k["step"]) for n, k in state.items() if "step" in k and int(k["step"]) != self.step},
        )
