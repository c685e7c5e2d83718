"""What a loss depends on: the leaves of its graph are the model's own parameters, and nobody else's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks

from stagewise.plain import objective, plain_losses
from stagewise.task import Batch, Task

_RECOMPUTED = (
    "the model recomputes activations in backward() (torch.utils.checkpoint), when its own parameters are in their "
    "place again; switch activation checkpointing off, which changes no number"
)


def check_strangers(task: Task, params: Mapping[str, Tensor], few: Callable[[], Batch]) -> None:
    """The loss depends on the model's parameters and no others.

    Args:
        task: the task.
        params: where.
        few: reads a few training samples.

    Raises:
        ValueError: it depends on others, or on none, or what it depends on cannot be exchanged.
    """
    model = task.pure.reference(params)

    def strangers() -> list[Tensor]:
        with disable_saved_tensors_hooks(_RECOMPUTED):
            value = objective(task, plain_losses(task, model, task.train, None, few(), grad=True))
        if any("CheckpointFunction" in node.name() for node in _graph(value)):
            raise ValueError(f"train: {_RECOMPUTED}")
        own = {id(parameter) for parameter in model.parameters()}
        if not value.requires_grad:
            raise ValueError(
                "train: the loss does not depend on any parameter that requires a gradient; does it use the model that "
                "it is handed, and outside of torch.no_grad()?"
            )
        return [leaf for leaf in _graph_leaves(value) if id(leaf) not in own]

    found = strangers()
    # What the loss makes anew each time, such as inputs that it differentiates by, is nobody's parameter.
    if found and (kept := [leaf for leaf in strangers() if any(leaf is other for other in found)]):
        raise ValueError(
            f"train: the loss depends on {len(kept)} tensor(s) that require a gradient and are not parameters of "
            f"the model it is given (the first of shape {tuple(kept[0].shape)}): register them in the model "
            "(nn.Parameter, nn.ParameterList), use the model that the loss is handed, or detach them"
        )


def _graph(value: Tensor) -> Iterator[Any]:
    """All nodes of a value's graph."""
    seen: set[Any] = set()
    stack: list[Any] = [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack += [parent for parent, _ in node.next_functions]


def _graph_leaves(value: Tensor) -> list[Tensor]:
    """The tensors that a value is differentiated by: the leaves of its graph."""
    leaves = (getattr(node, "variable", None) for node in _graph(value))
    return [leaf for leaf in leaves if leaf is not None]
