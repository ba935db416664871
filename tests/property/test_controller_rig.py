"""Whole controllers on fakes: a Swarm, a store and a clock that only move when told to, and agents that claim."""

import hashlib
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address

from controller.leader import LeaderRecord, Leadership
from controller.reconciler import MeshReconciler, Work
from controller.swarm.snapshot import Task
from hivewire.errors import HivewireError
from hivewire.ids import NetworkId, NodeId, ServiceId, TaskId
from hivewire.keys import PublicKey
from hivewire.records import (
    MESH_KEY,
    PEERS,
    POLICIES,
    ClaimRecord,
    Endpoint,
    MeshRecord,
    Mode,
    NodeRecord,
    PeerRecord,
    PolicyRecord,
    claim_key,
    decode,
    encode,
    node_key,
)
from hivewire.store.memory import MemoryStore
from hivewire.workqueue import WorkQueue
from tests.fakes.clock import FakeClock
from tests.fakes.signatures import Unsigned
from tests.fakes.swarm import FakeSwarm

TURN_S = 0.1
FIRST_PORT, LAST_PORT = 51800, 52799


def key_of(text: str) -> str:
    """A public key that is always the same for the same text."""
    return str(PublicKey(hashlib.sha256(text.encode()).digest()[:31] + b"\x01"))


class Replica:
    """One controller without its threads: its mirror, loop and election move when told to."""

    def __init__(self, swarm: FakeSwarm, store: MemoryStore, clock: FakeClock, hostname: str) -> None:
        self.queue: WorkQueue[Work] = WorkQueue(clock=clock, jitter=lambda: 1.0)
        self.reconciler = MeshReconciler(
            swarm=swarm,
            store=store,
            leadership=lambda: self.leadership,
            queue=self.queue,
            signatures=Unsigned(),
            mode=Mode.ENFORCE,
            monotonic=clock,
        )
        me = LeaderRecord(node=NodeId(f"id-{hostname}"), hostname=hostname)
        self.leadership = Leadership(store, me, self.reconciler.resync, monotonic=clock)
        self.worked: list[Work] = []
        self.errors: list[HivewireError] = []
        self.is_frozen = False
        """While true it does nothing: not even its lease is renewed."""

    def turn(self) -> None:
        if self.is_frozen:
            return
        try:
            self.leadership.step()
        except HivewireError as error:
            self.errors.append(error)
        for _ in range(2):  # the first change is reported alone, those behind it together and a moment later
            self.reconciler.mirror.step(0.0)
        self.work()

    def work(self) -> None:
        """Do what is due now, as the loop does, while the mirror stays as it is."""
        while (work := self.queue.get(0.0)) is not None:
            self.worked.append(work)
            try:
                self.reconciler.reconcile(work)
            except HivewireError as error:
                self.errors.append(error)
                self.queue.retry(work)
            else:
                self.queue.done(work)


