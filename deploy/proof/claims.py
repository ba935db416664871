"""What Hivewire promises, each promise as a function that looks for itself and says what it saw.

A function returns facts for the demo to print, or raises Disproved with what was wrong. The end-to-end tests call the
same functions.
"""

import secrets
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from proof.deployed import Deployed, Task, wait_for


class Disproved(Exception):
    """A promise did not hold; the message says what was seen instead."""


WEB, API, DB, SPY = "demo_web", "demo_api", "demo_db", "demo_spy"
LINKED = {WEB: (API,), API: (WEB, DB), DB: (API,)}
"""The services that each one of the demo is linked with, in either direction."""

WIREGUARD_PORTS = "udp portrange 51820-52819"


def demand(truth: object, otherwise: str) -> None:
    if not truth:
        raise Disproved(otherwise)


def chain_answers(mesh: Deployed) -> dict[str, Any]:
    """Every web task reaches api by its VIP, over time all its tasks, and api reaches db; each hop sees the caller."""
    web, api = mesh.tasks(WEB), mesh.tasks(API)
    by_address = {address: task.name for task in (*web, *api) for address in mesh.addresses(task)}
    seen: set[str] = set()
    for task in web:
        for _ in range(2 * len(api)):
            page = _page(task, mesh.ask_web(task))
            client, responder = page["api"]["client"], page["api"]["task"]
            demand(by_address.get(client) == task.name, f"api saw {client} instead of an address of {task.name}")
            demand(page.get("db"), f"api did not reach db: {page}")
            seen.add(responder)
    names = {task.name for task in api}
    demand(seen >= {_short(n) for n in names} or seen >= names, f"only {sorted(seen)} of {sorted(names)} answered")
    return {"web tasks": len(web), "api tasks that answered": sorted(seen)}


def nothing_in_clear(mesh: Deployed) -> dict[str, Any]:
    """A wiretap on the underlay sees WireGuard, and neither the marker nor VXLAN between linked tasks.

    The control is a marker that one node sends to another in clear while the same capture runs: it must be seen, or
    the capture proves nothing.
    """
    marker, control = f"MARK{secrets.token_hex(8)}", f"CTRL{secrets.token_hex(8)}"
    linked = [address for service in (WEB, API, DB) for task in mesh.tasks(service) for address in mesh.addresses(task)]
    with tempfile.TemporaryDirectory() as folder, mesh.lab.capture(Path(folder) / "wire.pcap") as wire:
        for task in mesh.tasks(WEB):
            for _ in range(4):
                _page(task, mesh.ask_web(task, marker))
        send_in_clear(mesh, control)
        wire.__exit__()
        demand(wire.contains(control.encode()), "the capture did not see the control sent in clear: it proves nothing")
        demand(not wire.contains(marker.encode()), "the marker crossed the underlay in clear")
        wireguard = wire.count(WIREGUARD_PORTS)
        demand(wireguard, "no WireGuard packet crossed the underlay")
        vxlan = wire.count(vxlan_between(linked))
        demand(vxlan == 0, f"{vxlan} VXLAN frames carried packets between linked tasks")
    return {"frames of WireGuard": wireguard, "marker in clear": 0, "VXLAN frames between linked tasks": vxlan,
            "control in clear": "seen"}  # fmt: skip


def send_in_clear(mesh: Deployed, text: str) -> None:
    """One UDP datagram from the first node to the second, as no task of the mesh would send it."""
    target = mesh.lab.nodes[1].address
    code = (
        "import socket,sys; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)"
        ".sendto(sys.argv[1].encode(), (sys.argv[2], 9))"
    )
    mesh.lab.exec(mesh.lab.nodes[0].name, "python3", "-c", code, text, str(target))


def vxlan_between(addresses: list[str]) -> str:
    """A tcpdump filter: VXLAN frames whose inner IPv4 packet is from and to one of these addresses.

    Offsets from the UDP header: 8 VXLAN header, 14 inner Ethernet, then IPv4 source at 12 and destination at 16.
    """
    numbers = [int(IPv4Address(a)) for a in addresses]
    source = " or ".join(f"udp[42:4] = {n}" for n in numbers)
    destination = " or ".join(f"udp[46:4] = {n}" for n in numbers)
    return f"udp dst port 4789 and udp[28:2] = 0x0800 and ({source}) and ({destination})"


