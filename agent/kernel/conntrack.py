"""Connection tracking of a namespace, over ctnetlink: find the connections of some addresses and forget them.

A connection keeps the backend that was chosen for it, and rules accept what belongs to a known one. So where a peer
goes, its connections are forgotten.

Facts: linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h, net/netfilter/nf_conntrack_netlink.c.
"""

import errno
import socket
import struct
from collections.abc import Iterator, Set
from ipaddress import IPv4Address
from typing import Final

from agent.kernel.decode import attributes
from agent.kernel.encode import NLA_F_NESTED, attribute
from agent.kernel.rtnetlink import Netlink, Request

_NFNL_SUBSYS_CTNETLINK: Final = 1
_IPCTNL_MSG_CT_GET: Final = 1
_IPCTNL_MSG_CT_DELETE: Final = 2
_CTA_TUPLE_ORIG: Final = 1
_CTA_TUPLE_REPLY: Final = 2
_CTA_STATUS: Final = 3
_CTA_PROTOINFO: Final = 4
_CTA_ID: Final = 12
_CTA_ZONE: Final = 18
_CTA_TUPLE_IP: Final = 1
_CTA_TUPLE_PROTO: Final = 2
_CTA_PROTO_NUM: Final = 1
_CTA_PROTOINFO_TCP: Final = 1
_CTA_PROTOINFO_TCP_STATE: Final = 1
_IPS_SEEN_REPLY: Final = 2
# TIME_WAIT and CLOSE (linux/netfilter/nf_conntrack_tcp.h).
_TCP_OVER: Final = (bytes([7]), bytes([8]))
_CTA_IP_V4_SRC: Final = 1
_CTA_IP_V4_DST: Final = 2
_BODY_AT: Final = 20
"""Netlink header (16 bytes) and struct nfgenmsg (4 bytes)."""
# struct nfgenmsg: family, version, resource id.
_OF_IPV4: Final = struct.pack("=BBH", socket.AF_INET, 0, 0)
# What nfnetlink answers for a part of it that the kernel does not have.
_LACKING: Final = (errno.EINVAL, errno.EOPNOTSUPP)


def forget(netlink: Netlink, addresses: Set[IPv4Address]) -> int:
    """Delete the connections from and to these addresses, those whose destination was translated included.

    Returns how many there were; a kernel that tracks connections without telling of them has none. Raises OSError.
    """
    wanted = frozenset(address.packed for address in addresses)
    try:
        messages = netlink.dump(Request(_NFNL_SUBSYS_CTNETLINK << 8 | _IPCTNL_MSG_CT_GET, _OF_IPV4))
    except OSError as error:
        if error.errno in _LACKING:
            return 0
        raise
    requests = [
        Request(_NFNL_SUBSYS_CTNETLINK << 8 | _IPCTNL_MSG_CT_DELETE, _OF_IPV4 + identity)
        for message in messages
        for identity in _identity(message, wanted)
    ]
    outcomes = netlink.ask_all(requests)
    for outcome in outcomes:
        if outcome is not None and outcome.errno != errno.ENOENT:  # it ended meanwhile
            raise outcome
    return len(outcomes)


def ends(netlink: Netlink) -> frozenset[IPv4Address]:
    """Both ends of every connection that is under way, as its packets have them: a translated destination is left out.

    One is under way once it was answered; over UDP from its first packet on, since some never are. A kernel that tracks
    connections without telling of them has none. Raises OSError.
    """
    try:
        messages = netlink.dump(Request(_NFNL_SUBSYS_CTNETLINK << 8 | _IPCTNL_MSG_CT_GET, _OF_IPV4))
    except OSError as error:
        if error.errno in _LACKING:
            return frozenset()
        raise
    found = set[bytes]()
    for message in messages:
        parts = dict(attributes(message, _BODY_AT))
        if _is_under_way(parts):
            found.update(_addresses(parts.get(_CTA_TUPLE_REPLY, b"")))
    return frozenset(IPv4Address(address) for address in found)


def _is_under_way(parts: dict[int, bytes]) -> bool:
    protocol = dict(attributes(dict(attributes(parts.get(_CTA_TUPLE_ORIG, b""), 0)).get(_CTA_TUPLE_PROTO, b""), 0))
    if protocol.get(_CTA_PROTO_NUM) != bytes([socket.IPPROTO_TCP]):
        return True
    tcp = dict(attributes(dict(attributes(parts.get(_CTA_PROTOINFO, b""), 0)).get(_CTA_PROTOINFO_TCP, b""), 0))
    is_answered = int.from_bytes(parts.get(_CTA_STATUS, b"")) & _IPS_SEEN_REPLY != 0
    return is_answered and tcp.get(_CTA_PROTOINFO_TCP_STATE) not in _TCP_OVER


def _identity(message: bytes, wanted: Set[bytes]) -> Iterator[bytes]:
    """What names a connection to the kernel, if one of its four addresses is wanted."""
    found = dict(attributes(message, _BODY_AT))
    tuples = (found.get(_CTA_TUPLE_ORIG, b""), found.get(_CTA_TUPLE_REPLY, b""))
    if any(not wanted.isdisjoint(_addresses(part)) for part in tuples):
        parts = [attribute(_CTA_TUPLE_ORIG | NLA_F_NESTED, found[_CTA_TUPLE_ORIG])]
        # The id keeps a connection that took the place of this one meanwhile.
        parts += [attribute(kind, found[kind]) for kind in (_CTA_ID, _CTA_ZONE) if kind in found]
        yield b"".join(parts)


def _addresses(part: bytes) -> Iterator[bytes]:
    ip = dict(attributes(dict(attributes(part, 0)).get(_CTA_TUPLE_IP, b""), 0))
    return (ip[kind] for kind in (_CTA_IP_V4_SRC, _CTA_IP_V4_DST) if kind in ip)
