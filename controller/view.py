"""What people see of the mesh: functions from the controller's state to JSON-ready values. No IO.

``draw`` joins the state with what the agents see in their kernels; everything else here reads the outcome.

A link's state comes from its pairs of tasks, and a pair's state from both ends. WireGuard renews a session only
when there is something to send, so an old handshake on a silent pair is normal (idle). A pair is broken (stale) when
an end went on sending after its last session had ended, or never had one, and got no answer.
An agent that does not answer makes a pair unknown, unless the other end has a handshake: that proves both.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Final, NamedTuple, TypeVar

import msgspec

from controller import quarantine
from controller.api.shapes import (
    AgentCount,
    AgentState,
    Check,
    CheckCategory,
    CheckReport,
    ComponentView,
    DeniedCount,
    FindingCount,
    FindingView,
    LinkCount,
    LinkDetail,
    LinkState,
    LinkView,
    NodeDetail,
    NodeView,
    PairView,
    RefusedView,
    Result,
    ServiceCount,
    ServiceDetail,
    ServiceView,
    Status,
    TaskCount,
    TaskState,
    TaskView,
)
from controller.policy.findings import finding
from controller.state import MeshState
from controller.swarm.snapshot import Node, Service
from hivewire.ids import NetworkId, NodeId, ServiceId, TaskId
from hivewire.records import (
    Doubt,
    Finding,
    Link,
    Mode,
    NodeRecord,
    PolicyRecord,
    PortRange,
    QuarantineKind,
    Severity,
    TaskPhase,
)
from hivewire.reports import InterfaceReport, PeerReport

SESSION_S: Final = 180
"""A WireGuard session carries nothing after this time (REJECT_AFTER_TIME)."""
INITIATION_BYTES: Final = 148
"""Size of a handshake initiation. The next one follows after 5 s, so more than this much means a missing answer."""

_MANY: Final = 5
"""How many examples a sentence names."""


class Silence(NamedTuple):
    """How much an end had sent when it was first seen without a session."""

    last_handshake: float
    sent_bytes: int


Silences = Mapping[tuple[TaskId, str], Silence]


def follow(silences: Silences, interfaces: Mapping[TaskId, InterfaceReport], now: float) -> Silences:
    """Fold a reading into what is known about ends without a session, by task and public key of the peer.

    What such an end sends after the first reading can only be handshakes, each without an answer.
    """
    kept = {}
    for task, interface in interfaces.items():
        for peer in interface.peers:
            if peer.last_handshake is None or now - peer.last_handshake < SESSION_S:
                continue
            before = silences.get((task, peer.public_key))
            is_same = before is not None and before.last_handshake == peer.last_handshake
            if before is None or not is_same or peer.sent_bytes < before.sent_bytes:
                before = Silence(peer.last_handshake, peer.sent_bytes)
            kept[task, peer.public_key] = before
    return kept


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Task:
    id: TaskId
    name: str
    service: ServiceId
    node: NodeId
    state: TaskState
    detail: str = ""


@dataclass(frozen=True, slots=True)
class _Pair:
    state: LinkState
    """PENDING: an end is known to lack the other."""
    last_handshake: float | None = None
    received: int | None = None
    sent: int | None = None


class _LinkKey(NamedTuple):
    source: ServiceId
    destination: ServiceId


@dataclass(frozen=True, slots=True)
class Picture:
    """The state with the kernels' view joined in. Made by ``draw``."""

    state: MeshState
    interfaces: Mapping[TaskId, InterfaceReport]
    silences: Silences
    now: float
    tasks: Mapping[TaskId, _Task]
    by_service: Mapping[ServiceId, Sequence[TaskId]]
    by_node: Mapping[NodeId, Sequence[TaskId]]
    findings: Sequence[FindingView]
    """The worst first."""
    ends: Mapping[tuple[TaskId, TaskId], PeerReport]
    """How the first task sees the second one."""
    seen: Mapping[tuple[ServiceId, ServiceId], Set[tuple[TaskId, TaskId]]]
    """By link, the pairs of which at least one end knows the other."""
    names: Mapping[ServiceId, str] = field(default_factory=dict)
    links: Sequence[LinkView] = ()


