"""Sockets of the node that find out how large a packet gets to another node: ip(7), ipv6(7)."""

import contextlib
import socket
from typing import Final

from hivewire.records import Endpoint

# linux/in.h and linux/in6.h: socket has no names for them.
_IP_MTU_DISCOVER: Final = 10
_IP_MTU: Final = 14
_IPV6_MTU_DISCOVER: Final = 23
_IPV6_MTU: Final = 24
_DO: Final = 2
"""IP_PMTUDISC_DO: never fragment, refuse what is known to be too large."""
_HEADERS: Final = {socket.AF_INET: 28, socket.AF_INET6: 48}


class PathSockets:
    """Implements Sockets of agent/paths.py, in the namespace of the thread that makes it. One thread."""

    def __init__(self) -> None:
        self._open: dict[socket.AddressFamily, socket.socket] = {}

    def close(self) -> None:
        for each in self._open.values():
            each.close()
        self._open.clear()

    def send(self, endpoint: Endpoint, size: int) -> None:
        family = _family(endpoint)
        # EMSGSIZE: known to be too large; others: no way there at the moment.
        with contextlib.suppress(OSError):
            # The socket stays: the kernel hears of a packet that was too large only if its socket is there.
            sender = self._open.get(family)
            if sender is None:
                sender = self._open[family] = _socket(family)
            # Of UDP's 16 bits, an interface such as loopback takes more.
            payload = min(size, 65535) - _HEADERS[family]
            sender.sendto(bytes(payload), _address(endpoint))

    def mtu(self, endpoint: Endpoint) -> int | None:
        family = _family(endpoint)
        try:
            with _socket(family) as asked:
                asked.connect(_address(endpoint))
                if family == socket.AF_INET:
                    return asked.getsockopt(socket.IPPROTO_IP, _IP_MTU)
                return asked.getsockopt(socket.IPPROTO_IPV6, _IPV6_MTU)
        except OSError:
            return None


def _socket(family: socket.AddressFamily) -> socket.socket:
    made = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    if family == socket.AF_INET:
        made.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _DO)
    else:
        made.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _DO)
    return made


def _family(endpoint: Endpoint) -> socket.AddressFamily:
    return socket.AF_INET6 if endpoint.address.version == 6 else socket.AF_INET


def _address(endpoint: Endpoint) -> tuple[str, int]:
    return str(endpoint.address), endpoint.port
