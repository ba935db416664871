"""A complete in-memory Store with etcd's rules, for tests and for trying things without a server.

It keeps every version of every key until compacted, so reading the past, watching from the past and compaction behave
as in etcd. The contract suite runs it and a real etcd through the same cases. Faults are switched on through
``faults``.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import assert_never

from hivewire.errors import (
    HivewireError,
    InvalidInput,
    LeaseExpired,
    NoPermission,
    RevisionConflict,
    StoreUnavailable,
    WatchCompacted,
)
from hivewire.store.api import (
    NO_LEASE,
    ROOT,
    Access,
    AccessOp,
    AddGrant,
    AddRole,
    AddUser,
    Compare,
    CreateRevisionIs,
    Delete,
    EnableAccess,
    Event,
    GiveRole,
    Grant,
    IsAbsent,
    KeyValue,
    LeaseId,
    ModRevisionIs,
    Op,
    Progress,
    Put,
    RemoveGrant,
    RemoveRole,
    RemoveUser,
    Snapshot,
    TakeRole,
    Watch,
    WatchEvents,
    check_ttl,
    check_txn,
    prefix_end,
)

# A fresh etcd is at revision 1; its first write makes revision 2.
_FIRST_REVISION = 1


@dataclass(slots=True)
class _Lease:
    ttl_s: int
    expires_at: float
    keys: set[str] = field(default_factory=set)


class Faults:
    """Switches that make a MemoryStore misbehave as a real one does; any thread may use them at any time."""

    def __init__(self, store: "MemoryStore") -> None:
        self._store = store
        self.unavailable = False
        self.lost_answers = 0
        self.failing_calls = 0

    def set_unavailable(self, unavailable: bool) -> None:
        """Make every call and every open watch fail, or work again (opened watches stay broken)."""
        with self._store._changed:
            self.unavailable = unavailable
            if unavailable:
                self._store._break_watches("the store went away")

    def fail_next_calls(self, count: int) -> None:
        """Let the next ``count`` calls raise StoreUnavailable before doing anything."""
        self.failing_calls = count

    def lose_next_answers(self, count: int) -> None:
        """Let the next ``count`` transactions be applied, yet raise StoreUnavailable: the caller cannot know."""
        self.lost_answers = count

    def break_watches(self) -> None:
        """End all open watches; they raise StoreUnavailable."""
        with self._store._changed:
            self._store._break_watches("the stream ended")

    def drop_watches(self) -> None:
        """Silence all open watches: no event, no progress and no error, as a peer that vanished without a packet."""
        with self._store._changed:
            for watch in self._store._watches:
                watch._silent = True

    def compact_now(self) -> None:
        """Compact at the present revision."""
        self._store.compact(self._store.revision)

    def wipe(self, store_id: int | None = None) -> None:
        """Lose all data, leases and watches, and begin again at revision 1, with another id if one is given."""
        self._store._wipe(store_id)


class MemoryStore:
    """See ``api.Store`` and ``api.AccessControl``. ``clock`` gives seconds and drives lease expiry only; inject a fake
    one to own time.

    Who holds the store itself may do everything; ``as_user`` gives what a user of it may.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, store_id: int = 1) -> None:
        self._clock = clock
        self._changed = threading.Condition(threading.RLock())
        self._watches: list[_MemoryWatch] = []
        self._lease_count = 0
        self.faults = Faults(self)
        self._reset(store_id)

    def _reset(self, store_id: int) -> None:
        self._store_id = store_id
        self._revision = _FIRST_REVISION
        self._compacted = 0
        self._current: dict[str, KeyValue] = {}
        # Each key's changes, oldest first: what a read or a watch in the past needs. Compaction trims them.
        self._history: dict[str, list[Event]] = {}
        self._log: list[Event] = []
        self._leases: dict[LeaseId, _Lease] = {}
        self._enabled = False
        self._users: dict[str, set[str]] = {}
        self._roles: dict[str, set[Grant]] = {}

    def as_user(self, user: str) -> "UserStore":
        """Return the same store as this user sees it."""
        return UserStore(self, user)

    @property
    def revision(self) -> int:
        """Return the revision of the last change."""
        with self._changed:
            return self._revision

    def get(self, key: str) -> KeyValue | None:
        """See ``api.Store.get``."""
        with self._changed:
            self._enter()
            _check_key(key)
            return self._current.get(key)

    def list(self, prefix: str, *, revision: int = 0) -> Snapshot:
        """See ``api.Store.list``."""
        with self._changed:
            self._enter()
            at = revision or self._revision
            if at < self._compacted:
                raise WatchCompacted(f"revision {at} is compacted, the oldest is {self._compacted}")
            if at > self._revision:
                raise WatchCompacted(f"revision {at} is not reached, the store is at {self._revision}")
            items = (self._at(key, at) for key in sorted(self._history) if key.startswith(prefix))
            return Snapshot(at, tuple(item for item in items if item), self._store_id)

    def txn(self, compares: Sequence[Compare], ops: Sequence[Op]) -> int:
        """See ``api.Store.txn``."""
        check_txn(compares, ops)
        with self._changed:
            self._enter()
            failed = [compare for compare in compares if not self._holds(compare)]
            if failed:
                raise RevisionConflict(f"the transaction's guard does not hold: {failed[0]}")
            self._check_leases(ops)
            self._commit(ops)
            if self.faults.lost_answers:
                self.faults.lost_answers -= 1
                raise StoreUnavailable("the answer was lost; the transaction may have been applied")
            return self._revision

    def put(self, key: str, value: bytes, lease: LeaseId = NO_LEASE) -> int:
        """See ``api.Store.put``."""
        return self.txn((), (Put(key, value, lease),))

    def delete(self, key: str) -> int:
        """See ``api.Store.delete``."""
        return self.txn((), (Delete(key),))

    def grant_lease(self, ttl_s: int) -> LeaseId:
        """See ``api.Store.grant_lease``; the time is never rounded here."""
        check_ttl(ttl_s)
        with self._changed:
            self._enter()
            self._lease_count += 1
            lease = LeaseId(self._lease_count)
            self._leases[lease] = _Lease(ttl_s, self._clock() + ttl_s)
            # A watch that waits must wake no later than this lease ends.
            self._changed.notify_all()
            return lease

    def keepalive(self, lease: LeaseId) -> int:
        """See ``api.Store.keepalive``."""
        with self._changed:
            self._enter()
            found = self._leases.get(lease)
            if found is None:
                raise LeaseExpired(f"lease {lease:x} is gone")
            found.expires_at = self._clock() + found.ttl_s
            return found.ttl_s

    def revoke(self, lease: LeaseId) -> None:
        """See ``api.Store.revoke``."""
        with self._changed:
            self._enter()
            if lease in self._leases:
                self._end_lease(lease)

    def open_watch(self) -> Watch:
        """See ``api.Store.open_watch``."""
        with self._changed:
            self._enter()
            watch = _MemoryWatch(self)
            self._watches.append(watch)
            return watch

    def close(self) -> None:
        """End open watches."""
        with self._changed:
            self._break_watches("the store was closed")

    def access(self) -> Access:
        """See ``api.AccessControl.access``."""
        with self._changed:
            self._enter()
            users = {user: frozenset(roles) for user, roles in self._users.items()}
            return Access(self._enabled, users, {role: frozenset(grants) for role, grants in self._roles.items()})

    def change_access(self, op: AccessOp) -> None:
        """See ``api.AccessControl.change_access``."""
        with self._changed:
            self._enter()
            self._check_access_op(op)
            match op:
                case AddUser(user):
                    self._users.setdefault(user, set())
                case RemoveUser(user):
                    self._users.pop(user, None)
                case GiveRole(user, role):
                    self._users[user].add(role)
                case TakeRole(user, role):
                    self._users[user].discard(role)
                case AddRole(role):
                    self._roles.setdefault(role, set())
                case RemoveRole(role):
                    self._roles.pop(role, None)
                    for roles in self._users.values():
                        roles.discard(role)
                case AddGrant(role, grant):
                    others = {g for g in self._roles[role] if (g.key, g.end) != (grant.key, grant.end)}
                    self._roles[role] = others | {grant}
                case RemoveGrant(role, grant):
                    self._roles[role] = {g for g in self._roles[role] if (g.key, g.end) != (grant.key, grant.end)}
                case EnableAccess():
                    self._enabled = True
                case _:
                    assert_never(op)

    def _check_access_op(self, op: AccessOp) -> None:
        locks_out = isinstance(op, EnableAccess) and ROOT not in self._users.get(ROOT, ())
        if self._enabled:
            locks_out |= op in (RemoveUser(ROOT), RemoveRole(ROOT), TakeRole(ROOT, ROOT))
        if locks_out:
            raise InvalidInput(f"cannot {op}, which would lock everybody out of the store")
        if isinstance(op, GiveRole | TakeRole) and op.user not in self._users:
            raise RevisionConflict(f"cannot {op}: there is no such user")
        # etcd knows the role root without its being there.
        if isinstance(op, GiveRole | AddGrant | RemoveGrant) and op.role not in {ROOT, *self._roles}:
            raise RevisionConflict(f"cannot {op}: there is no such role")

    def _may(self, user: str, start: str, end: str, *, write: bool) -> bool:
        """Say whether a user may read or write a range; ``end`` is empty for the one key ``start``."""
        roles = self._users.get(user, set())
        if not self._enabled or ROOT in roles:
            return True
        leaves = {"write" if write else "read", "readwrite"}
        grants = (g for role in roles for g in self._roles.get(role, ()) if g.leave in leaves)
        return any(
            g.key <= start and end <= g.end if end and g.end else start == g.key or g.key <= start < g.end
            for g in grants
            if g.end or not end
        )

    def compact(self, revision: int) -> None:
        """Forget what was superseded before ``revision``; that revision itself can still be read and watched from."""
        with self._changed:
            if not self._compacted < revision <= self._revision:
                return
            self._compacted = revision
            self._log = [event for event in self._log if event.mod_revision >= revision]
            for key, events in list(self._history.items()):
                kept = _compacted_history(events, revision)
                if kept:
                    self._history[key] = kept
                else:
                    del self._history[key]

    def expire_leases(self) -> None:
        """End the leases whose time is over; every call does this first, so only tests of a quiet store need it."""
        with self._changed:
            now = self._clock()
            for lease in [lease for lease, held in self._leases.items() if held.expires_at <= now]:
                self._end_lease(lease)

    def _enter(self) -> None:
        self.expire_leases()
        if self.faults.failing_calls:
            self.faults.failing_calls -= 1
            raise StoreUnavailable("the store did not answer")
        if self.faults.unavailable:
            raise StoreUnavailable("the store does not answer")

    def _at(self, key: str, revision: int) -> KeyValue | None:
        events = (event for event in reversed(self._history[key]) if event.mod_revision <= revision)
        last = next(events, None)
        return last.item if last else None

    def _holds(self, compare: Compare) -> bool:
        item = self._current.get(compare.key)
        match compare:
            case ModRevisionIs(_, revision):
                return (item.mod_revision if item else 0) == revision
            case CreateRevisionIs(_, revision):
                return (item.create_revision if item else 0) == revision
            case IsAbsent():
                return item is None
            case _:
                assert_never(compare)

    def _check_leases(self, ops: Sequence[Op]) -> None:
        for op in ops:
            if isinstance(op, Put) and op.lease and op.lease not in self._leases:
                raise LeaseExpired(f"lease {op.lease:x} is gone, {op.key} was not written")

    def _commit(self, ops: Sequence[Op]) -> None:
        """Apply ops as one revision, or as none when nothing changes."""
        revision = self._revision + 1
        events = [event for op in ops if (event := self._apply(op, revision))]
        if not events:
            return
        self._revision = revision
        self._log.extend(events)
        for event in events:
            self._history.setdefault(event.key, []).append(event)
        for watch in self._watches:
            watch._deliver(events)
        self._changed.notify_all()

    def _apply(self, op: Op, revision: int) -> Event | None:
        old = self._current.get(op.key)
        if old and old.lease in self._leases:
            self._leases[old.lease].keys.discard(op.key)
        match op:
            case Put(key, value, lease):
                created, version = (old.create_revision, old.version + 1) if old else (revision, 1)
                item = KeyValue(key, value, created, revision, version, lease)
                self._current[key] = item
                if lease:
                    self._leases[lease].keys.add(key)
                return Event("put", key, revision, item)
            case Delete(key):
                if self._current.pop(key, None) is None:
                    return None
                return Event("delete", key, revision)
            case _:
                assert_never(op)

    def _end_lease(self, lease: LeaseId) -> None:
        keys = sorted(self._leases[lease].keys)
        # etcd deletes all keys of a lease in one transaction (lease/lessor.go, Revoke).
        self._commit([Delete(key) for key in keys])
        del self._leases[lease]

    def _events_from(self, prefix: str, revision: int) -> Sequence[Event]:
        return [event for event in self._log if event.mod_revision >= revision and event.key.startswith(prefix)]

    def _seconds_to_expiry(self) -> float:
        """Return how long until the next lease ends, infinity when there is none."""
        ends = (held.expires_at for held in self._leases.values())
        return max(0.0, min(ends, default=float("inf")) - self._clock())

    def _break_watches(self, reason: str) -> None:
        for watch in self._watches:
            watch._fail(StoreUnavailable(reason))
        self._watches.clear()
        self._changed.notify_all()

    def _wipe(self, store_id: int | None) -> None:
        with self._changed:
            self._break_watches("the store was wiped")
            self._reset(self._store_id if store_id is None else store_id)


