"""What every Store must do, asked of the in-memory one and of a real etcd."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from hivewire.errors import (
    HivewireError,
    InvalidInput,
    LeaseExpired,
    RevisionConflict,
    StoreUnavailable,
    WatchCompacted,
)
from hivewire.store.api import (
    MAX_TXN_OPS,
    Compare,
    CreateRevisionIs,
    Delete,
    Event,
    IsAbsent,
    KeyValue,
    LeaseId,
    ModRevisionIs,
    Op,
    Progress,
    Put,
    Store,
    Watch,
    WatchEvents,
)
from hivewire.store.etcd import EtcdSettings, EtcdStore
from hivewire.store.memory import MemoryStore
from hivewire.store.mirror import Mirror
from tests.contract.etcd_server import ABSENT, EtcdServer, wait_until

_numbers = itertools.count()


@dataclass(frozen=True)
class Site:
    """A store under test, a prefix of its own for this test, and the means to compact it."""

    store: Store
    prefix: str
    compact: Callable[[int], None]

    def key(self, name: str) -> str:
        return self.prefix + name


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    if ABSENT:
        pytest.skip(ABSENT)
    server = EtcdServer(tmp_path_factory.mktemp("etcd"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(params=["memory", "etcd"])
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    prefix = f"test{next(_numbers)}/"
    if request.param == "memory":
        memory = MemoryStore()
        yield Site(memory, prefix, memory.compact)
        memory.close()
        return
    server: EtcdServer = request.getfixturevalue("etcd")
    store = EtcdStore(EtcdSettings((server.endpoint,), page_items=100))
    yield Site(store, prefix, server.compact)
    store.close()


@pytest.fixture
def watch(site: Site) -> Iterator[Watch]:
    opened = site.store.open_watch()
    yield opened
    opened.close()


def collect(watch: Watch, count: int, deadline_s: float = 30.0) -> list[WatchEvents]:
    """Return answers of the watch until they hold `count` events."""
    end = time.monotonic() + deadline_s
    got: list[WatchEvents] = []
    while sum(len(answer.events) for answer in got) < count:
        assert time.monotonic() < end, f"only {got} within {deadline_s} s"
        answer = watch.next(0.5)
        if isinstance(answer, WatchEvents):
            got.append(answer)
    return got


def events_of(watch: Watch, count: int) -> list[Event]:
    return [event for answer in collect(watch, count) for event in answer.events]


def next_failure(watch: Watch, deadline_s: float = 30.0) -> HivewireError:
    """Return what the watch raises in the end."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        try:
            watch.next(0.5)
        except HivewireError as error:
            return error
    raise AssertionError("the watch never failed")


def pairs(items: Iterator[KeyValue] | tuple[KeyValue, ...]) -> list[tuple[str, bytes]]:
    return [(item.key, item.value) for item in items]


def test_get_of_an_absent_key_is_none(site: Site) -> None:
    """A key that was never written reads as None, not as an error."""
    assert site.store.get(site.key("nothing")) is None


def test_put_then_get(site: Site) -> None:
    """A key carries the revision that created it, that changed it last, and how often it changed since."""
    first = site.store.put(site.key("a"), b"1")
    second = site.store.put(site.key("a"), b"2")
    assert second == first + 1
    assert site.store.get(site.key("a")) == KeyValue(site.key("a"), b"2", first, second, 2)


def test_values_are_any_bytes(site: Site) -> None:
    """Empty and binary values and keys beyond ASCII come back as they were."""
    for key, value in (("empty", b""), ("binary", bytes(range(256))), ("schlüssel/ü", b"x")):
        site.store.put(site.key(key), value)
        item = site.store.get(site.key(key))
        assert item is not None
        assert item.value == value


def test_delete(site: Site) -> None:
    """A deleted key is gone, and created anew it starts at version 1."""
    site.store.put(site.key("a"), b"1")
    deleted = site.store.delete(site.key("a"))
    assert site.store.get(site.key("a")) is None
    again = site.store.put(site.key("a"), b"2")
    assert again == deleted + 1
    assert site.store.get(site.key("a")) == KeyValue(site.key("a"), b"2", again, again, 1)


def test_delete_of_an_absent_key_changes_nothing(site: Site) -> None:
    """Deleting what is not there is no error and makes no revision."""
    before = site.store.put(site.key("a"), b"1")
    assert site.store.delete(site.key("other")) == before