def draw(
    state: MeshState, interfaces: Mapping[TaskId, InterfaceReport], now: float, silences: Silences | None = None
) -> Picture:
    """Join state and reports. ``now`` is Unix time in seconds; ``silences`` comes from ``follow``."""
    names = {id_: policy.name for id_, policy in state.policies.items()}
    names.update({id_: service.name for id_, service in state.swarm.services.items()})
    tasks = {task.id: task for task in _tasks(state, names)}
    by_service, by_node = defaultdict(list), defaultdict(list)
    for task in sorted(tasks.values(), key=lambda task: (task.name, task.id)):
        by_service[task.service].append(task.id)
        by_node[task.node].append(task.id)
    ends = _ends(state, interfaces, tasks)
    picture = Picture(
        state=state,
        interfaces=interfaces,
        silences=silences or {},
        now=now,
        tasks=tasks,
        by_service=by_service,
        by_node=by_node,
        findings=_findings(state),
        ends=ends,
        seen=_seen(state, tasks, ends),
        names=names,
    )
    return replace(picture, links=tuple(_links(picture)))


def status(picture: Picture, version: str, denied: DeniedCount) -> Status:
    state = picture.state
    shown_nodes = nodes(picture)
    states = [link.state for link in picture.links if not link.is_internal]
    severities = [finding.severity for finding in picture.findings]
    return Status(
        mesh=state.swarm.cluster,
        version=version,
        mode=state.mode,
        revision=state.revision,
        leader=state.leader,
        is_leader=state.is_leader,
        agents=AgentCount(up=sum(node.agent is AgentState.UP for node in shown_nodes), nodes=len(shown_nodes)),
        services=ServiceCount(meshed=len(_meshed(state)), total=len(state.swarm.services)),
        tasks=TaskCount(configured=_configured(picture.tasks.values()), expected=len(picture.tasks)),
        links=LinkCount(total=len(states), **{each.value: states.count(each) for each in LinkState}),
        findings=FindingCount(**{each.value: severities.count(each) for each in Severity}),
        quarantines=len(state.quarantines),
        denied=denied,
        components=[ComponentView(name=it.name, is_ok=it.is_ok, detail=it.detail) for it in state.components],
    )


def services(picture: Picture) -> list[ServiceView]:
    """All services of the Swarm, by name."""
    return sorted(
        (_service(picture, service) for service in picture.state.swarm.services.values()),
        key=lambda service: (service.name, service.id),
    )


def service(picture: Picture, name: str) -> ServiceDetail | None:
    """The service with this name or id."""
    found = _find(picture.state.swarm.services.values(), lambda service: (service.name, service.id), name)
    if found is None:
        return None
    policy = picture.state.policies.get(found.id)
    return ServiceDetail(
        **msgspec.structs.asdict(_service(picture, found)),
        labels=dict(policy.labels) if policy else {},
        networks=[network.name for network in policy.networks] if policy else [],
        links=[link for link in picture.links if found.name in (link.source, link.destination)],
        tasks=[_task_view(picture, picture.tasks[task]) for task in picture.by_service.get(found.id, ())],
        finding_list=[finding for finding in picture.findings if finding.subject == found.name],
    )


def links(picture: Picture) -> list[LinkView]:
    """All links, by source and destination: those in force first, then those that wait."""
    return list(picture.links)


def link(picture: Picture, source: str, destination: str) -> LinkDetail | None:
    """The link between two services, by name or id, with its pairs."""
    all_services = picture.state.swarm.services
    source, destination = (picture.names.get(ServiceId(name), name) for name in (source, destination))
    shown = next((it for it in picture.links if (it.source, it.destination) == (source, destination)), None)
    if shown is None:
        return None
    ids = {service.name: service.id for service in all_services.values()}
    pairs: list[PairView] = []
    if shown.pairs_expected and source in ids and destination in ids:
        pairs = [_pair_view(picture, *pair) for pair in _all_pairs(picture, _LinkKey(ids[source], ids[destination]))]
    return LinkDetail(**msgspec.structs.asdict(shown), pairs=pairs)


def nodes(picture: Picture) -> list[NodeView]:
    """All nodes of the Swarm, by host name."""
    return sorted(
        (_node(picture, node) for node in picture.state.swarm.nodes.values()), key=lambda node: (node.hostname, node.id)
    )


