"""Code in a task without a link, root there and with CAP_NET_RAW as Docker gives it: packets of its own making.

Each attempt has a control that arrives, or it would show nothing.
"""

import json
import secrets
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lab.images import Images
from proof.claims import API, DB, SPY, WEB
from proof.deployed import Deployed, Task, wait_for

from tests.attack.foothold import held
from tests.attack.ledger import Ledger
from tests.e2e.test_mesh import steady_requests

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

WHO = "task without a link"

#: SOURCE TARGET PROTOCOL PORT MARK COUNT [DEVICE]: IPv4 packets of one's own making, with any source.
RAW = """
import socket, struct, sys
source, target, protocol, port, mark, count, *device = sys.argv[1:]
def checksum(data):
    data += b"\\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF
def segment():
    body = mark.encode()
    if protocol == "udp":
        return 17, struct.pack("!HHHH", 40000, int(port), 8 + len(body), 0) + body
    head = struct.pack("!HHIIBBHHH", 40000, int(port), 1, 0, 5 << 4, 2, 1024, 0, 0)
    pseudo = socket.inet_aton(source) + socket.inet_aton(target) + struct.pack("!BBH", 0, 6, len(head) + len(body))
    return 6, head[:16] + struct.pack("!H", checksum(pseudo + head + body)) + head[18:] + body
number, payload = segment()
head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 1, 0, 64, number, 0,
                   socket.inet_aton(source), socket.inet_aton(target))
place = (target, 0)
if device:  # past the namespace's own rules, as AF_PACKET is
    sender, place = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM), (device[0], 0x0800)
else:
    sender = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
sent = 0
for _ in range(int(count)):
    try:
        sender.sendto(head + payload, place)
        sent += 1
    except OSError as error:
        print(error)
print("sent", sent)
"""

JUNK = """
import os, socket, sys
target, first, last, mark = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4].encode()
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
heads = [b"\\1\\0\\0\\0", b"\\2\\0\\0\\0", b"\\3\\0\\0\\0", b"\\4\\0\\0\\0", b""]
sizes = [148, 92, 64, 96, 1200]
sent = 0
for port in range(first, last):
    for head, size in zip(heads, sizes):
        for _ in range(5):
            try:
                sender.sendto((head + mark + os.urandom(size))[:size], (target, port))
                sent += 1
            except OSError:
                pass
sender.settimeout(1)
try:
    print("answer", len(sender.recv(2000)))
except OSError:
    print("silence", sent)
"""

ASK = """
import json, socket, ssl, sys
found = {}
for target in sys.argv[1:]:
    host, port = target.split(":")
    for how in ("plain", "tls"):
        try:
            with socket.create_connection((host, int(port)), timeout=2) as plain:
                channel = plain
                if how == "tls":
                    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
                    channel = context.wrap_socket(plain)
                channel.settimeout(2)
                channel.sendall(b"GET /v1/interfaces HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
                found[f"{target} {how}"] = channel.recv(4000).decode(errors="replace")[:60]
        except OSError as error:
            found[f"{target} {how}"] = f"error: {type(error).__name__}"
print(json.dumps(found))
"""

NAMES = """
import json, socket, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = sorted({it[4][0] for it in socket.getaddrinfo(name, 80, socket.AF_INET)})
    except OSError:
        found[name] = []
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def robber(mesh: Deployed) -> Iterator[Task]:
    """On another node than the first task of api, so that its packets cross the underlay."""
    victim = mesh.tasks(API)[0]
    node = next(node.name for node in mesh.lab.nodes if node.name != victim.node)
    mesh.docker(
        "service", "create", "--detach", "--name", "robber", "--user", "root", "--network", "demo_app", "--constraint",
        f"node.hostname=={node}", Images().demo, "sleep", "3600",
    )  # fmt: skip
    try:
        yield wait_for("the robber", lambda: mesh.tasks("robber"), 60)[0]
    finally:
        mesh.docker("service", "rm", "robber")


@contextmanager
def heard(mesh: Deployed, task: Task, file: Path) -> Iterator[Path]:
    """What reaches a task's namespace on any interface, before its own rules see it."""
    path = f"/proc/{mesh.lab.node(task.node).pid}/root{mesh.sandbox(task).replace('/var/run/', '/run/')}"
    options = ("-i", "any", "-Q", "in", "-U", "-n", "-Z", "root", "--immediate-mode", "-w", str(file))
    argv = ["nsenter", f"--net={path}", "tcpdump", *options]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "listening on" in line:
            break
    try:
        yield file
    finally:
        time.sleep(0.5)
        process.terminate()
        process.communicate(timeout=10)


def overlay(mesh: Deployed, task: Task) -> str:
    return mesh.addresses(task)[0]


def told(mesh: Deployed) -> str:
    return json.dumps(mesh.ask("denials"))


def raw(mesh: Deployed, task: Task, source: str, target: str, protocol: str, port: int, mark: str) -> str:
    return mesh.exec(task, "python3", "-c", RAW, source, target, protocol, str(port), mark, "20")


