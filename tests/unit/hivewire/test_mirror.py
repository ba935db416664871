"""The mirror, step by step, over an in-memory store and a clock that only moves when told to."""

import queue
import random
from collections.abc import Callable

import pytest

from hivewire.errors import StoreUnavailable
from hivewire.store.api import Delete, Event, KeyValue, Put, Snapshot, WatchEvents
from hivewire.store.memory import MemoryStore
from hivewire.store.mirror import Mirror, MirrorSettings, difference, is_newer
from tests.fakes.clock import FakeClock

SETTINGS = MirrorSettings()


class Rig:
    """A store, a mirror of it, what the mirror told, and the time."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.store = MemoryStore(self.clock)
        self.told: list[tuple[str, set[str], bool]] = []
        self.mirror = Mirror(self.store, self.tell, clock=self.clock, rng=random.Random(1))  # noqa: S311

    def tell(self, prefix: str, changed_keys: frozenset[str], complete: bool) -> None:
        self.told.append((prefix, set(changed_keys), complete))

    def settle(self) -> list[tuple[str, set[str], bool]]:
        """Let the mirror do all that is due now and shortly, and return what it told meanwhile."""
        before = len(self.told)
        for _ in range(4):
            self.mirror.step(0.0)
            self.clock.advance(SETTINGS.coalesce_s)
        return self.told[before:]

    def recover(self) -> list[tuple[str, set[str], bool]]:
        """Let enough time pass for any retry, and return what the mirror told meanwhile."""
        before = len(self.told)
        for _ in range(4):
            self.clock.advance(SETTINGS.longest_retry_s)
            self.settle()
        return self.told[before:]

    def values(self, prefix: str = "a/") -> dict[str, bytes]:
        return {key: item.value for key, item in self.mirror.items(prefix).items()}


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_before_the_first_list(rig: Rig) -> None:
    """A followed prefix is neither synced nor healthy before it was listed; with nothing to follow all is well."""
    assert rig.mirror.healthy
    rig.mirror.follow("a/")
    assert not rig.mirror.healthy
    assert not rig.mirror.synced("a/")
    assert rig.mirror.revision("a/") is None
    assert rig.values() == {}


def test_the_first_list_is_complete(rig: Rig) -> None:
    """The first report of a prefix is complete and names all its keys."""
    rig.store.txn((), [Put("a/1", b"1"), Put("a/2", b"2"), Put("b/1", b"3")])
    rig.mirror.follow("a/")
    assert rig.settle() == [("a/", {"a/1", "a/2"}, True)]
    assert rig.values() == {"a/1": b"1", "a/2": b"2"}
    assert rig.mirror.synced("a/")
    assert rig.mirror.healthy
    assert rig.mirror.revision("a/") == rig.store.revision


def test_an_empty_prefix_is_reported_too(rig: Rig) -> None:
    """Knowing that there is nothing is different from not knowing."""
    rig.mirror.follow("a/")
    assert rig.settle() == [("a/", set(), True)]
    assert rig.mirror.synced("a/")


def test_events_are_applied(rig: Rig) -> None:
    """Puts and deletes after the list arrive as events, several of one key in one message among them."""
    rig.store.put("a/1", b"1")
    rig.mirror.follow("a/")
    rig.settle()
    rig.store.txn((), [Put("a/2", b"2"), Delete("a/1")])
    rig.store.put("a/3", b"3")
    rig.store.delete("a/3")
    assert rig.settle()[-1][2] is False
    assert rig.values() == {"a/2": b"2"}
    assert rig.mirror.relists == 1


def test_a_view_never_changes(rig: Rig) -> None:
    """Items taken earlier stay as they were, and cannot be written to."""
    rig.store.put("a/1", b"1")
    rig.mirror.follow("a/")
    rig.settle()
    before = rig.mirror.items("a/")
    rig.store.put("a/2", b"2")
    rig.store.delete("a/1")
    rig.settle()
    assert list(before) == ["a/1"]
    assert list(rig.mirror.items("a/")) == ["a/2"]
    with pytest.raises(TypeError):
        before["a/9"] = before["a/1"]  # type: ignore[index]


def test_a_burst_is_told_in_few_calls(rig: Rig) -> None:
    """The first change after a rest is told at once, the rest of a burst together when the interval is over."""
    rig.mirror.follow("a/")
    rig.settle()
    for n in range(3000):
        rig.store.put(f"a/{n % 100}", b"%d" % n)
    told = rig.settle()
    assert len(told) == 2
    assert told[0][1] == {"a/0"}
    assert told[1][1] == {f"a/{n}" for n in range(100)}
    assert rig.mirror.events_applied == 3000


def test_following_more_does_not_disturb(rig: Rig) -> None:
    """A further prefix is listed and joins the watch; the others are not listed again."""
    for prefix in ("a/", "b/", "a/1/"):
        rig.store.put(prefix + "x", b"")
        rig.mirror.follow(prefix)
        rig.mirror.follow(prefix)
        rig.settle()
    assert rig.mirror.relists == 3
    assert rig.mirror.watch_restarts == 1
    rig.store.put("a/1/y", b"")
    assert {prefix for prefix, _, _ in rig.settle()} == {"a/", "a/1/"}


def test_unfollow_forgets(rig: Rig) -> None:
    """After unfollow nothing is told or shown of the prefix, not even what was received before."""
    rig.mirror.follow("a/")
    rig.settle()
    rig.store.put("a/1", b"")
    rig.mirror.unfollow("a/")
    rig.mirror.unfollow("a/")
    rig.store.put("a/2", b"")
    assert rig.settle() == []
    assert rig.values() == {}
    assert not rig.mirror.synced("a/")


def test_unfollow_takes_back_what_was_not_told_yet(rig: Rig) -> None:
    """A change that waits to be told with others is not told once its prefix is unfollowed."""
    rig.mirror.follow("a/")
    rig.settle()
    rig.store.put("a/1", b"")
    rig.mirror.step(0.0)
    rig.store.put("a/2", b"")
    rig.mirror.step(0.0)
    rig.mirror.unfollow("a/")
    assert rig.told[-1] == ("a/", {"a/1"}, False)
    assert rig.settle() == []


def test_items_stay_while_the_store_is_lost(rig: Rig) -> None:
    """Losing the store removes nothing and tells nothing; it only shows in healthy and stale_since."""
    rig.store.put("a/1", b"1")
    rig.mirror.follow("a/")
    rig.settle()
    heard = rig.clock()
    rig.clock.advance(3)
    rig.store.faults.set_unavailable(True)
    assert rig.recover() == []
    assert rig.values() == {"a/1": b"1"}
    assert rig.mirror.synced("a/")
    assert not rig.mirror.healthy
    assert rig.mirror.stale_since is not None
    assert rig.mirror.stale_since <= heard
    assert "does not answer" in (rig.mirror.last_error or "")


def test_coming_back_tells_the_difference(rig: Rig) -> None:
    """After an outage a complete report names exactly what changed meanwhile, deletions included."""
    for name in ("a/deleted", "a/changed", "a/kept"):
        rig.store.put(name, b"old")
    rig.mirror.follow("a/")
    rig.settle()
    rig.store.faults.set_unavailable(True)
    rig.settle()
    rig.store.faults.set_unavailable(False)
    rig.store.txn((), [Delete("a/deleted"), Put("a/changed", b"new"), Put("a/added", b"new")])
    rig.store.faults.compact_now()
    assert rig.recover() == [("a/", {"a/deleted", "a/changed", "a/added"}, True)]
    assert rig.values() == {"a/kept": b"old", "a/changed": b"new", "a/added": b"new"}
    assert rig.mirror.healthy
    assert rig.mirror.stale_since is None
    assert rig.mirror.last_error is None
    assert rig.mirror.reset_count == 0


def test_retries_back_off(rig: Rig) -> None:
    """The first retry is quick, later ones wait longer up to the limit, and success forgives."""
    rig.mirror.follow("a/")
    rig.store.faults.set_unavailable(True)
    delays = []
    for _ in range(12):
        delays.append(rig.mirror.step(0.0))
        assert rig.mirror.step(0.0) == delays[-1]
        rig.clock.advance(delays[-1])
    assert delays[0] <= SETTINGS.first_retry_s
    assert SETTINGS.longest_retry_s / 2 <= delays[-1] <= SETTINGS.longest_retry_s
    assert max(delays) <= SETTINGS.longest_retry_s
    rig.store.faults.set_unavailable(False)
    rig.settle()
    rig.store.faults.break_watches()
    assert 0 < rig.mirror.step(0.0) <= SETTINGS.first_retry_s


def test_compaction_is_no_outage(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compaction between list and watch leads to another list at once, and is no lost store."""
    rig.store.put("a/1", b"1")
    honest = rig.store.list

    def list_then_compact(prefix: str, *, revision: int = 0) -> Snapshot:
        snapshot = honest(prefix, revision=revision)
        monkeypatch.undo()
        rig.store.put("a/1", b"2")
        rig.store.put("a/1", b"3")
        rig.store.faults.compact_now()
        return snapshot

    monkeypatch.setattr(rig.store, "list", list_then_compact)
    rig.mirror.follow("a/")
    assert rig.mirror.step(0.0) == 0
    assert rig.mirror.healthy
    rig.mirror.step(0.0)
    assert rig.values() == {"a/1": b"3"}
    assert rig.mirror.relists == 2
    assert rig.mirror.reset_count == 0


