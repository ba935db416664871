"""What has to wait, because connections run on the old way that would not survive the new one.

A side sends through WireGuard when the other side accepts it, and a completed handshake is the proof: the other side
has us as a peer. Where nothing runs yet there is nothing to lose, so a fresh task's routes are there at once, and what
it sends waits in WireGuard's queue. A connection that Swarm's load balancer has given a backend cannot move at all, for
the address of a backend is chosen with a connection's first packet: its VIP is routed when the last one has ended.

On the way back a task sends in clear at once, and what it has in the mesh waits until others have stopped to use it.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from agent.desired import DesiredTask
from agent.observed import ObservedInterface, ObservedTask
from hivewire.ids import ServiceId

#: For so long after the first route over a link, peers may come late, and with them the end of connections in clear.
NEW_S: Final = 60.0
#: A task that started later than this before its first look has no connections worth to keep.
FRESH_S: Final = 5.0
#: A task that leaves the mesh goes on receiving until nothing came for so long. Agents hear of the same record some
#: tens of milliseconds apart, and much later where one of them starts again or waits for its store.
QUIET_S: Final = 3.0
_FLOWS_S: Final = 0.5
_SOON_S: Final = (0.03, 2.0)
_LATER_S: Final = (1.0, 15.0)


@dataclass(frozen=True, slots=True)
class Undecided:
    """Routes that are not there yet and might have to wait."""

    peers: frozenset[IPv4Address] = frozenset()
    """Of peers that never shook hands."""
    vips: frozenset[IPv4Address] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.peers or self.vips)

    def among(self, addresses: Set[IPv4Address]) -> "Undecided":
        return Undecided(self.peers & addresses, self.vips & addresses)

    def held(self, flows: Set[IPv4Address]) -> "Undecided":
        """Those that do wait: there are connections."""
        return self.among(flows)

    @property
    def destinations(self) -> frozenset[IPv4Network]:
        return frozenset(IPv4Network(a) for a in self.peers | self.vips)


def undecided(desired: DesiredTask, observed: ObservedTask) -> Undecided:
    """A route that is there stays, whatever became of its peer: what is closed stays closed."""
    there = {} if observed.interface is None else observed.interface.peers
    routed = {route.destination for route in observed.routes}
    missing = {route.destination for route in desired.routes} - routed
    owned = {network: key for key, spec in desired.peers.items() for network in spec.allowed_ips}
    silent = {n for n in missing & owned.keys() if owned[n] not in there or there[owned[n]].last_handshake is None}
    return Undecided(_addresses(silent), _addresses(missing - owned.keys()))


def in_clear(flows: Set[IPv4Address], observed: ObservedTask, subnets: Iterable[IPv4Network]) -> bool:
    """Whether connections over overlay networks go another way than through WireGuard."""
    routed = {route.destination.network_address for route in observed.routes}
    others = flows - routed - observed.addresses.keys()
    return any(address in subnet for subnet in subnets for address in others)


@dataclass(slots=True)
class Move:
    """What is remembered of one task.

    To read the tracked connections takes the kernel tens of milliseconds where its table is large. So it is asked only
    where connections in clear are possible: a link is new to a task that is not; and not more often than must be.
    """

    _links: dict[ServiceId, float] = field(default_factory=dict)
    """Since when the task has sent to tasks of the service through WireGuard, or until when it was seen not to."""
    _held: Undecided = field(default_factory=Undecided)
    _since: float | None = None
    _flows: tuple[float, frozenset[IPv4Address]] | None = None

    def candidates(
        self,
        undecided: Undecided,
        links: Mapping[ServiceId, Set[IPv4Address]],
        routed: Set[IPv4Address],
        now: float,
        *,
        is_fresh: bool,
    ) -> Undecided:
        """Those to ask the kernel about: where connections may run in clear, and what waits already.

        ``links``: the addresses of each link's peers; ``routed``: those that the task sends to through WireGuard;
        ``is_fresh``: the task itself is new, so nothing runs in clear. A link without any route is new, even if its
        first peer takes an hour to come. A VIP without one is Swarm's, whatever other links there are to its service.
        """
        unknown = -math.inf if is_fresh else now
        self._links = {
            service: self._links.get(service, unknown) if is_fresh or addresses & routed else now
            for service, addresses in links.items()
        }
        new = {a for service, since in self._links.items() if now - since < NEW_S for a in links[service]}
        if not is_fresh:
            new |= undecided.vips
        return undecided.among(new | self._held.peers)

    def flows(self, now: float, read: Callable[[], frozenset[IPv4Address]]) -> frozenset[IPv4Address]:
        if self._flows is None or now - self._flows[0] >= _FLOWS_S:
            self._flows = (now, read())
        return self._flows[1]

    def hold(self, held: Undecided) -> None:
        self._held = held

    def wait_s(self, now: float) -> float | None:
        """When to look again, for the kernel tells nobody of a handshake: soon at first, then ever more seldom.

        None: nothing waits.
        """
        if not self._held:
            self._since = None
            return None
        if self._since is None:
            self._since = now
        shortest, longest = _SOON_S if self._held.peers else _LATER_S
        return min(longest, max(shortest, (now - self._since) / 8))


@dataclass(slots=True)
class Leave:
    """What is remembered of a task that leaves the mesh."""

    _received: int | None = None
    """Bytes, from all peers together."""
    _since: float = 0.0

    def is_over(self, interface: ObservedInterface, now: float) -> bool:
        """Whether the others do not send through the interface any more."""
        received = sum(peer.received_bytes for peer in interface.peers.values())
        if received != self._received:
            self._received, self._since = received, now
        return now - self._since >= QUIET_S


def _addresses(networks: Iterable[IPv4Network]) -> frozenset[IPv4Address]:
    return frozenset(network.network_address for network in networks)
