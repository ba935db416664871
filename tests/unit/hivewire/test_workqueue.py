"""The three rules of the work queue, delays and backoff, on a clock that only moves when told to."""

import threading

import pytest

from hivewire.workqueue import WorkQueue
from tests.fakes.clock import FakeClock


class Rig:
    def __init__(self, jitter: float = 1.0) -> None:
        self.clock = FakeClock()
        self.queue: WorkQueue[str] = WorkQueue(
            clock=self.clock, jitter=lambda: jitter, first_delay_s=1.0, longest_delay_s=10.0
        )

    def get(self) -> str | None:
        """What can be had now."""
        return self.queue.get(timeout_s=0.0)

    def work(self) -> list[str]:
        """Everything that can be had now, each done at once."""
        found = []
        while (key := self.get()) is not None:
            found.append(key)
            self.queue.done(key)
        return found


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_empty(rig: Rig) -> None:
    """An empty queue gives nothing."""
    assert rig.get() is None
    assert len(rig.queue) == 0


def test_first_in_first_out(rig: Rig) -> None:
    """Keys come in the order in which they were added."""
    for key in "bac":
        rig.queue.add(key)
    assert len(rig.queue) == 3
    assert rig.work() == ["b", "a", "c"]


def test_many_adds_are_one(rig: Rig) -> None:
    """A key that waits already is not added again, and keeps its place."""
    for key in "abaab":
        rig.queue.add(key)
    assert rig.work() == ["a", "b"]


def test_never_twice_at_once(rig: Rig) -> None:
    """A key being worked on is not handed out again until it is done."""
    rig.queue.add("a")
    assert rig.get() == "a"
    rig.queue.add("a")
    rig.queue.add_after("a", 0.0)
    rig.clock.advance(1.0)
    assert rig.get() is None


@pytest.mark.parametrize("finish", ["done", "retry"])
def test_added_while_working_comes_again(rig: Rig, finish: str) -> None:
    """A key added while it is worked on comes again once, at once, however the work ended."""
    rig.queue.add("a")
    assert rig.get() == "a"
    rig.queue.add("a")
    rig.queue.add("a")
    getattr(rig.queue, finish)("a")
    assert rig.work() == ["a"]


def test_done_is_done(rig: Rig) -> None:
    """A key that is done does not come again by itself."""
    rig.queue.add("a")
    assert rig.work() == ["a"]
    rig.clock.advance(1000.0)
    assert rig.work() == []


def test_others_go_on(rig: Rig) -> None:
    """A key being worked on holds up no other."""
    rig.queue.add("a")
    rig.queue.add("b")
    assert rig.get() == "a"
    assert rig.get() == "b"


def test_delay(rig: Rig) -> None:
    """A delayed key comes when its time has come, not before."""
    rig.queue.add_after("a", 5.0)
    assert len(rig.queue) == 1
    rig.clock.advance(4.9)
    assert rig.get() is None
    rig.clock.advance(0.1)
    assert rig.work() == ["a"]


def test_delays_in_order(rig: Rig) -> None:
    """Delayed keys come in the order of their times."""
    rig.queue.add_after("late", 3.0)
    rig.queue.add_after("early", 1.0)
    rig.clock.advance(5.0)
    assert rig.work() == ["early", "late"]


@pytest.mark.parametrize("delays", [(2.0, 7.0), (7.0, 2.0)])
def test_the_shorter_delay_counts(rig: Rig, delays: tuple[float, float]) -> None:
    """Of two delays of a key the shorter one counts, and it comes once."""
    for delay in delays:
        rig.queue.add_after("a", delay)
    assert len(rig.queue) == 1
    rig.clock.advance(2.0)
    assert rig.work() == ["a"]
    rig.clock.advance(100.0)
    assert rig.work() == []


def test_add_cuts_a_delay_short(rig: Rig) -> None:
    """A key that is added while it waits for its time comes at once, and not again at that time."""
    rig.queue.add_after("a", 5.0)
    rig.queue.add("a")
    assert rig.work() == ["a"]
    rig.clock.advance(10.0)
    assert rig.work() == []


