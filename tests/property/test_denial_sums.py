"""Adding up what rules noted, whatever the kernel says in whatever order."""

from dataclasses import dataclass
from ipaddress import IPv4Address

from hypothesis import given
from hypothesis import strategies as st

from agent import denials
from agent.denials import History, accumulate, changed
from agent.observed import NotedCounters, NotedEntry
from agent.rules.render import UNLISTED

NAMES = ("denied_no_link_in", "denied_wrong_port_in", "passed_no_link_out")
DESTINATION = IPv4Address("10.1.0.2")


@dataclass(frozen=True)
class Reading:
    counters: NotedCounters
    entries: dict[str, tuple[NotedEntry, ...]]
    after_s: float


def _entries() -> st.SearchStrategy[tuple[NotedEntry, ...]]:
    one = st.builds(
        NotedEntry,
        source=st.integers(1, 4).map(lambda n: IPv4Address(f"10.1.0.{n}")),
        destination=st.just(DESTINATION),
        protocol=st.just(6),
        port=st.integers(1, 3),
        count=st.integers(0, 50),
        idle_s=st.floats(0, 300),
    )
    return st.lists(one, max_size=6, unique_by=lambda e: (e.source, e.port)).map(tuple)


READINGS = st.lists(
    st.builds(
        Reading,
        counters=st.builds(
            NotedCounters,
            generation=st.integers(0, 3),
            packets=st.dictionaries(st.sampled_from((*NAMES, UNLISTED)), st.integers(0, 1000)),
        ),
        entries=st.dictionaries(st.sampled_from(NAMES), _entries()),
        after_s=st.floats(-5, 1000),
    ),
    max_size=12,
)


@given(READINGS)
def test_sums_never_shrink(readings: list[Reading]) -> None:
    """Whatever is read, counters and totals only grow, and time stamps of a total stay in order."""
    history, now = History(), 1_800_000_000.0
    for reading in readings:
        now += reading.after_s
        after = accumulate(history, reading.counters, reading.entries, now)
        assert all(after.counters[name] >= count for name, count in history.counters.items())
        assert all(after.totals[key].count >= total.count for key, total in history.totals.items())
        assert all(sum(count for _, count in total.minutes) <= total.count for total in after.totals.values())
        assert all(total.first_seen <= total.last_seen for total in after.totals.values())
        assert after.unlisted >= 0
        history = after


@given(st.lists(st.tuples(st.sampled_from(range(6)), st.integers(1, 5)), max_size=40), st.data())
def test_nothing_is_lost_or_counted_twice(packets: list[tuple[int, int]], data: st.DataObject) -> None:
    """A kernel that counts, is read at any time, and is replaced only after a reading: the totals are exact."""
    truth: dict[int, int] = {}
    table, counts = 1, dict[int, int]()
    history, now = History(), 1_800_000_000.0

    def read() -> History:
        counters = NotedCounters(table, {NAMES[0]: sum(counts.values())})
        found = tuple(NotedEntry(DESTINATION, DESTINATION, 6, port, n) for port, n in counts.items())
        return accumulate(history, counters, dict.fromkeys(changed(history, counters), found), now)

    for port, count in packets:
        truth[port] = truth.get(port, 0) + count
        counts[port] = counts.get(port, 0) + count
        now += 1
        if data.draw(st.booleans(), "read"):
            history = read()
            if data.draw(st.booleans(), "replace"):
                table, counts = table + 1, {}
    history = read()
    assert {key.port: total.count for key, total in history.totals.items()} == truth
    assert history.unlisted == 0


@given(st.integers(1, 60), st.integers(1, 20))
def test_memory_is_bounded(ports: int, limit: int) -> None:
    """However many entries come, only so many are kept, and the rest is counted as unlisted."""
    whole = denials.LIMIT
    denials.LIMIT = limit  # type: ignore[misc]
    try:
        history = History()
        for start in range(0, 3 * ports, ports):
            found = tuple(NotedEntry(DESTINATION, DESTINATION, 6, start + n, 1) for n in range(ports))
            history = accumulate(history, NotedCounters(start + 1, {NAMES[0]: ports}), {NAMES[0]: found}, start)
            assert len(history.totals) <= limit
            assert sum(t.count for t in history.totals.values()) + history.unlisted == history.counters[NAMES[0]]
    finally:
        denials.LIMIT = whole  # type: ignore[misc]