def node(picture: Picture, name: str) -> NodeDetail | None:
    """The node with this host name or id."""
    found = _find(picture.state.swarm.nodes.values(), lambda node: (node.hostname, node.id), name)
    if found is None:
        return None
    record = picture.state.nodes.get(found.id)
    refused = [RefusedView(task=it.task, reason=it.reason) for it in picture.state.refused if it.node == found.id]
    return NodeDetail(
        **msgspec.structs.asdict(_node(picture, found)),
        first_port=record.first_port if record else None,
        last_port=record.last_port if record else None,
        tasks=[_task_view(picture, picture.tasks[task]) for task in picture.by_node.get(found.id, ())],
        refused=sorted(refused, key=lambda it: (it.task, it.reason)),
    )


def findings(picture: Picture) -> list[FindingView]:
    """All findings, the worst first."""
    return list(picture.findings)


def finding_key(finding: FindingView) -> tuple[str, ...]:
    rank = list(Severity).index(finding.severity)
    return (str(rank), finding.code, finding.subject, finding.label, finding.message)


def link_key(link: LinkView) -> tuple[str, ...]:
    return (link.source, link.destination, "1" if not link.pairs_expected else "0", ",".join(link.ports), link.reason)


def stack_names(picture: Picture, stack: str) -> frozenset[str]:
    """The stack's own name and those of its services: whatever a link's end or a finding's subject may say."""
    return frozenset(it.name for it in picture.state.swarm.services.values() if it.stack == stack) | {stack}


def checks(picture: Picture, version: str) -> CheckReport:
    """Everything that can be said about whether the mesh works, worst things included."""
    grouped = {
        "swarm": [*_component_checks(picture, "swarm"), *_swarm_checks(picture)],
        "nodes": list(_node_checks(picture, version)),
        "store": list(_component_checks(picture, "store")),
        "controller": [*_leader_checks(picture), *_component_checks(picture, "controller")],
        "labels": list(_label_checks(picture)),
        "links": list(_link_checks(picture)),
    }
    success = all(check.result is not Result.ERROR for checks in grouped.values() for check in checks)
    waiting = list(_waiting_for(picture))
    return CheckReport(
        success=success,
        ready=success and not waiting,
        waiting_for=waiting,
        categories=[CheckCategory(category_name=name, checks=checks) for name, checks in grouped.items() if checks],
        revision=picture.state.revision,
    )


# -- joining ---------------------------------------------------------------------------------------------------------


def _tasks(state: MeshState, names: Mapping[ServiceId, str]) -> Iterator[_Task]:
    """The tasks of meshed services: those that Swarm wants to run, and those that agents have announced since."""
    meshed = _meshed(state)
    refused = {(it.node, it.task): it.reason for it in state.refused}
    wanted = {id_ for id_, task in state.tasks.items() if task.is_wanted}
    for id_ in sorted(wanted | state.claims.keys() | state.peers.keys()):
        task, claim, peer = state.tasks.get(id_), state.claims.get(id_), state.peers.get(id_)
        status = state.statuses.get(id_)
        source = peer or claim or task
        if source is None or source.service not in meshed:
            continue
        if status and status.phase is TaskPhase.FAILED:
            at, detail = TaskState.FAILED, status.error
        elif (shut := quarantine.over(state.quarantines, source.service, id_, source.node)) is not None:
            at, detail = TaskState.QUARANTINED, quarantine.words(shut)
        elif reason := refused.get((source.node, id_)):
            at, detail = TaskState.REFUSED, reason
        elif peer and status:
            at, detail = TaskState.CONFIGURED, ""
        elif peer:
            at, detail = TaskState.WAITING, "its agent has not finished yet"
        elif claim:
            at, detail = TaskState.WAITING, "the controller has not admitted it yet"
        elif task and task.state != "running":
            at, detail = TaskState.WAITING, f"Swarm has it in state {task.state}"
        else:
            at, detail = TaskState.WAITING, "no agent has announced it yet"
        name = peer.task_name if peer else task.name if task else f"{names.get(source.service, source.service)}.{id_}"
        yield _Task(id_, name, source.service, source.node, at, detail)


