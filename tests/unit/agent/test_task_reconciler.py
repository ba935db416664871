"""The loop for one task, over a fake kernel, a store in memory and an engine of a few values."""

import base64
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Interface

import pytest

from agent.book import DOUBT_S, HOLD_S, Book
from agent.grace import LONGEST_S, SETTLE_S
from agent.moving import NEW_S, QUIET_S
from agent.observed import Bridge, ObservedTask
from agent.ops import (
    AddPeer,
    AddRoute,
    CreateInterface,
    ForgetFlows,
    Handshake,
    Op,
    RemoveInterface,
    RemovePeer,
    RemoveRoute,
    RemoveRules,
    SetMtu,
    SetRules,
    SetUp,
)
from agent.reconciler import Outcome, TaskReconciler
from agent.seen import Seen
from agent.tasks import LocalTask, TaskEvent
from hivewire.errors import InvalidInput, KernelBusy, NamespaceGone, StoreUnavailable, TaskGone
from hivewire.ids import NetworkId, ServiceId, TaskId
from hivewire.records import (
    CLAIMS,
    MESH_KEY,
    STATUS,
    ClaimRecord,
    MeshRecord,
    Mode,
    NodeRecord,
    PeerRecord,
    PolicyRecord,
    Record,
    StatusRecord,
    TaskPhase,
    claim_key,
    decode,
    encode,
    peer_key,
    peers_prefix,
    policy_key,
    status_key,
)
from hivewire.store.api import KeyValue, Put
from hivewire.store.memory import MemoryStore
from hivewire.workqueue import WorkQueue
from tests.fakes.clock import FakeClock
from tests.fakes.kernel import FakeDevice, FakeKernel, FakeNamespace, FakePeer, FakeUnderlay
from tests.fakes.signatures import Unsigned
from tests.unit.agent.values import OWN, container_id, endpoint, link, node, peer, policy, private_key, public_key, spec

NODE = node()
VIP = "10.1.0.200"
WEB_1 = TaskId("web.1")
WEB = policy(out=[link("db", "5432", vip=VIP)])


@dataclass
class FakeTasks:
    """The engine: which tasks have a running container."""

    running: dict[TaskId, LocalTask] = field(default_factory=dict)
    asked: int = 0

    def get(self, task: TaskId) -> LocalTask:
        self.asked += 1
        if task not in self.running:
            raise TaskGone(f"task {task} has no running container")
        return self.running[task]

    def list(self) -> dict[TaskId, ServiceId]:
        return {task: local.service for task, local in self.running.items()}


