"""Netlink sockets, and what both backends ask of them: links, addresses and routes.

The sockets are our own, because a socket belongs to the namespace that its thread was in when it was made. So are the
messages: a task has a route per peer, which is read in every pass, and a general codec took most of a pass's time.
Facts: netlink(7), rtnetlink(7), linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h.
"""

import errno
import itertools
import os
import socket
import struct
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address
from typing import Final

from pyroute2.netlink import nlmsg

from agent.kernel.decode import attributes as attributes
from agent.kernel.encode import NLA_F_NESTED
from agent.kernel.encode import attribute as attribute
from agent.ops import AddRoute, RemoveRoute, Route
from hivewire.errors import HivewireError, KernelBusy, NoPermission

# linux/netlink.h
NETLINK_ROUTE: Final = 0
NETLINK_NETFILTER: Final = 12
NETLINK_GENERIC: Final = 16
_SOL_NETLINK: Final = 270
_NETLINK_CAP_ACK: Final = 10
_NETLINK_EXT_ACK: Final = 11
_NETLINK_GET_STRICT_CHK: Final = 12
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
NLM_F_REQUEST: Final = 1
NLM_F_ACK: Final = 4
NLM_F_DUMP: Final = 0x300
NLM_F_REPLACE: Final = 0x100
NLM_F_EXCL: Final = 0x200
NLM_F_CREATE: Final = 0x400
_NLM_F_DUMP_INTR: Final = 0x10
_NLM_F_ACK_TLVS: Final = 0x200
_NLMSGERR_ATTR_MSG: Final = 1

# linux/netfilter/nfnetlink.h
_BATCH_BEGIN: Final = 16
_BATCH_END: Final = 17

# linux/rtnetlink.h
_RTM_NEWLINK: Final = 16
_RTM_DELLINK: Final = 17
_RTM_GETLINK: Final = 18
_RTM_SETLINK: Final = 19
_RTM_NEWADDR: Final = 20
_RTM_GETADDR: Final = 22
_RTM_NEWROUTE: Final = 24
_RTM_DELROUTE: Final = 25
_RTM_GETROUTE: Final = 26
_RT_TABLE_MAIN: Final = 254
_RTPROT_STATIC: Final = 4
_RT_SCOPE_LINK: Final = 253
_RT_SCOPE_NOWHERE: Final = 255
_RTN_UNICAST: Final = 1
_RTEXT_FILTER_SKIP_STATS: Final = 8

_IFF_UP: Final = 1
_IFF_LOOPBACK: Final = 8

# linux/if_link.h, linux/if_addr.h and linux/ip.h
_IFLA_IFNAME: Final = 3
_IFLA_MTU: Final = 4
_IFLA_LINKINFO: Final = 18
_IFLA_INFO_KIND: Final = 1
_IFLA_INFO_DATA: Final = 2
_IFLA_IFALIAS: Final = 20
_IFLA_NET_NS_FD: Final = 28
_IFLA_EXT_MASK: Final = 29
_IFLA_TUN_VNET_HDR: Final = 5
_IFLA_AF_SPEC: Final = 26
_IFA_ADDRESS: Final = 1
_IFA_LOCAL: Final = 2
_RTA_DST: Final = 1
_RTA_OIF: Final = 4
_RTA_PREFSRC: Final = 7
_RTA_METRICS: Final = 8
_RTAX_MTU: Final = 2
_RTA_TABLE: Final = 15
_IFLA_INET_CONF: Final = 1
_IPV4_DEVCONF_RP_FILTER: Final = 8
_LOOSE: Final = 2

