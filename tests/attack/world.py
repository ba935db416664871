"""A whole mesh in one process, with real signatures: a Swarm and kernels in memory, a controller, an agent per node.

What stands between somebody who writes to the store and a kernel is the product's own code, all of it.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import IPv4Address
from pathlib import Path

from agent.book import Book
from agent.kernel.api import Underlay
from agent.node import NodePresence
from agent.reconciler import TaskReconciler
from agent.seen import Seen
from agent.tasks import LocalTask, TaskEvent
from controller.leader import LeaderRecord, Leadership
from controller.reconciler import MeshReconciler, Work
from hivewire.errors import HivewireError, TaskGone
from hivewire.identity import MANAGER, WORKER, IdentitySource
from hivewire.ids import ContainerId, NodeId, ServiceId, TaskId
from hivewire.records import LEADER_KEY, NODES, Mode, NodeRecord
from hivewire.signed import Managers, SwarmSignatures
from hivewire.store.api import NO_LEASE
from hivewire.store.memory import MemoryStore
from hivewire.workqueue import WorkQueue
from tests.fakes.clock import FakeClock
from tests.fakes.kernel import FakeKernel, FakeUnderlay
from tests.fakes.swarm import FakeSwarm
from tests.unit.hivewire.swarm_pki import SwarmCa

TURN_S = 0.5


@dataclass
class Engine:
    """Which tasks have a running container on a node."""

    running: dict[TaskId, LocalTask] = field(default_factory=dict)

    def get(self, task: TaskId) -> LocalTask:
        if task not in self.running:
            raise TaskGone(f"task {task} has no running container")
        return self.running[task]

    def list(self) -> dict[TaskId, ServiceId]:
        return {task: local.service for task, local in self.running.items()}


class Agent:
    """An agent without its threads, and what outlives it on the node: kernel, engine, and what was seen."""

    def __init__(self, world: "World", node: NodeId) -> None:
        self.world, self.node = world, node
        found = world.swarm.snapshot().nodes[node]
        self.address = IPv4Address(found.address)
        self.kernel = FakeKernel(world.underlay, self.address)
        self.engine = Engine()
        self.seen = Seen(now=world.time)
        self.signatures = world.signatures(node, WORKER)
        self.start()

    def start(self) -> None:
        """A new agent, with nothing in its own memory."""
        record = NodeRecord(
            node=self.node, hostname=self.node, agent_version="1", underlay_address=self.address, underlay_mtu=1500,
            backend="kernel", first_port=51820, last_port=52819,
        )  # fmt: skip
        self.book = Book(self.signatures, self.seen)
        self.queue: WorkQueue[TaskId] = WorkQueue(clock=self.world.clock, jitter=lambda: 1.0)
        self.presence = NodePresence(
            self.world.store, self.signatures, record, lambda address: Underlay(address, "eth0", 1500), lambda: None,
            doubts=self.book.doubts,
        )  # fmt: skip
        self.loop = TaskReconciler(
            node=lambda: self.presence.record,
            tasks=self.engine,
            kernel=self.kernel,
            store=self.world.store,
            queue=self.queue,
            signatures=self.signatures,
            book=self.book,
            monotonic=self.world.clock,
            now=self.world.time,
        )
        self.loop.resync()

    def run(self, local: LocalTask) -> None:
        names = {address: f"eth{n}" for n, address in enumerate(local.addresses.values())}
        self.kernel.add_namespace(local.sandbox, names)
        self.engine.running[local.task] = local
        self.loop.on_event(TaskEvent(local.task, "start", stops=False))

    def end(self, task: TaskId) -> None:
        local = self.engine.running.pop(task)
        self.kernel.remove_namespace(local.sandbox)
        self.loop.on_event(TaskEvent(task, "die", stops=True))

    def turn(self) -> None:
        try:
            self.presence.step()
        except HivewireError:
            self.presence = self._present_again()
        self.loop.mirror.step(0.0)
        while (task := self.queue.get(0.0)) is not None:
            try:
                self.loop.reconcile(task)
            except HivewireError:
                self.queue.retry(task)
            else:
                self.queue.done(task)

    def _present_again(self) -> NodePresence:
        return NodePresence(
            self.world.store, self.signatures, self.presence.record, lambda address: Underlay(address, "eth0", 1500),
            lambda: None, doubts=self.book.doubts,
        )  # fmt: skip


class World:
    """A manager, two workers, and a shop: web links to db, one task each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ca = folder, SwarmCa()
        self.identities: dict[tuple[NodeId, str], IdentitySource] = {}
        self.clock = FakeClock()
        self.time = FakeClock(datetime.now(UTC).timestamp())
        self.store = MemoryStore(self.clock)
        self.swarm = FakeSwarm()
        self.underlay = FakeUnderlay(self.time)
        self.manager = next(iter(self.swarm.snapshot().nodes))
        self.network = self.swarm.add_network("shop_app", "10.1.0.0/20")
        self.workers = [self.swarm.add_node(name) for name in ("w1", "w2")]
        self.agents = {node: Agent(self, node) for node in (self.manager, *self.workers)}
        self.start_controller()
        self.db = self.swarm.add_service("shop_db", {"hivewire.ports": "5432"}, stack="shop", networks=[self.network])
        self.web = self.swarm.add_service("shop_web", {"hivewire.links": "db"}, stack="shop", networks=[self.network],
                                          replicas=2)  # fmt: skip
        self.follow_swarm()

    def signatures(self, node: NodeId, role: str) -> SwarmSignatures:
        managers = Managers(lambda: frozenset(m.node for m in self.swarm.info().managers), self.clock)
        if (node, role) not in self.identities:
            self.identities[node, role] = self.ca.source(self.folder / role, node, role)
        source = self.identities[node, role]
        return SwarmSignatures(source, managers, lambda: datetime.fromtimestamp(self.time(), UTC))

    def start_controller(self) -> None:
        """A new controller, which knows nothing yet."""
        self.signing = self.signatures(self.manager, MANAGER)
        self.queue: WorkQueue[Work] = WorkQueue(clock=self.clock, jitter=lambda: 1.0)
        self.controller = MeshReconciler(
            swarm=self.swarm,
            store=self.store,
            leadership=lambda: self.leadership,
            queue=self.queue,
            signatures=self.signing,
            mode=Mode.ENFORCE,
            monotonic=self.clock,
        )
        me = LeaderRecord(node=self.manager, hostname="m1")
        self.leadership = Leadership(self.store, me, self.controller.resync, monotonic=self.clock)
        self.controller.resync()

    def follow_swarm(self) -> None:
        """Engines start and end the containers that Swarm wants; the controller hears of services."""
        self.swarm.settle()
        tasks = {task.id: task for task in self.swarm.tasks() if task.service in (self.db, self.web)}
        for agent in self.agents.values():
            for gone in [t for t in agent.engine.running if t not in tasks]:
                agent.end(gone)
        for task in tasks.values():
            agent = self.agents[task.node]
            if task.id not in agent.engine.running:
                agent.run(
                    LocalTask(
                        task=task.id, name=task.name, service=task.service, container=ContainerId(f"c-{task.id}"),
                        sandbox=f"/netns/{task.id}", addresses={self.network: task.addresses[self.network]},
                        is_healthy=True,
                    )
                )  # fmt: skip
        for service in (self.db, self.web):
            self.controller.on_service(service)

    def settle(self, seconds: float = 3.0) -> None:
        for _ in range(round(seconds / TURN_S)):
            self.clock.advance(TURN_S)
            self.time.advance(TURN_S)
            self.turn()

    def turn(self) -> None:
        with suppress(HivewireError):
            self.leadership.step()
        for _ in range(2):
            self.controller.mirror.step(0.0)
        while (work := self.queue.get(0.0)) is not None:
            try:
                self.controller.reconcile(work)
            except HivewireError:
                self.queue.retry(work)
            else:
                self.queue.done(work)
        for agent in self.agents.values():
            agent.turn()

    def resync(self) -> None:
        self.controller.resync()
        for agent in self.agents.values():
            agent.loop.resync()

    # What there is.

    def stored(self) -> dict[str, bytes]:
        return {item.key: item.value for item in self.store.list("/").items}

    def kernels(self) -> dict[str, object]:
        """Peers, routes and rules of every task on every node, by its namespace."""
        found: dict[str, object] = {}
        for agent in self.agents.values():
            for path, namespace in agent.kernel.namespaces.items():
                device = namespace.device
                peers = {} if device is None else {str(k): str(p.endpoint) for k, p in device.peers.items()}
                owners = {} if device is None else {str(net): str(key) for net, key in device.owners.items()}
                routes = sorted(map(str, namespace.routes.values()))
                found[path] = (tuple(sorted(peers.items())), tuple(sorted(owners.items())), routes, namespace.rules)
        return found

    def keys(self) -> frozenset[str]:
        """Public keys of all devices."""
        return frozenset(str(d.public_key) for agent in self.agents.values() for d in agent.kernel.devices())

    # What can become of the store.

    def restore(self, backup: Mapping[str, bytes], *, keeps_leader: bool = False) -> None:
        """The store as it was at a backup, with its leases, and everything started again upon it."""
        self.store = MemoryStore(self.clock)
        for key, value in backup.items():
            has_lease = key.startswith(NODES) or (key == LEADER_KEY and not keeps_leader)
            self.store.put(key, value, self.store.grant_lease(10) if has_lease else NO_LEASE)
        self.start_controller()
        for agent in self.agents.values():
            agent.start()
