"""A quarantine as the agent sees it: its own tasks are closed, everybody else's vanish, and a release undoes it."""

from ipaddress import IPv4Address

import pytest

from agent.book import HOLD_S
from agent.ops import AddPeer, ForgetFlows, RemovePeer, RemoveRoute, SetRules
from agent.rules.closed import is_closed
from hivewire.ids import NodeId
from hivewire.records import Mode, QuarantineKind, QuarantineRecord, encode, quarantine_key
from tests.unit.agent.test_task_reconciler import NODE, VIP, WEB, Rig, kinds
from tests.unit.agent.values import OWN, link, peer, policy, public_key

DB_5 = IPv4Address("10.1.0.5")
OWN_KINDS = [
    pytest.param(QuarantineKind.SERVICE, "id-web", id="service"),
    pytest.param(QuarantineKind.TASK, "web.1", id="task"),
    pytest.param(QuarantineKind.NODE, NODE.node, id="node"),
]


def shut_out(rig: Rig, kind: QuarantineKind, id_: str) -> None:
    rig.store.put(quarantine_key(kind, id_), encode(QuarantineRecord(kind=kind, id=id_, name=id_)))


def release(rig: Rig, kind: QuarantineKind, id_: str) -> None:
    record = QuarantineRecord(kind=kind, id=id_, name=id_, released=True)
    rig.store.put(quarantine_key(kind, id_), encode(record))


@pytest.fixture
def up() -> Rig:
    """A task of web that is in the mesh, linked with one task of db, and talking to it."""
    rig = Rig()
    rig.mesh(WEB, peer(5))
    rig.run_task()
    rig.settle()
    rig.take_ops()
    rig.namespace.flows = {(IPv4Address(OWN), DB_5), (IPv4Address(OWN), IPv4Address("172.18.0.1"))}
    return rig


@pytest.mark.parametrize(("kind", "id_"), OWN_KINDS)
def test_own_task_is_closed_and_released(up: Rig, kind: QuarantineKind, id_: str) -> None:
    """A task that is shut out is closed in one pass, its connections forgotten, and comes back with the same key."""
    key, claim = up.device.public_key, up.claim()
    shut_out(up, kind, id_)
    up.settle()
    assert kinds(up.take_ops()) == [SetRules, ForgetFlows, RemovePeer]
    assert is_closed(up.namespace.rules)
    assert up.namespace.flows == {(IPv4Address(OWN), IPv4Address("172.18.0.1"))}
    assert (up.status().quarantined, up.status().mode) == (True, Mode.ENFORCE)
    assert up.claim() == claim
    assert up.hold_over() != []
    assert up.take_ops() == []

    release(up, kind, id_)
    up.settle()
    assert kinds(up.take_ops())[:2] == [AddPeer, SetRules]
    assert not is_closed(up.namespace.rules)
    assert (up.status().quarantined, up.device.public_key) == (False, key)


@pytest.mark.parametrize(
    ("kind", "id_"), [(QuarantineKind.SERVICE, "id-db"), (QuarantineKind.TASK, "db.5"), (QuarantineKind.NODE, "node-2")]
)
def test_peer_of_a_quarantine_goes(up: Rig, kind: QuarantineKind, id_: str) -> None:
    """A peer that is shut out goes at once with its connections, though its record may still be there."""
    shut_out(up, kind, id_)
    up.settle()
    assert kinds(up.take_ops()) == [SetRules, RemoveRoute, ForgetFlows, RemovePeer]
    assert up.device.peers == {}
    assert not up.status().quarantined
    release(up, kind, id_)
    up.settle()
    assert set(up.device.peers) == {public_key(5)}


@pytest.mark.parametrize(
    ("kind", "id_"), [(QuarantineKind.SERVICE, "id-lb"), (QuarantineKind.TASK, "x"), (QuarantineKind.NODE, "node-9")]
)
def test_quarantine_of_others_changes_nothing(up: Rig, kind: QuarantineKind, id_: str) -> None:
    """Who has nothing to do with it is not touched."""
    shut_out(up, kind, id_)
    up.settle()
    assert up.take_ops() == []


def test_labels_do_not_undo_it(up: Rig) -> None:
    """Whatever becomes of the policy, off too, a quarantined task stays closed."""
    shut_out(up, QuarantineKind.SERVICE, "id-web")
    up.settle()
    for changed in (policy(mode=Mode.OBSERVE, out=[link("db", "5432", vip=VIP)]), policy(mode=Mode.OFF)):
        up.put(changed)
        up.settle()
        assert is_closed(up.namespace.rules)
    release(up, QuarantineKind.SERVICE, "id-web")
    up.settle()
    assert (up.namespace.rules, up.namespace.device) == ("", None)


