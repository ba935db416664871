"""Who is shut out of the mesh by a person's word, and how far that has come. Pure.

A quarantine is a record and nothing else: agents follow the records themselves and close at once, and the controller
admits no task that one of them names. So it holds without a leader, and whatever the agent of the task's node does.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from controller import names
from controller.policy.findings import finding
from controller.state import MeshState
from hivewire.ids import NodeId, ServiceId, TaskId
from hivewire.records import Finding, QuarantineKind, QuarantineRecord
from hivewire.reports import AgentReport, InterfaceReport


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a quarantine is in force, by host names."""

    closed: tuple[str, ...]
    """Nodes on which nothing of it is open any more."""
    open: Mapping[str, str]
    """Nodes on which something still is, and what."""
    unknown: tuple[str, ...]
    """Nodes whose agent does not answer."""

    @property
    def is_closed(self) -> bool:
        return not self.open and not self.unknown


def over(
    quarantines: Iterable[QuarantineRecord], service: ServiceId, task: TaskId, node: NodeId
) -> QuarantineRecord | None:
    """The first of them that shuts this task out."""
    ids = {QuarantineKind.SERVICE: service, QuarantineKind.TASK: task, QuarantineKind.NODE: node}
    return next((it for it in quarantines if ids[it.kind] == it.id and not it.released), None)


def words(record: QuarantineRecord) -> str:
    reason = f": {record.reason}" if record.reason else ""
    return f"quarantined with {record.kind.value} {record.name}{reason}"


def target(state: MeshState, kind: QuarantineKind, text: str, stack: str = "") -> tuple[str, str]:
    """Id and name of what a person calls so. Raises InvalidInput."""
    match kind:
        case QuarantineKind.SERVICE:
            service = names.find_service(state, text, stack)
            return service.id, service.name
        case QuarantineKind.TASK:
            task = names.find_task(state, text, stack)
            return task.id, task.name
        case QuarantineKind.NODE:
            return names.find_node(state, text)


def standing(state: MeshState, kind: QuarantineKind, text: str, stack: str = "") -> QuarantineRecord | None:
    """The quarantine that a person calls so; its service, task or node may be gone by now."""
    wanted = (f"{stack}_{text}", text) if stack else (text,)
    found = [it for it in state.quarantines if it.kind is kind and (it.id == text or it.name in wanted)]
    return found[0] if found else None


def findings(state: MeshState) -> tuple[Finding, ...]:
    """One for each quarantine, about the service or node that it concerns."""
    return tuple(_finding(state, record) for record in state.quarantines)


def _finding(state: MeshState, record: QuarantineRecord) -> Finding:
    subject, what = record.name, f"{record.kind.value} {record.name} is quarantined"
    if record.kind is QuarantineKind.TASK:
        found = next((task for task in names.tasks(state) if task.id == record.id), None)
        if found is not None and found.service in state.swarm.services:
            subject = state.swarm.services[found.service].name
    reason = f": {record.reason}" if record.reason else ""
    remedy = f"when it is well again: hivewire release {record.kind.value} {record.name}"
    return finding("HW310", subject, f"{what}{reason}", remedy)


def concerned(state: MeshState, record: QuarantineRecord) -> frozenset[NodeId]:
    """Nodes on which it has to be in force: those of its tasks, and of every task that was linked with them."""
    every = names.tasks(state)
    shut = {task.service for task in every if _is_shut(record, task)}
    linked = {p.service for p in state.policies.values() if not shut.isdisjoint({p.service, *p.linked_services})}
    linked |= shut.union(*(state.policies[it].linked_services for it in shut if it in state.policies))
    return frozenset(task.node for task in every if task.node and (task.service in linked or _is_shut(record, task)))


def progress(state: MeshState, record: QuarantineRecord, reports: Mapping[NodeId, AgentReport]) -> Progress:
    """What the kernels say: nobody has a peer of the quarantine, and its own tasks are closed."""
    shut = [task for task in names.tasks(state) if _is_shut(record, task)]
    keys = {state.claims[task.id].public_key: task.name for task in shut if task.id in state.claims}
    keys |= {state.peers[task.id].public_key: task.name for task in shut if task.id in state.peers}
    interfaces = {i.task: i for report in reports.values() for i in report.interfaces}
    keys |= {interfaces[task.id].public_key: task.name for task in shut if task.id in interfaces}
    closed, still, unknown = [], {}, []
    for node in concerned(state, record):
        known = state.swarm.nodes.get(node)
        hostname = known.hostname if known else str(node)
        report = reports.get(node)
        if report is None:
            unknown.append(hostname)
            continue
        own = [task for task in shut if task.node == node and not _is_closed(state, task.id, interfaces.get(task.id))]
        peers = sorted({keys[p.public_key] for i in report.interfaces for p in i.peers if p.public_key in keys})
        what = [*(f"{task.name} is open" for task in own), *(f"{name} is still a peer" for name in peers)]
        if what:
            still[hostname] = ", ".join(what)
        else:
            closed.append(hostname)
    return Progress(tuple(sorted(closed)), dict(sorted(still.items())), tuple(sorted(unknown)))


def _is_shut(record: QuarantineRecord, task: names.NamedTask) -> bool:
    return over((record,), task.service, task.id, task.node) is not None


def _is_closed(state: MeshState, task: TaskId, interface: InterfaceReport | None) -> bool:
    """The kernel's word; the agent's, where there is no interface that a report could be about."""
    if interface is not None:
        return interface.quarantined
    status = state.statuses.get(task)
    # Without a status its agent has not seen it, or it has no network of its own: it is in no mesh either way.
    return status is None or status.quarantined
