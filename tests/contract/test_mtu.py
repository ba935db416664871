"""The MTU of a link is what its path carries: full packets pass whole, larger ones are refused where they are made.

The agents' own pass decides on interfaces and routes (agents.py); the underlay is a veth pair between two nodes, or a
router between them. Fragments are counted by the nodes' kernels.
"""

import contextlib
import errno
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path

import pytest
from lab.patience import patient

from agent.kernel.namespace import run_in
from tests.contract.agents import PORT, Cluster, OverlayBench
from tests.contract.test_kernel import NODES, Task, _ip, _missing, _run
from tests.streams import start_server, stop

_OVERHEAD = {4: 60, 6: 80}
_IP_MTU_DISCOVER, _IP_PMTUDISC_DO = 10, 2
_HEADERS = 28
"""IPv4 and UDP."""


class UnderlayBench(OverlayBench):
    """Two nodes whose underlay has these MTUs, one for each end, and addresses of this family."""

    def __init__(self, stack: ExitStack, folder: Path, backend: str, version: int, mtus: tuple[int, int]) -> None:
        self._mtus = mtus
        if version == 6:
            self.underlay = (ip_address("fd00:2::1"), ip_address("fd00:2::2"))
        super().__init__(stack, folder, backend)

    def _join(self) -> None:
        super()._join()
        for number, (holder, address) in enumerate(zip(self._nodes, self.underlay, strict=True)):
            self.set_mtu(number, self._mtus[number])
            if address.version == 6:
                _ip(holder, f"address add {address}/64 dev under0 nodad")

    def set_mtu(self, node: int, mtu: int) -> None:
        _ip(self._nodes[node], f"link set under0 mtu {mtu}")

    def fragments(self, node: int) -> int:
        """Fragments that the node made or got, of both families."""
        lines = [
            line.split() for line in self.run_on_node(node, "cat", "/proc/net/snmp").splitlines() if line[:3] == "Ip:"
        ]
        four = dict(zip(lines[0][1:], lines[1][1:], strict=True))
        six = dict(line.split() for line in self.run_on_node(node, "cat", "/proc/net/snmp6").splitlines())
        named = ("FragCreates", "ReasmReqds", "FragFails")
        return sum(int(four[name]) + int(six[f"Ip6{name}"]) for name in named)


class RoutedBench(UnderlayBench):
    """Two nodes with a router each, and a link between the routers that may carry less than the nodes' own."""

    underlay = (NODES[0], ip_address("198.51.100.2"))
    _gateways = ("192.0.2.9", "198.51.100.9")

    def _join(self) -> None:
        OverlayBench._join(self)
        _ip(self._nodes[1], "link del under0")
        self._routers = [self._hold() for _ in self._nodes]
        _ip(self._routers[0], f"link add middle type veth peer name middle netns {self._routers[1].pid}")
        for number, (node, router) in enumerate(zip(self._nodes, self._routers, strict=True)):
            _ip(node, f"link add under0 type veth peer name under0 netns {router.pid}")
            _ip(node, f"address add {self.underlay[number]}/24 dev under0", "link set under0 up")
            _ip(router, f"address add {self._gateways[number]}/24 dev under0", "link set under0 up")
            _ip(router, f"address add 203.0.113.{1 + number}/24 dev middle", "link set middle up")
            _ip(node, f"route add default via {self._gateways[number]}")
            _ip(router, f"route add default via 203.0.113.{2 - number}")
            _run(router, "sysctl", "-qw", "net.ipv4.ip_forward=1")

    def narrow(self, mtu: int) -> None:
        """What the link between the routers carries."""
        for router in self._routers:
            _ip(router, f"link set middle mtu {mtu}")

    def forget_paths(self) -> None:
        """As the kernel does by itself after ten minutes."""
        for node in self._nodes:
            _ip(node, "route flush cache")


