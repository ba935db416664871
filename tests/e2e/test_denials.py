"""Who tried what, on a real Swarm: denials by name and with counts, observe, and suggestions that come true."""

import json
import re
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from proof.claims import API, DB, SPY
from proof.deployed import DEMO, Deployed, Task, wait_for

pytestmark = pytest.mark.e2e

PORTS = {API: 8080, DB: 6379}


def denials(mesh: Deployed, destination: str, *, dropped: bool) -> dict[str, Any] | None:
    """What is known of spy's attempts at the service, or None."""
    found = mesh.ask("denials", "-s", DEMO)["items"]
    ours = (SPY, destination, PORTS[destination], dropped)
    return next((it for it in found if (it["source"], it["destination"], it["port"], it["dropped"]) == ours), None)


def counts(mesh: Deployed, *services: str, dropped: bool = True) -> dict[str, int]:
    """How often spy tried each of the services, in one answer."""
    found = mesh.ask("denials", "-s", DEMO)["items"]
    known = {(it["source"], it["destination"], it["port"], it["dropped"]): int(it["count"]) for it in found}
    return {service: known.get((SPY, service, PORTS[service], dropped), 0) for service in services}


def settled_counts(mesh: Deployed, *services: str, dropped: bool = True) -> dict[str, int]:
    """The counts once they stand still: the controller may answer from what it asked the agents two seconds ago."""
    last: dict[str, int] = {}
    while (now := counts(mesh, *services, dropped=dropped)) != last:
        last = now
        time.sleep(2.5)
    return now


def target(mesh: Deployed, service: str) -> tuple[Task, str]:
    """A task of the service and its address: behind a VIP another address would be seen as the client's."""
    task = mesh.tasks(service)[0]
    return task, mesh.addresses(task)[0]


def reaches(mesh: Deployed, spy: Task, host: str, port: int) -> bool:
    return bool(mesh.probe(spy, "tcp", host, str(port), timeout_s=1).get("outcome") == "reached")


def noted(mesh: Deployed, task: Task, source: str, port: int) -> int:
    """Packets from the address to the port that the kernel lists: in the task's namespace and in its network's.

    The guard outside of the task comes first; without it the task's own rules see the same packets.
    """
    table = "nft -j list set {} hivewire denied_no_link_in"
    inside = mesh.in_namespace(task, *table.format("inet").split(), check=False)
    look = f"for f in /var/run/docker/netns/[0-9]*-*; do nsenter --net=$f {table.format('bridge')}; done 2>/dev/null"
    outside = mesh.lab.exec(task.node, "sh", "-c", look, check=False).stdout
    total = 0
    for line in (*inside.splitlines(), *outside.splitlines()):
        for it in json.loads(line)["nftables"]:
            for element in it.get("set", {}).get("elem", []):
                ours, _, _, there = element["elem"]["val"]["concat"]
                total += element["elem"]["counter"]["packets"] if (ours, there) == (source, port) else 0
    return total


@contextmanager
def labelled(mesh: Deployed, service: str, *labels: str) -> Iterator[None]:
    """The service has these labels while the block runs."""
    mesh.update(service, *(word for label in labels for word in ("--label-add", label)))
    try:
        yield
    finally:
        mesh.update(service, *(word for label in labels for word in ("--label-rm", label.partition("=")[0])))
        mesh.wait_ready(90)


def test_denials_name_who_tried_and_how_often(mesh: Deployed) -> None:
    """Spy's attempts at tasks of api and db are listed by service, with the kernel's own count."""
    spy = mesh.tasks(SPY)[0]
    (source,) = mesh.addresses(spy)
    targets = {service: target(mesh, service) for service in (API, DB)}
    before = settled_counts(mesh, *targets)
    packets = {service: noted(mesh, task, source, PORTS[service]) for service, (task, _) in targets.items()}
    for service, (_, address) in targets.items():
        for _ in range(3):
            assert not reaches(mesh, spy, address, PORTS[service])
    more = {s: noted(mesh, task, source, PORTS[s]) - packets[s] for s, (task, _) in targets.items()}
    assert min(more.values()) >= 3
    expected = {service: before[service] + more[service] for service in targets}
    wait_for(f"{more} more denials", lambda: counts(mesh, *targets) == expected, 30, 1.0)
    for service in targets:
        found = denials(mesh, service, dropped=True)
        assert found is not None
        assert (found["protocol"], found["reasons"]) == ("tcp", ["no_link"])
    status, listed = mesh.cli("status"), mesh.cli("denials", "-s", DEMO, "--since", "5m")
    print(status, listed, sep="\n")
    assert re.search(r"[0-9]+ in the last 5 min", status)
    assert SPY in listed


def test_observe_lets_pass_and_lists(mesh: Deployed) -> None:
    """A service in observe is reached without a link, and the connection is listed as one that enforce would cut."""
    spy = mesh.tasks(SPY)[0]
    _, address = target(mesh, DB)
    with labelled(mesh, DB, "hivewire.mode=observe"):
        wait_for("spy reaches db", lambda: reaches(mesh, spy, address, PORTS[DB]), 60)
        before = settled_counts(mesh, DB, dropped=False)[DB]
        for _ in range(2):
            assert reaches(mesh, spy, address, PORTS[DB])
        wait_for("both are listed", lambda: counts(mesh, DB, dropped=False)[DB] == before + 2, 30, 1.0)
        seen = mesh.ask("suggest", "-s", DEMO)["attempts"]
        assert any((it["source"], it["destination"], it["passes"]) == (SPY, DB, True) for it in seen)
    wait_for("db is closed again", lambda: not reaches(mesh, spy, address, PORTS[DB]), 60)


def test_suggested_labels_stop_the_denials(mesh: Deployed) -> None:
    """The suggested commands, pasted, open the links: the check is clean, spy gets through, nothing more is denied."""
    spy = mesh.tasks(SPY)[0]
    targets = {service: target(mesh, service)[1] for service in (API, DB)}
    for service, address in targets.items():
        assert not reaches(mesh, spy, address, PORTS[service])
        wait_for(f"a denial of {service}", lambda service=service: denials(mesh, service, dropped=True), 30, 1.0)
    print(mesh.cli("suggest", "-s", DEMO))
    suggested = mesh.ask("suggest", "-s", DEMO)
    links = next(it for it in suggested["labels"] if (it["service"], it["label"]) == (SPY, "hivewire.links"))
    assert {"api:8080", "db:6379"} <= set(links["suggested"].split(","))
    words = [shlex.split(command) for command in suggested["commands"]]
    (mine,) = (command for command in words if command[-1] == SPY)
    try:
        mesh.docker(*mine[1:-1], "--detach", SPY)
        for service, address in targets.items():
            wait_for(f"spy reaches {service}", lambda a=address, s=service: reaches(mesh, spy, a, PORTS[s]), 60)
        mesh.wait_ready(60)
        assert mesh.ask("check")["success"]
        before = settled_counts(mesh, *targets)
        for service, address in targets.items():
            assert reaches(mesh, spy, address, PORTS[service])
            assert reaches(mesh, spy, service.removeprefix("demo_"), PORTS[service])
        assert settled_counts(mesh, *targets) == before
    finally:
        labels = [it["label"] for it in suggested["labels"] if it["service"] == SPY]
        mesh.update(SPY, *(word for label in labels for word in ("--label-rm", label)))
        mesh.wait_ready(90)
    for service, address in targets.items():
        wait_for(f"{service} is closed again", lambda a=address, s=service: not reaches(mesh, spy, a, PORTS[s]), 60)
