"""Forgetting tracked connections: one suite for the fake kernel and for connection tracking in a real namespace."""

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Protocol

import pytest

from agent.kernel.api import Kernel, Namespace
from agent.kernel.namespace import identify, run_in
from agent.kernel.node import NodeKernel
from agent.kernel.rtnetlink import Calls
from agent.ops import ForgetFlows
from hivewire.ids import TaskId
from tests.fakes.kernel import FakeKernel
from tests.needs import need_namespaces

TASK = TaskId("task1")
OWN, ONE, TWO, VIP = (IPv4Address(f"10.9.0.{n}") for n in (2, 3, 4, 200))
PORT = 7000

Flow = tuple[IPv4Address, IPv4Address]


class Bench(Protocol):
    kernel: Kernel
    namespace: Namespace

    def connect(self, source: IPv4Address, destination: IPv4Address) -> Flow:
        """Open a connection and keep it; who began it, and the task that it leads to. VIP leads to ONE."""

    def flows(self) -> set[Flow]:
        """The connections that are tracked."""


class FakeBench:
    def __init__(self) -> None:
        self.kernel: Kernel = FakeKernel()
        assert isinstance(self.kernel, FakeKernel)
        self._there = self.kernel.add_namespace("/fake", {OWN: "eth0"})
        self.namespace = self.kernel.find(TASK, "/fake")

    def connect(self, source: IPv4Address, destination: IPv4Address) -> Flow:
        flow = (source, ONE if destination == VIP else destination)
        self._there.flows.add(flow)
        return flow

    def flows(self) -> set[Flow]:
        return set(self._there.flows)


RULES = f"""
table ip test {{
    chain output {{ type nat hook output priority -110; ip daddr {VIP} dnat to {ONE}; }}
    chain input {{ type filter hook input priority 0; ct state established accept; }}
}}
"""


class RealBench:
    def __init__(self, stack: contextlib.ExitStack) -> None:
        driver: Any = None  # no device is touched
        self.kernel: Kernel = NodeKernel(driver, Calls())
        holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        stack.callback(holder.wait)
        stack.callback(holder.kill)
        path = f"/proc/{holder.pid}/ns/net"
        own = os.stat("/proc/self/ns/net").st_ino
        while os.stat(path).st_ino == own:
            os.sched_yield()
        self.namespace = identify(TASK, path)
        self._stack = stack
        run_in(self.namespace, self._set_up)

    def _set_up(self) -> None:
        for command in ("link set lo up", *(f"addr add {a}/32 dev lo" for a in (OWN, ONE, TWO, VIP))):
            subprocess.run(["ip", *command.split()], check=True)
        subprocess.run(["nft", "-f", "-"], input=RULES, text=True, check=True)
        self._server = self._stack.enter_context(socket.create_server(("0.0.0.0", PORT)))

    def connect(self, source: IPv4Address, destination: IPv4Address) -> Flow:
        def work() -> None:
            client = socket.create_connection((str(destination), PORT), 5, (str(source), 0))
            self._stack.enter_context(client)
            self._stack.enter_context(self._server.accept()[0])

        run_in(self.namespace, work)
        return (source, ONE if destination == VIP else destination)

    def flows(self) -> set[Flow]:
        return run_in(self.namespace, self._read)

    def _read(self) -> set[Flow]:
        found = set()
        for line in Path("/proc/thread-self/net/nf_conntrack").read_text().splitlines():
            words = [word.partition("=") for word in line.split()]
            sources = [IPv4Address(value) for name, _, value in words if name == "src"]
            found.add((sources[0], sources[1]))  # who answers is where it leads to
        return found


@pytest.fixture(params=["fake", "real"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    with contextlib.ExitStack() as stack:
        if request.param == "fake":
            yield FakeBench()
            return
        need_namespaces()
        if not Path("/proc/net/nf_conntrack").exists():
            pytest.skip("this kernel does not list the connections that it tracks")
        yield RealBench(stack)


def forget(bench: Bench, *addresses: IPv4Address) -> None:
    with bench.kernel.open(bench.namespace) as session:
        session.apply([ForgetFlows(frozenset(addresses))])


def test_connections_of_an_address_are_forgotten(bench: Bench) -> None:
    """Connections to an address go, through a VIP too, and all others stay."""
    direct, other = bench.connect(OWN, ONE), bench.connect(OWN, TWO)
    bench.connect(OWN, VIP)
    assert bench.flows() == {direct, other}
    forget(bench, ONE)
    assert bench.flows() == {other}


def test_connections_from_an_address_are_forgotten(bench: Bench) -> None:
    """Connections that the address opened go as well."""
    bench.connect(ONE, OWN)
    other = bench.connect(TWO, OWN)
    forget(bench, ONE)
    assert bench.flows() == {other}


def test_many_are_forgotten_at_once(bench: Bench) -> None:
    """Several hundred connections go with one operation."""
    for _ in range(150):
        bench.connect(OWN, ONE)
    forget(bench, ONE, TWO)
    assert bench.flows() == set()


def test_nothing_to_forget_is_no_error(bench: Bench) -> None:
    """Where there are no such connections nothing happens, twice too."""
    other = bench.connect(OWN, TWO)
    forget(bench, ONE)
    forget(bench, ONE)
    assert bench.flows() == {other}
