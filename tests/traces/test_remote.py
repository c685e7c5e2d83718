"""A run folder on an object store: what is there is whole, damage is named, mirrors hold nothing of their own."""

import errno
import json
import os
import pickle
import re
import shutil
import sys
from hashlib import sha256
from pathlib import Path

import pytest
from synthetic_cells import bits, make_cell

from object_store import SECRET
from stagewise.explorer.page import store_of
from stagewise.run.config import ConfigError, make_config
from stagewise.traces import remote
from stagewise.traces.identity import identity_text
from stagewise.traces.mirror import local_file, mirror
from stagewise.traces.remote import Remote
from stagewise.traces.store import Cell, RunFolderError, RunMismatchError, TraceStore

IDENTITY, OTHER = {"model": "a" * 64}, {"model": "b" * 64}
CELL = Cell(10, 0, "key")
NAME = f"cells/{CELL.name}"
ALLOW = lambda when, request: True  # noqa: E731


@pytest.fixture
def url(request, cache, object_store):
    """Of a run folder that no other test has."""
    object_store.watch = ALLOW
    return f"s3://bucket/{re.sub('[^a-z0-9]+', '-', request.node.name)}"


def opened(url, **settings):
    return TraceStore.open(url, IDENTITY, **settings)


def written(url):
    store = opened(url)
    store.write(CELL, make_cell())
    return store


def another_machine(cache):
    shutil.rmtree(cache, ignore_errors=True)
    remote._compared.clear()


def content(object_store, url, name):
    """The key and the bytes of the content of a name."""
    run = url.removeprefix("s3://bucket/")
    marker = json.loads(object_store.objects[f"{run}/complete/{name}"])
    place = f"{run}/objects/{marker['sha256']}/"
    ((key, found),) = [(key, found) for key, found in object_store.objects.items() if key.startswith(place)]
    return key, found


def marker_key(url, name):
    return f"{url.removeprefix('s3://bucket/')}/complete/{name}"


@pytest.mark.parametrize("kind", ["s3", "memory", "file"])
def test_every_kind_of_store_gives_back_the_bits_it_was_given_on_a_machine_that_has_nothing(kind, url, cache, tmp_path):
    url = {"s3": url, "memory": "memory://test/run", "file": f"file://{tmp_path}/store/run"}[kind]
    store = opened(url)
    assert not store.is_complete(CELL)
    store.write(CELL, make_cell())
    another_machine(cache)
    assert opened(url).is_complete(CELL)
    another_machine(cache)
    assert bits(TraceStore.read_only(url).load(10)) == bits(make_cell())


def test_a_content_without_its_marker_does_not_exist_even_where_a_mirror_has_it(url, cache, object_store):
    store = written(url)
    object_store.delete(marker_key(url, NAME))
    remote._compared.clear()
    assert (store.steps, store.is_complete(CELL)) == ((), False)
    another_machine(cache)
    store = opened(url)
    assert (store.blocks, store.is_complete(CELL)) == ((), False)
    with pytest.raises(KeyError, match="holds no traces of step 10"):
        store.load(10)
    store.write(CELL, make_cell())
    assert store.is_complete(CELL)


@pytest.mark.parametrize("text", [b'{"size": 12', b"{}", b"[]", b"\xff"])
def test_half_a_marker_is_none(text, url, object_store):
    store = written(url)
    object_store.put(marker_key(url, NAME), text)
    remote._compared.clear()
    assert not store.is_complete(CELL)
    store.write(CELL, make_cell())
    assert store.is_complete(CELL)


def spoil_byte(object_store, url):
    key, found = content(object_store, url, NAME)
    object_store.put(key, found[:100] + bytes([found[100] ^ 1]) + found[101:])


