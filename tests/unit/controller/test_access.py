"""Users and roles of etcd from the Swarm's nodes, and who keeps them so."""

import itertools
import threading
from typing import Any, cast

import pytest

from controller.access import desired_access, plan_access
from controller.access_keeper import RESYNC_S, AccessKeeper, AccessStore
from controller.leader import LeaderRecord, Leadership
from controller.settings import ControllerSettings
from controller.swarm.snapshot import Node
from hivewire.errors import InvalidSettings, NoPermission, NotLeader, StoreUnavailable
from hivewire.ids import NodeId
from hivewire.store.api import ROOT, Access, AccessOp, AddUser, EnableAccess, GiveRole
from hivewire.store.memory import MemoryStore
from tests.fakes.clock import FakeClock

M1, W1, W2 = NodeId("m1"), NodeId("w1"), NodeId("w2")
MANAGER, WORKER, OTHER = Node(M1, "m1", is_manager=True), Node(W1, "w1"), Node(W2, "w2")
OFF = Access(False, {}, {})


def apply(ops: tuple[AccessOp, ...], store: MemoryStore) -> Access:
    for op in ops:
        store.change_access(op)
    return store.access()


def test_the_first_plan_in_words() -> None:
    """Roles before users, users before it is enabled; a worker gets its own records, a manager the role root."""
    assert [str(op) for op in plan_access(desired_access([WORKER, MANAGER]), OFF)] == [
        "add role agent",
        "let role agent read /hivewire/v1/guards/ up to /hivewire/v1/guards0",
        "let role agent read /hivewire/v1/mesh up to /hivewire/v1/mesi",
        "let role agent read /hivewire/v1/peers/ up to /hivewire/v1/peers0",
        "let role agent read /hivewire/v1/policies/ up to /hivewire/v1/policies0",
        "let role agent read /hivewire/v1/quarantines/ up to /hivewire/v1/quarantines0",
        "add role node-w1",
        "let role node-w1 readwrite /hivewire/v1/claims/w1/ up to /hivewire/v1/claims/w10",
        "let role node-w1 readwrite /hivewire/v1/nodes/w1",
        "let role node-w1 readwrite /hivewire/v1/status/w1/ up to /hivewire/v1/status/w10",
        "add role root",
        "add user m1",
        "give m1 role root",
        "add user root",
        "give root role root",
        "add user w1",
        "give w1 role agent",
        "give w1 role node-w1",
        "enable access control",
    ]


CLUSTERS = [desired_access(nodes) for n in range(4) for nodes in itertools.combinations((MANAGER, WORKER, OTHER), n)]
CLUSTERS += [desired_access([Node(W1, "w1", is_manager=True), MANAGER]), desired_access([Node(M1, "m1"), WORKER])]


@pytest.mark.parametrize("desired", CLUSTERS)
@pytest.mark.parametrize("observed", CLUSTERS)
def test_any_plan_stopped_anywhere(desired: Access, observed: Access) -> None:
    """From any cluster to any other, begun anew after each step: it gets there, and then there is nothing to do."""
    store = MemoryStore()
    apply(plan_access(observed, OFF), store)
    for _ in range(200):
        ops = plan_access(desired, store.access())
        if not ops:
            break
        apply(ops[:1], store)
    assert store.access() == desired


@pytest.mark.parametrize("stop", range(25))
def test_enabling_stopped_anywhere(stop: int) -> None:
    """A controller that dies while it sets access up, over what somebody else left, is finished by the next one."""
    store = MemoryStore()
    apply((AddUser("x"), AddUser(ROOT), GiveRole("x", ROOT)), store)
    desired = desired_access([MANAGER, WORKER])
    apply(plan_access(desired, store.access())[:stop], store)
    assert apply(plan_access(desired, store.access()), store) == desired


def test_who_stays_never_loses_access_in_between() -> None:
    """While others come, go and change sides, no step takes from a node what it has before and after."""
    before, after = desired_access([MANAGER, WORKER]), desired_access([MANAGER, Node(W1, "w1", is_manager=True), OTHER])
    store = MemoryStore()
    apply(plan_access(before, OFF), store)
    for op in plan_access(after, store.access()):
        store.change_access(op)
        store.as_user(M1).put("k", b"")
        store.as_user(W1).put("/hivewire/v1/nodes/w1", b"")


