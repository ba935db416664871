"""How much work each node may cause at once: one that writes without end must not keep the others waiting."""

import threading
import time
from collections.abc import Callable, Hashable
from typing import Final

#: Claims of one node that are judged at once, as when all of its tasks start together ...
BURST: Final = 500
#: ... and how many more each second.
PER_S: Final = 50.0
_MOST_NODES: Final = 10_000


class Budget:
    """A token bucket per payer. Thread-safe; ``monotonic`` gives seconds."""

    def __init__(
        self, burst: int = BURST, per_s: float = PER_S, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._burst = burst
        self._per_s = per_s
        self._monotonic = monotonic
        self._lock = threading.Lock()
        # What was left, and when.
        self._left: dict[Hashable, tuple[float, float]] = {}

    def spend(self, payer: Hashable, amount: int) -> bool:
        """Whether the payer had that much; what it had is gone in either case."""
        with self._lock:
            now = self._monotonic()
            left, at = self._left.pop(payer, (float(self._burst), now))
            left = min(float(self._burst), left + (now - at) * self._per_s)
            self._left[payer] = (max(0.0, left - amount), now)
            while len(self._left) > _MOST_NODES:
                del self._left[next(iter(self._left))]
            return left >= amount