class _MemoryWatch:
    """See ``api.Watch``; everything here happens under the store's lock."""

    def __init__(self, store: MemoryStore, user: str | None = None) -> None:
        self._store = store
        self._user = user
        self._prefixes: dict[str, int] = {}
        self._queue: deque[WatchEvents | Progress] = deque()
        self._failure: HivewireError | None = None
        self._silent = False
        self._woken = False

    def add(self, prefix: str, from_revision: int) -> None:
        store = self._store
        with store._changed:
            if prefix in self._prefixes:
                raise InvalidInput(f"prefix {prefix} is watched already")
            start = from_revision or store._revision + 1
            self._prefixes[prefix] = start
            if self._user is not None and not store._may(self._user, prefix, prefix_end(prefix), write=False):
                # Only now: a watch that is open outlives the leave for it, as in etcd.
                self._fail(NoPermission(f"watch of {prefix} refused"))
            elif start < store._compacted:
                self._fail(WatchCompacted(f"watch of {prefix} from {start}: compacted to {store._compacted}"))
            else:
                self.request_progress()
                self._deliver_one(prefix, store._events_from(prefix, start))
            store._changed.notify_all()

    def remove(self, prefix: str) -> None:
        with self._store._changed:
            self._prefixes.pop(prefix, None)
            self._queue = deque(
                answer for answer in self._queue if isinstance(answer, Progress) or answer.prefix != prefix
            )

    def next(self, timeout_s: float) -> WatchEvents | Progress | None:
        deadline = time.monotonic() + timeout_s
        with self._store._changed:
            while True:
                self._store.expire_leases()
                if self._woken:
                    self._woken = False
                    return None
                if self._queue:
                    return self._queue.popleft()
                if self._failure:
                    raise self._failure
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return None
                self._store._changed.wait(min(left_s, self._store._seconds_to_expiry() + 0.001))

    def wake(self) -> None:
        with self._store._changed:
            self._woken = True
            self._store._changed.notify_all()

    def request_progress(self) -> None:
        with self._store._changed:
            if not self._silent and not self._failure:
                self._queue.append(Progress(self._store._revision))
                self._store._changed.notify_all()

    def close(self) -> None:
        with self._store._changed:
            self._fail(StoreUnavailable("the watch was closed"))
            self._queue.clear()
            if self in self._store._watches:
                self._store._watches.remove(self)
            self._store._changed.notify_all()

    def _deliver(self, events: Sequence[Event]) -> None:
        for prefix, start in self._prefixes.items():
            self._deliver_one(prefix, [e for e in events if e.key.startswith(prefix) and e.mod_revision >= start])

    def _deliver_one(self, prefix: str, events: Sequence[Event]) -> None:
        if self._silent or self._failure:
            return
        self._queue.extend(_by_revision(prefix, events))

    def _fail(self, failure: HivewireError) -> None:
        self._failure = self._failure or failure


