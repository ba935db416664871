"""The kernel backend: WireGuard devices of the kernel itself, through rtnetlink and generic netlink.

A device is born in the task's namespace by one message that a socket of the node sends. Its UDP socket stays in the
namespace of that socket (wg_newlink in drivers/net/wireguard/device.c), so its packets leave on the underlay.
"""

import contextlib
import errno
import threading
from collections.abc import Iterable
from typing import Final

from agent.kernel import decode, encode, rtnetlink
from agent.kernel import namespace as namespaces
from agent.kernel.api import ALIAS, INTERFACE
from agent.kernel.node import Place, temporary_name
from agent.kernel.peers import Device, PeerChange
from agent.kernel.ports import seemingly_free
from agent.kernel.rtnetlink import Calls, Link, Netlink, Request
from agent.ops import CreateInterface
from hivewire.errors import KernelBusy, NoWireGuard
from hivewire.ids import TaskId

KIND: Final = "wireguard"

_GENL_ID_CTRL: Final = 16
_INDEX: Final = 0x68770000
"""Of the interface in every task's namespace: so high that no kernel comes by it counting, and known without asking."""


def is_offered(calls: Calls) -> bool:
    """Whether this kernel makes WireGuard devices: tried in a namespace that is gone afterwards. Raises NoPermission.

    The kernel loads the module itself when it is asked for the first device.
    """

    def probe() -> bool:
        with contextlib.closing(Netlink(rtnetlink.NETLINK_ROUTE, calls)) as netlink:
            try:
                rtnetlink.add_link(netlink, "hwprobe", KIND)
            except OSError as error:
                # An unknown kind of link is "not supported" (rtnl_newlink in net/core/rtnetlink.c).
                if error.errno in (errno.EOPNOTSUPP, errno.ENODEV):
                    return False
                raise rtnetlink.translate(error, "try to make a WireGuard device") from error
            return True

    return namespaces.run_in_new(probe)


class KernelDriver:
    """Implements Driver."""

    backend = "kernel"
    kind = KIND

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._lock = threading.Lock()
        self._family_id: int | None = None

    def create(self, place: Place, op: CreateInterface) -> Link:
        index = self._make_link(place, op.mtu)
        try:
            self._bind(place, index, op)
        except BaseException:
            rtnetlink.remove_link(place.routes, index)
            raise
        return Link(index, INTERFACE, KIND, ALIAS, op.mtu, is_up=True)

    def _make_link(self, place: Place, mtu: int) -> int:
        """A device that is down and has a temporary name; its index."""
        name = temporary_name(place.namespace.task)
        with (
            contextlib.closing(Netlink(rtnetlink.NETLINK_ROUTE, self._calls)) as node,
            namespaces.opened(place.namespace) as fd,
        ):
            # The name is looked up in the namespace of the caller, too, before Linux 6.15: hence not wg0 at once.
            try:
                rtnetlink.add_link(node, name, KIND, mtu, fd, _INDEX)
            except OSError as error:
                if error.errno == errno.EOPNOTSUPP:
                    raise NoWireGuard("this kernel has no WireGuard: load its module, or use wireguard-go") from error
                if error.errno not in (errno.EEXIST, errno.EBUSY):
                    raise
            else:
                return _INDEX
            # Name or index is taken: by what an attempt left that was broken off, or by a device that is not ours.
            left_over = rtnetlink.link_named(place.routes, name)
            if left_over is not None:
                rtnetlink.remove_link(place.routes, left_over.index)
            rtnetlink.add_link(node, name, KIND, mtu, fd)
        link = rtnetlink.link_named(place.routes, name)
        if link is None:
            raise KernelBusy(f"{name} is gone as soon as it was made")
        return link.index

    def _bind(self, place: Place, index: int, op: CreateInterface) -> None:
        steps = [
            rtnetlink.changed_link(index, name=INTERFACE, alias=ALIAS),
            rtnetlink.loosened_source_check(index),
            rtnetlink.changed_link(index, up=True),
        ]
        key = op.private_key
        for port in seemingly_free(op.first_port, op.last_port):
            place.generic.ask(self._request(place, encode.set_device(index, private_key=key, listen_port=port)))
            named, _, up = place.routes.ask_all(steps)
            if named is not None:
                raise named
            # The loose check is only a matter of running connections being switched over, and of kernels with a
            # strict default. The port of a device that is down is not bound yet: that it is in use shows here.
            if up is None:
                return
            if up.errno != errno.EADDRINUSE:
                raise up
        raise KernelBusy(f"all UDP ports from {op.first_port} to {op.last_port} of this node are in use")

    def read(self, place: Place, link: Link) -> Device:
        return decode.parse_device(place.generic.dump(self._request(place, encode.get_device(link.index))))

    def change_peers(self, place: Place, link: Link, changes: Iterable[PeerChange]) -> None:
        requests = (self._request(place, body) for body in encode.set_peers(link.index, changes))
        for error in place.generic.ask_all(requests):
            if error is not None:
                raise error

    def set_mtu(self, place: Place, link: Link, mtu: int) -> None:
        rtnetlink.change_link(place.routes, link.index, mtu=mtu)

    def remove(self, place: Place, link: Link) -> None:
        rtnetlink.remove_link(place.routes, link.index)

    def forget(self, task: TaskId) -> None:
        """Nothing: the device went with its namespace."""

    def _request(self, place: Place, body: bytes) -> Request:
        return Request(self._family(place), body)

    def _family(self, place: Place) -> int:
        """The number of the family "wireguard", the same in all namespaces until the module is loaded again."""
        if self._family_id is not None:
            return self._family_id
        with self._lock:
            try:
                (answer, *_) = place.generic.ask(Request(_GENL_ID_CTRL, encode.find_family(KIND)))
            except OSError as error:
                if error.errno == errno.ENOENT:
                    raise NoWireGuard("this kernel has no WireGuard") from error
                raise
            self._family_id = decode.family_id(answer)
            return self._family_id
