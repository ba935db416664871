"""What a task's network namespace holds, as values: the agent asks the kernel again rather than remember."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface, IPv4Network

from agent.ops import Route
from hivewire.keys import PublicKey
from hivewire.records import Endpoint


@dataclass(frozen=True, slots=True)
class ObservedPeer:
    public_key: PublicKey
    endpoint: Endpoint | None
    allowed_ips: frozenset[IPv4Network]
    keepalive_s: int = 0
    last_handshake: float | None = None
    """Unix time in seconds; None: never."""
    received_bytes: int = 0
    sent_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ObservedInterface:
    """The WireGuard interface that Hivewire made in this namespace."""

    name: str
    public_key: PublicKey
    listen_port: int
    """0: its UDP socket is not open."""
    mtu: int
    is_up: bool
    peers: Mapping[PublicKey, ObservedPeer] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ObservedTask:
    """A namespace as found. Everything in it that Hivewire did not make is left out, but for the addresses."""

    addresses: Mapping[IPv4Address, str] = field(default_factory=dict)
    """The namespace's own addresses and the interfaces that hold them (loopback left out)."""
    interface: ObservedInterface | None = None
    routes: frozenset[Route] = frozenset()
    """Those through Hivewire's interface."""
    rules: str = ""
    """Digest of Hivewire's table; empty where there is none."""


@dataclass(frozen=True, slots=True)
class Bridge:
    """The node's own end of a bridge that joins its containers."""

    gateway: IPv4Interface
    """Its address, with the subnet of the containers."""
    mac: str


@dataclass(frozen=True, slots=True)
class NotedEntry:
    """What the rules noted of one source, destination, protocol and port."""

    source: IPv4Address
    destination: IPv4Address
    protocol: int
    port: int
    count: int
    idle_s: float = 0.0
    """Since it was noted last."""


@dataclass(frozen=True, slots=True)
class NotedCounters:
    """How much the rules noted, by reason: cheap to read, and unchanged where there was nothing to note."""

    generation: int = 0
    """Another one for every table that replaces one before; 0: there is no table."""
    packets: Mapping[str, int] = field(default_factory=dict)
    """By name of the counter. A set of the same name holds the entries; ``unlisted`` has none."""
