"""How large a packet gets to each other node: found out by sending one, asked of the kernel a moment later.

Kernel WireGuard lets its packets be fragmented (send4 in drivers/net/wireguard/socket.c sets no "don't fragment"), so
no router ever tells that they are too large. A datagram that may not be fragmented, and that WireGuard drops for it is
of no known kind, makes routers tell. The node's kernel remembers for ten minutes what they say (route(8), "mtu
expires"), so it is sent again more often than that.
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final, Protocol

from hivewire import logs
from hivewire.records import Address, Endpoint

PERIOD_S: Final = 60.0
SOON_S: Final = 0.5
"""How long after a datagram to look what became of it."""
FORGET_S: Final = 600.0
"""A node that no task of this one had a peer on for this long is let go."""


class Sockets(Protocol):
    """What finds out."""

    def send(self, endpoint: Endpoint, size: int) -> None:
        """Send a packet of so many bytes, headers of IP and UDP included, if the kernel still thinks that it fits."""

    def mtu(self, endpoint: Endpoint) -> int | None:
        """What the kernel thinks that fits; None where there is no way."""


class PathWatch:
    """Called, it tells what is known. ``run`` it on a thread of its own. Thread-safe."""

    def __init__(
        self,
        sockets: Sockets,
        underlay_mtu: Callable[[], int],
        on_change: Callable[[], None],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sockets = sockets
        self._underlay_mtu = underlay_mtu
        self._on_change = on_change
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._asked: dict[Address, tuple[Endpoint, float]] = {}
        self._new: set[Address] = set()
        self._known: dict[Address, int] = {}
        self._log = logs.get()

    def __call__(self, endpoints: Iterable[Endpoint], /) -> Mapping[Address, int]:
        now = self._monotonic()
        with self._lock:
            for endpoint in endpoints:
                if endpoint.address not in self._asked:
                    self._new.add(endpoint.address)
                    self._wake.set()
                self._asked[endpoint.address] = (endpoint, now)
            return dict(self._known)

    def run(self, stop: threading.Event) -> None:
        due = self._monotonic() + PERIOD_S
        while not stop.is_set():
            left_s = due - self._monotonic()
            if left_s <= 0:
                due = self._monotonic() + PERIOD_S
                self.send(only_new=False)
            elif self._wake.wait(min(left_s, SOON_S)):
                self.send(only_new=True)
            else:
                continue
            stop.wait(SOON_S)
            self.look()

    def send(self, *, only_new: bool) -> None:
        """A datagram to each node, or to those that nobody asked for before."""
        with self._lock:
            self._wake.clear()
            for address in [a for a, (_, at) in self._asked.items() if self._monotonic() - at > FORGET_S]:
                del self._asked[address]
                self._known.pop(address, None)
            wanted = self._new if only_new else self._asked.keys()
            endpoints = [self._asked[address][0] for address in sorted(wanted & self._asked.keys(), key=str)]
            self._new.clear()
        for endpoint in endpoints:
            self._sockets.send(endpoint, self._underlay_mtu())

    def look(self) -> None:
        """Take what the kernel knows by now."""
        with self._lock:
            endpoints = [endpoint for endpoint, _ in self._asked.values()]
        found = {e.address: mtu for e in endpoints if (mtu := self._sockets.mtu(e)) is not None}
        with self._lock:
            before, self._known = self._known, found
        underlay_mtu = self._underlay_mtu()
        changed = [
            address
            for address in before.keys() | found.keys()
            if min(before.get(address, underlay_mtu), underlay_mtu)
            != min(found.get(address, underlay_mtu), underlay_mtu)
        ]
        for address in sorted(changed, key=str):
            self._log.info("path.mtu", address=str(address), before=before.get(address), after=found.get(address))
        if changed:
            self._on_change()