def test_a_silent_watch_is_questioned_and_given_up(rig: Rig) -> None:
    """A watch that says nothing is asked for progress; without an answer it is replaced and everything listed again."""
    rig.mirror.follow("a/")
    rig.settle()
    for _ in range(20):
        rig.clock.advance(SETTINGS.idle_s)
        rig.settle()
    assert rig.mirror.watch_restarts == 1
    rig.store.faults.drop_watches()
    rig.store.put("a/1", b"1")
    assert rig.settle() == []
    rig.clock.advance(SETTINGS.idle_s)
    rig.settle()
    assert rig.mirror.healthy
    rig.clock.advance(SETTINGS.grace_s)
    rig.mirror.step(0.0)
    assert not rig.mirror.healthy
    assert "no word" in (rig.mirror.last_error or "")
    assert rig.recover() == [("a/", {"a/1"}, True)]
    assert rig.mirror.healthy


def test_nothing_to_follow_is_no_silence(rig: Rig) -> None:
    """A mirror of nothing stays healthy for as long as it likes."""
    rig.settle()
    rig.store.faults.drop_watches()
    rig.clock.advance(SETTINGS.idle_s + SETTINGS.grace_s)
    rig.settle()
    rig.clock.advance(SETTINGS.idle_s + SETTINGS.grace_s)
    rig.settle()
    assert rig.mirror.healthy


