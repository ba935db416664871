"""Who leads, over one store in memory and a clock that only moves when told to."""

import threading
from collections.abc import Callable

import pytest

from controller.leader import LEADERS, LEASE_S, LeaderRecord, Leadership
from hivewire.errors import NotLeader, RevisionConflict, StoreUnavailable
from hivewire.ids import NodeId
from hivewire.records import LEADER_KEY
from hivewire.store.api import Put
from hivewire.store.memory import MemoryStore
from tests.fakes.clock import FakeClock


class Rig:
    """Two controllers that want to lead over one store."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.store = MemoryStore(self.clock)
        self.won: list[str] = []
        self.a, self.b = self.candidate("a"), self.candidate("b")

    def candidate(self, name: str, clock: Callable[[], float] | None = None) -> Leadership:
        me = LeaderRecord(node=NodeId(f"node-{name}"), hostname=name)
        return Leadership(self.store, me, lambda: self.won.append(name), monotonic=clock or self.clock)

    def leaders(self) -> list[str]:
        return [name for name, each in (("a", self.a), ("b", self.b)) if each.is_leader]

    def named(self) -> str:
        """Who the store says leads."""
        item = self.store.get(LEADER_KEY)
        return "" if item is None else LEADERS.decode(item.value).hostname


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_before_the_first_step_nobody_leads(rig: Rig) -> None:
    """A controller that has not asked does not lead."""
    assert rig.leaders() == []
    with pytest.raises(NotLeader):
        rig.a.guard()


def test_one_of_two_leads(rig: Rig) -> None:
    """The first to ask leads and is told so once; the other may not write, however often it asks."""
    for _ in range(10):
        rig.a.step()
        rig.b.step()
        rig.clock.advance(LEASE_S / 3)
        assert rig.leaders() == ["a"]
    assert rig.won == ["a"]
    assert rig.named() == "a"
    rig.store.txn((rig.a.guard(),), [Put("k", b"1")])
    with pytest.raises(NotLeader):
        rig.b.guard()


def test_a_lost_lease_is_noticed_without_the_store(rig: Rig) -> None:
    """A leader that could not renew for the lease's time stops by its own clock, and the other wins."""
    rig.a.step()
    rig.b.step()
    rig.clock.advance(LEASE_S)
    assert rig.leaders() == []
    with pytest.raises(NotLeader):
        rig.a.guard()
    rig.b.step()
    assert rig.leaders() == ["b"]
    rig.a.step()
    assert rig.leaders() == ["b"]
    assert rig.won == ["a", "b"]


def test_a_deposed_leader_cannot_write(rig: Rig) -> None:
    """A guard taken while it led is refused by the store once another leads, though it knows nothing of that yet."""
    slow_clock = FakeClock()
    slow = rig.candidate("slow", slow_clock)
    slow.step()
    guard = slow.guard()
    rig.clock.advance(LEASE_S)
    rig.b.step()
    assert slow.is_leader  # by its own clock no time has passed
    for each in (guard, slow.guard()):
        with pytest.raises(RevisionConflict):
            rig.store.txn((each,), [Put("k", b"1")])
    assert rig.store.get("k") is None
    slow.step()
    assert not slow.is_leader


def test_a_lease_that_ran_out_with_nobody_after_it_is_won_again(rig: Rig) -> None:
    """Losing and winning are two things: the guard of the first term does not hold in the second."""
    rig.a.step()
    first = rig.a.guard()
    rig.clock.advance(LEASE_S)
    rig.a.step()
    assert rig.leaders() == ["a"]
    assert rig.won == ["a", "a"]
    with pytest.raises(RevisionConflict):
        rig.store.txn((first,), [Put("k", b"1")])
    rig.store.txn((rig.a.guard(),), [Put("k", b"1")])


def test_a_guard_never_asks_for_the_absence_of_a_leader() -> None:
    """Losing the lead while a guard is being made refuses the guard; a guard that holds while nobody leads would let
    a deposed controller write.
    """
    rig = Rig()
    clock = FakeClock()
    meanwhile: list[Callable[[], None]] = []

    def now() -> float:
        while meanwhile:
            meanwhile.pop()()
        return clock()

    a = rig.candidate("a", now)
    a.step()
    rig.clock.advance(LEASE_S)
    rig.b.step()
    meanwhile.append(a.step)
    guard = a.guard()
    assert guard.revision != 0
    with pytest.raises(RevisionConflict):
        rig.store.txn((guard,), [Put("k", b"1")])
    with pytest.raises(NotLeader):
        a.guard()