def cut_short(object_store, url):
    key, found = content(object_store, url, NAME)
    object_store.put(key, found[: len(found) // 2])


def take_away(object_store, url):
    object_store.delete(content(object_store, url, NAME)[0])


def other_size(object_store, url):
    key = marker_key(url, NAME)
    object_store.put(key, json.dumps(json.loads(object_store.objects[key]) | {"size": 7}).encode())


@pytest.mark.parametrize(
    ("damage", "told"),
    [(spoil_byte, "is not what"), (cut_short, "is not what"), (take_away, "is missing"), (other_size, "is not what")],
)
def test_damage_in_the_store_is_named_never_used_and_gone_once_the_marker_is_deleted(
    damage, told, url, cache, object_store
):
    written(url)
    damage(object_store, url)
    another_machine(cache)
    store = opened(url)
    for look in (lambda: store.is_complete(CELL), lambda: store.load(10), lambda: store.evidence(10, 0)):
        with pytest.raises(RunFolderError, match=rf"{NAME} {told}.*delete {url}/complete/{NAME} and run again"):
            look()
    assert not [path for path in cache.rglob("*") if path.name.startswith(".partial") or path.suffix == ".zip"]
    object_store.delete(marker_key(url, NAME))
    store.write(CELL, make_cell())
    assert bits(store.load(10)) == bits(make_cell())


def test_a_mirror_that_differs_from_the_store_is_fetched_anew(url, object_store):
    store = written(url)
    cell = store.root / NAME
    cell.write_bytes(cell.read_bytes()[:-1] + b"?")
    store.write_labels(["a"], {"val": None})
    (store.root / "labels.json").write_text("{}")
    remote._compared.clear()  # another process
    again = opened(url)
    assert bits(again.load(10)) == bits(make_cell())
    assert again.labels == {"train": ["a"], "queries": {"val": None}}


def test_a_reader_on_the_machine_of_a_run_leaves_what_it_has_written_and_not_uploaded_yet(url, cache):
    store = opened(url)

    def write(text):
        (store.root / "results").mkdir(exist_ok=True)
        for file in (store.root / "results" / "a.json", store.root / "cells.json"):
            file.write_text(text)

    with store.lock():
        write("old")
        store.push("results", "cells.json")
        write("new")
        reader = TraceStore.read_only(url)
        assert reader.has("cells.json", "results")
        assert local_file(f"{url}/cells.json").read_text() == "new"
        store.push("results", "cells.json")
    another_machine(cache)
    root = TraceStore.read_only(url).root
    assert {(root / name).read_text() for name in ("results/a.json", "cells.json")} == {"new"}


def test_a_full_disk_of_this_machine_is_not_told_as_a_fault_of_the_store(url, cache, monkeypatch):
    written(url)
    another_machine(cache)
    reader = TraceStore.read_only(url)

    async def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("s3fs.S3FileSystem._get_file", full)
    with pytest.raises(RunFolderError, match="free some space"):
        reader.load(10)


def test_a_mirror_of_another_run_is_emptied(url, cache, object_store):
    written(url)
    for key in [key for key in object_store.objects if key.startswith(url.removeprefix("s3://bucket/"))]:
        object_store.delete(key)
    remote._compared.clear()
    root = mirror(Remote(url))
    (root / "results").mkdir()
    store = TraceStore.open(url, OTHER)
    assert {path.name for path in store.root.glob("[!.]*")} == {"cells", "identity.json"}
    assert not list((root / "cells").iterdir())


def test_what_was_taken_out_of_the_store_is_taken_out_of_mirrors(url, object_store):
    store = written(url)
    (store.root / "imported").mkdir()
    (store.root / "imported" / "A.json").write_text("{}")
    store.push("imported/A.json")
    assert (TraceStore.read_only(url).root / "imported" / "A.json").exists()
    object_store.delete(marker_key(url, "imported/A.json"))
    assert not (TraceStore.read_only(url).root / "imported" / "A.json").exists()


def test_a_cell_that_could_not_be_uploaded_is_not_complete_here_either(url, object_store):
    store = opened(url)
    object_store.watch = lambda when, request: not (request.startswith("PUT") and "/complete/" in request)
    with pytest.raises(RunFolderError, match=rf"cannot write {url}: PermissionError"):
        store.write(CELL, make_cell())
    object_store.watch = ALLOW
    assert not store.is_complete(CELL)
    assert not list((store.root / "cells").iterdir())


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(url, cache, object_store):
    store, results = opened(url), mirror(Remote(url)) / "results"

    def write(files):
        shutil.rmtree(results, ignore_errors=True)
        results.mkdir()
        for name, text in files.items():
            (results / name).write_text(text)

    def elsewhere():
        another_machine(cache)
        root = TraceStore.read_only(url).root
        return {path.name: path.read_text() for path in (root / "results").iterdir()}

    first, second = {"a.json": "1", "b.json": "2"}, {"b.json": "3", "c.json": "4"}
    write(first)
    store.push("results")
    assert elsewhere() == first
    write(second)
    object_store.watch = lambda when, request: not (request.startswith("PUT") and "/complete/" in request)
    with pytest.raises(RunFolderError):
        store.push("results")
    object_store.watch = ALLOW
    assert elsewhere() == first
    write(second)
    store.push("results")
    assert elsewhere() == second


def test_what_is_there_already_is_not_uploaded_again(url, object_store):
    store = written(url)
    store.write_labels(["a"], {})
    object_store.requests.clear()
    store.write(CELL, make_cell())
    store.write_labels(["a"], {})
    assert not [request for request in object_store.requests if not request.startswith("GET")]


def test_a_run_of_another_identity_is_refused_by_the_url_before_anything_is_computed(url, object_store):
    written(url)
    before = object_store.objects
    with pytest.raises(RunMismatchError, match=rf"{url} holds another run:\n  model: differs"):
        TraceStore.open(url, OTHER)
    with pytest.raises(RunMismatchError, match=rf"{url} holds step 10.*another key.*delete {url}/complete/"):
        opened(url).is_complete(Cell(10, 0, "another key"))
    assert object_store.objects == before


def test_of_two_different_runs_that_begin_at_once_none_computes_into_the_others_folder(url, object_store):
    theirs = identity_text(OTHER).encode()

    def at_once(when, request):
        if when == "before" and request.startswith("PUT"):
            object_store.watch = ALLOW
            object_store.put(f"{url.removeprefix('s3://bucket/')}/identity/{sha256(theirs).hexdigest()}", theirs)
        return True

    object_store.watch = at_once
    for _ in range(2):  # at once, and ever after
        with pytest.raises(RunFolderError, match="begun by 2 different runs at the same time"):
            opened(url)
    with pytest.raises(RunFolderError, match="begun by 2 different runs at the same time"):
        TraceStore.open(url, OTHER)


def test_two_processes_of_one_run_that_begin_at_once_both_go_on(url, object_store):
    def at_once(when, request):
        if when == "before" and request.startswith("PUT"):
            object_store.watch = ALLOW
            Remote(url).claim(identity_text(IDENTITY))
        return True

    object_store.watch = at_once
    opened(url).write(CELL, make_cell())
    assert opened(url).blocks == ((10, 0),)


def test_a_url_where_no_run_was_begun_is_no_run_folder(url):
    for look in (lambda: TraceStore.read_only(url), lambda: opened(url, create=False)):
        with pytest.raises(RunFolderError, match=f"{url} is no run folder"):
            look()
    with pytest.raises(RunFolderError, match="NoSuchBucket|does not exist|FileNotFound"):
        opened("s3://not-a-bucket/run")


def test_what_the_store_has_not_is_not_shown_from_a_mirror(url):
    store = written(url)
    (store.root / "explorer").mkdir()
    with pytest.raises(FileNotFoundError, match=f"{url} has no explorer yet"):
        store_of(url)
    with pytest.raises(FileNotFoundError, match=f"{url} has no config.yaml yet"):
        local_file(f"{url}/config.yaml")


def test_a_store_that_was_sent_to_another_machine_works_in_the_mirror_there(url, monkeypatch, tmp_path):
    store = written(url)
    sent = pickle.dumps(store)
    monkeypatch.setenv("STAGEWISE_CACHE", str(tmp_path / "there"))
    there = pickle.loads(sent)
    assert there.root.is_relative_to(tmp_path / "there")
    assert there.blocks == ((10, 0),)
    other = Cell(10, 1, "key")
    there.write(other, make_cell(10, 1))
    assert store.is_complete(other)
    assert bits(store.load(10)) == bits(there.load(10))


@pytest.mark.parametrize("text", [f"s3://me:{SECRET}@bucket/a", f"s3://bucket/a?X-Amz-Signature={SECRET}"])
def test_a_url_with_a_secret_is_refused_without_repeating_it(text):
    content = {"task": "a.py:b", "checkpoints": "c", "posterior": {"window": 1}, "out": text}
    for use in (lambda: Remote.parse(text), lambda: make_config(content), lambda: make_config({"out": text})):
        with pytest.raises((ValueError, ConfigError), match="must not carry a password") as error:
            use()
        assert SECRET not in str(error.value)
    assert remote.public(f"GET https://me:{SECRET}@host/a?sig={SECRET} of 'x'?") == "GET https://host/a of 'x'?"


@pytest.mark.parametrize(
    "text", ["s3://bucket", "s3:///a", "s3://bucket/../b", "s3://bucket/a*", "s3://bucket//a", "S3://b/a"]
)
def test_what_is_no_url_of_a_folder_is_refused(text):
    with pytest.raises(ValueError, match=r"expected the url of a folder.*s3://bucket/runs/a"):
        Remote.parse(text)


def test_a_url_that_was_made_a_path_is_refused_and_makes_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="cannot hold a url; give it as text"):
        opened(Path("s3://bucket/a"))
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_told_in_a_line(monkeypatch, cache):
    with pytest.raises(RunFolderError, match=r"needs a package that is not installed: pip install gcsfs$"):
        opened("gs://bucket/a")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(RunFolderError, match=r"pip install 'stagewise\[store\]'$"):
        opened("s3://bucket/a")
