"""The generations of records that this node has seen, kept on the node: an older record never counts again.

No secret is among them. They outlive the agent, so that a restart does not make it believe what was withdrawn before.
"""

import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from hivewire import logs

#: So long after its deletion a record does not come back as it was. What still holds a manager has signed anew by then.
GONE_S: Final = 7 * 24 * 3600.0
#: Of so many deleted records, the last ones, this is remembered.
MOST_GONE: Final = 50_000

_TABLE: Final = """
create table if not exists seen (
    key text primary key, generation integer not null, gone_at real not null, value blob
) without rowid
"""


class _Entry(NamedTuple):
    generation: int
    gone_at: float = 0.0
    """Unix time of the deletion; 0: it is there."""
    value: bytes | None = None
    """Kept for records that count until a newer one says otherwise."""


class Seen:
    """The memory of one book. Another one may be a moment ahead in the same store, which makes no replay of what
    comes here next.

    Thread-safe. A file that cannot be used is said once in the log; the memory then lasts as long as the agent.
    """

    def __init__(self, path: Path | None = None, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._database = _prepared(":memory:") if path is None else _open(path)
        rows = self._database.execute("select key, generation, gone_at, value from seen")
        self._entries = {str(row[0]): _Entry(*row[1:]) for row in rows}

    def is_known(self, key: str) -> bool:
        with self._lock:
            return key in self._entries

    def refuses(self, key: str, generation: int) -> bool:
        """Whether a record of this generation is older than what was there, or was deleted a while ago."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return False
            is_gone = self._now() - entry.gone_at < GONE_S
            return generation < entry.generation + is_gone

    def note(self, key: str, generation: int, value: bytes | None = None) -> None:
        """This one counts now."""
        self._keep(key, _Entry(generation, 0.0, value))

    def gone(self, key: str) -> None:
        """It was deleted."""
        with self._lock:
            entry = self._entries.get(key)
        if entry is not None:
            self._keep(key, entry._replace(gone_at=self._now(), value=None))

    def expire(self) -> None:
        """Forget what was deleted long enough ago: there is an end to what a node remembers."""
        with self._lock:
            long_ago = self._now() - GONE_S
            old = [key for key, entry in self._entries.items() if 0 < entry.gone_at <= long_ago]
            for key in old:
                del self._entries[key]
            if old:
                self._execute("delete from seen where gone_at > 0 and gone_at <= ?", (long_ago,))
            gone = sorted((entry.gone_at, key) for key, entry in self._entries.items() if entry.gone_at > 0)
            for _, key in gone[: max(0, len(gone) - MOST_GONE)]:
                del self._entries[key]
                self._execute("delete from seen where key = ?", (key,))

    def generation(self, key: str) -> int:
        """The one that was seen last; 0: none."""
        with self._lock:
            entry = self._entries.get(key)
            return 0 if entry is None else entry.generation

    def values(self) -> dict[str, bytes]:
        """The records that were kept whole, by key."""
        with self._lock:
            return {key: entry.value for key, entry in self._entries.items() if entry.value is not None}

    def _keep(self, key: str, entry: _Entry) -> None:
        with self._lock:
            if self._entries.get(key) == entry:
                return
            self._entries[key] = entry
            self._execute("insert or replace into seen values (?, ?, ?, ?)", (key, *entry))

    def _execute(self, statement: str, values: tuple[object, ...]) -> None:
        try:
            self._database.execute(statement, values)
        except sqlite3.Error as error:
            logs.get().warning("seen.unwritten", error=str(error))


def _open(path: Path) -> sqlite3.Connection:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return _prepared(str(path))
    except (OSError, sqlite3.Error) as error:
        logs.get().error("seen.unusable", path=str(path), error=str(error), remedy="delete the file, or mount a volume")
        return _prepared(":memory:")


def _prepared(name: str) -> sqlite3.Connection:
    database = sqlite3.connect(name, isolation_level=None, check_same_thread=False)
    # Written to the page cache at once: it outlives the process, and with the machine the tasks go as well.
    database.execute("pragma journal_mode = wal")
    database.execute("pragma synchronous = off")
    database.execute(_TABLE)
    return database
