"""The data path side by side with the field: the same probes over every path, taking turns, in one run.

Paths, each from node n2 to node n3:

* ``veth``: the lab's cable between the nodes, with nothing on it.
* ``wireguard``: two devices made by hand on the nodes.
* ``devices``: two devices made by hand into namespaces, sockets on the nodes, as Hivewire's are.
* ``rules``: another such pair, with the rules of the link's tasks copied into its namespaces.
* ``link``, ``vip``: a link of Hivewire in mode ``enforce``, by the task's address and by the service's VIP.
* ``off``: tasks in mode ``off`` on the network of that link; its guard stands in the way, no link and no rules.
* ``overlay``, ``overlay_vip``: tasks on an overlay network that Hivewire does not know, by address and by Swarm's VIP.
* ``sealed``: tasks on an overlay network with Swarm's own encryption.
"""

import contextlib
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lab.command import run
from lab.errors import LabError
from lab.images import Images
from lab.progress import Progress
from lab.settings import PREFIX
from proof.deployed import STACK, Deployed, Task, wait_for

from tests.bench import places, turns
from tests.bench.handmade import Workshop
from tests.bench.probes import PROBES, Route, busy_s, reaches, servers

CLIENT, SERVER = "n2", "n3"
BENCH, SEALED = "bench", "sealed"
_HERE = Path(__file__).resolve().parent

PAIRS = {
    "tcp_1": ("rules", "devices", "link", "vip", "overlay", "sealed"),
    "round_trip": ("rules", "devices", "link", "vip"),
}
"""What claims rest on is measured in every round."""
WIDE = {
    "tcp_1": ("veth", "wireguard", *PAIRS["tcp_1"], "off", "overlay_vip"),
    # Swarm's own VIP answers no ping: ip_vs forwards TCP, UDP and SCTP.
    "round_trip": ("veth", "wireguard", *PAIRS["round_trip"], "overlay", "sealed"),
    "tcp_8": ("veth", "wireguard", "devices", "link", "vip", "overlay", "sealed"),
    "udp_small": ("veth", "devices", "link", "vip", "overlay", "sealed"),
    "connections": ("veth", "devices", "link", "vip", "overlay", "overlay_vip", "sealed"),
}
"""What is measured in every tenth round; the order puts side by side what is compared."""
TENTH = 10

Sink = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Sizes:
    rounds: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Field:
    """What there is to measure here, and what there is not."""

    routes: dict[str, Route]
    missing: dict[str, str]
    facts: dict[str, Any]


def measure(mesh: Deployed, images: Images, sizes: Sizes, progress: Progress, sink: Sink) -> None:
    """Raises LabError where the field cannot be set up; a probe that fails is a sample that says so."""
    with progress.step("tasks to measure between"):
        deploy(mesh, images)
        field, workshop = build(mesh)
    try:
        mine = turns.ahead() if field.facts["backend"] == "userspace" else contextlib.nullcontext()
        sink({"kind": "facts", **field.facts, "missing": field.missing, "sizes": [sizes.rounds, sizes.seconds]})
        with mine, servers({route.server for route in field.routes.values()}):
            for name, route in field.routes.items():
                wait_for(f"an answer over {name}", partial(reaches, route), 60)
            before, start = busy_s(), time.monotonic()
            time.sleep(3)
            sink({"kind": "idle", "busy_processors": (busy_s() - before) / (time.monotonic() - start)})
            for number in range(sizes.rounds):
                with progress.step(f"round {number + 1} of {sizes.rounds}"):
                    for sample in one_round(field, number, sizes.seconds):
                        sink({"kind": "sample", "round": number, **sample})
    finally:
        workshop.close()


