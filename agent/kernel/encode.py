"""Requests to a WireGuard device in the kernel: from values to the bytes of generic netlink. Pure.

One message changes many peers, and the kernel works through it under locks that all namespaces share: RTNL and the
one of generic netlink (wg_set_device in drivers/net/wireguard/netlink.c). So a message is short in time rather than
long in bytes; many of them fit into one datagram, and between two the kernel lets others by.

Nothing here ever sets WGDEVICE_F_REPLACE_PEERS: it would end the session of every peer.

Facts: netlink(7), linux/wireguard.h, linux/genetlink.h. The order of the attributes is that of ``wg``.
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from ipaddress import IPv4Network
from itertools import islice
from typing import Final

from agent.kernel.peers import PeerChange
from hivewire.keys import PrivateKey
from hivewire.records import Endpoint

NLA_F_NESTED: Final = 0x8000

# linux/genetlink.h
_CTRL_CMD_GETFAMILY: Final = 3
_CTRL_ATTR_FAMILY_NAME: Final = 2
# linux/wireguard.h
_WG_GENL_VERSION: Final = 1
_WG_CMD_GET_DEVICE: Final = 0
_WG_CMD_SET_DEVICE: Final = 1
_WGDEVICE_A_IFINDEX: Final = 1
_WGDEVICE_A_PRIVATE_KEY: Final = 3
_WGDEVICE_A_LISTEN_PORT: Final = 6
_WGDEVICE_A_PEERS: Final = 8
_WGPEER_A_PUBLIC_KEY: Final = 1
_WGPEER_A_FLAGS: Final = 3
_WGPEER_A_ENDPOINT: Final = 4
_WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL: Final = 5
_WGPEER_A_ALLOWEDIPS: Final = 9
_WGPEER_F_REMOVE_ME: Final = 1
_WGPEER_F_REPLACE_ALLOWEDIPS: Final = 2
_WGPEER_F_UPDATE_ONLY: Final = 4
_WGALLOWEDIP_A_FAMILY: Final = 1
_WGALLOWEDIP_A_IPADDR: Final = 2
_WGALLOWEDIP_A_CIDR_MASK: Final = 3

# linux/socket.h; the module socket is not for pure code.
_AF_INET: Final = 2
_AF_INET6: Final = 10

_ATTRIBUTE: Final = struct.Struct("=HH")
_GENERIC: Final = struct.Struct("=BBH")

MESSAGE_WORK: Final = 4
"""Peers that one message may add. Each costs the kernel a multiplication on Curve25519, some 30 us on metal, for which
it holds RTNL: an eighth of a millisecond. Longer messages are no faster (tests/bench/control.py)."""
_NESTED_BYTES: Final = 0xFFFF
"""The length of an attribute has 16 bits: that of all peers in a message together."""
_ADDRESSES_PER_PEER: Final = 1000
"""Allowed IPs that stand with a peer; more of them follow in further parts, which name the peer again."""


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded."""
    size = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(size, kind) + value + bytes(-size % 4)


def find_family(name: str) -> bytes:
    """What asks the controller of generic netlink for the number of a family."""
    return _GENERIC.pack(_CTRL_CMD_GETFAMILY, 1, 0) + attribute(_CTRL_ATTR_FAMILY_NAME, name.encode() + bytes(1))


def get_device(index: int) -> bytes:
    """What asks for a device with all its peers, its private key included: a dump."""
    return _generic(_WG_CMD_GET_DEVICE) + _u32(_WGDEVICE_A_IFINDEX, index)


def set_device(index: int, *, private_key: PrivateKey | None = None, listen_port: int | None = None) -> bytes:
    """What sets the given of the device itself, in one message."""
    parts = [_head(index)]
    if private_key is not None:
        parts.append(attribute(_WGDEVICE_A_PRIVATE_KEY, private_key.reveal()))
    if listen_port is not None:
        parts.append(_u16(_WGDEVICE_A_LISTEN_PORT, listen_port))
    return b"".join(parts)


def set_peers(index: int, changes: Iterable[PeerChange], work: int = MESSAGE_WORK) -> Iterator[bytes]:
    """What carries the changes out in order, in as many messages as keeps each of them short for the kernel."""
    head = _head(index)
    parts: list[bytes] = []
    size, done = 0, 0
    for change in changes:
        costs = not change.update_only
        networks = change.allowed_ips
        is_long = networks is not None and len(networks) > _ADDRESSES_PER_PEER
        for part in _long_peer(change) if is_long else (_part(change),):
            more = len(part)
            if parts and ((costs and done >= work) or size + more > _NESTED_BYTES - _ATTRIBUTE.size):
                yield head + _ATTRIBUTE.pack(_ATTRIBUTE.size + size, _PEERS) + b"".join(parts)
                parts, size, done = [], 0, 0
            parts.append(part)
            size += more
        done += costs
    if parts:
        yield head + _ATTRIBUTE.pack(_ATTRIBUTE.size + size, _PEERS) + b"".join(parts)


