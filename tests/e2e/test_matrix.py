"""Who reaches whom: every kind of pair, protocol, way of naming, distance and mode, expected against seen.

Every table has pairs that must be reached beside those that must not, so that a machine on which nothing is reached
proves nothing.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from lab.images import Images
from lab.patience import FACTOR, patient
from lab.settings import REGISTRY_ADDRESS, UNDERLAY
from proof.deployed import Deployed, Task, wait_for

pytestmark = pytest.mark.e2e

# Answers TCP on 8080 and 9090, UDP on 8080 and 7070; nothing in it may need a `$`, which stack files replace.
SERVER = """
import socket, threading
def tcp(port):
    listener = socket.create_server(('', port), family=socket.AF_INET6, backlog=256, dualstack_ipv6=True)
    while True:
        client, _ = listener.accept()
        client.sendall(b'here')
        client.close()
def udp(port):
    server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    server.bind(('', port))
    while True:
        data, client = server.recvfrom(2048)
        server.sendto(data, client)
for work, port in ((tcp, 8080), (tcp, 9090), (udp, 8080), (udp, 7070)):
    threading.Thread(target=work, args=(port,)).start()
"""

# Tries all targets at once and prints which answered: [[host, address, protocol, port], ...] -> [bool, ...]
# Where a name is given, the address must be among those that it stands for.
CLIENT = (
    f"PATIENCE = {FACTOR}\n"
    + """