def test_everything_is_listed_again_from_time_to_time(rig: Rig) -> None:
    """A resync finds what a watch lost without a sign, and is neither an outage nor another history."""
    rig.store.put("a/1", b"1")
    rig.mirror.follow("a/")
    rig.settle()
    # Lose one event as several versions of etcd did, while progress goes on.
    rig.store._watches[0]._prefixes.clear()
    rig.store.put("a/2", b"2")
    rig.store.delete("a/1")
    healthy = True
    for _ in range(int(SETTINGS.resync_s * 1.25 / SETTINGS.idle_s) + 1):
        rig.clock.advance(SETTINGS.idle_s)
        rig.settle()
        healthy = healthy and rig.mirror.healthy
    assert rig.values() == {"a/2": b"2"}
    assert healthy
    assert rig.mirror.reset_count == 0


def test_a_lost_event_is_no_other_history(rig: Rig) -> None:
    """When a watch lost an event and delivered later ones, the next list repairs the copy and flags nothing."""
    rig.mirror.follow("a/")
    rig.settle()
    rig.store.put("a/1", b"1")
    rig.store._watches[0]._queue.clear()
    rig.store.put("a/2", b"2")
    rig.settle()
    assert rig.values() == {"a/2": b"2"}
    rig.store.faults.break_watches()
    assert rig.recover() == [("a/", {"a/1"}, True)]
    assert rig.mirror.reset_count == 0


