"""What Hivewire asks of its store: revisions, transactions, leases, watches and access, as values and protocols.

The words and rules are those of etcd v3 (https://etcd.io/docs/v3.4/learning/api/): one revision counts every change of
the whole store, every key knows the revisions that created and last changed it, and all changes of a transaction share
one revision. ``memory.py`` and ``etcd.py`` implement the protocols; records and key layout are no concern of this
package.

Every call may raise ``StoreUnavailable`` (try later) or ``NoPermission`` (this user may not).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NewType, Protocol

from hivewire.errors import InvalidInput

LeaseId = NewType("LeaseId", int)

NO_LEASE = LeaseId(0)

#: etcd refuses a transaction with more compares or more operations than this (``--max-txn-ops``, default 128).
MAX_TXN_OPS = 128


@dataclass(frozen=True, slots=True)
class KeyValue:
    """A key as it was at ``mod_revision``; ``version`` counts its changes since it was created."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    version: int = 1
    lease: LeaseId = NO_LEASE


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All keys of a prefix at one revision, in key order.

    ``store_id`` tells one store from another (etcd: the cluster id). It is a hint only: an etcd that was wiped and
    started again with the same flags has the same id.
    """

    revision: int
    items: tuple[KeyValue, ...]
    store_id: int = 0


@dataclass(frozen=True, slots=True)
class Put:
    """Write a key; with a lease the store deletes the key when the lease ends.

    No lease takes the key off any it had.
    """

    key: str
    value: bytes
    lease: LeaseId = NO_LEASE


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete a key; an absent key is no error and makes no revision."""

    key: str


@dataclass(frozen=True, slots=True)
class ModRevisionIs:
    """Holds when the key was last changed at this revision: nobody wrote since it was read."""

    key: str
    revision: int


@dataclass(frozen=True, slots=True)
class IsAbsent:
    """Holds when the key does not exist."""

    key: str


@dataclass(frozen=True, slots=True)
class CreateRevisionIs:
    """Holds when the key exists since this revision: the guard of a leader whose key hangs on its lease."""

    key: str
    revision: int


Op = Put | Delete
Compare = ModRevisionIs | IsAbsent | CreateRevisionIs


@dataclass(frozen=True, slots=True)
class Event:
    """One change of one key; ``item`` is the key after a put and None after a delete."""

    kind: Literal["put", "delete"]
    key: str
    mod_revision: int
    item: KeyValue | None = None

    @property
    def value(self) -> bytes | None:
        """Return what was put, or None for a delete."""
        return None if self.item is None else self.item.value


@dataclass(frozen=True, slots=True)
class WatchEvents:
    """Changes under one watched prefix, oldest first, whole revisions only; ``revision`` is that of the newest."""

    prefix: str
    revision: int
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class Progress:
    """The watch is alive and the store was at this revision.

    It does not prove that every event up to ``revision`` was delivered: etcd before 3.4.25 and 3.5.8 answered a
    progress request ahead of events still on their way (etcd-io/etcd#15220).
    """

    revision: int


class Watch(Protocol):
    """Many prefixes over one stream. One thread calls ``next``; the other methods may be called by any thread."""

    def add(self, prefix: str, from_revision: int) -> None:
        """Deliver changes under ``prefix`` from this revision on, that one included (0: from now on).

        The store confirms with a Progress. Raise InvalidInput when the prefix is added already.
        """
        ...

    def remove(self, prefix: str) -> None:
        """Stop delivering changes under ``prefix``, also those already received; unknown prefixes are no error."""
        ...

    def next(self, timeout_s: float) -> WatchEvents | Progress | None:
        """Return what came next, or None after ``timeout_s`` seconds without anything or after ``wake``.

        Raise WatchCompacted when a prefix's start revision is compacted, StoreUnavailable when the stream ended, the
        store gave up a prefix or the watch was closed. After any of these the watch is over: close it and open another.
        """
        ...

    def wake(self) -> None:
        """Let a ``next`` that waits, or else the following one, return None."""
        ...

    def request_progress(self) -> None:
        """Ask for a ``Progress``; a watch that stays silent after this is dead."""
        ...

    def close(self) -> None:
        """End the stream and free its threads; closing twice is no error."""
        ...


class Store(Protocol):
    """A key-value store with etcd's semantics. Keys are text, values bytes. All methods may be called by any thread."""

    def get(self, key: str) -> KeyValue | None:
        """Return the key, or None when it does not exist."""
        ...

    def list(self, prefix: str, *, revision: int = 0) -> Snapshot:
        """Return all keys that start with ``prefix``, as they were at ``revision`` (0: now), however many there are.

        Raise WatchCompacted when that revision is compacted or not yet reached.
        """
        ...

    def txn(self, compares: Sequence[Compare], ops: Sequence[Op]) -> int:
        """Apply all ops in one revision if all compares hold, and return the store's revision after it.

        Raise RevisionConflict when one does not hold, LeaseExpired when a put names a lease that is gone, InvalidInput
        for more than MAX_TXN_OPS ops, an empty key, a key that is put twice, or a request too large for the store.
        After StoreUnavailable the outcome is unknown: read before writing again.
        """
        ...

    def put(self, key: str, value: bytes, lease: LeaseId = NO_LEASE) -> int:
        """Write one key whatever it was; raises as ``txn``."""
        ...

    def delete(self, key: str) -> int:
        """Delete one key, absent or not; raises as ``txn``."""
        ...

    def grant_lease(self, ttl_s: int) -> LeaseId:
        """Make a lease that ends ``ttl_s`` seconds after its last keepalive; etcd rounds very short ones up."""
        ...

    def keepalive(self, lease: LeaseId) -> int:
        """Renew a lease and return its time to live in seconds; raise LeaseExpired when it is gone."""
        ...

    def revoke(self, lease: LeaseId) -> None:
        """End a lease and delete its keys; a lease that is gone is no error."""
        ...

    def open_watch(self) -> Watch:
        """Open a stream for watching; it has no prefix yet."""
        ...

    def close(self) -> None:
        """Free connections and end open watches."""
        ...


