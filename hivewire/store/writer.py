"""Writes beside a mirror: what was written counts at once, though the mirror shows it a moment later.

Without this a second pass right after a write would compare with the past: write again what is there, or miss that
something it just wrote must go.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

from hivewire.store.api import Compare, Op, Put, Store
from hivewire.store.mirror import Mirror


class Writer:
    """Thread-safe. ``relisted`` must be called when the mirror reports a complete listing."""

    def __init__(self, store: Store, mirror: Mirror) -> None:
        self._store = store
        self._mirror = mirror
        self._lock = threading.Lock()
        # Written by us and not yet seen in the mirror: value (None: deleted), the store's revision after it, and how
        # many listings the mirror had begun by then.
        self._unseen: dict[str, tuple[bytes | None, int, int]] = {}
        self.transactions = 0
        """Since the start."""

    def write(self, compares: Sequence[Compare], ops: Sequence[Op]) -> None:
        """One transaction; raises as ``Store.txn``."""
        revision = self._store.txn(compares, ops)
        listing = self._mirror.listings_begun
        with self._lock:
            self.transactions += 1
            for op in ops:
                self._unseen[op.key] = (op.value if isinstance(op, Put) else None, revision, listing)

    def get(self, prefix: str, key: str) -> bytes | None:
        """What the store holds of a key below a mirrored prefix, as far as we know; None where it holds nothing."""
        unseen = dict(self._ahead(prefix))
        if key in unseen:
            return unseen[key]
        item = self._mirror.items(prefix).get(key)
        return None if item is None else item.value

    def stored(self, prefix: str) -> Mapping[str, bytes]:
        """All that the store holds below a mirrored prefix, as far as we know."""
        # First what is ahead: what the mirror has caught up with meanwhile is in its items, which are read after.
        ahead = tuple(self._ahead(prefix))
        mirrored = ((key, item.value) for key, item in self._mirror.items(prefix).items())
        both = dict[str, bytes | None](chain(mirrored, ahead))
        return {key: value for key, value in both.items() if value is not None}

    def relisted(self, prefix: str) -> None:
        """The mirror listed the prefix. What was written before that listing began and is not in it was lost: the store
        was wiped, and its revisions began anew. A later write may be newer than the listing.
        """
        with self._lock:
            listing = self._mirror.listings_begun
            for key in [k for k, unseen in self._unseen.items() if k.startswith(prefix) and unseen[2] < listing]:
                del self._unseen[key]

    def _ahead(self, prefix: str) -> Iterator[tuple[str, bytes | None]]:
        seen = self._mirror.revision(prefix) or 0
        with self._lock:
            for key in [k for k in self._unseen if k.startswith(prefix)]:
                value, revision, _ = self._unseen[key]
                if revision <= seen:
                    del self._unseen[key]
                else:
                    yield key, value
