"""From what should be stored and what is to the writes between: nothing where they are equal. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hivewire.records import Record
from hivewire.store.api import MAX_TXN_OPS


@dataclass(frozen=True, slots=True)
class Write:
    """A record to be signed and put; without one its key is deleted."""

    key: str
    record: Record | None = None


def difference(desired: Mapping[str, Record], stored: Mapping[str, Record | None]) -> tuple[Write, ...]:
    """What is new or differs, and the keys of what is not desired; in key order.

    ``stored`` has None for what is there but must be written anew: nobody can verify it, or soon nobody could.
    """
    return tuple(
        Write(key, desired.get(key))
        for key in sorted(desired.keys() | stored.keys())
        if key not in desired or stored.get(key) != desired[key]
    )


def transactions(writes: Sequence[Write]) -> Iterator[Sequence[Write]]:
    """The writes in as few transactions as the store takes."""
    for start in range(0, len(writes), MAX_TXN_OPS):
        yield writes[start : start + MAX_TXN_OPS]