class UserStore:
    """A MemoryStore as one user sees it: see ``api.Store`` and ``api.AccessControl``."""

    def __init__(self, store: MemoryStore, user: str) -> None:
        self._store = store
        self._user = user

    def get(self, key: str) -> KeyValue | None:
        self._check(key, write=False)
        return self._store.get(key)

    def list(self, prefix: str, *, revision: int = 0) -> Snapshot:
        self._check(prefix, prefix_end(prefix), write=False)
        return self._store.list(prefix, revision=revision)

    def txn(self, compares: Sequence[Compare], ops: Sequence[Op]) -> int:
        for compare in compares:
            self._check(compare.key, write=False)
        for op in ops:
            self._check(op.key, write=True)
        return self._store.txn(compares, ops)

    def put(self, key: str, value: bytes, lease: LeaseId = NO_LEASE) -> int:
        return self.txn((), (Put(key, value, lease),))

    def delete(self, key: str) -> int:
        return self.txn((), (Delete(key),))

    # etcd lets everybody make leases and renew any.

    def grant_lease(self, ttl_s: int) -> LeaseId:
        return self._store.grant_lease(ttl_s)

    def keepalive(self, lease: LeaseId) -> int:
        return self._store.keepalive(lease)

    def revoke(self, lease: LeaseId) -> None:
        with self._store._changed:
            held = self._store._leases.get(lease)
            for key in held.keys if held else ():
                self._check(key, write=True)
            self._store.revoke(lease)

    def open_watch(self) -> Watch:
        with self._store._changed:
            self._store._enter()
            watch = _MemoryWatch(self._store, self._user)
            self._store._watches.append(watch)
            return watch

    def close(self) -> None:
        """Nothing of its own: the store is closed by whoever made it."""

    def access(self) -> Access:
        self._check_root()
        return self._store.access()

    def change_access(self, op: AccessOp) -> None:
        self._check_root()
        self._store.change_access(op)

    def _check(self, start: str, end: str = "", *, write: bool) -> None:
        with self._store._changed:
            if not self._store._may(self._user, start, end, write=write):
                raise NoPermission(f"{self._user} may not {'write' if write else 'read'} {start}")

    def _check_root(self) -> None:
        with self._store._changed:
            if self._store._enabled and ROOT not in self._store._users.get(self._user, ()):
                raise NoPermission(f"{self._user} may not look at or change access control")


def _by_revision(prefix: str, events: Sequence[Event]) -> Iterator[WatchEvents]:
    for revision, group in groupby(events, key=lambda event: event.mod_revision):
        yield WatchEvents(prefix, revision, tuple(group))


def _compacted_history(events: Sequence[Event], revision: int) -> list[Event]:
    """Keep what a read at ``revision`` or later can see."""
    older = [event for event in events if event.mod_revision <= revision]
    newer = [event for event in events if event.mod_revision > revision]
    visible = [event for event in older[-1:] if event.item is not None]
    return visible + newer


def _check_key(key: str) -> None:
    if not key:
        raise InvalidInput("a key of the store is never empty")
