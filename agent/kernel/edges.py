"""The tables of strict networks in the node's own namespace: find them, replace one, remove one.

The agent's own threads are in that namespace. Facts as in nftables.py.
"""

import contextlib
import errno
import struct
from collections.abc import Mapping
from typing import Final, Protocol

from agent.guard.edge import PREFIX, Edge
from agent.kernel import nftables
from agent.kernel.node import translated
from agent.kernel.rtnetlink import NETLINK_NETFILTER, Calls, Netlink, Request, attributes

_GETTABLE: Final = 10 << 8 | 1
_NFPROTO_INET: Final = 1
_FAMILIES: Final = ("inet",)
_NFTA_TABLE_NAME: Final = 1
_NFTA_TABLE_USERDATA: Final = 6
_BODY_AT: Final = 20
_LACKING: Final = (errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT)


class Edges(Protocol):
    """The node's own namespace, as far as the guard is concerned."""

    def read(self) -> Mapping[str, Edge]:
        """What is there, by name of the table. Raises KernelBusy, NoPermission."""

    def apply(self, name: str, text: str) -> None:
        """Put the table that the text declares in the place of the one of this name. Raises KernelBusy, NoWireGuard."""

    def remove(self, name: str) -> None:
        """Leave no table of this name. Raises as ``apply`` does."""


class NodeEdges:
    """Implements Edges. For all threads."""

    def __init__(self, calls: Calls | None = None) -> None:
        self._calls = calls or Calls()

    def read(self) -> Mapping[str, Edge]:
        try:
            with contextlib.closing(self._opened()) as netlink:
                messages = netlink.dump(Request(_GETTABLE, struct.pack("=BBH", _NFPROTO_INET, 0, 0)))
        except OSError as error:
            if error.errno in _LACKING:
                return {}
            with translated("read the node's tables"):
                raise
        found = {}
        for message in messages:
            table = dict(attributes(message, _BODY_AT))
            name = table.get(_NFTA_TABLE_NAME, b"").rstrip(bytes(1)).decode(errors="replace")
            if name.startswith(PREFIX):
                found[name] = Edge.parse(nftables.comment(table.get(_NFTA_TABLE_USERDATA, b"")))
        # Where an exchange broke off, two tables judge, and neither is what was wanted.
        for name in [each for each in found if nftables.following(each) in found]:
            found[name] = Edge(nftables.ALTERED, found[name].vnis | found.pop(nftables.following(name)).vnis)
        return found

    def apply(self, name: str, text: str) -> None:
        with translated("replace a table of the node"), contextlib.closing(self._opened()) as netlink:
            nftables.exchange(netlink, nftables.apply, text, name, _FAMILIES)

    def remove(self, name: str) -> None:
        with translated("remove a table of the node"), contextlib.closing(self._opened()) as netlink:
            nftables.remove(netlink, _FAMILIES, name)

    def _opened(self) -> Netlink:
        return Netlink(NETLINK_NETFILTER, self._calls)
