"""What the rules of this node's tasks noted, kept over the replacement of tables.

    counters, sets --read--> History of a task --report--> controller
                                  '--news--> log, at most one line per source, destination and port in half a minute

The kernel forgets when a table is replaced, when an entry was quiet for long, and when a task ends. ``accumulate`` adds
up what came since the reading before; it is pure. Counters are exact; an entry is kept while there is room, and what
has none still counts as unlisted.
"""

import threading
import time
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Final, NamedTuple, Protocol

from agent.observed import NotedCounters, NotedEntry
from agent.rules.render import FLOWS, FORGET_S, UNLISTED, note_name
from hivewire import logs
from hivewire.ids import ServiceId, TaskId
from hivewire.reports import DenialEntry, Direction, FlowEntry, Reason, TaskDenials

LIMIT: Final = 1024
"""How many entries are kept of one task."""
MINUTES: Final = 60
"""Of how many minutes the numbers are kept one by one."""
LEFT_TASKS: Final = 64
"""Of how many tasks that have ended the history is kept."""
IGMP: Final = 2
"""What the kernel itself tells its neighbours about groups: nobody's attempt, so the log does not name it."""
LOG_EVERY_S: Final = 30.0
LOG_LINES: Final = 10
"""How many lines one task gets at a time."""

_KINDS: Final = {
    note_name(reason, direction, enforce=enforce): (reason, direction, enforce)
    for reason in Reason
    for direction in Direction
    for enforce in (True, False)
}


class Key(NamedTuple):
    name: str
    """Of the set: it stands for reason, direction, and whether it was dropped."""
    source: IPv4Address
    destination: IPv4Address
    protocol: int
    port: int


@dataclass(frozen=True, slots=True)
class Total:
    """All that was noted under one key."""

    count: int
    first_seen: float
    last_seen: float
    minutes: tuple[tuple[int, int], ...] = ()
    """Minute since 1970 and count, oldest first."""


@dataclass(frozen=True, slots=True)
class History:
    """What is known of one task. ``raw_*`` is what the kernel said last, to tell what is new."""

    counters: Mapping[str, int] = field(default_factory=dict)
    totals: Mapping[Key, Total] = field(default_factory=dict)
    read_at: float = 0.0
    raw_counters: NotedCounters = field(default_factory=NotedCounters)
    raw_entries: Mapping[Key, int] = field(default_factory=dict)

    @property
    def unlisted(self) -> int:
        """How much of what was counted is not among the totals."""
        counted = sum(count for name, count in self.counters.items() if name in _KINDS)
        return max(0, counted - sum(total.count for key, total in self.totals.items() if key.name in _KINDS))


class Session(Protocol):
    """What a reading asks of a namespace."""

    def noted_counters(self) -> NotedCounters: ...

    def noted_entries(self, name: str) -> tuple[NotedEntry, ...]: ...


def changed(history: History, counters: NotedCounters) -> tuple[str, ...]:
    """The names of the sets that have something new."""
    before = history.raw_counters
    known = before.packets if before.generation == counters.generation else {}
    return tuple(
        name for name, count in sorted(counters.packets.items()) if name != UNLISTED and count != known.get(name, 0)
    )


def accumulate(
    history: History, counters: NotedCounters, entries: Mapping[str, Iterable[NotedEntry]], now: float
) -> History:
    """Add one reading: all counters, and the entries of the sets that have something new. ``now`` is Unix time."""
    before = history.raw_counters
    is_same = before.generation == counters.generation
    known = before.packets if is_same else {}
    sums = dict(history.counters)
    for name, count in counters.packets.items():
        sums[name] = sums.get(name, 0) + _grown(count, known.get(name, 0))
    raw = {key: count for key, count in history.raw_entries.items() if is_same and key.name not in entries}
    totals = dict(history.totals)
    for name, found in entries.items():
        for entry in found:
            key = Key(name, entry.source, entry.destination, entry.protocol, entry.port)
            raw[key] = entry.count
            earlier, old = totals.get(key), history.raw_entries.get(key, 0) if is_same else 0
            # Quiet for so long by then that the kernel had forgotten it: what is there now is another entry.
            if earlier is not None and history.read_at - earlier.last_seen > FORGET_S:
                old = 0
            if new := _grown(entry.count, old):
                totals[key] = _added(earlier, new, history.read_at, now - entry.idle_s)
    if len(totals) > LIMIT:
        newest = sorted(totals, key=lambda key: (-totals[key].last_seen, key))[:LIMIT]
        totals = {key: totals[key] for key in newest}
    return History(sums, totals, now, counters, raw)


def _grown(count: int, before: int) -> int:
    """What came since; a smaller number than before is a new beginning."""
    return count - before if count >= before else count


