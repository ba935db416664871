"""A node's Docker engine: start it, wait for it, kill it, and the command line that talks to it."""

import http.client
import json
import socket
import time
from pathlib import Path
from typing import Any

from lab import processes
from lab.command import detach
from lab.errors import LabError
from lab.node import Node, execute
from lab.patience import patient
from lab.settings import CGROUP, NETWORK

PID_FILE = "/var/run/docker.pid"  # in the node's own /run
START_TIMEOUT_S = 90


def start(node: Node) -> None:
    """Start dockerd in a running node and wait until it answers.

    Raises LabError with the end of its log when it does not.
    """
    detach(
        node.enter(
            "dockerd",
            "--host=unix:///var/run/docker.sock",  # where services bind it from
            "--host=unix:///run/lab/docker.sock",  # where the lab reaches it from outside
            f"--pidfile={PID_FILE}",
            f"--cgroup-parent=/{CGROUP}/{node.name}",
            "--exec-opt=native.cgroupdriver=cgroupfs",  # no systemd in the node, also where the machine has it
            "--storage-driver=overlay2",
            f"--bip=172.31.{node.number}.1/24",
            f"--insecure-registry={NETWORK}",
            "--max-concurrent-downloads=2",
        ),
        node.engine_log,
        node.dir / "dockerd.pid",
    )
    _wait_until_it_answers(node)


def kill(node: Node) -> None:
    """Kill dockerd with SIGKILL; its tasks go on running, as when an engine crashes.

    Raises LabError when no engine runs in the node.
    """
    if not is_answering(node):
        raise LabError(f"node {node.name} has no running engine to kill; `lab fail {node.name} restart` starts one")
    execute(node, "sh", "-c", f"kill -9 $(cat {PID_FILE})")
    starter = int((node.dir / "dockerd.pid").read_text())
    deadline = time.monotonic() + patient(10)
    while processes.is_alive(starter) and time.monotonic() < deadline:  # nsenter ends when its child has
        time.sleep(0.02)


def is_answering(node: Node) -> bool:
    """Tell whether the engine answers now."""
    try:
        status, _ = _get(node, "/_ping", patient(5))
    except (OSError, http.client.HTTPException):
        return False
    return status == 200


def ask(node: Node, path: str) -> Any:
    """Get a value from the Engine API: what a docker command says, without starting one, which costs more than asking.

    Raises LabError when the engine does not answer, or not with what was asked for.
    """
    try:
        status, said = _get(node, path, patient(60))
    except (OSError, http.client.HTTPException) as error:
        raise LabError(f"the engine of {node.name} does not answer GET {path}: {error}") from error
    if status != 200:
        raise LabError(f"the engine of {node.name} answers GET {path} with {status}: {said.decode(errors='replace')}")
    return json.loads(said)


def _get(node: Node, path: str, patience_s: float) -> tuple[int, bytes]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        channel.settimeout(patience_s)
        channel.connect(str(node.socket))
        channel.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        answer = http.client.HTTPResponse(channel)
        answer.begin()
        return answer.status, answer.read()


def client(root: Path | None) -> tuple[str, ...]:
    """Name the Docker CLI of the same release as the engine.

    An absolute path, because a machine may have another `docker` first in its PATH.
    """
    if root is None:
        return ("/usr/bin/docker",)
    # Started through the root's own loader, so that files named on the command line are the machine's.
    loader = next(iter(sorted((root / "lib64").glob("ld-linux-*"))), None) or next(root.glob("lib/ld-linux-*"))
    libraries = ":".join(str(path) for path in sorted((root / "usr/lib").glob("*-linux-gnu")))
    return (str(loader), "--library-path", libraries, str(root / "usr/bin/docker"))


def _wait_until_it_answers(node: Node) -> None:
    deadline = time.monotonic() + patient(START_TIMEOUT_S)
    while not is_answering(node):
        starter = (node.dir / "dockerd.pid").read_text().strip()
        died = bool(starter) and not processes.is_alive(int(starter))
        if died or time.monotonic() > deadline:
            said = node.engine_log.read_text(errors="replace").strip()[-1500:]
            how = "ended" if died else f"does not answer after {patient(START_TIMEOUT_S):.0f} s"
            raise LabError(f"dockerd of {node.name} {how}; its log ({node.engine_log}) says:\n{said}")
        time.sleep(0.05)