class Counting:
    """A store that counts what it is asked, and can refuse."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.reads = 0
        self.changes = 0
        self.error: Exception | None = None

    def access(self) -> Access:
        self.reads += 1
        if self.error:
            raise self.error
        return self.store.access()

    def change_access(self, op: AccessOp) -> None:
        self.changes += 1
        self.store.change_access(op)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


class Rig:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.store = MemoryStore(self.clock)
        self.asked = Counting(self.store)
        self.leadership = Leadership(
            self.store, LeaderRecord(node=M1, hostname="m1"), lambda: None, monotonic=self.clock
        )
        self.keeper = AccessKeeper(cast(AccessStore, self.asked), self.leadership, M1, monotonic=self.clock)

    def step(self, *nodes: Node) -> None:
        self.keeper.on_nodes({node.id: node for node in nodes})
        self.leadership.step()
        self.keeper.step()


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_it_keeps_access_equal_to_the_nodes(rig: Rig) -> None:
    """Nodes that come, go, are promoted or demoted are followed."""
    for nodes in ([MANAGER], [MANAGER, WORKER], [MANAGER, Node(W1, "w1", is_manager=True)], [MANAGER, OTHER]):
        rig.step(*nodes)
        assert rig.store.access() == desired_access(nodes)


def test_records_of_a_node_that_left_go(rig: Rig) -> None:
    """Its claims and statuses go with its access, however many, also where the first try fails; others' stay."""
    rig.step(MANAGER, WORKER, OTHER)
    theirs = [f"/hivewire/v1/{kind}/w1/t{n}" for kind in ("claims", "status") for n in range(100)]
    for key in (*theirs, "/hivewire/v1/claims/w10/t", "/hivewire/v1/claims/w2/t"):
        rig.store.put(key, b"1")
    rig.store.faults.lose_next_answers(1)
    with pytest.raises(StoreUnavailable):
        rig.step(MANAGER, OTHER)
    rig.step(MANAGER, OTHER)
    assert [item.key for item in rig.store.list("/hivewire/v1/claims/").items] == [
        "/hivewire/v1/claims/w10/t",
        "/hivewire/v1/claims/w2/t",
    ]
    assert rig.store.list("/hivewire/v1/status/").items == ()


def test_a_quiet_swarm_asks_nothing(rig: Rig) -> None:
    """Looking again at the same nodes calls nothing until the slow resync, which reads once and repairs."""
    rig.step(MANAGER, WORKER)
    asked = (rig.asked.reads, rig.asked.changes)
    for _ in range(100):
        rig.step(MANAGER, WORKER)
    assert (rig.asked.reads, rig.asked.changes) == asked
    rig.store.change_access(AddUser("guest"))
    for _ in range(int(RESYNC_S / 5)):
        rig.clock.advance(5)
        rig.leadership.step()
    rig.step(MANAGER, WORKER)
    assert rig.asked.reads == asked[0] + 1
    assert "guest" not in rig.store.access().users


def test_a_wiped_store_is_closed_again(rig: Rig) -> None:
    """An etcd that begins anew has no access control: the next term of the leader sets it up."""
    rig.step(MANAGER, WORKER)
    rig.store.faults.wipe()
    rig.step(MANAGER, WORKER)
    assert rig.store.access() == desired_access([MANAGER, WORKER])


def test_only_the_leader_writes(rig: Rig) -> None:
    """A follower does not even ask."""
    rig.keeper.on_nodes({M1: MANAGER})
    with pytest.raises(NotLeader):
        rig.keeper.step()
    assert (rig.asked.reads, rig.asked.changes) == (0, 0)


@pytest.mark.parametrize("nodes", [(), (WORKER,), (Node(M1, "m1"), WORKER)])
def test_it_never_takes_its_own_access(rig: Rig, nodes: tuple[Node, ...]) -> None:
    """A reading of the Swarm in which this controller's node is no manager, or is missing, changes nothing."""
    rig.step(MANAGER, WORKER)
    before = rig.store.access()
    rig.step(*nodes)
    assert rig.store.access() == before


@pytest.mark.parametrize("error", [StoreUnavailable("no etcd"), NoPermission("not you")])
def test_what_fails_is_shown_and_tried_again(rig: Rig, error: Exception) -> None:
    """`check` shows the last error, and after it access is read anew and set right."""
    rig.leadership.step()
    rig.asked.error = error
    stop = threading.Event()
    thread = threading.Thread(target=rig.keeper.run, args=(stop,))
    thread.start()
    rig.keeper.on_nodes({M1: MANAGER})
    done = threading.Event()
    while rig.keeper.component().is_ok:
        done.wait(0.01)
    assert rig.keeper.component().detail == str(error)
    rig.asked.error = None
    rig.keeper.wake()
    while not rig.keeper.component().is_ok:
        done.wait(0.01)
    stop.set()
    rig.keeper.wake()
    thread.join()
    assert rig.store.access() == desired_access([MANAGER])


def test_an_etcd_of_ones_own_takes_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """Access control of an existing cluster is turned on only where somebody says so."""
    for name in ("ETCD_ENDPOINTS", "ETCD_CERT", "ETCD_ACCESS"):
        monkeypatch.delenv(f"HIVEWIRE_{name}", raising=False)
    assert ControllerSettings().manages_access
    assert not ControllerSettings(etcd_access="external").manages_access
    assert ControllerSettings(etcd_access="managed", etcd_endpoints="a:1").manages_access
    with pytest.raises(InvalidSettings, match="HIVEWIRE_ETCD_ACCESS"):
        assert ControllerSettings(etcd_endpoints="a:1").manages_access


def test_enabling_is_last() -> None:
    """Nobody is shut out for a moment: when it is enabled everything else is in place."""
    ops = plan_access(desired_access([MANAGER, WORKER]), OFF)
    assert ops[-1] == EnableAccess()
    assert ops.count(EnableAccess()) == 1
