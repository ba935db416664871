"""What a WireGuard device in the kernel says about itself: from the messages of a dump to values. Pure.

The private key stands in every dump. It is read past: where the device names its public key, as the kernel does, the
other one is not even looked at, and no value, error or log made here holds any part of it.

Facts: netlink(7), linux/wireguard.h, wg_get_device_dump in drivers/net/wireguard/netlink.c.
"""

import contextlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from typing import Final

from agent.kernel.peers import Device
from agent.observed import ObservedPeer
from hivewire.errors import KernelBusy
from hivewire.keys import KEY_BYTES, PrivateKey, PublicKey
from hivewire.records import Endpoint

# linux/genetlink.h
_CTRL_ATTR_FAMILY_ID: Final = 1
# linux/wireguard.h
_WGDEVICE_A_PRIVATE_KEY: Final = 3
_WGDEVICE_A_PUBLIC_KEY: Final = 4
_WGDEVICE_A_LISTEN_PORT: Final = 6
_WGDEVICE_A_PEERS: Final = 8
_WGPEER_A_PUBLIC_KEY: Final = 1
_WGPEER_A_ENDPOINT: Final = 4
_WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL: Final = 5
_WGPEER_A_LAST_HANDSHAKE_TIME: Final = 6
_WGPEER_A_RX_BYTES: Final = 7
_WGPEER_A_TX_BYTES: Final = 8
_WGPEER_A_ALLOWEDIPS: Final = 9
_WGALLOWEDIP_A_FAMILY: Final = 1
_WGALLOWEDIP_A_IPADDR: Final = 2
_WGALLOWEDIP_A_CIDR_MASK: Final = 3

# linux/socket.h; the module socket is not for pure code.
_AF_INET: Final = 2
_AF_INET6: Final = 10

_ATTRIBUTE: Final = struct.Struct("=HH")
_KIND: Final = 0x3FFF
"""Without the flags NLA_F_NESTED and NLA_F_NET_BYTEORDER."""
_BODY_AT: Final = 20
"""Netlink header (16 bytes) and struct genlmsghdr (4 bytes)."""
_U16: Final = struct.Struct("=H")
_U64: Final = struct.Struct("=Q")
_TIME: Final = struct.Struct("=qq")
"""struct __kernel_timespec: seconds, nanoseconds."""
_SOCKADDR_IN: Final = struct.Struct("!2xH4s")
_SOCKADDR_IN6: Final = struct.Struct("!2xH4x16s")
_REMEMBERED: Final = 1 << 14


def attributes(data: bytes, offset: int) -> Iterator[tuple[int, bytes]]:
    """The attributes from an offset on, nested ones as they are."""
    end = len(data)
    while offset + 4 <= end:
        size, kind = _ATTRIBUTE.unpack_from(data, offset)
        if size < 4:
            return
        yield kind & _KIND, data[offset + 4 : offset + size]
        offset += (size + 3) & ~3


def family_id(message: bytes) -> int:
    """The number of the family in an answer of generic netlink's controller. Raises KernelBusy."""
    found = dict(attributes(message, _BODY_AT)).get(_CTRL_ATTR_FAMILY_ID, b"")
    if len(found) != _U16.size:
        raise KernelBusy("the kernel does not say which number a family of generic netlink has")
    return int(_U16.unpack(found)[0])


def parse_device(messages: Iterable[bytes]) -> Device:
    """Read a dump. A device's peers, and one peer's addresses, may be spread over several messages.

    Raises KernelBusy where it is no such dump.
    """
    with contextlib.suppress(struct.error, ValueError):
        return _device(messages)
    # Not inside of a handler, so that no context of this error shows the message: the private key stands in it.
    raise KernelBusy("the kernel described a WireGuard device in a way that cannot be read")


