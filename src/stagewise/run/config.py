"""The one configuration schema, for YAML files, the command line and Python."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from dataclasses import Field as DataField
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from stagewise.run import yaml12
from stagewise.run.executors import Local, Ray, Slurm
from stagewise.run.places import expanded, placed, portable, portable_task, task_place
from stagewise.run.source import HUB, HubName
from stagewise.sampling.chains import Chains
from stagewise.sampling.posterior import LocalPosterior
from stagewise.sampling.tuning import check_sampler
from stagewise.traces.files import write_text
from stagewise.traces.mirror import mirror, place_of
from stagewise.traces.remote import Remote, public
from stagewise.varied import Per

Estimator = Literal["exact", "bif", "damped", "gradient"]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message lists every fault with the key it is at."""


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Retraining(_Settings):
    """The proof: retrain the window at every checkpoint with each train group's weight changed."""

    weight: float = Field(0.8, ge=0, description="weight of the group during the window; 1 is no change")
    window: int | None = Field(None, gt=0, description="number of updates; default the posterior's window")
    repeats: int | None = Field(
        None, gt=0, description="batch orders to average over; default one where the run's own are known, else four"
    )
    recorded_order_seed: int | None = Field(
        None, description="seed of the run's own BatchOrder; recorded batches need none"
    )


