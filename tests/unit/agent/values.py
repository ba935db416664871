"""Short ways to make what the agent's tests need. What a test does not mention has a plain default."""

from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network

from agent.desired import TaskFacts
from agent.ops import PeerSpec, Route
from hivewire.ids import ContainerId, NetworkId, NodeId, ServiceId, TaskId
from hivewire.keys import PrivateKey, PublicKey
from hivewire.records import (
    Endpoint,
    Link,
    Mode,
    Network,
    NodeRecord,
    PeerRecord,
    PolicyRecord,
    PortRange,
    Protocol,
)

OWN = "10.1.0.2"
"""Address of the task under test on the network ``app``."""


def private_key(number: int) -> PrivateKey:
    """A private key of its own for each number from 1 to 255."""
    return PrivateKey(bytes([number]) + bytes([7 * number % 256, 0x5A, number ^ 0xFF]) * 10 + bytes([number]))


def public_key(number: int) -> PublicKey:
    return private_key(number).public()


def endpoint(number: int) -> Endpoint:
    """Where the device of the peer with this number listens."""
    return Endpoint(address=IPv4Address(f"192.0.2.{number}"), port=51820 + number)


def ports(text: str) -> PortRange:
    """``80``, ``80-90``, ``53/udp``."""
    span, _, protocol = text.partition("/")
    first, _, last = span.partition("-")
    return PortRange(protocol=Protocol(protocol or "tcp"), first=int(first), last=int(last or first))


def link(service: str, *written: str, network: str = "app", vip: str = "") -> Link:
    return Link(
        service=ServiceId(f"id-{service}"),
        name=service,
        network=NetworkId(network),
        ports=tuple(ports(text) for text in written),
        vip=IPv4Address(vip) if vip else None,
    )


def policy(
    service: str = "web",
    *,
    mode: Mode = Mode.ENFORCE,
    networks: Iterable[str] = ("app",),
    out: Iterable[Link] = (),
    into: Iterable[Link] = (),
    own: Iterable[Link] = (),
    keepalive_s: int = 0,
    mtu: int = 0,
) -> PolicyRecord:
    return PolicyRecord(
        service=ServiceId(f"id-{service}"),
        name=service,
        stack="shop",
        mode=mode,
        networks=tuple(Network(id=NetworkId(n), name=n, subnets=("10.1.0.0/24",)) for n in networks),
        out_links=tuple(out),
        in_links=tuple(into),
        self_links=tuple(own),
        keepalive_s=keepalive_s,
        mtu=mtu,
    )


def peer(
    number: int,
    service: str = "db",
    addresses: str | Mapping[str, str] = "",
    *,
    task: str = "",
    epoch: int = 1,
    serving: bool = True,
) -> PeerRecord:
    """The peer with this number: ``db.5`` has the address 10.1.0.5 on the network ``app``."""
    given = {"app": addresses or f"10.1.0.{number}"} if isinstance(addresses, str) else addresses
    return PeerRecord(
        task=TaskId(task or f"{service}.{number}"),
        task_name=f"{service}.{number}",
        service=ServiceId(f"id-{service}"),
        node=NodeId("node-2"),
        public_key=str(public_key(number)),
        endpoint=endpoint(number),
        epoch=epoch,
        addresses={NetworkId(n): IPv4Address(a) for n, a in given.items()},
        serving=serving,
    )


def by_service(*records: PeerRecord) -> dict[ServiceId, list[PeerRecord]]:
    found: dict[ServiceId, list[PeerRecord]] = {}
    for record in records:
        found.setdefault(record.service, []).append(record)
    return found


def facts(task: str = "web.1", addresses: Mapping[str, str] | None = None, *, underlay_mtu: int = 1500) -> TaskFacts:
    """A task of ``web``; its first network is on eth0, the next on eth1, and so on."""
    given = {NetworkId(n): IPv4Address(a) for n, a in (addresses or {"app": OWN}).items()}
    return TaskFacts(
        task=TaskId(task),
        service=ServiceId("id-web"),
        addresses=given,
        interfaces={address: f"eth{index}" for index, address in enumerate(given.values())},
        underlay_mtu=underlay_mtu,
        underlay=IPv4Address("192.0.2.1"),
    )


def spec(number: int, *addresses: str, keepalive_s: int = 0) -> PeerSpec:
    allowed = frozenset(IPv4Network(a) for a in addresses or (f"10.1.0.{number}",))
    return PeerSpec(public_key(number), endpoint(number), allowed, keepalive_s)


def route(destination: str, source: str = OWN) -> Route:
    return Route(IPv4Network(destination), IPv4Address(source))


def node(*, mtu: int = 1500) -> NodeRecord:
    return NodeRecord(
        node=NodeId("node-1"),
        hostname="n1",
        agent_version="1",
        underlay_address=IPv4Address("192.0.2.1"),
        underlay_mtu=mtu,
        backend="kernel",
        first_port=51820,
        last_port=51829,
    )


def container_id(task: str) -> ContainerId:
    return ContainerId(f"container-{task}")
