"""The controller's loop over a Swarm, a store and a clock in memory: what it writes, and when it writes nothing."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from controller.leader import LEASE_S
from controller.reconciler import FILL_LONGEST_S, MANY_CLAIMS, AllTasks, Claim, ServiceTasks, WholeMesh
from hivewire.errors import NotLeader, RecordTooNew, RevisionConflict, StoreUnavailable, SwarmUnavailable
from hivewire.ids import NodeId, ServiceId, TaskId
from hivewire.records import (
    CLAIMS,
    LEADER_KEY,
    MESH_KEY,
    NODES,
    PEERS,
    POLICIES,
    STATUS,
    MeshRecord,
    PeerRecord,
    StatusRecord,
    TaskPhase,
    claim_key,
    decode,
    encode,
    node_key,
    peer_key,
    policy_key,
    status_key,
)
from hivewire.store.api import Event, Put
from tests.property.test_controller_rig import LAST_PORT, Cluster, key_of

PREFIXES = (CLAIMS, MESH_KEY, NODES, PEERS, POLICIES, STATUS)


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


def components(cluster: Cluster) -> dict[str, str]:
    """What is not well, by component."""
    return {c.name: c.detail for c in cluster.one.reconciler.state().components if not c.is_ok}


def refusals(cluster: Cluster) -> dict[TaskId, str]:
    return {r.task: r.reason for r in cluster.one.reconciler.state().refused}


class Witness:
    """Sees every change of the store in order."""

    def __init__(self, cluster: Cluster) -> None:
        self._watch = cluster.store.open_watch()
        for prefix in PREFIXES:
            self._watch.add(prefix, 0)

    def changes(self) -> list[Event]:
        events: list[Event] = []
        while (got := self._watch.next(0.0)) is not None:
            events += getattr(got, "events", ())
        return sorted(events, key=lambda event: event.mod_revision)

    def keys(self) -> list[str]:
        return [event.key for event in self.changes()]


# The first reading.


def test_the_mesh_comes_before_its_policies(cluster: Cluster) -> None:
    """The first transaction of an empty store says that the mesh is incomplete, and holds the policies behind that."""
    witness = Witness(cluster)
    db = cluster.service("db", {"hivewire.ports": "5432"})
    cluster.settle(0.3)
    first = witness.changes()
    assert [event.key for event in first] == [MESH_KEY, policy_key(db)]
    assert len({event.mod_revision for event in first}) == 1
    assert not cluster.mesh().settled


def test_nothing_is_written_before_the_store_was_read(cluster: Cluster) -> None:
    """The last good labels are in the store: a compilation without them is no compilation."""
    cluster.service("db", {"hivewire.ports": "5432"})
    cluster.one.leadership.step()
    for _ in range(5):
        cluster.clock.advance(0.2)
        cluster.one.work()
    assert cluster.stored(POLICIES) == {}
    with pytest.raises(StoreUnavailable):
        cluster.one.reconciler.state()
    cluster.settle()
    assert set(cluster.policies()) == {"shop_db"}


def test_a_second_pass_writes_nothing(cluster: Cluster) -> None:
    """Once everything is written, neither time nor any number of passes writes again."""
    web, db = cluster.shop()
    for service in (web, db):
        cluster.claim(cluster.task(service))
    cluster.settle(3.0)
    assert cluster.mesh().settled
    assert cluster.resync() == 0
    for service in (web, db):
        cluster.tell(service)
    assert cluster.settle(3.0) == 0
    assert cluster.one.errors == []


def test_what_does_not_belong_is_removed(cluster: Cluster) -> None:
    """Policies and peers that nothing accounts for go with the next passes."""
    web, _ = cluster.shop()
    cluster.store.put(policy_key(ServiceId("nobody")), b"{}")
    cluster.store.put(peer_key(web, TaskId("nobody")), b"{}")
    cluster.store.put(PEERS + "odd", b"{}")
    cluster.store.put(PEERS + "much/too/deep", b"{}")
    cluster.resync()
    assert set(cluster.policies()) == {"shop_web", "shop_db"}
    assert cluster.stored(PEERS) == {}


# Claims.


def test_a_claim_becomes_a_peer_in_one_write(cluster: Cluster) -> None:
    """One transaction with one record per claim; names and addresses are Swarm's."""
    _, db = cluster.shop()
    cluster.settle(2.0)
    witness = Witness(cluster)
    task = cluster.task(db)
    cluster.claim(task, epoch=7)
    assert cluster.settle() == 1
    assert witness.keys() == [claim_key(task.node, task.id), peer_key(db, task.id)]
    peer = cluster.peers()[task.id]
    assert (peer.task_name, peer.addresses, peer.node) == (task.name, task.addresses, task.node)
    assert (peer.epoch, peer.serving, peer.public_key) == (7, True, key_of(task.id))


@pytest.mark.parametrize("tasks", [2, 40])
def test_a_start_costs_the_same_in_any_mesh(cluster: Cluster, tasks: int) -> None:
    """However many tasks the linked services have, one more claim is one more write and one question to Swarm."""
    db = cluster.service("db", {"hivewire.ports": "5432"}, replicas=tasks)
    cluster.service("web", {"hivewire.links": "db"}, replicas=tasks)
    cluster.settle()
    for task in cluster.tasks(db)[1:]:
        cluster.claim(task)
    cluster.settle(2.0)
    cluster.one.worked.clear()
    late = cluster.tasks(db)[0]
    cluster.claim(late)
    assert cluster.settle(0.5) == 1
    assert [work for work in cluster.one.worked if work != WholeMesh()] == [Claim(late.id)]