def one_round(field: Field, number: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Each probe over all paths, one after the other, in every second round backwards: no path is always first."""
    for probe, wanted in (WIDE if number % TENTH == 0 else PAIRS).items():
        names = [name for name in wanted if name in field.routes]
        for name in names if number % 2 == 0 else reversed(names):
            sample: dict[str, Any] = {"probe": probe, "path": name}
            before, start = busy_s(), time.monotonic()
            try:
                sample |= PROBES[probe](field.routes[name], seconds)
            except (LabError, ValueError, KeyError) as error:
                sample["error"] = f"{type(error).__name__}: {error}"[:300]
            sample["busy_processors"] = (busy_s() - before) / (time.monotonic() - start)
            yield sample


# -- what is measured ---------------------------------------------------------------------------------------------


def deploy(mesh: Deployed, images: Images) -> None:
    env = {"HIVEWIRE_DEMO_IMAGE": images.demo}
    mesh.docker("stack", "deploy", "-c", str(_HERE / "stack.yml"), BENCH, env=env)
    if has_esp():
        mesh.docker("stack", "deploy", "-c", str(_HERE / "sealed.yml"), SEALED, env=env)
    for service in ("from", "to", "off-from", "off-to", "plain-from", "plain-to"):
        task_of(mesh, f"{BENCH}_{service}")
    mesh.wait_ready(180)


def task_of(mesh: Deployed, service: str) -> Task:
    """The one task of a service. Raises LabError when it does not start."""
    return wait_for(f"a task of {service}", lambda: mesh.tasks(service), 120)[0]


def build(mesh: Deployed) -> tuple[Field, Workshop]:
    """All paths that this machine can have. What is made by hand is gone when the workshop is closed."""
    lab = mesh.lab
    nodes = (places.of_node(lab, CLIENT), places.of_node(lab, SERVER))
    link = between(mesh, f"{BENCH}_from", f"{BENCH}_to")
    look = ("ip", "-d", "-j", "link", "show", "wg0")
    shown = wait_for("the interface of the link", lambda: link.client.run(*look, check=False).stdout, 60)
    device = json.loads(shown)[0]
    backend = "kernel" if device["linkinfo"]["info_kind"] == "wireguard" else "userspace"
    mtu = min(device["mtu"], route_mtu(link) or device["mtu"])
    workshop = Workshop(lab, mtu, None if backend == "kernel" else product_program(mesh))
    own = mesh.addresses(task_of(mesh, f"{BENCH}_from"))[0]
    try:
        ruled = workshop.in_namespaces(CLIENT, SERVER, (own, link.address))
        for node, source, target in ((CLIENT, link.client, ruled.client), (SERVER, link.server, ruled.server)):
            agent = next(task for task in mesh.tasks(f"{STACK}_agent") if task.node == node)
            copy_rules(source, target, places.process_of(mesh, agent))
        routes = {
            "veth": Route(*nodes, str(lab.node(SERVER).address)),
            "wireguard": workshop.on_nodes(CLIENT, SERVER),
            "rules": ruled,
            "devices": workshop.in_namespaces(CLIENT, SERVER, (own, link.address)),
            "link": link,
            "vip": Route(link.client, link.server, vip_of(mesh, f"{BENCH}_to")),
            "off": between(mesh, f"{BENCH}_off-from", f"{BENCH}_off-to"),
            "overlay": between(mesh, f"{BENCH}_plain-from", f"{BENCH}_plain-to"),
        }
        missing = {}
        if has_ipvs():
            plain = routes["overlay"]
            routes["overlay_vip"] = Route(plain.client, plain.server, vip_of(mesh, f"{BENCH}_plain-to"))
        else:
            missing["overlay_vip"] = "this kernel has no IPVS, and without it Swarm's own VIPs do not answer"
        if has_esp():
            routes["sealed"] = between(mesh, f"{SEALED}_sealed-from", f"{SEALED}_sealed-to")
        else:
            missing["sealed"] = "this kernel has no ESP, and without it tasks on an encrypted overlay do not start"
    except BaseException:
        workshop.close()
        raise
    facts = {
        "backend": backend,
        "kernel": platform.release(),
        "engine": lab.docker(mesh.manager, "version", "-f", "{{.Server.Version}}").stdout.strip(),
        "processors": os.cpu_count(),
        "processor": _processor(),
        "wireguard_mtu": mtu,
        "overlay_mtu": json.loads(link.client.run("ip", "-j", "link", "show", "eth0").stdout)[0]["mtu"],
        "iperf3": run("iperf3", "--version").stdout.split()[1],
    }
    return Field(routes, missing, facts), workshop


def between(mesh: Deployed, client: str, server: str) -> Route:
    ends = (task_of(mesh, client), task_of(mesh, server))
    return Route(places.of_task(mesh, ends[0]), places.of_task(mesh, ends[1]), mesh.addresses(ends[1])[0])


def route_mtu(route: Route) -> int | None:
    """What the route itself says; None where it leaves that to the interface."""
    found = re.search(r"\bmtu (?:lock )?(\d+)", route.client.run("ip", "route", "get", route.address).stdout)
    return int(found[1]) if found else None


def vip_of(mesh: Deployed, service: str) -> str:
    shown = json.loads(mesh.docker("service", "inspect", "-f", "{{json .Endpoint.VirtualIPs}}", service))
    return str(shown[0]["Addr"]).partition("/")[0]


def product_program(mesh: Deployed) -> Path:
    """A copy of the wireguard-go that the product runs, in the lab's own folder."""
    target = mesh.lab.settings.state / "wireguard-go"
    holder = next(task for task in mesh.tasks(f"{STACK}_userspace") if task.node == CLIENT)
    mesh.lab.docker(holder.node, "cp", f"{holder.container}:/usr/bin/wireguard-go", str(target))
    target.chmod(0o755)
    return target


def copy_rules(source: places.Place, target: places.Place, agent: int) -> None:
    """The table of a task, without what it has counted, into another namespace. By the nft that the agent itself has
    (``agent`` is a process of it): an older one does not understand it all."""
    listing = ("nft", "--stateless", "list", "table", "inet", "hivewire")
    text = wait_for("the rules of the link", lambda: source.run_from(agent, *listing, check=False).stdout, 60)
    target.run_from(agent, "nft", "-f", "-", text_in=text)


def has_esp() -> bool:
    """Whether this kernel has the transform of Swarm's encrypted networks: tried in a namespace that goes again."""
    run("modprobe", "-q", "esp4", check=False)
    name = f"{PREFIX}bench-probe"
    run("ip", "netns", "add", name)
    try:
        key = "0x" + "11" * 20  # of nothing: the namespace goes with it
        state = "xfrm state add src 192.0.2.1 dst 192.0.2.2 proto esp spi 1"
        text = f"{state} aead rfc4106(gcm(aes)) {key} 64\n"
        return run("ip", "-n", name, "-batch", "-", text_in=text, check=False).returncode == 0
    finally:
        run("ip", "netns", "del", name)


def has_ipvs() -> bool:
    run("modprobe", "-q", "ip_vs", check=False)
    return Path("/proc/net/ip_vs").exists()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