_HEADER: Final = struct.Struct("=IHHII")
_LINK: Final = struct.Struct("=BxHiII")
"""struct ifinfomsg: family, type, index, flags, which of the flags change."""
_ADDRESS: Final = struct.Struct("=BBBBi")
"""struct ifaddrmsg: family, length of the prefix, flags, scope, index."""
_ROUTE: Final = struct.Struct("=BBBBBBBBI")
"""struct rtmsg: family, lengths of destination and source, TOS, table, protocol, scope, type, flags."""
_LINK_AT: Final = _HEADER.size + _LINK.size
_ADDRESS_AT: Final = _HEADER.size + _ADDRESS.size
# Seconds that the kernel may take for one answer; it waits for the RTNL lock of all namespaces.
_PATIENCE_S: Final = 10
# Refusals of one datagram must fit into the receive buffer, and the datagram itself into the one for sending (both
# 212,992 bytes by default; a refusal takes under 1 KB). Shorter ones let the kernel begin earlier.
_BATCH: Final = 100
_DATAGRAM_BYTES: Final = 1 << 14
_TRIES: Final = 3


class Calls:
    """Counts the requests to the kernel and to userspace devices; for all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0

    def add(self, count: int = 1) -> None:
        with self._lock:
            self._count += count

    @property
    def count(self) -> int:
        return self._count


@dataclass(frozen=True, slots=True)
class Request:
    """A netlink message without its header."""

    kind: int
    body: bytes
    flags: int = 0


@dataclass(frozen=True, slots=True)
class Link:
    """A network interface. ``kind`` is empty for hardware."""

    index: int
    name: str
    kind: str
    alias: str
    mtu: int
    is_up: bool
    is_loopback: bool = False


@dataclass(frozen=True, slots=True)
class Address:
    address: IPv4Address
    index: int
    """Of its interface."""


class Netlink:
    """A socket of one netlink family, in the namespace of the thread that makes it. One thread at a time."""

    def __init__(self, family: int, calls: Calls) -> None:
        self._calls = calls
        self._numbers = itertools.count(1)
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, family)
        patience = struct.pack("@ll", _PATIENCE_S, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)
        for option in (_NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK):
            try:
                self._socket.setsockopt(_SOL_NETLINK, option, 1)
            except OSError:
                # Kernels before 4.20 lack the last one; what it filters is filtered again here.
                continue

    def close(self) -> None:
        self._socket.close()

    def dump(self, request: Request) -> list[bytes]:
        """All messages of a dump, headers included. Raises OSError, KernelBusy if it keeps changing meanwhile."""
        for _ in range(_TRIES):
            (number,) = self._send([Request(request.kind, request.body, NLM_F_DUMP)])
            messages, whole = self._collect(number)
            if whole:
                return messages
        raise KernelBusy("the kernel's tables change faster than they can be read")

    def ask(self, request: Request) -> list[bytes]:
        """Send one request and return what comes before its acknowledgement. Raises OSError."""
        (number,) = self._send([Request(request.kind, request.body, request.flags | NLM_F_ACK)])
        messages, _ = self._collect(number)
        return messages

    def ask_all(self, requests: Iterable[Request]) -> list[OSError | None]:
        """Send many requests, up to a hundred in a datagram; the answer has the outcome of each. Raises OSError.

        The kernel carries them out in order, those after a refused one, too. They are taken from the iterable as they
        are sent, and where there are many, while it works on those before.
        """
        batches = _datagrams(requests)
        first, second = next(batches, None), next(batches, None)
        if first is None:
            return []
        if second is None:
            return self._carry_out(first)
        outcomes: list[OSError | None] = []
        # Sending is the kernel's work: it returns when all of the datagram is done. One more always waits for it, so
        # that it need not wait for this thread.
        under_way = deque[Future[list[OSError | None]]]()
        with ThreadPoolExecutor(1, "netlink") as pool:
            try:
                for batch in itertools.chain((first, second), batches):
                    under_way.append(pool.submit(self._carry_out, batch))
                    if len(under_way) > 2:
                        outcomes += under_way.popleft().result()
                while under_way:
                    outcomes += under_way.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)
        return outcomes

    def transact(self, subsystem: int, requests: Sequence[Request]) -> None:
        """Have a subsystem of nfnetlink carry out the requests together, or none of them. Raises OSError."""
        begin, end = (Request(kind, struct.pack("!BBH", 0, 0, subsystem)) for kind in (_BATCH_BEGIN, _BATCH_END))
        # Not every kernel acknowledges the end itself. What fails as a whole is said of the beginning.
        last = Request(requests[-1].kind, requests[-1].body, requests[-1].flags | NLM_F_ACK)
        numbers = self._send([begin, *requests[:-1], last, end])
        told: dict[int, OSError | None] = {}
        while numbers[-2] not in told and numbers[0] not in told:
            for kind, flags, sequence, message in _split(self._socket.recv(65536)):
                if kind == _NLMSG_ERROR:
                    told[sequence] = _error(kind, message, flags)
        if errors := [error for error in told.values() if error is not None]:
            raise errors[0]

    def _carry_out(self, batch: list[Request]) -> list[OSError | None]:
        # The kernel always says what it refuses, and what it did only where that is asked for: at the end.
        batch[-1] = Request(batch[-1].kind, batch[-1].body, batch[-1].flags | NLM_F_ACK)
        numbers = self._send(batch)
        told: dict[int, OSError | None] = {}
        while numbers[-1] not in told:
            for kind, flags, sequence, message in _split(self._socket.recv(65536)):
                if kind == _NLMSG_ERROR:
                    told[sequence] = _error(kind, message, flags)
        return [told.get(number) for number in numbers]

    def _send(self, requests: Sequence[Request]) -> list[int]:
        numbers, parts = [], []
        for request in requests:
            number = next(self._numbers)
            size = _HEADER.size + len(request.body)
            parts.append(_HEADER.pack(size, request.kind, request.flags | NLM_F_REQUEST, number, 0))
            parts.append(request.body + bytes(-size % 4))
            numbers.append(number)
        self._calls.add(len(requests))
        self._socket.send(b"".join(parts))
        return numbers

    def _collect(self, number: int) -> tuple[list[bytes], bool]:
        messages: list[bytes] = []
        whole = True
        while True:
            # A dump never has longer pieces than 32 KiB (netlink_dump in net/netlink/af_netlink.c).
            for kind, flags, sequence, message in _split(self._socket.recv(65536)):
                if sequence != number:
                    continue
                whole = whole and not flags & _NLM_F_DUMP_INTR
                if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                    if (error := _error(kind, message, flags)) is not None:
                        raise error
                    return messages, whole
                messages.append(message)


def translate(error: OSError, doing: str) -> HivewireError:
    """Our error for what the kernel answered."""
    if error.errno in (errno.EPERM, errno.EACCES):
        return NoPermission(f"{doing}: not permitted; give the agent CAP_NET_ADMIN")
    if error.errno == errno.EAGAIN:
        return KernelBusy(f"{doing}: the kernel did not answer within {_PATIENCE_S} s")
    return KernelBusy(f"{doing}: {error.strerror or error}")


def _split(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    offset = 0
    while offset + _HEADER.size <= len(data):
        size, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
        if size < _HEADER.size:
            return
        yield kind, flags, sequence, data[offset : offset + size]
        offset += (size + 3) & ~3


def _datagrams(requests: Iterable[Request]) -> Iterator[list[Request]]:
    batch: list[Request] = []
    size = 0
    for request in requests:
        if batch and (len(batch) >= _BATCH or size + len(request.body) > _DATAGRAM_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(request)
        size += len(request.body)
    if batch:
        yield batch


def _error(kind: int, message: bytes, flags: int) -> OSError | None:
    """What an acknowledgement or the end of a dump says; None: it went well."""
    if len(message) < _HEADER.size + 4:
        return None
    (code,) = struct.unpack_from("=i", message, _HEADER.size)
    if code == 0:
        return None
    text = os.strerror(-code)
    if flags & _NLM_F_ACK_TLVS:
        # Of the request only its header comes back, as NETLINK_CAP_ACK asks; a dump's end has none of it.
        after = _HEADER.size + 4 + (_HEADER.size if kind == _NLMSG_ERROR else 0)
        for attribute_kind, value in attributes(message, after):
            if attribute_kind == _NLMSGERR_ATTR_MSG:
                text = f"{text} ({value.rstrip(bytes(1)).decode(errors='replace')})"
    return OSError(-code, text)


def body(message: nlmsg) -> bytes:
    """A message of pyroute2 as bytes, without its header: for what is asked seldom."""
    message.encode()
    return bytes(message.data[_HEADER.size :])


# -- links ------------------------------------------------------------------------------------------------------


def links(netlink: Netlink) -> dict[int, Link]:
    """All interfaces by index. Raises OSError, KernelBusy."""
    body = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + _WITHOUT_STATISTICS
    found = (_link(data) for data in netlink.dump(Request(_RTM_GETLINK, body)))
    return {link.index: link for link in found}


def link_named(netlink: Netlink, name: str) -> Link | None:
    """The interface of that name, None where there is none. Raises OSError."""
    data = _message_of_link(netlink, name)
    return None if data is None else _link(data)


def tun_has_offload(netlink: Netlink, name: str) -> bool | None:
    """Whether packets of a TUN carry the header of virtio_net; None where there is no such TUN. Raises OSError."""
    data = _message_of_link(netlink, name)
    if data is None:
        return None
    info = dict(attributes(dict(attributes(data, _LINK_AT)).get(_IFLA_LINKINFO, b""), 0))
    flag = dict(attributes(info.get(_IFLA_INFO_DATA, b""), 0)).get(_IFLA_TUN_VNET_HDR)
    return None if flag is None else flag != bytes(1)


def _message_of_link(netlink: Netlink, name: str) -> bytes | None:
    body = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + attribute(_IFLA_IFNAME, _text(name)) + _WITHOUT_STATISTICS
    try:
        (data, *_) = netlink.ask(Request(_RTM_GETLINK, body))
    except OSError as error:
        if error.errno == errno.ENODEV:
            return None
        raise
    return data


def add_link(
    netlink: Netlink, name: str, kind: str, mtu: int = 0, namespace_fd: int | None = None, index: int = 0
) -> None:
    """Make an interface, down, in the socket's namespace or in another one. Raises OSError.

    ``index``: which one it gets; 0: the kernel chooses.
    """
    info = attribute(_IFLA_LINKINFO | NLA_F_NESTED, attribute(_IFLA_INFO_KIND, kind.encode()))
    body = _LINK.pack(socket.AF_UNSPEC, 0, index, 0, 0) + _link_attributes(name, "", mtu, namespace_fd) + info
    netlink.ask(Request(_RTM_NEWLINK, body, NLM_F_CREATE | NLM_F_EXCL))


def change_link(
    netlink: Netlink,
    index: int,
    *,
    name: str = "",
    alias: str = "",
    mtu: int = 0,
    up: bool | None = None,
    namespace_fd: int | None = None,
) -> None:
    """Change what is given, in one message. Raises OSError."""
    netlink.ask(changed_link(index, name=name, alias=alias, mtu=mtu, up=up, namespace_fd=namespace_fd))


def changed_link(
    index: int,
    *,
    name: str = "",
    alias: str = "",
    mtu: int = 0,
    up: bool | None = None,
    namespace_fd: int | None = None,
) -> Request:
    """What changes the given of an interface: it gets its name before it goes up."""
    header = _LINK.pack(socket.AF_UNSPEC, 0, index, _IFF_UP if up else 0, 0 if up is None else _IFF_UP)
    return Request(_RTM_SETLINK, header + _link_attributes(name, alias, mtu, namespace_fd))


def _link_attributes(name: str, alias: str, mtu: int, namespace_fd: int | None) -> bytes:
    parts = [attribute(_IFLA_IFNAME, _text(name))] if name else []
    parts += [attribute(_IFLA_IFALIAS, _text(alias))] if alias else []
    parts += [attribute(_IFLA_MTU, _u32(mtu))] if mtu else []
    parts += [attribute(_IFLA_NET_NS_FD, _u32(namespace_fd))] if namespace_fd is not None else []
    return b"".join(parts)


def loosen_source_check(netlink: Netlink, index: int) -> None:
    """Set rp_filter of an interface to 2. Raises OSError."""
    netlink.ask(loosened_source_check(index))


def loosened_source_check(index: int) -> Request:
    """What sets rp_filter of an interface to 2, loose: for IPv4 the larger of this and the one for all counts.

    While a link of two tasks is being switched over, one direction comes through WireGuard and the other one does
    not. /proc/sys is read-only in a service container, so it goes through IFLA_INET_CONF (inet_set_link_af in
    net/ipv4/devinet.c).
    """
    conf = attribute(_IPV4_DEVCONF_RP_FILTER, _u32(_LOOSE))
    inet = attribute(socket.AF_INET | NLA_F_NESTED, attribute(_IFLA_INET_CONF | NLA_F_NESTED, conf))
    header = _LINK.pack(socket.AF_UNSPEC, 0, index, 0, 0)
    return Request(_RTM_SETLINK, header + attribute(_IFLA_AF_SPEC | NLA_F_NESTED, inet))


def remove_link(netlink: Netlink, index: int) -> None:
    """Remove an interface; it is no error if it is gone. Raises OSError."""
    try:
        netlink.ask(Request(_RTM_DELLINK, _LINK.pack(socket.AF_UNSPEC, 0, index, 0, 0)))
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise


def _link(data: bytes) -> Link:
    _, _, index, flags, _ = _LINK.unpack_from(data, _HEADER.size)
    found = dict(attributes(data, _LINK_AT))
    info = dict(attributes(found.get(_IFLA_LINKINFO, b""), 0))
    return Link(
        index=index,
        name=_word(found.get(_IFLA_IFNAME, b"")),
        kind=_word(info.get(_IFLA_INFO_KIND, b"")),
        alias=_word(found.get(_IFLA_IFALIAS, b"")),
        mtu=int.from_bytes(found.get(_IFLA_MTU, b""), sys.byteorder),
        is_up=bool(flags & _IFF_UP),
        is_loopback=bool(flags & _IFF_LOOPBACK),
    )


def _text(word: str) -> bytes:
    return word.encode() + bytes(1)


def _word(text: bytes) -> str:
    return text.rstrip(bytes(1)).decode(errors="replace")


def _u32(value: int) -> bytes:
    return value.to_bytes(4, sys.byteorder)


_WITHOUT_STATISTICS: Final = attribute(_IFLA_EXT_MASK, _u32(_RTEXT_FILTER_SKIP_STATS))


# -- addresses --------------------------------------------------------------------------------------------------


def addresses(netlink: Netlink) -> list[Address]:
    """All IPv4 addresses of the namespace. Raises OSError, KernelBusy."""
    return [Address(IPv4Address(raw), index) for raw, index in _addresses(netlink, socket.AF_INET)]


def add_address(netlink: Netlink, index: int, address: IPv4Address) -> None:
    """Give an interface an address of its own, without a network; it is no error if it has it. Raises OSError."""
    body = _ADDRESS.pack(socket.AF_INET, address.max_prefixlen, 0, 0, index)
    body += attribute(_IFA_LOCAL, address.packed) + attribute(_IFA_ADDRESS, address.packed)
    netlink.ask(Request(_RTM_NEWADDR, body, NLM_F_CREATE | NLM_F_REPLACE))


def interface_of(netlink: Netlink, address: IPv4Address | IPv6Address) -> int | None:
    """Index of the interface that has the address, of either family; None: none has. Raises OSError, KernelBusy."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    return next((index for raw, index in _addresses(netlink, family) if ip_address(raw) == address), None)


