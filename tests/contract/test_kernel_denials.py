"""What the rules note, on the real nftables: in namespaces of the test's own, a task and its neighbour.

They are joined twice: by ``eth0``, which stands for an overlay network, and by ``wg0``, a plain veth in the place of
the WireGuard interface, because rules look at its name only. Each namespace lives as long as a process of the test.
"""

import contextlib
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import TypeVar

import pytest

from agent.denials import DenialBook
from agent.kernel import nftables, rtnetlink
from agent.kernel.api import Namespace
from agent.kernel.namespace import identify, run_in
from agent.kernel.rtnetlink import Calls, Netlink
from agent.observed import NotedCounters, NotedEntry
from agent.rules.render import ENTRIES, UNLISTED, Backends, RuleSet, Source, render
from hivewire.ids import ServiceId, TaskId
from hivewire.reports import DenialEntry, Direction, Reason
from tests.needs import need_namespaces
from tests.real_nft import put
from tests.unit.agent.values import ports

R = TypeVar("R")

TASK, OTHER = "10.9.0.2", "10.9.0.5"
TUNNELLED, PEER = "10.8.0.2", "10.8.0.5"
VIP = "10.8.0.99"
RULES = RuleSet(
    enforce=True,
    overlay_interfaces=("eth0",),
    backends=(Backends(IPv4Address(VIP), IPv4Address(TUNNELLED), ()),),
    sources=(Source("lb", (IPv4Address(PEER),), (ports("80/udp"), ports("80"))),),
)
UDP = 17


@dataclass(frozen=True)
class Place:
    """The two namespaces, and sockets in the task's."""

    task: Namespace
    other: Namespace
    tables: Netlink

    def noted_counters(self) -> NotedCounters:
        return nftables.counters(self.tables)

    def noted_entries(self, name: str) -> tuple[NotedEntry, ...]:
        return nftables.entries(self.tables, name)

    def set_rules(self, rules: RuleSet) -> None:
        put(self.task, render(rules)[0])

    def send(self, where: Namespace, to: str, port: int, count: int = 1) -> None:
        """Send datagrams; the sender may be told that it must not."""
        with contextlib.closing(self.udp(where)) as udp:
            for _ in range(count):
                with contextlib.suppress(OSError):
                    udp.sendto(b"hello", (to, port))

    def udp(self, where: Namespace, bound: tuple[str, int] | None = None) -> socket.socket:
        def make() -> socket.socket:
            made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            made.settimeout(10)
            if bound:
                made.bind(bound)
            return made

        return run_in(where, make)

    def listed(self, name: str) -> dict[tuple[str, str, int, int], int]:
        """Counts by source, destination, protocol and port."""
        return {
            (str(e.source), str(e.destination), e.protocol, e.port): e.count for e in self.noted_entries(name)
        }  # fmt: skip


@pytest.fixture
def place() -> Iterator[Place]:
    need_namespaces()
    with contextlib.ExitStack() as stack:
        holders = [stack.enter_context(namespace()) for _ in range(2)]
        first, second = holders
        for link, ours, theirs in (("eth0", TASK, OTHER), ("wg0", TUNNELLED, PEER)):
            run(first, "link", "add", link, "type", "veth", "peer", "name", link, "netns", str(second))
            for holder, address in ((first, ours), (second, theirs)):
                run(holder, "address", "add", f"{address}/24", "dev", link)
                # Nothing but what a test sends is on the wire: no IPv6 of the kernel's own.
                run(holder, "link", "set", link, "addrgenmode", "none", "up")
        spaces = [identify(TaskId(f"t{pid}"), f"/proc/{pid}/ns/net") for pid in holders]
        tables = run_in(spaces[0], lambda: Netlink(rtnetlink.NETLINK_NETFILTER, Calls()))
        stack.callback(tables.close)
        yield Place(spaces[0], spaces[1], tables)


@contextlib.contextmanager
def namespace() -> Iterator[int]:
    holder = subprocess.Popen(["unshare", "--net", "setpriv", "--pdeathsig", "KILL", "sleep", "infinity"])
    try:
        deadline = time.monotonic() + 30
        while Path(f"/proc/{holder.pid}/comm").read_text().strip() != "sleep":
            assert time.monotonic() < deadline, "no namespace was made"
            time.sleep(0.005)
        run(holder.pid, "link", "set", "lo", "up")
        yield holder.pid
    finally:
        holder.kill()
        holder.wait()


def run(pid: int, *words: str) -> str:
    done = subprocess.run(["nsenter", f"--net=/proc/{pid}/ns/net", "ip", *words], check=True, capture_output=True)
    return done.stdout.decode()


def until(question: Callable[[], R], what: str) -> R:
    deadline = time.monotonic() + 30
    while not (answer := question()):
        assert time.monotonic() < deadline, what
        time.sleep(0.01)
    return answer


