"""The Kernel of api.py, the same for both backends but for the driver that makes devices and talks to them."""

import contextlib
import errno
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final, Protocol, assert_never

from agent.kernel import conntrack, nftables, rtnetlink
from agent.kernel import namespace as namespaces
from agent.kernel.api import ALIAS, INTERFACE, Namespace, Session, Underlay
from agent.kernel.peers import Device, PeerBatch, PeerChange, PeerOp, RouteBatch, RouteOp, batches, changes
from agent.kernel.rtnetlink import Calls, Link, Netlink, translate
from agent.observed import NotedCounters, NotedEntry, ObservedInterface, ObservedTask
from agent.ops import (
    AddPeer,
    AddRoute,
    CreateInterface,
    ForgetFlows,
    Handshake,
    Op,
    RemoveInterface,
    RemovePeer,
    RemoveRoute,
    RemoveRules,
    SetMtu,
    SetRules,
    SetUp,
    UpdatePeer,
)
from hivewire.errors import InvalidSettings, KernelBusy
from hivewire.ids import TaskId
from hivewire.records import Address

_NAME_PREFIX: Final = "hw"
_STRICT: Final = 1
"""rp_filter (Documentation/networking/ip-sysctl.rst)."""
_IFNAMSIZ: Final = 15
"""Without the zero at the end (linux/if.h)."""


@dataclass(frozen=True, slots=True)
class Place:
    """A task's namespace with the sockets opened in it."""

    namespace: Namespace
    routes: Netlink
    generic: Netlink
    tables: Netlink | None
    """None where the kernel has no nftables."""


class Driver(Protocol):
    """Makes WireGuard devices in task namespaces and talks to them. All raise OSError besides our own errors."""

    backend: str
    kind: str
    """Of its links, as rtnetlink names it."""

    def create(self, place: Place, op: CreateInterface) -> Link:
        """Make the device, named INTERFACE, with its alias and key, and up, for only so it holds its port.

        Leaves nothing on failure.
        """

    def read(self, place: Place, link: Link) -> Device:
        """Ask the device."""

    def change_peers(self, place: Place, link: Link, changes: Iterable[PeerChange]) -> None:
        """Carry out the changes in order, in as many requests as it takes."""

    def set_mtu(self, place: Place, link: Link, mtu: int) -> None:
        """Change the MTU."""

    def remove(self, place: Place, link: Link) -> None:
        """Remove the device; it is no error if it is gone."""

    def forget(self, task: TaskId) -> None:
        """The task's namespace is gone: free what is left of its device outside."""


def temporary_name(task: TaskId) -> str:
    """A link name for a task's device while it is being made: unique on the node, and no operator's."""
    word = "".join(c for c in task.lower() if c.isalnum() and c.isascii())
    return (_NAME_PREFIX + word)[:_IFNAMSIZ]


class NodeKernel:
    """Implements Kernel. For all threads; each session is of one."""

    def __init__(self, driver: Driver, calls: Calls) -> None:
        self._driver = driver
        self._calls = calls

    @property
    def backend(self) -> str:
        return self._driver.backend

    @property
    def calls(self) -> int:
        return self._calls.count

    def find(self, task: TaskId, path: str) -> Namespace:
        return namespaces.identify(task, path)

    def open(self, namespace: Namespace) -> AbstractContextManager[Session]:
        return self._session(namespace)

    @contextlib.contextmanager
    def _session(self, namespace: Namespace) -> Iterator[Session]:
        with contextlib.ExitStack() as stack:

            def enter() -> Place:
                def socket(family: int) -> Netlink:
                    netlink = Netlink(family, self._calls)
                    stack.callback(netlink.close)
                    return netlink

                routes, generic = socket(rtnetlink.NETLINK_ROUTE), socket(rtnetlink.NETLINK_GENERIC)
                try:
                    tables = socket(rtnetlink.NETLINK_NETFILTER)
                except OSError as error:
                    if error.errno != errno.EPROTONOSUPPORT:
                        raise
                    tables = None
                return Place(namespace, routes, generic, tables)

            with translated("open the namespace"):
                place = namespaces.run_in(namespace, enter)
            yield _NodeSession(place, self._driver, self._calls)

    def forget(self, task: TaskId) -> None:
        self._driver.forget(task)

    def underlay(self, address: Address) -> Underlay:
        with (
            translated("read the node's addresses"),
            contextlib.closing(Netlink(rtnetlink.NETLINK_ROUTE, self._calls)) as netlink,
        ):
            index = rtnetlink.interface_of(netlink, address)
            if index is not None:
                link = rtnetlink.links(netlink)[index]
                return Underlay(address, link.name, link.mtu)
        raise InvalidSettings(f"no interface of this node has the underlay address {address}")


@contextlib.contextmanager
def translated(doing: str) -> Iterator[None]:
    """Raise our errors for those of the system."""
    try:
        yield
    except OSError as error:
        raise translate(error, doing) from error


def _source_check(name: str) -> int:
    """rp_filter of an interface, in the namespace of the thread."""
    return int(Path(f"/proc/sys/net/ipv4/conf/{name}/rp_filter").read_text())


