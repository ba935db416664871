"""What etcd holds: key layout and records. The one place that knows the wire format.

Every record is a JSON object. Unknown fields are ignored, so that a newer writer does not break an older reader;
``schema`` in the ``mesh`` record says when that no longer holds. Optional fields have defaults for the same reason.
Records that the controller derives hold no time stamps: the same cluster gives the same bytes, so a quiet
mesh writes nothing.
"""

import abc
import enum
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar, cast

import msgspec

from hivewire.errors import InvalidRecord, RecordTooNew
from hivewire.ids import ContainerId, NetworkId, NodeId, ServiceId, TaskId
from hivewire.keys import PublicKey

ROOT: Final = "/hivewire/v1/"
SCHEMA: Final = 1

MESH_KEY: Final = ROOT + "mesh"
LEADER_KEY: Final = ROOT + "leader"
NODES: Final = ROOT + "nodes/"
CLAIMS: Final = ROOT + "claims/"
PEERS: Final = ROOT + "peers/"
POLICIES: Final = ROOT + "policies/"
QUARANTINES: Final = ROOT + "quarantines/"
GUARDS: Final = ROOT + "guards/"
STATUS: Final = ROOT + "status/"


if TYPE_CHECKING:
    Address: TypeAlias = IPv4Address | IPv6Address
else:

    class Address(abc.ABC):  # noqa: B024 -- it only unites two classes
        """An address of the underlay, of either family: msgspec takes no union of two types that it does not know."""

    Address.register(IPv4Address)
    Address.register(IPv6Address)


def parse_address(text: str) -> Address:
    """An underlay address in its one spelling. Raises ValueError.

    What has two spellings could be compared and found different: an IPv4 address written as an IPv6 one is refused,
    and so is one with a zone, which only the node itself can read.
    """
    address = ip_address(text)
    if isinstance(address, IPv6Address) and (address.ipv4_mapped is not None or address.scope_id is not None):
        raise ValueError(f"{text} is an IPv4 address in disguise, or has a zone: write a global address")
    return address


class Mode(enum.Enum):
    """What happens to traffic outside declared links (``hivewire.mode``)."""

    ENFORCE = "enforce"
    OBSERVE = "observe"
    OFF = "off"


class Protocol(enum.Enum):
    TCP = "tcp"
    UDP = "udp"


class Severity(enum.Enum):
    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of all records."""


class PortRange(Record, frozen=True, kw_only=True):
    """Destination ports of one protocol, both ends included: the ports inside the container."""

    protocol: Protocol
    first: int
    last: int

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.last <= 65535:
            raise ValueError(f"{self.first}-{self.last} is no range of ports")

    def __str__(self) -> str:
        span = str(self.first) if self.first == self.last else f"{self.first}-{self.last}"
        return f"{span}/{self.protocol.value}"


class Endpoint(Record, frozen=True, kw_only=True):
    """Where a device's UDP socket listens: an underlay address of its node and a port."""

    address: Address
    port: int

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"{self.port} is no port")

    def __str__(self) -> str:
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return f"{host}:{self.port}"


class Finding(Record, frozen=True, kw_only=True):
    """Something a person should know or change. ``code`` is stable: it is API."""

    code: str
    severity: Severity
    subject: str
    """Name of the service, node or stack that it is about."""
    message: str
    remedy: str = ""
    label: str = ""


class MeshRecord(Record, frozen=True, kw_only=True):
    """Facts about the whole mesh."""

    schema: int = SCHEMA
    mesh: str
    """The Swarm cluster's id."""
    mode: Mode = Mode.ENFORCE
    settled: bool = False
    """Whether the records below are complete: false while an empty store is being filled. Until then no agent takes
    anything away that the records do not name."""
    floor: int = 0
    """No record of a manager has a generation below this one, in whole days: for agents that have seen none yet."""


class Doubt(Record, frozen=True, kw_only=True):
    """A stored record that a reader does not believe, and why."""

    key: str
    reason: str
    seen: int = 0
    """The generation that the reader has seen, where the record is not believed for being older."""


class NodeRecord(Record, frozen=True, kw_only=True):
    """An agent's word about its node; it hangs on the agent's lease."""

    node: NodeId
    hostname: str
    agent_version: str
    underlay_address: Address
    underlay_mtu: int
    backend: str
    """``kernel`` or ``userspace``."""
    first_port: int
    last_port: int
    report_port: int = 0
    """Where the agent answers the controller's questions over mTLS; 0: nowhere."""
    doubts: tuple[Doubt, ...] = ()
    """What the agent does not believe now; some of it, where it is a lot."""


class ClaimRecord(Record, frozen=True, kw_only=True):
    """An agent asks for a task of its node to be a peer. Written when the task's device is ready to receive."""

    task: TaskId
    service: ServiceId
    node: NodeId
    container: ContainerId
    public_key: str
    endpoint: Endpoint
    epoch: int
    """Grows with every new key of a task; milliseconds since 1970 of the key's making."""
    serving: bool
    """Whether new connections should be sent here: started, healthy where it has a health check, not being stopped."""
    underlay_mtu: int = 0
    """What the node's underlay carries in bytes, as its agent measured it; 0: an older agent did not say."""


