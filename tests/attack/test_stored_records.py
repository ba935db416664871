"""Whoever writes to the store, in process: more than ten thousand mutated records, replays, and backups put back."""

import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.tasks import TaskEvent
from hivewire.errors import InvalidRecord
from hivewire.identity import MANAGER
from hivewire.records import (
    CLAIMS,
    GUARDS,
    LEADER_KEY,
    MESH_KEY,
    PEERS,
    POLICIES,
    ClaimRecord,
    Doubt,
    PeerRecord,
    QuarantineKind,
    QuarantineRecord,
    key_of,
    policy_key,
    writer_of,
)
from hivewire.signed import Managers, SwarmSignatures
from tests.attack.ledger import Ledger
from tests.attack.mutations import Mutations, decoded, encoded, kind_of
from tests.attack.world import World
from tests.unit.hivewire.swarm_pki import SwarmCa

#: How many mutated records go through the readers; the seed of a failing run is printed.
MUTATED = 10_000


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    released = QuarantineRecord(kind=QuarantineKind.SERVICE, id=world.db, name="shop_db", released=True)
    world.store.put(key_of(released), world.signing.sign(released))
    world.settle(8)
    world.resync()
    world.settle(8)
    held = world.kernels()
    assert len(held) == 3, "three tasks"
    assert all(peers and rules for peers, _, _, rules in held.values()), held  # type: ignore[misc]
    return world


def forgers(world: World) -> tuple[dict[str, bytes], dict[str, SwarmSignatures], SwarmSignatures]:
    """What is stored, who signs what they may not, and who reads."""
    stranger = SwarmCa("other-ca").source(world.folder / "stranger", world.manager, MANAGER)
    signers = {
        "another Swarm's manager": SwarmSignatures(stranger, Managers(lambda: frozenset({world.manager}))),
        "a worker": world.agents[world.workers[0]].signatures,
        "a manager's agent": world.agents[world.manager].signatures,
    }
    return {key: value for key, value in world.stored().items() if key != LEADER_KEY}, signers, world.signing


def test_ten_thousand_mutated_records_change_no_kernel(world: World, ledger: Ledger) -> None:
    """Written into the store while controller and agents run: none stops, and no peer, route or rule changes."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    mutations, before = Mutations(*forgers(world), seed), world.kernels()
    good = world.stored()
    for number in range(1, MUTATED + 1):
        key, value = mutations.one()
        world.store.put(key, value)
        world.turn()
        assert world.kernels() == before, (number, key, value[:200])
        if number % 200 == 0:
            world.settle(2)
            assert world.kernels() == before, number
            world.resync()
    world.settle(40)
    assert world.kernels() == before
    refused = Counter(world.signing.refused)
    for agent in world.agents.values():
        refused.update(agent.signatures.refused)
    assert {"size", "form", "path", "certificate", "role", "signature"} <= set(refused), refused
    world.resync()
    world.settle(10)
    after = world.stored()
    of_managers = [key for key in good if key.startswith((POLICIES, PEERS, GUARDS, MESH_KEY))]
    assert [key for key in of_managers if not _is_good(world, key, after)] == [], "they are whole again"
    counts = ", ".join(f"{cause} {count}" for cause, count in sorted(refused.items()))
    ledger.note("full writer of etcd", f"{MUTATED} mutated records of all kinds, in process (seed {seed})",
                f"no kernel changed, nothing stopped; refused: {counts}",
                "HW320, record.refused, hivewire_record_refusals_total")  # fmt: skip
    print(dict(mutations.made))


def _is_good(world: World, key: str, stored: dict[str, bytes]) -> bool:
    try:
        world.signing.verify(kind_of(key), key, stored.get(key, b""))
    except InvalidRecord:
        return False
    return True


def test_a_malleable_signature_is_the_same_record(world: World) -> None:
    """ECDSA has two signatures for everything: the other one says the same, with the same generation."""
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    before = world.kernels()
    for key, value in world.stored().items():
        if key == LEADER_KEY:
            continue
        header, payload, signature = value.split(b".")
        raw = decoded(signature)
        other = raw[:32] + (order - int.from_bytes(raw[32:], "big")).to_bytes(32, "big")
        world.store.put(key, b".".join((header, payload, encoded(other))))
    world.settle(10)
    assert world.kernels() == before


def test_every_old_record_put_back_changes_nothing(world: World, ledger: Ledger) -> None:
    """After a link was taken back, a task was replaced and a quarantine made, the old records open nothing."""
    old = world.stored()
    world.swarm.set_labels(world.web, {})
    gone = next(task for task in world.swarm.tasks() if task.service == world.db)
    world.swarm.fail_task(gone.id)
    world.follow_swarm()
    world.settle(10)
    shut = QuarantineRecord(kind=QuarantineKind.NODE, id=world.workers[0], name="w1")
    world.store.put(key_of(shut), world.signing.sign(shut))
    world.settle(10)
    world.resync()
    world.settle(10)
    before = world.kernels()
    for key, value in old.items():
        if key == LEADER_KEY:
            continue
        for _ in range(2):
            world.store.put(key, value)
            world.turn()
            assert world.kernels() == before, key
            world.settle(2)
            assert world.kernels() == before, key
    world.resync()
    world.settle(40)
    assert world.kernels() == before
    ledger.note("full writer of etcd", f"to replay {len(old)} old records of all kinds, one by one",
                "generations only grow; tasks that ended are no peers", "HW320: older than there was")  # fmt: skip


def difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What is not as it was, part by part, for a failure that can be read."""
    found = {}
    for path in before.keys() | after.keys():
        for name, was, now in zip(("peers", "owners", "routes", "rules"), before[path], after[path], strict=True):
            if was != now:
                found[f"{path} {name}"] = ([x for x in was if x not in now], [x for x in now if x not in was])
    return found