class Cluster:
    """A Swarm with one overlay network, its store, its controllers, and claims as agents write them."""

    def __init__(self, replicas: Iterable[str] = ("m1",)) -> None:
        self.clock = FakeClock()
        self.store = MemoryStore(self.clock)
        self.swarm = FakeSwarm()
        self.network = self.swarm.add_network("shop_app", "10.1.0.0/20")
        self.node = next(iter(self.swarm.snapshot().nodes))
        self.replicas = [self.start(name) for name in replicas]
        self._claimed: dict[TaskId, tuple[str, int]] = {}

    # Controllers.

    def start(self, hostname: str) -> Replica:
        replica = Replica(self.swarm, self.store, self.clock, hostname)
        replica.reconciler.resync()
        return replica

    @property
    def one(self) -> Replica:
        """The controller of a cluster that has one."""
        (replica,) = self.replicas
        return replica

    def settle(self, seconds: float = 1.0) -> int:
        """Let time pass and everyone work; returns the number of writes to the store meanwhile."""
        before = self.store.revision
        for _ in range(round(seconds / TURN_S)):
            self.clock.advance(TURN_S)
            for replica in self.replicas:
                replica.turn()
        return self.store.revision - before

    def resync(self, seconds: float = 2.0) -> int:
        """What the slow period does, once the mirrors have shown everything."""
        writes = self.settle(0.5)
        for replica in self.replicas:
            replica.reconciler.resync()
        return writes + self.settle(seconds)

    # Swarm.

    def service(
        self,
        name: str,
        labels: Mapping[str, str] | None = None,
        *,
        replicas: int = 1,
        networks: Iterable[NetworkId] | None = None,
    ) -> ServiceId:
        """A service of the stack shop, deployed and running; the controllers have heard of it."""
        service = self.swarm.add_service(
            f"shop_{name}", labels, stack="shop", networks=networks or [self.network], replicas=replicas
        )
        self.swarm.settle()
        self.tell(service)
        return service

    def shop(self) -> tuple[ServiceId, ServiceId]:
        """A web that links to a db, settled and without claims."""
        db = self.service("db", {"hivewire.ports": "5432"})
        web = self.service("web", {"hivewire.links": "db"})
        self.settle()
        return web, db

    def tell(self, service: ServiceId) -> None:
        for replica in self.replicas:
            replica.reconciler.on_service(service)

    def tasks(self, service: ServiceId) -> list[Task]:
        return list(self.swarm.tasks(service))

    def task(self, service: ServiceId) -> Task:
        """The only live task of a service."""
        (task,) = self.tasks(service)
        return task

    # Agents.

    def agent(self, node: NodeId, *, underlay: str = "", key_node: NodeId | None = None) -> None:
        """``key_node`` is where the record lies, if not where it should."""
        address = underlay or self.swarm.snapshot().nodes[node].address
        record = NodeRecord(
            node=node,
            hostname=f"host-{node}",
            agent_version="1",
            underlay_address=IPv4Address(address),
            underlay_mtu=1500,
            backend="kernel",
            first_port=FIRST_PORT,
            last_port=LAST_PORT,
        )
        self.store.put(node_key(key_node or node), encode(record))

    def claim(
        self,
        task: Task,
        *,
        node: NodeId | None = None,
        service: ServiceId | None = None,
        address: str = "",
        key: str = "",
        serving: bool = True,
        epoch: int = 0,
    ) -> str:
        """What the agent of the task's node writes, but for what is given. Returns the key of the record."""
        node = node or task.node
        known = self.swarm.snapshot().nodes.get(node)
        record = ClaimRecord(
            task=task.id,
            service=service or task.service,
            node=node,
            container=task.container,
            public_key=(public_key := key or key_of(task.id)),
            endpoint=Endpoint(
                address=IPv4Address(address or (known.address if known else "10.77.0.1")), port=FIRST_PORT
            ),
            epoch=epoch or self._epoch(task.id, public_key),
            serving=serving,
        )
        self.store.put(claim_key(node, task.id), encode(record))
        return claim_key(node, task.id)

    def _epoch(self, task: TaskId, public_key: str) -> int:
        """Every new interface of a task has a later one, whatever keys the task had before."""
        key, epoch = self._claimed.get(task, ("", 0))
        if key != public_key:
            epoch += 1
        self._claimed[task] = (public_key, epoch)
        return epoch

    # The store.

    def stored(self, prefix: str) -> dict[str, bytes]:
        return {item.key: item.value for item in self.store.list(prefix).items}

    def mesh(self) -> MeshRecord:
        item = self.store.get(MESH_KEY)
        assert item is not None, "there is no mesh record"
        return decode(MeshRecord, item.value)

    def peers(self) -> dict[TaskId, PeerRecord]:
        found = [decode(PeerRecord, value) for value in self.stored(PEERS).values()]
        return {peer.task: peer for peer in found}

    def policies(self) -> dict[str, PolicyRecord]:
        """Of the services in the mesh: not those that were withdrawn."""
        found = [decode(PolicyRecord, value) for value in self.stored(POLICIES).values()]
        return {policy.name: policy for policy in found if policy.mode is not Mode.OFF}


def test_a_cluster_at_rest_stands_still() -> None:
    """Time alone changes nothing in the store: what moves in a test was moved by it."""
    cluster = Cluster()
    cluster.settle()
    assert cluster.settle(3.0) == 0
    assert cluster.one.errors == []