def _ends(
    state: MeshState, interfaces: Mapping[TaskId, InterfaceReport], tasks: Mapping[TaskId, _Task]
) -> dict[tuple[TaskId, TaskId], PeerReport]:
    owners = {peer.public_key: task for task, peer in state.peers.items()}
    owners.update({interface.public_key: task for task, interface in interfaces.items()})
    ends: dict[tuple[TaskId, TaskId], PeerReport] = {}
    for task, interface in interfaces.items():
        if task not in tasks:
            continue
        for peer in interface.peers:
            other = owners.get(peer.public_key)
            if other is None or other not in tasks or other == task:
                continue
            known = ends.get((task, other))
            # While a key is replaced a task is two peers: the one that works is the one to show.
            if known is None or (peer.last_handshake or 0) >= (known.last_handshake or 0):
                ends[task, other] = peer
    return ends


def _seen(
    state: MeshState, tasks: Mapping[TaskId, _Task], ends: Iterable[tuple[TaskId, TaskId]]
) -> dict[tuple[ServiceId, ServiceId], set[tuple[TaskId, TaskId]]]:
    seen: dict[tuple[ServiceId, ServiceId], set[tuple[TaskId, TaskId]]] = {
        (policy.service, link.service): set()
        for policy in state.policies.values()
        for link in (*policy.out_links, *policy.self_links)
    }
    # Plain tuples, and lookups once per end: a large mesh has some 100,000 ends.
    services = {id_: task.service for id_, task in tasks.items()}
    for one, other in ends:
        here, there = services[one], services[other]
        if here == there:
            one, other = min(one, other), max(one, other)
        found = seen.get((here, there))
        if found is not None:
            found.add((one, other))
        found = seen.get((there, here)) if here != there else None
        if found is not None:
            found.add((other, one))
    return seen


def _is_failing(picture: Picture, task: TaskId, end: PeerReport) -> bool:
    """Whether this end sends handshakes that nobody answers."""
    if end.last_handshake is None:
        return end.sent_bytes > INITIATION_BYTES
    silence = picture.silences.get((task, end.public_key))
    return (
        silence is not None
        and silence.last_handshake == end.last_handshake
        and end.sent_bytes - silence.sent_bytes > INITIATION_BYTES
    )


def _is_silent(picture: Picture, task: TaskId) -> bool:
    """Whether the task has an interface of which its agent says nothing."""
    return picture.tasks[task].state is TaskState.CONFIGURED and task not in picture.interfaces


def _pair(picture: Picture, one: TaskId, other: TaskId) -> _Pair:
    here, there = picture.ends.get((one, other)), picture.ends.get((other, one))
    times = [end.last_handshake for end in (here, there) if end and end.last_handshake is not None]
    handshake = max(times, default=None)
    received = here.received_bytes if here else there.sent_bytes if there else None
    sent = here.sent_bytes if here else there.received_bytes if there else None

    def lacks(task: TaskId, end: PeerReport | None) -> bool:
        return end is None and not _is_silent(picture, task)

    if lacks(one, here) or lacks(other, there):
        at = LinkState.PENDING
    elif handshake is not None and picture.now - handshake < SESSION_S:
        at = LinkState.SECURE
    elif (here and _is_failing(picture, one, here)) or (there and _is_failing(picture, other, there)):
        at = LinkState.STALE
    elif here and there:
        at = LinkState.IDLE
    else:
        at = LinkState.UNKNOWN
    return _Pair(at, handshake, received, sent)


def _partners(picture: Picture, service: ServiceId) -> list[TaskId]:
    """The tasks of a service that links lead to: those in quarantine are shut out of them."""
    tasks = picture.by_service.get(service, ())
    return [task for task in tasks if picture.tasks[task].state is not TaskState.QUARANTINED]


def _all_pairs(picture: Picture, key: _LinkKey) -> Iterator[tuple[TaskId, TaskId]]:
    ours, theirs = _partners(picture, key.source), _partners(picture, key.destination)
    for one in ours:
        for other in theirs:
            if key.source != key.destination or one < other:
                yield one, other


def _count_pairs(key: _LinkKey, ours: int, theirs: int) -> int:
    return ours * (ours - 1) // 2 if key.source == key.destination else ours * theirs


# -- links -----------------------------------------------------------------------------------------------------------


