"""Make a Swarm of engines."""

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from lab.command import Completed
from lab.errors import LabError
from lab.node import Node
from lab.patience import patient

Docker = Callable[..., Completed]  # (node, *arguments) -> what the CLI printed


def form(nodes: Sequence[Node], managers: int, docker: Docker, timeout_s: float = 60) -> None:
    """Make the first `managers` nodes managers and the others workers, and wait until all are ready.

    Raises LabError when they are not within `timeout_s` seconds.
    """
    first = nodes[0]
    docker(first, "swarm", "init", "--advertise-addr", str(first.address))
    for node in nodes[1:managers]:  # one after another: each join changes the Raft quorum
        _join(node, first, "manager", docker)
    with ThreadPoolExecutor(max(1, len(nodes))) as pool:
        list(pool.map(lambda node: _join(node, first, "worker", docker), nodes[managers:]))
    deadline = time.monotonic() + patient(timeout_s)
    while (ready := ready_nodes(first, docker)) != {node.name for node in nodes}:
        if time.monotonic() > deadline:
            missing = sorted({node.name for node in nodes} - ready)
            raise LabError(f"{', '.join(missing)} did not become ready; see dockerd.log in the lab's state folder")
        time.sleep(0.2)


def ready_nodes(manager: Node, docker: Docker) -> set[str]:
    """Name the nodes that the manager sees as ready."""
    return {row["Hostname"] for row in members(manager, docker) if row["Status"] == "Ready"}


def members(manager: Node, docker: Docker) -> list[dict[str, str]]:
    """List the Swarm's nodes as `docker node ls` does: Hostname, Status, Availability, ManagerStatus."""
    listed = docker(manager, "node", "ls", "--format", "{{json .}}").stdout
    return [json.loads(line) for line in listed.splitlines()]


def _join(node: Node, manager: Node, role: str, docker: Docker) -> None:
    token = docker(manager, "swarm", "join-token", "-q", role).stdout.strip()
    docker(node, "swarm", "join", "--advertise-addr", str(node.address), "--token", token, f"{manager.address}:2377")