def test_a_wiped_store_is_flagged_before_it_is_told(rig: Rig) -> None:
    """Whoever is told of a wipe's deletions can already see that the history changed, for every prefix."""
    counts: list[int] = []
    mirror = rig.mirror
    mirror._on_change = lambda *_: counts.append(mirror.reset_count)
    for n in range(5):
        rig.store.txn((), [Put("a/1", b"%d" % n), Put("b/1", b"")])
    for prefix in ("a/", "b/"):
        mirror.follow(prefix)
    rig.settle()
    rig.store.faults.wipe()
    rig.store.put("b/2", b"")
    rig.recover()
    assert counts == [0, 0, 1, 1]
    assert rig.values("a/") == {}
    assert list(rig.values("b/")) == ["b/2"]
    rig.store.faults.break_watches()
    rig.recover()
    assert mirror.reset_count == 1


def test_another_store_id_is_another_history(rig: Rig) -> None:
    """A store with another id is flagged whatever its revision."""
    rig.mirror.follow("a/")
    rig.settle()
    rig.store.faults.wipe(store_id=2)
    for n in range(10):
        rig.store.put("a/1", b"%d" % n)
    rig.recover()
    assert rig.mirror.reset_count == 1


def test_a_wiped_store_that_overtook_is_flagged_by_its_items(rig: Rig) -> None:
    """An old item that was not there when the old history was listed proves another history."""
    for n in range(5):
        rig.store.put("a/1", b"%d" % n)
    rig.mirror.follow("a/")
    rig.settle()
    rig.store.faults.wipe()
    for n in range(10):
        rig.store.put(f"a/{n}", b"")
    rig.recover()
    assert rig.mirror.reset_count == 1


def test_a_wipe_seen_by_one_prefix_relists_all(rig: Rig) -> None:
    """When the list of a new prefix shows another history, what was on the watch is listed again too."""
    for n in range(5):
        rig.store.put("a/1", b"%d" % n)
    rig.mirror.follow("a/")
    rig.settle()
    other = MemoryStore(rig.clock)
    other.txn((), [Put("a/0", b""), Put("b/1", b"")])
    rig.mirror._store = other
    rig.mirror.follow("b/")
    rig.settle()
    assert rig.mirror.reset_count == 1
    assert list(rig.values("a/")) == ["a/0"]
    assert list(rig.values("b/")) == ["b/1"]
    other.put("a/2", b"")
    rig.settle()
    assert list(rig.values("a/")) == ["a/0", "a/2"]


def test_a_failure_amid_a_reset_counts_once(rig: Rig) -> None:
    """A store that goes away again while the new history is listed does not make it count twice."""
    for n in range(5):
        rig.store.txn((), [Put("a/1", b"%d" % n), Put("b/1", b"")])
    for prefix in ("a/", "b/"):
        rig.mirror.follow(prefix)
    rig.settle()
    empty = MemoryStore(rig.clock)
    rig.mirror._store = empty
    rig.mirror.follow("c/")
    lists: list[str] = []
    honest = empty.list

    def list_once(prefix: str, *, revision: int = 0) -> Snapshot:
        lists.append(prefix)
        if len(lists) == 2:
            raise StoreUnavailable("gone again")
        return honest(prefix, revision=revision)

    empty.list = list_once  # type: ignore[method-assign]
    rig.recover()
    assert rig.mirror.reset_count == 1
    assert rig.mirror.healthy


