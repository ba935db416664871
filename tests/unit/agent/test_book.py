"""What the agent remembers of the records that it follows, and what it lets go of when."""

from pathlib import Path

import pytest

from agent.book import HOLD_S, Book
from agent.seen import Seen
from hivewire.identity import MANAGER
from hivewire.ids import NodeId, ServiceId, TaskId
from hivewire.records import (
    MESH_KEY,
    QUARANTINES,
    SCHEMA,
    MeshRecord,
    Mode,
    PeerRecord,
    PolicyRecord,
    QuarantineKind,
    QuarantineRecord,
    encode,
    key_of,
    peer_key,
    peers_prefix,
    policy_key,
)
from hivewire.signed import Managers, SwarmSignatures
from tests.fakes.clock import FakeClock
from tests.fakes.signatures import Unsigned
from tests.unit.agent.values import peer, policy
from tests.unit.hivewire.swarm_pki import SwarmCa

DB = ServiceId("id-db")
FOLDER = peers_prefix(DB)
ONE, TWO = peer(5), peer(6)
KEY_ONE, KEY_TWO = peer_key(DB, ONE.task), peer_key(DB, TWO.task)


def book(*, now: float = 0.0) -> Book:
    """A book that has read a listing of two peers."""
    made = Book(Unsigned())
    made.update(FOLDER, {KEY_ONE: encode(ONE), KEY_TWO: encode(TWO)}, listed=True, now=now)
    return made


def test_empty() -> None:
    """A book that has read nothing has no record and knows no prefix completely."""
    assert Book(Unsigned()).get(PeerRecord, KEY_ONE) is None
    assert Book(Unsigned()).below(PeerRecord, FOLDER) == ()
    assert not Book(Unsigned()).is_complete(FOLDER)


def test_listing() -> None:
    """After a listing the prefix is complete, and its records come in key order."""
    made = book()
    assert made.is_complete(FOLDER)
    assert made.below(PeerRecord, FOLDER) == (ONE, TWO)
    assert made.get(PeerRecord, KEY_TWO) == TWO


def test_empty_listing() -> None:
    """A listing without a single key is complete as well."""
    made = Book(Unsigned())
    made.update(FOLDER, {}, listed=True, now=0.0)
    assert made.is_complete(FOLDER)


def test_events_alone_are_not_complete() -> None:
    """Events tell records, but never that there are no others."""
    made = Book(Unsigned())
    made.update(FOLDER, {KEY_ONE: encode(ONE)}, listed=False, now=0.0)
    assert made.below(PeerRecord, FOLDER) == (ONE,)
    assert not made.is_complete(FOLDER)


def test_deletion_event() -> None:
    """A deletion that was seen counts at once."""
    made = book()
    made.update(FOLDER, {KEY_ONE: None}, listed=False, now=1.0)
    assert made.below(PeerRecord, FOLDER) == (TWO,)


def test_missing_from_a_listing() -> None:
    """A key that a listing lacks stays for the hold time, no less and no more, and is named when it goes."""
    made = book()
    made.update(FOLDER, {KEY_ONE: None}, listed=True, now=10.0)
    assert made.expire(10.0 + HOLD_S - 0.1) == frozenset()
    assert made.below(PeerRecord, FOLDER) == (ONE, TWO)
    assert made.expire(10.0 + HOLD_S) == {KEY_ONE}
    assert made.below(PeerRecord, FOLDER) == (TWO,)
    assert made.expire(10.0 + 2 * HOLD_S) == frozenset()


def test_hold_counts_from_the_first_listing_without_it() -> None:
    """Further listings without the key do not lengthen its hold."""
    made = book()
    made.update(FOLDER, {KEY_ONE: None}, listed=True, now=10.0)
    made.update(FOLDER, {KEY_ONE: None}, listed=True, now=10.0 + HOLD_S / 2)
    assert made.expire(10.0 + HOLD_S) == {KEY_ONE}