def test_many_claims_at_once_are_one_listing(cluster: Cluster) -> None:
    """A node full of tasks, or a store that is filled again, does not ask Swarm for each task."""
    db = cluster.service("db", {"hivewire.ports": "5432"}, replicas=MANY_CLAIMS + 2)
    cluster.settle()
    cluster.one.worked.clear()
    for task in cluster.tasks(db):
        cluster.claim(task)
    cluster.settle(0.3)
    assert AllTasks() in cluster.one.worked
    # The first one is not kept waiting to see whether more come.
    assert len([work for work in cluster.one.worked if isinstance(work, Claim)]) == 1
    assert len(cluster.peers()) == MANY_CLAIMS + 2


def test_a_claim_that_vanishes_takes_its_peer_along(cluster: Cluster) -> None:
    """The agent takes its claim back when the task's interface is gone; then the peer goes in one write."""
    _, db = cluster.shop()
    key = cluster.claim(cluster.task(db))
    cluster.settle(2.0)
    assert len(cluster.peers()) == 1
    cluster.store.delete(key)
    assert cluster.settle() == 1
    assert cluster.peers() == {}


def test_a_claim_that_vanishes_before_the_mirror_shows_its_peer(cluster: Cluster) -> None:
    """What was just written counts, though the mirror lags behind: a peer is not left over."""
    _, db = cluster.shop()
    cluster.settle(2.0)
    reconciler, task = cluster.one.reconciler, cluster.task(db)
    key = cluster.claim(task)
    cluster.clock.advance(1.0)
    reconciler.mirror.step(0.0)
    cluster.store.delete(key)
    cluster.one.work()
    assert task.id in cluster.peers()
    assert not reconciler.mirror.items(PEERS)
    cluster.clock.advance(1.0)
    reconciler.mirror.step(0.0)  # one step takes one change: the end of the claim, which came before the peer
    assert not reconciler.mirror.items(PEERS)
    cluster.one.work()
    assert cluster.peers() == {}


def test_a_new_key_replaces_the_old_one(cluster: Cluster) -> None:
    """A rotated key is one write of one record."""
    _, db = cluster.shop()
    task = cluster.task(db)
    cluster.claim(task)
    cluster.settle(2.0)
    cluster.claim(task, key=key_of("another"), epoch=2)
    assert cluster.settle() == 1
    assert cluster.peers()[task.id].public_key == key_of("another")


def test_a_foreign_node_gets_no_peer_and_takes_none(cluster: Cluster) -> None:
    """A claim for a task of another node is refused and shown; it does not touch the peer of that task."""
    _, db = cluster.shop()
    other = cluster.swarm.add_node("n2")
    cluster.one.reconciler.on_node()
    task = cluster.task(db)
    cluster.claim(task)
    cluster.settle(7.0)
    before, witness = cluster.stored(PEERS), Witness(cluster)
    cluster.claim(task, node=other, key=key_of("thief"))
    cluster.settle()
    assert cluster.stored(PEERS) == before
    assert witness.keys() == [claim_key(other, task.id)]
    state = cluster.one.reconciler.state()
    assert [(r.node, r.task) for r in state.refused] == [(other, task.id)]
    assert refusals(cluster) == {task.id: f"the task runs on node {task.node}, not on {other}"}
    assert state.claims[task.id].node == task.node
    assert cluster.resync() == 0
    cluster.store.delete(claim_key(other, task.id))
    cluster.settle()
    assert refusals(cluster) == {}
    assert cluster.stored(PEERS) == before


def test_a_foreign_service_is_refused_until_it_is_true(cluster: Cluster) -> None:
    """A claim that names another service is refused and shown; the right one is admitted and the reason goes."""
    web, db = cluster.shop()
    task = cluster.task(db)
    cluster.claim(task, service=web)
    cluster.settle()
    assert cluster.peers() == {}
    assert refusals(cluster) == {task.id: f"the task belongs to service {db}, not to {web}"}
    cluster.claim(task)
    cluster.settle()
    assert refusals(cluster) == {}
    assert set(cluster.peers()) == {task.id}


def test_a_claim_that_turns_false_loses_its_peer(cluster: Cluster) -> None:
    """An admitted claim that is rewritten with a lie is no peer any more."""
    web, db = cluster.shop()
    task = cluster.task(db)
    cluster.claim(task)
    cluster.settle(2.0)
    cluster.claim(task, service=web)
    cluster.settle()
    assert cluster.peers() == {}
    assert task.id in refusals(cluster)


def test_a_refused_claim_is_judged_again_when_its_service_joins(cluster: Cluster) -> None:
    """No new claim and no slow listing is needed when the labels come after the claim."""
    db = cluster.service("db")
    cluster.settle()
    cluster.claim(cluster.task(db))
    cluster.settle()
    assert refusals(cluster) == {cluster.task(db).id: "its service is not in the mesh"}
    cluster.swarm.set_labels(db, {"hivewire.ports": "5432"})
    cluster.tell(db)
    cluster.settle()
    assert refusals(cluster) == {}
    assert len(cluster.peers()) == 1


@pytest.mark.parametrize("failures", [0, 1, 2, 3])
def test_claims_of_others_are_judged_again_though_a_policy_is_written_late(cluster: Cluster, failures: int) -> None:
    """A label of one service enrols another; a store that fails in the middle of that pass loses no work."""
    db = cluster.service("db")
    web = cluster.service("web")
    cluster.settle()
    cluster.claim(cluster.task(db))
    cluster.settle()
    assert cluster.task(db).id in refusals(cluster)
    cluster.swarm.set_labels(web, {"hivewire.links": "db:5432"})
    cluster.tell(web)
    cluster.store.faults.fail_next_calls(failures)
    cluster.one.work()
    cluster.store.faults.fail_next_calls(0)
    cluster.settle(3.0)
    assert set(cluster.peers()) == {cluster.task(db).id}


