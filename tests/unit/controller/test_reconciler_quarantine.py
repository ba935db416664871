"""The controller and quarantines: no peer is published, and what a person decided outlives the store."""

import pytest

from controller.reconciler import AllTasks
from controller.swarm.snapshot import Task
from hivewire.errors import HivewireError
from hivewire.ids import ServiceId
from hivewire.records import (
    QUARANTINES,
    QuarantineKind,
    QuarantineRecord,
    encode,
    quarantine_key,
)
from tests.property.test_controller_rig import Cluster


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


def linked(cluster: Cluster) -> tuple[ServiceId, Task]:
    """A db with an admitted task."""
    _, db = cluster.shop()
    task = cluster.task(db)
    cluster.claim(task)
    cluster.settle()
    assert task.id in cluster.peers()
    return db, task


def shut_out(cluster: Cluster, kind: QuarantineKind, id_: str, reason: str = "odd", *, released: bool = False) -> None:
    record = QuarantineRecord(kind=kind, id=id_, name="shop_db", reason=reason, released=released)
    cluster.store.put(quarantine_key(kind, id_), encode(record))


@pytest.mark.parametrize("kind", QuarantineKind)
def test_no_peer_is_published(cluster: Cluster, kind: QuarantineKind) -> None:
    """While its service, task or node is quarantined a task is no peer, its claim refused; then it is one again."""
    db, task = linked(cluster)
    id_ = {QuarantineKind.SERVICE: db, QuarantineKind.TASK: task.id, QuarantineKind.NODE: task.node}[kind]
    shut_out(cluster, kind, id_)
    cluster.settle()
    assert task.id not in cluster.peers()
    (refused,) = cluster.one.reconciler.state().refused
    assert refused.reason == f"quarantined with {kind.value} shop_db: odd"
    assert cluster.resync() == 0

    shut_out(cluster, kind, id_, released=True)
    cluster.settle()
    assert task.id in cluster.peers()
    assert cluster.one.reconciler.state().refused == ()


def test_labels_do_not_undo_it(cluster: Cluster) -> None:
    """Other labels, a new task and another claim change nothing."""
    db, task = linked(cluster)
    shut_out(cluster, QuarantineKind.SERVICE, db)
    cluster.settle()
    cluster.swarm.set_labels(db, {"hivewire.ports": "5433"})
    cluster.swarm.settle()
    cluster.tell(db)
    cluster.claim(task, epoch=2)
    cluster.settle()
    assert cluster.peers() == {}


def test_state_shows_it(cluster: Cluster) -> None:
    """API and CLI get the records, and what was compiled with its ids."""
    db, _ = linked(cluster)
    shut_out(cluster, QuarantineKind.SERVICE, db)
    cluster.settle()
    state = cluster.one.reconciler.state()
    assert [(it.kind, it.id, it.reason) for it in state.quarantines] == [(QuarantineKind.SERVICE, db, "odd")]
    assert state.compiled.policies == state.policies


def test_wiped_store_gets_it_again(cluster: Cluster) -> None:
    """Nobody can derive a quarantine from Swarm: after a wipe the controller writes down again what it knew."""
    db, task = linked(cluster)
    shut_out(cluster, QuarantineKind.SERVICE, db)
    cluster.settle()
    before = cluster.stored(QUARANTINES)
    cluster.store.faults.wipe()
    cluster.claim(task)
    cluster.settle(3.0)
    assert cluster.stored(QUARANTINES) == before
    assert cluster.peers() == {}
    cluster.store.delete(quarantine_key(QuarantineKind.SERVICE, db))
    cluster.settle(2.0)
    assert cluster.stored(QUARANTINES) == before, "a deletion releases nobody"
    shut_out(cluster, QuarantineKind.SERVICE, db, released=True)
    cluster.settle(2.0)
    assert cluster.one.reconciler.state().quarantines == ()
    assert task.id in cluster.peers()
    cluster.swarm.remove_service(db)
    cluster.tell(db)
    cluster.settle(2.0)
    assert cluster.stored(QUARANTINES) == {}, "its service is gone"


def test_unknown_kind_is_looked_at_and_harms_nothing(cluster: Cluster) -> None:
    """A record of a kind that this version does not know is no error."""
    linked(cluster)
    cluster.store.put(f"{QUARANTINES}stack/shop", b"{}")
    cluster.settle()
    errors: list[HivewireError] = cluster.one.errors
    assert errors == []
    assert AllTasks() in cluster.one.worked
    assert cluster.one.reconciler.state().quarantines == ()


def test_a_new_store_does_not_wait_for_the_quarantined(cluster: Cluster) -> None:
    """A quarantined task that claims nothing does not keep the mesh unsettled."""
    db, _ = linked(cluster)
    assert not cluster.mesh().settled
    shut_out(cluster, QuarantineKind.SERVICE, db)
    for task in cluster.tasks(_web(cluster)):
        cluster.claim(task)
    cluster.settle(3.0)
    assert cluster.mesh().settled


def _web(cluster: Cluster) -> ServiceId:
    services = cluster.one.reconciler.state().swarm.services.values()
    return next(service.id for service in services if service.name == "shop_web")
