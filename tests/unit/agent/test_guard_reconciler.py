"""The guard's loop, over overlay namespaces and an engine of a few values, and a store in memory."""

import re
from dataclasses import replace
from ipaddress import IPv4Address

import msgspec
import pytest

from agent.book import DOUBT_S, HOLD_S, Book
from agent.guard import edge
from agent.guard.desired import Holder, LocalNetwork, Stage, guard
from agent.guard.reconciler import FORMING_S, GuardReconciler
from agent.guard.render import FROM_TASKS, SHUT, Count, render
from agent.kernel.overlay import MOUNT_S
from hivewire.errors import NamespaceGone, SwarmUnavailable
from hivewire.ids import ContainerId, NetworkId, NodeId, ServiceId, TaskId
from hivewire.records import (
    MESH_KEY,
    GuardRecord,
    MeshRecord,
    QuarantineKind,
    QuarantineRecord,
    encode,
    guard_key,
    key_of,
)
from hivewire.store.memory import MemoryStore
from hivewire.workqueue import WorkQueue
from tests.fakes.clock import FakeClock
from tests.fakes.overlays import FakeEdges, FakeOverlays, FakeSpace
from tests.fakes.signatures import Unsigned

NETWORK = NetworkId("abcdefghij0123456789")
FILE = "1-abcdefghij"
DEFAULT = GuardRecord(network=NETWORK, name="app", enforced=(ServiceId("api"),))
STRICT = GuardRecord(network=NETWORK, name="app", strict=True, enforced=DEFAULT.enforced, exempt=(ServiceId("spy"),))
API = Holder(ContainerId("1"), ServiceId("api"), IPv4Address("10.0.1.3"), "", Stage.COMING)
WIRED = msgspec.structs.replace(STRICT, vnis=(4097,))
EDGE = "hivewire-abcdefghij"
SPY = Holder(ContainerId("2"), ServiceId("spy"), IPv4Address("10.0.1.4"), "", Stage.ATTACHED)