def test_a_refused_claim_is_judged_again_when_its_agent_registers(cluster: Cluster) -> None:
    """The claim may be seen before the agent's own record, which alone proves the endpoint."""
    _, db = cluster.shop()
    task = cluster.task(db)
    cluster.claim(task, address="198.51.100.7")
    cluster.settle()
    assert refusals(cluster) == {task.id: "its endpoint 198.51.100.7:51800 is no address of node n1"}
    cluster.agent(task.node, underlay="198.51.100.7")
    cluster.settle()
    assert set(cluster.peers()) == {task.id}


def test_an_agent_that_dies_takes_no_peer_along(cluster: Cluster) -> None:
    """The agent's record hangs on its lease; its tasks run on, and so do their links."""
    _, db = cluster.shop()
    task = cluster.task(db)
    cluster.agent(task.node, underlay="198.51.100.7")
    cluster.claim(task, address="198.51.100.7")
    cluster.settle()
    before = cluster.stored(PEERS)
    assert before
    cluster.store.delete(node_key(task.node))
    cluster.settle()
    cluster.tell(db)
    cluster.resync()
    assert cluster.stored(PEERS) == before


def test_an_agent_speaks_for_its_own_node_only(cluster: Cluster) -> None:
    """A record that lies under another node's name neither vouches for endpoints nor narrows ports nor is shown."""
    _, db = cluster.shop()
    thief, task = cluster.swarm.add_node("n2"), cluster.task(db)
    cluster.one.reconciler.on_node()
    cluster.agent(task.node, underlay="198.51.100.66", key_node=thief)
    cluster.claim(task, address="198.51.100.66")
    cluster.settle()
    assert task.id in refusals(cluster)
    assert cluster.one.reconciler.state().nodes == {}
    cluster.claim(task)
    cluster.settle()
    assert set(cluster.peers()) == {task.id}


def test_a_key_belongs_to_one_task(cluster: Cluster) -> None:
    """Of two claims with one key the first stays a peer, also when the mirror does not show that peer yet."""
    db = cluster.service("db", {"hivewire.ports": "5432"}, replicas=2)
    cluster.settle()
    first, second = cluster.tasks(db)
    cluster.claim(second, key=key_of("shared"))
    cluster.settle()
    cluster.claim(first, key=key_of("shared"))
    cluster.settle()
    assert set(cluster.peers()) == {second.id}
    assert refusals(cluster) == {first.id: f"its public key belongs to task {second.id}"}
    cluster.resync()
    assert set(cluster.peers()) == {second.id}
    cluster.claim(second, key=key_of("own"), epoch=2)
    cluster.settle()
    cluster.resync()
    assert set(cluster.peers()) == {first.id, second.id}


def test_a_key_that_two_claim_at_once_belongs_to_one(cluster: Cluster) -> None:
    """Claims that are judged in one pass count among each other, and the next pass decides alike."""
    db = cluster.service("db", {"hivewire.ports": "5432"}, replicas=2)
    cluster.replicas = []
    for task in cluster.tasks(db):
        cluster.claim(task, key=key_of("shared"))
    cluster.replicas = [cluster.start("m2")]
    cluster.settle()
    first, second = cluster.tasks(db)
    assert set(cluster.peers()) == {first.id}
    assert refusals(cluster) == {second.id: f"its public key belongs to task {first.id}"}
    assert cluster.resync() == 0


def test_a_claim_that_comes_before_swarm_knows_the_start(cluster: Cluster) -> None:
    """An agent sees its container start before the managers hear of it: the task serves soon after they do."""
    db = cluster.service("db", {"hivewire.ports": "5432"})
    cluster.settle(2.0)
    cluster.swarm.fail_task(cluster.task(db).id)  # nobody announces the task that replaces it
    for _ in range(5):
        cluster.swarm.step()
    task = cluster.task(db)
    assert task.state not in ("starting", "running")
    assert task.node
    cluster.claim(task)
    cluster.settle()
    assert not cluster.peers()[task.id].serving
    cluster.swarm.settle()
    cluster.settle()
    assert cluster.peers()[task.id].serving


def test_a_task_that_swarm_stops_is_a_peer_until_its_claim_goes(cluster: Cluster) -> None:
    """Nothing new is sent to it at once, and its open connections drain."""
    db = cluster.service("db", {"hivewire.ports": "5432"}, replicas=2)
    cluster.settle()
    for task in cluster.tasks(db):
        cluster.claim(task)
    cluster.settle(2.0)
    cluster.swarm.scale(db, 1)
    cluster.tell(db)
    cluster.settle(0.3)
    (gone,) = [peer.task for peer in cluster.peers().values() if not peer.serving]
    assert len(cluster.peers()) == 2
    key = claim_key(cluster.peers()[gone].node, gone)
    cluster.store.delete(key)
    cluster.settle()
    assert gone not in cluster.peers()
    assert len(cluster.peers()) == 1


def test_a_task_that_ends_without_its_agent_is_found_out(cluster: Cluster) -> None:
    """A service that was scaled is asked for until its tasks rest, so a finished one is no peer for long."""
    db = cluster.service("db", {"hivewire.ports": "5432"}, replicas=2)
    cluster.settle()
    for task in cluster.tasks(db):
        cluster.claim(task)
    cluster.settle(2.0)
    cluster.swarm.scale(db, 1)
    cluster.tell(db)
    cluster.settle()
    assert len(cluster.peers()) == 2
    cluster.swarm.settle()
    cluster.settle()
    assert len(cluster.peers()) == 1
    cluster.one.worked.clear()
    cluster.settle(5.0)
    assert ServiceTasks(db) not in cluster.one.worked


