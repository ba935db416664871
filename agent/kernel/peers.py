"""What a WireGuard device is told about peers, and what it tells: values that both backends encode and decode. Pure.

A device works through the peers of one request in order, so one request may name a peer twice. That is how a new
peer's handshake is started at once: setting an interval for keepalives where there was none sends one
(set_peer in drivers/net/wireguard/netlink.c, handlePostConfig in wireguard-go's device/uapi.go).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network
from itertools import groupby
from typing import Final, assert_never, cast, get_args

from agent.observed import ObservedPeer
from agent.ops import AddPeer, AddRoute, Handshake, Op, RemovePeer, RemoveRoute, UpdatePeer
from hivewire.keys import PublicKey
from hivewire.records import Endpoint

PeerOp = AddPeer | Handshake | UpdatePeer | RemovePeer
RouteOp = AddRoute | RemoveRoute

_PEERS_PER_REQUEST: Final = 400
_ADDRESSES_PER_REQUEST: Final = 1000


@dataclass(frozen=True, slots=True)
class PeerChange:
    """One peer in a request to a device. None leaves a value as it is; ``allowed_ips`` replace what is there."""

    public_key: PublicKey
    remove: bool = False
    update_only: bool = False
    """Do nothing where the peer is absent, rather than make it."""
    endpoint: Endpoint | None = None
    allowed_ips: frozenset[IPv4Network] | None = None
    keepalive_s: int | None = None


@dataclass(frozen=True, slots=True)
class Device:
    """A WireGuard device as it describes itself. The private key was dropped when it was read."""

    public_key: PublicKey | None
    """None: it has no key yet."""
    listen_port: int
    peers: Mapping[PublicKey, ObservedPeer] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PeerBatch:
    ops: tuple[PeerOp, ...]


@dataclass(frozen=True, slots=True)
class RouteBatch:
    ops: tuple[RouteOp, ...]


def batches(ops: Iterable[Op]) -> Iterator[PeerBatch | RouteBatch | Op]:
    """The operations in their order, neighbours that change peers put together, and so those that change routes."""
    for kind, group in groupby(ops, _batch_of):
        if kind is PeerBatch:
            yield PeerBatch(cast("tuple[PeerOp, ...]", tuple(group)))
        elif kind is RouteBatch:
            yield RouteBatch(cast("tuple[RouteOp, ...]", tuple(group)))
        else:
            yield from group


def _batch_of(op: Op) -> type | None:
    return _BATCHES.get(type(op))


_BATCHES: Final[Mapping[type, type]] = {
    **dict.fromkeys(get_args(PeerOp), PeerBatch),
    **dict.fromkeys(get_args(RouteOp), RouteBatch),
}


def changes(ops: Iterable[PeerOp]) -> Iterator[PeerChange]:
    """The operations as a device is told them."""
    for op in ops:
        match op:
            case AddPeer(spec, initiate):
                # A peer that is to be kept alive sends one as soon as it is there, so it is never quiet.
                at_first = spec.keepalive_s or int(initiate)
                yield PeerChange(spec.public_key, False, False, spec.endpoint, spec.allowed_ips, at_first)
                if at_first != spec.keepalive_s:
                    yield PeerChange(spec.public_key, update_only=True, keepalive_s=0)
            case Handshake(key, keepalive_s):
                off = PeerChange(key, update_only=True, keepalive_s=0)
                yield from (off, PeerChange(key, update_only=True, keepalive_s=keepalive_s or 1))
                if keepalive_s == 0:
                    yield off
            case UpdatePeer(key, endpoint, allowed_ips, keepalive_s):
                yield PeerChange(key, False, True, endpoint, allowed_ips, keepalive_s)
            case RemovePeer(key):
                yield PeerChange(key, remove=True)
            case _:
                assert_never(op)


def requests(told: Iterable[PeerChange]) -> Iterator[list[PeerChange]]:
    """The changes in lists for one request each to a userspace device, which is then back for its packets soon."""
    batch: list[PeerChange] = []
    addresses = 0
    for change in told:
        more = len(change.allowed_ips or ())
        if batch and (len(batch) >= _PEERS_PER_REQUEST or addresses + more > _ADDRESSES_PER_REQUEST):
            yield batch
            batch, addresses = [], 0
        batch.append(change)
        addresses += more
    if batch:
        yield batch