class Rig:
    """One node: everything that an agent stands on, and the agent, which can be started again."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.time = FakeClock(1_700_000_000.0)
        self.store = MemoryStore(self.clock)
        self.underlay = FakeUnderlay(self.time)
        self.kernel = FakeKernel(self.underlay, NODE.underlay_address)
        self.elsewhere = FakeKernel(self.underlay, IPv4Address("192.0.2.2"))
        self.tasks = FakeTasks()
        self.node = NODE
        self.seen = Seen(now=self.time)
        self.bridge: Bridge | None = None
        self.signatures = Unsigned()
        self.start()

    def start(self) -> None:
        """A new agent, with nothing in its memory."""
        self.queue: WorkQueue[TaskId] = WorkQueue(clock=self.clock, jitter=lambda: 1.0)
        self.agent = TaskReconciler(
            node=lambda: self.node,
            tasks=self.tasks,
            kernel=self.kernel,
            store=self.store,
            queue=self.queue,
            signatures=self.signatures,
            book=Book(self.signatures, self.seen),
            bridge=lambda: self.bridge,
            monotonic=self.clock,
            now=self.time,
        )

    # What happens around the agent.

    def run_task(
        self, name: str = "web.1", address: str = OWN, *, service: str = "web", is_healthy: bool = True
    ) -> TaskId:
        """The engine starts a container of the task."""
        task = TaskId(name)
        self.kernel.add_namespace(f"/netns/{name}", {IPv4Address(address): "eth0", IPv4Address("172.18.0.2"): "eth1"})
        self.tasks.running[task] = LocalTask(
            task=task,
            name=name,
            service=ServiceId(f"id-{service}"),
            container=container_id(name),
            sandbox=f"/netns/{name}",
            addresses={NetworkId("app"): IPv4Address(address)},
            is_healthy=is_healthy,
        )
        self.event("start", task)
        return task

    def end_task(self, task: TaskId = WEB_1) -> None:
        del self.tasks.running[task]
        self.kernel.remove_namespace(f"/netns/{task}")
        self.event("die", task, stops=True)

    def event(self, action: str, task: TaskId = WEB_1, *, stops: bool = False) -> None:
        self.agent.on_event(TaskEvent(task, action, stops))

    def put(self, *records: Record) -> None:
        """The controller writes."""
        self.store.txn((), [Put(key_of(record), encode(record)) for record in records])

    def delete(self, *records: Record) -> None:
        for record in records:
            self.store.delete(key_of(record))

    def mesh(self, *records: Record, settled: bool = True) -> None:
        """A mesh of these records."""
        self.put(MeshRecord(mesh="m", settled=settled), *records)

    # What the agent does.

    def settle(self) -> list[Outcome]:
        """Let the agent see and do all there is, a few seconds long; what each pass did."""
        outcomes = []
        for _ in range(12):
            self.clock.advance(0.5)
            self.agent.mirror.step(0.0)
            while (task := self.queue.get(0.0)) is not None:
                try:
                    outcomes.append(self.agent.reconcile(task))
                finally:
                    self.queue.done(task)
        return outcomes

    def pass_time(self, seconds: float) -> None:
        """Let the agent do what is due, step by step."""
        for _ in range(round(seconds / 0.1)):
            self.clock.advance(0.1)
            self.agent.mirror.step(0.0)
            while (task := self.queue.get(0.0)) is not None:
                try:
                    self.agent.reconcile(task)
                finally:
                    self.queue.done(task)

    def hold_over(self) -> list[Outcome]:
        """Let the hold time go by, and the resync after it."""
        self.clock.advance(HOLD_S)
        self.agent.resync()
        return self.settle()

    # What there is.

    @property
    def namespace(self) -> FakeNamespace:
        return self.kernel.namespaces["/netns/web.1"]

    @property
    def device(self) -> FakeDevice:
        assert self.namespace.device is not None
        return self.namespace.device

    def stored(self) -> dict[str, KeyValue]:
        """What agents wrote."""
        items = (*self.store.list(CLAIMS).items, *self.store.list(STATUS).items)
        return {item.key: item for item in items}

    def claim(self, task: str = "web.1") -> ClaimRecord:
        return decode(ClaimRecord, self.stored()[claim_key(NODE.node, TaskId(task))].value)

    def status(self, task: str = "web.1") -> StatusRecord:
        return decode(StatusRecord, self.stored()[status_key(NODE.node, TaskId(task))].value)

    def take_ops(self) -> list[Op]:
        """The operations since the last time."""
        ops = [op for _, op in self.kernel.ops]
        self.kernel.ops.clear()
        return ops


def key_of(record: Record) -> str:
    match record:
        case MeshRecord():
            return MESH_KEY
        case PolicyRecord():
            return policy_key(record.service)
        case PeerRecord():
            return peer_key(record.service, record.task)
        case _:
            raise AssertionError(record)


@pytest.fixture
def rig() -> Rig:
    """An agent on a node without tasks."""
    return Rig()


@pytest.fixture
def up() -> Rig:
    """A task of web that is in the mesh, linked with one task of db."""
    rig = Rig()
    rig.mesh(WEB, peer(5))
    rig.run_task()
    rig.settle()
    rig.take_ops()
    return rig


def kinds(ops: Iterable[Op]) -> list[type]:
    """Who shakes hands first has tests of its own."""
    return [type(op) for op in ops if not isinstance(op, Handshake)]


# -- a task comes -----------------------------------------------------------------------------------------------


def test_fresh_task(rig: Rig) -> None:
    """A fresh task gets its device with all peers, and only then are claim and status written, in one transaction."""
    rig.mesh(WEB, peer(5), peer(6))
    before = rig.store.revision
    rig.run_task()
    rig.settle()
    ops = rig.take_ops()
    assert kinds(ops) == [CreateInterface, SetUp, AddPeer, AddPeer, AddRoute, AddRoute, AddRoute, SetRules]
    assert {op.peer for op in ops if isinstance(op, AddPeer)} == {spec(5), spec(6)}
    assert rig.claim() == ClaimRecord(
        task=WEB_1,
        service=ServiceId("id-web"),
        node=NODE.node,
        container=container_id("web.1"),
        public_key=str(rig.device.public_key),
        endpoint=rig.device.endpoint,
        epoch=1_700_000_000_000,
        serving=True,
        underlay_mtu=1500,
    )
    assert rig.status() == StatusRecord(
        task=WEB_1,
        service=ServiceId("id-web"),
        node=NODE.node,
        phase=TaskPhase.READY,
        interface="wg0",
        public_key=str(rig.device.public_key),
        mtu=1440,
        mode=Mode.ENFORCE,
    )
    assert {item.mod_revision for item in rig.stored().values()} == {before + 1}
    assert (rig.store.revision, rig.agent.store_writes) == (before + 1, 1)


def test_outcome_of_a_fresh_task(rig: Rig) -> None:
    """The pass that makes the interface tells what it cost, and how long after the container's start it was ready."""
    rig.mesh(WEB, peer(5))
    task = rig.run_task()
    rig.tasks.running[task] = replace(rig.tasks.running[task], started_at=rig.time() - 0.25)
    made = rig.settle()[-1]
    assert (made.summary, made.since_start_s) == ("configured", 0.25)
    assert made.calls == len(made.ops) + 2  # and two observations
    rig.put(peer(6))
    changed = rig.settle()[-1]
    assert (changed.summary, changed.since_start_s) == ("configured", None)


def test_second_pass(up: Rig) -> None:
    """A further pass finds all in order: no operation and no write."""
    revision = up.store.revision
    up.agent.resync()
    assert [o.summary for o in up.settle()] == ["in order"]
    assert up.take_ops() == []
    assert up.store.revision == revision


def test_at_rest(up: Rig) -> None:
    """Where nothing happens there is no pass at all."""
    calls = up.kernel.calls
    up.settle()
    assert up.settle() == []
    assert up.kernel.calls == calls


def test_task_before_its_records(rig: Rig) -> None:
    """A task that starts before the controller wrote anything waits, and is set up when all of it is there."""
    rig.run_task()
    rig.settle()
    assert rig.take_ops() == []
    assert rig.stored() == {}
    rig.mesh(WEB, peer(5))
    assert rig.settle()[-1].summary in ("configured", "in order")
    assert AddPeer(spec(5), initiate=False) in rig.take_ops()
    assert rig.claim().serving


def test_no_claim_before_the_peers_are_read(rig: Rig) -> None:
    """As long as the peers of a linked service were not read completely there is neither device nor claim."""
    rig.mesh(WEB, peer(5))
    rig.run_task()
    summaries = []
    for _ in range(4):
        rig.clock.advance(0.2)
        rig.agent.mirror.step(0.0)
        while (task := rig.queue.get(0.0)) is not None:
            outcome = rig.agent.reconcile(task)
            rig.queue.done(task)
            summaries.append(outcome.summary)
            if outcome.summary == "waits for records":
                assert rig.kernel.ops == []
                assert rig.stored() == {}
    assert summaries[-1] == "configured"
    assert "waits for records" in summaries