def _links(picture: Picture) -> list[LinkView]:
    shown = []
    for policy in picture.state.policies.values():
        declared: dict[ServiceId, list[Link]] = defaultdict(list)
        for link in policy.out_links:
            declared[link.service].append(link)
        for destination, parts in declared.items():
            shown.append(_link(picture, policy, destination, parts))
        several = len(picture.by_service.get(policy.service, ())) > 1
        if policy.self_links and several:
            shown.append(_link(picture, policy, policy.service, policy.self_links))
    shown += [_pending_link(it.source, it.destination, it.ports, it.reason) for it in picture.state.pending]
    return sorted(shown, key=link_key)


def _pending_link(source: str, destination: str, ports: str, reason: str) -> LinkView:
    return LinkView(
        source=source,
        destination=destination,
        ports=ports.replace(",", " ").split(),
        state=LinkState.PENDING,
        reason=reason,
        is_internal=False,
        networks=[],
        pairs_expected=0,
        pairs_configured=0,
        pairs_secure=0,
        pairs_stale=0,
        pairs_unknown=0,
        last_handshake=None,
        handshake_age_seconds=None,
        received_bytes=None,
        sent_bytes=None,
    )


def _link(picture: Picture, policy: PolicyRecord, destination: ServiceId, parts: Sequence[Link]) -> LinkView:
    key = _LinkKey(policy.service, destination)
    ours, theirs = _partners(picture, key.source), _partners(picture, key.destination)
    partners = {*ours, *theirs}
    pairs = {ids: _pair(picture, *ids) for ids in picture.seen.get(key, ()) if partners.issuperset(ids)}
    states = [pair.state for pair in pairs.values()]
    expected = _count_pairs(key, len(ours), len(theirs))
    silent = (sum(_is_silent(picture, task) for task in tasks) for tasks in (ours, theirs))
    # Pairs that neither end tells of: unknown where both are silent, else an end is known to lack the other.
    unknown = states.count(LinkState.UNKNOWN) + _count_pairs(key, *silent)
    secure, stale = states.count(LinkState.SECURE), states.count(LinkState.STALE)
    configured = secure + stale + states.count(LinkState.IDLE)
    missing = expected - configured - unknown
    stale_pairs = [ids for ids, pair in pairs.items() if pair.state is LinkState.STALE]
    at, reason = LinkState.IDLE, ""
    if not expected:
        absent = key.source if not ours else destination
        why = "is quarantined" if picture.by_service.get(absent) else "is in the mesh"
        who = picture.names.get(absent, absent)
        at, reason = LinkState.PENDING, f"{who} {why}" if picture.by_service.get(absent) else f"no task of {who} {why}"
    elif stale:
        at, reason = LinkState.STALE, f"no answer: {_node_pairs(picture, stale_pairs)}"
    elif missing:
        at = LinkState.SECURE if secure else LinkState.PENDING
        reason = f"{configured} of {expected} pairs of tasks are configured"
    elif secure:
        at = LinkState.SECURE
    elif unknown:
        at, reason = LinkState.UNKNOWN, f"no answer from the agent on {_silent_nodes(picture, (*ours, *theirs))}"
    handshake = max((pair.last_handshake for pair in pairs.values() if pair.last_handshake is not None), default=None)
    return LinkView(
        source=policy.name,
        destination=picture.names.get(destination, parts[0].name),
        ports=[str(port) for port in sorted({port for part in parts for port in part.ports}, key=_port_key)],
        state=at,
        reason=reason,
        is_internal=policy.service == destination,
        networks=sorted({_network_name(picture, policy, part.network) for part in parts}),
        pairs_expected=expected,
        pairs_configured=configured,
        pairs_secure=secure,
        pairs_stale=stale,
        pairs_unknown=unknown,
        last_handshake=_time(handshake),
        handshake_age_seconds=_age(picture, handshake),
        received_bytes=_sum(pair.received for pair in pairs.values()),
        sent_bytes=_sum(pair.sent for pair in pairs.values()),
    )


def _pair_view(picture: Picture, one: TaskId, other: TaskId) -> PairView:
    pair = _pair(picture, one, other)
    source, destination = picture.tasks[one], picture.tasks[other]
    return PairView(
        source_task=source.name,
        source_node=_hostname(picture, source.node),
        destination_task=destination.name,
        destination_node=_hostname(picture, destination.node),
        state=pair.state,
        last_handshake=_time(pair.last_handshake),
        handshake_age_seconds=_age(picture, pair.last_handshake),
        received_bytes=pair.received,
        sent_bytes=pair.sent,
    )


