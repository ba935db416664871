"""Which routes have to wait, because connections run on the old way that would not survive the new one.

A side sends through WireGuard when the other side accepts it, and a completed handshake is the proof: the other side
has us as a peer. Where nothing runs yet there is nothing to lose, so a fresh task's routes are there at once, and what
it sends waits in WireGuard's queue. A connection that Swarm's load balancer has given a backend cannot move at all, for
the address of a backend is chosen with a connection's first packet: its VIP is routed when the last one has ended.
"""

from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from agent.desired import DesiredTask
from agent.observed import ObservedTask
from hivewire.ids import TaskId

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

    def held(self, flows: Set[IPv4Address]) -> "Undecided":
        """Those that do wait: there are connections."""
        return Undecided(self.peers & flows, self.vips & flows)

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
class Moving:
    """How soon to look again at a task whose routes wait: the kernel tells nobody of a handshake. One lock's."""

    _since: dict[TaskId, float] = field(default_factory=dict)

    def wait_s(self, task: TaskId, held: Undecided, now: float) -> float | None:
        """Soon at first, then ever more seldom; None: nothing waits."""
        if not held:
            self._since.pop(task, None)
            return None
        shortest, longest = _SOON_S if held.peers else _LATER_S
        return min(longest, max(shortest, (now - self._since.setdefault(task, now)) / 8))

    def forget(self, task: TaskId) -> None:
        self._since.pop(task, None)


def _addresses(networks: Iterable[IPv4Network]) -> frozenset[IPv4Address]:
    return frozenset(network.network_address for network in networks)