def test_ordinary_task(rig: Rig) -> None:
    """A task whose service is not in the mesh is left alone."""
    rig.mesh(WEB)
    rig.run_task("other.1", service="other")
    assert {o.summary for o in rig.settle()} <= {"waits for records", "no policy"}
    assert (rig.take_ops(), rig.stored()) == ([], {})


@pytest.mark.parametrize("meshed", [False, True])
def test_task_on_the_node_s_network(rig: Rig, meshed: bool) -> None:
    """A task without a namespace of its own is no failure, unless its service should be in the mesh."""
    rig.mesh(*([WEB] if meshed else []))
    rig.run_task()
    rig.kernel.remove_namespace("/netns/web.1")  # what a real kernel says of the node's own as well
    if meshed:
        with pytest.raises(NamespaceGone):
            rig.settle()
    else:
        assert rig.settle()[-1].summary == "not in the mesh"
    assert rig.stored() == {}


def test_task_without_an_overlay_address(rig: Rig) -> None:
    """A meshed task that has no address on its service's networks gets no device, and its status says why."""
    rig.mesh(WEB)
    task = rig.run_task()
    rig.tasks.running[task] = replace(rig.tasks.running[task], addresses={})
    with pytest.raises(InvalidInput, match="no address"):
        rig.settle()
    assert rig.kernel.ops == []
    assert rig.status().phase is TaskPhase.FAILED
    assert "no address on the overlay networks of its service (app)" in rig.status().error
    assert rig.stored().keys() == {status_key(NODE.node, task)}


def test_kernel_refuses(rig: Rig) -> None:
    """While the kernel refuses there is no claim and the status says why; afterwards both are as they should be."""
    rig.mesh(WEB, peer(5))
    rig.run_task()
    rig.kernel.fail(SetUp, KernelBusy("all UDP ports are in use"))
    with pytest.raises(KernelBusy):
        rig.settle()
    assert (rig.status().phase, rig.status().error) == (TaskPhase.FAILED, "all UDP ports are in use")
    assert rig.stored().keys() == {status_key(NODE.node, WEB_1)}
    rig.queue.add(WEB_1)
    rig.settle()
    assert (rig.status().phase, rig.status().error) == (TaskPhase.READY, "")
    assert rig.claim().serving


@pytest.mark.parametrize("kind", [CreateInterface, SetUp, AddPeer, AddRoute, SetRules, ObservedTask])
def test_stopped_anywhere(rig: Rig, kind: type) -> None:
    """Whichever step fails, nothing is claimed before all is done, and the next pass finishes it with the same key."""
    rig.mesh(WEB, peer(5), peer(6))
    rig.run_task()
    rig.kernel.fail(kind, KernelBusy("not now"))
    with pytest.raises(KernelBusy):
        rig.settle()
    key = None if rig.namespace.device is None else rig.device.public_key
    assert claim_key(NODE.node, WEB_1) not in rig.stored()
    rig.queue.add(WEB_1)
    rig.settle()
    assert key in (None, rig.device.public_key)
    assert rig.claim().public_key == str(rig.device.public_key)
    assert rig.device.peers.keys() == {public_key(5), public_key(6)}


def test_two_tasks_of_a_node(rig: Rig) -> None:
    """Tasks of one node have devices, keys, ports and claims of their own."""
    rig.mesh(WEB, peer(5))
    rig.run_task("web.1")
    rig.run_task("web.2", "10.1.0.3")
    rig.settle()
    one, two = rig.claim("web.1"), rig.claim("web.2")
    assert one.public_key != two.public_key
    assert one.endpoint != two.endpoint


def test_packets_arrive(rig: Rig) -> None:
    """Once both sides know each other packets go both ways, whichever came first."""
    key = private_key(5)
    there = rig.elsewhere.add_namespace("/netns/db.5", {IPv4Address("10.1.0.5"): "eth0"})
    there.device = FakeDevice(key, endpoint(5).address, endpoint(5).port, 1440)
    rig.elsewhere.address = endpoint(5).address
    rig.mesh(WEB, peer(5))
    rig.run_task()
    rig.settle()
    assert not rig.underlay.send(rig.namespace, IPv4Address(OWN), IPv4Address("10.1.0.5"))
    claim = rig.claim()
    there.device.peers[rig.device.public_key] = FakePeer(claim.endpoint)
    there.device.owners[next(iter(spec(2, OWN).allowed_ips))] = rig.device.public_key
    assert rig.underlay.send(rig.namespace, IPv4Address(OWN), IPv4Address("10.1.0.5"))


# -- peers and policies change ----------------------------------------------------------------------------------


def test_peer_appears(up: Rig) -> None:
    """A new peer is added, routed and balanced, and nothing else is touched."""
    up.put(peer(6))
    up.settle()
    ops = up.take_ops()
    assert kinds(ops) == [AddPeer, AddRoute, SetRules]
    assert isinstance(ops[0], AddPeer)
    assert ops[0].peer == spec(6)
    assert "mod 2" in up.namespace.rules_text
    assert len(up.device.peers) == 2


def test_a_new_peer_costs_the_claim_nothing(up: Rig) -> None:
    """The claim is not written again because a peer came."""
    revision = up.stored()[claim_key(NODE.node, WEB_1)].mod_revision
    up.put(peer(6))
    up.settle()
    assert up.stored()[claim_key(NODE.node, WEB_1)].mod_revision == revision


def test_peer_disappears(up: Rig) -> None:
    """A peer whose record was deleted goes at once, with its route and its place behind the VIP."""
    up.delete(peer(5))
    up.settle()
    assert kinds(up.take_ops()) == [SetRules, RemoveRoute, ForgetFlows, RemovePeer]
    assert up.device.peers == {}


