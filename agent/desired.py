"""What a task's namespace should hold, from its policy and the peers of the services that it is linked with. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network

from agent.ops import PeerSpec, Route
from agent.rules.render import Backends, RuleSet, Source, WayOut, render
from hivewire.ids import NetworkId, ServiceId, TaskId
from hivewire.keys import PublicKey
from hivewire.records import Address, Link, Mode, PeerRecord, PolicyRecord

# What WireGuard adds to a packet: 20 or 40 IP, 8 UDP, 32 WireGuard (Linux drivers/net/wireguard/messages.h).
OVERHEAD_IPV4 = 60
OVERHEAD_IPV6 = 80
LEAST_MTU = 576
# wireguard-go pads each packet to a multiple of this, up to the MTU of its interface and not to that of the route
# (calculatePaddingSize in its device/send.go); the kernel looks at the route.
_PADDING = 16


@dataclass(frozen=True, slots=True)
class TaskFacts:
    """What the agent knows by itself of a task of its node."""

    task: TaskId
    service: ServiceId
    addresses: Mapping[NetworkId, IPv4Address]
    """Its overlay addresses, ingress included where it publishes ports."""
    interfaces: Mapping[IPv4Address, str]
    """Which interface of the namespace holds which address."""
    underlay_mtu: int
    underlay: Address
    """The node's own address there; its family is what counts."""
    paths: Mapping[Address, int] = field(default_factory=dict)
    """Largest packet in bytes that gets to another node's underlay address, where that was found out."""
    way_out: WayOut | None = None
    """Its place on docker_gwbridge; None where it has none."""


@dataclass(frozen=True, slots=True)
class DesiredTask:
    """All of it, ready to be compared with what is there."""

    mtu: int
    address: IPv4Address | None
    """One of the task's own, for the interface."""
    peers: Mapping[PublicKey, PeerSpec]
    routes: frozenset[Route]
    rules: str
    rules_digest: str


def desired_task(
    facts: TaskFacts, policy: PolicyRecord, peers: Mapping[ServiceId, Iterable[PeerRecord]]
) -> DesiredTask:
    """Join a task, its links and the peers of those services."""
    own = {n.id: facts.addresses[n.id] for n in policy.networks if n.id in facts.addresses}
    known = {service: _newest(peers.get(service, ())) for service in policy.linked_services}
    owners = _owners(facts.task, own, policy, known)

    mtu = policy.mtu or _inside(facts.underlay_mtu, facts.underlay)
    specs: dict[PublicKey, PeerSpec] = {}
    routes: set[Route] = set()
    # Smaller than the interface's, and zero where it is not.
    smaller: dict[IPv4Address, int] = {}
    for record in {r.task: r for records in known.values() for r in records if r.task != facts.task}.values():
        allowed = {n: IPv4Network(a) for n, a in record.addresses.items() if n in own and owners.get(a) == record.task}
        if allowed:
            key = PublicKey.parse(record.public_key)
            specs[key] = PeerSpec(key, record.endpoint, frozenset(allowed.values()), policy.keepalive_s)
            pair_mtu = 0 if policy.mtu else _pair_mtu(facts, record, mtu)
            routes |= {Route(address, own[network], pair_mtu) for network, address in allowed.items()}
            smaller |= {network.network_address: pair_mtu for network in allowed.values() if pair_mtu}

    backends = [
        b for link in (*policy.out_links, *policy.self_links) if (b := _backends(link, facts, own, known, owners))
    ]
    # Where nobody serves, ``observe`` leaves the VIP to Swarm, while ``enforce`` closes it.
    kept = [b for b in backends if b.addresses or policy.mode is Mode.ENFORCE]
    # A connection to a VIP goes by the MTU of the VIP's route, whichever backend it is given.
    routes |= {
        Route(IPv4Network(b.vip), b.source, min((smaller[a] for a in b.addresses if a in smaller), default=0))
        for b in kept
    }

    text, digest = render(
        RuleSet(
            enforce=policy.mode is Mode.ENFORCE,
            overlay_interfaces=tuple(sorted({facts.interfaces[a] for a in own.values() if a in facts.interfaces})),
            backends=tuple(sorted(backends, key=lambda b: b.vip)),
            sources=_sources(policy, known, owners),
            way_out=facts.way_out,
        )
    )
    return DesiredTask(
        mtu=mtu,
        address=min(own.values(), default=None),
        peers=specs,
        routes=frozenset(routes),
        rules=text,
        rules_digest=digest,
    )