def test_list_holds_the_prefix_in_key_order(site: Site) -> None:
    """A list has every key with the prefix, sorted, and no other."""
    for name in ("b/2", "b/10", "b/1", "bb", "a", "b"):
        site.store.put(site.key(name), name.encode())
    snapshot = site.store.list(site.key("b/"))
    assert pairs(snapshot.items) == [(site.key(n), n.encode()) for n in ("b/1", "b/10", "b/2")]


def test_list_says_its_revision(site: Site) -> None:
    """A list's revision is at least that of the newest change in it, whichever key that was."""
    site.store.put(site.key("a/1"), b"1")
    newest = site.store.put(site.key("elsewhere"), b"1")
    assert site.store.list(site.key("a/")).revision == newest


def test_list_of_nothing(site: Site) -> None:
    """An empty prefix region lists as empty, with a revision to watch from."""
    snapshot = site.store.list(site.key("a/"))
    assert snapshot.items == ()
    assert snapshot.revision >= 1


def test_list_of_more_than_one_page(site: Site) -> None:
    """A list is complete and at one revision however many keys there are."""
    for start in range(0, 1050, 100):
        site.store.txn((), [Put(site.key(f"n/{n:04}"), b"x") for n in range(start, min(start + 100, 1050))])
    snapshot = site.store.list(site.key("n/"))
    assert [item.key for item in snapshot.items] == [site.key(f"n/{n:04}") for n in range(1050)]


def test_list_of_more_than_four_megabytes(site: Site) -> None:
    """Neither a list nor a mirror is limited to the 4 MB that gRPC takes by default."""
    value = bytes(500_000)
    for n in range(20):
        site.store.put(site.key(f"big/{n:02}"), value)
    snapshot = site.store.list(site.key("big/"))
    assert [len(item.value) for item in snapshot.items] == [500_000] * 20
    mirror = Mirror(site.store, lambda *_: None)
    mirror.follow(site.key("big/"))
    mirror.start()
    try:
        wait_until(lambda: mirror.synced(site.key("big/")), "the mirror to list")
        assert tuple(mirror.items(site.key("big/")).values()) == snapshot.items
    finally:
        mirror.stop()


def test_list_of_the_past(site: Site) -> None:
    """A list at an older revision shows the keys as they were then."""
    site.store.put(site.key("a/gone"), b"1")
    then = site.store.put(site.key("a/kept"), b"old")
    site.store.put(site.key("a/kept"), b"new")
    site.store.delete(site.key("a/gone"))
    site.store.put(site.key("a/late"), b"1")
    snapshot = site.store.list(site.key("a/"), revision=then)
    assert snapshot.revision == then
    assert pairs(snapshot.items) == [(site.key("a/gone"), b"1"), (site.key("a/kept"), b"old")]


def test_list_of_a_compacted_or_future_revision(site: Site) -> None:
    """A revision that the store cannot show is refused; the compacted one itself can still be shown."""
    old = site.store.put(site.key("a"), b"1")
    now = site.store.put(site.key("a"), b"2")
    site.compact(now)
    with pytest.raises(WatchCompacted):
        site.store.list(site.prefix, revision=old)
    with pytest.raises(WatchCompacted):
        site.store.list(site.prefix, revision=now + 1000)
    assert pairs(site.store.list(site.prefix, revision=now).items) == [(site.key("a"), b"2")]


def test_txn_is_one_revision(site: Site) -> None:
    """All writes of a transaction share one revision."""
    site.store.put(site.key("c"), b"old")
    revision = site.store.txn((), [Put(site.key("a"), b"1"), Put(site.key("b"), b"2"), Delete(site.key("c"))])
    items = site.store.list(site.prefix).items
    assert [(item.key, item.mod_revision) for item in items] == [(site.key("a"), revision), (site.key("b"), revision)]


@pytest.mark.parametrize("existing", [False, True])
def test_compares(site: Site, existing: bool) -> None:
    """Each kind of compare holds exactly when it should, for absent and for existing keys."""
    key = site.key("a")
    revision = site.store.put(site.key("other"), b"")
    created = changed = 0
    if existing:
        created = site.store.put(key, b"1")
        revision = changed = site.store.put(key, b"2")
    holding: list[Compare] = [ModRevisionIs(key, changed), CreateRevisionIs(key, created)]
    failing: list[Compare] = [ModRevisionIs(key, 999_999), CreateRevisionIs(key, 999_999)]
    (failing if existing else holding).append(IsAbsent(key))
    for compare in holding:
        assert site.store.txn([compare], []) == revision
    for compare in failing:
        with pytest.raises(RevisionConflict):
            site.store.txn([compare], [])