def test_the_way_out_is_known_by_the_nodes_bridge(up: Rig) -> None:
    """The interface that has an address of the bridge's subnet is the way out; its rules follow the bridge."""
    assert '"eth1"' not in up.namespace.rules_text
    for mac in ("02:42:ac:12:00:01", "02:42:ac:12:00:99"):
        up.bridge = Bridge(IPv4Interface("172.18.0.1/16"), mac)
        up.agent.resync()
        up.settle()
        assert f'iifname "eth1" ether saddr != {mac} goto denied_no_link_in\n' in up.namespace.rules_text
    up.bridge = Bridge(IPv4Interface("172.19.0.1/16"), mac)
    up.agent.resync()
    up.settle()
    assert '"eth1"' not in up.namespace.rules_text


def test_the_ingress_network_is_no_way_out(rig: Rig) -> None:
    """An overlay address is none of the bridge's, even where an operator gave both the same subnet."""
    rig.bridge = Bridge(IPv4Interface("10.1.0.1/16"), "02:42:ac:12:00:01")
    rig.mesh(WEB, peer(5))
    rig.run_task()
    rig.settle()
    assert "ether saddr" not in rig.namespace.rules_text


def test_peer_that_stops_serving(up: Rig) -> None:
    """A peer that serves no longer leaves the VIP and stays a peer, so that its connections go on."""
    up.put(peer(5, serving=False))
    up.settle()
    assert kinds(up.take_ops()) == [SetRules]
    assert f"ip daddr {{ {VIP} }} goto denied_no_backend_out\n" in up.namespace.rules_text


def test_peer_of_another_service(up: Rig) -> None:
    """Records of services that no task of this node is linked with cause no pass."""
    calls = up.kernel.calls
    up.put(peer(9, "stranger"))
    assert up.settle() == []
    assert up.kernel.calls == calls


def test_peer_of_another_task(up: Rig) -> None:
    """Records that only another task of the node needs cause no pass of this one."""
    up.put(policy("lb", out=[link("cache")]))
    lb = up.run_task("lb.1", "10.1.0.8", service="lb")
    up.settle()
    up.put(peer(9, "cache"))
    assert {o.task for o in up.settle()} == {lb}


def test_link_goes(up: Rig) -> None:
    """A revoked link closes: its peers, routes and VIP go in one pass."""
    up.put(policy())
    up.settle()
    assert kinds(up.take_ops()) == [SetRules, RemoveRoute, RemoveRoute, ForgetFlows, RemovePeer]
    assert up.namespace.routes == {}
    up.put(peer(6))
    assert up.settle() == []


def test_changed_mtu_of_the_underlay(up: Rig) -> None:
    """Another MTU of the underlay is set on the device at the next look."""
    up.node = node(mtu=9000)
    up.agent.resync()
    up.settle()
    assert up.take_ops() == [SetMtu(8940)]
    assert up.status().mtu == 8940


def test_somebody_changed_the_namespace(up: Rig) -> None:
    """What somebody changed behind the agent's back is put right at the next look."""
    up.namespace.take_down()
    up.namespace.rules = ""
    up.agent.resync()
    up.settle()
    assert kinds(up.take_ops()) == [SetUp, AddRoute, AddRoute, SetRules]


def test_unreadable_policy(up: Rig) -> None:
    """A policy that cannot be read leaves the last one in force."""
    up.store.put(policy_key(WEB.service), b"{")
    up.settle()
    assert up.take_ops() == []
    assert up.device.peers.keys() == {public_key(5)}


def test_a_manager_that_the_engine_has_not_heard_of(rig: Rig) -> None:
    """What it wrote counts a moment after the engine names it, though nobody writes it again and no minute passes."""
    rig.signatures.knows_managers = False
    rig.mesh(WEB, peer(5))
    rig.run_task()
    rig.settle()
    assert rig.take_ops() == []
    rig.signatures.knows_managers = True
    rig.pass_time(DOUBT_S)
    assert rig.device.peers.keys() == {public_key(5)}
    rig.take_ops()
    assert rig.settle() == [], "once all is believed nothing is looked at again"


def test_a_peer_whose_manager_the_engine_has_not_heard_of(up: Rig) -> None:
    """The same with what the rest of a task's records name."""
    up.signatures.knows_managers = False
    up.put(peer(6))
    up.settle()
    assert up.device.peers.keys() == {public_key(5)}
    up.signatures.knows_managers = True
    up.pass_time(DOUBT_S)
    assert up.device.peers.keys() == {public_key(5), public_key(6)}


def test_policy_off(up: Rig) -> None:
    """A service that leaves the mesh sends in clear at once, and receives until others have heard of it as well."""
    up.put(policy(mode=Mode.OFF))
    summaries = [outcome.summary for outcome in up.settle()]
    assert (summaries[0], summaries[-1]) == ("leaves the mesh", "left the mesh")
    assert kinds(up.take_ops()) == [RemoveRules, RemoveRoute, RemoveRoute, RemoveInterface]
    assert up.stored() == {}
    up.agent.resync()
    assert up.settle()[-1].summary == "not in the mesh"


def test_who_leaves_receives_as_long_as_others_send(up: Rig) -> None:
    """An agent that hears of it late, or starts again just then, still sends through WireGuard."""
    up.put(policy(mode=Mode.OFF))
    for _ in range(30):
        up.pass_time(QUIET_S / 2)
        up.device.peers[public_key(5)].received_bytes += 100
    assert kinds(up.take_ops()) == [RemoveRules, RemoveRoute, RemoveRoute]
    up.pass_time(3 * QUIET_S)
    assert kinds(up.take_ops()) == [RemoveInterface]


