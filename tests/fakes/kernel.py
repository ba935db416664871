"""A kernel in memory, with the rules of the real one; tests/contract/test_kernel.py holds it to them.

Cryptokey routing: an address belongs to one peer of a device, the last that was given it. A packet arrives if the
sender routes it to its device, the device finds a peer for it, both devices know each other's key, and the receiver
accepts the source address from that peer. Whoever adds a peer initiates; a handshake needs both sides.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from typing import assert_never

from agent.kernel.api import INTERFACE, Namespace, Session, Underlay
from agent.observed import NotedCounters, NotedEntry, ObservedInterface, ObservedPeer, ObservedTask
from agent.ops import (
    AddPeer,
    AddRoute,
    CreateInterface,
    ForgetFlows,
    Handshake,
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
from hivewire.errors import InvalidSettings, KernelBusy, NamespaceGone
from hivewire.ids import TaskId
from hivewire.keys import PrivateKey, PublicKey
from hivewire.records import Endpoint

_NODE = IPv4Address("192.0.2.1")


@dataclass(slots=True)
class FakePeer:
    endpoint: Endpoint | None
    keepalive_s: int = 0
    last_handshake: float | None = None
    received_bytes: int = 0
    sent_bytes: int = 0


@dataclass(slots=True)
class FakeDevice:
    """A WireGuard device: ``owners`` says which peer each network belongs to."""

    private_key: PrivateKey = field(repr=False)
    node: IPv4Address
    port: int
    mtu: int
    is_up: bool = True
    peers: dict[PublicKey, FakePeer] = field(default_factory=dict)
    owners: dict[IPv4Network, PublicKey] = field(default_factory=dict)

    @property
    def public_key(self) -> PublicKey:
        return self.private_key.public()

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(address=self.node, port=self.port)

    def peer_for(self, address: IPv4Address) -> PublicKey | None:
        networks = [network for network in self.owners if address in network]
        return self.owners[max(networks, key=lambda n: n.prefixlen)] if networks else None


@dataclass(slots=True)
class FakeNamespace:
    inode: int
    addresses: dict[IPv4Address, str]
    device: FakeDevice | None = None
    routes: dict[IPv4Network, Route] = field(default_factory=dict)
    rules: str = ""
    rules_text: str = ""
    flows: set[tuple[IPv4Address, IPv4Address]] = field(default_factory=set)
    """Tracked connections: who began it, and the task that it leads to."""

    generation: int = 0
    noted: dict[str, tuple[NotedEntry, ...]] = field(default_factory=dict)
    """What a test says that the rules noted, by name of the set."""

    def set_rules(self, text: str, digest: str) -> None:
        """Another table in the place of the one there: what that noted is gone."""
        self.rules_text, self.rules = text, digest
        self.generation += 1
        self.noted = {}

    def take_down(self) -> None:
        """Bring the interface down, as somebody in the container with CAP_NET_ADMIN might."""
        if self.device is not None:
            self.device.is_up = False
        self.routes.clear()


class FakeUnderlay:
    """The network that the nodes share: shared between the fake kernels of a cluster."""

    def __init__(self, now: Callable[[], float] = lambda: 1_000_000.0) -> None:
        self.now = now
        self.kernels: list[FakeKernel] = []

    def device_at(self, endpoint: Endpoint) -> FakeDevice | None:
        """The device whose UDP socket listens there."""
        for kernel in self.kernels:
            for device in kernel.devices():
                if device.is_up and device.endpoint == endpoint:
                    return device
        return None

    def shake_hands(self, device: FakeDevice, key: PublicKey) -> bool:
        """A handshake from a device to one of its peers; whether it was completed."""
        peer = device.peers[key]
        other = None if peer.endpoint is None or not device.is_up else self.device_at(peer.endpoint)
        if other is None or other.public_key != key or device.public_key not in other.peers:
            return False
        there = other.peers[device.public_key]
        peer.last_handshake = there.last_handshake = self.now()
        there.endpoint = device.endpoint
        return True

    def send(self, sender: FakeNamespace, source: IPv4Address, destination: IPv4Address, size: int = 100) -> bool:
        """Send a packet through the sender's WireGuard interface; whether it arrives."""
        device = sender.device
        if device is None or not device.is_up or not any(destination in network for network in sender.routes):
            return False
        key = device.peer_for(destination)
        if key is None or not self.shake_hands(device, key):
            return False
        endpoint = device.peers[key].endpoint
        other = None if endpoint is None else self.device_at(endpoint)
        if other is None or other.peer_for(source) != device.public_key:
            return False
        device.peers[key].sent_bytes += size
        other.peers[device.public_key].received_bytes += size
        return True