def test_a_node_that_goes_serves_nothing(cluster: Cluster) -> None:
    """Swarm moves the tasks a moment after it announced the node's end, and does not say so."""
    cluster.swarm.add_node("n2")
    db = cluster.service("db", {"hivewire.ports": "5432"}, replicas=2)
    cluster.one.reconciler.on_node()
    cluster.settle()
    for task in cluster.tasks(db):
        cluster.claim(task)
    cluster.settle(6.0)
    (there,) = [task for task in cluster.tasks(db) if task.node != cluster.node]
    cluster.one.reconciler.on_node()
    cluster.settle(0.2)
    cluster.swarm.set_ready(there.node, False)
    cluster.settle(2.0)
    assert {p.task: p.serving for p in cluster.peers().values()}[there.id] is False


# Labels and services.


def test_a_changed_label_changes_policies_only(cluster: Cluster) -> None:
    """Both ends of the link are written in one transaction, and no peer is touched."""
    web, db = cluster.shop()
    for service in (web, db):
        cluster.claim(cluster.task(service))
    cluster.settle(2.0)
    witness = Witness(cluster)
    cluster.swarm.set_labels(db, {"hivewire.ports": "5432 5433"})
    cluster.tell(db)
    assert cluster.settle(2.0) == 1
    assert set(witness.keys()) == {policy_key(web), policy_key(db)}
    (link,) = cluster.policies()["shop_web"].out_links
    assert [str(p) for p in link.ports] == ["5432-5433/tcp"]


def test_a_service_that_leaves_the_mesh_loses_its_peers(cluster: Cluster) -> None:
    """Policy and peers go; the other service's stay."""
    web, db = cluster.shop()
    for service in (web, db):
        cluster.claim(cluster.task(service))
    cluster.settle(2.0)
    cluster.swarm.set_labels(web, {})
    cluster.tell(web)
    cluster.settle()
    assert set(cluster.policies()) == {"shop_db"}
    assert set(cluster.peers()) == {cluster.task(db).id}


def test_a_removed_service_leaves_nothing(cluster: Cluster) -> None:
    """After its tasks are gone, neither policy nor peer is left, whatever claims stay behind."""
    web, db = cluster.shop()
    for service in (web, db):
        cluster.claim(cluster.task(service))
    cluster.settle(2.0)
    cluster.swarm.remove_service(web)
    cluster.tell(web)
    cluster.swarm.settle()
    cluster.settle(2.0)
    assert set(cluster.policies()) == {"shop_db"}
    assert {peer.service for peer in cluster.peers().values()} == {db}


def test_a_bad_label_keeps_the_last_good_policy(cluster: Cluster) -> None:
    """Also across a restart: the labels in force are in the store."""
    web, _ = cluster.shop()
    good = cluster.policies()["shop_web"]
    cluster.swarm.set_labels(web, {"hivewire.links": "db:none"})
    cluster.tell(web)
    cluster.settle()
    bad, before = cluster.policies()["shop_web"], cluster.stored(POLICIES)
    assert (bad.labels, bad.out_links) == (good.labels, good.out_links)
    assert bad.findings
    cluster.clock.advance(LEASE_S)
    cluster.replicas = [cluster.start("m2")]
    witness = Witness(cluster)
    cluster.settle(3.0)
    assert cluster.one.leadership.is_leader
    assert cluster.stored(POLICIES) == before
    assert witness.keys() == []


def test_the_last_good_labels_are_the_newest_though_the_mirror_lags(cluster: Cluster) -> None:
    """Good labels that were replaced by bad ones a moment later stay in force, not those before them."""
    web, _ = cluster.shop()
    cluster.swarm.set_labels(web, {"hivewire.links": "db:7777"})
    cluster.tell(web)
    cluster.one.work()
    cluster.swarm.set_labels(web, {"hivewire.links": "db:none"})
    cluster.tell(web)
    cluster.one.work()  # the mirror was not stepped in between
    cluster.settle()
    assert cluster.policies()["shop_web"].labels == {"hivewire.links": "db:7777"}


def test_a_write_that_a_listing_does_not_show_yet_still_counts(cluster: Cluster) -> None:
    """The mirror may report a listing that is older than a write of ours: what was just written counts all the same."""
    _, db = cluster.shop()
    task = cluster.task(db)
    key = cluster.claim(task)
    cluster.clock.advance(1.0)
    cluster.one.reconciler.mirror.step(0.0)
    cluster.one.work()
    cluster.one.reconciler.on_records(PEERS, frozenset(), complete=True)
    cluster.store.delete(key)
    cluster.one.reconciler.reconcile(Claim(task.id))  # the claim is still in the mirror
    before = cluster.store.revision
    assert set(cluster.peers()) == {task.id}
    assert cluster.store.revision == before
    cluster.settle()
    assert cluster.peers() == {}


# Followers and leaders.


def test_a_follower_writes_nothing_and_knows_everything(cluster: Cluster) -> None:
    """Each replica can answer questions; who leads is the only thing in which they differ."""
    cluster.replicas.append(cluster.start("m2"))
    web, db = cluster.shop()
    cluster.claim(cluster.task(db))
    cluster.claim(cluster.task(web), service=db)
    cluster.settle(2.0)
    leader, follower = (replica.reconciler.state() for replica in cluster.replicas)
    assert (leader.is_leader, follower.is_leader) == (True, False)
    assert leader.leader == follower.leader == "m1"
    assert follower.policies == leader.policies
    assert follower.peers == leader.peers
    assert follower.claims == leader.claims
    assert follower.refused == leader.refused
    assert follower.tasks == leader.tasks
    assert len(follower.refused) == 1
    assert cluster.replicas[1].reconciler._writer.transactions == 0