def test_a_failed_txn_writes_nothing(site: Site) -> None:
    """One compare that does not hold stops all operations."""
    revision = site.store.put(site.key("a"), b"1")
    with pytest.raises(RevisionConflict):
        site.store.txn(
            [ModRevisionIs(site.key("a"), revision), IsAbsent(site.key("a"))],
            [Put(site.key("b"), b"1"), Delete(site.key("a"))],
        )
    assert pairs(site.store.list(site.prefix).items) == [(site.key("a"), b"1")]


def test_txn_limits(site: Site) -> None:
    """128 operations pass, one more is refused before anything is written."""
    site.store.txn((), [Put(site.key(f"{n}"), b"") for n in range(MAX_TXN_OPS)])
    with pytest.raises(InvalidInput, match="129"):
        site.store.txn((), [Put(site.key(f"more{n}"), b"") for n in range(MAX_TXN_OPS + 1)])
    assert len(site.store.list(site.prefix).items) == MAX_TXN_OPS


def test_what_a_txn_refuses(site: Site) -> None:
    """Empty keys and a key written twice are mistakes of the caller."""
    key = site.key("a")
    mistakes: list[list[Op]] = [[Put("", b"")], [Put(key, b"1"), Put(key, b"2")], [Put(key, b"1"), Delete(key)]]
    for ops in mistakes:
        with pytest.raises(InvalidInput):
            site.store.txn((), ops)
    with pytest.raises(InvalidInput):
        site.store.get("")
    assert site.store.list(site.prefix).items == ()