class FakeKernel:
    """Implements Kernel for one node of an underlay."""

    def __init__(
        self,
        underlay: FakeUnderlay | None = None,
        address: IPv4Address = _NODE,
        mtu: int = 1500,
        backend: str = "kernel",
    ) -> None:
        self.network = underlay or FakeUnderlay()
        self.network.kernels.append(self)
        self.address = address
        self.mtu = mtu
        self.namespaces: dict[str, FakeNamespace] = {}
        self.ops: list[tuple[TaskId, Op]] = []
        """All operations that were carried out, in order."""
        self.ports_in_use: set[int] = set()
        """By other programs of the node."""
        self._backend = backend
        self._calls = 0
        self._inodes = itertools.count(4026532000)
        self._failures: list[tuple[type, Exception]] = []

    # -- what a test does -------------------------------------------------------------------------------------------

    def add_namespace(self, path: str, addresses: Mapping[IPv4Address, str] | None = None) -> FakeNamespace:
        """Put a new namespace behind the path, in the place of the one there."""
        self.namespaces[path] = FakeNamespace(next(self._inodes), dict(addresses or {}))
        return self.namespaces[path]

    def remove_namespace(self, path: str) -> None:
        """The container is gone; its interface goes with it."""
        self.namespaces.pop(path, None)

    def fail(self, kind: type, error: Exception, times: int = 1) -> None:
        """Let the next operations of this kind (or ObservedTask: observations) fail without doing anything."""
        self._failures += [(kind, error)] * times

    def devices(self) -> Iterator[FakeDevice]:
        return (n.device for n in self.namespaces.values() if n.device is not None)

    # -- Kernel -----------------------------------------------------------------------------------------------------

    @property
    def backend(self) -> str:
        return self._backend

    @property
    def calls(self) -> int:
        return self._calls

    def find(self, task: TaskId, path: str) -> Namespace:
        there = self.namespaces.get(path)
        if there is None:
            raise NamespaceGone(f"{path} cannot be opened")
        return Namespace(task, path, 4, there.inode)

    def open(self, namespace: Namespace) -> AbstractContextManager[Session]:
        return self._session(namespace)

    @contextlib.contextmanager
    def _session(self, namespace: Namespace) -> Iterator[Session]:
        there = self.namespaces.get(namespace.path)
        if there is None or there.inode != namespace.inode:
            raise NamespaceGone(f"{namespace.path} is gone")
        yield FakeSession(self, namespace.task, there)

    def forget(self, task: TaskId) -> None:
        """Nothing is held outside namespaces."""

    def underlay(self, address: IPv4Address) -> Underlay:
        if address != self.address:
            raise InvalidSettings(f"no interface of this node has the underlay address {address}")
        return Underlay(address, "eth0", self.mtu)

    # -- for sessions -----------------------------------------------------------------------------------------------

    def called(self, kind: type) -> None:
        """Count a request; fail if the test wants it to."""
        self._calls += 1
        for position, (wanted, error) in enumerate(self._failures):
            if wanted is kind:
                del self._failures[position]
                raise error

    def free_port(self, first: int, last: int) -> int:
        used = self.ports_in_use | {device.port for device in self.devices() if device.is_up}
        for port in range(first, last + 1):
            if port not in used:
                return port
        raise KernelBusy(f"all UDP ports from {first} to {last} of this node are in use")