class RunConfig(_Settings):
    """Everything that `stagewise run` does.

    Paths are relative to the configuration file; ``~``, ``$VAR`` and ``${VAR}`` in them are put in.
    """

    title: str = Field("stagewise run", description="headline of the report")
    task: str = Field(
        description="where the Task comes from: 'file.py:function', or 'package.module:function' where the package "
        "is installed or lies beside the configuration"
    )
    task_args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of that function")
    checkpoints: Path | HubName = Field(
        description="folder of checkpoints, or hub:organisation/name of a repository on the Hugging Face Hub whose "
        "revisions are called step0, step1000, ... (else hub:organisation/name@revision-of-{step}); with steps"
    )
    clip_norm: float | None = Field(
        None,
        ge=0,
        description="norm to which the run clipped gradients, 0 if it did not, where the folder of a Trainer, of "
        "accelerate or of FSDP does not say it",
    )
    batch_size: int | None = Field(
        None, ge=0, description="samples of every update of the run, 0 for all, where its folder does not say it"
    )
    out: Path | Remote = Field(
        description="run folder: traces, results and report; or its url on an object store, s3://bucket/runs/a"
    )
    steps: tuple[int, ...] | None = Field(None, description="checkpoints to study; default all")
    posterior: LocalPosterior = Field(description="what is sampled: window (or gamma), n_beta, metric, ...")
    sampling: Chains = Field(default_factory=Chains, description="how: sampler, chains, draws, ...")
    estimators: tuple[Estimator, ...] = Field(
        get_args(Estimator),
        min_length=1,
        description=f"estimators of influence, some of {', '.join(get_args(Estimator))}",
    )
    per: Per | None = Field(
        None,
        description="whose influence each estimator gives: group, sample or token; default groups, or samples where "
        "the task has no train groups",
    )
    retraining: Retraining | None = Field(None, description="measure window effects; needs recorded optimisers")
    two_times: int = Field(
        0, ge=0, description="at how many later steps to ask what earlier training did to the queries; 0: at none"
    )
    exemplars: int = Field(6, ge=0, description="most helpful and harmful samples shown per query and step")
    executor: Annotated[Local | Ray | Slurm, Field(discriminator="name")] = Field(
        default_factory=Local,
        description="where cells are computed: local, ray or slurm, or a section with the name and its settings",
    )
    workers: int | None = Field(
        None,
        gt=0,
        description="cells at the same time; default one per core, or per GPU if the model lives on GPUs, as "
        "many as a Ray cluster has room for, or those of executor.jobs, which counts more than this",
    )

    @field_validator("task", "checkpoints", "out", mode="before")
    @classmethod
    def _expand(cls, value: Any, info: ValidationInfo) -> Any:
        if info.field_name == "checkpoints":
            if isinstance(value, str) and value.startswith(HUB):
                return HubName.parse(value)
            if not isinstance(value, str | Path | HubName):
                raise ValueError(f"expected a folder, or {HUB}organisation/name")
        if info.field_name == "out":
            return place_of(expanded(value) if isinstance(value, str) else value)
        return expanded(value) if isinstance(value, str) else value

    @field_validator("executor", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        return {"name": "local"} | value if isinstance(value, dict) else value

    @field_serializer("checkpoints", "out")
    def _as_text(self, source: Path | HubName | Remote) -> str:
        return str(source)

    @property
    def folder(self) -> Path:
        """Where this machine keeps the run folder: ``out``, or the mirror of a url."""
        return mirror(self.out) if isinstance(self.out, Remote) else self.out

    @model_validator(mode="after")
    def _name_steps(self) -> RunConfig:
        if isinstance(self.checkpoints, HubName) and not self.steps:
            raise ValueError(
                f"steps: name those to fetch from {self.checkpoints}, e.g. steps: [0, 512, 143000]; a published run "
                "has many, each as large as the model"
            )
        return self

    @model_validator(mode="after")
    def _know_the_posterior(self) -> RunConfig:
        check_sampler(self.posterior, self.sampling)
        return self


_SAVED_IN = "saved_in"  # in a saved configuration: the folder it was saved in

_SECTIONS: dict[str, Any] = {"posterior": LocalPosterior, "sampling": Chains, "retraining": Retraining}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML configuration and apply overrides such as ``sampling.draws=200``.

    A run folder that was moved runs from where it is: what its saved configuration names is looked for beside it
    first, and then where it was when it was saved.

    Raises:
        ConfigError: the file cannot be read, or keys or values are not valid; an unknown key is told
            the nearest valid one.
    """
    path = Path(path)
    try:
        content = _parsed(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read the configuration {path}: it is not a text file ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold keys and values, got {type(content).__name__}")
    here = path.resolve().parent
    folders = [here, *(Path(folder) for folder in [content.pop(_SAVED_IN, None)] if folder)]
    for override in overrides:
        _override(content, override)
    config = make_config(content, str(path))
    return config.model_copy(
        update={
            "task": task_place(config.task, folders),
            "checkpoints": _source(config.checkpoints, lambda path: placed(path, folders)),
            "out": config.out if isinstance(config.out, Remote) else placed(config.out, [here]),
        }
    )


def make_config(content: Mapping[str, Any], source: str = "configuration") -> RunConfig:
    """Validate plain values.

    Raises:
        ConfigError: with every fault.
    """
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        faults = "\n".join(f"  {_explain(fault)}" for fault in error.errors())
        raise ConfigError(public(f"{source} is not valid:\n{faults}")) from None


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration into its run folder; it runs from there again, also after a move."""
    folder = Path(path).absolute().parent
    near = None if isinstance(config.out, Remote) else folder  # nothing is moved together with a mirror
    places = {
        "task": portable_task(config.task, near),
        "checkpoints": str(_source(config.checkpoints, lambda path: portable(path, near))),
        "out": str(config.out).replace("$", "$$") if isinstance(config.out, Remote) else portable(config.out, near),
    } | ({} if near is None else {_SAVED_IN: str(near)})
    write_text(path, yaml12.dump(plain(config) | places))


def _source(source: Path | HubName, place: Callable[[Path], Any]) -> Any:
    """Where a folder is; a repository is the same from everywhere."""
    return source if isinstance(source, HubName) else place(source)


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
            lines += [f"  {f.name}: {meanings.get(f.name, '')} (default {_default(f)})" for f in fields(section)]
    return "\n".join(lines)


def _default(setting: DataField[Any]) -> Any:
    return setting.default if setting.default_factory is MISSING else setting.default_factory()


def _documented(docstring: str) -> dict[str, str]:
    """The meanings in the Attributes section of a docstring."""
    text = inspect.cleandoc(docstring)  # Python 3.13 has dedented it already
    attributes = re.split(r"\n(?=\S)", text.partition("Attributes:")[2])[0]
    entries = re.split(r"\n {4}(?=\w+: )", attributes)
    pairs = (" ".join(entry.split()).split(": ", 1) for entry in entries if ": " in entry)
    return {name: meaning.rstrip(".") for name, meaning in pairs}


def _parsed(text: str, source: str) -> Any:
    try:
        return yaml12.load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from error


def _override(content: dict[str, Any], override: str) -> None:
    dotted, separator, value = override.partition("=")
    if not separator:
        raise ConfigError(f"--set takes key=value, e.g. sampling.draws=200, got {override!r}")
    *parents, last = dotted.strip().split(".")
    for parent in parents:
        if content.get(parent) is None:
            content[parent] = {}
        elif parent == "executor" and isinstance(content[parent], str):
            content[parent] = {"name": content[parent]}
        content = content[parent]
        if not isinstance(content, dict):
            raise ConfigError(f"--set {dotted}: {parent} is not a section")
    content[last] = _parsed(value, f"--set {dotted}")


def _explain(fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{key}: unknown key{nearest(str(fault['loc'][-1]), _keys(fault['loc'][:-1]))}"
    meaning = str(fault["msg"]).removeprefix("Value error, ")
    return f"{key}: {meaning} (got {fault['input']!r})" if key else meaning


def _keys(location: Sequence[Any]) -> list[str]:
    """The valid keys of the section at ``location``."""
    schema: Any = _SECTIONS.get(str(location[0])) if location else RunConfig
    if schema is None:  # one of several, by its name
        schema = {"local": Local, "ray": Ray, "slurm": Slurm}[str(location[-1])]
    return list(schema.model_fields) if issubclass(schema, BaseModel) else [f.name for f in fields(schema)]


def nearest(name: str, valid: Sequence[str]) -> str:
    """The end of a message about a name that does not exist: the one that was probably meant, or those there are."""
    close = difflib.get_close_matches(name, [v for v in valid if not v.startswith("_")], n=1, cutoff=0.5)
    shown = [v for v in valid if not v.startswith("_")]
    return f"; did you mean {close[0]!r}?" if close else f"; valid are {', '.join(shown[:20])}"
