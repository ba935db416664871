"""The node's overlay namespaces: find them, read what is in one, replace the guard's table there.

Docker's overlay driver keeps one namespace per network and node while a task is there, as a file named ``<n>-<first
ten characters of the network's id>``, where n counts up. Load balancers (``lb_...``), the ingress sandbox and the
namespaces of tasks have other names. Facts: libnetwork drivers/overlay/ov_network.go; linux/neighbour.h, nf_tables.h.
"""

import contextlib
import errno
import os
import re
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from agent.guard.render import COUNTERS, UPLINK, Count, counting_on
from agent.kernel import namespace as namespaces
from agent.kernel import nftables, rtnetlink
from agent.kernel.api import Namespace
from agent.kernel.decode import attributes
from agent.kernel.node import translated
from agent.kernel.rtnetlink import Calls, Netlink, Request
from agent.observed import NotedCounters, NotedEntry
from hivewire.errors import KernelBusy, NamespaceGone
from hivewire.ids import NetworkId, TaskId

_NAME: Final = re.compile(r"[0-9]+-([0-9a-z]{10})")
_ID_CHARACTERS: Final = 10
#: The engine makes a namespace's file, and mounts the namespace over it a moment later.
MOUNT_S: Final = 0.5
_GLANCE_S: Final = 0.001

_AF_BRIDGE: Final = 7
_RTM_GETLINK: Final = 18
_RTM_GETNEIGH: Final = 30
# linux/net_namespace.h
_RTM_GETNSID: Final = 90
_NETNSA_NSID: Final = 1
_NETNSA_FD: Final = 3
_RTGENMSG: Final = bytes(4)
"""Its one byte, the family, filled up to a word."""
_NETNSA_AT: Final = 20
_NDA_LLADDR: Final = 2
_NDM_AT: Final = 16
_NDM: Final = struct.Struct("=BxxxiHBB")
_NUD_PERMANENT: Final = 0x80
"""Of the ports themselves, and of what the overlay driver adds."""

_NFNL_SUBSYS_NFTABLES: Final = 10
_NFT_MSG_GETOBJ: Final = 19
_NFTA_OBJ_TABLE: Final = 1
_NFTA_OBJ_NAME: Final = 2
_NFTA_OBJ_DATA: Final = 4
_NFTA_COUNTER_BYTES: Final = 1
_NFTA_COUNTER_PACKETS: Final = 2
_BODY_AT: Final = 20

_FAMILIES: Final = ("bridge",)


def network_of(file: str) -> NetworkId | None:
    """The first characters of the id of the network whose overlay namespace the file is; None for other files."""
    found = _NAME.fullmatch(file)
    return None if found is None else NetworkId(found[1])


def is_of(file: str, network: NetworkId) -> bool:
    """Whether the file is of an overlay namespace of this network."""
    return network_of(file) == network[:_ID_CHARACTERS]


@dataclass(frozen=True, slots=True)
class ObservedOverlay:
    """What an overlay namespace holds."""

    digest: str = ""
    """Of the guard's table; empty where there is none, ``nftables.ALTERED`` where somebody changed it."""
    counts: Mapping[str, Count] = field(default_factory=dict)
    vnis: frozenset[int] = frozenset()
    """VXLAN identifiers of the network that it is of."""
    macs: frozenset[str] = frozenset()
    """Hardware addresses that the bridge learned behind local ports. Its memory of a port goes with the port."""


class Space(Protocol):
    """An overlay namespace held open for a moment, by one thread."""

    def observe(self) -> ObservedOverlay:
        """Read what is there. Raises KernelBusy, NoPermission."""

    def ports(self, sandboxes: Set[str]) -> Mapping[str, frozenset[int]]:
        """Which ports of the bridge lead into the namespaces of these paths, by index; those that are gone have none.

        The kernel says so of the ports, which nobody in those namespaces can change. Raises KernelBusy.
        """

    def apply(self, text: str, counts: Mapping[str, Count]) -> None:
        """Replace the guard's table; each frame is judged by the old one or by the new one.

        Raises NamespaceGone, KernelBusy, NoWireGuard without nft.
        """

    def create(self, text: str) -> bool:
        """Make the guard's table, and leave alone one that is there; whether it was made. Raises as ``apply`` does."""

    def remove(self) -> None:
        """Leave no table of the guard. Raises as ``apply`` does."""

    def noted_counters(self) -> NotedCounters:
        """How much the guard noted since its table is there. Raises KernelBusy."""

    def noted_entries(self, name: str) -> tuple[NotedEntry, ...]:
        """What is in the set of this name. Raises KernelBusy."""