def test_written_again_in_time() -> None:
    """A missing key that comes back is held no longer, with its new value."""
    made, newer = book(), peer(5, epoch=9)
    made.update(FOLDER, {KEY_ONE: None}, listed=True, now=10.0)
    made.update(FOLDER, {KEY_ONE: encode(newer)}, listed=False, now=11.0)
    assert made.expire(10.0 + 2 * HOLD_S) == frozenset()
    assert made.get(PeerRecord, KEY_ONE) == newer


def test_deletion_event_of_a_missing_key() -> None:
    """An event of its deletion ends the hold."""
    made = book()
    made.update(FOLDER, {KEY_ONE: None}, listed=True, now=10.0)
    made.update(FOLDER, {KEY_ONE: None}, listed=False, now=11.0)
    assert made.below(PeerRecord, FOLDER) == (TWO,)
    assert made.expire(1e9) == frozenset()


def test_unknown_key_is_not_held() -> None:
    """A listing's word about a key that was never there leaves nothing to expire."""
    made = Book(Unsigned())
    made.update(FOLDER, {KEY_ONE: None}, listed=True, now=0.0)
    assert made.expire(1e9) == frozenset()


def test_unreadable_keeps_the_last_good_one() -> None:
    """A value that cannot be read leaves the record before it in use and says why, until a readable one comes."""
    made, newer = book(), peer(5, epoch=9)
    assert made.get(PeerRecord, KEY_ONE) == ONE
    made.update(FOLDER, {KEY_ONE: b"{"}, listed=False, now=1.0)
    for _ in range(2):
        assert made.below(PeerRecord, FOLDER) == (ONE, TWO)
    assert list(made.unreadable) == [KEY_ONE]
    assert "PeerRecord cannot be read" in str(made.unreadable[KEY_ONE])
    made.update(FOLDER, {KEY_ONE: b"[]"}, listed=False, now=2.0)
    assert made.get(PeerRecord, KEY_ONE) == ONE
    made.update(FOLDER, {KEY_ONE: encode(newer)}, listed=False, now=3.0)
    assert made.get(PeerRecord, KEY_ONE) == newer
    assert made.unreadable == {}


def test_unreadable_from_the_start() -> None:
    """A record that never was readable is none, and stops no other."""
    made = Book(Unsigned())
    made.update(FOLDER, {KEY_ONE: b"\xff", KEY_TWO: encode(TWO)}, listed=True, now=0.0)
    assert made.below(PeerRecord, FOLDER) == (TWO,)


def test_mesh_of_a_later_schema() -> None:
    """A mesh record that is too new leaves the one before it in use."""
    made, mesh = Book(Unsigned()), MeshRecord(mesh="m", settled=True)
    made.update(MESH_KEY, {MESH_KEY: encode(mesh)}, listed=True, now=0.0)
    assert made.get(MeshRecord, MESH_KEY) == mesh
    made.update(MESH_KEY, {MESH_KEY: encode(MeshRecord(mesh="m", schema=SCHEMA + 1))}, listed=False, now=1.0)
    assert made.get(MeshRecord, MESH_KEY) == mesh
    assert "upgrade" in str(made.unreadable[MESH_KEY])


def test_deleting_an_unreadable_key() -> None:
    """With the key goes the complaint about it, and the record that stood in for it."""
    made = book()
    made.get(PeerRecord, KEY_ONE)
    made.update(FOLDER, {KEY_ONE: b"{"}, listed=False, now=1.0)
    made.get(PeerRecord, KEY_ONE)
    made.update(FOLDER, {KEY_ONE: None}, listed=False, now=2.0)
    assert made.get(PeerRecord, KEY_ONE) is None
    assert made.unreadable == {}
    made.update(FOLDER, {KEY_ONE: b"{"}, listed=False, now=3.0)
    assert made.get(PeerRecord, KEY_ONE) is None


def test_drop() -> None:
    """A dropped prefix is forgotten as if it had never been read, others are not."""
    made, web = book(), policy()
    made.update(policy_key(web.service), {policy_key(web.service): encode(web)}, listed=True, now=0.0)
    made.update(FOLDER, {KEY_ONE: None}, listed=True, now=0.0)
    made.drop(FOLDER)
    assert made.below(PeerRecord, FOLDER) == ()
    assert made.get(PeerRecord, KEY_TWO) is None
    assert not made.is_complete(FOLDER)
    assert made.expire(1e9) == frozenset()
    assert made.get(PolicyRecord, policy_key(web.service)) == web