import json, os, socket, struct, sys
from concurrent.futures import ThreadPoolExecutor
def checksum(data):
    total = sum(struct.unpack('!%dH' % (len(data) // 2), data))
    total = (total >> 16) + (total & 0xffff)
    return ~(total + (total >> 16)) & 0xffff
def attempt(target):
    name, host, protocol, port = target
    try:
        if name and host not in {found[4][0] for found in socket.getaddrinfo(name, port or 1)}:
            return None
        if protocol == 'tcp':
            with socket.create_connection((host, port), 1.5 * PATIENCE) as channel:
                return channel.recv(4) == b'here'
        if protocol == 'udp':
            family, _, _, _, to = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, socket.SOCK_DGRAM) as channel:
                channel.settimeout(0.5 * PATIENCE)
                channel.connect(to)
                for _ in range(3):
                    channel.send(b'echo')
                    try:
                        return channel.recv(64) == b'echo'
                    except TimeoutError:
                        pass
                return False
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as channel:
            channel.settimeout(1.5 * PATIENCE)
            mark = os.urandom(8)
            body = struct.pack('!BBHHH', 8, 0, 0, 7, 1) + mark
            body = body[:2] + struct.pack('!H', checksum(body)) + body[4:]
            channel.sendto(body, (host, 0))
            while True:
                answer, sender = channel.recvfrom(2048)
                if answer[20] == 0 and mark in answer:
                    return True
    except socket.gaierror:
        return None
    except OSError:
        return False
targets = json.load(sys.stdin)
with ThreadPoolExecutor(max(1, min(40, len(targets)))) as pool:
    print(json.dumps(list(pool.map(attempt, targets))))
"""
)

SOURCES = {
    "matrix_source": "linked",
    "matrix_watcher": "linked, observe",
    "matrix_stranger": "same stack",
    "other_friend": "other stack, consent",
    "other_foe": "other stack, none",
    "matrix_away": "off",
    "matrix_plain": "not meshed",
}
TARGETS = {"matrix_closed": "enforce", "matrix_open": "observe", "matrix_out": "off"}
PUBLISHED = {"matrix_closed": 10000, "matrix_open": 20000, "matrix_out": 30000}
"""What is added to a port where it is published."""
ENFORCED = {"matrix_source", "matrix_stranger", "other_friend", "other_foe", "matrix_closed"}
LINKED = {
    ("matrix_source", "matrix_closed"),
    ("matrix_source", "matrix_open"),
    ("matrix_watcher", "matrix_closed"),
    ("matrix_watcher", "matrix_open"),
    ("other_friend", "matrix_closed"),
}
LINK = {("tcp", 8080), ("udp", 7070), ("icmp", 0)}
TRIES = (("tcp", 8080), ("tcp", 9090), ("udp", 7070), ("udp", 8080), ("icmp", 0))
HOST, OUTSIDE = "the node", "outside"


def has_ipvs() -> bool:
    """Whether Swarm's balancers have what they need; the kernel loads it for the first of them."""
    return Path("/sys/module/ip_vs").exists()


@dataclass(frozen=True)
class Case:
    """One attempt: ``name`` is what is asked of Docker's DNS, or nothing."""

    source: str
    target: str
    naming: str
    distance: str
    protocol: str
    port: int
    host: str
    expected: bool
    name: str = ""

    @property
    def what(self) -> str:
        return self.protocol if self.protocol == "icmp" else f"{self.port}/{self.protocol}"


Rows = list[tuple[Case, bool | None]]


@dataclass(frozen=True)
class Way:
    """One way of naming a target, from a source."""

    naming: str
    distance: str
    host: str
    name: str = ""


class Matrix:
    """Both stacks, with what is known of their tasks."""

    def __init__(self, mesh: Deployed) -> None:
        self.mesh = mesh
        self.near, self.far = (node.name for node in mesh.lab.nodes[:2])
        self.tasks = {s: {t.node: t for t in mesh.tasks(s)} for s in (*SOURCES, *TARGETS)}
        self.address = {t.task: mesh.addresses(t)[0] for nodes in self.tasks.values() for t in nodes.values()}
        self.vips = {service: _vip(mesh, service) for service in TARGETS}
        self.links = {t.task: self._interfaces(t) for nodes in self.tasks.values() for t in nodes.values()}

    def ways(self, source: Task, service: str) -> Iterator[Way]:
        """How a task of this stack may name the tasks of a service."""
        for distance, node in (("same node", self.near), ("other node", self.far)):
            address = self.address[self.tasks[service][node].task]
            yield Way("address", distance, address)
            yield Way("tasks.name", distance, address, f"tasks.{service}")
        yield Way("VIP", "either", self.vips[service])
        target = self.tasks[service][self.near]
        overlay, gateway = (self._link_local(source, target, on_overlay=o) for o in (True, False))
        yield Way("IPv6", "same node", overlay)
        yield Way("gwbridge", "same node", self._on_bridge(target))
        yield Way("gwbridge, IPv6", "same node", gateway)

    def cases(self, service: str) -> list[Case]:
        """All attempts of a source."""
        source, cases = self.tasks[service][self.near], []
        for target in TARGETS:
            pair = (service, target)
            for way in self.ways(source, target):
                for protocol, port in TRIES:
                    is_link = pair in LINKED and (protocol, port) in LINK
                    if way.naming in ("address", "tasks.name", "VIP"):
                        # Outside of links one end that enforces is enough to close.
                        expected = is_link or not ENFORCED & set(pair)
                    else:
                        expected = not ENFORCED & set(pair)
                    # Docker's to say, and not the mesh's: VIPs of what is not linked need IPVS, and tasks that are not
                    # enforced are kept apart on docker_gwbridge by the node's firewall.
                    is_dockers = {"VIP": not is_link and not has_ipvs(), "IPv6": False}.get(
                        way.naming, "gw" in way.naming
                    )
                    # A VIP is an address of Swarm's balancer, which answers a ping itself: no task sees it.
                    if way.naming == "VIP" and protocol == "icmp" and has_ipvs() and service not in ENFORCED:
                        continue
                    if not (expected and is_dockers) and not ("IPv6" in way.naming and protocol == "icmp"):
                        cases.append(
                            Case(
                                service, target, way.naming, way.distance, protocol, port, way.host, expected, way.name
                            )
                        )
        return cases

    def _interfaces(self, task: Task) -> dict[str, list[str]]:
        found = json.loads(self.mesh.in_namespace(task, "ip", "-j", "address"))
        return {link["ifname"]: [a["local"] for a in link["addr_info"]] for link in found if link["ifname"] != "wg0"}

    def _overlay(self, task: Task) -> str:
        return next(name for name, addresses in self.links[task.task].items() if self.address[task.task] in addresses)

    def _bridge(self, task: Task) -> str:
        return next(name for name in self.links[task.task] if name not in ("lo", self._overlay(task)))

    def _on_bridge(self, task: Task) -> str:
        return next(a for a in self.links[task.task][self._bridge(task)] if ":" not in a)

    def _link_local(self, source: Task, target: Task, *, on_overlay: bool) -> str:
        ours, theirs = (self._overlay(t) if on_overlay else self._bridge(t) for t in (source, target))
        address = next(a for a in self.links[target.task][theirs] if a.startswith("fe80:"))
        return f"{address}%{ours}"

    def attempt(self, plan: dict[str, list[Case]]) -> Rows:
        """Carry out each source's cases, all sources at once. What should have answered and did not is tried again."""
        with ThreadPoolExecutor(len(plan)) as pool:
            seen = pool.map(lambda source: self._try(source, plan[source]), plan)
        rows: Rows = [
            row for cases, got in zip(plan.values(), seen, strict=True) for row in zip(cases, got, strict=True)
        ]
        late = [case for case, got in rows if case.expected and not got]
        again = {case: self._try(case.source, [case])[0] for case in late[:40]}
        return [(case, again.get(case, got)) for case, got in rows]

    def _try(self, source: str, cases: list[Case]) -> list[bool | None]:
        targets = json.dumps([[case.name, case.host, case.protocol, case.port] for case in cases])
        if source == OUTSIDE:
            argv: tuple[str, ...] = ("nsenter", f"--net=/run/netns/{UNDERLAY}", sys.executable, "-c", CLIENT)
            done = subprocess.run(
                argv, input=targets, capture_output=True, text=True, timeout=patient(120), check=True
            ).stdout
        elif source == HOST:
            done = self.mesh.lab.exec(self.near, "python3", "-c", CLIENT, text_in=targets).stdout
        else:
            task = self.tasks[source][self.near]
            command = ("exec", "-i", task.container, "python3", "-c", CLIENT)
            done = self.mesh.lab.docker(task.node, *command, text_in=targets).stdout
        answer: list[bool | None] = json.loads(done)
        return answer


@pytest.fixture(scope="module")
def matrix(mesh: Deployed) -> Iterator[Matrix]:
    """Both stacks, running and configured."""
    env = {"HIVEWIRE_DEMO_IMAGE": Images().demo, "MATRIX_SERVER": SERVER}
    here = Path(__file__).parent
    mesh.docker("stack", "deploy", "-c", str(here / "matrix.yml"), "matrix", env=env)
    mesh.docker("stack", "deploy", "-c", str(here / "matrix_other.yml"), "other", env=env)
    wait_for("all tasks", lambda: all(mesh.tasks(s) for s in SOURCES), 90)
    wait_for("all targets", lambda: all(len(mesh.tasks(s)) == 2 for s in TARGETS), 90)
    mesh.wait_ready(90)
    yield Matrix(mesh)
    for stack in ("other", "matrix"):
        mesh.remove(stack)


def test_only_what_is_linked_is_reached(matrix: Matrix) -> None:
    """For every kind of pair, protocol, naming and distance: reached exactly where a link or a mode says so."""
    check(matrix.attempt({service: matrix.cases(service) for service in SOURCES}))


def test_the_node_reaches_tasks_by_docker_gwbridge_alone(matrix: Matrix) -> None:
    """From the node's own namespace overlay addresses, VIPs and names lead nowhere; the bridge of the way out does."""
    cases = []
    for service in TARGETS:
        near, far = (matrix.tasks[service][node] for node in (matrix.near, matrix.far))
        ways = [
            Way("address", "same node", matrix.address[near.task]),
            Way("address", "other node", matrix.address[far.task]),
            Way("tasks.name", "same node", matrix.address[near.task], f"tasks.{service}"),
            Way("VIP", "either", matrix.vips[service]),
        ]
        for protocol, port in TRIES:
            cases += [
                Case(HOST, service, way.naming, way.distance, protocol, port, way.host, False, way.name) for way in ways
            ]
            cases.append(Case(HOST, service, "gwbridge", "same node", protocol, port, matrix._on_bridge(near), True))
    check(matrix.attempt({HOST: cases}))


def test_the_way_in_and_the_way_out_stay_as_docker_made_them(matrix: Matrix) -> None:
    """In every mode: ports that are published on the node answer to the outside, and the outside answers to tasks."""
    nodes = {node.name: str(node.address) for node in matrix.mesh.lab.nodes}
    inbound = [
        Case(OUTSIDE, service, "published", node, protocol, port + PUBLISHED[service], nodes[node], True)
        for service in TARGETS
        for node in (matrix.near, matrix.far)
        for protocol, port in (("tcp", 8080), ("udp", 7070))
    ] + [
        Case(OUTSIDE, service, "address", node, protocol, port, matrix.address[matrix.tasks[service][node].task], False)
        for service in TARGETS
        for node in (matrix.near, matrix.far)
        for protocol, port in TRIES
    ]
    outbound = {
        service: [
            Case(service, OUTSIDE, "address", "other node", protocol, port, str(REGISTRY_ADDRESS), True)
            for protocol, port in TRIES
        ]
        for service in SOURCES
    }
    with answering_outside():
        check(matrix.attempt({OUTSIDE: inbound, **outbound}))


def test_a_flushed_firewall_opens_nothing(matrix: Matrix) -> None:
    """With all rules of the node's own namespace gone, what no link allows stays closed, docker_gwbridge included."""
    mesh, node = matrix.mesh, matrix.near
    plan = {service: matrix.cases(service) for service in SOURCES}
    free = matrix.tasks["matrix_out"][node]
    control = Case("matrix_plain", "matrix_out", "gwbridge", "same node", "tcp", 8080, matrix._on_bridge(free), True)
    assert matrix.attempt({"matrix_plain": [control]})[0][1] is False, "Docker keeps tasks apart on docker_gwbridge"
    with flushed(mesh, node):
        plan["matrix_plain"] = [*plan["matrix_plain"], control]
        check(matrix.attempt(plan))


@contextmanager
def answering_outside() -> Iterator[None]:
    """A server on the underlay that is no node."""
    argv = ["nsenter", f"--net=/run/netns/{UNDERLAY}", sys.executable, "-c", SERVER]
    server = subprocess.Popen(argv)
    try:
        wait_for("the server outside", lambda: _listens(8080), 20)
        yield
    finally:
        server.kill()
        server.wait()


def _listens(port: int) -> bool:
    argv = ["nsenter", f"--net=/run/netns/{UNDERLAY}", "ss", "-Hltn", "sport", "=", f":{port}"]
    return bool(subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True).stdout.strip())


@contextmanager
def flushed(mesh: Deployed, node: str) -> Iterator[None]:
    """A person flushes the node's firewall, in all three ways; Docker's rules are put back at the end."""
    saved = mesh.lab.exec(node, "iptables-save").stdout
    try:
        mesh.lab.exec(
            node, "sh", "-c", "for t in filter nat mangle; do iptables -t $t -F; done; iptables -P FORWARD ACCEPT"
        )
        mesh.lab.exec(node, "nft", "flush", "ruleset")
        yield
    finally:
        mesh.lab.exec(node, "iptables-restore", text_in=saved)


def check(rows: Rows) -> None:
    """Print the table; each attempt went as expected. Of what is closed it does not matter whether a name was found."""
    print(table(rows))
    wrong = [(case, got) for case, got in rows if bool(got) is not case.expected]
    assert not wrong, table(wrong)
    assert any(got for _, got in rows), "nothing was reached at all: that proves nothing"


def table(rows: Iterable[tuple[Case, bool | None]]) -> str:
    lines = [f"{'SOURCE':38} {'TARGET':24} {'BY':14} {'WHAT':9} {'DISTANCE':11} {'EXPECTED':9} SEEN"]
    for case, got in rows:
        source = f"{case.source} ({SOURCES[case.source]})" if case.source in SOURCES else case.source
        target = f"{case.target} ({TARGETS[case.target]})" if case.target in TARGETS else case.target
        seen = "no such name" if got is None else "reached" if got else "closed"
        lines.append(
            f"{source:38} {target:24} {case.naming:14} {case.what:9} {case.distance:11} "
            f"{'reached' if case.expected else 'closed':9} {seen}"
        )
    return "\n".join(lines)


def _vip(mesh: Deployed, service: str) -> str:
    network = mesh.docker("network", "inspect", "-f", "{{.ID}}", "mx").strip()
    template = "{{range .Endpoint.VirtualIPs}}{{.NetworkID}} {{.Addr}}\n{{end}}"
    lines = mesh.docker("service", "inspect", "-f", template, service).splitlines()
    return next(line.split()[1].split("/")[0] for line in lines if line.startswith(network))
