"""Services, tasks and nodes by the names that people use for them. Pure."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address

from controller.state import MeshState
from controller.swarm.snapshot import Service
from hivewire.errors import InvalidInput
from hivewire.ids import NodeId, ServiceId, TaskId


@dataclass(frozen=True, slots=True)
class NamedTask:
    id: TaskId
    name: str
    service: ServiceId
    node: NodeId


@dataclass(frozen=True, slots=True)
class End:
    """One end of a connection: a service, or one of its tasks."""

    service: Service
    task: NamedTask | None = None

    @property
    def name(self) -> str:
        return self.task.name if self.task else self.service.name


def tasks(state: MeshState) -> list[NamedTask]:
    """Every task that Swarm wants to run or that an agent has announced, by name."""
    names = {id_: service.name for id_, service in state.swarm.services.items()}
    found: dict[TaskId, NamedTask] = {}
    for claim in state.claims.values():
        name = f"{names.get(claim.service, claim.service)}.{claim.task}"
        found[claim.task] = NamedTask(claim.task, name, claim.service, claim.node)
    for task in state.tasks.values():
        if task.is_wanted or task.id in found or task.id in state.peers:
            found[task.id] = NamedTask(task.id, task.name, task.service, task.node)
    for peer in state.peers.values():
        found.setdefault(peer.task, NamedTask(peer.task, peer.task_name, peer.service, peer.node))
    return sorted(found.values(), key=lambda task: (task.name, task.id))


def find_service(state: MeshState, text: str, stack: str = "") -> Service:
    """By full name, ``STACK/NAME``, its name within ``stack``, or its id. Raises InvalidInput."""
    services = state.swarm.services
    found = _service(state, text, stack)
    if found is None:
        raise InvalidInput(f'no service "{text}"{_meant(text, (s.name for s in services.values()))}')
    return found


def find_task(state: MeshState, text: str, stack: str = "") -> NamedTask:
    """By name (``shop_web.1``, also with the task's id behind it), or by id. Raises InvalidInput."""
    known = tasks(state)
    found = _task(known, text, stack)
    if found is None:
        raise InvalidInput(f'no task "{text}"{_meant(text, (t.name for t in known))}')
    return found


def find_node(state: MeshState, text: str) -> tuple[NodeId, str]:
    """By host name or id: its id and host name. Raises InvalidInput."""
    for node in sorted(state.swarm.nodes.values(), key=lambda node: (node.hostname != text, node.id)):
        if text in (node.hostname, node.id):
            return node.id, node.hostname
    raise InvalidInput(f'no node "{text}"{_meant(text, (n.hostname for n in state.swarm.nodes.values()))}')


def find_end(state: MeshState, text: str, stack: str = "") -> End:
    """A service, a task or an overlay address. Raises InvalidInput."""
    try:
        address = IPv4Address(text)
    except AddressValueError:
        pass
    else:
        return _at(state, address)
    service = _service(state, text, stack)
    if service is not None:
        return End(service)
    known = tasks(state)
    task = _task(known, text, stack)
    if task is not None and task.service in state.swarm.services:
        return End(state.swarm.services[task.service], task)
    close = _meant(text, (*(s.name for s in state.swarm.services.values()), *(t.name for t in known)))
    raise InvalidInput(f'no service or task "{text}"{close}')


def _service(state: MeshState, text: str, stack: str) -> Service | None:
    by_name = {service.name: service for service in state.swarm.services.values()}
    in_stack = by_name.get(f"{stack}_{text}") if stack else None
    return in_stack or by_name.get(text) or by_name.get(text.replace("/", "_", 1)) or _by_id(state, text)


def _by_id(state: MeshState, text: str) -> Service | None:
    return state.swarm.services.get(ServiceId(text))


def _task(known: Iterable[NamedTask], text: str, stack: str) -> NamedTask | None:
    for wanted in (f"{stack}_{text}", text) if stack else (text,):
        for task in known:
            if wanted in (task.name, task.id, f"{task.name}.{task.id}"):
                return task
    return None


def _at(state: MeshState, address: IPv4Address) -> End:
    for task in tasks(state):
        peer, seen = state.peers.get(task.id), state.tasks.get(task.id)
        addresses = {*(peer.addresses.values() if peer else ()), *(seen.addresses.values() if seen else ())}
        if address in addresses and task.service in state.swarm.services:
            return End(state.swarm.services[task.service], task)
    for service in state.swarm.services.values():
        if address in service.vips.values():
            return End(service)
    raise InvalidInput(f"no task or service has the overlay address {address}")


def _meant(text: str, names: Iterable[str]) -> str:
    """A name that was perhaps meant, also where the stack was left out."""
    known = sorted(set(names))
    endings = [name for name in known if name.partition("_")[2] == text]
    close = endings[:1] or difflib.get_close_matches(text, known, n=1, cutoff=0.6)
    return f', did you mean "{close[0]}"?' if close else ""
