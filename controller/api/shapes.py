"""The values that the API answers with: the one place that knows their form. Every field is always present.

Times are UTC, durations end in ``_seconds``, sizes are bytes. Their JSON form is API: only additions are compatible.
"""

import enum
from datetime import datetime
from typing import Generic, TypeVar

import msgspec

from controller.policy.verdict import StepName, Verdict
from hivewire.records import Mode, QuarantineKind, Severity


class LinkState(enum.Enum):
    SECURE = "secure"
    IDLE = "idle"
    STALE = "stale"
    PENDING = "pending"
    UNKNOWN = "unknown"


class TaskState(enum.Enum):
    CONFIGURED = "configured"
    WAITING = "waiting"
    FAILED = "failed"
    REFUSED = "refused"
    QUARANTINED = "quarantined"


class ClaimState(enum.Enum):
    ADMITTED = "admitted"
    WAITING = "waiting"
    REFUSED = "refused"


class AuditResult(enum.Enum):
    DONE = "done"
    REFUSED = "refused"
    """The token's role does not suffice."""
    FAILED = "failed"


class AgentState(enum.Enum):
    UP = "up"
    MISSING = "missing"


class Result(enum.Enum):
    SUCCESS = "success"
    WARNING = "warning"
    ERROR = "error"


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """Base of everything that the API answers with."""


class FindingView(Shown, frozen=True, kw_only=True):
    """Something a person should know or change. Codes are stable."""

    code: str
    severity: Severity
    subject: str
    message: str
    remedy: str
    label: str


class TaskView(Shown, frozen=True, kw_only=True):
    """A task of a meshed service and how far it got."""

    id: str
    name: str
    service: str
    node: str
    state: TaskState
    detail: str
    serving: bool
    interface: str
    mtu: int
    peers: int


class LinkView(Shown, frozen=True, kw_only=True):
    """A link from one service to another. ``pairs_*`` count pairs of tasks, bytes are seen from the source."""

    source: str
    destination: str
    ports: list[str]
    """Empty: all ports."""
    state: LinkState
    reason: str
    is_internal: bool
    """Between the tasks of one service; nobody declares it."""
    networks: list[str]
    pairs_expected: int
    pairs_configured: int
    pairs_secure: int
    pairs_stale: int
    pairs_unknown: int
    last_handshake: datetime | None
    handshake_age_seconds: float | None
    received_bytes: int | None
    sent_bytes: int | None


class PairView(Shown, frozen=True, kw_only=True):
    """One task of the source and one of the destination."""

    source_task: str
    source_node: str
    destination_task: str
    destination_node: str
    state: LinkState
    last_handshake: datetime | None
    handshake_age_seconds: float | None
    received_bytes: int | None
    sent_bytes: int | None


class LinkDetail(LinkView, frozen=True, kw_only=True):
    """A link with every pair of tasks."""

    pairs: list[PairView]


class ServiceView(Shown, frozen=True, kw_only=True):
    """A service of the Swarm. ``mode`` is null for one outside the mesh."""

    id: str
    name: str
    stack: str
    is_meshed: bool
    mode: Mode | None
    tasks_configured: int
    tasks_expected: int
    links_in: int
    links_out: int
    findings: int
    quarantine: str | None
    """Why a person has shut out all or some of its tasks; null: nobody has."""


class ServiceDetail(ServiceView, frozen=True, kw_only=True):
    """A service with its links, tasks and findings, and the labels in force."""

    labels: dict[str, str]
    networks: list[str]
    links: list[LinkView]
    tasks: list[TaskView]
    finding_list: list[FindingView]


class NodeView(Shown, frozen=True, kw_only=True):
    """A node of the Swarm and its agent. What only the agent knows is null while the agent is missing."""

    id: str
    hostname: str
    role: str
    os: str
    is_ready: bool
    engine_version: str
    agent: AgentState
    agent_answers: bool | None
    """Whether the agent tells what its kernel holds; null: nothing to tell."""
    agent_version: str | None
    backend: str | None
    underlay_address: str | None
    underlay_mtu: int | None
    tasks_configured: int
    tasks_expected: int
    quarantine: str | None
    """Why a person has shut it out; null: nobody has."""


class RefusedView(Shown, frozen=True, kw_only=True):
    task: str
    reason: str


class NodeDetail(NodeView, frozen=True, kw_only=True):
    """A node with its tasks and the claims that were not admitted."""

    first_port: int | None
    last_port: int | None
    tasks: list[TaskView]
    refused: list[RefusedView]


class Check(Shown, frozen=True, kw_only=True):
    description: str
    result: Result
    error: str
    hint: str
    code: str


class CheckCategory(Shown, frozen=True, kw_only=True, rename={"category_name": "categoryName"}):
    category_name: str
    checks: list[Check]


class CheckReport(Shown, frozen=True, kw_only=True):
    """The outcome of all checks. ``ready``: nothing is left to wait for."""

    success: bool
    ready: bool
    waiting_for: list[str]
    categories: list[CheckCategory]
    revision: int


class ComponentView(Shown, frozen=True, kw_only=True):
    name: str
    is_ok: bool
    detail: str


class AgentCount(Shown, frozen=True, kw_only=True):
    up: int
    nodes: int


class ServiceCount(Shown, frozen=True, kw_only=True):
    meshed: int
    total: int


