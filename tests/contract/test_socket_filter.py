"""The filter before the engine's socket, as a process: what it lets through, what it refuses, and what is written."""

import http.client
import http.server
import json
import re
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILTER = ROOT / "deploy" / "socket-filter"
CONTAINER = "0123456789abcdef" * 4


class Engine(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    asked: list[str]
    go_on: threading.Event


class Handler(http.server.BaseHTTPRequestHandler):
    server: Engine

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(404 if "/services/" in self.path else 200)
        self.end_headers()
        self.wfile.write(b"first\n")
        self.wfile.flush()
        if self.path.startswith("/events"):
            self.server.go_on.wait(10)
            self.wfile.write(b"second\n")

    do_POST = do_GET

    def address_string(self) -> str:
        return "filter"

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("engine")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(str(self._path))


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    server = Engine(str(tmp_path / "engine.sock"), Handler)
    server.asked, server.go_on = [], threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def listen(engine: Engine, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "filtered.sock"
    argv = [sys.executable, str(FILTER / "filter.py"), str(FILTER / "allowed.txt"), str(tmp_path / "engine.sock")]
    with (tmp_path / "log").open("w") as log, subprocess.Popen([*argv, str(path)], stderr=log) as process:
        deadline = time.monotonic() + 20
        while not path.exists():
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.02)
        yield path
        process.terminate()


def ask(path: Path, method: str, target: str) -> tuple[int, bytes]:
    connection = Connection(path)
    try:
        connection.request(method, target)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_what_is_listed_passes_with_its_answer(engine: Engine, listen: Path) -> None:
    """With and without a version, with its query, and with the engine's status."""
    assert ask(listen, "GET", "/v1.41/info") == (200, b"first\n")
    assert ask(listen, "GET", f"/containers/{CONTAINER}/json")[0] == 200
    assert ask(listen, "GET", "/v1.41/services/" + "s" * 25)[0] == 404
    assert ask(listen, "GET", "/v1.41/networks?filters=%7B%7D")[0] == 200
    assert engine.asked[0] == "/v1.41/info"
    assert engine.asked[-1] == "/v1.41/networks?filters=%7B%7D"


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("POST", "/v1.41/containers/create"),
        ("POST", "/v1.41/info"),
        ("DELETE", f"/containers/{CONTAINER}"),
        ("HEAD", "/info"),
        ("GET", "/v1.41/swarm"),
        ("GET", "/v1.41/swarm/unlockkey"),
        ("GET", "/v1.41/secrets"),
        ("GET", "/v1.41/configs"),
        ("GET", f"/containers/{CONTAINER}/archive?path=/"),
        ("GET", "/containers/json/../../swarm"),
        ("GET", "/%73warm"),
        ("GET", "//swarm"),
        ("GET", "/info?unknown=1"),
        ("GET", "/containers/web/json"),
    ],
)
def test_everything_else_is_refused_and_logged(
    engine: Engine, listen: Path, tmp_path: Path, method: str, target: str
) -> None:
    """403, nothing reaches the engine, and one line says what was asked."""
    assert ask(listen, method, target)[0] == 403
    assert engine.asked == []
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    refused = [line for line in lines if line["event"] == "refused"]
    assert [(line["method"], line["path"]) for line in refused] == [(method, target.partition("?")[0])]


def test_events_come_as_they_happen(engine: Engine, listen: Path) -> None:
    """The first line of a stream is there before the engine has written the second."""
    connection = Connection(listen)
    connection.request("GET", "/events")
    answer = connection.getresponse()
    assert answer.readline() == b"first\n"
    engine.go_on.set()
    assert answer.read() == b"second\n"
    connection.close()


def test_the_list_in_the_documentation_is_the_list() -> None:
    """docs/security.md shows every call that is allowed, and no other."""
    rows = re.findall(r"^\| `([A-Z]+) (/[^` ]*)` \|([^|]*)\|", (ROOT / "docs/security.md").read_text(), re.MULTILINE)
    shown = {(method, path, frozenset(re.findall(r"`([^`]+)`", query))) for method, path, query in rows}
    lines = [line.split() for line in (FILTER / "allowed.txt").read_text().splitlines()]
    listed = {(m, p, frozenset(q[0].split(",") if q else ())) for m, p, *q in (x for x in lines if x and x[0] != "#")}
    assert shown == listed
