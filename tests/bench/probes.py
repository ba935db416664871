"""One measurement each: a tool is run between two places, and what it says becomes numbers.

iperf3 and ping are this machine's. Both ends are on it, so processor time is for both together, tools included.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.errors import CommandFailed, LabError

from tests.bench import turns
from tests.bench.places import Place

IPERF_PORT = 5201
DIAL_PORT = 7000
SMALL = 64
"""Bytes of payload of a small UDP packet."""
PATIENCE_S = 30
_DIAL = str(Path(__file__).with_name("dial.py"))
_TICKS_PER_S = 100  # USER_HZ of /proc/stat, the same on every architecture that Linux offers to programs: proc(5)

Measure = Callable[["Route", float], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Route:
    """From where, to where, and by which address."""

    client: Place
    server: Place
    address: str


def tcp(streams: int) -> Measure:
    def measure(route: Route, seconds: float) -> dict[str, Any]:
        before = spent_s()
        end = _iperf(route, seconds, "-P", str(streams))
        spent = spent_s() - before
        received = end["sum_received"]
        return {
            "bits_per_s": received["bits_per_second"],
            "cpu_s_per_gb": spent / (received["bytes"] / 1e9) if received["bytes"] else None,
            "retransmits": end["sum_sent"].get("retransmits"),
        }

    return measure


def udp_small(route: Route, seconds: float) -> dict[str, Any]:
    """What arrives when the sender sends as fast as it can: packets per second at the receiver."""
    end = _iperf(route, seconds, "-u", "-b", "0", "-l", str(SMALL))["sum"]
    arrived = end["packets"] - end["lost_packets"]
    return {"packets_per_s": arrived / end["seconds"], "lost_percent": end["lost_percent"]}


def round_trip(route: Route, seconds: float) -> dict[str, Any]:
    """Round trips of ICMP echo, answered by the other end's kernel; in milliseconds, as they came."""
    interval_s = 0.004
    count = max(20, int(seconds / interval_s))
    words = ("ping", "-n", "-i", str(interval_s), "-c", str(count), "-W", "1", route.address)
    said = route.client.run(*words, check=False, timeout_s=seconds + PATIENCE_S).stdout
    times = [float(text) for text in re.findall(r"time=([0-9.]+) ms", said)]
    if not times:
        raise LabError(f"no answer to ping from {route.address}")
    return {"ms": times, "lost": count - len(times)}


def dial(route: Route, seconds: float) -> dict[str, Any]:
    words = (sys.executable, _DIAL, "dial", route.address, str(DIAL_PORT), str(seconds))
    result = json.loads(route.client.run(*words, timeout_s=seconds + PATIENCE_S).stdout)
    if not result["made"]:
        raise LabError(f"no connection to {route.address}:{DIAL_PORT} came about")
    return {"connections_per_s": result["made"] / result["seconds"], "failed": result["failed"]}


PROBES: dict[str, Measure] = {
    "tcp_1": tcp(1),
    "tcp_8": tcp(8),
    "udp_small": udp_small,
    "round_trip": round_trip,
    "connections": dial,
}


def _iperf(route: Route, seconds: float, *words: str) -> dict[str, Any]:
    argv = ("iperf3", "-c", route.address, "-p", str(IPERF_PORT), "-t", str(round(seconds)), "-J", *words)
    deadline = time.monotonic() + PATIENCE_S
    while True:
        said = route.client.run(*argv, check=False, timeout_s=seconds + PATIENCE_S).stdout
        result: dict[str, Any] = json.loads(said or "{}")
        if "error" not in result and "end" in result:
            return dict(result["end"])
        # A server takes one client at a time, and lets go of the last one a moment after it has gone.
        if time.monotonic() > deadline or "busy" not in result.get("error", ""):
            raise LabError(f"iperf3 to {route.address}: {result.get('error', said[:200] or 'no answer')}")
        time.sleep(0.2)


@contextmanager
def servers(places: set[Place]) -> Iterator[None]:
    """The other ends of the probes, in each of these places, while the block runs."""
    started = []
    try:
        for place in sorted(places, key=lambda place: place.path):
            started.append(place.start("iperf3", "-s", "-p", str(IPERF_PORT)))
            started.append(place.start(sys.executable, _DIAL, "listen", str(DIAL_PORT)))
        for place in places:
            _await_listeners(place)
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def _await_listeners(place: Place) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        listening = place.run("ss", "-Hltn").stdout
        if all(f":{port} " in listening for port in (IPERF_PORT, DIAL_PORT)):
            return
        if time.monotonic() > deadline:
            raise LabError(f"the servers of the measurements do not listen in {place.path}")
        time.sleep(0.1)


def spent_s() -> float:
    """Processor seconds of all that a probe makes work.

    That is the lab's control group where the tools are in it, and so is wireguard-go; else the whole machine, since the
    threads of kernel WireGuard are in no group, and with it whatever else runs there.
    """
    spent = turns.spent_s() if turns.is_ahead() else None
    return busy_s() if spent is None else spent


def busy_s() -> float:
    """Processor seconds that this machine has spent on anything, over all its processors."""
    user, nice, system, _idle, _wait, irq, softirq, *_ = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + irq + softirq) / _TICKS_PER_S


def reaches(route: Route) -> bool:
    """Whether both servers of the route can be connected to; a first packet may begin a handshake."""
    for port in (IPERF_PORT, DIAL_PORT):
        code = "import socket,sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 2).close()"
        try:
            route.client.run(sys.executable, "-c", code, route.address, str(port))
        except CommandFailed:
            return False
    return True
