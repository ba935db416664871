"""The rules of two linked tasks with real packets: what a link opens, and that nothing outlives it.

Two namespaces are joined by a veth pair whose ends have the name of the WireGuard interface: for the rules that is one.
"""

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest

from agent.kernel.api import Namespace
from agent.kernel.namespace import identify, run_in
from agent.rules.closed import closed
from agent.rules.render import RuleSet, Source, render
from hivewire.ids import TaskId
from hivewire.records import PortRange
from tests.needs import need_namespaces
from tests.real_nft import put
from tests.unit.agent.values import ports

HERE, THERE = IPv4Address("10.9.1.1"), IPv4Address("10.9.1.2")
SHORT_S = 0.4


def rules(other: IPv4Address, opens: tuple[str, ...] | None, answers: tuple[str, ...] = ()) -> str:
    """What ``other`` may open here (None: nothing), and which ports of theirs answer us."""

    def read(written: tuple[str, ...]) -> tuple[PortRange, ...]:
        return tuple(map(ports, written))

    sources = [Source("other", (other,), read(opens))] if opens is not None else []
    sources += [Source("other", (other,), None, read(answers))] if answers else []
    return render(RuleSet(True, (), (), tuple(sources)))[0]


class Pair:
    """Two tasks; ``here`` is the client of most tests."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        pids = [self._hold(), self._hold()]
        made = f"ip link add wg0 netns {pids[0]} type veth peer name wg0 netns {pids[1]}"
        subprocess.run(made.split(), check=True)
        self.here, self.there = (identify(TaskId(f"t{pid}"), f"/proc/{pid}/ns/net") for pid in pids)
        for namespace, address in ((self.here, HERE), (self.there, THERE)):
            run_in(namespace, lambda address=address: self._set_up(address))

    def _hold(self) -> int:
        holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        self._stack.callback(holder.wait)
        self._stack.callback(holder.kill)
        while os.stat(f"/proc/{holder.pid}/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino:
            os.sched_yield()
        return holder.pid

    @staticmethod
    def _set_up(address: IPv4Address) -> None:
        for command in ("link set lo up", f"addr add {address}/24 dev wg0", "link set wg0 up"):
            subprocess.run(["ip", *command.split()], check=True)

    def link(self, port: int | None, back: int | None = None) -> None:
        """A link from here to a port there, and perhaps one back to a port here."""
        to, fro = ((str(p),) if p else () for p in (port, back))
        self.apply(self.here, rules(THERE, fro or None, to))
        self.apply(self.there, rules(HERE, to or None, fro))

    def apply(self, namespace: Namespace, text: str) -> None:
        put(namespace, text)

    def connect(self, port: int, *, back: bool = False) -> tuple[socket.socket, socket.socket]:
        """A connection from here to there, or back: the client's end and the server's. Raises TimeoutError."""
        one, other, address = (self.there, self.here, HERE) if back else (self.here, self.there, THERE)
        server = self._stack.enter_context(run_in(other, lambda: socket.create_server(("0.0.0.0", port))))
        client = run_in(one, lambda: socket.create_connection((str(address), port), SHORT_S))
        self._stack.enter_context(client)
        server.settimeout(SHORT_S)
        accepted = self._stack.enter_context(server.accept()[0])
        accepted.settimeout(SHORT_S)
        return client, accepted


@pytest.fixture
def pair() -> Iterator[Pair]:
    need_namespaces()
    with contextlib.ExitStack() as stack:
        yield Pair(stack)


def passes(sender: socket.socket, receiver: socket.socket) -> bool:
    sender.sendall(b"x")
    try:
        return receiver.recv(100) != b""
    except TimeoutError:
        return False


def receives(receiver: socket.socket) -> bool:
    receiver.settimeout(20)
    return receiver.recv(100) != b""


def test_a_link_carries_both_ways(pair: Pair) -> None:
    """Over a connection that a link allows, requests and answers pass; no other port and no way back is open."""
    pair.link(7000)
    client, server = pair.connect(7000)
    assert passes(client, server)
    assert passes(server, client)
    with pytest.raises(TimeoutError):
        pair.connect(7001)
    with pytest.raises(TimeoutError):
        pair.connect(7000, back=True)


@pytest.mark.parametrize("back", [None, 7001])
def test_the_port_of_a_link_opens_nothing_the_other_way(pair: Pair, back: int | None) -> None:
    """A server that sends from its link's port gets in no further than from any other, but for a link of its own."""
    pair.link(7000, back)
    with run_in(pair.here, lambda: socket.create_server(("0.0.0.0", 7001))):

        def connect() -> socket.socket:
            return socket.create_connection((str(HERE), 7001), SHORT_S, (str(THERE), 7000))

        if back:
            run_in(pair.there, connect).close()
        else:
            with pytest.raises(TimeoutError):
                run_in(pair.there, connect)


@pytest.mark.parametrize("back", [None, 7005])
@pytest.mark.parametrize("server_first", [False, True])
def test_a_revoked_link_ends_its_connections(pair: Pair, back: int | None, *, server_first: bool) -> None:
    """Once its link is gone an open connection carries nothing, either way, though a link back makes them peers."""
    pair.link(7000, back)
    client, server = pair.connect(7000)
    assert passes(client, server)
    pair.link(None, back)
    ends = [(client, server), (server, client)]
    for sender, receiver in (ends[::-1] if server_first else ends) * 2:
        assert not passes(sender, receiver)
    if back:
        assert passes(*pair.connect(back, back=True))
    pair.link(7000, back)
    assert receives(server), "what was sent meanwhile is sent again"


def test_another_port_ends_the_first(pair: Pair) -> None:
    """A link that moves to another port closes the connections of the first."""
    pair.link(7000)
    client, server = pair.connect(7000)
    pair.link(7001)
    assert not passes(client, server)
    assert not passes(server, client)
    assert passes(*pair.connect(7001))


def test_rules_that_change_otherwise_cut_nothing(pair: Pair) -> None:
    """A link more leaves the open connections of the others alone."""
    pair.link(7000)
    client, server = pair.connect(7000)
    pair.link(7000, 7005)
    assert passes(client, server)
    assert passes(server, client)


def test_quarantine_lets_nothing_through(pair: Pair) -> None:
    """The closed table stops an open connection both ways, and new ones; loopback goes on."""
    pair.link(7000)
    client, server = pair.connect(7000)
    pair.apply(pair.there, closed([]).text)
    assert not passes(client, server)
    assert not passes(server, client)
    with pytest.raises(TimeoutError):
        pair.connect(7006)
    with run_in(pair.there, lambda: socket.create_server(("127.0.0.1", 7007))):
        run_in(pair.there, lambda: socket.create_connection(("127.0.0.1", 7007), SHORT_S)).close()