def _addresses(netlink: Netlink, family: int) -> Iterator[tuple[bytes, int]]:
    for data in netlink.dump(Request(_RTM_GETADDR, _ADDRESS.pack(family, 0, 0, 0, 0))):
        *_, index = _ADDRESS.unpack_from(data, _HEADER.size)
        found = dict(attributes(data, _ADDRESS_AT))
        # The peer of a point-to-point address stands in IFA_ADDRESS, our own end in IFA_LOCAL.
        yield found.get(_IFA_LOCAL) or found[_IFA_ADDRESS], index


# -- routes -----------------------------------------------------------------------------------------------------


def routes(netlink: Netlink, index: int) -> frozenset[Route]:
    """The routes of the main table that leave through an interface with a source. Raises OSError, KernelBusy."""
    body = _ROUTE.pack(socket.AF_INET, 0, 0, 0, _RT_TABLE_MAIN, 0, 0, 0, 0)
    body += attribute(_RTA_TABLE, _u32(_RT_TABLE_MAIN)) + attribute(_RTA_OIF, _u32(index))
    interface = _u32(index)
    found = (_route(data[_HEADER.size :], interface) for data in netlink.dump(Request(_RTM_GETROUTE, body)))
    return frozenset(route for route in found if route is not None)


def change_routes(netlink: Netlink, index: int, ops: Sequence[AddRoute | RemoveRoute]) -> None:
    """Carry the operations out in order; a route to the same destination is replaced. Raises the first OSError."""
    outcomes = netlink.ask_all([_route_request(op, index) for op in ops])
    for op, error in zip(ops, outcomes, strict=True):
        if error is not None and not (isinstance(op, RemoveRoute) and error.errno == errno.ESRCH):
            raise OSError(error.errno, f"{op}: {error.strerror}") from error


