"""The records that this agent writes itself: claims and statuses of its node's tasks, each written when it changes."""

from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeVar

from hivewire.errors import InvalidRecord
from hivewire.ids import NodeId, TaskId
from hivewire.records import CLAIMS, STATUS, Record
from hivewire.signed import Signatures, Signed
from hivewire.store.api import Delete, Put, Store
from hivewire.store.mirror import Mirror
from hivewire.store.writer import Writer

R = TypeVar("R", bound=Record)


class OwnRecords:
    """Compares with what the store really holds, so a record that was lost is written again. Thread-safe."""

    def __init__(self, store: Store, mirror: Mirror, signatures: Signatures, node: NodeId) -> None:
        self.prefixes: Final = (f"{CLAIMS}{node}/", f"{STATUS}{node}/")
        self._mirror = mirror
        self._writer = Writer(store, mirror)
        self._signatures = signatures
        # The last that was written of each key: it outlives a wiped store, and with it the claim's epoch.
        self._last: dict[str, tuple[bytes, Signed[Any]]] = {}

    @property
    def transactions(self) -> int:
        """Transactions since the start."""
        return self._writer.transactions

    def tasks(self) -> frozenset[TaskId]:
        """Every task that the store holds a record of ours for."""
        return frozenset(_task(key) for prefix in self.prefixes for key in self._writer.stored(prefix))

    def read(self, kind: type[R], key: str) -> R | None:
        """What we last wrote, else what an earlier agent of this node did; None where that cannot be read."""
        last = self._last.get(key)
        if last is not None and isinstance(last[1].record, kind):
            return last[1].record
        signed = self._verified(kind, key, self._stored(key))
        return None if signed is None else signed.record

    def write(self, records: Mapping[str, Record]) -> None:
        """Write those that the store does not hold so already, in one transaction. Raises StoreUnavailable."""
        puts = []
        for key, record in sorted(records.items()):
            value, present = self._stored(key), self._last.get(key)
            if present is None or present[0] != value:
                found = self._verified(type(record), key, value)
                # Readers have seen the later one: what somebody put back is no good to them, though it says the same.
                is_older = found is not None and present is not None and found.generation < present[1].generation
                present = None if value is None or found is None or is_older else (value, found)
            if present is None or present[1].record != record or self._signatures.is_worn(present[1]):
                value = self._signatures.sign(record)
                puts.append(Put(key, value))
                present = (value, self._signatures.verify(type(record), key, value))
            self._last[key] = present
        if puts:
            self._writer.write((), puts)

    def remove(self, keys: Iterable[str]) -> None:
        """Remove those that the store holds, in one transaction. Raises StoreUnavailable."""
        keys = sorted(keys)
        deletes = [Delete(key) for key in keys if self._stored(key) is not None]
        if deletes:
            self._writer.write((), deletes)
        for key in keys:
            self._last.pop(key, None)

    def lost(self, prefix: str, changed: Iterable[str], *, listed: bool) -> frozenset[TaskId]:
        """Tasks whose record is not what we wrote: somebody else changed it, or the store lost it."""
        if listed:
            self._writer.relisted(prefix)
        stored = {key: self._stored(key) for key in changed}
        return frozenset(_task(key) for key, value in stored.items() if value != self._last.get(key, (None,))[0])

    def _verified(self, kind: type[R], key: str, value: bytes | None) -> Signed[R] | None:
        try:
            return None if value is None else self._signatures.verify(kind, key, value)
        except InvalidRecord:
            return None

    def _stored(self, key: str) -> bytes | None:
        return self._writer.get(key[: key.rindex("/") + 1], key)


def _task(key: str) -> TaskId:
    return TaskId(key.rsplit("/", 1)[1])