def test_a_failing_callback_is_told_again(rig: Rig) -> None:
    """Changes that a callback failed to take are part of the next report."""
    rig.store.put("a/1", b"")
    rig.mirror.follow("a/")
    taken: list[set[str]] = []
    failures = [KeyError("bug"), KeyError("bug")]

    def tell(prefix: str, changed_keys: frozenset[str], complete: bool) -> None:
        if failures:
            raise failures.pop()
        taken.append(set(changed_keys))

    rig.mirror._on_change = tell
    for _ in range(2):
        with pytest.raises(KeyError):
            rig.mirror.step(0.0)
        rig.mirror._lose(KeyError("bug"))
        rig.clock.advance(1)
    rig.settle()
    assert taken == [{"a/1"}]


def test_the_thread_survives_a_bug() -> None:
    """An exception that nobody expected is logged and costs a new list, not the thread."""
    told: queue.Queue[frozenset[str]] = queue.Queue()
    bugs = [RuntimeError("bug")]

    def tell(prefix: str, changed_keys: frozenset[str], complete: bool) -> None:
        if bugs:
            raise bugs.pop()
        told.put(changed_keys)

    store = MemoryStore()
    store.put("a/1", b"")
    mirror = Mirror(store, tell)
    mirror.follow("a/")
    mirror.start()
    try:
        assert told.get(timeout=30) == {"a/1"}
        mirror.follow("b/")
        assert told.get(timeout=30) == set()
        store.put("b/1", b"")
        assert told.get(timeout=30) == {"b/1"}
    finally:
        mirror.stop()


def test_stop_before_start() -> None:
    """A mirror that never ran can be stopped."""
    Mirror(MemoryStore(), lambda *_: None).stop()


def test_old_events_are_ignored(rig: Rig) -> None:
    """An event older than the list, repeated by the watch, changes nothing."""
    rig.store.put("a/1", b"1")
    rig.store.delete("a/1")
    now = rig.store.put("a/2", b"new")
    rig.mirror.follow("a/")
    rig.settle()
    old = KeyValue("a/1", b"1", 2, 2)
    stale = KeyValue("a/2", b"old", 2, 2)
    for item in (old, stale):
        rig.store._watches[0]._queue.append(WatchEvents("a/", 2, (Event("put", item.key, 2, item),)))
    assert rig.settle() == []
    assert rig.values() == {"a/2": b"new"}
    assert rig.mirror.revision("a/") == now


ITEM = KeyValue("k", b"", 3, 5)


@pytest.mark.parametrize(
    ("event", "items", "newer"),
    [
        (Event("put", "k", 6, KeyValue("k", b"", 3, 6)), {"k": ITEM}, True),
        (Event("put", "k", 5, ITEM), {"k": ITEM}, False),
        (Event("put", "k", 5, ITEM), {}, True),
        (Event("delete", "k", 6), {"k": ITEM}, True),
        (Event("delete", "k", 4), {"k": ITEM}, False),
        (Event("delete", "k", 6), {}, False),
    ],
)
def test_is_newer(event: Event, items: dict[str, KeyValue], newer: bool) -> None:
    """An event counts when it is newer than what is there, and a delete only where something is there."""
    assert is_newer(event, items) is newer


def test_difference() -> None:
    """Added, removed and changed keys differ; equal ones do not."""
    make: Callable[[str, int], KeyValue] = lambda key, revision: KeyValue(key, b"", 1, revision)  # noqa: E731
    old = {"same": make("same", 1), "gone": make("gone", 1), "changed": make("changed", 1)}
    new = {"same": make("same", 1), "new": make("new", 2), "changed": make("changed", 2)}
    assert difference(old, new) == {"gone", "changed", "new"}