def test_folders_are_apart() -> None:
    """The peers of one service are not those of another."""
    made, other = book(), peer(7, "cache")
    folder = peers_prefix(other.service)
    made.update(folder, {peer_key(other.service, TaskId("cache.7")): encode(other)}, listed=True, now=0.0)
    assert made.below(PeerRecord, folder) == (other,)
    assert made.below(PeerRecord, FOLDER) == (ONE, TWO)


# -- with real signatures ----------------------------------------------------------------------------------------------


@pytest.fixture
def manager(tmp_path: Path) -> SwarmSignatures:
    return SwarmSignatures(SwarmCa().source(tmp_path, "m1", MANAGER), Managers(lambda: frozenset({NodeId("m1")})))


def test_an_older_record_is_not_taken_back(manager: SwarmSignatures) -> None:
    """What was seen once stays seen: put back, an older policy changes nothing, for the next agent of the node too."""
    open_, closed = policy(mode=Mode.OBSERVE), policy(mode=Mode.ENFORCE)
    older, newer = manager.sign(open_), manager.sign(closed)
    key, seen = policy_key(open_.service), Seen()
    made = Book(manager, seen)
    for value in (older, newer):
        made.update(key, {key: value}, listed=False, now=0.0)
        assert made.get(PolicyRecord, key) is not None
    made.update(key, {key: older}, listed=False, now=1.0)
    assert made.get(PolicyRecord, key) == closed
    assert "older" in str(made.unreadable[key])
    after_restart = Book(manager, seen)
    after_restart.update(key, {key: older}, listed=True, now=0.0)
    assert after_restart.get(PolicyRecord, key) is None


def test_what_was_deleted_is_not_put_back(manager: SwarmSignatures) -> None:
    """A peer that was taken away does not return with its old record, and does with a new one."""
    made, record = Book(manager), peer(5)
    value = manager.sign(record)
    for step in (value, None, value):
        made.update(FOLDER, {KEY_ONE: step}, listed=False, now=0.0)
        made.below(PeerRecord, FOLDER)
    assert made.below(PeerRecord, FOLDER) == ()
    made.update(FOLDER, {KEY_ONE: manager.sign(record)}, listed=False, now=0.0)
    assert made.below(PeerRecord, FOLDER) == (record,)


def test_a_new_agent_knows_the_floor(manager: SwarmSignatures) -> None:
    """Who has seen nothing yet takes nothing older than the oldest record there should be."""
    made, value = Book(manager), manager.sign(peer(5))
    generation = manager.verify(PeerRecord, KEY_ONE, value).generation
    mesh = manager.sign(MeshRecord(mesh="m", floor=generation + 1))
    made.update(MESH_KEY, {MESH_KEY: mesh}, listed=True, now=0.0)
    made.update(FOLDER, {KEY_ONE: value}, listed=True, now=0.0)
    assert made.below(PeerRecord, FOLDER) == ()


def test_a_new_manager_is_believed_after_a_while(tmp_path: Path) -> None:
    """What was refused because its signer was no manager yet counts as soon as the engine names it."""
    managers: list[NodeId] = []
    clock = FakeClock()
    signatures = SwarmSignatures(
        SwarmCa().source(tmp_path, "m1", MANAGER), Managers(lambda: frozenset(managers), clock)
    )
    made, value = Book(signatures), signatures.sign(peer(5))
    made.update(FOLDER, {KEY_ONE: value}, listed=True, now=0.0)
    assert made.below(PeerRecord, FOLDER) == ()
    managers.append(NodeId("m1"))
    clock.advance(1.0)
    made.expire(1.0)
    assert made.below(PeerRecord, FOLDER) == (peer(5),)


