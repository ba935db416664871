"""What an agent answers when the controller asks it: counters and handshakes, which never go through etcd."""

import enum
from typing import Final

import msgspec

from hivewire.ids import NodeId, ServiceId, TaskId

INTERFACES_PATH: Final = "/v1/interfaces"
"""Where an agent answers with an AgentReport."""
DENIALS_PATH: Final = "/v1/denials"
"""Where an agent answers with a DenialReport."""


class Reason(enum.Enum):
    """Why a packet is none that a link allows."""

    WRONG_PORT = "wrong_port"
    """It came through the tunnel, from a service that has a link here, to another port."""
    NO_LINK = "no_link"
    PLAINTEXT = "plaintext"
    """Between linked tasks, but outside of the tunnel."""
    NO_BACKEND = "no_backend"
    """To the VIP of a linked service of which no task serves."""


class Direction(enum.Enum):
    """Which way, as the task sees it that noted it."""

    IN = "in"
    OUT = "out"


class PeerReport(msgspec.Struct, frozen=True, kw_only=True):
    public_key: str
    last_handshake: float | None
    """Unix time in seconds; None: never."""
    received_bytes: int
    sent_bytes: int


class InterfaceReport(msgspec.Struct, frozen=True, kw_only=True):
    task: TaskId
    service: ServiceId
    public_key: str
    listen_port: int
    mtu: int
    peers: tuple[PeerReport, ...]
    rules: str | None = None
    """Digest of the rules in force in the namespace; empty: there are none. None: an older agent, not saying."""
    quarantined: bool = False
    """Whether those rules close the namespace for a quarantine."""


class AgentReport(msgspec.Struct, frozen=True, kw_only=True):
    """All interfaces of one node at one moment."""

    node: NodeId
    taken_at: float
    """Unix time in seconds."""
    interfaces: tuple[InterfaceReport, ...]


class DenialEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What one task noted of attempts from one address to a port of another one."""

    direction: Direction
    reason: Reason
    dropped: bool
    """False: let through, because the task's service is only observed; each new connection counts once."""
    source: str
    destination: str
    protocol: int
    """Number of the IP protocol: 6 TCP, 17 UDP, 1 ICMP."""
    port: int
    """0 where the protocol has no ports."""
    count: int
    """Packets where dropped, else connections; since the agent first saw one."""
    first_seen: float
    last_seen: float
    """Unix time in seconds."""
    minutes: tuple[tuple[int, int], ...] = ()
    """How many in which minute since 1970, of the last hour."""


class FlowEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A connection over an overlay network that an observed task had before it was observed."""

    source: str
    destination: str
    protocol: int
    port: int
    first_seen: float
    last_seen: float


class TaskDenials(msgspec.Struct, frozen=True, kw_only=True):
    task: TaskId
    service: ServiceId
    """Empty for what the guard of an overlay network noted: then ``task`` is the file of its namespace."""
    counters: dict[str, int]
    """Everything noted since the agent knows the task, by name of the counter in its namespace."""
    unlisted: int
    """How much of it is not among the entries: there was no room for it, or it is too old."""
    entries: tuple[DenialEntry, ...]
    flows: tuple[FlowEntry, ...] = ()


class DenialReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the tasks of one node noted, at one moment."""

    node: NodeId
    taken_at: float
    tasks: tuple[TaskDenials, ...]


# Made here, before there are threads: see hivewire/records.py.
AGENT_REPORTS: Final = msgspec.json.Decoder(AgentReport)
DENIAL_REPORTS: Final = msgspec.json.Decoder(DenialReport)
