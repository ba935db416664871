"""Everything the controller knows at one moment, as one value: the API and the CLI are functions of it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from controller.policy.compile import Compiled
from controller.swarm.snapshot import SwarmSnapshot, Task
from hivewire.ids import NodeId, ServiceId, TaskId
from hivewire.records import (
    ClaimRecord,
    Finding,
    Mode,
    NodeRecord,
    PeerRecord,
    PolicyRecord,
    QuarantineKind,
    QuarantineRecord,
    StatusRecord,
)
from hivewire.reports import AgentReport, InterfaceReport, TaskDenials


@dataclass(frozen=True, slots=True)
class PendingLink:
    """A declared link that is not in force: its target is absent, or has not given consent."""

    source: str
    destination: str
    """As resolved, else as written."""
    ports: str
    reason: str


@dataclass(frozen=True, slots=True)
class RefusedClaim:
    node: NodeId
    task: TaskId
    reason: str


@dataclass(frozen=True, slots=True)
class Component:
    """One thing that must work, for /readyz and ``hivewire check``."""

    name: str
    is_ok: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class MeshState:
    swarm: SwarmSnapshot
    mode: Mode = Mode.ENFORCE
    revision: int = 0
    """Of the store, of the newest change seen."""
    leader: str = ""
    """Host name of the node whose controller leads; empty: nobody does."""
    is_leader: bool = False
    policies: Mapping[ServiceId, PolicyRecord] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    pending: tuple[PendingLink, ...] = ()
    nodes: Mapping[NodeId, NodeRecord] = field(default_factory=dict)
    """Nodes whose agent is alive: the records hang on leases."""
    tasks: Mapping[TaskId, Task] = field(default_factory=dict)
    """Running tasks of all services, meshed or not, as last listed: up to half a minute old."""
    claims: Mapping[TaskId, ClaimRecord] = field(default_factory=dict)
    peers: Mapping[TaskId, PeerRecord] = field(default_factory=dict)
    statuses: Mapping[TaskId, StatusRecord] = field(default_factory=dict)
    refused: tuple[RefusedClaim, ...] = ()
    components: tuple[Component, ...] = ()
    compiled: Compiled = field(default_factory=Compiled)
    """What ``policies``, ``findings`` and ``pending`` were taken from, ids and codes included."""
    quarantines: tuple[QuarantineRecord, ...] = ()
    """By kind and id."""
    unverified: Mapping[str, str] = field(default_factory=dict)
    """Why what is stored below a key now counts as not written."""


class StateSource(Protocol):
    """Where API requests get their state from."""

    def state(self) -> MeshState:
        """The newest state; cheap, never blocks on the network. Raises Unavailable before the first reading."""

    def interfaces(self) -> Mapping[TaskId, InterfaceReport]:
        """What the agents see in the kernel now, asked at most every other second; nodes that do not answer miss."""

    def denials(self) -> Sequence[TaskDenials]:
        """What the tasks noted that no link allows, asked at most every other second; silent nodes miss."""

    def ask(self, nodes: Collection[NodeId]) -> Mapping[NodeId, AgentReport]:
        """The same of these nodes alone, asked at this moment; those that do not answer miss."""

    def quarantine(self, record: QuarantineRecord) -> None:
        """Write down that somebody is shut out. Raises StoreUnavailable."""

    def release(self, kind: QuarantineKind, id_: str) -> None:
        """Take the record away again. Raises StoreUnavailable."""
