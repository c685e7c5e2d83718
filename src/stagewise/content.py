"""What functions and values are, by their content: hashes that are the same in every process.

A function is its source text, its defaults, what it closes over and the globals it names, the user's own functions
among them wherever they are defined; what is installed is its name. Numbers, texts, tensors and containers of them are
their content, modules their classes and the shapes of their tensors. Of any other object only the class counts: state
may be a counter or a cache. No hash depends on an address, or on an order that does.

Equal hashes are therefore no proof; :func:`stagewise.identity.probe` is there for the rest.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import linecache
import re
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stagewise.checkpoint import tensor_bytes

_PLAIN = (type(None), bool, int, float, complex, str, bytes, range, np.generic, torch.dtype, torch.Size)
_LIBRARY = Path(sysconfig.get_path("stdlib")).resolve()
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]+")


def content_digest(value: Any, text: bool = True) -> str:
    """Hash of a value's content.

    Args:
        value: anything.
        text: whether functions are their text; else their instructions, which they keep where they are sent to a
            process that has not their file. These change with the version of Python.
    """
    return _Contents(text).digest(value)


class _Contents:
    """One walk through a value; what is met twice, a recursive function for one, is walked through once."""

    def __init__(self, text: bool) -> None:
        self._by_text = text
        self._met: dict[int, str] = {}
        self._alive: list[Any] = []  # so that no address is used twice

    def digest(self, value: Any) -> str:
        if isinstance(value, _PLAIN):
            return _hash(type(value).__name__, repr(value))
        if isinstance(value, type) and value.__module__.startswith("torch.distributed.fsdp"):
            value = value.__bases__[-1]  # in the place of which fully_shard has put this one
        if id(value) not in self._met:
            self._alive.append(value)
            self._met[id(value)] = f"the {len(self._met)}th that was met"
            self._met[id(value)] = _hash(*self._parts(value))
        return self._met[id(value)]

    def _parts(self, value: Any) -> list[str]:
        match value:
            case Tensor() | np.ndarray():
                return ["tensor", _tensor_digest(value)]
            case functools.partial():
                return ["partial", *map(self.digest, (value.func, value.args, value.keywords))]
            case types.MethodType():
                return ["method", self.digest(value.__func__), self.digest(value.__self__)]
            case types.FunctionType():
                return self._function(value)
            case type():
                return self._class(value)
            case nn.Module():
                return self._module(value)
            case dict():
                return ["dict", *sorted(self.digest(key) + self.digest(entry) for key, entry in value.items())]
            case list() | tuple():
                return ["sequence", *map(self.digest, value)]
            case set() | frozenset():
                return ["set", *sorted(repr(entry) if isinstance(entry, _PLAIN) else "object" for entry in value)]
        # What has a name, such as a function of C, is known by it; a cached function is the one inside.
        name = getattr(value, "__qualname__", None)
        inside = getattr(value, "__wrapped__", None) if callable(value) else None
        return ["object", self.digest(type(value)), name if isinstance(name, str) else "", self.digest(inside)]

    def _function(self, function: types.FunctionType) -> list[str]:
        code, home = function.__code__, function.__globals__.get("__name__")
        if _installed(home, code.co_filename):
            # It may be a decorator around a function of the user's.
            return ["installed", str(home), code.co_qualname, self.digest(getattr(function, "__wrapped__", None))]
        bound = [function.__defaults__, function.__kwdefaults__, *_closed_over(function)]
        named = [name + self.digest(value) for name, value in _globals(function)]
        return ["function", self._source(code), *map(self.digest, bound), *named]

    def _source(self, code: types.CodeType) -> str:
        if self._by_text and (text := _lambda_text(code) if code.co_name == "<lambda>" else _text(code)):
            return text
        # Typed into an interpreter or made by exec: the instructions themselves.
        constants = [self._source(c) if isinstance(c, types.CodeType) else self.digest(c) for c in code.co_consts]
        return _hash(code.co_code.hex(), *code.co_names, *constants)

    def _class(self, cls: type) -> list[str]:
        if _installed(cls.__module__):
            return ["installed", cls.__module__, cls.__qualname__]
        parts = ["class", cls.__qualname__, *map(self.digest, cls.__bases__)]
        for name, member in sorted(vars(cls).items()):
            for function in _functions(member):
                parts += [name, self.digest(function)]
        return parts

    def _module(self, module: nn.Module) -> list[str]:
        parts = ["module"]
        for name, layer in module.named_modules():
            parts += [name, self.digest(type(layer)), _ADDRESS.sub("0x", layer.extra_repr())]
        parameters = module.named_parameters(remove_duplicate=False)
        for name, tensor in [*parameters, *module.named_buffers(remove_duplicate=False)]:
            parts += [name, str(tuple(tensor.shape)), str(tensor.dtype), str(tensor.requires_grad)]
        return parts


def _hash(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode(errors="surrogatepass"))
    return digest.hexdigest()


def _tensor_digest(value: Tensor | np.ndarray[Any, Any]) -> str:
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biufc":
            return _hash(str(value.dtype), *(repr(v) if isinstance(v, _PLAIN) else "" for v in value.ravel().tolist()))
        value = torch.from_numpy(np.array(value, order="C"))
    dense = value.to_dense() if value.layout != torch.strided else value
    return hashlib.sha256(tensor_bytes(dense.resolve_conj().resolve_neg())).hexdigest()


def _installed(module: str | None, file: str | None = None) -> bool:
    """Whether code is of Python or of an installed package, and not of the user's own."""
    if module in sys.builtin_module_names:
        return True
    # What a script defines is called __main__ also in another process, whose own script may be a library's.
    scripts = ("__main__", "__mp_main__")
    if module not in scripts:
        file = getattr(sys.modules.get(module or ""), "__file__", None) or file
    if not file:
        return False
    path = Path(file).resolve()
    return (
        file.startswith("<frozen")
        or _LIBRARY in path.parents
        or bool({"site-packages", "dist-packages"} & {*path.parts})
    )


