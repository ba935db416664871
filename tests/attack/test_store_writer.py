"""Who can write anything into etcd tries to get into links: nothing in any task's namespace changes, and it shows.

A worker's real credentials sign, a manager's write, which is all that a stranger with etcd's disk could do and more.
"""

import json
import random
from functools import partial
from ipaddress import IPv4Address

import msgspec
import pytest
from proof.claims import DB, SPY, WEB
from proof.deployed import STACK, Deployed, Task, wait_for

from hivewire.identity import MANAGER
from hivewire.ids import NetworkId, NodeId, TaskId
from hivewire.keys import PrivateKey
from hivewire.records import (
    LEADER_KEY,
    MESH_KEY,
    GuardRecord,
    MeshRecord,
    Mode,
    PeerRecord,
    PolicyRecord,
    QuarantineKind,
    QuarantineRecord,
    Record,
    encode,
    guard_key,
    key_of,
    peers_prefix,
    policy_key,
    writer_of,
)
from hivewire.signed import Managers, SwarmSignatures
from tests.attack.foothold import Foothold, bugs, held, hold, logs, manager, node_id, service_id
from tests.attack.ledger import Ledger
from tests.attack.mutations import Mutations
from tests.unit.hivewire.swarm_pki import SwarmCa

__all__ = ["hold", "manager"]

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

BATCH, BATCHES = 50, 6
OPENS: dict[type[Record], str] = {
    PolicyRecord: "a policy that is off, only observes, or has other links",
    PeerRecord: "another key for a peer, or a peer more",
    GuardRecord: "a guard of nobody",
    QuarantineRecord: "somebody shut out",
    MeshRecord: "a mesh that is off",
}


@pytest.fixture
def thief(hold: Foothold, manager: Foothold) -> Foothold:
    """Writes with a manager's connection what a worker signs."""
    manager.signatures, manager.node = hold.signatures, hold.node
    return manager


def forgeries(mesh: Deployed, thief: Foothold) -> list[Record]:
    """What would open something, were it believed."""
    db, web = service_id(mesh, DB), service_id(mesh, WEB)
    policy = msgspec.structs.replace(
        thief.signatures.verify(PolicyRecord, policy_key(db), thief.get(policy_key(db))).record, findings=()
    )
    network = policy.networks[0].id
    key = next(key for key in thief.records() if key.startswith(peers_prefix(db)))
    peer = thief.signatures.verify(PeerRecord, key, thief.get(key)).record
    own_key = str(PrivateKey.generate().public())
    return [
        msgspec.structs.replace(policy, mode=Mode.OFF),
        msgspec.structs.replace(policy, mode=Mode.OBSERVE),
        msgspec.structs.replace(policy, in_links=(), out_links=()),
        msgspec.structs.replace(peer, public_key=own_key),
        PeerRecord(
            task=TaskId("thief"), task_name="thief.1", service=web, node=thief.node, public_key=own_key,
            endpoint=peer.endpoint, epoch=1, addresses={NetworkId(network): IPv4Address("10.99.0.9")}, serving=True,
        ),
        GuardRecord(network=network, name="demo_app"),
        QuarantineRecord(kind=QuarantineKind.SERVICE, id=db, name=DB),
        MeshRecord(mesh="other", mode=Mode.OFF, settled=True),
    ]  # fmt: skip


def reaches_db(mesh: Deployed, task: Task) -> bool:
    return bool(mesh.probe(task, "tcp", "db", "6379").get("outcome") == "reached")


