import http.client
import json
import re
import signal
import socket
import subprocess
import sys
from urllib.parse import urlsplit

import made_runs
import pytest
from viewing import TOKEN, served

from stagewise.explorer import serve
from stagewise.explorer.page import write_explorer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_explorer(made_runs.digits(), folder)
    (folder / "config.yaml").write_text("secret: 1")
    return folder


@pytest.fixture(scope="module")
def url(run):
    with served(run) as url:
        yield url


def ask(url, path, method="GET", **headers):
    """Status, headers and body of the answer to a path that nothing has tidied up."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, answer.headers, body


def test_the_page_and_its_data_are_below_the_token(run, url):
    status, headers, body = ask(url, f"/{TOKEN}/")
    assert status == 200
    assert headers["cache-control"] == "no-store"
    assert b"Digits" in body
    kept = (run / "explorer" / "data.zarr" / "zarr.json").read_bytes()
    assert ask(url, f"/{TOKEN}/data.zarr/zarr.json")[2] == kept


@pytest.mark.parametrize(
    "path", ["/", "/wrong/", "/wrong/data.zarr/zarr.json", "/data.zarr/zarr.json", f"/{TOKEN[:-1]}/"]
)
def test_without_the_token_there_is_nothing(url, path):
    assert ask(url, path)[0] == 404


@pytest.mark.parametrize(
    "path",
    [
        "../index.html",
        "../../config.yaml",
        "%2e%2e/%2e%2e/config.yaml",
        "..%2f..%2fconfig.yaml",
        "%2fetc/passwd",
        "/etc/passwd",
    ],
)
def test_nothing_beside_the_store_can_be_read(url, path):
    status, _, body = ask(url, f"/{TOKEN}/data.zarr/{path}")
    assert status == 404
    assert b"secret" not in body
    assert b"root:" not in body


def test_a_link_out_of_the_store_is_not_followed(run, url):
    link = run / "explorer" / "data.zarr" / "out.yaml"
    link.symlink_to(run / "config.yaml")
    assert ask(url, f"/{TOKEN}/data.zarr/out.yaml")[0] == 404


def test_another_host_name_is_refused(url):
    port = urlsplit(url).port
    assert ask(url, f"/{TOKEN}/", Host=f"evil.example:{port}")[0] == 400
    assert ask(url, f"/{TOKEN}/", Host=f"localhost:{port}")[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_can_be_done_but_reading(url, method):
    assert ask(url, f"/{TOKEN}/", method)[0] == 405
    assert ask(url, f"/{TOKEN}/data.zarr/zarr.json", method)[0] == 405
    assert ask(url, f"/{TOKEN}/", "HEAD")[0] == 200


@pytest.mark.parametrize(("asked", "part"), [("bytes=3-9", slice(3, 10)), ("bytes=-5", slice(-5, None))])
def test_ranges_of_bytes_are_answered_by_these_bytes(run, url, asked, part):
    path = "influence/0/value/c/0/0/0"
    whole = (run / "explorer" / "data.zarr" / path).read_bytes()
    status, _, body = ask(url, f"/{TOKEN}/data.zarr/{path}", Range=asked)
    assert (status, body) == (206, whole[part])


def test_only_this_machine_can_connect_and_answers_are_not_held_back():
    with serve.listen() as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
        assert listener.proto == socket.IPPROTO_TCP  # else asyncio leaves Nagle's algorithm on


def test_a_port_that_is_taken_is_refused_with_what_to_do():
    with serve.listen() as listener, pytest.raises(OSError, match=r"cannot be used .*--port"):
        serve.listen(listener.getsockname()[1])


def test_no_two_addresses_are_alike():
    tokens = {serve.new_token() for _ in range(100)}
    assert len(tokens) == 100
    assert all(re.fullmatch(r"[\w-]{22}", token) for token in tokens)


def test_a_page_that_is_written_anew_is_shown_without_starting_again(tmp_path):
    write_explorer(made_runs.hierarchy(), tmp_path)
    with served(tmp_path) as url:
        assert b"Hierarchy" in ask(url, f"/{TOKEN}/")[2]
        write_explorer(made_runs.induction(), tmp_path)
        assert b"Induction" in ask(url, f"/{TOKEN}/")[2]


def test_ctrl_c_ends_the_command_although_a_browser_is_connected(run):
    command = [sys.executable, "-m", "stagewise.cli", "explore", str(run), "--no-browser"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().strip()
        assert urlsplit(url).hostname == "127.0.0.1"
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
        connection.request("GET", urlsplit(url).path)
        assert connection.getresponse().status == 200
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
        assert (process.returncode, errors) == (0, "")
    finally:
        process.kill()


def test_a_folder_that_is_no_run_is_refused_in_a_line(tmp_path):
    command = [sys.executable, "-m", "stagewise.cli", "explore", str(tmp_path), "--no-browser"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert shown.returncode == 1
    assert shown.stderr.startswith("error: ")
    assert len(shown.stderr.splitlines()) == 1
    assert "stagewise report" in shown.stderr


def test_a_page_of_another_writing_of_the_store_gets_none_of_its_numbers(run, url):
    about = json.loads((run / "explorer" / "data.zarr" / "zarr.json").read_text())["attributes"]
    path = f"/{TOKEN}/data.zarr/influence/0/zarr.json"
    assert ask(url, f"{path}?v={about['id']}")[0] == 200
    assert ask(url, f"{path}?v=of-before")[0] == 409