class PeerRecord(Record, frozen=True, kw_only=True):
    """An admitted claim plus what Swarm says of the task."""

    task: TaskId
    task_name: str
    service: ServiceId
    node: NodeId
    public_key: str
    endpoint: Endpoint
    epoch: int
    addresses: dict[NetworkId, IPv4Address]
    """The task's overlay addresses: the allowed IPs."""
    serving: bool
    """Whether VIP maps lead here. A peer that does not serve keeps its open connections."""
    underlay_mtu: int = 0
    """As in the claim. An agent sends its own tasks' packets no larger, and believes nothing below what IPv4 needs."""


class Link(Record, frozen=True, kw_only=True):
    """One end's view of a link between this service and another one, on one overlay network."""

    service: ServiceId
    name: str
    network: NetworkId
    ports: tuple[PortRange, ...]
    """Of the destination service. Empty: all ports (only between tasks of one service)."""
    vip: IPv4Address | None = None
    """The other service's VIP on that network; None for dnsrr and for in-links."""


class Network(Record, frozen=True, kw_only=True):
    """An overlay network that the service's tasks are attached to."""

    id: NetworkId
    name: str
    subnets: tuple[str, ...]


class PolicyRecord(Record, frozen=True, kw_only=True):
    """What the tasks of one service may do: the outcome of compiling labels."""

    service: ServiceId
    name: str
    stack: str
    mode: Mode
    networks: tuple[Network, ...]
    out_links: tuple[Link, ...] = ()
    in_links: tuple[Link, ...] = ()
    self_links: tuple[Link, ...] = ()
    """Between the tasks of this service itself, one per network."""
    keepalive_s: int = 0
    mtu: int = 0
    """0: measured."""
    rotate_s: int = 0
    labels: dict[str, str] = {}
    """The service's own labels that this policy was compiled from: the last ones without an error."""
    findings: tuple[Finding, ...] = ()

    @property
    def linked_services(self) -> frozenset[ServiceId]:
        """Every service whose tasks are peers of this service's tasks, itself included where it has several."""
        return frozenset(link.service for link in (*self.out_links, *self.in_links, *self.self_links))


class GuardRecord(Record, frozen=True, kw_only=True):
    """What the guard in the nodes' namespaces of one overlay network keeps from talking there in clear."""

    network: NetworkId
    name: str
    strict: bool = False
    """Whether what is not known to be exempt is dropped, instead of what is known to be enforced."""
    enforced: tuple[ServiceId, ...] = ()
    """Services on the network in mode ``enforce``; sorted."""
    exempt: tuple[ServiceId, ...] = ()
    """Services on a strict network known to be in another mode, or not in the mesh; sorted. A service in neither list
    is newer than this record: nobody knows yet what it will be."""
    exempt_vips: tuple[IPv4Address, ...] = ()
    """The exempt services' VIPs on a strict network; sorted."""
    vnis: tuple[int, ...] = ()
    """VXLAN identifiers of a strict network, one for each of its subnets; sorted. Empty: an older controller, or Swarm
    has not given them yet."""
    vxlan_port: int = 4789
    """UDP port of the cluster's VXLAN frames."""


class QuarantineKind(enum.Enum):
    """What a person can shut out of the mesh."""

    SERVICE = "service"
    TASK = "task"
    NODE = "node"


class QuarantineRecord(Record, frozen=True, kw_only=True):
    """A person's decision: the tasks of this service or node, or this task, talk to nobody until released."""

    kind: QuarantineKind
    id: str
    name: str
    """As it was called when the decision was made."""
    reason: str = ""
    by: str = ""
    """The role of the token that asked for it."""
    since: float = 0.0
    """Unix time in seconds."""
    released: bool = False
    """Whether it is over. The record stays for as long as what it is about: a deletion proves nothing."""


class TaskPhase(enum.Enum):
    """How far the agent got with a task."""

    READY = "ready"
    FAILED = "failed"


class StatusRecord(Record, frozen=True, kw_only=True):
    """What an agent has applied for a task. Shown to people; nothing desired is computed from it."""

    task: TaskId
    service: ServiceId
    node: NodeId
    phase: TaskPhase
    interface: str = ""
    public_key: str = ""
    mtu: int = 0
    mode: Mode = Mode.OFF
    error: str = ""
    quarantined: bool = False
    """Whether the namespace is closed for a quarantine."""


R = TypeVar("R", bound=Record)


def _encode_hook(value: Any) -> Any:
    if isinstance(value, IPv4Address | IPv6Address):
        return str(value)
    raise NotImplementedError(f"{type(value).__name__} has no wire form")