def _added(earlier: Total | None, new: int, read_at: float, at: float) -> Total:
    if earlier is None:
        # Between the reading before and its last packet; with a single one the two are the same.
        first = at if new == 1 or not read_at else min(read_at, at)
        return Total(new, first, at, ((int(at // 60), new),))
    at = max(at, earlier.last_seen)
    minute = int(at // 60)
    minutes = dict(earlier.minutes)
    minutes[minute] = minutes.get(minute, 0) + new
    recent = tuple((m, count) for m, count in sorted(minutes.items()) if minute - m < MINUTES)
    return Total(earlier.count + new, earlier.first_seen, at, recent)


def report(task: TaskId, service: ServiceId, history: History) -> TaskDenials:
    """A task's history as the controller gets it: the newest first."""
    newest = sorted(history.totals.items(), key=lambda item: (-item[1].last_seen, item[0]))
    return TaskDenials(
        task=task,
        service=service,
        counters=dict(sorted(history.counters.items())),
        unlisted=history.unlisted,
        entries=tuple(_entry(key, total) for key, total in newest if key.name in _KINDS),
        flows=tuple(
            FlowEntry(
                source=str(key.source),
                destination=str(key.destination),
                protocol=key.protocol,
                port=key.port,
                first_seen=total.first_seen,
                last_seen=total.last_seen,
            )
            for key, total in newest
            if key.name == FLOWS
        ),
    )


def _entry(key: Key, total: Total) -> DenialEntry:
    reason, direction, enforce = _KINDS[key.name]
    return DenialEntry(
        direction=direction,
        reason=reason,
        dropped=enforce,
        source=str(key.source),
        destination=str(key.destination),
        protocol=key.protocol,
        port=key.port,
        count=total.count,
        first_seen=total.first_seen,
        last_seen=total.last_seen,
        minutes=total.minutes,
    )


# -- the log ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Untold:
    """What the log has not said of a key yet."""

    count: int
    told_at: float


@dataclass(frozen=True, slots=True)
class Line:
    key: Key
    count: int


def news(
    untold: Mapping[Key, Untold], before: History, after: History, now: float
) -> tuple[Mapping[Key, Untold], tuple[Line, ...]]:
    """The lines that are due: a new key at once, one that goes on every half a minute. Keys are those of ``after``."""
    left: dict[Key, Untold] = {}
    due: list[Line] = []
    for key, total in after.totals.items():
        if key.name not in _KINDS or key.protocol == IGMP:
            continue
        earlier = before.totals.get(key)
        more = total.count - (earlier.count if earlier else 0)
        known = untold.get(key)
        count = more + (known.count if known else 0)
        if count and (known is None or now - known.told_at >= LOG_EVERY_S) and len(due) < LOG_LINES:
            due.append(Line(key, count))
            left[key] = Untold(0, now)
        elif count:
            left[key] = Untold(count, known.told_at if known else float("-inf"))
        elif known is not None and now - known.told_at < LOG_EVERY_S:
            left[key] = known
    return left, tuple(due)


# -- the state -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Known:
    service: ServiceId
    history: History = field(default_factory=History)
    untold: Mapping[Key, Untold] = field(default_factory=dict)


class DenialBook:
    """The histories of this node's tasks. Thread-safe: readings of one task follow each other."""

    def __init__(self, now: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._tasks: dict[TaskId, _Known] = {}
        self._left: dict[TaskId, _Known] = {}
        self._log = logs.get()

    def read(self, task: TaskId, service: ServiceId, session: Session) -> None:
        """Ask the kernel for what is new: two small questions where there is nothing. Raises KernelBusy."""
        with self._lock:
            known = self._tasks.setdefault(task, _Known(service))
            before = known.history
            counters = session.noted_counters()
            names = changed(before, counters)
            if names or counters.generation != before.raw_counters.generation:
                entries = {name: session.noted_entries(name) for name in names}
                known.history = accumulate(before, counters, entries, self._now())
            else:
                known.history = History(before.counters, before.totals, self._now(), counters, before.raw_entries)
            if not names and not known.untold:
                return
            known.untold, lines = news(known.untold, before, known.history, self._monotonic())
        for line in lines:
            self._say(task, line)

    def leave(self, task: TaskId) -> None:
        """The task has ended. What it noted is kept until enough others have ended."""
        with self._lock:
            self._leave(task)

    def leave_but(self, tasks: Container[TaskId]) -> None:
        """All others have ended."""
        with self._lock:
            for task in [task for task in self._tasks if task not in tasks]:
                self._leave(task)

    def _leave(self, task: TaskId) -> None:
        known = self._tasks.pop(task, None)
        if known is not None and known.history.totals:
            self._left[task] = known
            for oldest in list(self._left)[:-LEFT_TASKS]:
                del self._left[oldest]

    def reports(self) -> tuple[TaskDenials, ...]:
        """Of every task that has noted anything."""
        with self._lock:
            known = [*self._left.items(), *self._tasks.items()]
        return tuple(report(task, it.service, it.history) for task, it in known if it.history.counters)

    def _say(self, task: TaskId, line: Line) -> None:
        reason, direction, is_dropped = _KINDS[line.key.name]
        self._log.warning(
            "conn.denied" if is_dropped else "conn.undeclared",
            task=task,
            source=str(line.key.source),
            destination=str(line.key.destination),
            port=line.key.port,
            protocol=line.key.protocol,
            reason=reason.value,
            direction=direction.value,
            count=line.count,
        )
