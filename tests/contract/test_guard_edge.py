"""The guard at the node's edge, with real VXLAN frames between two nodes.

    overlay namespace 10.0.1.3 -- vxlan 4097 --.                            .-- vxlan 4097 -- 10.0.1.4
                                               node 192.0.2.1 == 192.0.2.2 node
    overlay namespace 10.0.2.3 -- vxlan 4098 --'                            '-- vxlan 4098 -- 10.0.2.4

As the overlay driver does it: the VXLAN device is made in the node's namespace, where its socket stays, and moved into
one of its own.
"""

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address

import pytest

from agent.guard import edge
from agent.kernel import nftables
from agent.kernel.api import Namespace
from agent.kernel.edges import NodeEdges
from agent.kernel.namespace import identify, run_in
from hivewire.ids import NetworkId, TaskId
from hivewire.records import GuardRecord
from tests.contract.test_kernel_denials import namespace, run
from tests.needs import need_namespaces

STRICT, PLAIN = 4097, 4098
RECORD = GuardRecord(network=NetworkId("abcdefghij0123456789"), name="app", strict=True, vnis=(STRICT,))
NAME = edge.table_of(RECORD.network)
TRIES, WAIT_S = 4, 0.1


@dataclass(frozen=True)
class Nodes:
    """Two nodes, and what is behind each: by VXLAN identifier the overlay namespaces."""

    node: tuple[Namespace, Namespace]
    overlay: dict[int, tuple[Namespace, Namespace]]

    def put(self, end: int, *addresses: str) -> None:
        text, _ = edge.render(RECORD, map(IPv4Address, addresses))
        run_in(self.node[end], lambda: NodeEdges().apply(NAME, text))

    def read(self, end: int) -> dict[str, edge.Edge]:
        return dict(run_in(self.node[end], lambda: NodeEdges().read()))

    def arrives(self, vni: int, sender: int = 0) -> bool:
        """Whether a datagram of one node's overlay namespace is seen in the other one's."""
        here, there = self.overlay[vni][sender], self.overlay[vni][1 - sender]
        subnet, host = vni - STRICT + 1, 4 - sender

        def hear() -> socket.socket:
            udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            udp.settimeout(WAIT_S)
            udp.bind(("", 7))
            return udp

        with run_in(there, hear) as ears, run_in(here, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as us:
            for _ in range(TRIES):
                us.sendto(b"marked", (f"10.0.{subnet}.{host}", 7))
                with contextlib.suppress(TimeoutError):
                    return ears.recv(100) == b"marked"
            return False


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    need_namespaces()
    with contextlib.ExitStack() as stack:
        pids = [stack.enter_context(namespace()) for _ in range(2)]
        run(pids[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", str(pids[1]))
        overlay: dict[int, tuple[Namespace, Namespace]] = {}
        for end, pid in enumerate(pids):
            run(pid, "address", "add", f"192.0.2.{end + 1}/24", "dev", "eth0")
            run(pid, "link", "set", "eth0", "up")
        for vni in (STRICT, PLAIN):
            behind = []
            for end, pid in enumerate(pids):
                there = stack.enter_context(namespace())
                device = f"type vxlan id {vni} dstport 4789 remote 192.0.2.{2 - end} nolearning"
                run(pid, "link", "add", "vxlan0", *device.split())
                run(pid, "link", "set", "vxlan0", "netns", str(there))
                run(there, "address", "add", f"10.0.{vni - STRICT + 1}.{end + 3}/24", "dev", "vxlan0")
                run(there, "link", "set", "vxlan0", "up")
                behind.append(identify(TaskId(""), f"/proc/{there}/ns/net"))
            overlay[vni] = behind[0], behind[1]
        first, second = (identify(TaskId(""), f"/proc/{pid}/ns/net") for pid in pids)
        yield Nodes((first, second), overlay)


def test_without_an_edge_everything_crosses(nodes: Nodes) -> None:
    """The control: so that what does not arrive below was dropped."""
    assert all(nodes.arrives(vni, sender) for vni in (STRICT, PLAIN) for sender in (0, 1))


@pytest.mark.parametrize("end", [0, 1], ids=["where it is sent", "where it would arrive"])
def test_a_shut_edge_keeps_its_network_in_and_out(nodes: Nodes, end: int) -> None:
    """Neither from nor to this node, of this network and of no other."""
    nodes.put(end)
    assert not any(nodes.arrives(STRICT, sender) for sender in (0, 1))
    assert all(nodes.arrives(PLAIN, sender) for sender in (0, 1))


def test_exempt_ends_pass(nodes: Nodes) -> None:
    """A node lets through its own exempt ends, whoever they talk with; both nodes must."""
    nodes.put(0, "10.0.1.3")
    assert all(nodes.arrives(STRICT, sender) for sender in (0, 1))
    nodes.put(1, "10.0.1.99")
    assert not any(nodes.arrives(STRICT, sender) for sender in (0, 1))
    nodes.put(1, "10.0.1.4", "10.0.1.99")
    assert all(nodes.arrives(STRICT, sender) for sender in (0, 1))


def test_the_table_is_known_by_its_comment_replaced_and_removed(nodes: Nodes) -> None:
    """Another agent reads which rules are there, and for which identifiers; removing them twice is no error."""
    assert nodes.read(0) == {}
    nodes.put(0, "10.0.1.3")
    assert nodes.read(0) == {NAME: edge.render(RECORD, [IPv4Address("10.0.1.3")])[1]}
    nodes.put(0)
    assert nodes.read(0) == {NAME: edge.render(RECORD)[1]}
    for _ in range(2):
        run_in(nodes.node[0], lambda: NodeEdges().remove(NAME))
    assert nodes.read(0) == {}
    assert nodes.arrives(STRICT)


def test_what_broke_off_is_not_what_was_wanted(nodes: Nodes) -> None:
    """Two tables of one name's exchange judge both; that is told, and put right with the next one."""
    nodes.put(0, "10.0.1.3")
    nodes.put(1, "10.0.1.4")
    text, wanted = edge.render(RECORD, [IPv4Address("10.0.1.99")])
    other = text.replace(NAME, nftables.following(NAME))
    run_in(nodes.node[0], lambda: nftables.apply(other))
    assert nodes.read(0) == {NAME: edge.Edge(nftables.ALTERED, frozenset(RECORD.vnis))}
    assert not nodes.arrives(STRICT)
    nodes.put(0, "10.0.1.99")
    assert nodes.read(0) == {NAME: wanted}
    nodes.put(0, "10.0.1.3")
    assert nodes.arrives(STRICT)