def _inside(underlay_mtu: int, address: Address) -> int:
    """What fits through WireGuard between nodes that talk over addresses of this family."""
    overhead = OVERHEAD_IPV6 if address.version == 6 else OVERHEAD_IPV4
    return max(LEAST_MTU, underlay_mtu - overhead)


def _pair_mtu(facts: TaskFacts, record: PeerRecord, mtu: int) -> int:
    """What fits on the way to this peer, if that is less than the interface takes; else 0."""
    address = record.endpoint.address
    theirs = record.underlay_mtu or facts.underlay_mtu
    found = _inside(min(facts.underlay_mtu, theirs, facts.paths.get(address, theirs)), address)
    return max(LEAST_MTU, found - found % _PADDING) if found < mtu else 0


def _newest(records: Iterable[PeerRecord]) -> tuple[PeerRecord, ...]:
    """Newest key first, so that the first claimant of an address is the right one."""
    return tuple(sorted(records, key=lambda r: (-r.epoch, r.task)))


def _owners(
    task: TaskId,
    own: Mapping[NetworkId, IPv4Address],
    policy: PolicyRecord,
    known: Mapping[ServiceId, tuple[PeerRecord, ...]],
) -> dict[IPv4Address, TaskId]:
    """Which task each linked address belongs to: an address is in one peer's allowed IPs only.

    Swarm gives an address to a new task once the old one is finished, so for a moment two records may hold it. The
    newer key wins; and whatever a record says, our own addresses stay ours.
    """
    claimants: list[tuple[int, TaskId, IPv4Address]] = []
    for link in (*policy.out_links, *policy.in_links, *policy.self_links):
        for record in known[link.service]:
            address = record.addresses.get(link.network)
            if address is not None and link.network in own and record.task != task:
                claimants.append((-record.epoch, record.task, address))
    owners = dict.fromkeys(own.values(), task)
    for _, claimant, address in sorted(claimants):
        owners.setdefault(address, claimant)
    return owners


def _backends(
    link: Link,
    facts: TaskFacts,
    own: Mapping[NetworkId, IPv4Address],
    known: Mapping[ServiceId, tuple[PeerRecord, ...]],
    owners: Mapping[IPv4Address, TaskId],
) -> Backends | None:
    if link.vip is None or link.network not in own:
        return None
    serving = sorted(
        r.addresses[link.network]
        for r in known[link.service]
        if r.serving and link.network in r.addresses and owners.get(r.addresses[link.network]) == r.task
    )
    # Each task begins at another place of the circle, else all first connections would meet at one backend.
    start = sum(facts.task.encode()) % len(serving) if serving else 0
    return Backends(link.vip, own[link.network], tuple(serving[start:] + serving[:start]))


def _sources(
    policy: PolicyRecord, known: Mapping[ServiceId, tuple[PeerRecord, ...]], owners: Mapping[IPv4Address, TaskId]
) -> tuple[Source, ...]:
    def addresses(link: Link) -> tuple[IPv4Address, ...]:
        found = (
            r.addresses.get(link.network)
            for r in known[link.service]
            if owners.get(r.addresses.get(link.network, IPv4Address(0))) == r.task
        )
        return tuple(sorted(a for a in found if a is not None))

    inbound = [Source(link.name, addresses(link), link.ports) for link in (*policy.in_links, *policy.self_links)]
    # From those we link to come answers to our own connections; their pings are welcome as well.
    outbound = [Source(link.name, addresses(link), None, link.ports) for link in policy.out_links]
    return tuple(
        sorted((s for s in (*inbound, *outbound) if s.addresses), key=lambda s: (s.name, s.addresses, str(s.ports)))
    )