def test_spoofed_sources_over_the_overlay(mesh: Deployed, robber: Task, tmp_path: Path, ledger: Ledger) -> None:
    """In the name of a linked task, over the overlay network: no packet reaches a meshed task's namespace."""
    before = held(mesh)
    web, api, db, spy = (mesh.tasks(name)[0] for name in (WEB, API, DB, SPY))
    mark = f"ROBBER{secrets.token_hex(6)}"
    with heard(mesh, api, tmp_path / "api") as at_api, heard(mesh, spy, tmp_path / "spy") as at_spy:
        for protocol in ("udp", "tcp"):
            for source in (overlay(mesh, web), overlay(mesh, db), overlay(mesh, robber)):
                assert "sent 20" in raw(mesh, robber, source, overlay(mesh, api), protocol, 8080, mark)
        raw(mesh, robber, overlay(mesh, robber), overlay(mesh, spy), "udp", 9, mark)
    assert mark.encode() in at_spy.read_bytes(), "nothing that the robber sends arrives anywhere: this shows nothing"
    assert mark.encode() not in at_api.read_bytes()
    assert held(mesh) == before
    wait_for("a denial", lambda: overlay(mesh, robber) in told(mesh) or "robber" in told(mesh), 40)
    ledger.note(WHO, "spoofed sources over the overlay, UDP and TCP", "the guard of the node drops them",
                "hivewire denials, hivewire_guard_denied_packets_total")  # fmt: skip


def test_spoofed_sources_over_wireguard(mesh: Deployed, tmp_path: Path, ledger: Ledger) -> None:
    """A linked task in the name of another one, through the tunnel: the key does not fit the address."""
    before = held(mesh)
    web, other = mesh.tasks(WEB)[:2]
    api = next(task for task in mesh.tasks(API) if task.node != web.node)
    mark, own = f"TUNNEL{secrets.token_hex(6)}", f"OWNSRC{secrets.token_hex(6)}"
    mesh.probe(web, "tcp", overlay(mesh, api), "8080")
    with heard(mesh, api, tmp_path / "api") as at_api:
        for source, text in ((overlay(mesh, other), mark), ("10.99.9.9", mark), (overlay(mesh, web), own)):
            # As root in the task's namespace, with all that CAP_NET_RAW would give it.
            argv = (source, overlay(mesh, api), "udp", "8080", text, "20", "wg0")
            assert "sent 20" in mesh.in_namespace(web, "python3", "-c", RAW, *argv)
    assert own.encode() in at_api.read_bytes(), "nothing went through the tunnel, so this shows nothing"
    assert mark.encode() not in at_api.read_bytes()
    assert held(mesh) == before
    ledger.note("linked task", "spoofed sources over WireGuard", "not the key's allowed address: dropped by WireGuard",
                "none: WireGuard drops without a word")  # fmt: skip


def test_udp_ports_of_other_tasks(mesh: Deployed, robber: Task, ledger: Ledger) -> None:
    """Junk, and what looks like handshakes, for the ports of all devices: no answer, and links go on."""
    before = held(mesh)
    mark = f"JUNK{secrets.token_hex(6)}"
    addresses = [str(node.address) for node in mesh.lab.nodes]
    with steady_requests(mesh, mesh.tasks(WEB)[0]) as wrong:
        said = [mesh.exec(robber, "python3", "-c", JUNK, it, "51820", "51832", mark) for it in addresses]
    assert all(line.startswith("silence") for line in said), said
    assert any(line.strip() != "silence 0" for line in said), "nothing could be sent, so this shows nothing"
    assert wrong == []
    assert held(mesh) == before
    ledger.note(WHO, "junk and forged handshakes to all WireGuard ports", "no answer without a known key",
                "none: WireGuard is silent")  # fmt: skip


def test_ports_of_hivewire(mesh: Deployed, robber: Task, ledger: Ledger) -> None:
    """Agents, etcd and the controller's API answer nothing to who has no certificate or is not on their machine."""
    ports = (9481, 2379, 2380, 9480)
    targets = [f"{node.address}:{port}" for node in mesh.lab.nodes for port in ports]
    answers = json.loads(mesh.exec(robber, "python3", "-c", ASK, *targets, timeout_s=120))
    print(json.dumps(answers, indent=1))
    assert not [it for it in answers.items() if "200" in it[1] or "interfaces" in it[1]], answers
    reached = [it for it, said in answers.items() if said != "error: TimeoutError"]
    assert reached, "nothing of the nodes is reached at all"
    ledger.note(WHO, f"to ask {len(targets)} ports of agents, etcd and controller",
                "no certificate, no answer; the API is on loopback", "etcd's log: rejected connection")  # fmt: skip


def test_dns_opens_nothing(mesh: Deployed, robber: Task, ledger: Ledger) -> None:
    """Docker's DNS tells it names and addresses; none of them lets it in."""
    names = ("api", "db", "web", "tasks.api", "tasks.db", "tasks.web")
    found = json.loads(mesh.exec(robber, "python3", "-c", NAMES, *names))
    assert found["tasks.api"], "Docker's DNS tells nothing, so this shows nothing"
    tried = {address for addresses in found.values() for address in addresses}
    for address in sorted(tried):
        for port in ("8080", "6379"):
            outcome = mesh.probe(robber, "tcp", address, port, timeout_s=1)["outcome"]
            assert outcome != "reached", (address, port)
    ledger.note(WHO, f"all {len(tried)} addresses that Docker's DNS tells of api, db and web",
                "names are no secret, and open nothing", "hivewire denials")  # fmt: skip
