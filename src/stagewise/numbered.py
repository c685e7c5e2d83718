"""What an optimiser remembers, where its file knows parameters by their number and only the model knows their names.

``torch.save(optimizer.state_dict())`` counts parameters in the order in which the optimiser was given them: those of
the first group, then those of the second. That order is taken to be the model's own within a group, and where there are
two groups, one of them to be spared weight decay. Which parameters are, is settled by the rules in use, and by the
number and the shapes of what is in the file: a rule that fits is believed where no other that fits says something else.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

from torch import Tensor, nn

from stagewise.checkpoint import Checkpoint, CheckpointError, ParameterGroup

_PLACE = re.compile(r"#(\d+)\.(\d+)")

Spared = Callable[[str, nn.Module, Tensor], bool]
"""Whether a parameter, by its name, the module that holds it and itself, is spared weight decay."""

# Of the Trainer of transformers 5 and 4, of scripts in the manner of its examples, and of nanoGPT.
_PATTERNS = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
_SPARED: tuple[Spared, ...] = (
    lambda name, module, _: isinstance(module, nn.LayerNorm) or bool(_PATTERNS.search(name.lower())),
    lambda name, module, _: "norm" in type(module).__name__.lower() or "bias" in name,
    lambda name, _, __: "bias" in name or "LayerNorm.weight" in name,
    lambda _, __, parameter: parameter.dim() < 2,
)


def place(group: int, number: int) -> str:
    """Stands for the name of a parameter of which the file has but the number."""
    return f"#{group}.{number}"


def with_names(model: nn.Module, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the model's names for numbers; without its optimiser, and with a warning, where in doubt."""
    rule = checkpoint.optimizer
    places = [name for group in rule.groups for name in group.names if _PLACE.fullmatch(name)] if rule else []
    if rule is None or not places:
        return checkpoint
    try:
        names = _names(model, checkpoint, places)
    except CheckpointError as error:
        warnings.warn(f"{error}. The checkpoint is used without its optimizer", stacklevel=2)
        return replace(checkpoint, optimizer=None, first_moment={}, second_moment={}, update_counts={})
    named = checkpoint.renamed({name: name for name in checkpoint.params} | names)
    if named.optimizer and _are_all(model, named.optimizer.groups):
        return replace(named, optimizer=replace(named.optimizer, groups=()))
    return named


def _names(model: nn.Module, checkpoint: Checkpoint, places: Sequence[str]) -> dict[str, str]:
    """Names by place."""
    groups: dict[int, list[str]] = {}
    for name in sorted(places, key=lambda name: [int(number) for number in name[1:].split(".")]):
        groups.setdefault(int(name[1:].split(".")[0]), []).append(name)
    shapes = [(n, t.shape) for part in (checkpoint.first_moment, checkpoint.second_moment) for n, t in part.items()]
    parameters = dict(model.named_parameters())
    found: list[dict[str, str]] = []
    for guess in _guesses(model, len(groups)):
        if [len(names) for names in guess] != [len(numbers) for numbers in groups.values()]:
            continue
        names = dict(zip(chain(*groups.values()), chain(*guess), strict=True))
        if names not in found and all(parameters[names[n]].shape == shape for n, shape in shapes):
            found.append(names)
    if len(found) != 1:
        sizes = " and ".join(str(len(numbers)) for numbers in groups.values())
        raise CheckpointError(
            f"the optimizer's file at step {checkpoint.step} has {sizes} parameters by number, whose names "
            + ("could be different ones" if found else "are not those of this model's parameters in any known order")
            + "; freeze (requires_grad_(False)) what was frozen in training, or record the run with stagewise"
        )
    return found[0]


def _guesses(model: nn.Module, groups: int) -> Iterator[list[list[str]]]:
    """Names by group, in order: of all parameters or of the trainable ones, by every rule that makes so many groups."""
    parameters = list(model.named_parameters())
    for chosen in (parameters, [(name, p) for name, p in parameters if p.requires_grad]):
        if groups == 1:
            yield [[name for name, _ in chosen]]
        for spared in _SPARED if groups == 2 else ():
            without = {name for name, p in chosen if spared(name, model.get_submodule(name.rpartition(".")[0]), p)}
            split = [[name for name, _ in chosen if name not in without], [n for n, _ in chosen if n in without]]
            yield split
            yield split[::-1]


def _are_all(model: nn.Module, groups: Sequence[ParameterGroup]) -> bool:
    return len(groups) == 1 and set(groups[0].names) == {name for name, _ in model.named_parameters()}