def test_task_outside_of_the_mesh_is_closed_too(rig: Rig) -> None:
    """A task without a policy gets the rules and no interface; its release leaves nothing."""
    rig.mesh()
    shut_out(rig, QuarantineKind.SERVICE, "id-web")
    rig.run_task()
    rig.settle()
    assert is_closed(rig.namespace.rules)
    assert rig.namespace.device is None
    assert rig.status().quarantined
    release(rig, QuarantineKind.SERVICE, "id-web")
    rig.settle()
    assert rig.namespace.rules == ""
    assert rig.stored() == {}


def test_new_task_of_a_quarantined_service(rig: Rig) -> None:
    """A task that starts in quarantine never gets a peer, and is made as usual after the release."""
    rig.mesh(WEB, peer(5))
    shut_out(rig, QuarantineKind.SERVICE, "id-web")
    rig.run_task()
    rig.settle()
    assert kinds(rig.take_ops()) == [SetRules]
    release(rig, QuarantineKind.SERVICE, "id-web")
    rig.settle()
    assert set(rig.device.peers) == {public_key(5)}


def test_incomplete_store_closes_all_the_same(up: Rig) -> None:
    """While the store is being filled nothing goes for being absent, but a quarantine is a record that is there."""
    up.mesh(settled=False)
    shut_out(up, QuarantineKind.TASK, "web.1")
    up.settle()
    assert (up.device.peers, is_closed(up.namespace.rules)) == ({}, True)


def test_unreadable_quarantine_counts(up: Rig) -> None:
    """A record that cannot be read still shuts out whom its key names."""
    up.store.put(quarantine_key(QuarantineKind.TASK, "web.1"), b"{")
    up.settle()
    assert is_closed(up.namespace.rules)


def test_a_deletion_releases_nobody(up: Rig) -> None:
    """Whoever gets at the store can delete the record; only one that says so ends a quarantine, after a restart too."""
    shut_out(up, QuarantineKind.SERVICE, "id-web")
    up.settle()
    up.store.delete(quarantine_key(QuarantineKind.SERVICE, "id-web"))
    up.settle()
    assert is_closed(up.namespace.rules)
    up.hold_over()
    assert is_closed(up.namespace.rules)
    up.start()
    up.agent.resync()
    up.settle()
    assert is_closed(up.namespace.rules)
    release(up, QuarantineKind.SERVICE, "id-web")
    up.settle()
    assert not is_closed(up.namespace.rules)


def test_wiped_store_does_not_release(up: Rig) -> None:
    """A quarantine that a listing no longer shows is held, so that the controller can write it again."""
    shut_out(up, QuarantineKind.TASK, "web.1")
    up.settle()
    up.store.faults.wipe()
    up.mesh(WEB, peer(5), settled=False)
    up.settle()
    assert is_closed(up.namespace.rules)
    shut_out(up, QuarantineKind.TASK, "web.1")
    up.settle()
    up.clock.advance(HOLD_S)
    up.agent.resync()
    up.settle()
    assert is_closed(up.namespace.rules)


def test_restarted_agent_keeps_it_closed(up: Rig) -> None:
    """A new agent finds the namespace closed and leaves it so."""
    shut_out(up, QuarantineKind.NODE, NODE.node)
    up.settle()
    up.take_ops()
    up.start()
    up.agent.resync()
    up.settle()
    assert up.take_ops() == []
    assert is_closed(up.namespace.rules)


def test_reports_say_what_the_kernel_holds(up: Rig) -> None:
    """The report of an interface tells its rules, and whether they are those of a quarantine."""
    (before,) = up.agent.interfaces()
    assert (before.rules, before.quarantined) == (up.namespace.rules, False)
    shut_out(up, QuarantineKind.TASK, "web.1")
    up.settle()
    (after,) = up.agent.interfaces()
    assert (after.rules, after.quarantined, after.peers) == (up.namespace.rules, True, ())


def test_reports_go_on_while_the_engine_is_asked_again(up: Rig) -> None:
    """Between a resync and the pass after it no interface is missing."""
    up.agent.resync()
    assert len(up.agent.interfaces()) == 1


def test_node_of_a_peer_is_what_its_record_says(up: Rig) -> None:
    """A quarantine of a node takes only peers on that node."""
    up.put(peer(6))
    up.settle()
    shut_out(up, QuarantineKind.NODE, NodeId("node-1x"))
    up.settle()
    assert len(up.device.peers) == 2


@pytest.fixture
def rig() -> Rig:
    """An agent on a node without tasks."""
    return Rig()