def test_waiting_key_needs_no_delay(rig: Rig) -> None:
    """A delay for a key that waits already changes nothing."""
    rig.queue.add("a")
    rig.queue.add_after("a", 5.0)
    assert rig.work() == ["a"]
    rig.clock.advance(10.0)
    assert rig.work() == []


def test_delay_that_ends_during_work(rig: Rig) -> None:
    """A key whose delay ends while it is worked on comes again after that."""
    rig.queue.add("a")
    assert rig.get() == "a"
    rig.queue.add_after("a", 1.0)
    rig.clock.advance(2.0)
    assert rig.get() is None
    rig.queue.done("a")
    assert rig.work() == ["a"]


def failures(rig: Rig, count: int) -> list[float]:
    """The delays of so many failures in a row."""
    delays = []
    rig.queue.add("a")
    for _ in range(count):
        assert rig.get() == "a"
        delays.append(rig.queue.retry("a"))
        assert rig.get() is None
        rig.clock.advance(delays[-1])
    return delays


def test_backoff(rig: Rig) -> None:
    """The delay doubles with each failure up to the longest, and the key comes when it is over."""
    assert failures(rig, 7) == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0, 10.0]


def test_backoff_after_very_many_failures(rig: Rig) -> None:
    """No number of failures is too large for the delay."""
    assert failures(rig, 2000)[-1] == 10.0


def test_jitter() -> None:
    """Each delay is spread by its factor."""
    assert failures(Rig(jitter=0.5), 3) == [0.5, 1.0, 2.0]


def test_success_forgets_failures(rig: Rig) -> None:
    """After a success the next failure begins with the first delay, and other keys were never concerned."""
    failures(rig, 3)
    assert rig.get() == "a"
    rig.queue.done("a")
    assert failures(rig, 1) == [1.0]
    rig.queue.add("b")
    assert rig.get() == "b"
    assert rig.queue.retry("b") == 1.0


def test_close(rig: Rig) -> None:
    """A closed queue gives nothing more, whatever waits in it."""
    rig.queue.add("a")
    rig.queue.close()
    assert rig.get() is None
    assert rig.queue.get() is None


def waiter(queue: WorkQueue[str], got: list[str | None]) -> threading.Thread:
    thread = threading.Thread(target=lambda: got.append(queue.get()), daemon=True)
    thread.start()
    return thread


def test_close_wakes_every_waiter() -> None:
    """Threads that wait for a key end when the queue is closed."""
    queue: WorkQueue[str] = WorkQueue()
    got: list[str | None] = []
    threads = [waiter(queue, got) for _ in range(3)]
    queue.close()
    for thread in threads:
        thread.join(60)
    assert got == [None, None, None]


@pytest.mark.parametrize("delay_s", [None, 0.0, 0.001])
def test_a_waiter_is_woken(delay_s: float | None) -> None:
    """A thread that waits gets a key that is added meanwhile, with or without a delay."""
    queue: WorkQueue[str] = WorkQueue()
    got: list[str | None] = []
    thread = waiter(queue, got)
    if delay_s is None:
        queue.add("a")
    else:
        queue.add_after("a", delay_s)
    thread.join(60)
    assert got == ["a"]


def test_many_threads() -> None:
    """Among many threads no key is ever worked on twice at once, and none that was added is lost."""
    queue: WorkQueue[int] = WorkQueue()
    lock = threading.Lock()
    at_work, clashes = set[int](), list[int]()
    written, seen = dict.fromkeys(range(20), 0), dict[int, int]()

    def work() -> None:
        while (key := queue.get()) is not None:
            with lock:
                if key in at_work:
                    clashes.append(key)
                at_work.add(key)
                seen[key] = written[key]
            with lock:
                at_work.discard(key)
                if seen == dict.fromkeys(range(20), 200):
                    queue.close()
            queue.done(key)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in workers:
        thread.start()
    for _ in range(200):
        for key in range(20):
            with lock:
                written[key] += 1
            queue.add(key)
    for thread in workers:
        thread.join(60)
    assert clashes == []
    assert seen == written
