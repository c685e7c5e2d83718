"""A module as a pure function of its tensors.

torch's ``functional_call`` swaps tensors by name and loses those of a layer that is reached by two paths; and it works
on the module it is given. Here the user's module is never touched: a second set of modules shares its parameters, and
every place that holds a tensor is known once.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from stagewise.checkpoint import lifted
from stagewise.ranks import ALONE, Alone
from stagewise.twice import differentiate_twice

WRAPPERS_OF_LAYERS = ("_orig_mod", "_checkpoint_wrapped_module")
"""What ``torch.compile`` and activation checkpointing put into the names of parameters."""

Value = Callable[[Mapping[str, Tensor]], Tensor]
"""A number that is computed from parameters and buffers by name."""


class PureModel:
    """Stands in for the user's model wherever losses are computed.

    Args:
        model: the user's module; wrappers (``torch.compile``, data parallelism) are taken off.

    Attributes:
        module: modules of our own, which share the user's parameters and hold copies of the buffers.
        state: parameters and buffers by name, as the user handed them in, tied ones once.
        persistent: names in the model's ``state_dict``, tied ones once.
        canonical: every name a tensor has (tied weights have several, layers in wrappers one without them) to the one
            used here.
        leftovers: attributes in which an earlier forward pass of the user's left something; NaN here.
        padding: rows of embeddings that have no gradient by their definition (``padding_idx``), by parameter name.
        still: those of them that have none by another layer either (a head tied to the embedding).

    Raises:
        ValueError: the model is TorchScript, has lazy parameters, or cannot be copied.
    """

    in_place = False
    """Whether tensors are written into the user's module, see :class:`stagewise.in_place.InPlaceModel`."""

    ranks: Alone = ALONE
    """The processes that hold the model."""

    def __init__(self, model: nn.Module) -> None:
        model = unwrapped(model)
        _refuse_unready(model)
        self.module = _twin(model)
        self.leftovers = [f"{name}.{key}".strip(".") for name, _, key, _ in _left_behind(model)]
        self._kept = _contents(self.module)
        self._places: dict[str, list[tuple[Any, Any]]] = {}
        self.state: dict[str, Tensor] = {}
        self.canonical: dict[str, str] = {}
        names: dict[int, str] = {}
        for name, tensor in [
            *self.module.named_parameters(remove_duplicate=False),
            *self.module.named_buffers(remove_duplicate=False),
        ]:
            first = names.setdefault(id(tensor), name)
            self.canonical[name] = first
            self.state.setdefault(first, tensor)
        for holder, key, tensor in _holders(self.module):
            if id(tensor) in names:
                self._places.setdefault(names[id(tensor)], []).append((holder, key))
        self.canonical = with_bare_names(self.canonical)
        self.padding = {
            names[id(module.weight)]: module.padding_idx
            for module in self.module.modules()
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.padding_idx is not None
        }
        self.still = {name: row for name, row in self.padding.items() if len(self._places[name]) == 1}
        kept = self.module.state_dict(keep_vars=True)
        self.persistent = {self.canonical[name] for name in kept if name in self.canonical}

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that require a gradient, by name."""
        return {name: tensor for name, tensor in self.module.named_parameters() if tensor.requires_grad}

    def entries(self, name: str) -> int:
        """How many numbers a tensor is, on all processes together."""
        return self.state[name].numel()

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """What is here of a whole tensor of this name: all of it."""
        del name
        return tensor

    def add_slopes(self, params: Mapping[str, Tensor], values: Sequence[Value], parts: Mapping[str, Tensor]) -> None:
        """Add the gradient of a sum of numbers, which are computed from ``params``, to ``parts`` by name."""
        leaves = {name: params[name].detach().requires_grad_() for name in parts}
        for leaf, part in zip(leaves.values(), parts.values(), strict=True):
            leaf.grad = part  # to which backward() adds in place
        params = {**params, **leaves}
        for value in values:
            if (found := value(params)).requires_grad:
                torch.autograd.backward(found, inputs=list(leaves.values()))

    @contextmanager
    def holding(self, tensors: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """The module with ``tensors`` in the place of its own; afterwards it is as before, whatever happens inside."""
        before = [(holder, key, holder[key]) for name in tensors for holder, key in self._places[name]]
        try:
            for name, tensor in tensors.items():
                for holder, key in self._places[name]:
                    holder[key] = tensor
            yield self.module
        finally:
            for holder, key, tensor in before:
                holder[key] = tensor
            _restore(self._kept)

    def refuse(self) -> None:
        """Refuse a model whose losses are no function of dense real tensors.

        Raises:
            ValueError: with the layer or parameter, and what to do.
        """
        for name, module in self.module.named_modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
                raise ValueError(
                    f"{_kind(module, name)} has max_norm, so that evaluating the loss changes {name + '.weight'!r}; "
                    "set max_norm=None, and normalise the rows in forward() if training needs it"
                )
        for name, tensor in self.state.items():
            if isinstance(tensor, nn.Parameter) and not tensor.is_floating_point():
                raise ValueError(
                    f"parameter {name!r} is {tensor.dtype}; only real floating-point parameters can move. Hold a "
                    "complex one as two real ones (torch.view_as_complex in forward()), anything else as a buffer"
                )
            if tensor.layout != torch.strided:
                raise ValueError(f"{name!r} has the layout {tensor.layout}; make it dense (tensor.to_dense())")
        if not self.trainable:
            raise ValueError(
                "no parameter of the model requires a gradient, so that none could have been trained; call "
                "requires_grad_(True) on those that training moved"
            )

    def reference(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> nn.Module:
        """An ordinary module with copies of ``tensors`` as its parameters and buffers: training as PyTorch does it.

        Args:
            tensors: by name; those left out are the model's own.
            dtype: of all floating-point tensors; default their own.
        """
        twin = _twin(self.module, shared=False)
        parameters = dict(twin.named_parameters()) | dict(twin.named_buffers())
        for name, tensor in (self.state | dict(tensors)).items():
            value = lifted(tensor)
            if dtype is not None and value.is_floating_point():
                value = value.to(dtype)
            parameters[name].data = value
        return twin


def without_wrappers(name: str, wrappers: Collection[str] = WRAPPERS_OF_LAYERS) -> str:
    """A tensor's name without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in wrappers)


