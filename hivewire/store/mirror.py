"""An exact local copy of chosen prefixes of the store, kept by listing and then watching.

A prefix is listed, the revision of that list remembered, and watched from the next revision on. On compaction, on any
error and on any doubt the watch is thrown away and everything is listed again; only the difference is reported. While
the store is lost the old items stay: an agent goes on with what it has. What the items mean is left to the users, and
so is every decision to remove something.

    store --list--> items of a prefix --on_change(keys, complete=True)--> a queue
      `----watch--> events ----------> --on_change(keys, complete=False)-'
"""

import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import structlog

from hivewire.errors import Conflict, HivewireError, StoreUnavailable
from hivewire.store.api import Event, KeyValue, Snapshot, Store, Watch, WatchEvents

_log = structlog.get_logger()

_NOTHING: Mapping[str, KeyValue] = MappingProxyType({})


class OnChange(Protocol):
    """Called on the mirror's thread, after ``items`` shows the change; must be cheap, as putting keys in a queue is.

    ``complete`` says that the prefix was listed as a whole just now, so that what is absent is absent in the store; it
    comes also when nothing changed. Without it the keys are those of events.
    """

    def __call__(self, prefix: str, changed_keys: frozenset[str], complete: bool) -> None:
        """Take note of the keys whose item appeared, changed or went."""
        ...


@dataclass(frozen=True, slots=True)
class MirrorSettings:
    """Times in seconds."""

    #: After this long without a word from the store it is asked for one; without an answer in the grace the watch is
    #: dead.
    idle_s: float = 10.0
    grace_s: float = 5.0
    #: Delay before the second try to get the store back, doubled per failure up to the longest. All are jittered.
    first_retry_s: float = 0.05
    longest_retry_s: float = 5.0
    #: Reports of events are at least this far apart; the first after a rest is not delayed.
    coalesce_s: float = 0.02
    #: Everything is listed again this often, because several versions of etcd lost events of a healthy watch
    #: (etcd-io/etcd#17529, #18089, #19179).
    resync_s: float = 600.0


@dataclass(slots=True)
class _Copy:
    """The copy of one prefix. ``items`` is never changed once ``shared``, so that a view of it is a snapshot."""

    items: dict[str, KeyValue] = field(default_factory=dict)
    shared: bool = False
    # Revision of the last list or event applied; None until the first complete list.
    revision: int | None = None
    # Revision of the last complete list: up to it nothing can be missing, whatever a watch lost since.
    listed: int = 0
    # Is it on the present watch, and so kept up to date?
    watched: bool = False

    def put(self, key: str, item: KeyValue | None) -> None:
        """Set an item, or take it out."""
        if self.shared:
            self.items, self.shared = dict(self.items), False
        if item:
            self.items[key] = item
        else:
            del self.items[key]