def _long_peer(change: PeerChange) -> Iterator[bytes]:
    """A peer of very many addresses, as attributes of several peers with its key."""
    ordered = iter(sorted(change.allowed_ips or ()))
    first = frozenset(islice(ordered, _ADDRESSES_PER_PEER))
    # The interval stands in the last part, so that the keepalive that it sends finds everything else in place.
    yield _part(replace(change, allowed_ips=first, keepalive_s=None))
    while more := tuple(islice(ordered, _ADDRESSES_PER_PEER)):
        yield _nested(0, [_key(change), _flags(_WGPEER_F_UPDATE_ONLY), *_allowed_ips(more)])
    if change.keepalive_s is not None:
        yield _part(PeerChange(change.public_key, update_only=True, keepalive_s=change.keepalive_s))


def _part(change: PeerChange) -> bytes:
    flags = _WGPEER_F_REMOVE_ME if change.remove else 0
    if change.update_only:
        flags |= _WGPEER_F_UPDATE_ONLY
    parts = [_key(change)]
    networks = change.allowed_ips
    if networks is not None:
        flags |= _WGPEER_F_REPLACE_ALLOWEDIPS
    if change.endpoint is not None:
        parts.append(_endpoint(change.endpoint))
    if change.keepalive_s is not None:
        parts.append(_keepalive(change.keepalive_s))
    if flags:
        parts.append(_flags(flags))
    if networks:
        parts += _allowed_ips(sorted(networks) if len(networks) > 1 else networks)
    return _nested(0, parts)


def _key(change: PeerChange) -> bytes:
    return _KEY_HEAD + change.public_key.raw


@lru_cache(maxsize=16)
def _flags(flags: int) -> bytes:
    return _u32(_WGPEER_A_FLAGS, flags)


@lru_cache(maxsize=256)
def _keepalive(seconds: int) -> bytes:
    return _u16(_WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL, seconds)


def _endpoint(endpoint: Endpoint) -> bytes:
    # struct sockaddr_in and sockaddr_in6: the port is in network order, flow and scope are left at zero.
    where = endpoint.address
    port = endpoint.port.to_bytes(2, "big")
    if where.version == 4:
        return _ENDPOINT4_HEAD + port + where.packed + bytes(8)
    return _ENDPOINT6_HEAD + port + bytes(4) + where.packed + bytes(4)


def _allowed_ips(networks: Iterable[IPv4Network]) -> list[bytes]:
    each = [_ADDRESS_HEAD + n.network_address.packed + _MASKS[n.prefixlen] for n in networks]
    size = _ATTRIBUTE.size + sum(map(len, each))
    return [_ATTRIBUTE.pack(size, _WGPEER_A_ALLOWEDIPS | NLA_F_NESTED), *each]


def _nested(kind: int, parts: list[bytes]) -> bytes:
    value = b"".join(parts)
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind | NLA_F_NESTED) + value


def _generic(command: int) -> bytes:
    return _GENERIC.pack(command, _WG_GENL_VERSION, 0)


def _head(index: int) -> bytes:
    return _generic(_WG_CMD_SET_DEVICE) + _u32(_WGDEVICE_A_IFINDEX, index)


def _u32(kind: int, value: int) -> bytes:
    return attribute(kind, value.to_bytes(4, _ORDER))


def _u16(kind: int, value: int) -> bytes:
    return attribute(kind, value.to_bytes(2, _ORDER))


_ORDER: Final = "little" if struct.pack("=H", 1) == b"\x01\x00" else "big"
_PEERS: Final = _WGDEVICE_A_PEERS | NLA_F_NESTED
_KEY_HEAD: Final = _ATTRIBUTE.pack(_ATTRIBUTE.size + 32, _WGPEER_A_PUBLIC_KEY)
_ENDPOINT4_HEAD: Final = _ATTRIBUTE.pack(_ATTRIBUTE.size + 16, _WGPEER_A_ENDPOINT) + _AF_INET.to_bytes(2, _ORDER)
_ENDPOINT6_HEAD: Final = _ATTRIBUTE.pack(_ATTRIBUTE.size + 28, _WGPEER_A_ENDPOINT) + _AF_INET6.to_bytes(2, _ORDER)
# What stands before and after the address of an allowed IPv4 network; all of them are of one length.
_ADDRESS_HEAD: Final = (
    _ATTRIBUTE.pack(28, NLA_F_NESTED)
    + _u16(_WGALLOWEDIP_A_FAMILY, _AF_INET)
    + _ATTRIBUTE.pack(_ATTRIBUTE.size + 4, _WGALLOWEDIP_A_IPADDR)
)
_MASKS: Final = [attribute(_WGALLOWEDIP_A_CIDR_MASK, bytes([length])) for length in range(33)]
