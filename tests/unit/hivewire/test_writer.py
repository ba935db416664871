"""Writes beside a mirror: what was written counts at once, until the mirror shows it."""

import random

import pytest

from hivewire.errors import RevisionConflict, StoreUnavailable
from hivewire.store.api import Delete, IsAbsent, Op, Put
from hivewire.store.memory import MemoryStore
from hivewire.store.mirror import Mirror
from hivewire.store.writer import Writer
from tests.fakes.clock import FakeClock


class Rig:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.store = MemoryStore(self.clock)
        self.mirror = Mirror(self.store, self.on_change, clock=self.clock, rng=random.Random(1))  # noqa: S311
        self.writer = Writer(self.store, self.mirror)
        for prefix in ("a/", "b/"):
            self.mirror.follow(prefix)
        self.step()

    def on_change(self, prefix: str, changed_keys: frozenset[str], complete: bool) -> None:
        if complete:
            self.writer.relisted(prefix)

    def step(self) -> None:
        """Let the mirror see all there is, also after a failure."""
        for _ in range(12):
            self.clock.advance(10.0)
            self.mirror.step(0.0)

    def write(self, *ops: Op) -> None:
        self.writer.write((), ops)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_a_write_counts_at_once(rig: Rig) -> None:
    """What was put is there and what was deleted is not, before the mirror has seen either."""
    rig.store.put("a/old", b"0")
    rig.step()
    rig.write(Put("a/1", b"1"), Delete("a/old"))
    assert rig.mirror.items("a/").keys() == {"a/old"}
    assert rig.writer.stored("a/") == {"a/1": b"1"}
    assert (rig.writer.get("a/", "a/1"), rig.writer.get("a/", "a/old")) == (b"1", None)


def test_the_mirror_takes_over(rig: Rig) -> None:
    """Once the mirror shows a write, a later change by somebody else counts."""
    rig.write(Put("a/1", b"1"))
    rig.step()
    rig.store.put("a/1", b"other")
    rig.step()
    assert rig.writer.get("a/", "a/1") == b"other"
    rig.store.delete("a/1")
    rig.step()
    assert rig.writer.stored("a/") == {}


def test_later_writes_of_others(rig: Rig) -> None:
    """What somebody wrote after us counts as soon as the mirror shows it."""
    rig.write(Put("a/1", b"1"))
    rig.store.put("a/1", b"other")
    rig.step()
    assert rig.writer.get("a/", "a/1") == b"other"


def test_the_last_write_counts(rig: Rig) -> None:
    """Of several writes of a key the last counts."""
    rig.write(Put("a/1", b"1"))
    rig.write(Put("a/1", b"2"))
    assert rig.writer.stored("a/") == {"a/1": b"2"}
    rig.write(Delete("a/1"))
    assert rig.writer.stored("a/") == {}


def test_prefixes_are_apart(rig: Rig) -> None:
    """A write below one prefix is not below another."""
    rig.write(Put("a/1", b"1"), Put("b/1", b"2"))
    assert rig.writer.stored("a/") == {"a/1": b"1"}
    assert rig.writer.stored("b/") == {"b/1": b"2"}


def test_wiped_store(rig: Rig) -> None:
    """After a wipe, where revisions begin anew, nothing that was written counts any more."""
    for number in range(5):
        rig.write(Put("a/1", b"%d" % number))
    rig.store.faults.wipe()
    rig.step()
    assert rig.writer.stored("a/") == {}
    assert rig.writer.get("a/", "a/1") is None


def test_failed_guard(rig: Rig) -> None:
    """A transaction that did not hold counts for nothing."""
    rig.store.put("a/1", b"theirs")
    rig.step()
    with pytest.raises(RevisionConflict):
        rig.writer.write((IsAbsent("a/1"),), (Put("a/1", b"ours"),))
    assert rig.writer.get("a/", "a/1") == b"theirs"
    assert rig.writer.transactions == 0


def test_lost_answer(rig: Rig) -> None:
    """Where the answer is lost only the mirror tells whether the write was done."""
    rig.store.faults.lose_next_answers(1)
    with pytest.raises(StoreUnavailable):
        rig.write(Put("a/1", b"1"))
    assert rig.writer.get("a/", "a/1") is None
    rig.step()
    assert rig.writer.get("a/", "a/1") == b"1"


def test_transactions_are_counted(rig: Rig) -> None:
    """Each transaction counts once, whatever number of keys it has."""
    rig.write(Put("a/1", b"1"), Put("a/2", b"2"))
    rig.write(Delete("a/1"))
    assert rig.writer.transactions == 2


def test_before_the_first_listing() -> None:
    """Before the mirror has listed anything, what was written is known and nothing else."""
    store = MemoryStore()
    store.put("a/0", b"0")
    writer = Writer(store, Mirror(store, lambda *_: None))
    writer.write((), (Put("a/1", b"1"),))
    assert writer.stored("a/") == {"a/1": b"1"}