def test_policy_deleted(up: Rig) -> None:
    """A deletion opens nothing, at once or later: anybody who gets at the store can delete, only a manager can sign."""
    up.mesh(settled=False)
    up.settle()
    up.delete(WEB)
    assert {o.summary for o in up.settle()} == {"no policy yet"}
    up.mesh(settled=True)
    assert up.settle()[-1].summary == "no policy"
    up.hold_over()
    up.start()
    up.agent.resync()
    up.settle()
    assert up.take_ops() == []
    assert len(up.stored()) == 2


def test_peers_missing_while_the_store_is_filled(up: Rig) -> None:
    """While the store is being filled a peer without a record stays a peer, with its route and its rules."""
    up.mesh(settled=False)
    up.delete(peer(5))
    up.settle()
    assert up.take_ops() == []
    assert "dnat ip to 10.1.0.5" in up.namespace.rules_text
    up.mesh(settled=True)
    up.settle()
    assert kinds(up.take_ops()) == [SetRules, RemoveRoute, ForgetFlows, RemovePeer]


def test_peer_appears_while_the_store_is_filled(up: Rig) -> None:
    """While the store is being filled new peers come as ever."""
    up.mesh(peer(6), settled=False)
    up.settle()
    assert kinds(up.take_ops()) == [AddPeer, AddRoute, SetRules]


# -- the store fails --------------------------------------------------------------------------------------------


def test_wiped_store(up: Rig) -> None:
    """A wiped store removes nothing, neither at once nor after the hold time, and the same claim is written again."""
    claim, key, text = up.claim(), up.device.public_key, up.namespace.rules_text
    up.store.faults.wipe()
    up.settle()
    assert up.claim() == claim
    assert up.status().phase is TaskPhase.READY
    up.hold_over()
    up.hold_over()
    assert up.take_ops() == []
    assert (up.device.public_key, up.namespace.rules_text) == (key, text)
    assert up.claim() == claim


def test_wiped_store_is_filled_again(up: Rig) -> None:
    """When a wiped store is filled again by and by, long after the hold time, no peer is lost on the way."""
    up.store.faults.wipe()
    up.settle()
    up.hold_over()
    for step in ((MeshRecord(mesh="m"),), (WEB,), (peer(5),), (MeshRecord(mesh="m", settled=True),)):
        up.put(*step)
        up.settle()
        assert up.take_ops() == []
    assert up.device.peers.keys() == {public_key(5)}


def test_wiped_store_and_new_agent(up: Rig) -> None:
    """An agent that starts while a wiped store is being filled takes nothing away from what it finds."""
    key, text = up.device.public_key, up.namespace.rules_text
    up.store.faults.wipe()
    up.start()
    up.agent.resync()
    for step in ((MeshRecord(mesh="m"),), (WEB,), (peer(5),), (MeshRecord(mesh="m", settled=True),)):
        up.put(*step)
        up.settle()
        assert up.take_ops() == []
    assert (up.device.public_key, up.namespace.rules_text) == (key, text)
    assert up.claim().public_key == str(key)


def test_policy_deleted_during_an_outage(up: Rig) -> None:
    """A policy that went while the store could not be watched opens nothing either, after the hold time."""
    up.store.faults.break_watches()
    up.delete(WEB)
    up.settle()
    up.hold_over()
    assert up.take_ops() == []
    assert len(up.stored()) == 2


def test_store_unavailable(up: Rig) -> None:
    """Without the store a pass that must write fails, what is applied stays, and all is written when it is back."""
    up.store.faults.set_unavailable(True)
    up.event("kill", stops=True)
    with pytest.raises(StoreUnavailable):
        up.settle()
    assert up.take_ops() == []
    assert up.device.peers.keys() == {public_key(5)}
    up.store.faults.set_unavailable(False)
    up.queue.add(WEB_1)
    up.settle()
    assert not up.claim().serving


def test_kernel_is_kept_right_without_the_store(up: Rig) -> None:
    """What the last records say is kept in force while the store is away."""
    up.store.faults.set_unavailable(True)
    up.namespace.rules = ""
    up.agent.resync()
    up.settle()
    assert kinds(up.take_ops()) == [SetRules]


def test_lost_answer(rig: Rig) -> None:
    """Where the answer to a write is lost, the next pass finds it written."""
    rig.mesh(WEB, peer(5))
    rig.run_task()
    rig.store.faults.lose_next_answers(1)
    with pytest.raises(StoreUnavailable):
        rig.settle()
    rig.queue.add(WEB_1)
    rig.settle()
    assert rig.stored()[claim_key(NODE.node, WEB_1)].version == 1
    assert rig.status().phase is TaskPhase.READY


@pytest.mark.parametrize("how", ["deleted", "changed"])
def test_somebody_touched_the_claim(up: Rig, how: str) -> None:
    """A claim that somebody deleted or changed is written again, as it was."""
    claim = up.claim()
    key = claim_key(NODE.node, WEB_1)
    if how == "deleted":
        up.store.delete(key)
    else:
        up.store.put(key, b"{}")
    up.settle()
    assert up.claim() == claim


# -- a task goes ------------------------------------------------------------------------------------------------


def test_container_gone(up: Rig) -> None:
    """When the container is gone claim and status are deleted, in one transaction."""
    revision = up.store.revision
    up.end_task()
    assert [o.summary for o in up.settle()] == ["is gone"]
    assert up.stored() == {}
    assert up.store.revision == revision + 1
    up.put(peer(6))
    assert up.settle() == []


def test_nothing_is_followed_for_tasks_that_are_gone(up: Rig) -> None:
    """With the last task that is linked with a service goes the interest in its peers."""
    folder = peers_prefix(ServiceId("id-db"))
    assert up.agent.mirror.synced(folder)
    other = up.run_task("web.2", "10.1.0.3")
    up.settle()
    up.end_task()
    up.settle()
    assert up.agent.mirror.synced(folder)
    up.end_task(other)
    up.settle()
    assert not up.agent.mirror.synced(folder)
    assert not up.agent.mirror.synced(policy_key(WEB.service))


