"""Runs whose checkpoints are the revisions of a repository on the Hugging Face Hub, as Pythia's and OLMo's are.

Files are fetched when a checkpoint is read, by the hub's own client into its own cache.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stagewise.checkpoint import Checkpoint, CheckpointError
from stagewise.checkpoints.hub_cache import cached_revisions, repository_folder
from stagewise.checkpoints.weights import INSIDE_FOLDER, read_weights, reason_of, shards_of

# An update at a rate of 0, as a warm-up begins, moves nothing.
_MAY_BE_EQUAL = {0, 1}


@dataclass(frozen=True)
class HubRun:
    """Checkpoints of one repository; can be sent to worker processes.

    Attributes:
        repository: ``organisation/name``.
        revisions: branch or tag by step.
        cache: folder of the hub's cache.
        local: use what the cache has, and no network.
    """

    repository: str
    revisions: Mapping[int, str]
    cache: Path
    local: bool

    def load(self, step: int) -> Checkpoint:
        """Fetch and read one checkpoint.

        Raises:
            CheckpointError: it cannot be fetched or read, or is the same file as that of another step.
        """
        if step not in self.revisions:
            raise KeyError(f"no checkpoint of step {step}; there are {sorted(self.revisions)}")
        file = self._weights(self.revisions[step])
        self._check_own(file, step)
        return Checkpoint(step, read_weights(file)[0])

    def _weights(self, revision: str) -> Path:
        """The file of weights, or their index with all its parts beside it."""
        for name in INSIDE_FOLDER:
            if file := self._fetched(name, revision):
                for part in shards_of(file) if file.suffix == ".json" else ():
                    if self._fetched(part, revision) is None:
                        raise CheckpointError(f"{self._at(revision)} lacks {part}, which {name} names{self._hint()}")
                return file
        raise CheckpointError(f"{self._at(revision)} has none of {', '.join(INSIDE_FOLDER)}{self._hint()}")

    def _fetched(self, name: str, revision: str) -> Path | None:
        """One file in the cache; None where the revision has no such file."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        fetch = partial(hf_hub_download, self.repository, name, revision=revision, cache_dir=self.cache)
        try:
            return Path(_asked(self.repository, revision, lambda: fetch(local_files_only=self.local)))
        except LocalEntryNotFoundError as error:
            if self.local:
                return None
            raise CheckpointError(
                f"cannot reach the Hugging Face Hub for {self._at(revision)} ({_cause(error)}), and {name} is not in "
                f"the cache {self.cache}; try again with a network, or pass local_files_only=True to read what it has"
            ) from error
        except EntryNotFoundError:
            return None

    def _check_own(self, file: Path, step: int) -> None:
        """Some published runs have the same weights under several steps: then at least one step is not true."""
        parts = [file.with_name(name) for name in shards_of(file)] if file.suffix == ".json" else [file]
        commits = cached_revisions(repository_folder(self.cache, self.repository))
        snapshots = file.parent.parent
        for other, revision in self.revisions.items():
            if other == step or {step, other} <= _MAY_BE_EQUAL or revision not in commits:
                continue
            for part in parts:
                twin = snapshots / commits[revision] / part.name
                if twin.is_file() and twin.resolve() == part.resolve():
                    raise CheckpointError(
                        f"{self._at(self.revisions[step])} has the very file {part.name} that {revision!r} has, so "
                        "that one of the two is not of its step; ask those who published it, and leave these steps out"
                    )

    def _at(self, revision: str) -> str:
        return f"{self.repository} at revision {revision!r}"

    def _hint(self) -> str:
        if not self.local:
            return ""
        return (
            f" in the cache {self.cache}, and no network is used (local_files_only or HF_HUB_OFFLINE); fetch it once "
            "with a network"
        )


def hub_run(
    repository: str,
    steps: Iterable[int] | None,
    revision: str,
    cache_dir: str | Path | None,
    local_files_only: bool,
) -> HubRun:
    """The run of a repository, see :meth:`stagewise.Trajectory.from_hub`."""
    try:
        from huggingface_hub import constants
    except ImportError as error:
        raise ImportError("checkpoints from the hub need huggingface_hub: pip install 'stagewise[hf]'") from error
    if revision.count("{step}") != 1:
        raise ValueError(f"revision must have {{step}} in it once, e.g. 'step{{step}}', got {revision!r}")
    wanted = None if steps is None else sorted({int(step) for step in steps})
    if wanted is not None and (not wanted or wanted[0] < 0):
        raise ValueError(f"steps must be one or more numbers of updates, not negative, got {wanted}")
    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    local = local_files_only or constants.is_offline_mode()
    if wanted is not None and "*" not in revision:
        return HubRun(repository, {step: revision.replace("{step}", str(step)) for step in wanted}, cache, local)
    names = _listed(repository, cache, local)
    where = f"the cache {cache} of {repository}" if local else repository
    found = _by_step(names, revision, where)
    if lacking := [step for step in wanted or () if step not in found]:
        raise CheckpointError(f"{where} has no revision {revision!r} of step {lacking[0]}; there are {list(found)}")
    return HubRun(repository, {step: found[step] for step in wanted or found}, cache, local)


def _listed(repository: str, cache: Path, local: bool) -> list[str]:
    """All branches and tags, or those that the cache knows."""
    if local:
        return list(cached_revisions(repository_folder(cache, repository)))
    from huggingface_hub import HfApi

    refs = _asked(repository, None, lambda: HfApi().list_repo_refs(repository))
    return [ref.name for ref in (*refs.branches, *refs.tags)]


def _by_step(names: Iterable[str], revision: str, where: str) -> dict[int, str]:
    pattern = re.escape(revision).replace(r"\{step\}", "([0-9]+)").replace(r"\*", ".*")
    found: dict[int, str] = {}
    for name in dict.fromkeys(names):
        if match := re.fullmatch(pattern, name):
            first = found.setdefault(int(match[1]), name)
            if first != name:
                raise CheckpointError(
                    f"{where} has {first!r} and {name!r}, both of step {match[1]}: say which is meant"
                )
    if not found:
        known = ", ".join(list(dict.fromkeys(names))[:5]) or "none"
        raise CheckpointError(f"{where} has no revision like {revision!r}; revisions: {known}")
    return dict(sorted(found.items()))


def _asked(repository: str, revision: str | None, ask: Callable[[], Any]) -> Any:
    """What the hub answers; that it cannot is said in one line."""
    from huggingface_hub import errors

    # The client's HTTP library is another from version to version.
    http_error: Any = errors.HfHubHTTPError.__bases__[0]
    at = f"{repository} at revision {revision!r}" if revision else repository
    try:
        return ask()
    except errors.EntryNotFoundError:
        raise
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repository} has no revision {revision!r} on the Hugging Face Hub") from error
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repository} is gated: ask for access on its page, and log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"there is no model {repository} on the Hugging Face Hub, or it is private: check its name, or log in with "
            "`hf auth login`"
        ) from error
    except (errors.HFValidationError, OSError, http_error) as error:
        raise CheckpointError(
            f"cannot get {at} from the Hugging Face Hub: {reason_of(error)}; to read what was fetched before, pass "
            "local_files_only=True"
        ) from error


def _cause(error: Exception) -> str:
    """The network's own word, which the hub's client hides behind advice."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return reason_of(error)