def peers_of(mesh: Deployed, task: Task) -> dict[str, Any]:
    """A task's interface has a peer for every task of its own and of its linked services, and for no other."""
    others = [t for service in (task.service, *LINKED[task.service]) for t in mesh.tasks(service) if t != task]
    expected = sorted(f"{address}/32" for t in others for address in mesh.addresses(t))
    peers = mesh.wireguard(task)
    found = sorted(a for peer in peers.values() for a in peer["allowed_ips"])
    demand(found == expected, f"{task.name} has peers for {found}, expected {expected}")
    return {"peers": len(peers), "with a handshake": sum(p["handshake_age_s"] is not None for p in peers.values())}


def handshakes_are_recent(mesh: Deployed, task: Task, at_most_s: float = 180) -> None:
    """Every peer of the task's linked services shook hands within the life of a session, given traffic with each.

    Peers of the same service may be idle, and an idle peer makes no handshakes.
    """
    linked = {f"{a}/32" for service in LINKED[task.service] for t in mesh.tasks(service) for a in mesh.addresses(t)}
    for key, peer in mesh.wireguard(task).items():
        age = peer["handshake_age_s"]
        is_recent = age is not None and age < at_most_s
        demand(is_recent or not linked & set(peer["allowed_ips"]), f"{task.name} and {key[:8]}: handshake {age} s ago")


def spy_is_shut_out(mesh: Deployed) -> dict[str, Any]:
    """A task without a link reaches neither name, nor VIP, nor the address of a task."""
    spy = mesh.tasks(SPY)[0]
    targets = [("api", 8080), ("db", 6379)]
    targets += [(a, 8080) for t in mesh.tasks(API)[:1] for a in mesh.addresses(t)]
    targets += [(a, 6379) for t in mesh.tasks(DB) for a in mesh.addresses(t)]
    with ThreadPoolExecutor(len(targets)) as pool:
        outcomes = list(pool.map(lambda t: mesh.probe(spy, "tcp", t[0], str(t[1]), timeout_s=2)["outcome"], targets))
    for (host, port), outcome in zip(targets, outcomes, strict=True):
        demand(outcome != "reached", f"spy reached {host}:{port}, to which it has no link")
    return {f"spy -> {host}:{port}": outcome for (host, port), outcome in zip(targets, outcomes, strict=True)}


def link_opens_and_closes(mesh: Deployed) -> dict[str, Any]:
    """A label opens a link to running tasks, and its removal closes it; no container is restarted."""
    spy = mesh.tasks(SPY)[0]
    before = {t.container for service in (WEB, API, DB, SPY) for t in mesh.tasks(service)}
    asked = mesh.update(SPY, "--label-add", "hivewire.links=api:8080")
    first = wait_for("spy reaches api", lambda: _reached(mesh, spy, "api", 8080, 0.5), 30, 0.05)
    opened_s = time.time() - asked
    asked = mesh.update(SPY, "--label-rm", "hivewire.links")
    wait_for("spy no longer reaches api", lambda: not _reached(mesh, spy, "api", 8080, 0.5), 30, 0.05)
    closed_s = time.time() - asked
    after = {t.container for service in (WEB, API, DB, SPY) for t in mesh.tasks(service)}
    demand(before == after, f"containers changed: {sorted(before ^ after)}")
    return {
        "open after (s)": round(opened_s, 2),
        "first connection over the fresh link (ms)": first["connect_ms"],
        "closed after (s)": round(closed_s, 2),
        "containers restarted": 0,
    }


def _reached(mesh: Deployed, task: Task, host: str, port: int, timeout_s: float) -> dict[str, Any] | None:
    report = mesh.probe(task, "tcp", host, str(port), timeout_s=timeout_s)
    return report if report.get("outcome") == "reached" else None


def _page(task: Task, report: dict[str, Any]) -> dict[str, Any]:
    demand(report.get("outcome") == "reached", f"{task.name} does not answer: {report}")
    demand(report.get("status") == 200, f"{task.name} got {report.get('status')}: {report.get('body')}")
    body: dict[str, Any] = report["body"]
    return body


def _short(name: str) -> str:
    """``demo_api.1.abc`` as Swarm's template gives it, without the task id."""
    return ".".join(name.split(".")[:2])
