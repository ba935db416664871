"""What an agent can do to a task's network namespace: a closed set of printable operations.

Printing an operation is what the log shows and what a dry run shows, so none of them shows a private key.
"""

from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network

from hivewire.keys import PrivateKey, PublicKey
from hivewire.records import Endpoint


@dataclass(frozen=True, slots=True)
class PeerSpec:
    """A peer as wanted. ``endpoint`` is where it listens; the kernel may learn another one by roaming."""

    public_key: PublicKey
    endpoint: Endpoint
    allowed_ips: frozenset[IPv4Network]
    keepalive_s: int = 0

    def __str__(self) -> str:
        addresses = ",".join(str(n) for n in sorted(self.allowed_ips))
        return f"{self.public_key.short} {self.endpoint} {addresses}"


@dataclass(frozen=True, slots=True)
class Route:
    """``destination`` through the task's WireGuard interface, from the task's own overlay address."""

    destination: IPv4Network
    source: IPv4Address
    mtu: int = 0
    """Largest packet in bytes that may go this way; 0: what the interface takes."""

    def __str__(self) -> str:
        return f"{self.destination} src {self.source}" + (f" mtu {self.mtu}" if self.mtu else "")


@dataclass(frozen=True, slots=True)
class CreateInterface:
    """Make the interface with its key, and up: only so it holds its UDP port, in the node's namespace.

    It has no peers yet, so it accepts nothing.
    """

    private_key: PrivateKey = field(repr=False)
    mtu: int
    first_port: int
    last_port: int
    """The listen port is the first free one of this range."""
    address: IPv4Address | None = None
    """The task's own, which it gets as well: on an interface without any address the kernel takes even a loose check of
    sources for a strict one (__fib_validate_source in net/ipv4/fib_frontend.c), and drops what a peer sends this way
    while the task itself still answers another way."""

    def __str__(self) -> str:
        return f"create interface mtu {self.mtu}"


@dataclass(frozen=True, slots=True)
class SetMtu:
    mtu: int

    def __str__(self) -> str:
        return f"set mtu {self.mtu}"


@dataclass(frozen=True, slots=True)
class SetUp:
    """Bring up an interface that somebody took down; before peers, which shake hands only while it is up."""

    def __str__(self) -> str:
        return "set up"


@dataclass(frozen=True, slots=True)
class AddPeer:
    """Add a peer, and shake hands at once unless it is the other side's turn (see agent/handshakes.py)."""

    peer: PeerSpec
    initiate: bool = True

    def __str__(self) -> str:
        return f"add peer {self.peer}" if self.initiate else f"add peer {self.peer} quietly"


@dataclass(frozen=True, slots=True)
class Handshake:
    """Shake hands now with a peer that is there."""

    public_key: PublicKey
    keepalive_s: int
    """What its keepalive interval is, and stays."""

    def __str__(self) -> str:
        return f"shake hands with {self.public_key.short}"


@dataclass(frozen=True, slots=True)
class UpdatePeer:
    """Change what differs of an existing peer, without touching its session."""

    public_key: PublicKey
    endpoint: Endpoint | None = None
    """None: left as it is."""
    allowed_ips: frozenset[IPv4Network] | None = None
    """None: left as they are; else they replace what is there."""
    keepalive_s: int | None = None

    def __str__(self) -> str:
        words = [f"update peer {self.public_key.short}"]
        if self.endpoint is not None:
            words.append(f"endpoint {self.endpoint}")
        if self.allowed_ips is not None:
            words.append("allowed ips " + ",".join(str(n) for n in sorted(self.allowed_ips)))
        if self.keepalive_s is not None:
            words.append(f"keepalive {self.keepalive_s}s")
        return " ".join(words)


@dataclass(frozen=True, slots=True)
class RemovePeer:
    public_key: PublicKey

    def __str__(self) -> str:
        return f"remove peer {self.public_key.short}"


@dataclass(frozen=True, slots=True)
class ForgetFlows:
    """Forget the tracked connections from and to these addresses: none of them goes on, or meets a new task there."""

    addresses: frozenset[IPv4Address]

    def __str__(self) -> str:
        return "forget flows of " + ",".join(str(a) for a in sorted(self.addresses))


@dataclass(frozen=True, slots=True)
class AddRoute:
    """Add the route, or replace the one to the same destination."""

    route: Route

    def __str__(self) -> str:
        return f"add route {self.route}"


@dataclass(frozen=True, slots=True)
class RemoveRoute:
    route: Route

    def __str__(self) -> str:
        return f"remove route {self.route}"


@dataclass(frozen=True, slots=True)
class SetRules:
    """Put the table that this text declares in the place of Hivewire's in the namespace."""

    text: str = field(repr=False)
    digest: str
    """Stands in the table as its comment, so that what is applied can be told from what is wanted."""

    def __str__(self) -> str:
        return f"set rules {self.digest}"


@dataclass(frozen=True, slots=True)
class RemoveRules:
    def __str__(self) -> str:
        return "remove rules"


@dataclass(frozen=True, slots=True)
class RemoveInterface:
    """Remove the interface; its peers and routes go with it."""

    def __str__(self) -> str:
        return "remove interface"


Op = (
    CreateInterface
    | SetMtu
    | SetUp
    | AddPeer
    | Handshake
    | UpdatePeer
    | RemovePeer
    | ForgetFlows
    | AddRoute
    | RemoveRoute
    | SetRules
    | RemoveRules
    | RemoveInterface
)