def test_a_dropped_packet_appears_with_ends_port_and_count(place: Place) -> None:
    """What comes in on an overlay network is dropped, counted, and listed with source, destination and port."""
    place.set_rules(RULES)
    place.send(place.other, TASK, 8080, 3)
    place.send(place.other, TASK, 53)
    assert place.listed("denied_no_link_in") == {(OTHER, TASK, UDP, 8080): 3, (OTHER, TASK, UDP, 53): 1}
    counters = place.noted_counters()
    assert counters.packets["denied_no_link_in"] == 4
    assert counters.packets[UNLISTED] == 0


def test_on_wireguard_a_wrong_port_is_told_from_no_link(place: Place) -> None:
    """A linked service's packet to another port is noted as that, and the right port lets its packet in."""
    place.set_rules(RULES)
    with contextlib.closing(place.udp(place.task, (TUNNELLED, 80))) as server:
        place.send(place.other, TUNNELLED, 81, 2)
        place.send(place.other, TUNNELLED, 80)
        assert server.recv(100) == b"hello"
    assert place.listed("denied_wrong_port_in") == {(PEER, TUNNELLED, UDP, 81): 2}
    place.set_rules(replace(RULES, sources=(Source("db", (IPv4Address(PEER),), None),)))
    place.send(place.other, TUNNELLED, 81)
    assert place.listed("denied_no_link_in") == {(PEER, TUNNELLED, UDP, 81): 1}


def test_what_a_task_sends_without_a_link_is_noted_by_itself(place: Place) -> None:
    """Out to the overlay network, to a peer outside of the tunnel, and to a VIP that nobody serves."""
    place.set_rules(replace(RULES, sources=(Source("lb", (IPv4Address(OTHER),), ()),)))
    place.send(place.task, "10.9.0.77", 1234, 2)
    place.send(place.task, OTHER, 1234)
    place.send(place.task, VIP, 5432)
    assert place.listed("denied_no_link_out") == {(TASK, "10.9.0.77", UDP, 1234): 2}
    assert place.listed("denied_plaintext_out") == {(TASK, OTHER, UDP, 1234): 1}
    assert place.listed("denied_no_backend_out") == {(TUNNELLED, VIP, UDP, 5432): 1}


def test_a_ping_is_noted_without_a_port(place: Place) -> None:
    """A protocol without ports has 0 in their place."""
    place.set_rules(RULES)

    def ping() -> None:
        with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)) as raw:
            raw.sendto(icmp(8, 0, bytes(8)), (TASK, 0))

    run_in(place.other, ping)
    assert place.listed("denied_no_link_in") == {(OTHER, TASK, 1, 0): 1}


def test_observe_notes_connections_and_lets_them_pass(place: Place) -> None:
    """In observe a TCP connection works and counts once, however much it carries."""
    place.set_rules(replace(RULES, enforce=False))
    with contextlib.closing(run_in(place.task, lambda: socket.create_server((TASK, 8080)))) as server:
        connection = run_in(place.other, lambda: socket.create_connection((TASK, 8080), timeout=10))
        with contextlib.closing(connection), contextlib.closing(server.accept()[0]) as accepted:
            accepted.settimeout(10)
            for _ in range(5):
                connection.sendall(b"question")
                assert accepted.recv(100)
                accepted.sendall(b"answer")
                assert connection.recv(100)
    assert place.listed("passed_no_link_in") == {(OTHER, TASK, 6, 8080): 1}
    assert place.noted_counters().packets["passed_no_link_in"] == 1
    assert not any(name.startswith("denied") for name in place.noted_counters().packets)


def test_a_connection_from_before_is_seen_in_observe(place: Place) -> None:
    """A connection that was open when observing began shows as a flow towards the port that it was opened to."""
    place.set_rules(replace(RULES, enforce=False))  # so that connections are tracked
    with contextlib.closing(run_in(place.task, lambda: socket.create_server((TASK, 8080)))) as server:
        connection = run_in(place.other, lambda: socket.create_connection((TASK, 8080), timeout=10))
        with contextlib.closing(connection), contextlib.closing(server.accept()[0]) as accepted:
            place.set_rules(replace(RULES, enforce=False))
            accepted.sendall(b"from the server, which sends first")
            assert connection.recv(100)
            assert until(lambda: place.listed("flows"), "the flow is seen").keys() == {(OTHER, TASK, 6, 8080)}
    assert place.listed("passed_no_link_in") == {}


def test_an_answer_that_is_dropped_names_the_port_that_was_asked(place: Place) -> None:
    """When enforce cuts a connection, its answers are noted under the port of the connection, not of the client."""
    place.set_rules(replace(RULES, enforce=False))
    with contextlib.closing(run_in(place.task, lambda: socket.create_server((TASK, 8080)))) as server:
        connection = run_in(place.other, lambda: socket.create_connection((TASK, 8080), timeout=10))
        with contextlib.closing(connection), contextlib.closing(server.accept()[0]) as accepted:
            place.set_rules(RULES)
            accepted.sendall(b"lost")
            assert until(lambda: place.listed("denied_no_link_out"), "noted").keys() == {(OTHER, TASK, 6, 8080)}


