"""From what should be and what is to the operations between: nothing where they are equal. Pure.

The order keeps traffic going and closed at every step: peers can receive before anything is routed to them, routes
stand before rules send connections there; and what goes away is left in the opposite order.
"""

from collections.abc import Iterator, Mapping
from ipaddress import IPv4Network

from agent.desired import DesiredTask
from agent.handshakes import AT_ONCE, Turn
from agent.observed import ObservedPeer, ObservedTask
from agent.ops import (
    AddPeer,
    AddRoute,
    CreateInterface,
    ForgetFlows,
    Handshake,
    Op,
    PeerSpec,
    RemoveInterface,
    RemovePeer,
    RemoveRoute,
    RemoveRules,
    Route,
    SetMtu,
    SetRules,
    SetUp,
    UpdatePeer,
)
from agent.rules.closed import Closed
from hivewire.keys import PrivateKey, PublicKey
from hivewire.records import NodeRecord

# A session dies 180 s after its last handshake (WireGuard paper, section 6.4: REJECT_AFTER_TIME).
SESSION_S = 180.0


def plan(
    desired: DesiredTask,
    observed: ObservedTask,
    *,
    new_key: PrivateKey,
    node: NodeRecord,
    now: float,
    prune: bool,
    turn: Turn = AT_ONCE,
    held: frozenset[IPv4Network] = frozenset(),
) -> tuple[Op, ...]:
    """What to do, in order. ``new_key`` is used only where there is no interface yet.

    ``prune``: whether what the records do not name may be removed. False while the store may be incomplete.
    ``held``: destinations that are not routed yet (agent/moving.py).
    """
    return tuple(_steps(desired, observed, new_key, node, now, prune, turn, held))


def plan_removal(observed: ObservedTask, *, receiving: bool = False) -> tuple[Op, ...]:
    """Leave nothing of ours: the service is not in the mesh any more.

    ``receiving``: keep the interface with its peers, for those that still send to it.
    """
    ops: list[Op] = []
    if observed.rules:
        ops.append(RemoveRules())
    if receiving:
        ops += [RemoveRoute(route) for route in sorted(observed.routes, key=str)]
    elif observed.interface is not None:
        ops.append(RemoveInterface())
    return tuple(ops)


def plan_quarantine(closed: Closed, observed: ObservedTask) -> tuple[Op, ...]:
    """Shut the task out, whether or not the store is complete: a quarantine is a record that is there.

    The interface keeps its key, and its routes lead to nobody, so that a release needs no new claim.
    """
    ops: list[Op] = []
    if observed.rules != closed.digest:
        ops.append(SetRules(closed.text, closed.digest))
    if observed.interface is not None:
        ops += _forget(observed.interface.peers, {})
        ops += [RemovePeer(key) for key in sorted(observed.interface.peers)]
    return tuple(ops)


def _forget(there: Mapping[PublicKey, ObservedPeer], wanted: Mapping[PublicKey, PeerSpec]) -> Iterator[Op]:
    """Connections with addresses that no peer has any more.

    Before the peers go: what is broken off in between is planned again while they are there.
    """
    left = {a for peer in there.values() for a in peer.allowed_ips} - {
        a for p in wanted.values() for a in p.allowed_ips
    }
    if left:
        yield ForgetFlows(frozenset(network.network_address for network in left))


def _steps(
    desired: DesiredTask,
    observed: ObservedTask,
    new_key: PrivateKey,
    node: NodeRecord,
    now: float,
    prune: bool,
    turn: Turn,
    held: frozenset[IPv4Network],
) -> Iterator[Op]:
    interface = observed.interface
    if interface is None:
        yield CreateInterface(new_key, desired.mtu, node.first_port, node.last_port, desired.address)
    elif interface.mtu != desired.mtu:
        yield SetMtu(desired.mtu)
    if interface is None or not interface.is_up:
        yield SetUp()
    there = {} if interface is None else interface.peers
    # Most passes find all as it should be: then each peer and each route is compared once, and nothing is sorted.
    changes = {k: ops for k, spec in desired.peers.items() if (ops := tuple(_peer(spec, there.get(k), now, turn)))}
    for key in sorted(changes):
        yield from changes[key]
    # A link that goes down takes its routes with it.
    routes = observed.routes if interface is not None and interface.is_up else frozenset()
    missing = desired.routes - routes
    for route in sorted(missing, key=str):
        if route.destination not in held:
            yield AddRoute(route)
    former_routes = _former_routes(routes, desired.routes) if len(routes) + len(missing) > len(desired.routes) else []
    former_peers = there.keys() - desired.peers.keys()
    # Rules are replaced as a whole: while records may be missing, only by such that know all that is in place.
    knows_all = not former_routes and not former_peers
    if observed.rules != desired.rules_digest and (prune or knows_all or not observed.rules):
        yield SetRules(desired.rules, desired.rules_digest)
    if prune:
        for route in former_routes:
            yield RemoveRoute(route)
        if former_peers or changes:
            yield from _forget(there, desired.peers)
        for key in sorted(former_peers):
            yield RemovePeer(key)


def _former_routes(there: frozenset[Route], wanted: frozenset[Route]) -> list[Route]:
    """Those whose destination has no route any more. Where it has another one, that has replaced the former."""
    destinations = {route.destination for route in wanted}
    return sorted((r for r in there - wanted if r.destination not in destinations), key=str)


def _peer(spec: PeerSpec, there: ObservedPeer | None, now: float, turn: Turn) -> Iterator[Op]:
    if there is None:
        yield AddPeer(spec, initiate=spec.public_key not in turn.quiet)
        return
    # While handshakes succeed the endpoint is right, whatever the record says: WireGuard follows a peer that roams.
    in_session = there.last_handshake is not None and now - there.last_handshake < SESSION_S
    endpoint = spec.endpoint if not in_session and there.endpoint != spec.endpoint else None
    allowed_ips = spec.allowed_ips if there.allowed_ips != spec.allowed_ips else None
    keepalive_s = spec.keepalive_s if there.keepalive_s != spec.keepalive_s else None
    if (endpoint, allowed_ips, keepalive_s) != (None, None, None):
        yield UpdatePeer(spec.public_key, endpoint, allowed_ips, keepalive_s)
    if spec.public_key in turn.initiate:
        yield Handshake(spec.public_key, spec.keepalive_s)
