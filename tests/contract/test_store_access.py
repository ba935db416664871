"""What access control must do, asked of the in-memory store, and of a real etcd with certificates as Swarm's."""

import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from controller.access import desired_access, plan_access
from controller.swarm.snapshot import Node
from hivewire.errors import InvalidInput, LeaseExpired, NoPermission, RevisionConflict, StoreUnavailable
from hivewire.ids import NodeId, ServiceId, TaskId
from hivewire.records import (
    CLAIMS,
    GUARDS,
    LEADER_KEY,
    MESH_KEY,
    PEERS,
    POLICIES,
    QUARANTINES,
    claim_key,
    node_key,
    peer_key,
    peers_prefix,
    status_key,
)
from hivewire.store.api import (
    ROOT,
    Access,
    AddGrant,
    AddRole,
    AddUser,
    EnableAccess,
    GiveRole,
    Grant,
    IsAbsent,
    Put,
    RemoveGrant,
    RemoveRole,
    RemoveUser,
    TakeRole,
    TlsCredentials,
    WatchEvents,
)
from hivewire.store.etcd import EtcdSettings, EtcdStore
from hivewire.store.memory import MemoryStore, UserStore
from hivewire.store.mirror import Mirror, MirrorSettings
from tests.contract.etcd_certificates import Authority
from tests.contract.etcd_server import ABSENT, EtcdServer, wait_until

_numbers = itertools.count()
AnyStore = EtcdStore | UserStore
M1, W1, W2 = NodeId("m1"), NodeId("w1"), NodeId("w2")
TASK = TaskId("t1")
MANAGER, WORKER, OTHER = Node(M1, "m1", is_manager=True), Node(W1, "w1"), Node(W2, "w2")


@dataclass
class Site:
    """An empty store with access control off, and its stores as the Swarm's nodes open them."""

    open: Callable[[str], AnyStore]
    opened: dict[str, AnyStore] = field(default_factory=dict)

    def of(self, user: str) -> AnyStore:
        if user not in self.opened:
            self.opened[user] = self.open(user)
        return self.opened[user]

    def settle(self, *nodes: Node) -> None:
        """Make access what the controller wants for these nodes."""
        manager = self.of(M1)
        desired = desired_access(nodes)
        for op in plan_access(desired, manager.access()):
            manager.change_access(op)
        assert manager.access() == desired
        assert plan_access(desired, manager.access()) == ()


