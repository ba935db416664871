"""What rules noted, added up over readings, tables and time."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address

import pytest

from agent.denials import (
    LEFT_TASKS,
    LIMIT,
    LOG_LINES,
    DenialBook,
    History,
    Key,
    Line,
    accumulate,
    changed,
    news,
    report,
)
from agent.observed import NotedCounters, NotedEntry
from agent.rules.render import FLOWS, FORGET_S, UNLISTED
from hivewire.ids import ServiceId, TaskId
from hivewire.reports import Direction, Reason
from tests.fakes.clock import FakeClock

NAME = "denied_no_link_in"
NOW = 1_800_000_000.0
SOURCE, DESTINATION = IPv4Address("10.1.0.9"), IPv4Address("10.1.0.2")
KEY = Key(NAME, SOURCE, DESTINATION, 6, 8080)


def entry(count: int, port: int = 8080, idle_s: float = 0.0, source: IPv4Address = SOURCE) -> NotedEntry:
    return NotedEntry(source, DESTINATION, 6, port, count, idle_s)


def read(
    history: History, *entries: NotedEntry, at: float = NOW, table: int = 1, total: int | None = None, name: str = NAME
) -> History:
    """One reading of one set; its counter says what the entries say unless ``total`` says more."""
    count = sum(e.count for e in entries) if total is None else total
    return accumulate(history, NotedCounters(table, {name: count}), {name: entries}, at)


def test_a_first_reading_is_all_new() -> None:
    """What is there at the first look counts whole; its last packet was when the entry says."""
    history = read(History(), entry(3, idle_s=4.0))
    total = history.totals[KEY]
    assert (total.count, total.last_seen, history.counters[NAME], history.unlisted) == (3, NOW - 4, 3, 0)
    assert total.minutes == ((int(NOW - 4) // 60, 3),)


def test_a_second_reading_adds_what_came_since() -> None:
    """Counts of the kernel grow; only the difference is added, and the first time stays."""
    history = read(read(History(), entry(1)), entry(5), at=NOW + 120)
    total = history.totals[KEY]
    assert (total.count, total.first_seen, total.last_seen) == (5, NOW, NOW + 120)
    assert [count for _, count in total.minutes] == [1, 4]


@pytest.mark.parametrize("count", [2, 3, 7])
def test_another_table_counts_from_its_beginning(count: int) -> None:
    """After a replacement everything is new, also where the new count passed the old one."""
    history = read(read(History(), entry(3)), entry(count), at=NOW + 10, table=2)
    assert (history.totals[KEY].count, history.counters[NAME]) == (3 + count, 3 + count)


def test_an_entry_that_the_kernel_forgot_counts_from_its_beginning() -> None:
    """An entry that was quiet for too long to be the old one is another one, even with a higher count."""
    before = read(History(), entry(3))
    quiet = accumulate(before, before.raw_counters, {}, NOW + FORGET_S + 1)
    after = read(quiet, entry(5), at=NOW + FORGET_S + 11, total=8)
    assert (after.totals[KEY].count, after.unlisted) == (8, 0)


def test_no_table_forgets_nothing() -> None:
    """Where the rules are gone what they noted stays known, and new rules begin anew."""
    gone = accumulate(read(History(), entry(3)), NotedCounters(), {}, NOW + 10)
    assert gone.totals[KEY].count == 3
    assert read(gone, entry(2), at=NOW + 20, table=1).totals[KEY].count == 5


def test_what_found_no_room_is_unlisted() -> None:
    """The counter knows more than the set: the rest is counted without addresses."""
    history = read(History(), entry(3), total=10)
    assert (history.counters[NAME], history.unlisted) == (10, 7)


def test_only_the_newest_are_kept() -> None:
    """More entries than there is room for: the oldest go, and count as unlisted."""
    old = read(History(), *(entry(1, port) for port in range(1, LIMIT + 1)))
    full = read(old, *(entry(1, port) for port in range(1, LIMIT + 1)), entry(5, 60000), at=NOW + 10)
    assert len(full.totals) == LIMIT
    assert full.totals[KEY._replace(port=60000)].count == 5
    assert full.unlisted == 1


def test_changed_names_the_sets_to_read() -> None:
    """Only sets whose counter moved, all of them after a replacement, never the one that has no set."""
    history = accumulate(History(), NotedCounters(1, {NAME: 3, "denied_no_link_out": 0, UNLISTED: 1}), {}, NOW)
    same = NotedCounters(1, {NAME: 3, "denied_no_link_out": 2, UNLISTED: 9})
    other = NotedCounters(2, {NAME: 3, "denied_no_link_out": 0, UNLISTED: 9})
    assert changed(history, same) == ("denied_no_link_out",)
    assert changed(history, other) == (NAME,)


def test_the_report_says_it_in_words() -> None:
    """Reason, direction and outcome come from the set's name; flows are apart, and the newest comes first."""
    history = read(History(), entry(3))
    history = read(history, entry(2), at=NOW + 10, name="passed_plaintext_out")
    history = read(history, entry(9), at=NOW + 20, name=FLOWS)
    made = report(TaskId("t"), ServiceId("s"), history)
    assert [(e.reason, e.direction, e.dropped, e.count) for e in made.entries] == [
        (Reason.PLAINTEXT, Direction.OUT, False, 2),
        (Reason.NO_LINK, Direction.IN, True, 3),
    ]
    assert [(f.source, f.port) for f in made.flows] == [(str(SOURCE), 8080)]
    assert made.unlisted == 0