class Overlays(Protocol):
    """The overlay namespaces of this node."""

    def list(self) -> frozenset[str]:
        """Their files; empty where the folder cannot be read."""

    def open(self, file: str) -> contextlib.AbstractContextManager[Space]:
        """Raises NamespaceGone where the file is no namespace, or not yet."""


@contextlib.contextmanager
def open_new(
    overlays: Overlays,
    file: str,
    until: float,
    monotonic: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Space]:
    """Open a namespace whose file is new: the engine mounts it a moment later, and until then it is waited for.

    Raises NamespaceGone where it is none after the time ``until``, of the clock ``monotonic``.
    """
    with contextlib.ExitStack() as stack:
        while True:
            try:
                space = stack.enter_context(overlays.open(file))
                break
            except NamespaceGone:
                if monotonic() > until:
                    raise
                sleep(_GLANCE_S)
        yield space


class OverlayNamespaces:
    """Implements Overlays. For all threads."""

    def __init__(self, folder: Path, calls: Calls | None = None) -> None:
        self._folder = folder
        self._calls = calls or Calls()

    def list(self) -> frozenset[str]:
        try:
            return frozenset(name for name in os.listdir(self._folder) if _NAME.fullmatch(name))
        except OSError:
            return frozenset()

    @contextlib.contextmanager
    def open(self, file: str) -> Iterator[Space]:
        # It is of a network, not of a task; nobody asks for that part of it.
        namespace = namespaces.identify(TaskId(""), str(self._folder / file))
        with contextlib.ExitStack() as stack:

            def enter() -> tuple[Netlink, Netlink]:
                opened = []
                for family in (rtnetlink.NETLINK_ROUTE, rtnetlink.NETLINK_NETFILTER):
                    opened.append(Netlink(family, self._calls))
                    stack.callback(opened[-1].close)
                return opened[0], opened[1]

            with translated("open the overlay namespace"):
                routes, tables = namespaces.run_in(namespace, enter)
            yield _Space(namespace, routes, tables)


class _Space:
    def __init__(self, namespace: Namespace, routes: Netlink, tables: Netlink) -> None:
        self._namespace = namespace
        self._routes = routes
        self._tables = tables

    def observe(self) -> ObservedOverlay:
        with translated("observe the overlay namespace"):
            digest = nftables.applied(self._tables)
            uplinks = _uplinks(self._routes)
            return ObservedOverlay(
                digest=digest,
                counts=_counts(self._tables) if digest else {},
                vnis=frozenset(vni for vni in uplinks.values() if vni is not None),
                macs=_macs(self._routes, uplinks.keys()),
            )

    def ports(self, sandboxes: Set[str]) -> Mapping[str, frozenset[int]]:
        with translated("find the ports of tasks"):
            by_namespace = _peers(self._routes) if sandboxes else {}
            return {path: by_namespace.get(_identifier(self._routes, path), frozenset()) for path in sandboxes}

    def apply(self, text: str, counts: Mapping[str, Count]) -> None:
        with translated("replace the guard's table"):
            nftables.replace(self._tables, self._nft, counting_on(text, counts), _FAMILIES)

    def create(self, text: str) -> bool:
        try:
            self._nft(nftables.creation(text, *_FAMILIES))
        except KernelBusy:
            if self.observe().digest:
                return False
            raise
        return True

    def remove(self) -> None:
        with translated("remove the guard's table"):
            nftables.remove(self._tables, _FAMILIES)

    def noted_counters(self) -> NotedCounters:
        with translated("read the counters of the guard"):
            return nftables.counters(self._tables, _AF_BRIDGE)

    def noted_entries(self, name: str) -> tuple[NotedEntry, ...]:
        with translated(f"read what the guard noted as {name}"):
            return nftables.entries(self._tables, name, _AF_BRIDGE)

    def _nft(self, transaction: str) -> None:
        namespaces.run_in(self._namespace, lambda: nftables.apply(transaction))