def test_ordinary_container_gone_unseen(up: Rig) -> None:
    """The end of a task that is not in the mesh is noticed by the next resync as well."""
    task = up.run_task("other.1", "10.1.0.9", service="other")
    up.settle()
    del up.tasks.running[task]
    up.agent.resync()
    assert Outcome(task, "is gone") in up.settle()


def test_container_gone_unseen(up: Rig) -> None:
    """A container whose end no event told is noticed by the next resync."""
    del up.tasks.running[WEB_1]
    up.kernel.remove_namespace("/netns/web.1")
    up.agent.resync()
    up.settle()
    assert up.stored() == {}


def test_container_gone_while_no_agent_ran(up: Rig) -> None:
    """A new agent deletes what the one before it claimed for tasks that are gone."""
    del up.tasks.running[WEB_1]
    up.kernel.remove_namespace("/netns/web.1")
    up.start()
    up.agent.resync()
    up.settle()
    assert up.stored() == {}


def test_container_gone_while_the_store_is_away(up: Rig) -> None:
    """A removal that the store did not take is done later."""
    up.end_task()
    up.store.faults.set_unavailable(True)
    with pytest.raises(StoreUnavailable):
        up.settle()
    up.store.faults.set_unavailable(False)
    up.agent.resync()
    up.settle()
    assert up.stored() == {}


def test_namespace_gone_before_the_event(up: Rig) -> None:
    """A namespace that vanished under a task makes the pass fail, not the records go: the engine is asked again."""
    up.kernel.remove_namespace("/netns/web.1")
    asked = up.tasks.asked
    up.put(peer(6))
    with pytest.raises(NamespaceGone):
        up.settle()
    assert len(up.stored()) == 2
    up.kernel.add_namespace("/netns/web.1", {IPv4Address(OWN): "eth0"})
    up.queue.add(WEB_1)
    up.settle()
    assert up.tasks.asked == asked + 1
    assert up.device.peers.keys() == {public_key(5), public_key(6)}


def test_stop_event(up: Rig) -> None:
    """A container that is told to stop is out of the VIPs at once and keeps its device and its peers."""
    up.event("kill", stops=True)
    up.settle()
    assert not up.claim().serving
    assert up.take_ops() == []
    assert up.device.peers.keys() == {public_key(5)}
    up.agent.resync()
    up.settle()
    assert not up.claim().serving


def test_start_after_stop(up: Rig) -> None:
    """A container that starts again serves again."""
    up.event("kill", stops=True)
    up.settle()
    up.event("start")
    up.settle()
    assert up.claim().serving


@pytest.mark.parametrize("is_healthy", [True, False])
def test_health(up: Rig, is_healthy: bool) -> None:
    """A task serves while its container is healthy, and its claim says so after each change."""
    task = WEB_1
    for now in (not is_healthy, is_healthy):
        up.tasks.running[task] = replace(up.tasks.running[task], is_healthy=now)
        up.event("health_status")
        up.settle()
        assert up.claim().serving is now
    assert up.claim().epoch == 1_700_000_000_000
    assert up.take_ops() == []


def test_fresh_task_with_a_health_check(rig: Rig) -> None:
    """A task that is not healthy yet is claimed, so that peers know it, but does not serve."""
    rig.mesh(WEB)
    rig.run_task(is_healthy=False)
    rig.settle()
    assert not rig.claim().serving
    assert rig.status().phase is TaskPhase.READY


# -- an agent starts again --------------------------------------------------------------------------------------


def test_restarted_agent_adopts(up: Rig) -> None:
    """A new agent finds the device, keeps its key and its epoch, and does and writes nothing."""
    claim, revision = up.claim(), up.store.revision
    up.time.advance(3600)
    up.start()
    up.agent.resync()
    assert up.settle()[-1].summary == "in order"
    assert up.take_ops() == []
    assert up.claim() == claim
    assert up.store.revision == revision


def test_restarted_agent_without_its_claim(up: Rig) -> None:
    """A new agent that finds the device but no claim claims the same key, under an epoch that is no smaller."""
    claim = up.claim()
    up.store.delete(claim_key(NODE.node, WEB_1))
    up.time.advance(1)
    up.start()
    up.agent.resync()
    up.settle()
    assert up.take_ops() == []
    assert up.claim().public_key == claim.public_key
    assert up.claim().epoch > claim.epoch


@pytest.mark.parametrize("passed_s", [10.0, 0.0, -3600.0])
def test_new_key_new_epoch(up: Rig, passed_s: float) -> None:
    """A device that was lost is made again with another key and a larger epoch, whatever the clock says."""
    before = up.claim()
    up.namespace.device = None
    up.namespace.routes.clear()
    up.time.advance(passed_s)
    up.agent.resync()
    up.settle()
    assert up.claim().public_key != before.public_key
    assert up.claim().epoch > before.epoch


# -- what it tells ----------------------------------------------------------------------------------------------


def test_interfaces(up: Rig) -> None:
    """The report says what the kernel says now, of tasks that are in the mesh."""
    up.run_task("other.1", "10.1.0.9", service="other")
    up.settle()
    up.device.peers[public_key(5)].received_bytes = 77
    (report,) = up.agent.interfaces()
    assert (report.task, report.service, report.mtu) == ("web.1", "id-web", 1440)
    assert (report.public_key, report.listen_port) == (str(up.device.public_key), up.device.port)
    assert [(p.public_key, p.received_bytes) for p in report.peers] == [(str(public_key(5)), 77)]