def test_what_is_not_believed_is_told(manager: SwarmSignatures) -> None:
    """A record that is older than what was seen is a doubt with the generation that was; nonsense is one without."""
    seen = Seen()
    first = Book(manager, seen)
    old, new = manager.sign(policy()), manager.sign(policy(mode=Mode.OFF))
    key = policy_key(policy().service)
    first.update(key, {key: new}, listed=False, now=0.0)
    assert first.get(PolicyRecord, key) is not None
    made = Book(manager, seen)
    made.update(key, {key: old}, listed=False, now=0.0)
    assert made.get(PolicyRecord, key) is None
    (doubt,) = made.doubts()
    assert (doubt.key, doubt.reason) == (key, "it is older than what was there before")
    assert doubt.seen == manager.verify(PolicyRecord, key, new).generation
    made.update(key, {key: b"nonsense"}, listed=False, now=0.0)
    made.get(PolicyRecord, key)
    assert [it.seen for it in made.doubts()] == [0]
    made.update(key, {key: new}, listed=False, now=0.0)
    assert made.get(PolicyRecord, key) is not None
    assert made.doubts() == ()


def test_a_complaint_ends_with_what_it_is_about(manager: SwarmSignatures) -> None:
    """Whether or not anybody reads what lies there now: who asked once for a record need not ask again."""
    old, new = manager.sign(MeshRecord(mesh="m")), manager.sign(MeshRecord(mesh="m"))
    made = Book(manager)
    made.update(MESH_KEY, {MESH_KEY: new}, listed=True, now=0.0)
    made.get(MeshRecord, MESH_KEY)
    made.update(MESH_KEY, {MESH_KEY: old}, listed=False, now=0.0)
    made.get(MeshRecord, MESH_KEY)
    assert [it.key for it in made.doubts()] == [MESH_KEY]
    made.update(MESH_KEY, {MESH_KEY: manager.sign(MeshRecord(mesh="m"))}, listed=False, now=0.0)
    assert made.doubts() == ()


def test_a_forged_quarantine_that_nobody_read_leaves_nothing(manager: SwarmSignatures) -> None:
    """It came and went before anybody asked for it."""
    made, key = Book(manager), key_of(QuarantineRecord(kind=QuarantineKind.SERVICE, id="s", name="s"))
    made.update(QUARANTINES, {key: b"nonsense"}, listed=False, now=0.0)
    made.update(QUARANTINES, {key: None}, listed=False, now=0.0)
    assert not made.is_quarantined([key])
    assert made.doubts() == ()


def test_what_cannot_be_believed_is_no_absence() -> None:
    """A folder is in doubt while one of its keys never had a good record; with an earlier good one it is not."""
    made = book()
    made.below(PeerRecord, FOLDER)
    assert not made.is_in_doubt(FOLDER)
    made.update(FOLDER, {KEY_ONE: b"nonsense"}, listed=False, now=0.0)
    assert made.below(PeerRecord, FOLDER) == (ONE, TWO)
    assert not made.is_in_doubt(FOLDER), "the last good one stays"
    made.update(FOLDER, {f"{FOLDER}new": b"nonsense"}, listed=False, now=0.0)
    made.below(PeerRecord, FOLDER)
    assert made.is_in_doubt(FOLDER)
    assert not made.is_in_doubt(peers_prefix(ServiceId("id-other")))
    made.update(FOLDER, {f"{FOLDER}new": None}, listed=False, now=0.0)
    assert not made.is_in_doubt(FOLDER)


def test_a_forged_quarantine_that_is_gone_leaves_nothing(manager: SwarmSignatures) -> None:
    """With its deletion the complaint ends; of one that a manager signed a forgery and a deletion take nothing away."""
    made = Book(manager)
    shut = QuarantineRecord(kind=QuarantineKind.SERVICE, id="s", name="s")
    key = key_of(shut)
    made.update(QUARANTINES, {key: encode(shut)}, listed=False, now=0.0)
    assert not made.is_quarantined([key])
    assert made.doubts() != ()
    made.update(QUARANTINES, {key: None}, listed=False, now=0.0)
    assert made.doubts() == ()
    made.update(QUARANTINES, {key: manager.sign(shut)}, listed=False, now=0.0)
    assert made.is_quarantined([key])
    for value in (encode(shut), None):
        made.update(QUARANTINES, {key: value}, listed=False, now=0.0)
        assert made.is_quarantined([key])
    assert made.doubts() == ()