def _port_key(port: PortRange) -> tuple[int, int, str]:
    return (port.first, port.last, port.protocol.value)


def _network_name(picture: Picture, policy: PolicyRecord, network: NetworkId) -> str:
    known = picture.state.swarm.networks.get(network)
    if known is not None:
        return known.name
    return next((it.name for it in policy.networks if it.id == network), network)


def _node_pairs(picture: Picture, pairs: Iterable[tuple[TaskId, TaskId]]) -> str:
    hosts = ((_hostname(picture, picture.tasks[task].node) for task in pair) for pair in pairs)
    return _some(sorted({" <-> ".join(sorted(pair)) for pair in hosts}))


def _silent_nodes(picture: Picture, tasks: Iterable[TaskId]) -> str:
    return _some(sorted({_hostname(picture, picture.tasks[it].node) for it in tasks if _is_silent(picture, it)}))


# -- services, nodes, tasks, findings --------------------------------------------------------------------------------


def _service(picture: Picture, service: Service) -> ServiceView:
    policy = picture.state.policies.get(service.id)
    tasks = [picture.tasks[task] for task in picture.by_service.get(service.id, ())]
    return ServiceView(
        id=service.id,
        name=service.name,
        stack=service.stack,
        is_meshed=service.id in _meshed(picture.state),
        mode=policy.mode if policy else None,
        tasks_configured=_configured(tasks),
        tasks_expected=len(tasks),
        links_in=sum(link.destination == service.name and not link.is_internal for link in picture.links),
        links_out=sum(link.source == service.name and not link.is_internal for link in picture.links),
        findings=sum(it.subject == service.name for it in picture.findings),
        quarantine=_shut_out(picture, QuarantineKind.SERVICE, service.id, tasks),
    )


def _node(picture: Picture, node: Node) -> NodeView:
    record = picture.state.nodes.get(node.id)
    tasks = [picture.tasks[task] for task in picture.by_node.get(node.id, ())]
    told = [task.id in picture.interfaces for task in tasks if task.state is TaskState.CONFIGURED]
    return NodeView(
        id=node.id,
        hostname=node.hostname,
        role="manager" if node.is_manager else "worker",
        os=node.os,
        is_ready=node.is_ready,
        engine_version=node.engine_version,
        agent=AgentState.UP if record else AgentState.MISSING,
        agent_answers=any(told) if told else None,
        agent_version=record.agent_version if record else None,
        backend=record.backend if record else None,
        underlay_address=str(record.underlay_address) if record else None,
        underlay_mtu=record.underlay_mtu if record else None,
        tasks_configured=_configured(tasks),
        tasks_expected=len(tasks),
        quarantine=_shut_out(picture, QuarantineKind.NODE, node.id, ()),
    )


def _shut_out(picture: Picture, kind: QuarantineKind, id_: str, tasks: Iterable[_Task]) -> str | None:
    records = [it for it in picture.state.quarantines if (it.kind, it.id) == (kind, id_)]
    if records:
        return quarantine.words(records[0])
    shut = [task for task in tasks if task.state is TaskState.QUARANTINED]
    return f"{', '.join(task.name for task in shut)} {shut[0].detail}" if shut else None


def _task_view(picture: Picture, task: _Task) -> TaskView:
    status, peer = picture.state.statuses.get(task.id), picture.state.peers.get(task.id)
    interface = picture.interfaces.get(task.id)
    return TaskView(
        id=task.id,
        name=task.name,
        service=picture.names.get(task.service, task.service),
        node=_hostname(picture, task.node),
        state=task.state,
        detail=task.detail,
        serving=peer is not None and peer.serving,
        interface=status.interface if status else "",
        mtu=status.mtu if status else 0,
        peers=len(interface.peers) if interface else 0,
    )


def _sorted_tasks(picture: Picture) -> list[_Task]:
    return sorted(picture.tasks.values(), key=lambda task: (task.name, task.id))


def _configured(tasks: Iterable[_Task]) -> int:
    return sum(task.state is TaskState.CONFIGURED for task in tasks)


