"""What the controller takes of stored records, with real signatures: the last good one, and what to write anew."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from controller.known import Known
from hivewire.identity import MANAGER
from hivewire.ids import NodeId, ServiceId
from hivewire.records import POLICIES, Mode, PolicyRecord, policy_key
from hivewire.signed import Managers, SwarmSignatures
from hivewire.store.api import Put
from hivewire.store.memory import MemoryStore
from hivewire.store.mirror import Mirror
from hivewire.store.writer import Writer
from tests.unit.hivewire.swarm_pki import SwarmCa, write

SERVICE = ServiceId("svc1")
KEY = policy_key(SERVICE)
OFF, ENFORCED = (
    PolicyRecord(service=SERVICE, name="shop_web", stack="shop", mode=mode, networks=())
    for mode in (Mode.OFF, Mode.ENFORCE)
)


class Rig:
    def __init__(self, folder: Path) -> None:
        self.ca, self.folder = SwarmCa(), folder
        managers = Managers(lambda: frozenset({NodeId("m1")}))
        self.signatures = SwarmSignatures(self.ca.source(folder, "m1", MANAGER), managers)
        store = MemoryStore()
        self.writer = Writer(store, Mirror(store, lambda *_: None))
        self.known = Known(PolicyRecord, POLICIES, self.writer, self.signatures)

    def put(self, value: bytes) -> None:
        self.writer.write((), (Put(KEY, value),))
        self.known.refresh((KEY,))


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def test_an_older_record_is_written_over(rig: Rig) -> None:
    """The newer one stays what is known; the one that was put back counts as to be written anew, and says why."""
    older, newer = rig.signatures.sign(OFF), rig.signatures.sign(ENFORCED)
    for value in (older, newer):
        rig.put(value)
    assert rig.known.stored() == {KEY: ENFORCED}
    rig.put(older)
    assert rig.known.record(KEY) == ENFORCED
    assert rig.known.stored() == {KEY: None}
    assert "older" in str(rig.known.refused[KEY])


def test_a_forged_record_is_written_over(rig: Rig) -> None:
    """The last good one stays known, a first one never gets there."""
    rig.put(b"{}")
    assert (rig.known.record(KEY), rig.known.stored()) == (None, {KEY: None})
    rig.put(rig.signatures.sign(ENFORCED))
    rig.put(b"{}")
    assert (rig.known.record(KEY), rig.known.stored()) == (ENFORCED, {KEY: None})


def test_a_worn_signature_is_written_anew(rig: Rig) -> None:
    """After the certificate was renewed the record stays what it is, and is signed again."""
    rig.put(rig.signatures.sign(ENFORCED))
    assert rig.known.stored() == {KEY: ENFORCED}
    renewed = rig.ca.issue("m1", MANAGER)
    write(rig.folder / "m1", renewed.certificate, renewed.key_pem(), rig.ca.pem)
    assert rig.known.record(KEY) == ENFORCED
    assert rig.known.stored() == {KEY: None}


def test_what_was_refused_is_looked_at_again(tmp_path: Path) -> None:
    """A certificate that was not valid yet by this node's clock is, once the clock is set."""
    now = [datetime.now(UTC) - timedelta(hours=3)]
    rig = Rig(tmp_path)
    rig.known = Known(
        PolicyRecord,
        POLICIES,
        rig.writer,
        SwarmSignatures(
            rig.ca.source(tmp_path, "m2", MANAGER), Managers(lambda: frozenset({NodeId("m1")})), lambda: now[0]
        ),
    )
    rig.put(rig.signatures.sign(ENFORCED))
    assert "clock" in str(rig.known.refused[KEY])
    now[0] += timedelta(hours=3)
    rig.known.retry()
    assert rig.known.stored() == {KEY: ENFORCED}


def test_what_readers_have_seen_newer_is_written_anew(rig: Rig) -> None:
    """A good record of a lower generation than an agent has seen stays known, and is to be signed again."""
    rig.put(rig.signatures.sign(ENFORCED))
    generation = rig.known.oldest
    assert generation is not None
    assert not rig.known.is_older(KEY, generation)
    assert rig.known.is_older(KEY, generation + 1)
    assert not rig.known.is_older(KEY + "x", generation + 1)
    rig.known.write_anew({KEY: generation + 1})
    assert rig.known.records() == {KEY: ENFORCED}
    assert rig.known.stored() == {KEY: None}
    rig.signatures.outrun(generation + 1)
    rig.put(rig.signatures.sign(ENFORCED))
    assert rig.known.stored() == {KEY: ENFORCED}


def test_replays_are_counted(rig: Rig) -> None:
    """Each by its cause, among all refusals."""
    old = rig.signatures.sign(ENFORCED)
    rig.put(rig.signatures.sign(OFF))
    rig.put(old)
    rig.put(b"nonsense")
    assert rig.signatures.refused == {"replay": 1, "form": 1}