def without_rules(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Rules let in what is known: an agent that has forgotten everything lets in less until all have claimed again."""
    return {name: it for name, it in difference(before, after).items() if not name.endswith(" rules")}


def peers_named(world: World, key: str) -> Iterator[str]:
    for path, held in world.kernels().items():
        if key in str(held):
            yield path


@pytest.mark.parametrize("has_leader", [True, False], ids=["led by then", "led at once"])
@pytest.mark.parametrize("later_s", [60.0, 3 * 3600.0])
def test_an_old_backup_brings_nothing_back_and_loses_nobody(
    world: World, ledger: Ledger, later_s: float, has_leader: bool
) -> None:
    """The store is set back to before a task ended, and everything is started again: the ended task stays out, all
    others stay peers, at every moment, though what the backup holds of them is older than what agents have seen.
    """
    backup = world.stored()
    gone = next(task for task in world.swarm.tasks() if task.service == world.db)
    key = next(str(d.public_key) for a in world.agents.values() for p, n in a.kernel.namespaces.items()
               if p.endswith(gone.id) and (d := n.device) is not None)  # fmt: skip
    world.swarm.fail_task(gone.id)
    world.follow_swarm()
    world.settle(10)
    # Everything is written once more meanwhile, as when links change back and forth.
    for labels in ({}, {"hivewire.links": "db"}):
        world.swarm.set_labels(world.web, labels)
        world.follow_swarm()
        world.settle(10)
    world.clock.advance(later_s)
    world.time.advance(later_s)
    world.settle(10)
    world.resync()
    world.settle(10)
    before = world.kernels()
    assert not list(peers_named(world, key))
    world.restore({k: v for k, v in backup.items() if has_leader or k != LEADER_KEY})
    for _ in range(100):
        world.settle(0.5)
        assert without_rules(before, world.kernels()) == {}
        assert not list(peers_named(world, key))
    world.resync()
    for _ in range(100):
        world.settle(0.5)
        assert difference(before, world.kernels()) == {}
    doubts = [doubt for agent in world.agents.values() for doubt in agent.book.doubts()]
    assert doubts == [], "what holds was signed anew"
    assert not any(key.startswith(PEERS) and gone.id in key for key in world.stored())
    ledger.note("operator or thief", f"etcd's state from {later_s / 60:.0f} min ago, all started again upon it",
                "the task stays out, nobody else loses a peer", "store.rolled_back in the log")  # fmt: skip


def test_a_backup_with_a_task_s_earlier_key(world: World) -> None:
    """The policies in the backup are good, one peer is older than what agents have seen: that is no reason to let go of
    the present one, and the earlier key is nobody's peer at any moment.
    """
    backup = world.stored()
    agent = next(it for it in world.agents.values() if it.engine.running)
    task, local = next(iter(agent.engine.running.items()))
    device = agent.kernel.namespaces[local.sandbox].device
    assert device is not None
    earlier = str(device.public_key)
    agent.kernel.namespaces[local.sandbox].device = None
    agent.loop.on_event(TaskEvent(task, "start", stops=False))
    world.settle(20)
    world.resync()
    world.settle(10)
    before = world.kernels()
    assert not list(peers_named(world, earlier))
    world.restore(backup)
    for _ in range(200):
        world.settle(0.5)
        assert without_rules(before, world.kernels()) == {}
    world.resync()
    world.settle(40)
    assert difference(before, world.kernels()) == {}


def test_a_backup_from_before_a_revocation_opens_nothing(world: World) -> None:
    """A link that was taken back stays so, also while no controller leads that would write over the old policy."""
    backup = world.stored()
    world.swarm.set_labels(world.web, {"hivewire.enable": "true"})
    world.follow_swarm()
    world.settle(10)
    before = world.kernels()
    world.restore({**backup, LEADER_KEY: b"{}"}, keeps_leader=True)
    for _ in range(60):
        world.settle(0.5)
        assert world.kernels() == before


def test_a_node_cannot_use_up_the_generations(world: World) -> None:
    """A worker that says it has seen a record of the far future is not believed: no clock has reached that."""
    agent = world.agents[world.workers[0]]
    key = policy_key(world.web)
    lie = msgspec.structs.replace(agent.presence.record, doubts=(Doubt(key=key, reason="older", seen=1 << 62),))
    world.store.put(key_of(lie), agent.signatures.sign(lie))
    before = world.stored()[key]
    world.settle(5)
    assert world.stored()[key] == before


def test_what_verification_costs(world: World, ledger: Ledger) -> None:
    """How much of the time from a claim to an applied peer goes into signatures: measured and told, not judged."""
    stored = world.stored()
    claim_at = next(key for key in stored if key.startswith(CLAIMS))
    peer_at = next(key for key in stored if key.startswith(PEERS))
    agent = world.agents[writer_of(claim_at) or world.manager]
    claim = world.signing.verify(ClaimRecord, claim_at, stored[claim_at]).record
    peer = world.signing.verify(PeerRecord, peer_at, stored[peer_at]).record
    spent = []
    for _ in range(300):
        begun = time.perf_counter()
        world.signing.verify(ClaimRecord, claim_at, agent.signatures.sign(claim))
        agent.signatures.verify(PeerRecord, peer_at, world.signing.sign(peer))
        spent.append((time.perf_counter() - begun) * 1000)
    middle, late = statistics.median(spent), sorted(spent)[int(len(spent) * 0.99)]
    ledger.figures["sign and verify, claim and peer: median, p99"] = f"{middle:.2f} ms, {late:.2f} ms"
