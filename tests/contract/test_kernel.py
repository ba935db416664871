"""One suite for every Kernel: the fake, wireguard-go, and the kernel's own WireGuard where this machine has it.

The real ones work in network namespaces of their own: two nodes joined by a veth pair, and one namespace per task.
Each lives as long as a process of the test, so nothing of it outlives the test, however that ends.
"""

import contextlib
import itertools
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from pathlib import Path
from typing import Protocol, TypeVar

import pytest

from agent.kernel import hosting, netlink, rtnetlink
from agent.kernel.api import Kernel, Namespace
from agent.kernel.encode import attribute
from agent.kernel.namespace import identify, run_in
from agent.kernel.node import NodeKernel
from agent.kernel.rtnetlink import Calls, Netlink, Request
from agent.kernel.selection import select
from agent.kernel.userspace import UserspaceDriver
from agent.observed import ObservedInterface, ObservedTask
from agent.ops import (
    AddPeer,
    AddRoute,
    CreateInterface,
    Op,
    PeerSpec,
    RemoveInterface,
    RemovePeer,
    RemoveRoute,
    RemoveRules,
    Route,
    SetMtu,
    SetRules,
    SetUp,
    UpdatePeer,
)
from hivewire.errors import InvalidSettings, KernelBusy, NamespaceGone, NoWireGuard
from hivewire.ids import TaskId
from hivewire.keys import PrivateKey
from hivewire.records import Endpoint
from tests.fakes.kernel import FakeKernel, FakeUnderlay
from tests.needs import missing

R = TypeVar("R")