def test_two_controllers_do_not_quarrel(cluster: Cluster) -> None:
    """Whoever leads, the same records come out: a change of leader writes the leader's key and nothing else."""
    cluster.replicas.append(cluster.start("m2"))
    web, db = cluster.shop()
    for service in (web, db):
        cluster.claim(cluster.task(service))
    cluster.settle(3.0)
    assert cluster.resync(3.0) == 0
    cluster.replicas[0].is_frozen = True
    cluster.settle(LEASE_S + 2)
    assert cluster.replicas[1].leadership.is_leader
    before = {prefix: cluster.stored(prefix) for prefix in PREFIXES}
    cluster.replicas[0].is_frozen = False
    assert cluster.resync(3.0) == 0
    assert {prefix: cluster.stored(prefix) for prefix in PREFIXES} == before
    assert [replica.leadership.is_leader for replica in cluster.replicas] == [False, True]


def test_what_happened_between_two_leaders_is_made_up_for(cluster: Cluster) -> None:
    """Claims and labels that changed while nobody led are in the store soon after somebody does."""
    cluster.replicas.append(cluster.start("m2"))
    web, db = cluster.shop()
    cluster.settle(2.0)
    cluster.replicas[0].is_frozen = True
    cluster.claim(cluster.task(db))
    cluster.swarm.set_labels(web, {})
    cluster.tell(web)
    assert cluster.settle(2.0) == 0
    cluster.settle(LEASE_S + 1)
    assert set(cluster.peers()) == {cluster.task(db).id}
    assert set(cluster.policies()) == {"shop_db"}


def test_a_deposed_leader_that_does_not_know_writes_nothing(cluster: Cluster) -> None:
    """Its pass ends in a conflict, and its next one finds that another leads."""
    cluster.replicas.append(cluster.start("m2"))
    web, _ = cluster.shop()
    old, new = cluster.replicas
    cluster.settle(2.0)
    cluster.store.faults.drop_watches()
    item = cluster.store.get(LEADER_KEY)
    assert item is not None
    cluster.store.revoke(item.lease)
    new.leadership.step()
    assert old.leadership.is_leader
    cluster.swarm.set_labels(web, {})
    old.reconciler.on_service(web)
    before = cluster.store.revision
    old.work()
    assert cluster.store.revision == before
    assert any(isinstance(error, RevisionConflict) for error in old.errors)
    cluster.settle(40.0)
    assert set(cluster.policies()) == {"shop_db"}
    with pytest.raises(NotLeader):
        old.leadership.guard()


def test_a_new_leader_waits_for_what_its_predecessor_wrote(cluster: Cluster) -> None:
    """A leader whose mirror does not show its own election yet would put back what is long replaced."""
    cluster.replicas.append(cluster.start("m2"))
    _, db = cluster.shop()
    old, new = cluster.replicas
    task = cluster.task(db)
    cluster.claim(task)
    cluster.settle(2.0)
    new.is_frozen = True  # its mirror stays where it is now
    cluster.claim(task, key=key_of("rotated"), epoch=2)
    cluster.settle()
    assert cluster.peers()[task.id].epoch == 2
    old.is_frozen = True
    cluster.clock.advance(LEASE_S)
    new.leadership.step()
    assert new.leadership.is_leader
    cluster.swarm.scale(db, 0)
    new.reconciler.on_service(db)
    new.work()
    assert cluster.peers()[task.id].epoch == 2
    new.is_frozen = False
    cluster.settle(3.0)
    assert [(p.epoch, p.serving) for p in cluster.peers().values()] == [(2, False)]


def test_work_that_a_lapsed_leader_left_out_is_done_when_it_leads_again(cluster: Cluster) -> None:
    """Its lease was kept by the store, so it wins nothing anew; what changed meanwhile is written all the same."""
    _, db = cluster.shop()
    cluster.settle(2.0)
    lease = cluster.store.get(LEADER_KEY)
    assert lease is not None
    for _ in range(4):  # the store lives, and the leader does not get to renew
        cluster.clock.advance(LEASE_S / 3)
        cluster.store.keepalive(lease.lease)
    assert not cluster.one.leadership.is_leader
    cluster.claim(cluster.task(db))
    cluster.one.reconciler.mirror.step(0.0)
    cluster.one.work()
    assert cluster.peers() == {}
    cluster.settle()
    assert len(cluster.peers()) == 1


# Losses.


def test_a_wiped_store_is_filled_again(cluster: Cluster) -> None:
    """Policies at once, peers as agents claim, and the mesh is not settled before every running task is a peer."""
    web, db = cluster.shop()
    for service in (web, db):
        cluster.claim(cluster.task(service))
    cluster.settle(3.0)
    before = {prefix: cluster.stored(prefix) for prefix in (POLICIES, PEERS, MESH_KEY)}
    assert cluster.mesh().settled
    cluster.store.faults.wipe()
    cluster.settle(LEASE_S + 6)
    assert cluster.stored(POLICIES) == before[POLICIES]
    assert cluster.stored(PEERS) == {}
    assert not cluster.mesh().settled
    cluster.claim(cluster.task(db))
    cluster.settle(3.0)
    assert not cluster.mesh().settled
    cluster.claim(cluster.task(web))
    cluster.settle(3.0)
    assert cluster.mesh().settled
    assert {prefix: cluster.stored(prefix) for prefix in before} == before
    assert cluster.resync() == 0


