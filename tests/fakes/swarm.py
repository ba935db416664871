"""A Swarm in memory, with Swarm's own rules, and levers to move it.

What it models: VIPs and task addresses come from one pool per network; a task walks through the states of its life
one ``step`` at a time; a change of a service's labels replaces no task, a change of its task template replaces all;
scaling makes and retires tasks; services, nodes and networks send events, tasks never do; ``host`` is no network of
lists. What it does not: placement constraints, update order, the history limit.
"""

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from controller.swarm.api import LIVE, EventKind, SwarmEvent
from controller.swarm.snapshot import (
    STACK_LABEL,
    TASK_STATES,
    Manager,
    Network,
    Node,
    Service,
    SwarmInfo,
    SwarmSnapshot,
    Task,
)
from hivewire.errors import Gone, SwarmUnavailable, TaskGone
from hivewire.ids import ContainerId, NetworkId, NodeId, ServiceId, TaskId

# "allocated" is no longer used by swarmkit; a task goes from new to pending.
_WAY_UP: Final = tuple(s for s in TASK_STATES[: TASK_STATES.index("complete")] if s != "allocated")


@dataclass
class _Pool:
    """Addresses of a network, given out in turn; a freed one comes back last."""

    subnet: IPv4Network
    used: set[IPv4Address] = field(default_factory=set)
    last: int = 1

    def take(self) -> IPv4Address:
        size = self.subnet.num_addresses
        for _ in range(size):
            self.last = self.last + 1 if self.last + 2 < size else 2
            address = self.subnet[self.last]
            if address not in self.used:
                self.used.add(address)
                return address
        raise AssertionError(f"{self.subnet} has no address left")


@dataclass
class _Service:
    value: Service
    replicas: int | None
    """None: global."""
    networks: tuple[NetworkId, ...]
    """Ingress included, which tasks have an address on as well."""
    is_dnsrr: bool


@dataclass
class _Task:
    value: Task
    slot: int