def test_interfaces_of_a_namespace_that_is_gone(up: Rig) -> None:
    """A task that just vanished is left out of the report."""
    up.kernel.remove_namespace("/netns/web.1")
    assert up.agent.interfaces() == ()


def test_nothing_shows_a_private_key(rig: Rig) -> None:
    """No operation, outcome or record of a whole life of a task shows its private key."""
    rig.mesh(WEB, peer(5))
    rig.run_task()
    outcomes = rig.settle()
    secret = rig.device.private_key.reveal()
    texts = [f"{o} {o!r} {o.ops}" for o in outcomes]
    texts += [f"{op} {op!r}" for op in rig.take_ops()]
    texts += [item.value.decode() for item in rig.store.list("").items]
    texts += [repr(rig.agent.interfaces())]
    for form in (secret.hex(), base64.b64encode(secret).decode(), repr(secret)[2:-1]):
        assert not [text for text in texts if form in text]


def test_no_key_in_the_status(rig: Rig) -> None:
    """What a library puts into an error is blotted out of the status where it looks like a key."""
    key = base64.b64encode(bytes(range(32))).decode()
    rig.mesh(WEB)
    rig.run_task()
    rig.kernel.fail(SetUp, KernelBusy(f"private_key={key} refused"))
    with pytest.raises(KernelBusy):
        rig.settle()
    assert rig.status().error == "private_key=(key) refused"


def test_node_record_is_asked_each_time(up: Rig) -> None:
    """Another underlay address of the node is in the claim after the next pass."""
    up.node = NodeRecord(
        **{f: getattr(NODE, f) for f in NODE.__struct_fields__} | {"underlay_address": IPv4Address("192.0.2.77")}
    )
    up.agent.resync()
    up.settle()
    assert up.claim().endpoint.address == IPv4Address("192.0.2.77")


# -- a running service comes into the mesh ----------------------------------------------------------------------


def run_in_clear(rig: Rig, *remotes: str) -> None:
    """A task that no policy speaks of, with connections to these addresses."""
    rig.mesh()
    rig.run_task()
    rig.settle()
    rig.namespace.flows = {(IPv4Address(OWN), IPv4Address(remote)) for remote in remotes}


def routed(rig: Rig) -> set[str]:
    return {str(network.network_address) for network in rig.namespace.routes}


def test_a_route_waits_for_the_handshake_of_a_peer_with_connections(rig: Rig) -> None:
    """The other side, which does not know us yet, gets what runs the old way; where nothing runs nothing waits."""
    run_in_clear(rig, "10.1.0.5")
    rig.put(policy(mode=Mode.OBSERVE, out=[link("db", "5432", vip=VIP)]), peer(5), peer(6))
    rig.settle()
    assert routed(rig) == {"10.1.0.6", VIP}
    rig.device.peers[public_key(5)].last_handshake = rig.time()
    rig.settle()  # nobody tells of a handshake: the agent looks by itself
    assert routed(rig) == {"10.1.0.5", "10.1.0.6", VIP}


def test_a_restarted_agent_leaves_a_route_where_it_is(rig: Rig) -> None:
    """What has moved never goes back in clear, handshake or not."""
    run_in_clear(rig)
    rig.put(policy(mode=Mode.OBSERVE, out=[link("db", "5432", vip=VIP)]), peer(5))
    rig.settle()
    rig.namespace.flows = {(IPv4Address(OWN), IPv4Address("10.1.0.5")), (IPv4Address(OWN), IPv4Address(VIP))}
    rig.take_ops()
    rig.start()
    rig.agent.resync()
    rig.settle()
    assert (rig.take_ops(), routed(rig)) == ([], {"10.1.0.5", VIP})


def test_a_device_that_died_does_not_send_its_connections_in_clear(rig: Rig) -> None:
    """They were encrypted: they wait in the new device for its handshakes."""
    run_in_clear(rig)
    rig.put(policy(mode=Mode.OBSERVE, out=[link("db", "5432", vip=VIP)]), peer(5))
    rig.settle()
    rig.namespace.flows = {(IPv4Address(OWN), IPv4Address("10.1.0.5"))}
    rig.namespace.device = None
    rig.namespace.routes.clear()
    rig.agent.resync()
    rig.pass_time(0.1)
    assert routed(rig) == {"10.1.0.5", VIP}


def test_a_fresh_task_has_nothing_to_keep(rig: Rig) -> None:
    """What it opened in its first moments does not hold up its links, and reading it would take time."""
    rig.mesh(policy(mode=Mode.OBSERVE, out=[link("db", "5432", vip=VIP)]), peer(5))
    task = rig.run_task()
    rig.tasks.running[task] = replace(rig.tasks.running[task], started_at=rig.time() - 0.1)
    rig.namespace.flows = {(IPv4Address(OWN), IPv4Address("10.1.0.5")), (IPv4Address(OWN), IPv4Address(VIP))}
    rig.settle()
    assert routed(rig) == {"10.1.0.5", VIP}


def test_a_new_peer_of_an_old_link_is_fresh(rig: Rig) -> None:
    """Nothing ran in clear to a task that came after its link."""
    run_in_clear(rig)
    rig.put(policy(mode=Mode.OBSERVE, out=[link("db", "5432", vip=VIP)]), peer(5))
    rig.pass_time(NEW_S + 1)
    rig.namespace.flows = {(IPv4Address(OWN), IPv4Address("10.1.0.6"))}
    rig.put(peer(6))
    rig.settle()
    assert routed(rig) == {"10.1.0.5", "10.1.0.6", VIP}