def test_a_wiped_store_with_the_same_revisions_is_filled_again(cluster: Cluster) -> None:
    """The leader's key may have the same revision in the old history and in the new one."""
    cluster.settle(2.0)
    _, db = cluster.shop()
    cluster.claim(cluster.task(db))
    cluster.settle(2.0)
    before = cluster.stored(POLICIES)
    cluster.store.faults.wipe()
    cluster.one.leadership.step()
    cluster.tell(db)
    cluster.one.work()
    cluster.settle(8.0)
    assert cluster.stored(POLICIES) == before
    assert not cluster.mesh().settled


def test_a_wiped_store_does_not_forget_good_labels(cluster: Cluster) -> None:
    """A service with a bad label keeps its last good policy while a controller lives that knows it."""
    web, _ = cluster.shop()
    cluster.swarm.set_labels(web, {"hivewire.links": "db:none"})
    cluster.tell(web)
    cluster.settle()
    before = cluster.policies()["shop_web"]
    cluster.store.faults.wipe()
    cluster.settle(LEASE_S + 6)
    assert cluster.policies()["shop_web"] == before


def test_a_write_that_a_wiped_store_lost_is_made_again(cluster: Cluster) -> None:
    """What the mirror never showed, because the store was wiped right after it, is not taken for stored."""
    web, db = cluster.shop()
    cluster.settle(2.0)
    task = cluster.task(db)
    key = cluster.claim(task)
    cluster.clock.advance(1.0)
    cluster.one.reconciler.mirror.step(0.0)
    cluster.store.faults.drop_watches()
    cluster.swarm.set_labels(web, {"hivewire.links": "db:7777"})
    cluster.tell(web)
    cluster.one.work()
    claim = cluster.stored(CLAIMS)[key]
    before = cluster.stored(PEERS), cluster.stored(POLICIES)
    assert before[0]
    cluster.store.faults.wipe()
    cluster.store.put(key, claim)
    cluster.settle(LEASE_S + 6)
    assert (cluster.stored(PEERS), cluster.stored(POLICIES)) == before


def test_a_refused_claim_does_not_keep_the_mesh_open(cluster: Cluster) -> None:
    """A task whose claim is false will not be a peer; the others need not wait for it."""
    web, db = cluster.shop()
    cluster.claim(cluster.task(db))
    cluster.claim(cluster.task(web), address="203.0.113.1")
    cluster.settle(3.0)
    assert len(cluster.peers()) == 1
    assert cluster.mesh().settled


def test_a_claim_that_was_not_judged_yet_keeps_the_mesh_open(cluster: Cluster) -> None:
    """Settled means that the peers are there, not that agents asked for them."""
    db = cluster.service("db", {"hivewire.ports": "5432"})
    cluster.settle(0.5)
    assert not cluster.mesh().settled
    cluster.claim(cluster.task(db))
    cluster.clock.advance(2.0)
    cluster.one.leadership.step()
    cluster.one.reconciler.mirror.step(0.0)
    cluster.one.reconciler.reconcile(WholeMesh())
    assert not cluster.mesh().settled
    cluster.settle(3.0)
    assert cluster.mesh().settled


def test_the_mesh_settles_after_a_time_without_all_claims(cluster: Cluster) -> None:
    """A task on a node without an agent never claims: that does not hold up everyone for ever."""
    cluster.shop()
    cluster.settle(FILL_LONGEST_S - 5)
    assert not cluster.mesh().settled
    cluster.settle(10.0)
    assert cluster.mesh().settled
    cluster.one.worked.clear()
    assert cluster.settle(10.0) == 0
    assert cluster.one.worked == []


def test_swarm_that_does_not_answer_costs_nothing(cluster: Cluster) -> None:
    """The pass fails for a later try, the state says so and stays, and nothing is deleted."""
    web, db = cluster.shop()
    for service in (web, db):
        cluster.claim(cluster.task(service))
    cluster.settle(3.0)
    before = {prefix: cluster.stored(prefix) for prefix in PREFIXES}
    cluster.swarm.is_down = True
    for work in (WholeMesh(), AllTasks(), ServiceTasks(db), Claim(next(iter(cluster.peers())))):
        with pytest.raises(SwarmUnavailable):
            cluster.one.reconciler.reconcile(work)
    cluster.resync(5.0)
    assert components(cluster) == {"swarm": "the Docker Engine does not answer"}
    assert {prefix: cluster.stored(prefix) for prefix in PREFIXES} == before
    assert len(cluster.one.reconciler.state().tasks) == 2
    cluster.swarm.is_down = False
    cluster.settle(40.0)
    assert components(cluster) == {}


def test_swarm_is_not_well_because_something_else_worked(cluster: Cluster) -> None:
    """A pass that asked Swarm nothing says nothing of it, and a store that fails says nothing of Swarm."""
    _, db = cluster.shop()
    key = cluster.claim(cluster.task(db))
    cluster.settle(2.0)
    cluster.swarm.is_down = True
    with pytest.raises(SwarmUnavailable):
        cluster.one.reconciler.reconcile(WholeMesh())
    cluster.store.delete(key)
    cluster.settle(0.5)
    assert cluster.peers() == {}  # a claim that is gone needs no question
    assert "swarm" in components(cluster)
    cluster.swarm.is_down = False
    cluster.store.put(POLICIES + "nobody", b"{}")
    cluster.one.reconciler.mirror.step(0.0)
    cluster.store.faults.set_unavailable(True)
    with pytest.raises(StoreUnavailable):
        cluster.one.reconciler.reconcile(WholeMesh())
    assert "swarm" not in components(cluster)