def _device(messages: Iterable[bytes]) -> Device:
    public_key: PublicKey | None = None
    port = 0
    peers: dict[PublicKey, ObservedPeer] = {}
    for message in messages:
        private = b""
        for kind, value in attributes(message, _BODY_AT):
            if kind == _WGDEVICE_A_PEERS:
                for _, part in attributes(value, 0):
                    _add(peers, part)
            elif kind == _WGDEVICE_A_PUBLIC_KEY:
                public_key = _public_key(value)
            elif kind == _WGDEVICE_A_LISTEN_PORT:
                (port,) = _U16.unpack(value)
            elif kind == _WGDEVICE_A_PRIVATE_KEY:
                private = value
        if public_key is None and len(private) == KEY_BYTES and any(private):
            public_key = PrivateKey(private).public()
    return Device(public_key, port, peers)


def _add(peers: dict[PublicKey, ObservedPeer], part: bytes) -> None:
    peer = _peer(part) if len(part) <= _SHORT else _long_peer(part)
    before = peers.setdefault(peer.public_key, peer)
    if before is not peer:
        # What has no room in a message goes on in the next one, which names the peer and nothing else of it.
        peers[peer.public_key] = replace(before, allowed_ips=before.allowed_ips | peer.allowed_ips)


def _long_peer(part: bytes) -> ObservedPeer:
    found = dict(attributes(part, 0))
    seconds, nanoseconds = _TIME.unpack(found.get(_WGPEER_A_LAST_HANDSHAKE_TIME, _NEVER))
    return ObservedPeer(
        _public_key(found.get(_WGPEER_A_PUBLIC_KEY, b"")),
        _endpoint(found.get(_WGPEER_A_ENDPOINT, b"")),
        _allowed_ips(found.get(_WGPEER_A_ALLOWEDIPS, b"")),
        _U16.unpack(found.get(_WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL, bytes(2)))[0],
        seconds + nanoseconds / 1e9 if seconds or nanoseconds else None,
        _U64.unpack(found.get(_WGPEER_A_RX_BYTES, bytes(8)))[0],
        _U64.unpack(found.get(_WGPEER_A_TX_BYTES, bytes(8)))[0],
    )


# A pass in which nothing has changed reads the same bytes again, and values never change: they are made once. An idle
# peer is the same as a whole, one with traffic in all but its counters. What is long is not remembered, so that the
# number of what is bounds its bytes, too.


@lru_cache(maxsize=_REMEMBERED)
def _public_key(raw: bytes) -> PublicKey:
    if len(raw) != KEY_BYTES:
        raise ValueError("a key of another length")
    return PublicKey(raw)


@lru_cache(maxsize=_REMEMBERED)
def _endpoint(value: bytes) -> Endpoint | None:
    if not value:
        return None
    (family,) = _U16.unpack_from(value)
    if family == _AF_INET:
        port, address = _SOCKADDR_IN.unpack_from(value)
        return Endpoint(address=IPv4Address(address), port=port)
    if family == _AF_INET6:
        port, address = _SOCKADDR_IN6.unpack_from(value)
        return Endpoint(address=IPv6Address(address), port=port)
    return None


def _allowed_ips(value: bytes) -> frozenset[IPv4Network]:
    """The IPv4 networks; those of another family are nobody's route here."""
    return _few_networks(value) if len(value) <= _FEW_BYTES else _networks(value)


def _networks(value: bytes) -> frozenset[IPv4Network]:
    networks = []
    for _, part in attributes(value, 0):
        found = dict(attributes(part, 0))
        (family,) = _U16.unpack(found.get(_WGALLOWEDIP_A_FAMILY, bytes(2)))
        if family != _AF_INET:
            continue
        (length,) = found.get(_WGALLOWEDIP_A_CIDR_MASK, b"")
        networks.append(IPv4Network((found.get(_WGALLOWEDIP_A_IPADDR, b""), length)))
    return frozenset(networks)


_peer: Final = lru_cache(maxsize=_REMEMBERED)(_long_peer)
_SHORT: Final = 400
_few_networks: Final = lru_cache(maxsize=_REMEMBERED)(_networks)
_FEW_BYTES: Final = 4 * 28
_NEVER: Final = bytes(_TIME.size)
