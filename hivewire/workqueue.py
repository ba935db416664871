"""A queue of keys for level-triggered loops.

A key waits at most once, is never handed out twice at the same time, and a key added while it is being worked on
comes again afterwards: the three rules of client-go's work queue. Failures come back with a growing delay.
"""

import heapq
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class WorkQueue(Generic[K]):
    """Thread-safe. Times are seconds of ``clock``; ``jitter`` gives a factor per delay."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = lambda: random.uniform(0.8, 1.2),  # noqa: S311  spreading load, no secret
        first_delay_s: float = 0.1,
        longest_delay_s: float = 30.0,
    ) -> None:
        self._clock = clock
        self._jitter = jitter
        self._first_delay_s = first_delay_s
        self._longest_delay_s = longest_delay_s
        self._changed = threading.Condition()
        self._waiting: OrderedDict[K, None] = OrderedDict()
        self._working: set[K] = set()
        # Keys added while worked on: they go back to waiting when done.
        self._again: set[K] = set()
        self._failures: dict[K, int] = {}
        self._due: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._sequence = 0
        self._closed = False

    def __len__(self) -> int:
        with self._changed:
            return len(self._waiting) + len(self._due)

    def add(self, key: K) -> None:
        """Let the key be worked on as soon as possible; a delay it waits for is cut short."""
        with self._changed:
            self._due.pop(key, None)
            self._put(key)

    def add_after(self, key: K, delay_s: float) -> None:
        """Let the key be worked on after a delay, or sooner if something else asks for it."""
        with self._changed:
            if key in self._waiting:
                return
            due = self._clock() + delay_s
            if self._due.get(key, due) < due:
                return
            self._due[key] = due
            self._sequence += 1
            heapq.heappush(self._heap, (due, self._sequence, key))
            self._changed.notify()

    def get(self, timeout_s: float | None = None) -> K | None:
        """The next key, or None after the timeout or when closed. Every key got must be given to ``done``."""
        deadline = None if timeout_s is None else self._clock() + timeout_s
        with self._changed:
            while not self._closed:
                now = self._clock()
                self._release_due(now)
                if self._waiting:
                    key, _ = self._waiting.popitem(last=False)
                    self._working.add(key)
                    return key
                waits = [t - now for t in (deadline, self._heap[0][0] if self._heap else None) if t is not None]
                if deadline is not None and deadline <= now:
                    return None
                self._changed.wait(min(waits) if waits else None)
            return None

    def done(self, key: K) -> None:
        """The key was worked on with success: its failures are forgotten."""
        with self._changed:
            self._failures.pop(key, None)
            self._finish(key)

    def retry(self, key: K) -> float:
        """The key failed: let it come back after a growing delay. Returns that delay in seconds."""
        with self._changed:
            count = self._failures.get(key, 0)
            self._failures[key] = count + 1
            delay_s = min(self._longest_delay_s, self._first_delay_s * 2.0 ** min(count, 30)) * self._jitter()
            self._finish(key)
        self.add_after(key, delay_s)
        return delay_s

    def close(self) -> None:
        """Wake every waiting ``get``, which then returns None."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _put(self, key: K) -> None:
        if key in self._working:
            self._again.add(key)
        else:
            self._waiting.setdefault(key)
            self._changed.notify()

    def _finish(self, key: K) -> None:
        self._working.discard(key)
        if key in self._again:
            self._again.discard(key)
            self._put(key)

    def _release_due(self, now: float) -> None:
        while self._heap and self._heap[0][0] <= now:
            due, _, key = heapq.heappop(self._heap)
            if self._due.get(key) == due:
                del self._due[key]
                self._put(key)