def _route_request(op: AddRoute | RemoveRoute, index: int) -> Request:
    if isinstance(op, RemoveRoute):
        return Request(_RTM_DELROUTE, _route_body(op.route, index, _RT_SCOPE_NOWHERE))
    return Request(_RTM_NEWROUTE, _route_body(op.route, index, _RT_SCOPE_LINK), NLM_F_CREATE | NLM_F_REPLACE)


def _route_body(route: Route, index: int, scope: int) -> bytes:
    destination = route.destination
    metrics = attribute(_RTAX_MTU, _u32(route.mtu)) if route.mtu else b""
    return b"".join((
        _ROUTE.pack(
            socket.AF_INET, destination.prefixlen, 0, 0, _RT_TABLE_MAIN, _RTPROT_STATIC, scope, _RTN_UNICAST, 0
        ),
        attribute(_RTA_DST, destination.network_address.packed),
        attribute(_RTA_OIF, _u32(index)),
        attribute(_RTA_PREFSRC, route.source.packed),
        attribute(_RTA_METRICS | NLA_F_NESTED, metrics) if metrics else b"",
    ))  # fmt: skip


# A pass in which nothing has changed reads the same bytes again, and values never change: they are made once.
@lru_cache(maxsize=1 << 14)
def _route(body: bytes, interface: bytes) -> Route | None:
    _, length, _, _, table, *_ = _ROUTE.unpack_from(body)
    found = dict(attributes(body, _ROUTE.size))
    source = found.get(_RTA_PREFSRC)
    if table != _RT_TABLE_MAIN or found.get(_RTA_OIF) != interface or source is None:
        return None
    metrics = dict(attributes(found.get(_RTA_METRICS, b""), 0))
    mtu = int.from_bytes(metrics.get(_RTAX_MTU, b""), sys.byteorder)
    return Route(IPv4Network((found.get(_RTA_DST, bytes(4)), length)), IPv4Address(source), mtu)