class Mirror:
    """Follows prefixes of one store. ``start`` runs it on a thread of its own; tests call ``step`` instead.

    Public methods and attributes may be used by any thread. The counters only grow: ``relists`` counts complete lists
    of a prefix, ``listings_begun`` rounds of them, ``watch_restarts`` opened watches, ``reset_count`` the times the
    store turned out to have another history than the one mirrored so far: it was wiped, replaced or restored from a
    backup. A wiped store that has meanwhile overtaken the old revision and rewritten every key cannot be told from the
    old one.
    """

    def __init__(
        self,
        store: Store,
        on_change: OnChange,
        *,
        settings: MirrorSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
        name: str = "mirror",
    ) -> None:
        self._store = store
        self._on_change = on_change
        self._settings = settings or MirrorSettings()
        self._clock = clock
        self._rng = rng or random.Random()  # noqa: S311  jitter, no secret
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

        # Shared with users, under the lock. Only the mirror's thread changes a copy.
        self._copies: dict[str, _Copy] = {}
        self._watch: Watch | None = None
        self._stale_since: float | None = None

        # Used by the mirror's thread only.
        self._pending: dict[str, set[str]] = {}
        self._reported_at = float("-inf")
        self._heard_at = clock()
        self._asked = False
        self._resync_at = 0.0
        self._retry_at = float("-inf")
        self._failures = 0
        self._store_id: int | None = None
        self._newest = 0

        self.listings_begun = 0
        self.relists = 0
        self.watch_restarts = 0
        self.reset_count = 0
        self.events_applied = 0
        self.last_error: str | None = None

    def start(self) -> None:
        """Run until ``stop``."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread and the watch; the items stay readable."""
        self._stop.set()
        while self._thread.is_alive():
            # Again and again: the thread may be about to wait on a watch that was not there yet.
            self._wake()
            self._thread.join(0.05)
        self._drop_watch()

    def follow(self, prefix: str) -> None:
        """Mirror this prefix too; following it already is no error."""
        with self._lock:
            self._copies.setdefault(prefix, _Copy())
        self._wake()

    def unfollow(self, prefix: str) -> None:
        """Forget this prefix and its items; no change of it is reported any more."""
        with self._lock:
            copy = self._copies.pop(prefix, None)
            if copy and self._watch:
                self._watch.remove(prefix)

    def items(self, prefix: str) -> Mapping[str, KeyValue]:
        """Return the items now, as a view that never changes; empty before the first list, see ``synced``."""
        with self._lock:
            copy = self._copies.get(prefix)
            if copy is None:
                return _NOTHING
            copy.shared = True
            return MappingProxyType(copy.items)

    def synced(self, prefix: str) -> bool:
        """Say whether the prefix was listed completely at least once; it stays true while the store is lost."""
        return self.revision(prefix) is not None

    def revision(self, prefix: str) -> int | None:
        """Return the revision of the newest list or event in the items, or None before the first list."""
        with self._lock:
            copy = self._copies.get(prefix)
            return copy.revision if copy else None

    @property
    def healthy(self) -> bool:
        """Say whether all followed prefixes are synced and the store is not lost."""
        with self._lock:
            listed = all(copy.revision is not None for copy in self._copies.values())
            return listed and self._stale_since is None

    @property
    def stale_since(self) -> float | None:
        """Return the time of ``clock`` when the store was last heard, or None while it is not lost."""
        return self._stale_since

    def step(self, timeout_s: float) -> float:
        """Do what is due, wait up to ``timeout_s`` for events, and return the seconds to wait before the next step."""
        if self._clock() < self._retry_at:
            return self._retry_at - self._clock()
        try:
            self._begin_watch()
            self._list_unwatched()
            self._receive(timeout_s)
            self._watchdog()
        except HivewireError as error:
            self._lose(error)
        self._report()
        return max(0.0, self._retry_at - self._clock())

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                delay_s = self.step(self._settings.idle_s)
            except Exception as error:  # noqa: BLE001  a bug, ours or on_change's, must not end the mirror in silence
                _log.exception("mirror_bug")
                self._lose(error)
                delay_s = max(0.0, self._retry_at - self._clock())
            self._stop.wait(delay_s)

    def _wake(self) -> None:
        with self._lock:
            if self._watch:
                self._watch.wake()

    def _begin_watch(self) -> None:
        """Have a watch; a new one when there is none, or when it is time to list everything again."""
        now = self._clock()
        if self._watch and now < self._resync_at:
            return
        self._drop_watch()
        watch = self._store.open_watch()
        with self._lock:
            self._watch = watch
        self.watch_restarts += 1
        self._asked = False
        # Jitter: a thousand agents must not list in the same second.
        self._resync_at = now + self._settings.resync_s * self._rng.uniform(0.75, 1.25)

    def _drop_watch(self) -> None:
        with self._lock:
            watch, self._watch = self._watch, None
            for copy in self._copies.values():
                copy.watched = False
        if watch:
            watch.close()

    def _list_unwatched(self) -> None:
        """List every prefix that is not on the watch, then take all lists over at once, then watch on from there.

        All lists come before the first change: what another history of the store means must be known by then.
        """
        with self._lock:
            unwatched = sorted(prefix for prefix, copy in self._copies.items() if not copy.watched)
        if not unwatched:
            self._heal()
            return
        self.listings_begun += 1
        snapshots = {prefix: self._store.list(prefix) for prefix in unwatched}
        self._heard()
        if self._is_other_history(snapshots):
            self._reset()
            with self._lock:
                others = sorted(self._copies.keys() - snapshots.keys())
            snapshots |= {prefix: self._store.list(prefix) for prefix in others}
        self._newest = max(snapshot.revision for snapshot in snapshots.values())
        self._store_id = next(iter(snapshots.values())).store_id
        for prefix, snapshot in snapshots.items():
            self._take_over(prefix, snapshot)
        self._heal()

    def _is_other_history(self, snapshots: Mapping[str, Snapshot]) -> bool:
        if self._store_id is None:
            return False
        with self._lock:
            copies = {prefix: self._copies.get(prefix) for prefix in snapshots}
        return any(
            snapshot.store_id != self._store_id
            or snapshot.revision < self._newest
            or contradicts(copies[prefix], snapshot)
            for prefix, snapshot in snapshots.items()
        )

    def _reset(self) -> None:
        self.reset_count += 1
        # Unknown until the lists of the new history are taken over, lest a failure before that count it twice.
        self._store_id = None
        _log.warning("store_history_changed", reset_count=self.reset_count)
        # Prefixes on the present watch belong to the old history as well.
        self._drop_watch()
        self._begin_watch()

    def _take_over(self, prefix: str, snapshot: Snapshot) -> None:
        """Replace a copy by a list, report the difference, and watch from the next revision on."""
        items = {item.key: item for item in snapshot.items}
        with self._lock:
            copy = self._copies.get(prefix)
            if copy is None or self._watch is None:
                return
            changed = difference(copy.items, items)
            copy.items, copy.shared, copy.watched = items, False, True
            copy.revision = copy.listed = snapshot.revision
            self._watch.add(prefix, snapshot.revision + 1)
        self.relists += 1
        self._pending.setdefault(prefix, set()).update(changed)
        self._tell(prefix, complete=True)

    def _receive(self, timeout_s: float) -> None:
        """Apply what the watch gives; wait for the first, then take what is there until a report is due."""
        watch = self._watch
        if watch is None:
            return
        got = watch.next(self._patience(timeout_s))
        while got is not None:
            self._heard()
            self._failures = 0
            if isinstance(got, WatchEvents):
                self._apply(got)
            if self._report_due():
                return
            got = watch.next(0.0)

    def _patience(self, timeout_s: float) -> float:
        """Return how long to wait for an event: not past the next report, question or resync."""
        now = self._clock()
        limit = self._heard_at + self._settings.idle_s + (self._settings.grace_s if self._asked else 0.0)
        due = [limit, self._resync_at]
        if self._pending:
            due.append(self._reported_at + self._settings.coalesce_s)
        return max(0.0, min(timeout_s, min(due) - now))

    def _apply(self, got: WatchEvents) -> None:
        with self._lock:
            copy = self._copies.get(got.prefix)
            if copy is None or copy.revision is None:
                return
            # Older events are already in the list. The revision itself is let through: an event that is applied twice
            # changes nothing, and those of one revision may come apart.
            changed = set()
            for event in got.events:
                if event.mod_revision >= copy.revision and is_newer(event, copy.items):
                    copy.put(event.key, event.item)
                    changed.add(event.key)
                    self.events_applied += 1
            copy.revision = max(copy.revision, got.revision)
            self._newest = max(self._newest, got.revision)
        if changed:
            self._pending.setdefault(got.prefix, set()).update(changed)

    def _report_due(self) -> bool:
        return bool(self._pending) and self._clock() - self._reported_at >= self._settings.coalesce_s

    def _report(self) -> None:
        if not self._report_due():
            return
        for prefix in sorted(self._pending):
            self._tell(prefix, complete=False)
        self._reported_at = self._clock()

    def _tell(self, prefix: str, *, complete: bool) -> None:
        """Report what is pending for a prefix; forget it only then, so that a callback that fails is called again."""
        if self.synced(prefix):
            self._on_change(prefix, frozenset(self._pending.get(prefix, ())), complete)
        self._pending.pop(prefix, None)

    def _watchdog(self) -> None:
        """Ask a silent store for a sign of life; give the watch up when none comes."""
        with self._lock:
            if not self._copies:
                # etcd since 3.5.8 has no answer for a stream without watches.
                self._heard()
        silent_s = self._clock() - self._heard_at
        if silent_s < self._settings.idle_s or self._watch is None:
            return
        if not self._asked:
            self._asked = True
            self._watch.request_progress()
        elif silent_s >= self._settings.idle_s + self._settings.grace_s:
            raise StoreUnavailable(f"no word from the watch for {silent_s:.0f} s")

    def _heard(self) -> None:
        self._heard_at = self._clock()
        self._asked = False

    def _heal(self) -> None:
        """Note that everything is listed and on the watch; the first word from the watch forgives past failures."""
        if self._stale_since is not None:
            _log.info("store_back", after_s=round(self._clock() - self._stale_since, 1))
            self.last_error = None
            self._stale_since = None

    def _lose(self, error: Exception) -> None:
        """Throw the watch away, keep the items, and set the time of the next try."""
        self._drop_watch()
        self._failures += 1
        settings = self._settings
        # An old view is renewed at once, and a broken stream is often back at once; only what fails again has to wait.
        longest = min(settings.longest_retry_s, settings.first_retry_s * 2.0 ** min(self._failures - 1, 30))
        delay_s = longest * self._rng.uniform(0.5, 1.0)
        if isinstance(error, Conflict) and self._failures == 1:
            self._retry_at = self._clock()
            return
        self._retry_at = self._clock() + delay_s
        self.last_error = str(error)
        if self._stale_since is None:
            self._stale_since = self._heard_at
            _log.warning("store_lost", error=str(error))


def contradicts(copy: _Copy | None, snapshot: Snapshot) -> bool:
    """Say whether a list cannot follow from the one that a copy began with.

    Whatever it shows as last changed up to that revision was in the list then, and still is exactly so in the copy.
    """
    if copy is None or copy.revision is None:
        return False
    known = (item for item in snapshot.items if item.mod_revision <= copy.listed)
    return any(copy.items.get(item.key) != item for item in known)


def difference(old: Mapping[str, KeyValue], new: Mapping[str, KeyValue]) -> set[str]:
    """Return the keys that appeared, went or changed."""
    return {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}


def is_newer(event: Event, items: Mapping[str, KeyValue]) -> bool:
    """Say whether an event changes these items: newer than the key's item, and no delete of an absent key."""
    item = items.get(event.key)
    return event.item is not None if item is None else event.mod_revision > item.mod_revision