def _counts(tables: Netlink) -> dict[str, Count]:
    kind = _NFNL_SUBSYS_NFTABLES << 8 | _NFT_MSG_GETOBJ
    counts = {}
    for message in tables.dump(Request(kind, struct.pack("=BBH", _AF_BRIDGE, 0, 0))):
        found = dict(attributes(message, _BODY_AT))
        table, name = (found.get(key, b"").rstrip(bytes(1)).decode() for key in (_NFTA_OBJ_TABLE, _NFTA_OBJ_NAME))
        if table == nftables.TABLE and name in COUNTERS:
            numbers = dict(attributes(found.get(_NFTA_OBJ_DATA, b""), 0))
            packets, octets = (
                int.from_bytes(numbers.get(key, b"")) for key in (_NFTA_COUNTER_PACKETS, _NFTA_COUNTER_BYTES)
            )
            counts[name] = Count(packets, octets)
    return counts


def _uplinks(routes: Netlink) -> dict[int, int | None]:
    """The ports to other nodes by index, and their VXLAN identifiers."""
    found: dict[int, int | None] = {}
    for data in routes.dump(Request(_RTM_GETLINK, rtnetlink.body(ifinfmsg()))):
        link = ifinfmsg(data)
        link.decode()
        if str(link.get_attr("IFLA_IFNAME")).startswith(UPLINK.rstrip("*")):
            info = link.get_attr("IFLA_LINKINFO")
            vxlan = info.get_attr("IFLA_INFO_DATA") if info and info.get_attr("IFLA_INFO_KIND") == "vxlan" else None
            found[link["index"]] = vxlan.get_attr("IFLA_VXLAN_ID") if vxlan else None
    return found


def _peers(routes: Netlink) -> dict[int, frozenset[int]]:
    """Ports by the identifier, in this namespace, of the one that their other end is in."""
    found: dict[int, frozenset[int]] = {}
    for data in routes.dump(Request(_RTM_GETLINK, rtnetlink.body(ifinfmsg()))):
        link = ifinfmsg(data)
        link.decode()
        if (identifier := link.get_attr("IFLA_LINK_NETNSID")) is not None:
            found[identifier] = found.get(identifier, frozenset()) | {link["index"]}
    return found


def _identifier(routes: Netlink, path: str) -> int:
    """Of the namespace behind the path; below zero where there is none, or where no port leads into it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1
    try:
        answer = routes.ask(
            Request(_RTM_GETNSID, _RTGENMSG + rtnetlink.attribute(_NETNSA_FD, struct.pack("=I", descriptor)))
        )
    except OSError as error:
        if error.errno == errno.EINVAL:  # a file that no namespace is mounted on, or not any more
            return -1
        raise
    finally:
        os.close(descriptor)
    told = (dict(attributes(message, _NETNSA_AT)).get(_NETNSA_NSID, b"") for message in answer)
    return next((int(struct.unpack("=i", value)[0]) for value in told if value), -1)


def _macs(routes: Netlink, uplinks: Set[int]) -> frozenset[str]:
    found = set()
    for message in routes.dump(Request(_RTM_GETNEIGH, _NDM.pack(_AF_BRIDGE, 0, 0, 0, 0))):
        _, index, state, _, _ = _NDM.unpack_from(message, _NDM_AT)
        mac = dict(attributes(message, _NDM_AT + _NDM.size)).get(_NDA_LLADDR, b"")
        if index not in uplinks and not state & _NUD_PERMANENT and len(mac) == 6:
            found.add(mac.hex(":"))
    return frozenset(found)