FIRST_PORT, LAST_PORT = 51800, 51803
NODES = (IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2"))
ROOT = Path(__file__).parents[2]
WAIT_S = 30.0


@dataclass
class Task:
    """A task of the bench: its namespace and its overlay address."""

    id: TaskId
    path: str
    node: int
    address: IPv4Address
    kernel: Kernel
    namespace: Namespace
    key: PrivateKey = field(default_factory=PrivateKey.generate)

    @property
    def network(self) -> IPv4Network:
        return IPv4Network(self.address)


class Bench(Protocol):
    """What the suite needs beside the Kernel."""

    def kernel(self, node: int = 0) -> Kernel:
        """A new Kernel of the node, as a restarted agent has it."""

    def on(self, node: int, work: Callable[[], R]) -> R:
        """Do the work on the node."""

    def task(self, node: int = 0) -> Task:
        """A container with an overlay address."""

    def end(self, task: Task) -> None:
        """The container is gone."""

    def replace(self, task: Task) -> None:
        """Another container is behind the task's path."""

    def latency(self, source: Task, destination: Task, patience_s: float) -> float | None:
        """Seconds until a packet came back from the destination's overlay address; None: it did not."""

    def take_down(self, task: Task) -> None:
        """Bring the interface down behind the agent's back."""

    def occupy(self, node: int, port: int) -> None:
        """Let another program of the node have the UDP port."""

    def own_path(self, node: int) -> str | None:
        """The path of the node's own namespace."""


# -- the fake ---------------------------------------------------------------------------------------------------


class FakeBench:
    def __init__(self) -> None:
        underlay = FakeUnderlay(time.time)
        self._kernels = [FakeKernel(underlay, address) for address in NODES]
        self._numbers = itertools.count(10)

    def kernel(self, node: int = 0) -> Kernel:
        return self._kernels[node]

    def on(self, node: int, work: Callable[[], R]) -> R:
        return work()

    def task(self, node: int = 0) -> Task:
        number = next(self._numbers)
        path, address, kernel = f"/fake/{number}", IPv4Address(f"10.9.0.{number}"), self._kernels[node]
        kernel.add_namespace(path, {address: "eth0"})
        task = TaskId(f"task{number:020}")
        return Task(task, path, node, address, kernel, kernel.find(task, path))

    def end(self, task: Task) -> None:
        self._kernels[task.node].remove_namespace(task.path)

    def replace(self, task: Task) -> None:
        self._kernels[task.node].add_namespace(task.path, {task.address: "eth0"})

    def latency(self, source: Task, destination: Task, patience_s: float) -> float | None:
        network = self._kernels[0].network
        there = self._kernels[source.node].namespaces[source.path]
        back = self._kernels[destination.node].namespaces[destination.path]
        arrived = network.send(there, source.address, destination.address)
        return 0.0 if arrived and network.send(back, destination.address, source.address) else None

    def take_down(self, task: Task) -> None:
        self._kernels[task.node].namespaces[task.path].take_down()

    def occupy(self, node: int, port: int) -> None:
        self._kernels[node].ports_in_use.add(port)

    def own_path(self, node: int) -> str | None:
        return None


# -- real namespaces --------------------------------------------------------------------------------------------


class RealBench:
    """Two nodes, each with its namespace and, for wireguard-go, its host process."""

    def __init__(self, stack: contextlib.ExitStack, folder: Path, backend: str) -> None:
        self._stack = stack
        self._folder = folder
        self._backend = backend
        self._numbers = itertools.count(10)
        self._holders: dict[str, subprocess.Popen[bytes]] = {}
        self._nodes = [self._hold() for _ in NODES]
        self._node_spaces = [identify(TaskId("node"), _path(holder)) for holder in self._nodes]
        self._join()
        self.hosts: list[subprocess.Popen[bytes]] = []
        self.folders = [folder / f"node{number}" for number in range(len(NODES))]
        if backend == "userspace":
            self.hosts = [self.start_host(number) for number in range(len(NODES))]

    def _hold(self) -> subprocess.Popen[bytes]:
        """A process in a new network namespace, which lives as long as this one at most."""
        command = ["unshare", "--net", "setpriv", "--pdeathsig", "KILL", "sleep", "infinity"]
        holder = subprocess.Popen(command)
        self._stack.callback(_kill, holder)
        _until(lambda: Path(f"/proc/{holder.pid}/comm").read_text().strip() == "sleep", "a namespace was made")
        return holder

    def _join(self) -> None:
        first, second = self._nodes
        _ip(first, f"link add under0 type veth peer name under0 netns {second.pid}")
        for holder, address in zip(self._nodes, NODES, strict=True):
            _ip(holder, "link set lo up", "link set under0 up", f"address add {address}/24 dev under0")

    def start_host(self, node: int) -> subprocess.Popen[bytes]:
        folder = self.folders[node]
        folder.mkdir(exist_ok=True)
        # wireguard-go's folder is compiled in: the host gets its own view of it.
        script = (
            'mount -t tmpfs tmpfs /run && mkdir /run/wireguard && mount --bind "$1" /run/wireguard && '
            'exec setpriv --pdeathsig TERM "$2" -m agent.kernel.userspace_host'
        )
        enter = ["nsenter", f"--net={_path(self._nodes[node])}", "unshare", "--mount"]
        with (folder / "log").open("ab") as log:
            host = subprocess.Popen(
                [*enter, "sh", "-c", script, "sh", str(folder), sys.executable], cwd=ROOT, stderr=log
            )
        self._stack.callback(_end, host)
        _until((folder / hosting.SOCKET).is_socket, "the host is ready", folder / "log")
        return host

    def kernel(self, node: int = 0) -> Kernel:
        calls = Calls()
        if self._backend == "kernel":
            return NodeKernel(netlink.KernelDriver(calls), calls)
        return NodeKernel(UserspaceDriver(self.folders[node], calls), calls)

    def on(self, node: int, work: Callable[[], R]) -> R:
        return run_in(self._node_spaces[node], work)

    def task(self, node: int = 0) -> Task:
        number = next(self._numbers)
        path, address = str(self._folder / f"task{number}"), IPv4Address(f"10.9.0.{number}")
        self._put(path, address)
        task, kernel = TaskId(f"{os.getpid():06}{number:019}"[::-1]), self.kernel(node)
        return Task(task, path, node, address, kernel, self.on(node, lambda: kernel.find(task, path)))

    def _put(self, path: str, address: IPv4Address) -> None:
        holder = self._hold()
        # Stands for the veth to the overlay's bridge.
        _ip(holder, "link set lo up", "link add eth0 type bridge", f"address add {address}/24 dev eth0")
        _ip(holder, "link set eth0 up")
        Path(path).unlink(missing_ok=True)
        Path(path).symlink_to(_path(holder))
        self._holders[path] = holder

    def end(self, task: Task) -> None:
        _kill(self._holders.pop(task.path))

    def replace(self, task: Task) -> None:
        self._put(task.path, task.address)

    def latency(self, source: Task, destination: Task, patience_s: float) -> float | None:
        def bound(task: Task) -> socket.socket:
            udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            udp.bind((str(task.address), 7))
            udp.settimeout(patience_s)
            return udp

        with (
            run_in(source.namespace, lambda: bound(source)) as ours,
            run_in(destination.namespace, lambda: bound(destination)) as theirs,
        ):
            start = time.monotonic()
            try:
                ours.sendto(b"hello", (str(destination.address), 7))
                data, sender = theirs.recvfrom(100)
                theirs.sendto(data, sender)
                ours.recv(100)
            except OSError:
                return None
            return time.monotonic() - start

    def take_down(self, task: Task) -> None:
        _ip(self._holders[task.path], "link set wg0 down")

    def occupy(self, node: int, port: int) -> None:
        def bind() -> socket.socket:
            udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            udp.bind(("0.0.0.0", port))
            return udp

        self._stack.callback(self.on(node, bind).close)

    def own_path(self, node: int) -> str | None:
        return _path(self._nodes[node])

    def run(self, task: Task, *command: str) -> str:
        return _run(self._holders[task.path], *command)

    def run_on_node(self, node: int, *command: str) -> str:
        return _run(self._nodes[node], *command)


def _path(holder: subprocess.Popen[bytes]) -> str:
    return f"/proc/{holder.pid}/ns/net"


def _run(holder: subprocess.Popen[bytes], *command: str) -> str:
    enter = ["nsenter", f"--net={_path(holder)}"]
    return subprocess.run([*enter, *command], check=True, capture_output=True, text=True).stdout


def _ip(holder: subprocess.Popen[bytes], *commands: str) -> None:
    for command in commands:
        _run(holder, "ip", *command.split())


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(WAIT_S)
    except subprocess.TimeoutExpired:
        _kill(process)


def _until(holds: Callable[[], bool], what: str, log: Path | None = None) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {WAIT_S} s: {what}; {log.read_text() if log else ''}")
        time.sleep(0.005)


def _missing(backend: str) -> str:
    """Why the backend cannot be tried here; empty: it can."""
    if reason := missing(*["wireguard-go"] * (backend == "userspace")):
        return reason
    if backend == "userspace" and not Path("/dev/net/tun").exists():
        return "no /dev/net/tun"
    if backend == "kernel" and not netlink.is_offered(Calls()):
        return "this machine's kernel has no WireGuard: make kernel runs it in a virtual machine"
    return ""


@pytest.fixture(params=["userspace", "kernel"])
def real(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RealBench]:
    if reason := _missing(request.param):
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        yield RealBench(stack, tmp_path, request.param)


@pytest.fixture(params=["fake", "userspace", "kernel"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    if request.param == "fake":
        yield FakeBench()
        return
    if reason := _missing(request.param):
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        yield RealBench(stack, tmp_path, request.param)


# -- what the tests do ------------------------------------------------------------------------------------------


def observe(bench: Bench, task: Task, kernel: Kernel | None = None) -> ObservedTask:
    chosen = kernel or task.kernel

    def work() -> ObservedTask:
        with chosen.open(task.namespace) as session:
            return session.observe()

    return bench.on(task.node, work)


def apply(bench: Bench, task: Task, *ops: Op) -> None:
    def work() -> None:
        with task.kernel.open(task.namespace) as session:
            session.apply(ops)

    bench.on(task.node, work)


def create(bench: Bench, task: Task, mtu: int = 1420) -> ObservedInterface:
    apply(bench, task, CreateInterface(task.key, mtu, FIRST_PORT, LAST_PORT), SetUp())
    return interface(bench, task)


def interface(bench: Bench, task: Task) -> ObservedInterface:
    found = observe(bench, task).interface
    assert found is not None
    return found


def spec(bench: Bench, task: Task, keepalive_s: int = 0) -> PeerSpec:
    """The peer that others have for the task."""
    endpoint = Endpoint(address=NODES[task.node], port=interface(bench, task).listen_port)
    return PeerSpec(task.key.public(), endpoint, frozenset({task.network}), keepalive_s)


def stranger(address: str = "10.9.9.9", port: int = 9) -> PeerSpec:
    """A peer that never answers."""
    endpoint = Endpoint(address=NODES[1], port=port)
    return PeerSpec(PrivateKey.generate().public(), endpoint, frozenset({IPv4Network(address)}))


def link(bench: Bench, first: Task, second: Task) -> None:
    """Make two tasks peers of each other, with routes."""
    for task, other in ((first, second), (second, first)):
        apply(bench, task, AddPeer(spec(bench, other)), AddRoute(Route(other.network, task.address)))


def rules(digest: str, family: str = "ip") -> str:
    return f'table {family} hivewire {{\n\tcomment "{digest}"\n\tchain c {{\n\t\tcounter\n\t}}\n}}\n'


# -- the suite --------------------------------------------------------------------------------------------------


def test_a_namespace_without_interface_shows_only_its_addresses(bench: Bench) -> None:
    """A fresh namespace has an overlay address and nothing of ours."""
    task = bench.task()
    assert observe(bench, task) == ObservedTask({task.address: "eth0"})


def test_a_created_interface_is_observed_as_wanted(bench: Bench) -> None:
    """Key, MTU and port are what was asked for, and it is up."""
    task = bench.task()
    start = time.monotonic()
    found = create(bench, task, mtu=1380)
    print(f"created and observed in {(time.monotonic() - start) * 1000:.1f} ms")
    assert found == ObservedInterface("wg0", task.key.public(), FIRST_PORT, 1380, is_up=True)


def test_an_interface_has_the_tasks_address_beside_its_own_interface(bench: Bench) -> None:
    """Whose interface an address is stays what the engine made of it."""
    task = bench.task()
    apply(bench, task, CreateInterface(task.key, 1420, FIRST_PORT, LAST_PORT, task.address), SetUp())
    assert observe(bench, task).addresses == {task.address: "eth0"}
    if isinstance(bench, RealBench):
        assert f" {task.address}/32 " in bench.run(task, "ip", "-br", "-4", "address", "show", "dev", "wg0")


def test_creating_again_changes_nothing(bench: Bench) -> None:
    """An interface that exists is kept with its key, whatever key the second attempt brings."""
    task = bench.task()
    before = create(bench, task)
    apply(bench, task, CreateInterface(PrivateKey.generate(), 1300, FIRST_PORT, LAST_PORT), SetUp())
    assert interface(bench, task) == before


def test_another_kernel_object_adopts_what_is_there(bench: Bench) -> None:
    """A restarted agent sees the same interface, peers and routes, and can change them."""
    task, peer = bench.task(), stranger()
    create(bench, task)
    # Quietly: the counters of a peer that is shaken hands with move between two looks.
    apply(bench, task, AddPeer(peer, initiate=False), AddRoute(Route(IPv4Network("10.9.9.9"), task.address)))
    before = observe(bench, task)
    adopted = bench.kernel(task.node)
    assert observe(bench, task, adopted) == before
    task.kernel = adopted
    apply(bench, task, RemovePeer(peer.public_key))
    assert not interface(bench, task).peers


def test_peers_are_added_updated_and_removed(bench: Bench) -> None:
    """A peer has what the operations gave it; an update touches only what it names."""
    task, peer = bench.task(), stranger()
    create(bench, task)
    apply(bench, task, AddPeer(peer))
    found = interface(bench, task).peers[peer.public_key]
    assert (found.endpoint, found.allowed_ips, found.keepalive_s) == (peer.endpoint, peer.allowed_ips, 0)
    assert found.last_handshake is None

    apply(bench, task, UpdatePeer(peer.public_key, keepalive_s=25))
    found = interface(bench, task).peers[peer.public_key]
    assert (found.endpoint, found.allowed_ips, found.keepalive_s) == (peer.endpoint, peer.allowed_ips, 25)

    elsewhere = Endpoint(address=NODES[0], port=77)
    wanted = frozenset({IPv4Network("10.9.7.0/24"), IPv4Network("10.9.8.8")})
    apply(bench, task, UpdatePeer(peer.public_key, elsewhere, wanted))
    found = interface(bench, task).peers[peer.public_key]
    assert (found.endpoint, found.allowed_ips, found.keepalive_s) == (elsewhere, wanted, 25)

    apply(bench, task, RemovePeer(peer.public_key), RemovePeer(peer.public_key))
    assert not interface(bench, task).peers


def test_updating_an_absent_peer_makes_none(bench: Bench) -> None:
    """A peer that was removed meanwhile does not come back half."""
    task = bench.task()
    create(bench, task)
    apply(bench, task, UpdatePeer(stranger().public_key, allowed_ips=frozenset({IPv4Network("10.9.9.1")})))
    assert not interface(bench, task).peers


def test_adding_a_peer_twice_keeps_the_last_word(bench: Bench) -> None:
    """A peer that exists is brought to what the operation says."""
    task, peer = bench.task(), stranger()
    create(bench, task)
    moved = PeerSpec(peer.public_key, peer.endpoint, frozenset({IPv4Network("10.9.9.8")}), 5)
    apply(bench, task, AddPeer(peer), AddPeer(moved))
    found = interface(bench, task).peers[peer.public_key]
    assert (found.allowed_ips, found.keepalive_s) == (moved.allowed_ips, 5)


def test_an_address_belongs_to_the_last_peer_that_was_given_it(bench: Bench) -> None:
    """Cryptokey routing: an allowed IP given to a second peer is taken from the first."""
    task, first, second = bench.task(), stranger(), stranger()
    create(bench, task)
    apply(bench, task, AddPeer(first), AddPeer(second))
    peers = interface(bench, task).peers
    assert peers[first.public_key].allowed_ips == frozenset()
    assert peers[second.public_key].allowed_ips == second.allowed_ips


def test_a_device_is_no_peer_of_itself(bench: Bench) -> None:
    """WireGuard ignores a peer with the device's own key without an error."""
    task = bench.task()
    create(bench, task)
    apply(bench, task, AddPeer(spec(bench, task)))
    assert not interface(bench, task).peers


def test_hundreds_of_peers_arrive_whole(bench: Bench) -> None:
    """More peers than one message holds are all there, each with its address."""
    task = bench.task()
    create(bench, task)
    peers = {peer.public_key: peer for peer in (stranger(f"10.8.{n // 250}.{n % 250}") for n in range(900))}
    start = time.monotonic()
    apply(bench, task, *(AddPeer(peer) for peer in peers.values()))
    middle = time.monotonic()
    found = interface(bench, task).peers
    print(f"900 peers: added in {middle - start:.3f} s, observed in {time.monotonic() - middle:.3f} s")
    assert {key: peer.allowed_ips for key, peer in found.items()} == {k: p.allowed_ips for k, p in peers.items()}


def test_routes_are_added_replaced_and_removed(bench: Bench) -> None:
    """A route shows with its source, and one to the same destination takes its place."""
    task = bench.task()
    create(bench, task)
    routes = [Route(IPv4Network(f"10.9.1.{n}"), task.address) for n in range(1, 4)]
    apply(bench, task, *(AddRoute(route) for route in [*routes, routes[0]]))
    assert observe(bench, task).routes == frozenset(routes)
    apply(bench, task, RemoveRoute(routes[0]), RemoveRoute(routes[0]), RemoveRoute(routes[1]))
    assert observe(bench, task).routes == {routes[2]}
    smaller = replace(routes[2], mtu=1280)
    apply(bench, task, AddRoute(smaller))
    assert observe(bench, task).routes == {smaller}
    apply(bench, task, AddRoute(routes[2]))
    assert observe(bench, task).routes == {routes[2]}


def test_a_route_needs_an_address_of_the_task_as_source(bench: Bench) -> None:
    """A source that the namespace does not have is refused, and what came before stays applied."""
    task = bench.task()
    create(bench, task)
    good = Route(IPv4Network("10.9.1.1"), task.address)
    wrong = Route(IPv4Network("10.9.1.2"), IPv4Address("10.66.0.1"))
    with pytest.raises(KernelBusy, match=r"10\.9\.1\.2"):
        apply(bench, task, AddRoute(good), AddRoute(wrong))
    assert observe(bench, task).routes == {good}


def test_an_interface_that_is_down_has_no_routes(bench: Bench) -> None:
    """Bringing it down drops its routes and closes its port; bringing it up again opens the same port."""
    task = bench.task()
    port = create(bench, task).listen_port
    route = Route(IPv4Network("10.9.1.1"), task.address)
    apply(bench, task, AddRoute(route))
    bench.take_down(task)
    found = observe(bench, task)
    assert found.interface is not None
    assert (found.interface.is_up, found.interface.listen_port, found.routes) == (False, 0, frozenset())
    with pytest.raises(KernelBusy):
        apply(bench, task, AddRoute(route))
    apply(bench, task, SetUp(), AddRoute(route))
    found = observe(bench, task)
    assert found.interface is not None
    assert (found.interface.is_up, found.interface.listen_port, found.routes) == (True, port, frozenset({route}))


def test_the_mtu_changes_in_place(bench: Bench) -> None:
    """A new MTU keeps key, port and peers."""
    task, peer = bench.task(), stranger()
    before = create(bench, task)
    apply(bench, task, AddPeer(peer), SetMtu(1300))
    after = interface(bench, task)
    assert (after.mtu, after.public_key, after.listen_port) == (1300, before.public_key, before.listen_port)
    assert set(after.peers) == {peer.public_key}


@pytest.mark.parametrize("family", ["ip", "inet"])
def test_rules_are_set_replaced_and_removed(bench: Bench, family: str) -> None:
    """The digest of the table is what was set last; removing it twice is no error."""
    task = bench.task()
    apply(bench, task, SetRules(rules("aaaa1111", family), "aaaa1111"))
    assert observe(bench, task).rules == "aaaa1111"
    apply(bench, task, SetRules(rules("bbbb2222", family), "bbbb2222"))
    assert observe(bench, task).rules == "bbbb2222"
    apply(bench, task, RemoveRules(), RemoveRules())
    assert observe(bench, task).rules == ""


def test_removing_the_interface_takes_its_routes_and_peers(bench: Bench) -> None:
    """Nothing is left, a second removal is no error, and a new interface starts empty."""
    task = bench.task()
    create(bench, task)
    apply(bench, task, AddPeer(stranger()), AddRoute(Route(IPv4Network("10.9.1.1"), task.address)))
    apply(bench, task, RemoveInterface(), RemoveInterface())
    apply(bench, task, RemovePeer(stranger().public_key), RemoveRoute(Route(IPv4Network("10.9.1.1"), task.address)))
    assert observe(bench, task) == ObservedTask({task.address: "eth0"})
    assert not create(bench, task).peers


def test_changing_an_absent_interface_is_refused(bench: Bench) -> None:
    """Peers and routes need an interface; the loop is told to observe again."""
    task = bench.task()
    for op in (AddPeer(stranger()), AddRoute(Route(IPv4Network("10.9.1.1"), task.address)), SetUp(), SetMtu(1300)):
        with pytest.raises(KernelBusy):
            apply(bench, task, op)


def test_ports_are_given_until_the_range_is_used_up(bench: Bench) -> None:
    """Each device has the first free port, also beside other programs; then there is a plain error and no trace."""
    bench.occupy(0, FIRST_PORT + 1)
    tasks = [bench.task() for _ in range(4)]
    ports = [create(bench, task).listen_port for task in tasks[:3]]
    assert ports == [FIRST_PORT, FIRST_PORT + 2, FIRST_PORT + 3]
    with pytest.raises(KernelBusy, match=f"{FIRST_PORT}"):
        create(bench, tasks[3])
    assert observe(bench, tasks[3]).interface is None
    apply(bench, tasks[0], RemoveInterface())
    assert create(bench, tasks[3]).listen_port == FIRST_PORT


def test_two_tasks_of_two_nodes_talk(bench: Bench) -> None:
    """Packets pass both ways between linked tasks, and the handshake shows on both sides."""
    first, second = bench.task(0), bench.task(1)
    create(bench, first)
    create(bench, second)
    link(bench, first, second)
    took = bench.latency(first, second, WAIT_S)
    assert took is not None
    print(f"first packet there and back in {took * 1000:.1f} ms")
    for task, other in ((first, second), (second, first)):
        peer = interface(bench, task).peers[other.key.public()]
        assert peer.last_handshake == pytest.approx(time.time(), abs=30)
        assert peer.received_bytes > 0
        assert peer.sent_bytes > 0


def test_two_tasks_of_one_node_talk(bench: Bench) -> None:
    """Devices of one node reach each other through the node's own address."""
    first, second = bench.task(), bench.task()
    create(bench, first)
    create(bench, second)
    link(bench, first, second)
    took = bench.latency(first, second, WAIT_S)
    assert took is not None
    print(f"first packet there and back in {took * 1000:.1f} ms")


def test_whoever_adds_a_peer_initiates(bench: Bench) -> None:
    """Both sides have a session before anybody sends: the second side to know the other shook hands."""
    first, second = bench.task(0), bench.task(1)
    create(bench, first)
    create(bench, second)
    link(bench, first, second)
    start = time.monotonic()

    def has_session() -> bool:
        return interface(bench, first).peers[second.key.public()].last_handshake is not None

    _until(has_session, "a handshake")
    print(f"handshake within {(time.monotonic() - start) * 1000:.1f} ms")


def test_without_the_key_of_the_other_nothing_passes(bench: Bench) -> None:
    """One side alone cannot open a link."""
    first, second = bench.task(0), bench.task(1)
    create(bench, first)
    create(bench, second)
    apply(bench, first, AddPeer(spec(bench, second)), AddRoute(Route(second.network, first.address)))
    apply(bench, second, AddRoute(Route(first.network, second.address)))
    assert bench.latency(first, second, 0.3) is None


def test_a_source_address_must_belong_to_the_peer(bench: Bench) -> None:
    """A packet whose source is not among the sender's allowed IPs is dropped by the receiver."""
    first, second = bench.task(0), bench.task(1)
    create(bench, first)
    create(bench, second)
    link(bench, first, second)
    apply(bench, second, UpdatePeer(first.key.public(), allowed_ips=frozenset({IPv4Network("10.9.3.3")})))
    assert bench.latency(first, second, 0.3) is None


def test_an_ended_namespace_is_gone(bench: Bench) -> None:
    """Neither finding nor opening works after the container's end, and forgetting the task twice is no error."""
    task = bench.task()
    create(bench, task)
    bench.end(task)
    with pytest.raises(NamespaceGone):
        observe(bench, task)
    with pytest.raises(NamespaceGone):
        bench.on(0, lambda: task.kernel.find(task.id, task.path))
    for _ in range(2):
        bench.on(0, lambda: task.kernel.forget(task.id))


def test_another_namespace_behind_the_path_is_not_entered(bench: Bench) -> None:
    """What was found is what is opened, or nothing."""
    task = bench.task()
    bench.replace(task)
    with pytest.raises(NamespaceGone):
        observe(bench, task)


def test_the_underlay_is_the_interface_with_the_address(bench: Bench) -> None:
    """Its MTU is measured; an address that the node does not have is a wrong setting."""
    kernel = bench.kernel(1)
    assert bench.on(1, lambda: kernel.underlay(NODES[1])).mtu == 1500
    with pytest.raises(InvalidSettings, match=r"192\.0\.2\.1"):
        bench.on(1, lambda: kernel.underlay(NODES[0]))


def test_calls_are_counted(bench: Bench) -> None:
    """Looking and changing both count, and nothing else does."""
    task = bench.task()
    before = task.kernel.calls
    observe(bench, task)
    seen = task.kernel.calls
    apply(bench, task, SetRules(rules("cccc3333"), "cccc3333"))
    assert before < seen < task.kernel.calls


# -- only where the namespaces are real -------------------------------------------------------------------------


def test_the_nodes_own_namespace_is_refused(real: RealBench) -> None:
    """Docker lists the node's namespace as "default" beside those of tasks: it is never touched."""
    own = real.own_path(0)
    assert own is not None
    kernel = real.kernel()
    with pytest.raises(NamespaceGone, match="node itself"):
        real.on(0, lambda: kernel.find(TaskId("host"), own))
    with pytest.raises(NamespaceGone, match="node itself"):
        kernel.find(TaskId("host"), "/proc/self/ns/net")


def test_what_is_no_namespace_is_gone(real: RealBench, tmp_path: Path) -> None:
    """An empty file (not mounted yet), another kind of namespace, a fifo, a folder, nothing at all."""
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "fifo")
    kernel = real.kernel()
    for path in (tmp_path / "empty", tmp_path / "fifo", tmp_path, tmp_path / "absent", Path("/proc/self/ns/uts")):
        with pytest.raises(NamespaceGone):
            kernel.find(TaskId("t"), str(path))
    assert not (tmp_path / "absent").exists()


def test_nothing_keeps_a_namespace_alive(real: RealBench) -> None:
    """After the container's end its device goes, its UDP port is another task's to have, and no process stays."""
    task = real.task()
    port = create(real, task).listen_port
    apply(real, task, AddPeer(stranger()), SetRules(rules("dddd4444"), "dddd4444"))
    assert f":{port}" in real.run_on_node(0, "ss", "-Hlun")
    start = time.monotonic()
    real.end(task)
    _until(lambda: f":{port}" not in real.run_on_node(0, "ss", "-Hlun"), "the port is free")
    print(f"device and port gone {(time.monotonic() - start) * 1000:.0f} ms after the container")
    _until(lambda: "hw" not in real.run_on_node(0, "ip", "-o", "link"), "nothing of it is on the node")
    if real.hosts:
        _until(lambda: not list(real.folders[0].glob("hw*")), "its socket is gone")
    assert create(real, real.task()).listen_port == port


def test_a_pass_leaves_no_descriptor_thread_or_process(real: RealBench) -> None:
    """What enters a namespace is a thread that ends: nothing forks, and the caller stays where it is."""
    task = real.task()
    create(real, task)  # what is opened once and kept is open by now
    forks: list[str] = []
    counting = True
    os.register_at_fork(before=lambda: forks.append("fork") if counting else None)

    def held() -> tuple[str, set[str], set[str]]:
        inside = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_link(fd)}
        return os.readlink("/proc/thread-self/ns/net"), set(os.listdir("/proc/self/task")), inside

    def work() -> None:
        before = held()
        with task.kernel.open(task.namespace) as session:
            session.observe()
            session.apply([AddPeer(stranger(), initiate=False), AddRoute(Route(IPv4Network("10.9.9.9"), task.address))])
            with pytest.raises(KernelBusy):
                session.apply([AddRoute(Route(IPv4Network("10.9.9.8"), IPv4Address("10.66.0.1")))])
        _until(lambda: held() == before, "all is as before")

    try:
        real.on(0, work)
    finally:
        counting = False
    assert forks == []


def _is_link(fd: str) -> bool:
    return os.path.islink(f"/proc/self/fd/{fd}")


def test_what_raises_in_a_namespace_raises_outside(real: RealBench) -> None:
    """The error comes back as it is, and the next piece of work finds nothing of it."""
    task = real.task()
    where = run_in(task.namespace, lambda: os.readlink("/proc/thread-self/ns/net"))
    assert where == f"net:[{task.namespace.inode}]"
    assert os.readlink("/proc/thread-self/ns/net") != where
    with pytest.raises(ZeroDivisionError):
        run_in(task.namespace, lambda: 1 // 0)
    with pytest.raises(SystemExit):
        run_in(task.namespace, sys.exit)
    assert run_in(task.namespace, lambda: 7) == 7


def test_a_refusal_says_why_and_stops_nothing(real: RealBench) -> None:
    """Of hundreds of requests in a few datagrams each has an outcome of its own, with the kernel's words for it."""
    task = real.task()
    index = run_in(task.namespace, lambda: socket.if_nametoindex("eth0"))

    def request(number: int) -> Request:
        source = task.address if number % 100 else IPv4Address("10.66.0.1")
        route = Route(IPv4Network((10 << 24) + (7 << 16) + number), source)
        return rtnetlink._route_request(AddRoute(route), index)

    with contextlib.closing(run_in(task.namespace, lambda: Netlink(rtnetlink.NETLINK_ROUTE, Calls()))) as routes:
        outcomes = routes.ask_all(request(number) for number in range(250))
        assert [number for number, error in enumerate(outcomes) if error is not None] == [0, 100, 200]
        assert "prefsrc" in str(outcomes[0])
        network = {route for route in rtnetlink.routes(routes, index) if route.destination.prefixlen < 32}
        assert len(rtnetlink.routes(routes, index) - network) == 250 - 3
        assert routes.ask_all([]) == []


def test_an_endpoint_of_the_sixth_version_is_read_as_given(real: RealBench) -> None:
    """A node may be reached over IPv6."""
    task = real.task()
    create(real, task)
    peer = PeerSpec(stranger().public_key, Endpoint(address=IPv6Address("2001:db8::7"), port=7), frozenset())
    apply(real, task, AddPeer(peer, initiate=False))
    assert interface(real, task).peers[peer.public_key].endpoint == peer.endpoint


def test_a_peer_may_have_thousands_of_addresses(real: RealBench) -> None:
    """More than an attribute holds, and more than one message of a dump."""
    task = real.task()
    create(real, task)
    wanted = frozenset(IPv4Network((10 << 24) + (8 << 16) + number) for number in range(5000))
    peer = PeerSpec(stranger().public_key, Endpoint(address=NODES[1], port=9), wanted)
    apply(real, task, AddPeer(peer, initiate=False), AddPeer(stranger(), initiate=False))
    assert interface(real, task).peers[peer.public_key].allowed_ips == wanted


def test_the_interface_is_as_designed(real: RealBench) -> None:
    """Its alias names us, rp_filter is loose, its UDP socket is on the node and none in the task."""
    task = real.task()
    port = create(real, task).listen_port
    assert "alias hivewire" in real.run(task, "ip", "link", "show", "wg0")
    assert real.run(task, "sysctl", "-n", "net.ipv4.conf.wg0.rp_filter").strip() == "2"
    assert f":{port}" in real.run_on_node(0, "ss", "-Hlun")
    assert "UNCONN" not in real.run(task, "ss", "-Hlun")


def test_a_foreign_interface_of_that_name_is_left_alone(real: RealBench) -> None:
    """wg0 without our alias is somebody else's: not observed, not removed, not replaced."""
    task = real.task()
    real.run(task, "ip", "link", "add", "wg0", "type", "bridge")
    assert observe(real, task).interface is None
    with pytest.raises(KernelBusy, match="not Hivewire's"):
        create(real, task)
    apply(real, task, RemoveInterface())
    assert "wg0" in real.run(task, "ip", "-o", "link")


def test_a_foreign_table_stays(real: RealBench) -> None:
    """Setting and removing our rules leaves Docker's tables as they are, and a wrong text changes nothing."""
    task = real.task()
    real.run(task, "nft", "add table ip docker-dns; add chain ip docker-dns c")
    apply(real, task, SetRules(rules("eeee5555"), "eeee5555"))
    with pytest.raises(KernelBusy, match="nftables refused"):
        apply(real, task, SetRules(rules("ffff6666").replace("counter", "nonsense"), "ffff6666"))
    assert observe(real, task).rules == "eeee5555"
    apply(real, task, RemoveRules())
    assert real.run(task, "nft", "list", "tables").split() == ["table", "ip", "docker-dns"]
    assert "hivewire" not in real.run_on_node(0, "nft", "list", "tables")


def test_what_a_task_put_into_its_namespace_cannot_end_the_agent(real: RealBench) -> None:
    """A set whose user data names no known kind of expression crashes some versions of nft: that process alone."""
    task = real.task()
    data = bytes([0, 4]) + struct.pack("=I", 1 << 31) + bytes([1, 8]) + bytes(8)
    user_data = bytes([0, 4]) + struct.pack("=I", 1) + bytes([3, len(data)]) + data
    table = attribute(1, b"hostile\0")
    numbers = {3: 0, 4: 7, 5: 4, 10: 1}  # linux/netfilter/nf_tables.h: flags, type and length of the key, id
    parts = [table, attribute(2, b"s\0"), *(attribute(kind, n.to_bytes(4, "big")) for kind, n in numbers.items())]

    def request(kind: int, body: bytes) -> Request:
        flags = rtnetlink.NLM_F_ACK | (rtnetlink.NLM_F_CREATE if kind != 2 else 0)
        return Request(10 << 8 | kind, struct.pack("=BBH", 1, 0, 0) + body, flags)

    def transaction(tables: Netlink, *requests: Request) -> None:
        begin, end = (Request(kind, bytes(2) + (10).to_bytes(2, "big")) for kind in (16, 17))
        for number in tables._send([begin, *requests, end])[1:-1]:
            tables._collect(number)

    with contextlib.closing(run_in(task.namespace, lambda: Netlink(rtnetlink.NETLINK_NETFILTER, Calls()))) as tables:
        transaction(tables, request(0, table), request(9, b"".join(parts) + attribute(13, user_data)))
        with contextlib.suppress(KernelBusy):
            apply(real, task, SetRules(rules("abcd1234"), "abcd1234"))
        transaction(tables, request(2, table))
    apply(real, task, SetRules(rules("abcd1234"), "abcd1234"))
    assert observe(real, task).rules == "abcd1234"


def test_a_link_survives_the_agent(real: RealBench) -> None:
    """Traffic goes on after the Kernel object is gone, and another one finds the same devices."""
    first, second = real.task(0), real.task(1)
    create(real, first)
    create(real, second)
    link(real, first, second)
    assert real.latency(first, second, WAIT_S) is not None
    before = interface(real, first)
    first.kernel = second.kernel = real.kernel(0)
    assert real.latency(first, second, WAIT_S) is not None
    assert interface(real, first).public_key == before.public_key


def test_tcp_passes_at_full_size(real: RealBench) -> None:
    """A megabyte passes unharmed at the largest MTU of the path."""
    first, second = real.task(0), real.task(1)
    create(real, first, mtu=1440)
    create(real, second, mtu=1440)
    link(real, first, second)
    sent = os.urandom(1 << 20)

    def listen() -> socket.socket:
        return socket.create_server((str(second.address), 8080))

    def connect() -> socket.socket:
        return socket.socket(socket.AF_INET, socket.SOCK_STREAM)

    with run_in(second.namespace, listen) as server, run_in(first.namespace, connect) as client:
        server.settimeout(WAIT_S)
        client.settimeout(WAIT_S)
        client.connect((str(second.address), 8080))
        peer, (address, _) = server.accept()
        assert address == str(first.address)
        with peer:
            peer.settimeout(WAIT_S)
            received = bytearray()
            client.setblocking(False)
            offset, deadline = 0, time.monotonic() + WAIT_S
            while len(received) < len(sent) and time.monotonic() < deadline:
                with contextlib.suppress(BlockingIOError):
                    offset += client.send(sent[offset : offset + 65536]) if offset < len(sent) else 0
                peer.settimeout(0.01)
                with contextlib.suppress(TimeoutError):
                    received += peer.recv(1 << 20)
    assert bytes(received) == sent
    # The outer packets fit the underlay: nothing was fragmented on the way (Ip: FragCreates).
    snmp = [line.split() for line in real.run_on_node(0, "cat", "/proc/net/snmp").splitlines() if line[:3] == "Ip:"]
    counters = dict(zip(*snmp, strict=True))
    assert counters["FragCreates"] == "0"


def test_a_broken_off_creation_is_begun_anew(real: RealBench) -> None:
    """A device that lost its making half way is neither observed nor in the way."""
    task = real.task()
    create(real, task)
    real.run(task, "ip", "link", "set", "wg0", "down")  # before Linux 6.2 a link that is up keeps its name
    real.run(task, "ip", "link", "set", "wg0", "name", f"hw{task.id[:13]}")
    assert observe(real, task).interface is None
    assert create(real, task).public_key == task.key.public()
    assert real.run(task, "ip", "-o", "link").count("hivewire") == 1


# -- only wireguard-go ------------------------------------------------------------------------------------------


@pytest.fixture
def userspace(tmp_path: Path) -> Iterator[RealBench]:
    if reason := _missing("userspace"):
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        yield RealBench(stack, tmp_path, "userspace")


def _device_pid(bench: RealBench, node: int = 0) -> int:
    children = Path(f"/proc/{bench.hosts[node].pid}/task/{bench.hosts[node].pid}/children").read_text()
    return int(children.split()[0])


def _is_absent(bench: Bench, task: Task) -> bool:
    # While the process is ending its interface may still be there and not answer.
    with contextlib.suppress(KernelBusy):
        return observe(bench, task).interface is None
    return False


def test_a_killed_device_is_made_anew(userspace: RealBench) -> None:
    """When wireguard-go dies its interface is gone, with nothing left on the node, and a new one can be created."""
    task = userspace.task()
    create(userspace, task)
    os.kill(_device_pid(userspace), signal.SIGKILL)
    _until(lambda: _is_absent(userspace, task), "the interface is gone")
    _until(lambda: not list(userspace.folders[0].glob("hw*")), "its socket is gone")
    assert create(userspace, task).public_key == task.key.public()


def test_the_host_takes_its_devices_along(userspace: RealBench) -> None:
    """After the host's end nothing is left, and a new host starts empty and serves."""
    task = userspace.task()
    create(userspace, task)
    _end(userspace.hosts[0])
    _until(lambda: _is_absent(userspace, task), "the interface is gone")
    assert not list(userspace.folders[0].glob("hw*"))
    with pytest.raises(NoWireGuard, match="hivewire-userspace"):
        create(userspace, task)
    userspace.hosts[0] = userspace.start_host(0)
    assert create(userspace, task).public_key == task.key.public()


def test_a_new_host_ends_the_devices_of_a_killed_one(userspace: RealBench) -> None:
    """Processes that lost their host end as soon as there is another one."""
    task = userspace.task()
    create(userspace, task)
    pid = _device_pid(userspace)
    _kill(userspace.hosts[0])
    userspace.hosts[0] = userspace.start_host(0)
    _until(lambda: not Path(f"/proc/{pid}").exists() or _is_zombie(pid), "the orphan ended")
    assert create(userspace, task).public_key == task.key.public()


def _is_zombie(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def test_secrets_are_not_in_the_process_list(userspace: RealBench) -> None:
    """Neither arguments nor environment nor log of a device show its key."""
    task = userspace.task()
    create(userspace, task)
    pid = _device_pid(userspace)
    raw = task.key.reveal()
    shown = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
    shown += (userspace.folders[0] / "log").read_bytes()
    assert raw.hex().encode() not in shown
    assert raw not in shown


def test_only_names_of_its_own_are_accepted_by_the_host(userspace: RealBench) -> None:
    """No request can make the host touch another interface of the node."""
    folder = userspace.folders[0]
    for request in (b'{"type":"mtu","name":"eth0","mtu":1}', b'{"type":"stop","name":"../x"}', b"{}", b"\xff"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(str(folder / hosting.SOCKET))
            connection.send(request)
            assert b"wrong" in connection.recv(65536)


def test_the_backend_is_chosen_by_what_the_node_has(userspace: RealBench) -> None:
    """The kernel's WireGuard goes first; without it the host of userspace devices; without both a plain error."""
    folder = userspace.folders[0]
    in_kernel = netlink.is_offered(Calls())
    assert select("auto", folder).backend == ("kernel" if in_kernel else "userspace")
    assert select("userspace", folder).backend == "userspace"
    with pytest.raises(NoWireGuard, match="hivewire-userspace"):
        select("userspace", folder / "absent")
    if not in_kernel:
        with pytest.raises(NoWireGuard, match="module"):
            select("kernel", folder)


def test_only_root_may_speak_to_the_host(userspace: RealBench) -> None:
    """Sockets of the host and of devices are closed to everybody else."""
    create(userspace, userspace.task())
    modes = {path.name: path.stat().st_mode & 0o077 for path in userspace.folders[0].glob("h*")}
    assert set(modes.values()) == {0}