def _meshed(state: MeshState) -> frozenset[ServiceId]:
    return frozenset(id_ for id_, policy in state.policies.items() if policy.mode is not Mode.OFF)


def _unverified(key: str, reason: str) -> Finding:
    return finding(
        "HW320",
        key,
        f"the record {key} has no effect: {reason}",
        "find out who wrote it: only this Swarm's nodes may, each below its own id, and managers the rest",
    )


def _doubted(node: NodeRecord, doubt: Doubt) -> Finding:
    return finding(
        "HW321",
        node.hostname,
        f"the agent on {node.hostname} does not believe the record {doubt.key}: {doubt.reason}",
        "what it believed last stays in force there; set the clocks of both nodes, else see who wrote the record",
    )


def _findings(state: MeshState) -> list[FindingView]:
    found = frozenset(state.findings).union(*(policy.findings for policy in state.policies.values()))
    found |= frozenset(quarantine.findings(state))
    found |= frozenset(_unverified(key, reason) for key, reason in state.unverified.items())
    found |= frozenset(
        _doubted(it, d) for it in state.nodes.values() for d in it.doubts if d.key not in state.unverified
    )
    shown = (
        FindingView(
            code=it.code, severity=it.severity, subject=it.subject, message=it.message, remedy=it.remedy, label=it.label
        )
        for it in found
    )
    return sorted(shown, key=finding_key)


def _hostname(picture: Picture, node: NodeId) -> str:
    known = picture.state.swarm.nodes.get(node)
    return known.hostname if known else node


def _find(items: Iterable[T], names: Callable[[T], tuple[str, str]], wanted: str) -> T | None:
    """By name first: a name that looks like another thing's id is still a name."""
    items = list(items)
    for position in (0, 1):
        for item in items:
            if names(item)[position] == wanted:
                return item
    return None


# -- checks ----------------------------------------------------------------------------------------------------------


def _check(
    description: str, errors: Iterable[str] = (), hint: str = "", code: str = "", *, at: Result = Result.ERROR
) -> Check:
    """A check that is fine when there is nothing to say."""
    text = "\n".join(errors)
    if not text:
        return Check(description=description, result=Result.SUCCESS, error="", hint="", code="")
    return Check(description=description, result=at, error=text, hint=hint, code=code)


# Components by name: category and what the check says. The leader has a check of its own.
_COMPONENTS: Final = {
    "swarm": ("swarm", "the controller can read the Swarm"),
    "store": ("store", "the controller can read the store"),
    "leader": ("", ""),
}


def _component_checks(picture: Picture, category: str) -> Iterator[Check]:
    for it in picture.state.components:
        belongs, words = _COMPONENTS.get(it.name, ("controller", it.name))
        if belongs == category:
            errors = () if it.is_ok else (it.detail or "it does not work",)
            yield _check(words, errors, "the log of the controller says more: docker service logs")


def _swarm_checks(picture: Picture) -> Iterator[Check]:
    every = picture.state.swarm.nodes.values()
    down = sorted(node.hostname for node in every if not node.is_ready)
    managers = sum(node.is_manager for node in every)
    yield _check(
        f"{len(every) - len(down)}/{len(every)} nodes ready, {_plural(managers, 'manager')}",
        (f"not ready: {_some(down)}",) if down else (),
        "look at: docker node ls",
        at=Result.WARNING,
    )