def _closed_over(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            yield "empty"


def _globals(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The globals that a function names, and what it names of the user's own modules.

    What it imports while it runs is not among them.
    """
    names: set[str] = set()
    attributes: set[str] = set()
    for code in _codes(function.__code__):
        names |= {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
        attributes |= {*code.co_names}
    yield from _named(function.__globals__, sorted(names), sorted(attributes), set())


def _named(
    scope: dict[str, Any], names: Iterable[str], attributes: list[str], seen: set[str]
) -> Iterator[tuple[str, Any]]:
    for name in names:
        value = scope.get(name, _named)
        if value is _named:  # a builtin, or not defined yet
            continue
        if not isinstance(value, types.ModuleType):
            yield name, value
        elif value.__name__ not in seen and not _installed(value.__name__):
            seen.add(value.__name__)
            yield from _named(vars(value), attributes, attributes, seen)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of a function and of those inside of it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _functions(member: Any) -> list[Any]:
    """The functions behind a member of a class."""
    if isinstance(member, property):
        return [part for part in (member.fget, member.fset) if part is not None]
    if isinstance(member, staticmethod | classmethod):
        return [member.__func__]
    return [member] if isinstance(member, types.FunctionType | functools.partial) else []


def _text(code: types.CodeType) -> str:
    try:
        return inspect.cleandoc("\n" + inspect.getsource(code))
    except (OSError, TypeError, SyntaxError):
        return ""


def _lambda_text(code: types.CodeType) -> str:
    """Arguments and body of a lambda, without the rest of its line; empty if its text cannot be found."""
    lines = [line.encode() for line in linecache.getlines(code.co_filename)]
    places = [
        ((line, column), (last, end))
        for line, last, column, end in code.co_positions()
        if line and last and column is not None and end
    ]
    if not places or max(last for _, (last, _) in places) > len(lines):
        return ""
    (line, start), (last, end) = min(first for first, _ in places), max(end for _, end in places)
    body = b"".join(lines[line - 1 : last])
    body = body[start : len(body) - len(lines[last - 1]) + end]
    return f"lambda {', '.join(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])}: {body.decode()}"