#: Name of a user and of a role. The role may do everything; access control cannot begin before the user has it.
ROOT = "root"


@dataclass(frozen=True, slots=True, order=True)
class Grant:
    """Leave for one key, or with ``end`` for all keys from ``key`` up to it, ``end`` left out."""

    key: str
    end: str = ""
    leave: Literal["read", "write", "readwrite"] = "readwrite"

    def __str__(self) -> str:
        return f"{self.leave} {self.key}{f' up to {self.end}' if self.end else ''}"


def prefix_end(prefix: str) -> str:
    """Return the end of the range of keys with this prefix, which ends with a letter or a slash."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


@dataclass(frozen=True, slots=True)
class Access:
    """Who may do what, as the store has it: users with their roles, roles with their grants (none for ``root``)."""

    enabled: bool
    users: Mapping[str, frozenset[str]]
    roles: Mapping[str, frozenset[Grant]]


@dataclass(frozen=True, slots=True)
class AddUser:
    """A user without a password: only the name in a client certificate proves to be it. Existing is no error."""

    user: str

    def __str__(self) -> str:
        return f"add user {self.user}"


@dataclass(frozen=True, slots=True)
class RemoveUser:
    """Absent is no error. Watches that the user has open go on until their connection ends."""

    user: str

    def __str__(self) -> str:
        return f"remove user {self.user}"


@dataclass(frozen=True, slots=True)
class GiveRole:
    """A role that the user has already is no error."""

    user: str
    role: str

    def __str__(self) -> str:
        return f"give {self.user} role {self.role}"


@dataclass(frozen=True, slots=True)
class TakeRole:
    """A role that the user does not have is no error."""

    user: str
    role: str

    def __str__(self) -> str:
        return f"take role {self.role} from {self.user}"


@dataclass(frozen=True, slots=True)
class AddRole:
    """Existing is no error."""

    role: str

    def __str__(self) -> str:
        return f"add role {self.role}"


@dataclass(frozen=True, slots=True)
class RemoveRole:
    """Takes it from all users too. Absent is no error."""

    role: str

    def __str__(self) -> str:
        return f"remove role {self.role}"


@dataclass(frozen=True, slots=True)
class AddGrant:
    """Replaces what the role had for the same key and end."""

    role: str
    grant: Grant

    def __str__(self) -> str:
        return f"let role {self.role} {self.grant}"


@dataclass(frozen=True, slots=True)
class RemoveGrant:
    """Absent is no error."""

    role: str
    grant: Grant

    def __str__(self) -> str:
        return f"no longer let role {self.role} {self.grant}"


@dataclass(frozen=True, slots=True)
class EnableAccess:
    """From now on everybody may do what their roles say, and nothing else. Enabled already is no error."""

    def __str__(self) -> str:
        return "enable access control"


AccessOp = AddUser | RemoveUser | GiveRole | TakeRole | AddRole | RemoveRole | AddGrant | RemoveGrant | EnableAccess


class AccessControl(Protocol):
    """Who may read and write which keys.

    Until it is enabled everybody may do everything, this included; afterwards only users with the role ``root`` may
    look at it or change it. No revision counts these changes, so no transaction can guard them.
    """

    def access(self) -> Access:
        """Return users, roles and grants as they are now; one question per user and role. May see a change halfway."""
        ...

    def change_access(self, op: AccessOp) -> None:
        """Make one change.

        Raise RevisionConflict when the user or role that it is about is not there, InvalidInput for what would lock
        everybody out: enabling without user ``root`` in role ``root``, or removing these while enabled.
        """
        ...


@dataclass(frozen=True, slots=True)
class TlsCredentials:
    """PEM bytes: the CA that signs the store's certificate, and the certificate and key that we show."""

    ca_pem: bytes = field(repr=False)
    cert_pem: bytes = field(repr=False)
    key_pem: bytes = field(repr=False)


def check_txn(compares: Sequence[Compare], ops: Sequence[Op]) -> None:
    """Raise InvalidInput for what etcd would refuse (server/etcdserver/api/v3rpc/key.go, checkTxnRequest)."""
    if len(ops) > MAX_TXN_OPS or len(compares) > MAX_TXN_OPS:
        raise InvalidInput(
            f"a transaction takes at most {MAX_TXN_OPS} operations and as many compares, "
            f"this one has {len(ops)} and {len(compares)}: split it"
        )
    if not all(part.key for part in (*compares, *ops)):
        raise InvalidInput("a key of the store is never empty")
    check_no_key_twice(ops)


def check_no_key_twice(ops: Iterable[Op]) -> None:
    """Raise InvalidInput when a key is put twice, or put and deleted, in one transaction."""
    seen: dict[str, Op] = {}
    for op in ops:
        other = seen.setdefault(op.key, op)
        if other is not op and (isinstance(op, Put) or isinstance(other, Put)):
            raise InvalidInput(f"key {op.key} is written twice in one transaction")


def check_ttl(ttl_s: int) -> None:
    """Raise InvalidInput for a lease time that etcd would refuse or silently replace."""
    if not 0 < ttl_s <= 9_000_000_000:
        raise InvalidInput(f"a lease lasts from 1 to 9000000000 seconds, not {ttl_s}")