class Rig:
    """One node with one overlay namespace, and the guard, which can be started again."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.store = MemoryStore(self.clock)
        self.overlays = FakeOverlays()
        self.edges = FakeEdges()
        self.local: LocalNetwork | None = LocalNetwork()
        self.asked = 0
        self.naps = 0
        self.spared: set[ContainerId] = set()
        self.mounts_after = 0
        self.space = self.add(FILE)
        self.signatures = Unsigned()
        self.start()

    def add(self, file: str) -> FakeSpace:
        self.overlays.spaces[file] = space = FakeSpace()
        return space

    def start(self) -> None:
        self.queue: WorkQueue[str] = WorkQueue(clock=self.clock, jitter=lambda: 1.0)
        self.guard = GuardReconciler(
            networks=self, overlays=self.overlays, edges=self.edges, store=self.store, queue=self.queue,
            book=Book(self.signatures),
            node=NodeId("n1"),
            monotonic=self.clock,
            sleep=self._sleep,
            spares=lambda container: container in self.spared,
        )  # fmt: skip

    def network(self, network: NetworkId, name: str) -> LocalNetwork:
        self.asked += 1
        assert (network, name) == (NETWORK, "app")
        if self.local is None:
            raise SwarmUnavailable("the engine does not answer")
        return self.local

    def _sleep(self, seconds: float) -> None:
        self.naps += 1
        self.clock.advance(seconds)
        if self.naps == self.mounts_after:
            self.overlays.unmounted.clear()

    def put(self, record: GuardRecord) -> None:
        self.store.put(guard_key(record.network), encode(record))

    def mesh(self, *, settled: bool = True) -> None:
        self.store.put(MESH_KEY, encode(MeshRecord(mesh="m", settled=settled)))

    def read(self) -> None:
        """Let the mirror read what is in the store."""
        for _ in range(4):
            self.clock.advance(1.0)
            self.guard.mirror.step(0.0)

    def work(self) -> list[str]:
        """Do what is due; returns the operations."""
        ops = []
        while (file := self.queue.get(0.0)) is not None:
            ops += self.guard.reconcile(file).ops
            self.queue.done(file)
        return ops


@pytest.fixture
def rig() -> Rig:
    return Rig()


def text_of(record: GuardRecord, *holders: Holder) -> str:
    return render(guard(record, LocalNetwork(holders)))[0]


def test_a_record_becomes_rules_and_a_second_pass_nothing(rig: Rig) -> None:
    """Records and facts make the table; when nothing changed nothing is done."""
    rig.put(DEFAULT)
    rig.mesh()
    rig.local = LocalNetwork((API, SPY))
    rig.read()
    assert rig.work() == ["close 10.0.1.3"]
    assert rig.space.text == text_of(DEFAULT, API, SPY)
    rig.guard.resync()
    assert rig.work() == []
    assert len(rig.space.applied) == 1


@pytest.mark.parametrize("quarantined", [False, True])
def test_a_manager_that_the_engine_has_not_heard_of(rig: Rig, quarantined: bool) -> None:
    """Its guards and quarantines count a moment after the engine names it, and then nothing is looked at again."""
    rig.local = LocalNetwork((API, replace(SPY, task=TaskId("spy.1"))))
    if quarantined:
        rig.put(DEFAULT)
        rig.read()
        rig.work()
    rig.signatures.knows_managers = False
    if quarantined:
        shut = QuarantineRecord(kind=QuarantineKind.TASK, id="spy.1", name="spy.1")
        rig.store.put(key_of(shut), encode(shut))
    else:
        rig.put(WIRED)
    rig.read()
    assert rig.work() == []
    rig.signatures.knows_managers = True
    rig.clock.advance(DOUBT_S)
    assert rig.work()
    assert quarantined or EDGE in rig.edges.texts
    rig.clock.advance(DOUBT_S)
    rig.work()
    asked = rig.asked
    rig.clock.advance(DOUBT_S)
    rig.work()
    assert rig.asked == asked


def test_a_new_manager_s_strict_network_gets_its_edge_on_a_node_without_tasks(rig: Rig) -> None:
    """Nothing else would have the guard look again there."""
    rig.overlays.spaces.clear()
    rig.signatures.knows_managers = False
    rig.put(WIRED)
    rig.read()
    assert rig.work() == []
    rig.signatures.knows_managers = True
    rig.clock.advance(DOUBT_S)
    rig.work()
    assert EDGE in rig.edges.texts


def test_an_engine_event_closes_a_new_task(rig: Rig) -> None:
    """A container that appears is guarded with the next pass over its network; other networks are left alone."""
    rig.put(DEFAULT)
    rig.read()
    rig.work()
    rig.local = LocalNetwork((API,))
    rig.guard.on_network(NetworkId("another"))
    assert rig.work() == []
    rig.guard.on_network(NETWORK)
    assert rig.work() == ["close 10.0.1.3"]


def test_a_task_is_closed_by_its_port_once_that_is_known(rig: Rig) -> None:
    """The engine's answer comes later than the task's address: then the port that leads to it is closed as well."""
    rig.local = LocalNetwork((replace(API, stage=Stage.ATTACHED), SPY))
    rig.space.behind = {"/netns/api": frozenset({12}), "/netns/spy": frozenset({14})}
    for record, sign in ((DEFAULT, "iif { 12 } counter"), (STRICT, "iif { 12 } goto")):
        rig.put(record)
        rig.mesh()
        rig.read()
        rig.work()
        assert "iif" not in rig.space.text.replace("iifname", "")
        paths = zip(rig.local.holders, ("/netns/api", "/netns/spy"), strict=True)
        rig.local = LocalNetwork(tuple(replace(holder, sandbox=path) for holder, path in paths))
        rig.guard.on_network(None)
        rig.work()
        assert sign in rig.space.text
        assert "14" not in re.sub(r'comment "\w+"', "", rig.space.text)
        rig.local = LocalNetwork(tuple(replace(holder, sandbox="") for holder in rig.local.holders))


@pytest.mark.parametrize("record", [DEFAULT, STRICT], ids=["default", "strict"])
@pytest.mark.parametrize(("kind", "id_"), [("service", "spy"), ("task", "spy.1"), ("node", "n1")])
def test_a_quarantine_closes_whom_no_mode_does(rig: Rig, record: GuardRecord, kind: str, id_: str) -> None:
    """A task that is not enforced is open, until it is shut out by itself, with its service or its node."""
    rig.local = LocalNetwork((API, replace(SPY, task=TaskId("spy.1"))))
    rig.put(record)
    rig.mesh()
    rig.read()
    rig.work()
    quarantine = QuarantineRecord(kind=QuarantineKind(kind), id=id_, name="x", since=1.0)
    for released in (False, True, False):
        rig.store.put(key_of(quarantine), encode(msgspec.structs.replace(quarantine, released=released)))
        rig.read()
        rig.work()
        shut = frozenset() if released else frozenset({SPY.container})
        assert rig.space.text == render(guard(record, rig.local, shut_out=shut))[0]
    assert render(guard(record, rig.local))[0] != rig.space.text
    other = msgspec.structs.replace(quarantine, id="other")
    rig.store.put(key_of(other), encode(other))
    rig.store.put(key_of(quarantine), encode(msgspec.structs.replace(quarantine, released=True)))
    rig.read()
    rig.work()
    assert render(guard(record, rig.local))[0] == rig.space.text


def test_a_container_without_networks_is_looked_at_again_soon(rig: Rig) -> None:
    """The engine names the networks of a new container a moment later, and no event says when."""
    rig.put(DEFAULT)
    rig.read()
    rig.work()
    rig.local = LocalNetwork(is_forming=True)
    rig.guard.on_network(None)
    rig.work()
    rig.local = LocalNetwork((API,))
    rig.clock.advance(FORMING_S)
    assert rig.work() == ["close 10.0.1.3"]


def test_counters_go_over_to_the_next_table(rig: Rig) -> None:
    """A replacement is given what the old table counted."""
    rig.put(DEFAULT)
    rig.read()
    rig.work()
    rig.space.counts = {FROM_TASKS: Count(5, 500)}
    rig.local = LocalNetwork((API,))
    rig.guard.on_network(None)
    rig.work()
    assert rig.space.counts == {FROM_TASKS: Count(5, 500)}
    assert rig.guard.counts() == {FILE: {FROM_TASKS: Count(5, 500)}}


def test_a_new_strict_namespace_is_shut_without_the_engine(rig: Rig) -> None:
    """The moment its file is there it is shut, though the engine does not answer; what is exempt opens later."""
    rig.put(STRICT)
    rig.read()
    rig.local = None
    rig.overlays.spaces.clear()
    space = rig.add(FILE)
    outcome = rig.guard.on_created(FILE)
    assert outcome is not None
    assert outcome.ops == ("open only nothing",)
    assert outcome.since_created_s == 0.0
    assert (space.text, rig.asked) == (render(SHUT)[0], 0)
    with pytest.raises(SwarmUnavailable):
        rig.work()
    rig.queue.done(FILE)
    rig.local = LocalNetwork((API, SPY))
    rig.guard.on_network(None)
    assert rig.work() == ["open only 10.0.1.4"]
    assert rig.guard.on_created(FILE) is None, "it is guarded: nothing is shut again"


def test_a_strict_namespace_found_open_is_shut_first(rig: Rig) -> None:
    """Where the watch missed the file, the pass itself shuts before it asks the engine."""
    rig.put(STRICT)
    rig.read()
    rig.local = None
    with pytest.raises(SwarmUnavailable):
        rig.work()
    assert rig.space.text == render(SHUT)[0]


def test_a_new_file_is_waited_for_until_it_is_mounted(rig: Rig) -> None:
    """The engine makes the file first; a moment later it is a namespace."""
    rig.put(STRICT)
    rig.read()
    rig.overlays.unmounted.add(FILE)
    rig.mounts_after = 3
    outcome = rig.guard.on_created(FILE)
    assert outcome is not None
    assert outcome.since_created_s == pytest.approx(0.003)


def test_a_file_that_is_never_mounted_is_given_up(rig: Rig) -> None:
    """It holds nobody up for longer than the mount may take, and is tried again by the loop."""
    rig.put(STRICT)
    rig.read()
    rig.overlays.unmounted.add(FILE)
    with pytest.raises(NamespaceGone):
        rig.guard.on_created(FILE)
    assert rig.naps <= MOUNT_S / 0.001 + 1
    with pytest.raises(NamespaceGone):
        rig.work()
    rig.overlays.spaces.clear()
    assert rig.guard.reconcile(FILE).summary == "is gone"


def test_a_default_namespace_is_left_to_the_loop(rig: Rig) -> None:
    """Whom to close is for the engine to say; the new file is only queued."""
    rig.put(DEFAULT)
    rig.read()
    rig.work()
    assert rig.guard.on_created(FILE) is None
    assert rig.queue.get(0.0) == FILE
    assert rig.guard.on_created("lb_abcdefghi") is None


@pytest.mark.parametrize("record", [DEFAULT, STRICT], ids=["default", "strict"])
def test_the_next_agent_adopts_what_is_there(rig: Rig, record: GuardRecord) -> None:
    """A restart changes no rule, and before the store answers nothing is touched at all."""
    rig.put(record)
    rig.mesh()
    rig.local = LocalNetwork((API, SPY))
    rig.read()
    rig.work()
    before = list(rig.space.applied)
    rig.start()
    rig.guard.resync()
    rig.work()
    rig.read()
    rig.work()
    assert rig.space.applied == before


def test_a_record_without_services_removes_the_guard(rig: Rig) -> None:
    """The controller says that nobody is enforced on the network any more: the guard goes. A deletion says nothing."""
    rig.put(DEFAULT)
    rig.mesh()
    rig.read()
    rig.work()
    rig.store.delete(guard_key(NETWORK))
    rig.read()
    assert rig.work() == []
    rig.put(msgspec.structs.replace(DEFAULT, enforced=()))
    rig.read()
    assert rig.work() == ["remove the guard"]
    assert rig.space.text == ""
    rig.guard.resync()
    assert rig.work() == []


def test_a_wiped_store_removes_nothing(rig: Rig) -> None:
    """A listing without the record keeps the guard, after the hold and in a settled mesh too."""
    rig.put(STRICT)
    rig.mesh()
    rig.local = LocalNetwork((API, SPY))
    rig.read()
    rig.work()
    text = rig.space.text
    rig.store = MemoryStore(rig.clock)
    rig.start()
    for _ in range(2):
        rig.read()
        rig.guard.resync()
        assert rig.work() == []
        rig.clock.advance(HOLD_S)
    rig.mesh(settled=False)
    rig.read()
    rig.guard.resync()
    assert rig.work() == []
    rig.mesh()
    rig.read()
    rig.guard.resync()
    assert rig.work() == []
    assert rig.space.text == text


def test_networks_without_a_record_are_never_touched(rig: Rig) -> None:
    """Ingress, and networks that nobody enforced is on, keep their namespaces as they are."""
    other = rig.add("1-ingress000")
    rig.put(STRICT)
    rig.mesh()
    rig.read()
    rig.work()
    assert other.applied == []
    assert rig.guard.reconcile("1-ingress000").summary == "no guard known"


def test_a_strict_network_is_shut_at_the_edge_before_its_first_task(rig: Rig) -> None:
    """Nothing of the network is on the node yet: its VXLAN frames are closed by the record alone, once."""
    del rig.overlays.spaces[FILE]
    rig.put(WIRED)
    rig.mesh()
    rig.read()
    rig.work()
    assert rig.edges.texts == {EDGE: edge.render(WIRED)[0]}
    rig.edges.texts[EDGE] += "# kept"
    rig.guard.resync()
    rig.work()
    assert rig.edges.texts[EDGE].endswith("# kept"), "a second pass writes nothing"
    assert rig.asked == 0


def test_the_edge_lets_through_what_the_guard_does_and_outlives_its_namespace(rig: Rig) -> None:
    """Exempt local ends pass while they are here; when the last task has left, none does."""
    rig.local = LocalNetwork((SPY,))
    rig.put(WIRED)
    rig.mesh()
    rig.read()
    rig.work()
    assert rig.edges.texts == {EDGE: edge.render(WIRED, [SPY.address])[0]}
    del rig.overlays.spaces[FILE]
    rig.start()
    rig.read()
    rig.work()
    assert rig.edges.texts == {EDGE: edge.render(WIRED)[0]}


@pytest.mark.parametrize("record", [DEFAULT, STRICT], ids=["default", "no identifiers yet"])
def test_without_strict_or_identifiers_there_is_no_edge(rig: Rig, record: GuardRecord) -> None:
    """The default guard has none, and of a network whose frames nobody can tell there can be none."""
    rig.put(record)
    rig.mesh()
    rig.read()
    rig.work()
    assert rig.edges.texts == {}


@pytest.mark.parametrize("is_here", [True, False])
def test_the_edge_goes_by_a_managers_word_alone(rig: Rig, *, is_here: bool) -> None:
    """A deleted record leaves it; a record without services, which a manager signed, removes it."""
    if not is_here:
        del rig.overlays.spaces[FILE]
    rig.put(WIRED)
    rig.mesh()
    rig.read()
    rig.work()
    rig.store.delete(guard_key(NETWORK))
    rig.read()
    rig.clock.advance(HOLD_S)
    rig.guard.resync()
    rig.work()
    assert EDGE in rig.edges.texts
    rig.put(GuardRecord(network=NETWORK, name="app"))
    rig.read()
    rig.work()
    assert rig.edges.texts == {}


def test_an_identifier_that_another_network_has_now_is_let_go(rig: Rig) -> None:
    """The edge of a network that is gone does not close the one that Swarm gave its identifier to."""
    gone = msgspec.structs.replace(WIRED, network=NetworkId("zyxwvutsrq0123456789"))
    other = msgspec.structs.replace(gone, network=NetworkId("1234567890zzzzzzzzzz"), vnis=(5000,))
    for record in (gone, other):
        rig.edges.apply(edge.table_of(record.network), edge.render(record)[0])
    rig.mesh()
    rig.read()
    rig.guard.resync()
    rig.work()
    assert len(rig.edges.texts) == 2
    rig.space.vnis = frozenset({4097})
    rig.guard.resync()
    rig.work()
    assert list(rig.edges.texts) == [edge.table_of(other.network)]


# -- tasks that ran in clear until now --------------------------------------------------------------------------


def test_a_running_task_is_spared_until_its_time_is_over(rig: Rig) -> None:
    """It ran in clear until the record came; another one of the service, which did not, is closed at once."""
    running = replace(API, stage=Stage.ATTACHED)
    late = Holder(ContainerId("3"), API.service, IPv4Address("10.0.1.9"), "", Stage.COMING)
    rig.spared = {running.container}
    rig.local = LocalNetwork((running, late))
    rig.put(DEFAULT)
    rig.read()
    rig.work()
    assert rig.space.text == render(guard(DEFAULT, LocalNetwork((late,))))[0]
    rig.spared.clear()
    rig.clock.advance(1)
    rig.read()
    rig.work()
    assert rig.space.text == render(guard(DEFAULT, rig.local))[0]


def test_what_is_closed_is_not_opened_for_anybody(rig: Rig) -> None:
    """Neither by the guard that closed it nor by one after a restart, which only finds a table."""
    rig.local = LocalNetwork((API,))
    rig.put(DEFAULT)
    rig.read()
    rig.work()
    shut = rig.space.text
    rig.spared = {API.container}
    for again in (lambda: None, rig.start):
        again()
        rig.guard.resync()
        rig.read()
        rig.work()
        assert rig.space.text == shut


def test_a_strict_network_spares_nobody(rig: Rig) -> None:
    """Strict means that nothing passes which is not known to be exempt."""
    running = replace(API, stage=Stage.ATTACHED)
    rig.spared = {running.container}
    rig.local = LocalNetwork((running,))
    rig.put(STRICT)
    rig.read()
    rig.work()
    assert rig.space.text == render(guard(STRICT, rig.local))[0]