class World:
    def __init__(self, stack: ExitStack, bench: UnderlayBench) -> None:
        self.bench = bench
        self.cluster = Cluster(bench)
        self.one, self.other = self.cluster.run("calling", 0), self.cluster.run("called", 1)
        for task in (self.one, self.other):
            stack.callback(stop, start_server(bench.enter(task), PORT))
        self.cluster.link("calling", "called")
        self.cluster.until(lambda: self.cluster.are_linked(self.one, self.other), "the link")
        self.cluster.work(1.0)

    def interface_mtu(self, task: Task) -> int:
        return int(json.loads(self.bench.run(task, "ip", "-j", "link", "show", "wg0"))[0]["mtu"])

    def answers(self, source: Task, destination: Task, size: int) -> bool:
        """Whether an unfragmented packet of so many bytes gets there, and one as large comes back.

        Raises OSError where it is refused before it is sent.
        """

        def ask() -> bool:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
                udp.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_DO)
                udp.connect((str(destination.address), PORT))
                udp.settimeout(patient(5.0))
                payload = bytes(size - _HEADERS)
                udp.send(payload)
                with contextlib.suppress(TimeoutError):
                    return len(udp.recv(65536)) > 0
                return False

        return run_in(source.namespace, ask)

    def fills(self, source: Task, destination: Task) -> None:
        """Send over TCP, in segments as large as the connection allows, and get it back."""

        def bulk() -> None:
            sent = bytes(400_000)
            with socket.create_connection((str(destination.address), PORT), timeout=patient(20.0)) as tcp:
                # Beside the reading: with all buffers full, each end would wait for the other to read.
                sender = threading.Thread(target=lambda: (tcp.sendall(sent), tcp.shutdown(socket.SHUT_WR)))
                sender.start()
                back = 0
                while data := tcp.recv(65536):
                    back += len(data)
                sender.join()
            assert back == len(sent) // 8 * 12, "the echo has 12 bytes for every 8"

        run_in(source.namespace, bulk)

    def is_exact(self, *mtus: int) -> None:
        """Packets of these sizes pass from each end and no larger ones leave, and the underlay sees no fragment.

        The answer may be no larger than the other end's MTU.
        """
        before = [self.bench.fragments(number) for number in range(2)]
        for mtu, source, destination in zip(mtus, (self.one, self.other), (self.other, self.one), strict=True):
            assert self.answers(source, destination, mtu)
            with pytest.raises(OSError, match=os.strerror(errno.EMSGSIZE)):
                self.answers(source, destination, mtu + 1)
            self.fills(source, destination)
        assert [self.bench.fragments(number) for number in range(2)] == before


@pytest.fixture(params=["userspace", "kernel"])
def backend(request: pytest.FixtureRequest) -> str:
    if reason := _missing(request.param):
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.mark.parametrize(
    ("version", "underlay"), [(4, 1280), (4, 1450), (4, 1500), (4, 9000), (6, 1450), (6, 1500), (6, 9000)]
)
def test_full_packets_pass_whole(stack: ExitStack, tmp_path: Path, backend: str, version: int, underlay: int) -> None:
    """On each underlay a task's packet of exactly its MTU passes, and one byte more does not leave."""
    world = World(stack, UnderlayBench(stack, tmp_path, backend, version, (underlay, underlay)))
    mtu = underlay - _OVERHEAD[version]
    assert (world.interface_mtu(world.one), world.interface_mtu(world.other)) == (mtu, mtu)
    world.is_exact(mtu, mtu)


@pytest.mark.parametrize("mtus", [(9000, 1500), (1500, 9000), (1500, 1450)])
def test_a_pair_has_the_mtu_of_its_smaller_end(
    stack: ExitStack, tmp_path: Path, backend: str, mtus: tuple[int, int]
) -> None:
    """Nodes of different underlays: what the larger one sends to the smaller one fits there."""
    world = World(stack, UnderlayBench(stack, tmp_path, backend, 4, mtus))
    assert world.interface_mtu(world.one) == mtus[0] - 60
    world.is_exact(*(_limit(mtu, min(mtus)) for mtu in mtus))


def test_a_changed_underlay_is_followed(stack: ExitStack, tmp_path: Path, backend: str) -> None:
    """Both ends take less as soon as one node's interface does, and more when it does again."""
    bench = UnderlayBench(stack, tmp_path, backend, 4, (1500, 1500))
    world = World(stack, bench)
    for mtu in (1400, 1500):
        bench.set_mtu(1, mtu)
        for agent in world.cluster.agents:
            agent.measure()
        world.cluster.work(0.5)
        assert world.interface_mtu(world.other) == mtu - 60
        world.is_exact(_limit(1500, mtu), mtu - 60)


def test_a_path_that_carries_less_is_found_out(stack: ExitStack, tmp_path: Path, backend: str) -> None:
    """The path between two nodes may carry less than both ends; it is found without anybody's traffic, and followed."""
    bench = RoutedBench(stack, tmp_path, backend, 4, (1500, 1500))
    world = World(stack, bench)
    for mtu in (1400, 1500):
        bench.narrow(mtu)
        bench.forget_paths()
        for agent in world.cluster.agents:
            agent.measure()
        world.cluster.work(0.5)
        world.is_exact(_limit(1500, mtu), _limit(1500, mtu))


def _limit(own: int, pair: int) -> int:
    """What an end may send. A route's own MTU is a multiple of what packets are padded to."""
    inside = pair - 60
    return inside if own == pair else inside - inside % 16