class FakeSession:
    """Implements Session."""

    def __init__(self, kernel: FakeKernel, task: TaskId, namespace: FakeNamespace) -> None:
        self._kernel = kernel
        self._task = task
        self._namespace = namespace

    def observe(self) -> ObservedTask:
        self._kernel.called(ObservedTask)
        there = self._namespace
        if there.device is None:
            return ObservedTask(dict(there.addresses), rules=there.rules)
        device = there.device
        interface = ObservedInterface(
            INTERFACE,
            device.public_key,
            device.port if device.is_up else 0,
            device.mtu,
            device.is_up,
            {key: _observed(device, key) for key in device.peers},
        )
        return ObservedTask(dict(there.addresses), interface, frozenset(there.routes.values()), there.rules)

    def apply(self, ops: Iterable[Op]) -> None:
        for op in ops:
            self._kernel.called(type(op))
            self._do(op)
            self._kernel.ops.append((self._task, op))

    @property
    def _device(self) -> FakeDevice:
        if self._namespace.device is None:
            raise KernelBusy(f"the interface {INTERFACE} is not there any more: observe again")
        return self._namespace.device

    def _do(self, op: Op) -> None:
        there = self._namespace
        match op:
            case CreateInterface(key, mtu, first, last):
                if there.device is None:
                    there.device = FakeDevice(key, self._kernel.address, self._kernel.free_port(first, last), mtu)
            case SetMtu(mtu):
                self._device.mtu = mtu
            case SetUp():
                if not self._device.is_up:
                    self._device.port = self._kernel.free_port(self._device.port, self._device.port)
                    self._device.is_up = True
            case AddPeer(spec, initiate):
                self._add_peer(spec, initiate=initiate or spec.keepalive_s > 0)
            case Handshake(key):
                self._shake_hands(key)
            case UpdatePeer():
                self._update_peer(op)
            case RemovePeer(key):
                if there.device is not None:
                    there.device.peers.pop(key, None)
                    _give_up(there.device, key)
            case ForgetFlows(addresses):
                there.flows = {flow for flow in there.flows if addresses.isdisjoint(flow)}
            case AddRoute(route):
                self._add_route(route)
            case RemoveRoute(route):
                if there.routes.get(route.destination) == route:
                    del there.routes[route.destination]
            case SetRules(text, digest):
                there.set_rules(text, digest)
            case RemoveRules():
                there.set_rules("", "")
            case RemoveInterface():
                there.device = None
                there.routes.clear()
            case _:
                assert_never(op)

    def flows(self) -> frozenset[IPv4Address]:
        return frozenset(end for flow in self._namespace.flows for end in flow)

    def noted_counters(self) -> NotedCounters:
        self._kernel.called(NotedCounters)
        there = self._namespace
        if not there.rules:
            return NotedCounters()
        packets = {name: sum(entry.count for entry in found) for name, found in there.noted.items()}
        return NotedCounters(there.generation, packets)

    def noted_entries(self, name: str) -> tuple[NotedEntry, ...]:
        self._kernel.called(NotedEntry)
        return self._namespace.noted.get(name, ())

    def _add_peer(self, spec: PeerSpec, *, initiate: bool) -> None:
        device = self._device
        # A device ignores a peer with its own key (set_peer in drivers/net/wireguard/netlink.c).
        if spec.public_key == device.public_key:
            return
        peer = device.peers.setdefault(spec.public_key, FakePeer(spec.endpoint))
        peer.endpoint, peer.keepalive_s = spec.endpoint, spec.keepalive_s
        _give_up(device, spec.public_key)
        device.owners.update(dict.fromkeys(spec.allowed_ips, spec.public_key))
        if initiate:
            self._kernel.network.shake_hands(device, spec.public_key)

    def _shake_hands(self, key: PublicKey) -> None:
        if key in self._device.peers:
            self._kernel.network.shake_hands(self._device, key)

    def _update_peer(self, op: UpdatePeer) -> None:
        device = self._device
        peer = device.peers.get(op.public_key)
        if peer is None:
            return
        if op.endpoint is not None:
            peer.endpoint = op.endpoint
        if op.keepalive_s is not None:
            peer.keepalive_s = op.keepalive_s
        if op.allowed_ips is not None:
            _give_up(device, op.public_key)
            device.owners.update(dict.fromkeys(op.allowed_ips, op.public_key))

    def _add_route(self, route: Route) -> None:
        if not self._device.is_up:
            raise KernelBusy(f"add route {route}: Network is down")
        if route.source not in self._namespace.addresses:
            raise KernelBusy(f"add route {route}: Invalid argument")
        self._namespace.routes[route.destination] = route


def _give_up(device: FakeDevice, key: PublicKey) -> None:
    for network in [network for network, owner in device.owners.items() if owner == key]:
        del device.owners[network]


def _observed(device: FakeDevice, key: PublicKey) -> ObservedPeer:
    peer = device.peers[key]
    return ObservedPeer(
        key,
        peer.endpoint,
        frozenset(network for network, owner in device.owners.items() if owner == key),
        peer.keepalive_s,
        peer.last_handshake,
        peer.received_bytes,
        peer.sent_bytes,
    )