def test_compare_and_swap_has_one_winner(site: Site) -> None:
    """Of many threads that write on the same read, exactly one succeeds in each round."""
    key = site.key("counter")
    revision = site.store.put(key, b"0")
    for _ in range(10):
        barrier = threading.Barrier(8)
        won: list[int] = []

        def race(
            value: bytes, revision: int = revision, barrier: threading.Barrier = barrier, won: list[int] = won
        ) -> None:
            barrier.wait()
            try:
                won.append(site.store.txn([ModRevisionIs(key, revision)], [Put(key, value)]))
            except RevisionConflict:
                return

        threads = [threading.Thread(target=race, args=(bytes([n]),)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        revision = won[0]


def test_a_deposed_leader_cannot_write(site: Site) -> None:
    """A write guarded by the leader key's create revision fails once another one made that key anew."""
    store, leader = site.store, site.key("leader")
    old = store.txn([IsAbsent(leader)], [Put(leader, b"one", store.grant_lease(60))])
    store.txn([CreateRevisionIs(leader, old)], [Put(site.key("work"), b"by one")])
    with pytest.raises(RevisionConflict):
        store.txn([IsAbsent(leader)], [Put(leader, b"two")])
    store.delete(leader)
    new = store.txn([IsAbsent(leader)], [Put(leader, b"two")])
    with pytest.raises(RevisionConflict):
        store.txn([CreateRevisionIs(leader, old)], [Put(site.key("work"), b"by one, late")])
    store.txn([CreateRevisionIs(leader, new)], [Put(site.key("work"), b"by two")])
    item = store.get(site.key("work"))
    assert item is not None
    assert item.value == b"by two"


def test_an_expired_lease_deletes_its_keys(site: Site, watch: Watch) -> None:
    """When a lease runs out its keys go, in events, and neither keepalive nor put work with it any more."""
    lease = site.store.grant_lease(2)
    revision = site.store.txn((), [Put(site.key("a"), b"", lease), Put(site.key("b"), b"", lease)])
    item = site.store.get(site.key("a"))
    assert item is not None
    assert item.lease == lease
    watch.add(site.prefix, revision + 1)
    events = events_of(watch, 2)
    assert sorted((event.kind, event.key) for event in events) == [("delete", site.key("a")), ("delete", site.key("b"))]
    assert site.store.list(site.prefix).items == ()
    with pytest.raises(LeaseExpired):
        site.store.keepalive(lease)
    with pytest.raises(LeaseExpired):
        site.store.put(site.key("a"), b"", lease)
    site.store.revoke(lease)


def test_keepalive_keeps(site: Site) -> None:
    """A lease that is kept alive outlives its time, and says how long it lasts."""
    lease = site.store.grant_lease(2)
    site.store.put(site.key("a"), b"", lease)
    granted = time.monotonic()

    def outlived() -> bool:
        assert site.store.keepalive(lease) == 2
        return time.monotonic() - granted > 4

    wait_until(outlived, "twice the time of the lease to pass")
    assert site.store.get(site.key("a")) is not None


def test_revoke_deletes_only_its_keys(site: Site) -> None:
    """Revoking deletes what hangs on the lease now: not what was written over without it."""
    lease = site.store.grant_lease(60)
    site.store.put(site.key("kept"), b"1", lease)
    site.store.put(site.key("gone"), b"1", lease)
    site.store.put(site.key("kept"), b"2")
    site.store.revoke(lease)
    site.store.revoke(lease)
    assert pairs(site.store.list(site.prefix).items) == [(site.key("kept"), b"2")]


def test_a_lease_that_never_was(site: Site) -> None:
    """An unknown lease is a gone one."""
    with pytest.raises(LeaseExpired):
        site.store.keepalive(LeaseId(12345678901))
    with pytest.raises(InvalidInput):
        site.store.grant_lease(0)


def test_watch_sees_all_in_order(site: Site, watch: Watch) -> None:
    """A watch from a past revision delivers every change since, once and in order, with the items written."""
    start = site.store.put(site.key("a"), b"0")
    site.store.put(site.key("a"), b"1")
    watch.add(site.prefix, start)
    site.store.delete(site.key("a"))
    site.store.put(site.key("a"), b"2")
    key = site.key("a")
    assert events_of(watch, 4) == [
        Event("put", key, start, KeyValue(key, b"0", start, start, 1)),
        Event("put", key, start + 1, KeyValue(key, b"1", start, start + 1, 2)),
        Event("delete", key, start + 2),
        Event("put", key, start + 3, KeyValue(key, b"2", start + 3, start + 3, 1)),
    ]


def test_a_new_watch_is_confirmed(site: Site, watch: Watch) -> None:
    """Adding a prefix is answered with a Progress, also where nothing happens."""
    watch.add(site.prefix, 0)
    assert isinstance(watch.next(10), Progress)


def test_events_of_a_txn_stay_together(site: Site, watch: Watch) -> None:
    """All changes of one revision under a prefix come in one answer."""
    start = site.store.put(site.key("before"), b"")
    watch.add(site.prefix, start + 1)
    for _ in range(20):
        site.store.txn((), [Put(site.key(f"{n}"), b"") for n in range(MAX_TXN_OPS)])
    for answer in collect(watch, 20 * MAX_TXN_OPS):
        revisions = {event.mod_revision for event in answer.events}
        assert len(answer.events) == len(revisions) * MAX_TXN_OPS
        assert answer.revision == max(revisions)


def test_prefixes_share_a_watch(site: Site, watch: Watch) -> None:
    """Many prefixes on one watch are told apart, overlapping ones get the event each, others nothing."""
    start = site.store.put(site.key("start"), b"") + 1
    for name in ("a/", "b/", "b/1/", "c/"):
        watch.add(site.key(name), start)
    for name in ("a/x", "b/1/y", "d/z", "b/2", "a/x"):
        site.store.put(site.key(name), b"")
    got: dict[str, list[str]] = {}
    for answer in collect(watch, 5):
        got.setdefault(answer.prefix, []).extend(event.key for event in answer.events)
    assert got == {
        site.key("a/"): [site.key("a/x"), site.key("a/x")],
        site.key("b/"): [site.key("b/1/y"), site.key("b/2")],
        site.key("b/1/"): [site.key("b/1/y")],
    }


def test_a_removed_prefix_is_silent_and_can_come_back(site: Site, watch: Watch) -> None:
    """After remove nothing of the prefix is delivered, others go on, and adding it again starts anew."""
    start = site.store.put(site.key("start"), b"") + 1
    watch.add(site.key("a/"), start)
    watch.add(site.key("b/"), start)
    with pytest.raises(InvalidInput):
        watch.add(site.key("a/"), start)
    watch.remove(site.key("a/"))
    watch.remove(site.key("unknown/"))
    site.store.put(site.key("a/1"), b"")
    last = site.store.put(site.key("b/1"), b"")
    assert [answer.prefix for answer in collect(watch, 1)] == [site.key("b/")]
    watch.add(site.key("a/"), last)
    site.store.put(site.key("a/2"), b"")
    assert [event.key for event in events_of(watch, 1)] == [site.key("a/2")]


def test_progress_on_request(site: Site, watch: Watch) -> None:
    """A watch that is alive answers a request for progress with the store's revision."""
    revision = site.store.put(site.key("a"), b"")
    watch.add(site.prefix, revision + 1)
    assert isinstance(watch.next(10), Progress)
    watch.request_progress()
    answer = watch.next(10)
    assert isinstance(answer, Progress)
    assert answer.revision >= revision


def test_wake_ends_a_wait(site: Site, watch: Watch) -> None:
    """Another thread can end a wait for events, and waking before the wait counts too."""
    watch.wake()
    assert watch.next(60) is None
    waker = threading.Timer(0.05, watch.wake)
    waker.start()
    assert watch.next(60) is None
    waker.join()


def test_a_closed_watch_says_so(site: Site) -> None:
    """Closing ends a wait in another thread, and nothing can be had from the watch any more."""
    watch = site.store.open_watch()
    watch.add(site.prefix, 0)
    closer = threading.Timer(0.05, watch.close)
    closer.start()
    assert isinstance(next_failure(watch), StoreUnavailable)
    closer.join()
    watch.close()


def test_closing_the_store_ends_its_watches(site: Site) -> None:
    """A watch of a closed store fails; it does not hang."""
    watch = site.store.open_watch()
    watch.add(site.prefix, 0)
    site.store.close()
    assert isinstance(next_failure(watch), StoreUnavailable)
    watch.close()


def test_watch_from_a_compacted_revision(site: Site, watch: Watch) -> None:
    """Watching from before the compaction is refused, whatever else is on the watch."""
    old = site.store.put(site.key("a"), b"1")
    site.store.put(site.key("a"), b"2")
    now = site.store.put(site.key("a"), b"3")
    site.compact(now)
    watch.add(site.key("other/"), now)
    watch.add(site.key("a"), old)
    assert isinstance(next_failure(watch), WatchCompacted)


def test_watch_from_the_compacted_revision_itself(site: Site, watch: Watch) -> None:
    """The revision that was compacted to is the oldest one to watch from."""
    site.store.put(site.key("a"), b"1")
    now = site.store.put(site.key("a"), b"2")
    site.compact(now)
    watch.add(site.prefix, now)
    site.store.put(site.key("a"), b"3")
    assert [event.value for event in events_of(watch, 2)] == [b"2", b"3"]


def test_compaction_does_not_hurt_a_live_watch(site: Site, watch: Watch) -> None:
    """A watch that has seen everything goes on after a compaction."""
    start = site.store.put(site.key("a"), b"1")
    watch.add(site.prefix, start)
    collect(watch, 1)
    now = site.store.put(site.key("a"), b"2")
    collect(watch, 1)
    site.compact(now)
    site.store.put(site.key("a"), b"3")
    assert [event.value for event in events_of(watch, 1)] == [b"3"]


def test_a_burst_is_mirrored_exactly(site: Site) -> None:
    """After thousands of changes in a burst the mirror equals a list, and told them in far fewer calls."""
    calls: list[frozenset[str]] = []
    mirror = Mirror(site.store, lambda prefix, keys, complete: calls.append(keys))
    mirror.follow(site.prefix)
    mirror.start()
    try:
        wait_until(lambda: mirror.synced(site.prefix), "the first list")
        revision = 0
        for n in range(50):
            ops = [Put(site.key(f"{k:03}"), b"%d" % n) for k in range(n, n + 100)]
            revision = site.store.txn((), ops)
        revision = site.store.txn((), [Delete(site.key(f"{k:03}")) for k in range(50)])
        wait_until(lambda: mirror.revision(site.prefix) == revision, "the last event")
        assert (
            tuple(sorted(mirror.items(site.prefix).values(), key=lambda i: i.key)) == site.store.list(site.prefix).items
        )
        wait_until(lambda: bool(calls) and site.key("049") in calls[-1], "the last report")
        assert mirror.relists == 1
        assert mirror.events_applied == 5050
        assert len(calls) < 1000
    finally:
        mirror.stop()


def test_a_mirror_follows_and_unfollows(site: Site) -> None:
    """Prefixes may come and go while the mirror runs; each has its own items."""
    mirror = Mirror(site.store, lambda *_: None)
    mirror.start()
    try:
        site.store.put(site.key("a/1"), b"1")
        for name in ("a/", "b/"):
            mirror.follow(site.key(name))
        wait_until(lambda: mirror.synced(site.key("a/")) and mirror.synced(site.key("b/")), "both lists")
        site.store.put(site.key("b/1"), b"1")
        wait_until(lambda: list(mirror.items(site.key("b/"))) == [site.key("b/1")], "the event")
        mirror.unfollow(site.key("a/"))
        assert not mirror.synced(site.key("a/"))
        assert mirror.items(site.key("a/")) == {}
        site.store.put(site.key("a/2"), b"1")
        mirror.follow(site.key("a/"))
        wait_until(lambda: len(mirror.items(site.key("a/"))) == 2, "the list after following again")
        assert mirror.watch_restarts == 1
        assert mirror.healthy
    finally:
        mirror.stop()
