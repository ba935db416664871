"""The records of one prefix, verified once and found by what they are about, however many others there are."""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Final, Generic, TypeVar

from hivewire import logs
from hivewire.errors import InvalidRecord, UnverifiedRecord
from hivewire.records import Record, split_key
from hivewire.signed import Signatures, Signed
from hivewire.store.writer import Writer

R = TypeVar("R", bound=Record)
T = TypeVar("T")

Word = tuple[str, str]
"""What records are filed under: a kind of thing, and its id."""

#: Of how many keys the generation is remembered, at least.
_MEMORY: Final = 50_000
#: Up to so many keys are looked up one by one.
_FEW: Final = 16


class Known(Generic[R]):
    """The records below a prefix, as far as we know: what we wrote ourselves counts before the mirror shows it.

    Each is verified once, and found by the words that it is filed under, however many others there are. A value that
    cannot be verified or read, or is older than one seen before, changes nothing but ``refused``: the last good record
    stays. Thread-safe.
    """

    def __init__(
        self,
        kind: type[R],
        prefix: str,
        writer: Writer,
        signatures: Signatures,
        words: Callable[[tuple[str, ...], R | None], Iterable[Word]] = lambda parts, record: (),
    ) -> None:
        """``words`` gets the parts of the key, and None for a record that cannot be read."""
        self._kind = kind
        self.prefix = prefix
        self._writer = writer
        self._signatures = signatures
        self._words = words
        self._log = logs.get()
        self._lock = threading.Lock()
        self._values: dict[str, bytes] = {}
        self._records: dict[str, Signed[R]] = {}
        self._refused: dict[str, InvalidRecord] = {}
        # Of keys that are gone too: what was deleted does not come back as it was.
        self._generations: dict[str, int] = {}
        self._filed: dict[Word, set[str]] = defaultdict(set)
        self._wanted: Mapping[str, int] = {}
        self.is_complete = False
        """Whether the store was read at least once."""

    def relist(self) -> None:
        with self._lock:
            stored = self._writer.stored(self.prefix)
            for key in self._values.keys() | stored.keys():
                self._take(key, stored.get(key))
            self.is_complete = True

    def refresh(self, keys: Iterable[str]) -> None:
        """Look at these again: somebody wrote them."""
        keys = tuple(keys)
        with self._lock:
            stored = self._writer.stored(self.prefix) if len(keys) > _FEW else None
            for key in keys:
                self._take(key, self._writer.get(self.prefix, key) if stored is None else stored.get(key))

    def retry(self) -> None:
        """Look again at what was refused: a clock was set, or a node has become a manager."""
        with self._lock:
            for key in tuple(self._refused):
                value = self._values.pop(key)
                self._unfile(key)
                self._take(key, value)

    def write_anew(self, wanted: Mapping[str, int]) -> None:
        """Count these as to be written anew until they have a higher generation: readers have seen newer ones."""
        with self._lock:
            self._wanted = wanted

    def is_older(self, key: str, generation: int) -> bool:
        """Whether there is a good record below the key, of a lower generation."""
        with self._lock:
            signed = self._records.get(key)
            return signed is not None and signed.generation < generation

    def record(self, key: str) -> R | None:
        with self._lock:
            signed = self._records.get(key)
            return None if signed is None else signed.record

    def records(self, word: Word | None = None) -> dict[str, R]:
        """The good ones, by key: all, or those that are filed under a word."""
        with self._lock:
            found = self._records if word is None else self._under(word, self._records)
            return {key: signed.record for key, signed in found.items()}

    def stored(self, word: Word | None = None) -> dict[str, R | None]:
        """As ``records``; None for what is there and must be written anew: refused, worn, older than readers want."""
        with self._lock:
            return {
                key: self._sound(key) for key in (self._values if word is None else self._under(word, self._values))
            }

    @property
    def refused(self) -> dict[str, InvalidRecord]:
        """Why what is stored now counts as not written, by key."""
        with self._lock:
            return dict(self._refused)

    @property
    def oldest(self) -> int | None:
        """The lowest generation; None where there is no record."""
        with self._lock:
            return min((signed.generation for signed in self._records.values()), default=None)

    def _sound(self, key: str) -> R | None:
        signed = self._records.get(key)
        if signed is None or key in self._refused or signed.generation <= self._wanted.get(key, -1):
            return None
        return None if self._signatures.is_worn(signed) else signed.record

    def _under(self, word: Word, things: Mapping[str, T]) -> dict[str, T]:
        return {key: things[key] for key in sorted(self._filed.get(word, ())) if key in things}

    def _take(self, key: str, value: bytes | None) -> None:
        if self._values.get(key) == value:
            return
        if key in self._values:
            self._unfile(key)
            del self._values[key]
        self._refused.pop(key, None)
        if value is None:
            self._records.pop(key, None)
            return
        self._values[key] = value
        try:
            signed = self._signatures.verify(self._kind, key, value)
            if signed.generation < self._generations.get(key, 0):
                self._signatures.refused["replay"] += 1
                raise UnverifiedRecord("replay", "it is older than one that was there before")
            self._records[key] = signed
            self._remember(key, signed.generation)
        except InvalidRecord as error:
            self._refused[key] = error
            self._log.warning("record.refused", key=key, error=str(error))
        for word in self._words_of(key):
            self._filed[word].add(key)

    def _remember(self, key: str, generation: int) -> None:
        self._generations[key] = generation
        if len(self._generations) > 2 * _MEMORY:
            gone = [known for known in self._generations if known not in self._values]
            for known in gone[:_MEMORY]:  # the oldest
                del self._generations[known]

    def _unfile(self, key: str) -> None:
        for word in self._words_of(key):
            self._filed[word].discard(key)
            if not self._filed[word]:
                del self._filed[word]

    def _words_of(self, key: str) -> Iterable[Word]:
        signed = self._records.get(key)
        return self._words(split_key(key), None if signed is None else signed.record)
