"""What the guard of one overlay namespace should let through: the record joined with what the engine says. Pure."""

import enum
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from ipaddress import IPv4Address
from types import MappingProxyType

from agent.guard.render import Closed, Open, Rules
from hivewire.ids import ContainerId, ServiceId, TaskId
from hivewire.records import GuardRecord


class Stage(enum.Enum):
    """How far a container is with its place on a network."""

    COMING = "coming"
    """Made, not attached: its address is reserved for it."""
    ATTACHED = "attached"
    """It runs, or the engine still has its veth."""
    ENDED = "ended"
    """Its process ended and the engine took its veth away."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A container of this node with its address on one network."""

    container: ContainerId
    service: ServiceId
    """Empty where it is of no service."""
    address: IPv4Address
    mac: str
    """Empty where the engine does not say it yet."""
    stage: Stage
    task: TaskId | None = None
    """None where it is of no task."""
    sandbox: str = ""
    """Path of its network namespace; empty while nobody has asked the engine for it."""


@dataclass(frozen=True, slots=True)
class LocalNetwork:
    """One network as the engine of this node knows it."""

    holders: tuple[Holder, ...] = ()
    load_balancer: IPv4Address | None = None
    """The address from which the node's balancer sends to the tasks behind a VIP."""
    is_forming: bool = False
    """Whether there is a fresh container whose networks the engine does not name yet: ask again in a moment."""


def guard(
    record: GuardRecord,
    local: LocalNetwork,
    macs: frozenset[str] = frozenset(),
    ports: Mapping[str, frozenset[int]] = MappingProxyType({}),
    shut_out: Set[ContainerId] = frozenset(),
    spared: Set[ContainerId] = frozenset(),
) -> Rules:
    """``macs`` are the hardware addresses that the bridge still sees behind local ports, ``ports`` the indices of its
    ports that lead into the namespaces of these paths, ``shut_out`` those in quarantine, whatever their service's mode.
    ``spared`` ran in clear until now and may for a moment more (agent/grace.py); a strict network spares nobody.
    """
    enforced = frozenset(record.enforced)

    def is_closed(holder: Holder) -> bool:
        is_enforced = holder.service in enforced and holder.container not in spared
        return is_enforced or holder.container in shut_out

    owners = {address: tuple(_owners(here, macs)) for address, here in _by_address(local.holders).items()}
    if record.strict:
        exempt = frozenset(record.exempt) - enforced

        def is_open(holder: Holder) -> bool:
            return holder.service in exempt and not is_closed(holder)

        tasks = {a for a, here in owners.items() if here and all(map(is_open, here))}
        balancer = set() if local.load_balancer is None else {local.load_balancer}
        closed = {a for a, here in owners.items() if here and a not in tasks}
        known = [h for h in local.holders if h.stage is Stage.ATTACHED and not is_open(h)]
        return Open(tuple(sorted((tasks | balancer | set(record.exempt_vips)) - closed)), _ports(known, ports))
    shut = [h for here in owners.values() if any(map(is_closed, here)) for h in here]
    known = [h for h in local.holders if h.stage is Stage.ATTACHED and is_closed(h)]
    return Closed(
        tuple(sorted({h.address for h in shut})), tuple(sorted({_mac(h) for h in shut})), _ports(known, ports)
    )


def _ports(holders: Iterable[Holder], ports: Mapping[str, frozenset[int]]) -> tuple[int, ...]:
    return tuple(sorted({index for h in holders for index in ports.get(h.sandbox, ())}))


def _by_address(holders: Iterable[Holder]) -> dict[IPv4Address, list[Holder]]:
    found: dict[IPv4Address, list[Holder]] = {}
    for holder in holders:
        found.setdefault(holder.address, []).append(holder)
    return found


def _owners(holders: list[Holder], macs: frozenset[str]) -> Iterator[Holder]:
    """Whose an address is. Swarm gives it to a new task once the old one is finished, whose container lies about: so
    one that is attached has it, and only where none is, one that is coming or whose veth the bridge still sees.
    """
    attached = [h for h in holders if h.stage is Stage.ATTACHED]
    if attached:
        yield from attached
        return
    yield from (h for h in holders if h.stage is Stage.COMING or _mac(h) in macs)


def _mac(holder: Holder) -> str:
    """Swarm's overlay driver makes it from the address (libnetwork netutils.GenerateMACFromIP)."""
    return holder.mac or "02:42:" + ":".join(f"{octet:02x}" for octet in holder.address.packed)
