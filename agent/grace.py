"""Tasks that ran in clear until their service was enforced: how long they have for their connections to move.

To enforce means to drop what goes in clear, and a running task's connections all do until its links are up. So such a
task is in ``observe`` first, for seconds. It has been in clear all its life, so this opens nothing; a task that began
after its service was enforced was never seen in clear, and gets no such time, nor does one of a service so new that
its policy is still on the way. What is remembered here is in this process alone: after a restart of the agent everybody
has to be seen in clear anew, so whoever was about to be enforced is, at once.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from hivewire.ids import ContainerId

#: From the first sign that a task is to be enforced; whatever still goes in clear then is cut.
LONGEST_S: Final = 10.0
#: The other side needs a moment more until it sends the same way: enforcement comes this long after the last move.
SETTLE_S: Final = 2.0
LOOK_S: Final = 0.5
#: A task that has been seen in clear for less is a new one, whose policy comes late.
KNOWN_S: Final = 5.0


@dataclass(slots=True)
class _Running:
    began: float
    quiet_since: float | None = None


class Grace:
    """Thread-safe: the loop of tasks and the guard ask the same one."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic, known_s: float = KNOWN_S) -> None:
        self._monotonic = monotonic
        self._known_s = known_s
        self._lock = threading.Lock()
        self._in_clear: dict[ContainerId, float] = {}
        self._running: dict[ContainerId, _Running] = {}

    def seen_in_clear(self, container: ContainerId) -> None:
        """Complete records say that its service is not in the mesh, and nothing of ours is in its namespace."""
        with self._lock:
            if container not in self._running:
                self._in_clear.setdefault(container, self._monotonic())

    def left(self, container: ContainerId) -> None:
        """A manager signed that its service is in the mesh no more: it is in clear again, and may be enforced anew."""
        with self._lock:
            self._running.pop(container, None)
            self._in_clear.setdefault(container, self._monotonic())

    def holds(self, container: ContainerId) -> bool:
        """Whether a task that is to be enforced may go on in clear. The first question starts its time."""
        now = self._monotonic()
        with self._lock:
            since = self._in_clear.pop(container, None)
            if since is not None and now - since >= self._known_s:
                self._running[container] = _Running(now)
            running = self._running.get(container)
            if running is not None and now - running.began >= LONGEST_S:
                # Remembered as over: what shows it in clear once more must not give it another time.
                return False
            return running is not None and running.quiet_since != _OVER

    def look(self, container: ContainerId, *, moved: bool) -> None:
        """Tell whether all its connections go through the mesh; when they have for a while, its time is over."""
        now = self._monotonic()
        with self._lock:
            running = self._running.get(container)
            if running is None or running.quiet_since == _OVER:
                return
            if not moved:
                running.quiet_since = None
            elif running.quiet_since is None:
                running.quiet_since = now
            elif now - running.quiet_since >= SETTLE_S:
                running.quiet_since = _OVER

    def forget(self, container: ContainerId) -> None:
        """It is gone, or in the mesh without being enforced: then what is linked has moved already."""
        with self._lock:
            self._in_clear.pop(container, None)
            self._running.pop(container, None)


_OVER: Final = float("inf")
