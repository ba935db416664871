"""Which side of a new pair of peers shakes hands first.

WireGuard answers an initiation even while its own is on the way, and then takes the answer to its own for an old
one: when two initiations cross, both sides become responders, nobody may send, and the next try is 5 s away
(REKEY_TIMEOUT in the kernel's drivers/net/wireguard/messages.h). Two tasks that learn of each other in the same
moment, as after ``docker stack deploy`` or when a label opens a link, meet this about every other time.

So of two peers the one with the smaller public key begins at once, and the other only if nothing came for a moment. A
task that others cannot know yet stays quiet: its try would be lost, and the next one would have to wait. Traffic makes
a handshake at any time, without any of this.
"""

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from agent.observed import ObservedPeer
from hivewire.ids import TaskId
from hivewire.keys import PublicKey

#: How long the side with the larger key waits: agents hear of the same record some tens of milliseconds apart.
PATIENCE_S: Final = 0.25


@dataclass(frozen=True, slots=True)
class Turn:
    """What one pass should do."""

    quiet: frozenset[PublicKey] = frozenset()
    """New peers to add without a handshake."""
    initiate: frozenset[PublicKey] = frozenset()
    """Peers that are there and did not come: shake hands now."""


AT_ONCE: Final = Turn()
"""All new peers, without waiting for anybody."""


class Handshakes:
    """Remembers whom a task waits for. Thread-safe; ``now`` is seconds of any steady clock, the same in all calls."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._due: dict[TaskId, dict[PublicKey, float]] = {}

    def turn(
        self,
        task: TaskId,
        own: PublicKey | None,
        wanted: Iterable[PublicKey],
        there: Mapping[PublicKey, ObservedPeer],
        now: float,
    ) -> Turn:
        """``own``: the task's key if others may know it by now, else None."""
        wanted = frozenset(wanted)
        new = wanted - there.keys()
        if own is None:
            return Turn(quiet=new)
        patient = frozenset(key for key in new if key < own)
        with self._lock:
            due = self._due.setdefault(task, {})
            for key in [k for k in due if k not in wanted or (k in there and there[k].last_handshake is not None)]:
                del due[key]
            late = frozenset(key for key, at in due.items() if at <= now and key in there)
            for key in late:
                del due[key]
            due.update(dict.fromkeys(patient, now + self._patience_s))
            if not due:
                del self._due[task]
        return Turn(patient, late)

    def wait_s(self, task: TaskId, now: float) -> float | None:
        """In how many seconds the task should be looked at again; None: it waits for nobody."""
        with self._lock:
            due = self._due.get(task)
            return None if not due else max(0.0, min(due.values()) - now)

    def forget(self, task: TaskId) -> None:
        with self._lock:
            self._due.pop(task, None)
