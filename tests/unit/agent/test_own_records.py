"""Claims and statuses of this node's tasks: written when they change, and again when the store lost them."""

from pathlib import Path

import pytest

from agent.own import OwnRecords
from hivewire.errors import StoreUnavailable
from hivewire.identity import WORKER
from hivewire.ids import NodeId, ServiceId, TaskId
from hivewire.records import ClaimRecord, StatusRecord, TaskPhase, claim_key, encode, status_key
from hivewire.signed import Managers, SwarmSignatures
from hivewire.store.memory import MemoryStore
from hivewire.store.mirror import Mirror
from tests.fakes.clock import FakeClock
from tests.fakes.signatures import Unsigned
from tests.unit.agent.values import container_id, endpoint, public_key
from tests.unit.hivewire.swarm_pki import SwarmCa

NODE, TASK = NodeId("node-1"), TaskId("web.1")
CLAIM_KEY, STATUS_KEY = claim_key(NODE, TASK), status_key(NODE, TASK)


def claim(epoch: int = 1) -> ClaimRecord:
    return ClaimRecord(
        task=TASK,
        service=ServiceId("id-web"),
        node=NODE,
        container=container_id(TASK),
        public_key=str(public_key(1)),
        endpoint=endpoint(1),
        epoch=epoch,
        serving=True,
    )


def status(error: str = "") -> StatusRecord:
    return StatusRecord(task=TASK, service=ServiceId("id-web"), node=NODE, phase=TaskPhase.READY, error=error)


BOTH = {CLAIM_KEY: claim(), STATUS_KEY: status()}


class Rig:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.store = MemoryStore(self.clock)
        self.lost: list[frozenset[TaskId]] = []
        self.restart()

    def restart(self) -> None:
        """Begin as a new agent, which has read what the store holds."""
        self.mirror = Mirror(self.store, self.on_change, clock=self.clock)
        self.own = OwnRecords(self.store, self.mirror, Unsigned(), NODE)
        for prefix in self.own.prefixes:
            self.mirror.follow(prefix)
        self.step()
        self.lost.clear()

    def on_change(self, prefix: str, changed_keys: frozenset[str], complete: bool) -> None:
        self.lost.append(self.own.lost(prefix, changed_keys, listed=complete))

    def step(self) -> frozenset[TaskId]:
        """Let the mirror catch up; which tasks' records turned out not to be ours."""
        before = len(self.lost)
        for _ in range(12):
            self.clock.advance(10.0)
            self.mirror.step(0.0)
        return frozenset().union(*self.lost[before:])


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_one_transaction(rig: Rig) -> None:
    """Several records are written in one revision."""
    rig.own.write(BOTH)
    items = rig.store.list("").items
    assert {item.key: item.value for item in items} == {key: encode(record) for key, record in BOTH.items()}
    assert len({item.mod_revision for item in items}) == 1
    assert rig.own.transactions == 1


def test_unchanged_is_not_written(rig: Rig) -> None:
    """The same records again write nothing, before and after the mirror has seen them."""
    rig.own.write(BOTH)
    rig.own.write(BOTH)
    assert rig.step() == frozenset()
    rig.own.write(BOTH)
    assert (rig.own.transactions, rig.store.revision) == (1, 2)


def test_only_what_changed_is_written(rig: Rig) -> None:
    """Of two records the one that changed is written."""
    rig.own.write(BOTH)
    rig.own.write({CLAIM_KEY: claim(), STATUS_KEY: status("broken")})
    revisions = {item.key: item.mod_revision for item in rig.store.list("").items}
    assert revisions == {CLAIM_KEY: 2, STATUS_KEY: 3}


def test_changed_by_somebody_else(rig: Rig) -> None:
    """A record that somebody else changed or deleted makes its task come again, and is then written again."""
    rig.own.write(BOTH)
    rig.step()
    rig.store.put(CLAIM_KEY, encode(claim(epoch=99)))
    assert rig.step() == {TASK}
    rig.own.write(BOTH)
    assert rig.step() == frozenset()
    rig.store.delete(CLAIM_KEY)
    assert rig.step() == {TASK}
    rig.own.write(BOTH)
    assert rig.store.get(CLAIM_KEY) is not None