def with_bare_names(canonical: Mapping[str, str]) -> dict[str, str]:
    """The names of tensors, and those that they have without the wrappers of single layers."""
    return {without_wrappers(name): own for name, own in canonical.items()} | dict(canonical)


def unwrapped(model: nn.Module) -> nn.Module:
    """The bare module inside of ``torch.compile`` and data-parallel wrappers."""
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _refuse_unready(model: nn.Module) -> None:
    """Refuse modules of which there cannot be a second set."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{_kind(module, name)} is TorchScript, whose parameters cannot be exchanged; build the Task with the "
                "Python module that was scripted or traced, and its state_dict"
            )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ValueError(f"{name!r} of a lazy layer has no shape yet; run one batch through the model first")


def _kind(module: nn.Module, name: str) -> str:
    return f"{type(module).__name__} ({name or 'the model itself'})"


def _twin(model: nn.Module, shared: bool = True) -> nn.Module:
    """A copy of the modules. Parameters are shared (or copied too), buffers are copied."""
    # What an earlier forward pass left behind is in the way of copying, and must not be used: it is of other weights.
    memo: dict[int, Any] = {id(value): torch.full_like(value, torch.nan) for _, _, _, value in _left_behind(model)}
    if shared:
        memo |= {id(parameter): parameter for parameter in model.parameters()}
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(
            f"the model cannot be copied ({type(error).__name__}: {error}), and the one that was handed in is never "
            "touched; keep files, locks and generators out of it, or give it a __deepcopy__"
        ) from error
    for module in twin.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.sparse = False  # the same gradient, dense
        differentiate_twice(module)
    return twin


@contextmanager
def unchanged(module: nn.Module) -> Iterator[nn.Module]:
    """The module; what its forward pass keeps in attributes (caches, last activations) is taken away afterwards."""
    kept = _contents(module)
    try:
        yield module
    finally:
        _restore(kept)


def _contents(module: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The attributes and buffers of all modules, and what is in them."""
    places = (place for part in module.modules() for place in (vars(part), part._buffers))
    return [(place, dict(place)) for place in places]


def _restore(kept: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    for place, before in kept:
        if place.keys() != before.keys() or not all(map(operator.is_, place.values(), before.values())):
            place.clear()
            place.update(before)


def _left_behind(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Attributes that hold a computed tensor: module's name, module, attribute, tensor."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                yield name, module, key, value


def _holders(model: nn.Module) -> Iterator[tuple[Any, Any, Tensor]]:
    """Every place in which a module keeps a tensor: registered, or in a list or dict of its own (as LSTM does)."""
    for module in model.modules():
        for registered in (module._parameters, module._buffers):
            for key, tensor in registered.items():
                if tensor is not None:
                    yield registered, key, tensor
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            if isinstance(value, Tensor):
                yield vars(module), name, value
            elif isinstance(value, list | dict):
                entries: Any = value.items() if isinstance(value, dict) else enumerate(value)
                for key, tensor in list(entries):
                    if isinstance(tensor, Tensor):
                        yield value, key, tensor