@pytest.mark.parametrize("late_s", [0.0, NEW_S + 1, 50 * NEW_S])
def test_a_link_is_new_until_its_first_peer_comes(rig: Rig, late_s: float) -> None:
    """Until then all connections run in clear, however long the other side's agent or the store takes."""
    run_in_clear(rig, VIP, "10.1.0.5")
    out = [link("db", "5432", vip=VIP), link("cache", "6379")]
    rig.put(policy(mode=Mode.OBSERVE, out=out), peer(7, service="cache"))
    rig.pass_time(late_s)
    rig.put(peer(5))
    rig.settle()
    assert routed(rig) == {"10.1.0.7"}


def test_a_link_whose_last_peer_went_is_new_again(rig: Rig) -> None:
    """In observe its VIP is Swarm's meanwhile, which gives connections a backend as soon as there is one."""
    run_in_clear(rig)
    rig.put(policy(mode=Mode.OBSERVE, out=[link("db", "5432", vip=VIP)]), peer(5))
    rig.pass_time(NEW_S + 1)
    rig.delete(peer(5))
    rig.settle()
    assert routed(rig) == set()
    rig.namespace.flows = {(IPv4Address(OWN), IPv4Address(VIP)), (IPv4Address(OWN), IPv4Address("10.1.0.6"))}
    rig.put(peer(6))
    rig.settle()
    assert routed(rig) == set()


def test_a_vip_comes_later_than_the_peers_behind_it(rig: Rig) -> None:
    """Who was called only begins to call: its connections by VIP ran in clear until now, though the peers are old."""
    run_in_clear(rig)
    rig.put(policy(mode=Mode.OBSERVE, into=[link("db", "5432")]), peer(5))
    rig.pass_time(NEW_S + 1)
    assert routed(rig) == {"10.1.0.5"}
    rig.namespace.flows = {(IPv4Address(OWN), IPv4Address(VIP))}
    rig.put(policy(mode=Mode.OBSERVE, into=[link("db", "5432")], out=[link("db", "5432", vip=VIP)]))
    rig.settle()
    assert routed(rig) == {"10.1.0.5"}
    rig.namespace.flows.clear()
    rig.settle()
    assert routed(rig) == {"10.1.0.5", VIP}


def test_what_waits_goes_on_waiting(rig: Rig) -> None:
    """A link is new for a while only, a connection may run for days."""
    run_in_clear(rig, VIP, "10.1.0.5")
    rig.put(policy(mode=Mode.OBSERVE, out=[link("db", "5432", vip=VIP)]), peer(5), peer(6))
    rig.pass_time(NEW_S + 5)
    assert routed(rig) == {"10.1.0.6"}


def test_a_vip_waits_for_the_end_of_its_connections(rig: Rig) -> None:
    """Which backend they have is Swarm's secret; new ones get theirs from the rules, which are there."""
    run_in_clear(rig, VIP)
    rig.put(policy(mode=Mode.OBSERVE, out=[link("db", "5432", vip=VIP)]), peer(5))
    rig.settle()
    assert routed(rig) == {"10.1.0.5"}
    assert "dnat ip to 10.1.0.5" in rig.namespace.rules_text
    rig.namespace.flows.clear()
    rig.settle()
    assert routed(rig) == {"10.1.0.5", VIP}


def test_enforcement_of_a_running_task_comes_when_all_has_moved(rig: Rig) -> None:
    """It is in observe until then, and says so."""
    run_in_clear(rig, "10.1.0.5")
    rig.put(WEB, peer(5))
    rig.pass_time(LONGEST_S / 4)
    assert "denied_" not in rig.namespace.rules_text
    assert rig.status().mode is Mode.OBSERVE
    rig.device.peers[public_key(5)].last_handshake = rig.time()
    rig.pass_time(SETTLE_S + 1)
    assert "denied_" in rig.namespace.rules_text
    assert rig.status().mode is Mode.ENFORCE


def test_enforcement_of_a_running_task_does_not_wait_for_ever(rig: Rig) -> None:
    """What has not moved by then is cut, a VIP that had connections is closed, and no pass goes back."""
    run_in_clear(rig, "10.1.0.5", VIP)
    rig.put(WEB, peer(5))
    rig.pass_time(LONGEST_S - 1)
    assert "denied_" not in rig.namespace.rules_text
    rig.pass_time(2)
    assert "denied_" in rig.namespace.rules_text
    assert routed(rig) == {"10.1.0.5", VIP}
    rig.take_ops()
    rig.agent.resync()
    rig.pass_time(2)
    assert rig.take_ops() == []


@pytest.mark.parametrize("remotes", [(), ("10.1.0.5", VIP)])
def test_a_task_that_was_never_seen_in_clear_is_enforced_at_once(rig: Rig, remotes: tuple[str, ...]) -> None:
    """A new task of an enforced service, and any task after a restart of the agent, whatever it has open."""
    rig.mesh(WEB, peer(5))
    rig.run_task()
    rig.namespace.flows = {(IPv4Address(OWN), IPv4Address(remote)) for remote in remotes}
    rig.settle()
    assert "denied_" in rig.namespace.rules_text
    assert routed(rig) == {"10.1.0.5", VIP}


def test_records_that_are_incomplete_show_nobody_in_clear(rig: Rig) -> None:
    """A store that is being filled says nothing of who is in no mesh."""
    rig.mesh(settled=False)
    rig.run_task()
    rig.settle()
    rig.namespace.flows = {(IPv4Address(OWN), IPv4Address("10.1.0.5"))}
    rig.put(WEB, peer(5))
    rig.settle()
    assert "denied_" in rig.namespace.rules_text


def test_a_service_deployed_with_its_labels_is_enforced_at_once(rig: Rig) -> None:
    """Though its policy may come a moment after its first task."""
    rig.mesh()
    rig.run_task()
    rig.pass_time(1)
    rig.namespace.flows = {(IPv4Address(OWN), IPv4Address("10.1.0.5"))}
    rig.put(WEB, peer(5))
    rig.pass_time(1)
    assert "denied_" in rig.namespace.rules_text