class _NodeSession:
    def __init__(self, place: Place, driver: Driver, calls: Calls) -> None:
        self._place = place
        self._driver = driver
        self._calls = calls
        # What was last seen or made under the name of our interface; a session is over too soon for it to change.
        self._named: Link | None = None
        self._looked = False

    def observe(self) -> ObservedTask:
        with translated("observe the namespace"):
            routes = self._place.routes
            links = rtnetlink.links(routes)
            self._saw(next((each for each in links.values() if each.name == INTERFACE), None))
            addresses = {
                found.address: links[found.index].name
                for found in rtnetlink.addresses(routes)
                if found.index in links and not links[found.index].is_loopback and not self._is_ours(links[found.index])
            }
            rules = "" if self._place.tables is None else nftables.applied(self._place.tables)
            link = self._find_link()
            if link is None:
                return ObservedTask(addresses, rules=rules)
            interface = self._interface(link)
            if interface is None:
                return ObservedTask(addresses, rules=rules)
            return ObservedTask(addresses, interface, rtnetlink.routes(routes, link.index), rules)

    def apply(self, ops: Iterable[Op]) -> None:
        for step in batches(ops):
            with translated(str(step.ops[0] if isinstance(step, PeerBatch | RouteBatch) else step)):
                try:
                    self._do(step)
                except BaseException:
                    self._looked = False
                    raise

    def flows(self) -> frozenset[IPv4Address]:
        if self._place.tables is None:
            return frozenset()
        with translated("read the tracked connections"):
            return conntrack.ends(self._place.tables)

    def noted_counters(self) -> NotedCounters:
        if self._place.tables is None:
            return NotedCounters()
        with translated("read the counters of the rules"):
            return nftables.counters(self._place.tables)

    def noted_entries(self, name: str) -> tuple[NotedEntry, ...]:
        if self._place.tables is None:
            return ()
        with translated(f"read what the rules noted as {name}"):
            return nftables.entries(self._place.tables, name)

    def _is_ours(self, link: Link) -> bool:
        return link.kind == self._driver.kind and link.alias.startswith(ALIAS)

    def _interface(self, link: Link) -> ObservedInterface | None:
        device = self._driver.read(self._place, link)
        if device.public_key is None:
            # Its making was broken off: it is made anew.
            return None
        port = device.listen_port if link.is_up else 0
        return ObservedInterface(link.name, device.public_key, port, link.mtu, link.is_up, device.peers)

    def _saw(self, named: Link | None) -> None:
        self._named, self._looked = named, True

    def _look(self) -> Link | None:
        """The interface that has the name of ours, whoever made it."""
        if not self._looked:
            self._saw(rtnetlink.link_named(self._place.routes, INTERFACE))
        return self._named

    def _find_link(self) -> Link | None:
        link = self._look()
        return link if link is not None and self._is_ours(link) else None

    def _link(self) -> Link:
        link = self._find_link()
        if link is None:
            raise KernelBusy(f"the interface {INTERFACE} is not there any more: observe again")
        return link

    def _do(self, step: PeerBatch | RouteBatch | Op) -> None:
        place = self._place
        match step:
            case CreateInterface():
                self._create(step)
            case SetMtu(mtu):
                self._driver.set_mtu(place, self._link(), mtu)
            case SetUp():
                self._set_up()
            case PeerBatch(ops):
                self._change_peers(ops)
            case RouteBatch(ops):
                self._change_routes(ops)
            case ForgetFlows(addresses):
                if place.tables is not None:
                    conntrack.forget(place.tables, addresses)
            case SetRules(text):
                nftables.replace(place.tables, self._nft, text)
            case RemoveRules():
                nftables.remove(place.tables)
            case RemoveInterface():
                if (link := self._find_link()) is not None:
                    self._driver.remove(place, link)
                    self._saw(None)
            case AddPeer() | Handshake() | UpdatePeer() | RemovePeer():
                self._change_peers((step,))
            case AddRoute() | RemoveRoute():
                self._change_routes((step,))
            case _:
                assert_never(step)

    def _create(self, op: CreateInterface) -> None:
        there = self._look()
        if there is not None and not there.alias.startswith(ALIAS):
            raise KernelBusy(f"the namespace has an interface {INTERFACE} that is not Hivewire's: remove it")
        if there is not None and self._is_ours(there) and self._driver.read(self._place, there).public_key is not None:
            return
        if there is not None:
            rtnetlink.remove_link(self._place.routes, there.index)
        self._saw(self._driver.create(self._place, op))
        if op.address is not None:
            rtnetlink.add_address(self._place.routes, self._link().index, op.address)
        # Only a matter of running connections being switched over: for a moment they come the other way.
        with contextlib.suppress(OSError):
            self._loosen_strict_checks()

    def _loosen_strict_checks(self) -> None:
        links = [link for link in rtnetlink.links(self._place.routes).values() if not link.is_loopback]

        def strict() -> list[Link]:
            everywhere = _source_check("all")
            return [link for link in links if max(everywhere, _source_check(link.name)) == _STRICT]

        for link in namespaces.run_in(self._place.namespace, strict):
            rtnetlink.loosen_source_check(self._place.routes, link.index)

    def _set_up(self) -> None:
        link = self._link()
        if not link.is_up:
            rtnetlink.change_link(self._place.routes, link.index, up=True)
            self._looked = False

    def _change_peers(self, ops: Sequence[PeerOp]) -> None:
        # Without the interface there are no peers either.
        if all(isinstance(op, RemovePeer) for op in ops) and self._find_link() is None:
            return
        self._driver.change_peers(self._place, self._link(), changes(ops))

    def _change_routes(self, ops: Sequence[RouteOp]) -> None:
        if all(isinstance(op, RemoveRoute) for op in ops) and self._find_link() is None:
            return
        rtnetlink.change_routes(self._place.routes, self._link().index, ops)

    def _nft(self, transaction: str) -> None:
        self._calls.add()
        namespaces.run_in(self._place.namespace, lambda: nftables.apply(transaction))