def _decode_hook(kind: type, value: Any) -> Any:
    if kind in (IPv4Address, Address):
        # The ipaddress module would take a number as well.
        if not isinstance(value, str):
            raise ValueError("an address is written as text")
        return IPv4Address(value) if kind is IPv4Address else parse_address(value)
    raise NotImplementedError(f"{kind.__name__} has no wire form")


# Sorted keys: two writers of the same facts write the same bytes.
_ENCODER: Final = msgspec.json.Encoder(enc_hook=_encode_hook, order="sorted")
# All decoders are made while their module is imported, by one thread: msgspec (0.22) fills in what it knows of a
# structure bit by bit, and another thread that decodes the same kind meanwhile reads what is not there yet and crashes.
_DECODERS: Final[Mapping[type[Record], msgspec.json.Decoder[Any]]] = {
    kind: msgspec.json.Decoder(kind, dec_hook=_decode_hook) for kind in Record.__subclasses__()
}


def encode(record: Record) -> bytes:
    """The record's bytes; equal records have equal bytes."""
    return _ENCODER.encode(record)


def decode(kind: type[R], data: bytes) -> R:
    """Read a record. Raises InvalidRecord, and RecordTooNew for a mesh of a later schema."""
    try:
        record = cast(R, _DECODERS[kind].decode(data))
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise InvalidRecord(f"{kind.__name__} cannot be read: {error}") from error
    if isinstance(record, MeshRecord) and record.schema > SCHEMA:
        raise RecordTooNew(f"the mesh has schema {record.schema}, this version knows {SCHEMA}: upgrade it")
    if isinstance(record, ClaimRecord | PeerRecord):
        _check_key(record.public_key)
    return record


def to_builtins(record: Record) -> dict[str, Any]:
    """The record as JSON types, for the API and for logs."""
    return cast(dict[str, Any], msgspec.to_builtins(record, enc_hook=_encode_hook))


def _check_key(text: str) -> None:
    try:
        PublicKey.parse(text)
    except Exception as error:
        raise InvalidRecord(f"public_key: {error}") from error


def node_key(node: NodeId) -> str:
    return f"{NODES}{node}"


def claim_key(node: NodeId, task: TaskId) -> str:
    return f"{CLAIMS}{node}/{task}"


def status_key(node: NodeId, task: TaskId) -> str:
    return f"{STATUS}{node}/{task}"


def policy_key(service: ServiceId) -> str:
    return f"{POLICIES}{service}"


def guard_key(network: NetworkId) -> str:
    return f"{GUARDS}{network}"


def peers_prefix(service: ServiceId) -> str:
    return f"{PEERS}{service}/"


def peer_key(service: ServiceId, task: TaskId) -> str:
    return f"{peers_prefix(service)}{task}"


def quarantine_key(kind: QuarantineKind, id_: str) -> str:
    return f"{QUARANTINES}{kind.value}/{id_}"


def quarantine_keys(service: ServiceId, task: TaskId, node: NodeId) -> tuple[str, ...]:
    """Every key below which a record shuts this task out."""
    return (
        quarantine_key(QuarantineKind.SERVICE, service),
        quarantine_key(QuarantineKind.TASK, task),
        quarantine_key(QuarantineKind.NODE, node),
    )


def key_of(record: Record) -> str:
    """Where a record lies, as it says itself."""
    match record:
        case MeshRecord():
            return MESH_KEY
        case NodeRecord():
            return node_key(record.node)
        case ClaimRecord():
            return claim_key(record.node, record.task)
        case StatusRecord():
            return status_key(record.node, record.task)
        case PeerRecord():
            return peer_key(record.service, record.task)
        case PolicyRecord():
            return policy_key(record.service)
        case GuardRecord():
            return guard_key(record.network)
        case QuarantineRecord():
            return quarantine_key(record.kind, record.id)
    raise TypeError(f"{type(record).__name__} lies nowhere in the store")


def writer_of(key: str) -> NodeId | None:
    """The node that alone may write this key; None: managers. Raises InvalidRecord."""
    kind, *rest = split_key(key)
    return NodeId(rest[0]) if rest and kind in ("nodes", "claims", "status") else None


def split_key(key: str) -> tuple[str, ...]:
    """The parts of a key below the root: ``claims/N/T`` gives ("claims", "N", "T"). Raises InvalidRecord."""
    if not key.startswith(ROOT):
        raise InvalidRecord(f"{key!r} is not below {ROOT}")
    return tuple(key[len(ROOT) :].split("/"))


def decode_all(kind: type[R], items: Mapping[str, bytes]) -> tuple[dict[str, R], dict[str, InvalidRecord]]:
    """Read many records; the unreadable ones come apart, by key, and stop nothing."""
    good: dict[str, R] = {}
    bad: dict[str, InvalidRecord] = {}
    for key, data in items.items():
        try:
            good[key] = decode(kind, data)
        except InvalidRecord as error:
            bad[key] = error
    return good, bad
