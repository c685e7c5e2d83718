"""The one configuration schema, for YAML files, the command line and Python."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from stagewise.sampling.chains import Chains
from stagewise.sampling.posterior import LocalPosterior
from stagewise.task import Task

Baseline = Literal["gradient product", "damped influence"]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message lists every fault with the key it is at."""


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Retraining(_Settings):
    """The proof: retrain the window at every checkpoint with each train group's weight changed."""

    weight: float = Field(0.8, ge=0, description="weight of the group during the window; 1 is no change")
    window: int | None = Field(None, gt=0, description="steps; default the posterior's window")
    orders: int = Field(4, gt=0, description="batch orders to average over; one is enough for full batches")
    recorded_order_seed: int | None = Field(None, description="seed of the run's own BatchOrder, if it had one")


class RunConfig(_Settings):
    """Everything that `stagewise run` does. Paths are relative to the configuration file."""

    title: str = Field("stagewise run", description="headline of the report")
    task: str = Field(description="where the Task comes from: 'file.py:function' or 'package.module:function'")
    task_args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of that function")
    checkpoints: Path = Field(description="folder of checkpoints")
    out: Path = Field(description="run folder: traces, results and report")
    steps: tuple[int, ...] | None = Field(None, description="checkpoints to study; default all")
    posterior: LocalPosterior = Field(description="what is sampled: window (or gamma), n_beta, metric, ...")
    sampling: Chains = Field(default_factory=Chains, description="how: sampler, chains, draws, ...")
    baselines: tuple[Baseline, ...] = Field(get_args(Baseline), description="estimators shown beside it")
    retraining: Retraining | None = Field(None, description="measure window effects; needs recorded optimisers")
    exemplars: int = Field(6, ge=0, description="most helpful and harmful samples shown per query and step")
    workers: int | None = Field(None, gt=0, description="processes; default one per core")


_SECTIONS: dict[str, Any] = {"posterior": LocalPosterior, "sampling": Chains, "retraining": Retraining}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML configuration and apply overrides such as ``sampling.draws=200``.

    Raises:
        ConfigError: the file cannot be read, or keys or values are not valid; an unknown key is told
            the nearest valid one.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold keys and values, got {type(content).__name__}")
    for override in overrides:
        _override(content, override)
    config = make_config(content, str(path))
    base = path.resolve().parent
    place = {name: Path(os.path.normpath(base / getattr(config, name))) for name in ("checkpoints", "out")}
    module, _, function = config.task.rpartition(":")
    task = f"{os.path.normpath(base / module)}:{function}" if module.endswith(".py") else config.task
    return config.model_copy(update=place | {"task": task})


def make_config(content: Mapping[str, Any], source: str = "configuration") -> RunConfig:
    """Validate plain values.

    Raises:
        ConfigError: with every fault.
    """
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        faults = "\n".join(f"  {_explain(fault)}" for fault in error.errors())
        raise ConfigError(f"{source} is not valid:\n{faults}") from None


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration; it runs again from there."""
    path.write_text(yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True), encoding="utf-8")


def plain(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain values."""
    values: dict[str, Any] = TypeAdapter(RunConfig).dump_python(config, mode="json")
    return values


def describe() -> str:
    """All settings with their defaults and meaning, for a person."""
    lines = []
    for name, field in RunConfig.model_fields.items():
        default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)}"
        section = _SECTIONS.get(name)
        lines.append(f"{name}: {field.description} ({'section' if section else default})")
        if section is Retraining:
            lines += [f"  {key}: {f.description} (default {f.default})" for key, f in Retraining.model_fields.items()]
        elif section is not None:
            meanings = _documented(section.__doc__ or "")
            lines += [f"  {f.name}: {meanings.get(f.name, '')} (default {f.default})" for f in fields(section)]
    return "\n".join(lines)


def _documented(docstring: str) -> dict[str, str]:
    """The meanings in the Attributes section of a docstring."""
    entries = re.split(r"\n {8}(?=\w+: )", docstring.partition("Attributes:")[2])
    pairs = (" ".join(entry.split()).split(": ", 1) for entry in entries if ": " in entry)
    return {name: meaning.rstrip(".") for name, meaning in pairs}


def load_task(reference: str, arguments: Mapping[str, Any]) -> Task:
    """Import ``file.py:function`` or ``module:function`` and call it.

    Raises:
        ConfigError: it cannot be found, or does not return a Task.
    """
    module_name, separator, name = reference.rpartition(":")
    if not separator:
        raise ConfigError(f"task must be 'file.py:function' or 'module:function', got {reference!r}")
    module = _import(module_name)
    build: Callable[..., Any] | None = getattr(module, name, None)
    if build is None:
        raise ConfigError(f"task: {module_name} has no function {name!r}{_nearest(name, dir(module))}")
    task = build(**arguments)
    if not isinstance(task, Task):
        raise ConfigError(f"task: {reference} returned {type(task).__name__}, expected a stagewise.Task")
    return task


def _import(name: str) -> ModuleType:
    if not name.endswith(".py"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ConfigError(f"task: there is no module {error.name!r} (importing {name!r})") from error
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"task: there is no file {path}")
    if str(path.parent) not in sys.path:  # so that it may import its neighbours, as when run as a script
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"task: {path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # so that losses and models defined there can be pickled
    spec.loader.exec_module(module)
    return module


def _override(content: dict[str, Any], override: str) -> None:
    dotted, separator, value = override.partition("=")
    if not separator:
        raise ConfigError(f"--set takes key=value, e.g. sampling.draws=200, got {override!r}")
    *parents, last = dotted.strip().split(".")
    for parent in parents:
        content = content.setdefault(parent, {})
        if not isinstance(content, dict):
            raise ConfigError(f"--set {dotted}: {parent} is not a section")
    content[last] = yaml.safe_load(value)


def _explain(fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{key}: unknown key{_nearest(str(fault['loc'][-1]), _keys(fault['loc'][:-1]))}"
    return f"{key}: {fault['msg']} (got {fault['input']!r})" if key else str(fault["msg"])


def _keys(location: Sequence[Any]) -> list[str]:
    """The valid keys of the section at ``location``."""
    schema: Any = _SECTIONS[str(location[0])] if location else RunConfig
    return list(schema.model_fields) if issubclass(schema, BaseModel) else [f.name for f in fields(schema)]


def _nearest(name: str, valid: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, [v for v in valid if not v.startswith("_")], n=1, cutoff=0.5)
    shown = [v for v in valid if not v.startswith("_")]
    return f"; did you mean {close[0]!r}?" if close else f"; valid are {', '.join(shown[:20])}"