def test_news_come_at_once_and_then_every_half_a_minute() -> None:
    """The first attempt is told, the next ones are summed until half a minute has passed."""
    told = []
    untold: Mapping[Key, object] = {}
    history = History()
    for second, count in ((0, 1), (10, 4), (20, 9), (30, 9), (40, 9)):
        after = read(history, entry(count), at=NOW + second)
        untold, lines = news(untold, history, after, float(second))  # type: ignore[arg-type]
        told.append(lines)
        history = after
    assert told == [(Line(KEY, 1),), (), (), (Line(KEY, 8),), ()]


def test_a_flood_gets_few_lines_at_a_time() -> None:
    """A scan of many ports fills no log; what was not told yet comes later."""
    scanned = read(History(), *(entry(1, port) for port in range(1, 100)))
    untold, first = news({}, History(), scanned, 0.0)
    _, second = news(untold, scanned, scanned, 1.0)
    assert (len(first), len(second)) == (LOG_LINES, LOG_LINES)
    assert not {line.key for line in first} & {line.key for line in second}


@dataclass
class FakeSession:
    """A namespace that says what it noted, and counts the questions."""

    table: int = 1
    sets: dict[str, tuple[NotedEntry, ...]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def noted_counters(self) -> NotedCounters:
        return NotedCounters(self.table, {name: sum(e.count for e in found) for name, found in self.sets.items()})

    def noted_entries(self, name: str) -> tuple[NotedEntry, ...]:
        self.asked.append(name)
        return self.sets[name]


def book() -> DenialBook:
    return DenialBook(FakeClock(NOW), FakeClock())


def test_sets_are_read_only_when_their_counter_moved() -> None:
    """A quiet task costs the counters and nothing else."""
    session, kept = FakeSession(sets={NAME: (entry(3),)}), book()
    for _ in range(3):
        kept.read(TaskId("t"), ServiceId("s"), session)
    assert session.asked == [NAME]
    session.sets[NAME] = (entry(4),)
    kept.read(TaskId("t"), ServiceId("s"), session)
    assert (session.asked, kept.reports()[0].entries[0].count) == ([NAME, NAME], 4)


def test_what_ended_tasks_noted_is_kept_for_a_while() -> None:
    """A task's history outlives it, until many others have ended."""
    kept = book()
    for number in range(LEFT_TASKS + 5):
        task = TaskId(f"t{number:03}")
        kept.read(task, ServiceId("s"), FakeSession(sets={NAME: (entry(1),)}))
        kept.leave(task)
    assert [r.task for r in kept.reports()] == [f"t{number:03}" for number in range(5, LEFT_TASKS + 5)]


def test_all_but_those_that_are_there_have_left() -> None:
    """What is not named any more is kept as ended, what is named goes on."""
    kept = book()
    for name in ("a", "b"):
        kept.read(TaskId(name), ServiceId(""), FakeSession(sets={NAME: (entry(1),)}))
    kept.leave_but({TaskId("b")})
    kept.read(TaskId("b"), ServiceId(""), FakeSession(sets={NAME: (entry(3),)}))
    assert [(r.task, r.entries[0].count) for r in kept.reports()] == [("a", 1), ("b", 3)]


def test_a_task_without_rules_is_not_reported() -> None:
    """Nothing noted, nothing said; and a task that nobody knows can leave."""
    kept = book()
    kept.read(TaskId("t"), ServiceId("s"), FakeSession(table=0))
    kept.leave(TaskId("other"))
    assert kept.reports() == ()
