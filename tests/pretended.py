"""A device that is not there: tensors that say they live on it, hold real numbers, and refuse what a GPU refuses.

PyTorch takes them for tensors on the device "meta", the only one besides the CPU that every build of it knows. Each
operation on them is carried out on the CPU, by the numbers inside, once it has been seen to stay on one device. So a
whole calculation runs to its end, and its numbers are those of the CPU. What no CPU can show is left open: kernels that
a device lacks, and where its rounding leads.
"""

from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

DEVICE = torch.device("meta")
CPU = torch.device("cpu")

_aten = torch.ops.aten
_INDEXED = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default)


class OtherDeviceError(RuntimeError):
    """What a GPU refuses."""


_refused = []  # all of it since the device is there: whoever catches an error may go on by another way


class OnDevice(Tensor):
    """A tensor that says that it lives on the device.

    Args:
        inner: its numbers.
    """

    @staticmethod
    def __new__(cls, inner):
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=DEVICE
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _carried_out(function, args, kwargs or {})

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function == Tensor.data.__set__ and isinstance(args[1], cls):
            args[0].inner = args[1].inner
        if function == Tensor.tolist:
            return args[0].detach().inner.tolist()
        if function in (Tensor.numpy, Tensor.__array__):
            _refuse(f"a tensor on {DEVICE} cannot be made an array; copy it to the CPU first")
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs or {})


class Generator(torch.Generator):
    """A generator that knows of which device it is, and draws the same numbers on each."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        made.of = torch.device(device)
        return made


class _Device(TorchDispatchMode):
    """Tensors are made on the device where that is asked for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _carried_out(function, args, kwargs or {})


class _Generators(TorchFunctionMode):
    """A generator draws for its own device only."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (generator := kwargs.get("generator")) is not None:
            own, drawn = getattr(generator, "of", CPU), torch.device(kwargs.get("device") or CPU)
            if own != (args[0].device if isinstance(args[0], Tensor) else drawn):
                _refuse(f"{function.__name__}: a generator of {own} draws for another device")
        return function(*args, **kwargs)


@contextmanager
def pretended():
    """Inside there is such a device, and ``torch.Generator`` knows it.

    Raises:
        OtherDeviceError: at the latest at the end, of whatever was refused inside.
    """
    import stagewise.sampling.noise

    _refused.clear()
    patched = [patch.object(where, "Generator", Generator) for where in (torch, stagewise.sampling.noise)]
    with _Device(), _Generators(), patched[0], patched[1]:
        yield DEVICE
    if _refused:
        raise OtherDeviceError(_refused[0])


def _refuse(message):
    _refused.append(message)
    raise OtherDeviceError(message)


def _carried_out(function, args, kwargs):
    """An operation by the numbers inside, on the device where it is, or is asked for."""
    device = torch.device(kwargs["device"]) if kwargs.get("device") else _common(function, args, kwargs)
    inside = _mapped(_inner, kwargs | {"device": CPU} if kwargs.get("device") else kwargs)
    out = function(*_mapped(_inner, args), **inside)
    if device == CPU:
        return out
    return return_and_correct_aliasing(function, args, kwargs, _mapped(_outer, out))


def _common(function, args, kwargs):
    """The device of an operation: numbers that are no arrays may come from the CPU, and indices into another device."""
    if function is _aten.copy_.default:
        return args[0].device
    indices = args[1] if function in _INDEXED and args[0].device != CPU else ()
    tensors = [leaf for leaf in _leaves((*args, *kwargs.values())) if isinstance(leaf, Tensor)]
    bound = [leaf for leaf in tensors if not any(leaf is index for index in indices)]
    found = {leaf.device for leaf in bound if leaf.ndim or leaf.device != CPU}
    if len(found) > 1:
        got = ", ".join(f"{tuple(leaf.shape)} on {leaf.device}" for leaf in tensors)
        _refuse(f"{function}: all tensors must be on one device, got {got}")
    return found.pop() if found else CPU


def _inner(leaf):
    return leaf.inner if isinstance(leaf, OnDevice) else leaf


def _outer(leaf):
    return OnDevice(leaf) if isinstance(leaf, Tensor) else leaf


def _mapped(function, value):
    """What an operation is given or gives, in its lists; torch's own ``tree_map`` takes most of the time here."""
    if isinstance(value, dict):
        return {key: _mapped(function, each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_mapped(function, each) for each in value])
    return function(value)


def _leaves(values):
    for value in values:
        yield from value if isinstance(value, list | tuple) else (value,)
