"""The names that transformers' files have for a model's tensors, as that model's own loading understands them.

Files of Pythia say ``embed_out.weight`` for what the model of today calls ``lm_head.weight``, and hold attention masks
that it makes by itself. transformers is never imported here: a model of it has brought it along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

from torch import nn


def is_of_transformers(module: nn.Module) -> bool:
    """Whether a module is loaded by transformers' own rules."""
    kinds = ((kind.__module__, kind.__name__) for kind in type(module).__mro__)
    return ("transformers.modeling_utils", "PreTrainedModel") in kinds


def translated(module: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The names of a file to those of a transformers model.

    Names that the model loads nothing from, by its own account (buffers of earlier versions), are left out. Those that
    it does not know, or would make one tensor of several from, stay as they are.
    """
    own, rename = module.state_dict(), _renaming(module)
    found = {name: rename(name) for name in names}
    foreign = {ours for ours in found.values() if ours not in own}
    ignored = foreign - _unexpected(module, foreign)
    return {name: ours if ours in own else name for name, ours in found.items() if ours not in ignored}


def _renaming(module: nn.Module) -> Callable[[str], str]:
    """As transformers renames what it finds in a file; nothing where this version of it has no such rules."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return str
    model: Any = module
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    own, prefix = model.state_dict(), model.base_model_prefix

    def rename(name: str) -> str:
        new, converted = rename_source_key(name, renamings, converters, prefix, own)
        if new not in own and name in own:
            new, converted = rename_source_key(name, [], [], prefix, own)
        return name if converted else new

    return rename


def _unexpected(module: Any, names: set[str]) -> set[str]:
    """Those that the model does not pass over when it is loaded."""
    info = SimpleNamespace(missing_keys=set(), unexpected_keys=set(names))
    module._adjust_missing_and_unexpected_keys(info)
    return set(info.unexpected_keys)