@pytest.fixture(params=["memory", "etcd"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    if request.param == "memory":
        memory = MemoryStore()
        yield Site(memory.as_user)
        memory.close()
        return
    if ABSENT:
        pytest.skip(ABSENT)
    authority = Authority()
    mine = authority.issue(M1, "swarm-manager")
    for name, pem in (("ca", authority.pem), ("cert", mine.cert_pem), ("key", mine.key_pem)):
        (tmp_path / name).write_bytes(pem)
    tls = [f"--cert-file={tmp_path}/cert", f"--key-file={tmp_path}/key", f"--trusted-ca-file={tmp_path}/ca"]
    server = EtcdServer(tmp_path, ["--client-cert-auth", *tls])
    server.start()

    def connect(user: str) -> EtcdStore:
        leaf = authority.issue(user, "swarm-manager" if user.startswith("m") else "swarm-worker")
        credentials = TlsCredentials(authority.pem, leaf.cert_pem, leaf.key_pem)
        return EtcdStore(EtcdSettings((server.endpoint,), lambda: credentials))

    found = Site(connect)
    yield found
    for store in found.opened.values():
        store.close()
    server.kill()


def refuses(what: Callable[[], object]) -> bool:
    try:
        what()
    except NoPermission:
        return True
    return False


def test_before_it_is_enabled_everybody_may_everything(site: Site) -> None:
    """A fresh store has no users, and asks nobody who it is."""
    assert site.of(W1).access() == Access(False, {}, {})
    site.of(W1).put(LEADER_KEY, b"x")
    site.of(W1).change_access(AddUser("x"))


def test_what_was_there_before_it_was_enabled_goes(site: Site) -> None:
    """Users and roles that somebody made while nobody was asked are not kept, root with a role of theirs included."""
    worker = site.of(W1)
    for op in (AddRole("mine"), AddGrant("mine", Grant(PEERS)), AddUser(ROOT), GiveRole(ROOT, "mine"), AddUser("x")):
        worker.change_access(op)
    worker.change_access(GiveRole("x", ROOT))
    site.settle(MANAGER, WORKER)
    assert refuses(lambda: worker.put(PEERS, b""))


def test_a_worker_writes_its_own_records_alone(site: Site) -> None:
    """Own claims, statuses and node record may be written and read; everything else of another node or kind may not."""
    site.settle(MANAGER, WORKER, OTHER)
    worker = site.of(W1)
    own = (claim_key(W1, TASK), status_key(W1, TASK), node_key(W1))
    for key in own:
        worker.put(key, b"1")
        assert worker.get(key) is not None
    worker.txn((), [Put(key, b"2") for key in own[:2]])
    worker.delete(own[0])
    others = (
        claim_key(W2, TASK), claim_key(NodeId(f"{W1}x"), TASK), status_key(W2, TASK), node_key(W2),
        node_key(NodeId(f"{W1}0")), node_key(W1) + "/x", peer_key(ServiceId("s"), TASK), POLICIES + "s", GUARDS + "n",
        QUARANTINES + "node/w2", MESH_KEY, LEADER_KEY, "elsewhere",
    )  # fmt: skip
    for key in others:
        assert refuses(lambda key=key: worker.put(key, b"1")), key
        assert refuses(lambda key=key: worker.delete(key)), key
        assert refuses(lambda key=key: worker.txn((), (Put(own[0], b""), Put(key, b"")))), key
        site.of(M1).put(key, b"1")
    assert worker.get(own[0]) is None


def test_a_worker_reads_what_agents_follow(site: Site) -> None:
    """Everything that an agent's mirror lists and watches may be read, by prefix too; other nodes' records may not."""
    site.settle(MANAGER, WORKER, OTHER)
    worker = site.of(W1)
    for prefix in (
        MESH_KEY, POLICIES, POLICIES + "s", PEERS, peers_prefix(ServiceId("s")), GUARDS, QUARANTINES,
        f"{CLAIMS}{W1}/",
    ):  # fmt: skip
        worker.list(prefix)
        watch = worker.open_watch()
        watch.add(prefix, 0)
        assert watch.next(10) is not None
        watch.close()
    for prefix in (CLAIMS, f"{CLAIMS}{W2}/", node_key(W2), LEADER_KEY, "/hivewire/v1/", "p"):
        assert refuses(lambda prefix=prefix: worker.list(prefix)), prefix
        watch = worker.open_watch()
        watch.add(prefix, 0)
        assert refuses(lambda watch=watch: watch.next(10)), prefix
        watch.close()
    # A guard is a read: an agent cannot even ask who leads.
    assert refuses(lambda: worker.txn((IsAbsent(LEADER_KEY),), (Put(node_key(W1), b""),)))


def test_access_control_is_for_managers(site: Site) -> None:
    """A worker, and a node that has no user, can neither look at users and roles nor change them."""
    site.settle(MANAGER, WORKER)
    for user in (W1, W2):
        store = site.of(user)
        assert refuses(store.access)
        for op in (AddUser("x"), GiveRole(W1, ROOT), RemoveUser(M1), AddGrant("agent", Grant(PEERS)), EnableAccess()):
            assert refuses(lambda op=op, store=store: store.change_access(op)), op


def test_a_node_without_a_user_may_nothing(site: Site) -> None:
    """The certificate opens the connection, and nothing else; the words say that access is what it waits for."""
    site.settle(MANAGER, WORKER)
    stranger = site.of(W2)
    assert refuses(lambda: stranger.get(MESH_KEY))
    assert refuses(lambda: stranger.put(node_key(W2), b""))
    if isinstance(stranger, EtcdStore):
        with pytest.raises(NoPermission, match="waits here until the leading controller gives it access"):
            stranger.get(MESH_KEY)


def test_promotion_and_demotion(site: Site) -> None:
    """A promoted node may everything, and a demoted one only its own again."""
    site.settle(MANAGER, WORKER)
    site.settle(MANAGER, Node(W1, "w1", is_manager=True))
    site.of(W1).put(LEADER_KEY, b"1")
    assert site.of(W1).access().enabled
    site.settle(MANAGER, WORKER)
    assert refuses(lambda: site.of(W1).put(LEADER_KEY, b"2"))
    assert refuses(site.of(W1).access)
    site.of(W1).put(node_key(W1), b"")


def test_a_node_that_left(site: Site) -> None:
    """Its user and role go, what it wrote stays until somebody removes it, and the others notice nothing."""
    site.settle(MANAGER, WORKER, OTHER)
    site.of(W1).put(claim_key(W1, TASK), b"1")
    site.settle(MANAGER, OTHER)
    assert refuses(lambda: site.of(W1).put(claim_key(W1, TASK), b"2"))
    assert refuses(lambda: site.of(W1).list(PEERS))
    site.of(W2).put(claim_key(W2, TASK), b"1")
    item = site.of(M1).get(claim_key(W1, TASK))
    assert item is not None
    assert item.value == b"1"


def test_repairs(site: Site) -> None:
    """Whatever a manager did to users, roles and grants by hand is put right."""
    site.settle(MANAGER, WORKER)
    for op in (
        AddUser("guest"), AddRole("guests"), AddGrant("guests", Grant(PEERS)), GiveRole("guest", "guests"),
        AddGrant("agent", Grant(LEADER_KEY)), RemoveGrant("node-w1", Grant(node_key(W1))),
        AddGrant("agent", Grant(PEERS, PEERS[:-1] + "0", "write")),
        GiveRole(W1, ROOT), TakeRole(W1, "node-w1"), RemoveRole("node-w1"),
    ):  # fmt: skip
        site.of(M1).change_access(op)
    site.settle(MANAGER, WORKER)


def test_changes_that_are_made_already(site: Site) -> None:
    """Everything can be asked for twice."""
    site.settle(MANAGER, WORKER)
    manager, grant = site.of(M1), Grant(PEERS, leave="read")
    for op in (
        AddUser("x"), AddRole("r"), AddGrant("r", grant), GiveRole("x", "r"), EnableAccess(), TakeRole("x", "r"),
        RemoveGrant("r", grant), RemoveUser("x"), RemoveRole("r"),
    ):  # fmt: skip
        manager.change_access(op)
        manager.change_access(op)
    assert manager.access() == desired_access((MANAGER, WORKER))


def test_changes_of_what_is_not_there(site: Site) -> None:
    """A user or role that somebody removed in between is a conflict: look again."""
    site.of(M1).change_access(AddUser("x"))
    for op in (GiveRole("y", ROOT), GiveRole("x", "r"), TakeRole("y", "r"), AddGrant("r", Grant(PEERS))):
        with pytest.raises(RevisionConflict):
            site.of(M1).change_access(op)


def test_nobody_is_locked_out(site: Site) -> None:
    """It is not enabled before somebody may everything, and that somebody stays."""
    manager = site.of(M1)
    for op in (EnableAccess(), AddUser(ROOT), EnableAccess()):
        if isinstance(op, EnableAccess):
            with pytest.raises(InvalidInput, match="lock everybody out"):
                manager.change_access(op)
        else:
            manager.change_access(op)
    site.settle(MANAGER)
    for op in (RemoveUser(ROOT), RemoveRole(ROOT), TakeRole(ROOT, ROOT)):
        with pytest.raises(InvalidInput, match="lock everybody out"):
            manager.change_access(op)


def test_enabling_under_open_watches_and_leases(site: Site) -> None:
    """What is open goes on: watches, keepalives, keys on leases; a lease still ends by itself and takes its key."""
    worker, stranger = site.of(W1), site.of(W2)
    lease, strange = worker.grant_lease(2), stranger.grant_lease(60)
    worker.put(node_key(W1), b"1", lease)
    stranger.put(node_key(W2), b"1", strange)
    watches = [store.open_watch() for store in (worker, stranger)]
    for watch in watches:
        watch.add(PEERS, 0)
        assert watch.next(10) is not None
    site.settle(MANAGER, WORKER)
    assert worker.keepalive(lease) > 0
    worker.put(node_key(W1), b"2", lease)
    assert refuses(lambda: stranger.put(node_key(W2), b"2", strange))
    # A watch is asked once, when it is added: a node that has lost its access reads on until its connection ends.
    site.of(M1).put(peer_key(ServiceId("s"), TASK), b"1")
    for watch in watches:
        wait_until(lambda watch=watch: isinstance(watch.next(1), WatchEvents), "the event")
        watch.close()
    wait_until(lambda: site.of(M1).get(node_key(W1)) is None, "the lease's end")
    with pytest.raises(LeaseExpired):
        worker.keepalive(lease)


def test_leases_of_others(site: Site) -> None:
    """A worker cannot end the lease of a leader or of another node, on which their keys hang."""
    site.settle(MANAGER, WORKER, OTHER)
    manager, other = site.of(M1), site.of(W2)
    leads, lives = manager.grant_lease(60), other.grant_lease(60)
    manager.put(LEADER_KEY, b"1", leads)
    other.put(node_key(W2), b"1", lives)
    for lease in (leads, lives):
        assert refuses(lambda lease=lease: site.of(W1).revoke(lease))
    assert manager.get(LEADER_KEY) is not None
    other.revoke(lives)
    assert manager.get(node_key(W2)) is None


def test_a_mirror_waits_for_its_user(site: Site) -> None:
    """The mirror of a node that has just joined keeps quiet until it has access, and then fills by itself."""
    site.settle(MANAGER)
    mirror = Mirror(site.of(W1), lambda *_: None, settings=MirrorSettings(longest_retry_s=0.5))
    mirror.follow(PEERS)
    mirror.start()
    try:
        wait_until(lambda: mirror.last_error is not None, "the refusal")
        assert not mirror.synced(PEERS)
        site.settle(MANAGER, WORKER)
        wait_until(lambda: mirror.healthy, "access")
    finally:
        mirror.stop()


def test_calls_while_access_changes(site: Site) -> None:
    """While users come and go, the calls of the others succeed, or can be made again; none is refused."""
    site.settle(MANAGER, WORKER)
    stop, wrong = threading.Event(), []

    def work() -> None:
        worker = site.of(W1)
        while not stop.is_set():
            try:
                worker.put(node_key(W1), b"")
                worker.list(PEERS)
            except StoreUnavailable:
                pass
            except Exception as error:  # noqa: BLE001  the test's whole point
                wrong.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(20):
        site.settle(MANAGER, WORKER, OTHER)
        site.settle(MANAGER, WORKER)
    stop.set()
    thread.join()
    assert wrong == []