def test_totals_survive_the_replacement_of_the_table(place: Place) -> None:
    """What was noted before the rules were replaced is read in time and added to what comes after."""
    book = DenialBook(time.time, time.monotonic)
    task, service = TaskId("t"), ServiceId("s")
    place.set_rules(RULES)
    place.send(place.other, TASK, 8080, 3)
    book.read(task, service, place)
    generation = place.noted_counters().generation
    place.set_rules(replace(RULES, sources=()))
    assert place.noted_counters().generation != generation
    assert place.listed("denied_no_link_in") == {}
    place.send(place.other, TASK, 8080, 5)
    book.read(task, service, place)
    (report,) = book.reports()
    assert [totals(entry) for entry in report.entries] == [(Reason.NO_LINK, Direction.IN, OTHER, TASK, UDP, 8080, 8)]
    assert (report.counters["denied_no_link_in"], report.unlisted) == (8, 0)


def totals(entry: DenialEntry) -> tuple[Reason, Direction, str, str, int, int, int]:
    return entry.reason, entry.direction, entry.source, entry.destination, entry.protocol, entry.port, entry.count


def test_a_flood_has_bounded_memory_and_an_exact_count(place: Place) -> None:
    """More ports than a set has room for: the set is full, the counter tells the truth, and nothing passes."""
    place.set_rules(RULES)
    attempts = ENTRIES + 200
    with contextlib.closing(place.udp(place.other)) as udp:
        for port in range(1, attempts + 1):
            udp.sendto(b"x", (TASK, port))
    counters = place.noted_counters().packets
    listed = place.listed("denied_no_link_in")
    assert counters["denied_no_link_in"] == attempts
    assert sum(listed.values()) + counters[UNLISTED] >= attempts
    # The kernel counts room per processor, and may give away a few places more.
    assert len(listed) <= ENTRIES + 64
    book = DenialBook(time.time, time.monotonic)
    book.read(TaskId("t"), ServiceId("s"), place)
    (report,) = book.reports()
    # The kernel may have said a word of its own meanwhile, about groups. All that is counted is listed or unlisted.
    assert report.counters["denied_no_link_in"] == attempts
    denied = sum(count for name, count in report.counters.items() if name.startswith("denied_"))
    assert sum(entry.count for entry in report.entries) + report.unlisted == denied


def test_reading_is_quiet_where_nothing_happened(place: Place) -> None:
    """A second look asks for the table and its counters and for nothing else."""
    calls = Calls()
    with contextlib.closing(run_in(place.task, lambda: Netlink(rtnetlink.NETLINK_NETFILTER, calls))) as tables:
        here = replace(place, tables=tables)
        book = DenialBook(time.time, time.monotonic)
        place.set_rules(RULES)
        place.send(place.other, TASK, 8080)
        book.read(TaskId("t"), ServiceId("s"), here)
        before = calls.count
        book.read(TaskId("t"), ServiceId("s"), here)
        assert calls.count - before == 2


def test_path_mtu_discovery_works_in_enforce(place: Place) -> None:
    """An ICMP error about our own packet comes in through the tunnel, and the path's MTU is learned from it."""
    place.set_rules(replace(RULES, sources=(Source("db", (IPv4Address(PEER),), None, (ports("7/udp"),)),)))
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 128, 1, 0x4000, 64, UDP, 0, packed(TUNNELLED), packed(PEER))
    quoted = header + struct.pack("!HHHH", 4444, 7, 108, 0)

    def complain() -> None:
        with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)) as raw:
            raw.sendto(icmp(3, 4, struct.pack("!HH", 0, 1200) + quoted), (TUNNELLED, 0))

    pid = int(place.task.path.split("/")[2])
    with contextlib.closing(place.udp(place.task, (TUNNELLED, 4444))) as client:
        client.sendto(bytes(100), (PEER, 7))
        run_in(place.other, complain)
        until(lambda: "mtu 1200" in run(pid, "route", "get", PEER), "the path's MTU is known")
    assert place.listed("denied_no_link_in") == {}


def packed(address: str) -> bytes:
    return IPv4Address(address).packed


def icmp(kind: int, code: int, rest: bytes) -> bytes:
    """A message with its checksum (RFC 792)."""
    data = struct.pack("!BBH", kind, code, 0) + rest
    data += bytes(len(data) % 2)
    words = sum(struct.unpack(f"!{len(data) // 2}H", data))
    words = (words >> 16) + (words & 0xFFFF)
    checksum = ~(words + (words >> 16)) & 0xFFFF
    return struct.pack("!BBH", kind, code, checksum) + rest