def test_wiped_store(rig: Rig) -> None:
    """A wiped store makes the task come again, everything is written again, and the claim is still known."""
    rig.own.write(BOTH)
    rig.step()
    rig.store.faults.wipe()
    assert rig.step() == {TASK}
    assert rig.own.read(ClaimRecord, CLAIM_KEY) == claim()
    rig.own.write(BOTH)
    assert {item.key for item in rig.store.list("").items} == set(BOTH)


def test_wiped_before_a_write_was_seen(rig: Rig) -> None:
    """A write that the mirror never saw does not count after the store was wiped."""
    rig.store.faults.drop_watches()
    rig.own.write(BOTH)
    rig.store.faults.wipe()
    rig.step()
    rig.own.write(BOTH)
    assert {item.key for item in rig.store.list("").items} == set(BOTH)


def test_new_agent_reads_the_old_one_s_claim(rig: Rig) -> None:
    """After a restart the claim of the agent before is read from the store, and the same is not written again."""
    rig.own.write(BOTH)
    rig.restart()
    assert rig.own.read(ClaimRecord, CLAIM_KEY) == claim()
    assert rig.own.tasks() == {TASK}
    rig.own.write(BOTH)
    assert rig.own.transactions == 0


def test_unreadable_claim(rig: Rig) -> None:
    """A claim that cannot be read counts as none, and is replaced."""
    rig.store.put(CLAIM_KEY, b"{")
    rig.restart()
    assert rig.own.read(ClaimRecord, CLAIM_KEY) is None
    rig.own.write(BOTH)
    assert rig.own.read(ClaimRecord, CLAIM_KEY) == claim()


def test_remove(rig: Rig) -> None:
    """Removing deletes what is there in one transaction, and removing again does nothing."""
    rig.own.write(BOTH)
    rig.own.remove(BOTH)
    assert rig.store.list("").items == ()
    assert rig.own.tasks() == frozenset()
    rig.own.remove(BOTH)
    assert rig.own.transactions == 2
    assert rig.step() == frozenset()
    assert rig.own.read(ClaimRecord, CLAIM_KEY) is None


def test_remove_forgets_what_never_reached_the_store(rig: Rig) -> None:
    """A claim whose write failed is forgotten when its task goes."""
    rig.store.faults.fail_next_calls(1)
    with pytest.raises(StoreUnavailable):
        rig.own.write(BOTH)
    rig.own.remove(BOTH)
    assert rig.own.read(ClaimRecord, CLAIM_KEY) is None


def test_remove_while_the_store_is_away(rig: Rig) -> None:
    """A removal that fails can be tried again."""
    rig.own.write(BOTH)
    rig.store.faults.fail_next_calls(1)
    with pytest.raises(StoreUnavailable):
        rig.own.remove(BOTH)
    rig.own.remove(BOTH)
    assert rig.store.list("").items == ()


def test_other_nodes_are_not_ours(rig: Rig) -> None:
    """Records of other nodes, also of one whose id begins like ours, are none of ours."""
    rig.store.put(claim_key(NodeId("node-12"), TASK), encode(claim()))
    rig.restart()
    assert rig.own.tasks() == frozenset()
    assert rig.own.prefixes == ("/hivewire/v1/claims/node-1/", "/hivewire/v1/status/node-1/")


def test_a_worn_signature_is_written_anew(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same records go to the store once more when the certificate that signed them is no longer the node's."""
    rig.own.write(BOTH)
    rig.step()
    before = rig.own.transactions
    rig.own.write(BOTH)
    assert rig.own.transactions == before
    monkeypatch.setattr(Unsigned, "is_worn", lambda *_: True)
    rig.own.write(BOTH)
    assert rig.own.transactions == before + 1


def test_an_older_copy_is_written_over(rig: Rig, tmp_path: Path) -> None:
    """What this node signed before, put back by somebody, says the same and is written again: readers refuse it."""
    signing = SwarmSignatures(SwarmCa().source(tmp_path, NODE, WORKER), Managers(frozenset))
    own = OwnRecords(rig.store, rig.mirror, signing, NODE)
    old = signing.sign(claim())
    own.write({CLAIM_KEY: claim()})
    rig.step()
    rig.store.put(CLAIM_KEY, old)
    rig.step()
    own.write({CLAIM_KEY: claim()})
    item = rig.store.get(CLAIM_KEY)
    assert item is not None
    assert item.value != old
    assert signing.verify(ClaimRecord, CLAIM_KEY, item.value).record == claim()