def test_forged_records_change_nothing(mesh: Deployed, thief: Foothold, ledger: Ledger) -> None:
    """Plain, signed by a worker, and cut: a manager's record takes its place again, the kernels never moved."""
    before = held(mesh)
    for record in forgeries(mesh, thief):
        key, signed = key_of(record), thief.signatures.sign(record)
        is_new = not thief.get(key)
        for value in (encode(record), signed, signed[: len(signed) // 2]):
            thief.put(key, value)
            wait_for(
                f"the end of a forged {key}", partial(thief.is_mended, type(record), key, was_there=not is_new), 30
            )
            assert held(mesh) == before, key
        wait_for("a line in the log", lambda key=key: key in logs(mesh, "controller", 4000), 30)
        ledger.note("full writer of etcd", f"{type(record).__name__}: {OPENS[type(record)]}",
                    "not believed; a manager's record is there again", "HW320, record.refused")  # fmt: skip
    mesh.wait_ready(60)


def test_deletions_open_nothing(mesh: Deployed, thief: Foothold, ledger: Ledger) -> None:
    """Policies, guards and the mesh deleted: written again, and nothing was open meanwhile."""
    before = held(mesh)
    db = service_id(mesh, DB)
    policy = thief.signatures.verify(PolicyRecord, policy_key(db), thief.get(policy_key(db))).record
    for kind, key in (
        (PolicyRecord, policy_key(db)),
        (GuardRecord, guard_key(policy.networks[0].id)),
        (MeshRecord, MESH_KEY),
    ):
        thief.delete(key)
        wait_for(f"{key} again", partial(thief.is_mended, kind, key), 30)
        assert held(mesh) == before, key
    mesh.wait_ready(60)
    ledger.note("full writer of etcd", "to delete policies, guards and the mesh",
                "written again; nothing opened meanwhile", "policies.written in the log")  # fmt: skip


def test_an_old_policy_does_not_come_back(mesh: Deployed, thief: Foothold, ledger: Ledger) -> None:
    """A link that was once allowed and signed by a manager stays revoked, whoever puts the old record back."""
    db = service_id(mesh, DB)
    key = policy_key(db)
    mesh.update(SPY, "--label-add", "hivewire.links=db:6379")
    spy = mesh.tasks(SPY)[0]
    wait_for("the link", lambda: reaches_db(mesh, spy), 30)
    old = thief.get(key)
    mesh.update(SPY, "--label-rm", "hivewire.links")
    wait_for("the revocation", lambda: not reaches_db(mesh, spy), 30)
    wait_for("the new policy", lambda: thief.get(key) != old, 30)
    mesh.wait_ready(60)
    before = held(mesh)
    thief.put(key, old)
    wait_for("a newer policy", lambda: thief.get(key) != old, 30)
    assert held(mesh) == before
    assert not reaches_db(mesh, spy)
    ledger.note("full writer of etcd", "to put back the policy of a link that was revoked",
                "older than what was there: a newer one is written", "HW320, record.refused")  # fmt: skip


def test_mutated_records_against_what_runs(mesh: Deployed, thief: Foothold, ledger: Ledger) -> None:
    """Some hundreds through the real etcd against what runs there: no kernel moves, nothing ends."""
    before = held(mesh)
    good = {key: value for key, value in thief.records().items() if key != LEADER_KEY}
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    stranger = SwarmCa("other-ca").source(thief.folder / "stranger", thief.node, MANAGER)
    boss = NodeId(node_id(mesh, mesh.manager))
    signers = {
        "another Swarm's manager": SwarmSignatures(stranger, Managers(lambda: frozenset({boss}))),
        "a worker": thief.signatures,
    }
    # What agents write they write again; theirs of a worker's own node are no forgeries where it signs them.
    theirs = {key: value for key, value in good.items() if f"/{thief.node}" not in key}
    mutations = Mutations(theirs, signers, thief.signatures, seed)
    containers = running(mesh)
    for number in range(BATCHES):
        calls: list[tuple[object, ...]] = []
        for _ in range(BATCH):
            key, value = mutations.one()
            calls += [("put", key, value), ("wait", "", "", 10)]
        assert all(status == "OK" for status, _, _ in thief.do(*calls))
        assert held(mesh) == before, number
    of_managers = [key for key in good if writer_of(key) is None]
    wait_for("managers' records whole again", lambda: all_good(thief, of_managers), 60, 1)
    mesh.wait_ready(90)
    assert held(mesh) == before
    assert bugs(mesh) == []
    assert running(mesh) == containers, "somebody was started again"
    doubted = json.dumps(mesh.ask("findings"))
    assert "Traceback" not in doubted
    ledger.note("full writer of etcd", f"{BATCH * BATCHES} mutated records through the real etcd (seed {seed})",
                "no kernel changed, nothing ended", "HW320, HW321, record.refused, metrics")  # fmt: skip


def all_good(thief: Foothold, keys: list[str]) -> bool:
    stored = thief.records()
    return all(thief.believes(key, stored.get(key, b"")) for key in keys)


def running(mesh: Deployed) -> set[str]:
    return {task.container for name in ("agent", "controller") for task in mesh.tasks(f"{STACK}_{name}")}