def test_an_unknown_outcome_heals(rig: Rig) -> None:
    """Whether the election was written or not: nobody leads on a guess, and after the lease somebody does."""
    rig.store.faults.lose_next_answers(1)
    with pytest.raises(StoreUnavailable):
        rig.a.step()
    assert rig.named() == "a"
    assert rig.leaders() == []
    rig.a.step()
    rig.b.step()
    assert rig.leaders() == []
    rig.clock.advance(LEASE_S)
    rig.b.step()
    rig.a.step()
    assert rig.leaders() == ["b"]
    assert rig.won == ["b"]


@pytest.mark.parametrize("failing", [1, 2])
def test_an_election_that_was_not_written_is_tried_again(rig: Rig, failing: int) -> None:
    """A store that fails at the lease or at the election costs one try."""
    rig.store.faults.fail_next_calls(failing)
    for _ in range(failing):
        with pytest.raises(StoreUnavailable):
            rig.a.step()
    rig.a.step()
    assert rig.leaders() == ["a"]


def test_what_was_not_written_in_a_gap_is_asked_for_again(rig: Rig) -> None:
    """A leader that lapsed by its own clock, but whose lease the store kept, is told as if it had won."""
    fast = FakeClock()
    a = rig.candidate("a", fast)
    a.step()
    fast.advance(LEASE_S)
    assert not a.is_leader
    a.step()
    assert a.is_leader
    assert rig.won == ["a", "a"]
    a.step()
    assert rig.won == ["a", "a"]


def test_a_leader_whose_key_was_deleted_stands_again(rig: Rig) -> None:
    """The lease may outlive the key, where a person deleted it; then another leads, and only that one."""
    rig.a.step()
    rig.store.delete(LEADER_KEY)
    rig.b.step()
    rig.a.step()
    assert rig.leaders() == ["b"]
    assert rig.named() == "b"


def test_a_wiped_store_is_won_anew(rig: Rig) -> None:
    """Leases and revisions begin again; the leader of before has to win like everyone."""
    rig.a.step()
    before = rig.store.get(LEADER_KEY)
    rig.store.faults.wipe()
    rig.b.step()
    rig.a.step()
    assert rig.leaders() == ["b"]
    assert rig.b.holds(rig.store.get(LEADER_KEY))
    assert not rig.a.holds(rig.store.get(LEADER_KEY))
    assert not rig.b.holds(before)
    assert not rig.b.holds(None)


def test_an_unreachable_store_deposes_nobody_at_once(rig: Rig) -> None:
    """The leader goes on until its lease is over, and leads again when the store is back in time."""
    rig.a.step()
    rig.store.faults.set_unavailable(True)
    rig.clock.advance(LEASE_S / 2)
    with pytest.raises(StoreUnavailable):
        rig.a.step()
    assert rig.leaders() == ["a"]
    rig.store.faults.set_unavailable(False)
    rig.a.step()
    rig.clock.advance(LEASE_S - 1)
    assert rig.leaders() == ["a"]


def test_resigning_hands_over_at_once(rig: Rig) -> None:
    """A controller that stops leaves no lease to wait for."""
    rig.a.step()
    rig.b.step()
    stop = threading.Event()
    stop.set()
    rig.a.run(stop)
    assert rig.leaders() == []
    rig.b.step()
    assert rig.leaders() == ["b"]


def test_resigning_without_a_store_still_ends(rig: Rig) -> None:
    """Stopping never fails; the lease then runs out by itself."""
    rig.a.step()
    rig.store.faults.set_unavailable(True)
    stop = threading.Event()
    stop.set()
    rig.a.run(stop)
    assert rig.leaders() == []


def test_run_stands_steps_and_stops(rig: Rig) -> None:
    """The loop goes on through errors of the store, wins, and resigns when told to stop."""
    stop = threading.Event()
    won = threading.Event()
    rig.store.faults.fail_next_calls(1)
    a = Leadership(rig.store, LeaderRecord(node=NodeId("n"), hostname="a"), won.set, monotonic=rig.clock)
    loop = threading.Thread(target=a.run, args=(stop,))
    loop.start()
    a.nudge()
    assert won.wait(20)
    stop.set()
    a.nudge()
    loop.join(20)
    assert not loop.is_alive()
    assert rig.store.get(LEADER_KEY) is None
