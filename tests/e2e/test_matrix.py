"""Who reaches whom: every kind of pair, protocol, way of naming and distance, expected against seen."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from lab.images import Images
from proof.deployed import Deployed, Task, wait_for

pytestmark = pytest.mark.e2e

# Echoes TCP on 8080 and 9090 and UDP on 8080; nothing in it may need a `$`, which stack files replace.
SERVER = """
import socket, threading
def tcp(port):
    listener = socket.create_server(('', port), backlog=64)
    while True:
        client, _ = listener.accept()
        client.sendall(b'here')
        client.close()
def udp(port):
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(('', port))
    while True:
        data, client = server.recvfrom(2048)
        server.sendto(data, client)
for work, port in ((tcp, 8080), (tcp, 9090), (udp, 8080)):
    threading.Thread(target=work, args=(port,)).start()
"""

# Tries all targets at once and prints which answered: [[address, protocol, port], ...] -> [bool, ...]
CLIENT = """
import json, os, socket, struct, sys
from concurrent.futures import ThreadPoolExecutor
def checksum(data):
    total = sum(struct.unpack('!%dH' % (len(data) // 2), data))
    total = (total >> 16) + (total & 0xffff)
    return ~(total + (total >> 16)) & 0xffff
def attempt(target):
    host, protocol, port = target
    try:
        if protocol == 'tcp':
            with socket.create_connection((host, port), 1.5) as channel:
                return channel.recv(4) == b'here'
        if protocol == 'udp':
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
                channel.settimeout(0.5)
                channel.connect((host, port))
                for _ in range(3):
                    channel.send(b'echo')
                    try:
                        return channel.recv(64) == b'echo'
                    except TimeoutError:
                        pass
                return False
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as channel:
            channel.settimeout(1.5)
            mark = os.urandom(8)
            body = struct.pack('!BBHHH', 8, 0, 0, 7, 1) + mark
            body = body[:2] + struct.pack('!H', checksum(body)) + body[4:]
            channel.sendto(body, (host, 0))
            while True:
                answer, sender = channel.recvfrom(2048)
                if answer[20] == 0 and mark in answer:
                    return True
    except OSError:
        return False
targets = json.loads(sys.argv[1])
with ThreadPoolExecutor(max(1, len(targets))) as pool:
    print(json.dumps(list(pool.map(attempt, targets))))
"""

SOURCES = ("matrix_source", "matrix_watcher", "matrix_stranger", "matrix_plain", "other_friend", "other_foe")
TARGETS = ("matrix_closed", "matrix_open")
ENFORCED = {"matrix_source", "matrix_stranger", "other_friend", "other_foe", "matrix_closed"}
LINKED = {
    ("matrix_source", "matrix_closed"),
    ("matrix_source", "matrix_open"),
    ("matrix_watcher", "matrix_closed"),
    ("matrix_watcher", "matrix_open"),
    ("other_friend", "matrix_closed"),
}
TRIES = (("tcp", 8080), ("tcp", 9090), ("udp", 8080), ("icmp", 0))


@dataclass(frozen=True)
class Case:
    source: Task
    target: Task
    naming: str
    protocol: str
    port: int

    @property
    def distance(self) -> str:
        return "same node" if self.source.node == self.target.node else "other node"

    @property
    def expected(self) -> bool:
        """By the rules that the documentation gives an operator."""
        pair = (self.source.service, self.target.service)
        if pair in LINKED and (self.protocol, self.port) in {("tcp", 8080), ("icmp", 0)}:
            return True
        # Outside of links one end that enforces is enough to close.
        return not ENFORCED & set(pair)


@pytest.fixture(scope="module")
def matrix(mesh: Deployed) -> Iterator[Deployed]:
    """Both stacks, running and configured."""
    env = {"HIVEWIRE_DEMO_IMAGE": Images().demo, "MATRIX_SERVER": SERVER}
    here = Path(__file__).parent
    mesh.docker("stack", "deploy", "-c", str(here / "matrix.yml"), "matrix", env=env)
    mesh.docker("stack", "deploy", "-c", str(here / "matrix_other.yml"), "other", env=env)
    nodes = len(mesh.lab.nodes)
    wait_for("all tasks", lambda: all(len(mesh.tasks(s)) == nodes for s in (*SOURCES, *TARGETS)), 90)
    mesh.wait_ready(90)
    yield mesh
    for stack in ("other", "matrix"):
        mesh.remove(stack)


def test_only_what_is_linked_is_reached(matrix: Deployed) -> None:
    """For every kind of pair, protocol, naming and distance: reached exactly where a link or a mode says so."""
    address = {t.task: matrix.addresses(t)[0] for s in (*SOURCES, *TARGETS) for t in matrix.tasks(s)}
    vips = {service: _vip(matrix, service) for service in TARGETS}
    first = matrix.lab.nodes[0].name
    plan: dict[Task, list[tuple[Case, str]]] = {}
    for service in SOURCES:
        source = next(t for t in matrix.tasks(service) if t.node == first)
        cases = []
        for target_service in TARGETS:
            for target in _near_and_far(matrix, target_service, first):
                for protocol, port in TRIES:
                    cases.append((Case(source, target, "address", protocol, port), address[target.task]))
            # Without a link a VIP is Swarm's, and needs IPVS: what it answers then is not ours to say.
            if (service, target_service) in LINKED:
                cases.append((Case(source, target, "VIP", "tcp", 8080), vips[target_service]))
                cases.append((Case(source, target, "VIP", "tcp", 9090), vips[target_service]))
        plan[source] = cases
    with ThreadPoolExecutor(len(plan)) as pool:
        seen = dict(zip(plan, pool.map(lambda source: _try(matrix, source, plan[source]), plan), strict=True))
    rows = [(case, got) for source, cases in plan.items() for (case, _), got in zip(cases, seen[source], strict=True)]
    print(_table(rows))
    wrong = [(case, got) for case, got in rows if got != case.expected]
    assert not wrong, _table(wrong)


def test_a_name_of_tasks_leads_to_the_tasks(matrix: Deployed) -> None:
    """``tasks.closed`` gives the tasks' own addresses, and the linked source reaches each of them."""
    source = matrix.tasks("matrix_source")[0]
    code = "import socket; print(*sorted({a[4][0] for a in socket.getaddrinfo('tasks.closed', 8080)}))"
    addresses = matrix.exec(source, "python3", "-c", code).split()
    assert sorted(addresses) == sorted(a for t in matrix.tasks("matrix_closed") for a in matrix.addresses(t))
    targets = json.dumps([[a, "tcp", 8080] for a in addresses])
    assert json.loads(matrix.exec(source, "python3", "-c", CLIENT, targets)) == [True] * len(addresses)


def test_the_node_itself_reaches_no_task(matrix: Deployed) -> None:
    """From the node's own namespace, with no overlay interface, the overlay addresses of tasks lead nowhere."""
    target = matrix.tasks("matrix_closed")[0]
    tries = json.dumps([[a, "tcp", 8080] for a in matrix.addresses(target)])
    answer = matrix.lab.exec(target.node, "python3", "-c", CLIENT, tries).stdout
    assert json.loads(answer) == [False]


def _near_and_far(matrix: Deployed, service: str, node: str) -> list[Task]:
    tasks = matrix.tasks(service)
    return [next(t for t in tasks if t.node == node), next(t for t in tasks if t.node != node)]


def _try(matrix: Deployed, source: Task, cases: list[tuple[Case, str]]) -> list[bool]:
    targets = json.dumps([[host, case.protocol, case.port] for case, host in cases])
    answer: list[bool] = json.loads(matrix.exec(source, "python3", "-c", CLIENT, targets))
    return answer


def _vip(matrix: Deployed, service: str) -> str:
    network = matrix.docker("network", "inspect", "-f", "{{.ID}}", "mx").strip()
    template = "{{range .Endpoint.VirtualIPs}}{{.NetworkID}} {{.Addr}}\n{{end}}"
    lines = matrix.docker("service", "inspect", "-f", template, service).splitlines()
    return next(line.split()[1].split("/")[0] for line in lines if line.startswith(network))


def _table(rows: list[tuple[Case, bool]]) -> str:
    lines = [f"{'SOURCE':16} {'TARGET':14} {'BY':8} {'WHAT':9} {'DISTANCE':11} {'EXPECTED':9} SEEN"]
    for case, got in rows:
        what = case.protocol if case.protocol == "icmp" else f"{case.port}/{case.protocol}"
        lines.append(
            f"{case.source.service:16} {case.target.service:14} {case.naming:8} {what:9} {case.distance:11} "
            f"{'reached' if case.expected else 'closed':9} {'reached' if got else 'closed'}"
        )
    return "\n".join(lines)
