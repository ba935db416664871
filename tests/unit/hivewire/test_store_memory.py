"""What only the in-memory store has: an injected clock and faults. The contract suite has what it shares with etcd."""

import pytest

from hivewire.errors import LeaseExpired, StoreUnavailable
from hivewire.store.api import Progress, Put, WatchEvents
from hivewire.store.memory import MemoryStore
from tests.fakes.clock import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store(clock: FakeClock) -> MemoryStore:
    return MemoryStore(clock)


def test_leases_follow_the_injected_clock(store: MemoryStore, clock: FakeClock) -> None:
    """A lease ends exactly when its time is over on the injected clock, and a keepalive begins that time anew."""
    lease = store.grant_lease(10)
    store.put("a", b"", lease)
    clock.advance(9)
    assert store.keepalive(lease) == 10
    clock.advance(9.5)
    assert store.get("a") is not None
    clock.advance(0.5)
    assert store.get("a") is None
    with pytest.raises(LeaseExpired):
        store.keepalive(lease)


def test_an_expiry_reaches_a_watch_that_polls(store: MemoryStore, clock: FakeClock) -> None:
    """A watch sees the deletions of an expired lease though nobody else calls the store."""
    store.put("a", b"", store.grant_lease(10))
    watch = store.open_watch()
    watch.add("", 0)
    assert watch.next(0) == Progress(store.revision)
    clock.advance(10)
    got = watch.next(0)
    assert isinstance(got, WatchEvents)
    assert [(event.kind, event.key) for event in got.events] == [("delete", "a")]
    assert watch.next(0) is None


def test_unavailable(store: MemoryStore) -> None:
    """An unavailable store fails every call and ends its watches, and works again with its data."""
    store.put("a", b"1")
    watch = store.open_watch()
    store.faults.set_unavailable(True)
    for call in (lambda: store.get("a"), lambda: store.put("a", b""), store.open_watch, lambda: watch.next(0)):
        with pytest.raises(StoreUnavailable):
            call()
    store.faults.set_unavailable(False)
    assert store.get("a") is not None
    with pytest.raises(StoreUnavailable):
        watch.next(0)


def test_failing_calls_write_nothing(store: MemoryStore) -> None:
    """A call that fails before the store did anything leaves no trace."""
    store.faults.fail_next_calls(1)
    with pytest.raises(StoreUnavailable):
        store.put("a", b"")
    assert store.get("a") is None


def test_a_lost_answer_hides_a_write(store: MemoryStore) -> None:
    """A lost answer raises although the transaction was applied."""
    store.faults.lose_next_answers(1)
    with pytest.raises(StoreUnavailable):
        store.put("a", b"1")
    assert store.get("a") is not None
    store.put("a", b"2")


def test_dropped_watches_are_silent(store: MemoryStore) -> None:
    """A dropped watch gives neither events nor progress nor an error; a new one works."""
    watch = store.open_watch()
    watch.add("", 0)
    watch.next(0)
    store.faults.drop_watches()
    store.put("a", b"")
    watch.request_progress()
    assert watch.next(0) is None
    other = store.open_watch()
    other.add("", 2)
    assert other.next(0) == Progress(2)
    assert isinstance(other.next(0), WatchEvents)


def test_broken_watches_deliver_what_they_had(store: MemoryStore) -> None:
    """What was received before a stream broke is delivered before the failure."""
    watch = store.open_watch()
    watch.add("", 0)
    store.put("a", b"")
    store.faults.break_watches()
    assert isinstance(watch.next(0), Progress)
    assert isinstance(watch.next(0), WatchEvents)
    with pytest.raises(StoreUnavailable):
        watch.next(0)


def test_wipe(store: MemoryStore) -> None:
    """A wiped store begins again at revision 1 with nothing in it, and other leases than before."""
    lease = store.grant_lease(10)
    store.txn((), [Put("a", b"", lease), Put("b", b"")])
    store.faults.wipe(store_id=7)
    snapshot = store.list("")
    assert (snapshot.revision, snapshot.items, snapshot.store_id) == (1, (), 7)
    with pytest.raises(LeaseExpired):
        store.keepalive(lease)
    assert store.grant_lease(10) != lease
