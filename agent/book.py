"""The agent's memory of the records that it follows, which tells a removal from a loss.

A watch says that a key was deleted: that is a removal, and it counts at once. A fresh listing in which a key is
missing may be the same, or a store that was wiped, restored from an old backup or is being filled again: such a key
is kept for a while, long enough for its writer to write it again. So an empty store never takes a peer away.

Nothing counts that its writer did not sign, or that is older than what was seen before. A quarantine ends with a record
that says so, never with a deletion.
"""

import threading
from collections.abc import Collection, Iterable, Mapping
from typing import Final, TypeVar

from agent.seen import Seen
from hivewire import logs
from hivewire.errors import HivewireError, InvalidRecord, RecordTooNew, UnverifiedRecord
from hivewire.records import MESH_KEY, QUARANTINES, Doubt, MeshRecord, QuarantineRecord, Record, writer_of
from hivewire.signed import Signatures

R = TypeVar("R", bound=Record)

#: Seconds that a key stays after a listing without it: agents claim again within a few seconds of such a listing.
HOLD_S: Final = 30.0
#: What is not believed, and may be in a moment, is read again after this time: a node that has become a manager writes
#: records some seconds before every engine has heard of it.
DOUBT_S: Final = 2.0


class Book:
    """Thread-safe. ``now`` is seconds of any steady clock, the same in all calls."""

    def __init__(self, signatures: Signatures, seen: Seen | None = None, hold_s: float = HOLD_S) -> None:
        self._signatures = signatures
        self._seen = seen or Seen()
        self._hold_s = hold_s
        self._lock = threading.Lock()
        self._values: dict[str, bytes] = {}
        self._folders: dict[str, set[str]] = {}
        self._complete: set[str] = set()
        self._missing_since: dict[str, float] = {}
        # Decoded once per value: a pass over a task reads every peer of its linked services.
        self._decoded: dict[str, tuple[bytes, Record | None]] = {}
        self.unreadable: dict[str, HivewireError] = {}
        """Keys whose present value counts as not written, with the reason; the last good value stays in use."""
        for key, value in self._seen.values().items():
            self._values[key] = value
            self._folders.setdefault(_folder(key), set()).add(key)

    def update(self, prefix: str, changed: Mapping[str, bytes | None], *, listed: bool, now: float) -> None:
        """Take in changed keys; None: not there any more. ``listed``: learned from a listing, not from an event."""
        with self._lock:
            if listed:
                self._complete.add(prefix)
            for key, value in changed.items():
                if value is not None:
                    self._values[key] = value
                    self._folders.setdefault(_folder(key), set()).add(key)
                    self._missing_since.pop(key, None)
                    self.unreadable.pop(key, None)  # the complaint was about what lay there before
                elif key.startswith(QUARANTINES):
                    self._keep_quarantine(key)
                elif listed:
                    if key in self._values:
                        self._missing_since.setdefault(key, now)
                else:
                    self._forget(key)
                    self._seen.gone(key)

    def _keep_quarantine(self, key: str) -> None:
        """Its deletion proves nothing: what was good stays. What never was good goes, with the complaint about it."""
        self._decode(QuarantineRecord, key)  # nobody may have read it until now
        if isinstance(self.unreadable.get(key), UnverifiedRecord):
            good = self._seen.values().get(key)
            self._forget(key)
            if good is not None:
                self._values[key] = good
                self._folders.setdefault(_folder(key), set()).add(key)

    def expire(self, now: float) -> frozenset[str]:
        """Let go of what has been missing for long enough; returns those keys."""
        with self._lock:
            late = frozenset(k for k, since in self._missing_since.items() if now - since >= self._hold_s)
            for key in late:
                self._forget(key)
                self._seen.gone(key)  # where it comes back with an old store and still holds, a manager signs it anew
            self._seen.expire()
            # What was refused may be good by now, as when a clock was set.
            for key in self.unreadable:
                self._decoded[key] = (b"", self._decoded[key][1])
            return late

    def doubts(self) -> tuple[Doubt, ...]:
        """What is not believed now, by key."""
        with self._lock:
            return tuple(
                Doubt(key=key, reason=str(error), seen=self._seen.generation(key) if _is_replay(error) else 0)
                for key, error in sorted(self.unreadable.items())
            )

    def is_in_doubt(self, prefix: str) -> bool:
        """Whether below a folder something is not believed of which no good record is known: it is no absence."""
        with self._lock:
            return any(
                key.startswith(prefix) and self._decoded.get(key, (b"", None))[1] is None for key in self.unreadable
            )

    def may_change(self, prefixes: Collection[str]) -> bool:
        """Whether something below one of these is not believed, and may be in a moment as it is."""
        with self._lock:
            return any(_may_pass(it) and key.startswith(tuple(prefixes)) for key, it in self.unreadable.items())

    def is_complete(self, prefix: str) -> bool:
        """Whether the prefix was listed as a whole: what is missing here then was missing there."""
        with self._lock:
            return prefix in self._complete

    def drop(self, prefix: str) -> None:
        """Forget a prefix that is no longer followed: nothing will tell what becomes of it."""
        with self._lock:
            self._complete.discard(prefix)
            for key in [k for k in self._values if k.startswith(prefix)]:
                self._forget(key)

    def get(self, kind: type[R], key: str) -> R | None:
        """The record, or the last readable one; None where there is none."""
        with self._lock:
            return self._decode(kind, key)

    def is_quarantined(self, keys: Iterable[str]) -> bool:
        """Whether a quarantine stands below one of these keys; one that a manager signed and nobody can read does."""
        with self._lock:
            return any(self._stands(key) for key in keys)

    def _stands(self, key: str) -> bool:
        record, error = self._decode(QuarantineRecord, key), self.unreadable.get(key)
        is_strange = error is not None and not isinstance(error, UnverifiedRecord)
        return is_strange or (record is not None and not record.released)

    def below(self, kind: type[R], prefix: str) -> tuple[R, ...]:
        """All records of a folder (``prefix`` ends in a slash), in key order."""
        with self._lock:
            found = [self._decode(kind, key) for key in sorted(self._folders.get(prefix, ()))]
            return tuple(record for record in found if record is not None)

    def _decode(self, kind: type[R], key: str) -> R | None:
        value = self._values.get(key)
        if value is None:
            return None
        before = self._decoded.get(key)
        if before is not None and before[0] == value:
            return before[1]  # type: ignore[return-value]
        try:
            record: R | None = self._verified(kind, key, value)
            self.unreadable.pop(key, None)
        except (InvalidRecord, RecordTooNew) as error:
            if str(error) != str(self.unreadable.get(key)):
                logs.get().warning("record.refused", key=key, error=str(error))
            self.unreadable[key] = error
            record = None if before is None else before[1]  # type: ignore[assignment]
        # What may be good in a moment is looked at again whenever somebody asks for it.
        self._decoded[key] = (b"" if _may_pass(self.unreadable.get(key)) else value, record)
        return record

    def _verified(self, kind: type[R], key: str, value: bytes) -> R:
        signed = self._signatures.verify(kind, key, value)
        if self._seen.refuses(key, signed.generation) or signed.generation < self._floor(key):
            self._signatures.refused["replay"] += 1
            raise UnverifiedRecord("replay", "it is older than what was there before")
        # A quarantine counts for as long as nobody takes it back, whatever becomes of the store.
        self._seen.note(key, signed.generation, value if isinstance(signed.record, QuarantineRecord) else None)
        return signed.record

    def _floor(self, key: str) -> int:
        """The lowest generation that counts below a key of which this node has seen none yet."""
        if key == MESH_KEY or writer_of(key) is not None or self._seen.is_known(key):
            return 0
        mesh = self._decode(MeshRecord, MESH_KEY)
        return 0 if mesh is None else mesh.floor

    def _forget(self, key: str) -> None:
        self._values.pop(key, None)
        self._folders.get(_folder(key), set()).discard(key)
        self._missing_since.pop(key, None)
        self.unreadable.pop(key, None)
        self._decoded.pop(key, None)


def _may_pass(error: HivewireError | None) -> bool:
    return isinstance(error, UnverifiedRecord) and error.may_pass


def _is_replay(error: HivewireError) -> bool:
    return isinstance(error, UnverifiedRecord) and error.cause == "replay"


def _folder(key: str) -> str:
    return key[: key.rindex("/") + 1]