def test_a_swarm_that_never_answered_has_no_state(cluster: Cluster) -> None:
    """Before the first reading there is nothing to show but the reason."""
    cluster.swarm.is_down = True
    cluster.settle()
    with pytest.raises(SwarmUnavailable, match="does not answer"):
        cluster.one.reconciler.state()
    assert cluster.stored(POLICIES) == {}


def test_a_lost_store_is_shown_and_survived(cluster: Cluster) -> None:
    """The state stays, the components say what is wrong, and all is well again afterwards."""
    _, db = cluster.shop()
    cluster.settle(2.0)
    cluster.store.faults.set_unavailable(True)
    cluster.settle(2.0)
    assert set(components(cluster)) == {"store"}
    assert len(cluster.one.reconciler.state().policies) == 2
    cluster.store.faults.set_unavailable(False)
    cluster.claim(cluster.task(db))
    cluster.settle(20.0)
    assert components(cluster) == {}
    assert len(cluster.peers()) == 1


def test_without_a_leader_a_component_says_so(cluster: Cluster) -> None:
    """Everything may be well but that nobody writes."""
    cluster.settle()
    item = cluster.store.get(LEADER_KEY)
    assert item is not None
    cluster.store.delete(LEADER_KEY)
    cluster.clock.advance(1.0)
    cluster.one.reconciler.mirror.step(0.0)
    assert components(cluster) == {"leader": "no controller leads"}
    assert cluster.one.reconciler.state().leader == ""