def _node_checks(picture: Picture, version: str) -> Iterator[Check]:
    ready = [node for node in nodes(picture) if node.is_ready]
    up = [node for node in ready if node.agent is AgentState.UP]
    missing = [node for node in ready if node.agent is AgentState.MISSING]
    is_needed = any(node.tasks_expected for node in missing)
    yield _check(
        f"agent running on {len(up)}/{len(ready)} nodes",
        (f"none on {_some([node.hostname for node in missing])}",) if missing else (),
        "look at the tasks of the agent's service: docker service ps",
        "HW402",
        at=Result.ERROR if is_needed else Result.WARNING,
    )
    others = [f"{node.hostname} has {node.agent_version}" for node in up if node.agent_version != version]
    if up:
        yield _check(
            f"agents have the controller's version ({version})",
            (_some(others),) if others else (),
            "wait for the update of the agent's service, or run it again",
            at=Result.WARNING,
        )
        slow = [node.hostname for node in up if node.backend != "kernel"]
        yield _check(
            f"kernel WireGuard on {len(up) - len(slow)}/{len(up)} nodes",
            (f"{_some(slow)}: userspace WireGuard, which works but is slower",) if slow else (),
            "load the module: modprobe wireguard",
            "HW401",
            at=Result.WARNING,
        )
        mute = [node.hostname for node in up if node.agent_answers is False]
        yield _check(
            "agents answer the controller",
            (f"no answer from {_some(mute)}: the state of their links is unknown",) if mute else (),
            "let the managers reach the agents' port",
            at=Result.WARNING,
        )
    shut = {task.id for task in picture.tasks.values() if task.state is TaskState.QUARANTINED}
    wrong = [it for it in picture.state.refused if it.task not in shut]
    refused = [f"{_hostname(picture, it.node)}, task {it.task}: {it.reason}" for it in wrong]
    if refused:
        yield _check("claims of agents are admitted", sorted(refused)[:_MANY], "look at: hivewire node inspect")
    yield from _task_checks(picture)


def _task_checks(picture: Picture) -> Iterator[Check]:
    every = _sorted_tasks(picture)
    failed = [
        f"{it.name} on {_hostname(picture, it.node)}: {it.detail}" for it in every if it.state is TaskState.FAILED
    ]
    waiting = [f"{it.name}: {it.detail}" for it in every if it.state is TaskState.WAITING]
    yield _check(
        f"{_configured(every)}/{len(every)} tasks configured",
        (failed or waiting)[:_MANY],
        "read the log of the agent on that node",
        at=Result.ERROR if failed else Result.WARNING,
    )


def _leader_checks(picture: Picture) -> Iterator[Check]:
    leader = picture.state.leader
    yield _check(
        f"{leader} leads" if leader else "a controller leads",
        () if leader else ("nobody leads: changes are not applied, what is applied stays",),
        "look at the tasks of the controller's service: docker service ps",
    )


def _label_checks(picture: Picture) -> Iterator[Check]:
    shown = picture.findings
    errors = [each for each in shown if each.severity is Severity.ERROR]
    declared = sum(not link.is_internal for link in picture.links)
    enrolled = _plural(len(_meshed(picture.state)), "service")
    if not errors:
        yield _check(f"{enrolled} enrolled, {_plural(declared, 'link')}, no errors")
    for each in shown:
        if each.severity is not Severity.INFO:
            at = Result.ERROR if each.severity is Severity.ERROR else Result.WARNING
            yield _check(each.subject, (each.message,), each.remedy, each.code, at=at)


def _link_checks(picture: Picture) -> Iterator[Check]:
    for link in picture.links:
        name = f"{link.source} -> {link.destination}"
        if link.state is LinkState.STALE:
            hint = "a firewall between these nodes may drop the UDP ports of the agents"
            yield _check(name, (link.reason,), hint, "HW403")
        elif link.reason and link.pairs_expected:
            yield _check(name, (link.reason,), "look at: hivewire link inspect", at=Result.WARNING)
    states = [link.state for link in picture.links if not link.is_internal]
    counts = [f"{states.count(state)} {state.value}" for state in LinkState if state in states]
    if LinkState.STALE not in states:
        yield _check(f"{_plural(len(states), 'link')}" + (f": {', '.join(counts)}" if counts else ""))


def _waiting_for(picture: Picture) -> Iterator[str]:
    """What must still happen until every task that runs is configured and every link that could work does."""
    for task in _sorted_tasks(picture):
        if task.state not in (TaskState.CONFIGURED, TaskState.QUARANTINED):
            yield f"task {task.name}: {task.detail or task.state.value}"
    for link in picture.links:
        if link.pairs_expected and not link.pairs_configured:
            yield f"link {link.source} -> {link.destination}: {link.reason or link.state.value}"


# -- words and numbers -----------------------------------------------------------------------------------------------


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _MANY
    return ", ".join(names[:_MANY]) + (f" and {rest} more" if rest > 0 else "")


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def _age(picture: Picture, seconds: float | None) -> float | None:
    return None if seconds is None else round(max(0.0, picture.now - seconds), 3)


def _sum(numbers: Iterable[int | None]) -> int | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if known else None