class TaskCount(Shown, frozen=True, kw_only=True):
    configured: int
    expected: int


class LinkCount(Shown, frozen=True, kw_only=True):
    total: int
    secure: int
    idle: int
    pending: int
    stale: int
    unknown: int


class FindingCount(Shown, frozen=True, kw_only=True):
    error: int
    warning: int
    info: int


class DenialView(Shown, frozen=True, kw_only=True):
    """Attempts that no link allows, from one service to a port of another. Nobody's end is an address."""

    source: str
    destination: str
    protocol: str
    port: int
    """0 where the protocol has no ports."""
    dropped: bool
    """False: let through, because it is only observed; ``enforce`` would drop it."""
    count: int
    """Packets where dropped, else connections."""
    reasons: list[str]
    """Of ``wrong_port``, ``no_link``, ``plaintext`` and ``no_backend``."""
    tasks: list[str]
    """Those that noted it."""
    first_seen: datetime
    last_seen: datetime
    last_seen_age_seconds: float
    detail: str


class DeniedCount(Shown, frozen=True, kw_only=True):
    """What was dropped lately, and the most frequent of it."""

    count: int
    period_seconds: int
    top: DenialView | None


class LabelView(Shown, frozen=True, kw_only=True):
    """A label as it would be. ``current`` is null where there is none."""

    service: str
    stack: str
    label: str
    current: str | None
    suggested: str


class AttemptView(Shown, frozen=True, kw_only=True):
    """Something that was seen and that no link allowed then. ``reason`` says why nothing is suggested for it."""

    source: str
    destination: str
    protocol: str
    port: int
    passes: bool
    """It passes today, and ``enforce`` would cut it."""
    count: int
    """0: only as a connection that was open before it was observed."""
    last_seen: datetime
    is_suggested: bool
    reason: str


class SuggestionView(Shown, frozen=True, kw_only=True):
    """Labels that would allow what was seen; each value keeps what the label has."""

    labels: list[LabelView]
    commands: list[str]
    stack_files: dict[str, str]
    """The same as YAML, by stack."""
    attempts: list[AttemptView]
    revision: int


class Status(Shown, frozen=True, kw_only=True):
    """The whole mesh on one screen."""

    mesh: str
    version: str
    mode: Mode
    revision: int
    leader: str
    is_leader: bool
    agents: AgentCount
    services: ServiceCount
    tasks: TaskCount
    links: LinkCount
    findings: FindingCount
    quarantines: int
    denied: DeniedCount
    components: list[ComponentView]


class StepView(Shown, frozen=True, kw_only=True):
    """One question on the way. ``is_ok`` is null where it was not reached, is not needed, or is not known."""

    name: StepName
    is_ok: bool | None
    text: str


class PathView(Shown, frozen=True, kw_only=True):
    """How one pair of tasks talks."""

    source_task: str
    source_node: str
    source_address: str
    source_endpoint: str
    destination_task: str
    destination_node: str
    destination_address: str
    destination_endpoint: str
    mtu: int


class DecisionView(Shown, frozen=True, kw_only=True):
    """What happens to a connection. ``step`` is the one where it ends; null: it arrives."""

    source: str
    destination: str
    port: str | None
    allowed: bool
    verdict: Verdict
    step: StepName | None
    is_encrypted: bool
    steps: list[StepView]
    fix: str
    """A command that changes the answer, or what to do; empty where nothing is wrong."""
    unknown_nodes: list[str]
    """Nodes whose agents do not answer: what they hold is not known."""
    source_tasks: int
    destination_tasks: int
    last_handshake: datetime | None
    handshake_age_seconds: float | None
    received_bytes: int | None
    sent_bytes: int | None
    path: PathView | None
    attempts: int | None
    """Connections lately dropped on this way; null: not known."""


class QuarantineView(Shown, frozen=True, kw_only=True):
    """Somebody who is shut out, and on which nodes that is in force."""

    kind: QuarantineKind
    id: str
    name: str
    reason: str
    by: str
    since: datetime
    is_closed: bool
    closed_nodes: list[str]
    open_nodes: dict[str, str]
    """What is still open there."""
    unknown_nodes: list[str]


class ClaimView(Shown, frozen=True, kw_only=True):
    """What an agent claims for a task, and what became of it. ``reason`` is empty where it was admitted."""

    task: str
    task_name: str
    """Empty for a task that Swarm does not know."""
    service: str
    """Empty where neither Swarm nor the claim says."""
    node: str
    """Of the agent that claims."""
    node_id: str
    state: ClaimState
    reason: str
    reason_class: str
    """One of a few words for programs; empty unless refused."""


class AuditView(Shown, frozen=True, kw_only=True):
    """A request that would write, whatever came of it. What it is about is empty where it was refused before that."""

    time: datetime
    role: str
    token: str
    """A short word that tells tokens apart and cannot be traced back to one."""
    address: str
    action: str
    path: str
    kind: str
    id: str
    name: str
    reason: str
    result: AuditResult
    status: int
    request_id: str


class Version(Shown, frozen=True, kw_only=True):
    version: str
    api_version: str


T = TypeVar("T")


class Page(Shown, Generic[T], frozen=True, kw_only=True):
    """One page of a list. Ask again with ``cursor=next_cursor`` until it is null."""

    items: list[T]
    next_cursor: str | None
    revision: int