GARBAGE = {
    "no JSON": b"\xff\xfe\x00",
    "empty": b"",
    "another shape": b"[1, 2]",
    "deeply nested": b'{"task": ' + b"[" * 100_000,
    "a number too large": b'{"task": "t", "epoch": ' + b"9" * 400 + b"}",
    "from a later version": b'{"task": {"id": "t"}, "schema": 99}',
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
@pytest.mark.parametrize(
    "key",
    [
        lambda task, service: claim_key(task.node, TaskId("bad")),
        lambda task, service: CLAIMS + "a/b/c/d",
        lambda task, service: CLAIMS + "a/",
        lambda task, service: CLAIMS,
        lambda task, service: PEERS + f"{service}/bad",
        lambda task, service: PEERS,
        lambda task, service: policy_key(ServiceId("bad")),
        lambda task, service: policy_key(service),
        lambda task, service: NODES + "bad/er",
        lambda task, service: status_key(task.node, task.id),
        lambda task, service: MESH_KEY,
        lambda task, service: MESH_KEY + "-other",
    ],
    ids=[
        "claim",
        "deep claim",
        "claim of no task",
        "no claim",
        "peer",
        "no peer",
        "policy",
        "own policy",
        "node",
        "status",
        "mesh",
        "mesh-like",
    ],
)
def test_what_cannot_be_read_harms_nobody(cluster: Cluster, key: Callable[..., str], garbage: bytes) -> None:
    """No pass fails over one record, the others are worked on as ever, and the controller's own are put right."""
    web, db = cluster.shop()
    cluster.claim(cluster.task(db))
    cluster.settle(3.0)
    policies = cluster.stored(POLICIES)
    cluster.store.put(key(cluster.task(db), db), garbage)
    cluster.claim(cluster.task(web))
    cluster.resync(3.0)
    assert cluster.one.errors == []
    assert {peer.service for peer in cluster.peers().values()} == {web, db}
    assert cluster.stored(POLICIES) == policies
    assert cluster.mesh().mesh == "cluster-1"
    cluster.one.reconciler.state()


def test_a_claim_that_turns_unreadable_changes_nothing(cluster: Cluster) -> None:
    """The last good one stays, and the state says what is wrong."""
    _, db = cluster.shop()
    task = cluster.task(db)
    key = cluster.claim(task)
    cluster.settle(2.0)
    cluster.store.put(key, b"\xff")
    cluster.settle()
    assert set(cluster.peers()) == {task.id}
    assert list(cluster.one.reconciler.state().unverified) == [key]
    cluster.claim(task)
    cluster.settle()
    assert cluster.one.reconciler.state().unverified == {}


def test_a_peer_that_turns_unreadable_is_written_again(cluster: Cluster) -> None:
    """With the next listing, as everything that somebody else broke."""
    _, db = cluster.shop()
    task = cluster.task(db)
    cluster.claim(task)
    cluster.settle(2.0)
    cluster.store.put(peer_key(db, task.id), b"\xff")
    assert cluster.resync() == 1
    assert set(cluster.peers()) == {task.id}


def test_a_mesh_of_a_later_version_is_left_alone(cluster: Cluster) -> None:
    """An older controller that leads by chance writes nothing at all until it is upgraded."""
    web, db = cluster.shop()
    cluster.settle(2.0)
    later = encode(MeshRecord(schema=2, mesh="cluster-1", settled=True))
    cluster.store.put(MESH_KEY, later)
    cluster.claim(cluster.task(db))
    cluster.swarm.set_labels(web, {})
    cluster.tell(web)
    assert cluster.resync(3.0) == 0
    assert cluster.stored(MESH_KEY) == {MESH_KEY: later}
    assert cluster.one.errors
    assert all(isinstance(error, RecordTooNew) for error in cluster.one.errors)


def test_a_leader_record_that_cannot_be_read_has_no_name(cluster: Cluster) -> None:
    """The state is shown all the same."""
    cluster.settle()
    item = cluster.store.get(LEADER_KEY)
    assert item is not None
    cluster.store.txn((), [Put(LEADER_KEY, b"\xff", item.lease)])
    cluster.settle()
    state = cluster.one.reconciler.state()
    assert (state.leader, state.is_leader) == ("", True)


def test_an_agent_reports_on_its_own_tasks_only(cluster: Cluster) -> None:
    """A status of a task that runs elsewhere, or that lies under another name, is not shown."""
    _, db = cluster.shop()
    task, thief = cluster.task(db), NodeId("node-thief")
    honest = StatusRecord(task=task.id, service=db, node=task.node, phase=TaskPhase.READY)
    lie = StatusRecord(task=task.id, service=db, node=thief, phase=TaskPhase.FAILED, error="a lie")
    cluster.store.put(status_key(task.node, task.id), encode(honest))
    cluster.store.put(status_key(thief, task.id), encode(lie))
    cluster.store.put(status_key(NodeId("node-zzz"), task.id), encode(lie))
    cluster.settle()
    assert cluster.one.reconciler.state().statuses == {task.id: honest}


def test_the_state_shows_the_store_as_it_is(cluster: Cluster) -> None:
    """Nodes, claims, peers and the revision are those of the store."""
    _, db = cluster.shop()
    task = cluster.task(db)
    cluster.agent(task.node)
    cluster.claim(task)
    cluster.settle(2.0)
    state = cluster.one.reconciler.state()
    assert state.nodes[task.node].last_port == LAST_PORT
    assert state.claims[task.id].public_key == key_of(task.id)
    assert state.peers == cluster.peers()
    assert state.policies == {p.service: p for p in cluster.policies().values()}
    assert state.tasks[task.id].state == "running"
    assert 0 < state.revision <= cluster.store.revision
    assert decode(PeerRecord, cluster.stored(PEERS)[peer_key(db, task.id)]) == state.peers[task.id]


def test_a_flood_of_claims_costs_little(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of claims for tasks that do not exist are few questions to Swarm, and hold no other node's claim up."""
    asked: list[str] = []
    one, all_of_them = cluster.swarm.task, cluster.swarm.tasks
    monkeypatch.setattr(cluster.swarm, "task", lambda task: asked.append("one") or one(task))
    monkeypatch.setattr(cluster.swarm, "tasks", lambda *words: asked.append("all") or all_of_them(*words))
    flooding = cluster.swarm.add_node("n9")
    db = cluster.service("db", {"hivewire.ports": "5432"})
    cluster.settle(3.0)
    real = cluster.tasks(db)
    asked.clear()
    for number in range(3000):
        fake = replace(real[0], id=TaskId(f"flood-{number}"), node=flooding)
        cluster.claim(fake, node=flooding)
        if number % 50 == 0:
            cluster.settle(0.1)
    cluster.claim(real[0])
    cluster.settle(1.0)
    assert set(cluster.peers()) == {task.id for task in real}
    cluster.settle(10.0)
    assert asked.count("one") < 700, "a burst and a rate"
    assert asked.count("all") < 30
    asked.clear()
    cluster.resync()
    assert asked.count("one") == 0, "one listing instead of a question each"


def test_a_node_that_registers_without_end_has_to_wait(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its record a thousand times over makes few readings of the Swarm, and what it says last counts."""
    read: list[int] = []
    snapshot = cluster.swarm.snapshot
    monkeypatch.setattr(cluster.swarm, "snapshot", lambda: read.append(1) or snapshot())
    node = cluster.node
    cluster.settle(2.0)
    read.clear()
    for number in range(1000):
        cluster.agent(node, underlay=f"198.51.100.{number % 200}")
        if number % 5 == 0:
            cluster.settle(0.1)
    assert len(read) < 80, "a burst of twenty, and two more each second"
    read.clear()
    cluster.settle(6.0)
    assert 0 < len(read) < 5
    assert str(cluster.one.reconciler.state().nodes[node].underlay_address) == "198.51.100.199"


def test_an_address_that_another_agent_registered(cluster: Cluster) -> None:
    """A node may register an address of its own, but not one that another node's agent has registered; and no word of
    an agent takes away the address that a node has in the Swarm.
    """
    cluster.swarm.add_node("n2")
    db = cluster.service("db", {"hivewire.ports": "5432"})
    task = cluster.tasks(db)[0]
    other = next(node for node in cluster.swarm.snapshot().nodes.values() if node.id != task.node)
    mine = cluster.swarm.snapshot().nodes[task.node].address
    cluster.agent(task.node, underlay="198.51.100.7")
    cluster.agent(other.id, underlay="198.51.100.7")
    cluster.settle()
    cluster.claim(task, address="198.51.100.7")
    cluster.settle()
    assert list(refusals(cluster).values()) == [
        f"its endpoint 198.51.100.7:51800 is the address of node {other.hostname}"
    ]
    cluster.agent(other.id, underlay=mine)
    cluster.settle()
    cluster.claim(task, address=mine)
    cluster.settle()
    assert refusals(cluster) == {}


def test_an_earlier_key_does_not_come_back(cluster: Cluster) -> None:
    """Also after the peer went, and the same key as of an earlier time is no new one."""
    db = cluster.service("db", {"hivewire.ports": "5432"})
    task = cluster.tasks(db)[0]
    cluster.claim(task, key=key_of("new"), epoch=9)
    cluster.settle()
    cluster.store.delete(claim_key(task.node, task.id))
    cluster.settle()
    assert cluster.peers() == {}
    cluster.claim(task, key=key_of("old"), epoch=8)
    cluster.settle()
    cluster.resync()
    assert cluster.peers() == {}
    assert "an earlier key does not come back" in refusals(cluster)[task.id]
    cluster.claim(task, key=key_of("new"), epoch=8)
    cluster.settle()
    assert cluster.peers()[task.id].epoch == 9