class FakeSwarm:
    """``Swarm`` in memory. Safe to use from several threads.

    ``quiet_s`` is how long ``events`` waits for the next event before it ends.
    """

    def __init__(self, *, cluster: str = "cluster-1", quiet_s: float = 0.0) -> None:
        self.cluster = cluster
        self.quiet_s = quiet_s
        self.is_down = False
        """While true, every question is answered by SwarmUnavailable."""
        self._changed = threading.Condition()
        self._count = 0
        self._nodes: dict[NodeId, Node] = {}
        self._networks: dict[NetworkId, Network] = {}
        self._pools: dict[NetworkId, _Pool] = {}
        self._services: dict[ServiceId, _Service] = {}
        self._tasks: dict[TaskId, _Task] = {}
        self._streams: list[deque[SwarmEvent | None]] = []
        self._turn = 0
        self.add_node("n1", is_manager=True)
        self._ingress = self.add_network("ingress", is_ingress=True)

    # What the controller asks.

    def snapshot(self) -> SwarmSnapshot:
        with self._asked():
            return SwarmSnapshot(
                cluster=self.cluster,
                services={i: s.value for i, s in self._services.items()},
                networks=dict(self._networks),
                nodes=dict(self._nodes),
            )

    def service(self, service: ServiceId) -> Service:
        with self._asked():
            if service not in self._services:
                raise Gone(f"service {service} no longer exists")
            return self._services[service].value

    def task(self, task: TaskId) -> Task:
        with self._asked():
            if task not in self._tasks:
                raise TaskGone(f"task {task} no longer exists")
            return self._tasks[task].value

    def tasks(self, service: ServiceId | None = None, desired: frozenset[str] = LIVE) -> tuple[Task, ...]:
        with self._asked():
            found = [t.value for t in self._tasks.values() if service in (None, t.value.service)]
            return tuple(sorted((t for t in found if not desired or t.desired_state in desired), key=lambda t: t.id))

    def info(self) -> SwarmInfo:
        with self._asked():
            me = next(n for n in self._nodes.values() if n.is_manager)
            managers = sorted((n for n in self._nodes.values() if n.is_manager), key=lambda n: n.id)
            return SwarmInfo(
                cluster=self.cluster,
                node=me.id,
                hostname=me.hostname,
                address=me.address,
                is_manager=True,
                managers=tuple(Manager(n.id, f"{n.address}:2377") for n in managers),
                engine_version=me.engine_version,
            )

    def events(self) -> Iterator[SwarmEvent]:
        stream: deque[SwarmEvent | None] = deque()
        with self._asked():
            self._streams.append(stream)
        try:
            yield SwarmEvent(EventKind.SUBSCRIBED)
            while True:
                with self._changed:
                    if not self._changed.wait_for(lambda: bool(stream), self.quiet_s):
                        return
                    event = stream.popleft()
                if event is None:
                    raise SwarmUnavailable("the stream of events broke")
                yield event
        finally:
            with self._changed:
                self._streams = [other for other in self._streams if other is not stream]

    # Levers.

    def add_node(
        self, hostname: str, *, is_manager: bool = False, os: str = "linux", address: str | None = None
    ) -> NodeId:
        with self._changed:
            node = NodeId(self._new_id("node"))
            self._nodes[node] = Node(
                id=node,
                hostname=hostname,
                address=address or f"10.77.0.{len(self._nodes) + 1}",
                is_manager=is_manager,
                os=os,
                engine_version="20.10.24",
            )
            self._tell(EventKind.NODE, "create", node, hostname)
            self._fill_globals()
            return node

    def set_ready(self, node: NodeId, is_ready: bool) -> None:
        """A node goes away or comes back. Its tasks are replaced elsewhere; their last known state stays."""
        with self._changed:
            self._nodes[node] = replace(self._nodes[node], is_ready=is_ready)
            self._tell(EventKind.NODE, "update", node, self._nodes[node].hostname)
            if not is_ready:
                for task in [t for t in self._tasks.values() if t.value.node == node and t.value.is_wanted]:
                    self._retire(task, "shutdown")
                    self._replace(task)
            self._fill_globals()

    def remove_node(self, node: NodeId) -> None:
        with self._changed:
            self.set_ready(node, False)
            for task in [t for t in self._tasks.values() if t.value.node == node]:
                task.value = replace(task.value, state="orphaned")
            gone = self._nodes.pop(node)
            self._tell(EventKind.NODE, "remove", node, gone.hostname)

    def add_network(
        self,
        name: str,
        subnet: str | None = None,
        *,
        is_ingress: bool = False,
        is_encrypted: bool = False,
        is_dsr: bool = False,
        labels: Mapping[str, str] | None = None,
    ) -> NetworkId:
        with self._changed:
            network = NetworkId(self._new_id("net"))
            pool = _Pool(IPv4Network(subnet or f"10.0.{len(self._networks)}.0/24"))
            self._pools[network] = pool
            self._networks[network] = Network(
                id=network,
                name=name,
                subnets=(pool.subnet,),
                labels=dict(labels or {}),
                is_ingress=is_ingress,
                is_encrypted=is_encrypted,
                is_dsr=is_dsr,
            )
            self._tell(EventKind.NETWORK, "create", network, name)
            return network

    def remove_network(self, network: NetworkId) -> None:
        with self._changed:
            users = [s.value.name for s in self._services.values() if network in s.networks]
            assert not users, f"network {network} is in use by {users}"
            gone = self._networks.pop(network)
            del self._pools[network]
            self._tell(EventKind.NETWORK, "remove", network, gone.name)

    def add_service(
        self,
        name: str,
        labels: Mapping[str, str] | None = None,
        *,
        stack: str = "",
        networks: Iterable[NetworkId] = (),
        replicas: int | None = 1,
        container_labels: Mapping[str, str] | None = None,
        is_dnsrr: bool = False,
        host_network: bool = False,
        publishes_ingress: bool = False,
        can_change_network: bool = False,
    ) -> ServiceId:
        """``replicas=None`` makes a global service."""
        with self._changed:
            assert name not in [s.value.name for s in self._services.values()], f"name conflict: {name}"
            service = ServiceId(self._new_id("svc"))
            own = tuple(sorted(networks))
            value = Service(
                id=service,
                name=name,
                stack=stack,
                labels=dict(labels or {}) | ({STACK_LABEL: stack} if stack else {}),
                container_labels=dict(container_labels or {}),
                networks=own,
                vips={} if is_dnsrr else {n: self._pools[n].take() for n in own},
                host_network=host_network,
                publishes_ingress=publishes_ingress,
                can_change_network=can_change_network,
            )
            attached = (*own, self._ingress) if publishes_ingress else own
            self._services[service] = _Service(value, replicas, attached, is_dnsrr)
            self._tell(EventKind.SERVICE, "create", service, name)
            self._fill(self._services[service])
            return service

    def set_labels(self, service: ServiceId, labels: Mapping[str, str]) -> None:
        """Replace the service's labels, except the one of its stack. No task is replaced."""
        with self._changed:
            known = self._services[service]
            stack = {STACK_LABEL: known.value.stack} if known.value.stack else {}
            self._update(known, replace(known.value, labels=dict(labels) | stack))

    def set_container_labels(self, service: ServiceId, labels: Mapping[str, str]) -> None:
        """Change the task template: every task is replaced."""
        with self._changed:
            known = self._services[service]
            self._update(known, replace(known.value, container_labels=dict(labels)))
            self._roll(known)

    def set_networks(self, service: ServiceId, networks: Iterable[NetworkId]) -> None:
        """Attach the service to exactly these networks: VIPs come and go, every task is replaced."""
        with self._changed:
            known = self._services[service]
            own = tuple(sorted(networks))
            vips = dict(known.value.vips)
            for network in set(vips) - set(own):
                self._pools[network].used.discard(vips.pop(network))
            if not known.is_dnsrr:
                vips |= {n: self._pools[n].take() for n in own if n not in vips}
            known.networks = (*own, *(n for n in known.networks if n == self._ingress))
            self._update(known, replace(known.value, networks=own, vips=dict(sorted(vips.items()))))
            self._roll(known)

    def scale(self, service: ServiceId, replicas: int) -> None:
        with self._changed:
            known = self._services[service]
            assert known.replicas is not None, "a global service cannot be scaled"
            known.replicas = replicas
            self._tell(EventKind.SERVICE, "update", service, known.value.name)
            self._fill(known)

    def remove_service(self, service: ServiceId) -> None:
        with self._changed:
            known = self._services.pop(service)
            for network, vip in known.value.vips.items():
                self._pools[network].used.discard(vip)
            for task in self._of(service):
                self._retire(task, "remove")
            self._tell(EventKind.SERVICE, "remove", service, known.value.name)

    def fail_task(self, task: TaskId) -> None:
        """The task ends with an error; Swarm makes another one in its slot. No event tells of it."""
        with self._changed:
            known = self._tasks[task]
            self._finish(known, "failed")
            self._retire(known, "shutdown")
            self._replace(known)

    def step(self) -> bool:
        """Let every task take one step towards what is desired of it. Whether any did."""
        with self._changed:
            moved = [self._advance(task) for task in list(self._tasks.values())]
            return any(moved)

    def settle(self) -> None:
        """Step until every task is where it should be."""
        while self.step():
            pass

    def break_events(self) -> None:
        """Every open stream of events breaks."""
        with self._changed:
            for stream in self._streams:
                stream.append(None)
            self._changed.notify_all()

    # How Swarm moves.

    def _advance(self, known: _Task) -> bool:
        task = known.value
        if task.desired_state in LIVE:
            if task.is_finished or task.state == "running" or (task.state, task.desired_state) == ("ready", "ready"):
                return False
            return self._climb(known)
        if not task.is_finished:
            node = self._nodes.get(task.node)
            if node is not None and not node.is_ready:
                return False  # nobody reports from there
            self._finish(known, "shutdown")
            return True
        if task.desired_state == "remove":
            del self._tasks[task.id]
            return True
        return False

    def _climb(self, known: _Task) -> bool:
        task = known.value
        state = _WAY_UP[_WAY_UP.index(task.state) + 1]
        if state == "pending":
            networks = self._services[task.service].networks
            addresses = {n: self._pools[n].take() for n in networks}
            task = replace(task, addresses={n: a for n, a in addresses.items() if n != self._ingress})
        elif state == "assigned" and not task.node:
            ready = [n for n in sorted(self._nodes) if self._nodes[n].is_ready]
            if not ready:
                return False
            self._turn += 1
            task = replace(task, node=ready[self._turn % len(ready)])
        elif state == "starting":
            task = replace(task, container=ContainerId(f"container-{task.id}"))
        known.value = replace(task, state=state)
        return True

    def _finish(self, known: _Task, state: str) -> None:
        known.value = replace(known.value, state=state)
        for network, address in known.value.addresses.items():
            if network in self._pools:
                self._pools[network].used.discard(address)

    def _retire(self, known: _Task, desired: str) -> None:
        if known.value.desired_state != "remove":
            known.value = replace(known.value, desired_state=desired)

    def _replace(self, known: _Task) -> None:
        service = self._services[known.value.service]
        if service.replicas is not None:
            self._add_task(service, known.slot)

    def _roll(self, service: _Service) -> None:
        for task in self._live(service.value.id):
            self._retire(task, "shutdown")
        self._fill(service)

    def _fill(self, service: _Service) -> None:
        """Make the tasks that are missing and retire those that are too many."""
        live = self._live(service.value.id)
        if service.replicas is None:
            there = {task.value.node for task in live}
            for node in sorted(n.id for n in self._nodes.values() if n.is_ready and n.id not in there):
                self._add_task(service, 0, node)
            return
        slots = {task.slot for task in live}
        for task in sorted(live, key=lambda t: t.slot)[service.replicas :]:
            self._retire(task, "remove")
        free = [slot for slot in range(1, service.replicas + 1) if slot not in slots]
        for slot in free[: max(0, service.replicas - len(live))]:
            self._add_task(service, slot)

    def _fill_globals(self) -> None:
        for service in self._services.values():
            if service.replicas is None:
                self._fill(service)

    def _add_task(self, service: _Service, slot: int, node: NodeId | None = None) -> None:
        task = TaskId(self._new_id("task"))
        self._tasks[task] = _Task(
            Task(
                id=task,
                name=f"{service.value.name}.{slot or node}",
                service=service.value.id,
                node=node or NodeId(""),
                state="new",
                desired_state="running",
                container=ContainerId(""),
            ),
            slot,
        )

    def _update(self, known: _Service, value: Service) -> None:
        known.value = value
        self._tell(EventKind.SERVICE, "update", value.id, value.name)

    def _of(self, service: ServiceId) -> list[_Task]:
        return [t for t in self._tasks.values() if t.value.service == service]

    def _live(self, service: ServiceId) -> list[_Task]:
        return [t for t in self._of(service) if t.value.desired_state in LIVE and not t.value.is_finished]

    def _tell(self, kind: EventKind, action: str, thing: str, name: str) -> None:
        for stream in self._streams:
            stream.append(SwarmEvent(kind, action, thing, name))
        self._changed.notify_all()

    def _new_id(self, kind: str) -> str:
        self._count += 1
        return f"{kind}-{self._count:04d}"

    def _asked(self) -> threading.Condition:
        if self.is_down:
            raise SwarmUnavailable("the Docker Engine does not answer")
        return self._changed
