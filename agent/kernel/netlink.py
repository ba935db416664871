"""The kernel backend: WireGuard devices of the kernel itself, through rtnetlink and generic netlink.

A device is born in the task's namespace by one message that a socket of the node sends. Its UDP socket stays in the
namespace of that socket (wg_newlink in drivers/net/wireguard/device.c), so its packets leave on the underlay.
Attributes and flags: linux/wireguard.h.
"""

import base64
import contextlib
import errno
import socket
import threading
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network, ip_address
from typing import Any, Final

from pyroute2.netlink import ctrlmsg
from pyroute2.netlink.generic.wireguard import wgmsg

from agent.kernel import namespace as namespaces
from agent.kernel import rtnetlink
from agent.kernel.api import ALIAS, INTERFACE
from agent.kernel.node import Place, temporary_name
from agent.kernel.peers import Device, PeerChange
from agent.kernel.ports import seemingly_free
from agent.kernel.rtnetlink import NLM_F_DUMP, Calls, Link, Netlink, Request
from agent.observed import ObservedPeer
from agent.ops import CreateInterface
from hivewire.errors import KernelBusy, NoWireGuard
from hivewire.ids import TaskId
from hivewire.keys import PrivateKey, PublicKey
from hivewire.records import Endpoint

KIND: Final = "wireguard"

_GENL_ID_CTRL: Final = 16
_CTRL_CMD_GETFAMILY: Final = 3
_WG_GENL_VERSION: Final = 1
_WG_CMD_GET_DEVICE: Final = 0
_WG_CMD_SET_DEVICE: Final = 1
_WGPEER_F_REMOVE_ME: Final = 1
_WGPEER_F_REPLACE_ALLOWEDIPS: Final = 2
_WGPEER_F_UPDATE_ONLY: Final = 4


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

    def create(self, place: Place, op: CreateInterface) -> None:
        name = temporary_name(place.namespace.task)
        self._make_link(place, name, op.mtu)
        link = rtnetlink.link_named(place.routes, name)
        if link is None:
            raise KernelBusy(f"{name} is gone as soon as it was made")
        try:
            rtnetlink.change_link(place.routes, link.index, name=INTERFACE, alias=ALIAS)
            # Only a matter of running connections being switched over, and of kernels with a strict default.
            with contextlib.suppress(OSError):
                rtnetlink.loosen_source_check(place.routes, link.index)
            self._bind(place, link.index, op)
        except BaseException:
            rtnetlink.remove_link(place.routes, link.index)
            raise

    def _make_link(self, place: Place, name: str, mtu: int) -> None:
        with (
            contextlib.closing(Netlink(rtnetlink.NETLINK_ROUTE, self._calls)) as node,
            namespaces.opened(place.namespace) as fd,
        ):
            left_over = rtnetlink.link_named(place.routes, name)
            if left_over is not None:
                rtnetlink.remove_link(place.routes, left_over.index)
            try:
                # The name is looked up in the namespace of the caller, too, before Linux 6.15: hence not wg0 at once.
                rtnetlink.add_link(node, name, KIND, mtu, fd)
            except OSError as error:
                if error.errno == errno.EOPNOTSUPP:
                    raise NoWireGuard("this kernel has no WireGuard: load its module, or use wireguard-go") from error
                raise

    def _bind(self, place: Place, index: int, op: CreateInterface) -> None:
        # The port of a device that is down is not bound yet: that it is in use shows when it comes up.
        self._set(place, index, [("WGDEVICE_A_PRIVATE_KEY", _encoded(op.private_key.reveal()))])
        for port in seemingly_free(op.first_port, op.last_port):
            try:
                self._set(place, index, [("WGDEVICE_A_LISTEN_PORT", port)])
                rtnetlink.change_link(place.routes, index, up=True)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                return
        raise KernelBusy(f"all UDP ports from {op.first_port} to {op.last_port} of this node are in use")

    def read(self, place: Place, link: Link) -> Device:
        message = wgmsg()
        message["cmd"] = _WG_CMD_GET_DEVICE
        message["version"] = _WG_GENL_VERSION
        message["attrs"] = [("WGDEVICE_A_IFINDEX", link.index)]
        return parse_device(place.generic.dump(Request(self._family(place), rtnetlink.body(message), NLM_F_DUMP)))

    def change_peers(self, place: Place, link: Link, changes: Sequence[PeerChange]) -> None:
        self._set(place, link.index, [("WGDEVICE_A_PEERS", [{"attrs": peer_attributes(change)} for change in changes])])

    def set_mtu(self, place: Place, link: Link, mtu: int) -> None:
        rtnetlink.change_link(place.routes, link.index, mtu=mtu)

    def remove(self, place: Place, link: Link) -> None:
        rtnetlink.remove_link(place.routes, link.index)

    def forget(self, task: TaskId) -> None:
        """Nothing: the device went with its namespace."""

    def _set(self, place: Place, index: int, attributes: list[tuple[str, Any]]) -> None:
        place.generic.ask(Request(self._family(place), set_body(index, attributes)))

    def _family(self, place: Place) -> int:
        """The number of the family "wireguard", the same in all namespaces until the module is loaded again."""
        with self._lock:
            if self._family_id is None:
                message = ctrlmsg()
                message["cmd"] = _CTRL_CMD_GETFAMILY
                message["version"] = 1
                message["attrs"] = [("CTRL_ATTR_FAMILY_NAME", KIND)]
                try:
                    (data, *_) = place.generic.ask(Request(_GENL_ID_CTRL, rtnetlink.body(message)))
                except OSError as error:
                    if error.errno == errno.ENOENT:
                        raise NoWireGuard("this kernel has no WireGuard") from error
                    raise
                answer = ctrlmsg(data)
                answer.decode()
                self._family_id = int(answer.get_attr("CTRL_ATTR_FAMILY_ID"))
            return self._family_id


def set_body(index: int, attributes: list[tuple[str, Any]]) -> bytes:
    """A request that changes a device, without its header."""
    message = wgmsg()
    message["cmd"] = _WG_CMD_SET_DEVICE
    message["version"] = _WG_GENL_VERSION
    message["attrs"] = [("WGDEVICE_A_IFINDEX", index), *attributes]
    return rtnetlink.body(message)


def parse_device(messages: Iterable[bytes]) -> Device:
    """Read a dump. A device's peers, and one peer's addresses, may be spread over several messages."""
    public_key: PublicKey | None = None
    port = 0
    peers: dict[PublicKey, ObservedPeer] = {}
    for data in messages:
        message = wgmsg(data)
        message.decode()
        # The private key stands in the message, too, which is dropped here: it is the device's to keep.
        key = message.get_attr("WGDEVICE_A_PUBLIC_KEY")
        if key is not None:
            public_key = PublicKey(_decoded(key))
        elif (private := message.get_attr("WGDEVICE_A_PRIVATE_KEY")) is not None:
            public_key = PrivateKey(_decoded(private)).public()
        port = message.get_attr("WGDEVICE_A_LISTEN_PORT") or port
        for part in message.get_attr("WGDEVICE_A_PEERS") or ():
            found = _observed(part)
            before = peers.get(found.public_key)
            peers[found.public_key] = found if before is None else _merged(before, found)
    return Device(public_key, port, peers)


def _merged(first: ObservedPeer, rest: ObservedPeer) -> ObservedPeer:
    return ObservedPeer(
        first.public_key,
        first.endpoint,
        first.allowed_ips | rest.allowed_ips,
        first.keepalive_s,
        first.last_handshake,
        first.received_bytes,
        first.sent_bytes,
    )


def _observed(part: Any) -> ObservedPeer:
    handshake = part.get_attr("WGPEER_A_LAST_HANDSHAKE_TIME") or {"tv_sec": 0, "tv_nsec": 0}
    endpoint = part.get_attr("WGPEER_A_ENDPOINT")
    addresses = (address.get("addr", "") for address in part.get_attr("WGPEER_A_ALLOWEDIPS") or ())
    return ObservedPeer(
        PublicKey(_decoded(part.get_attr("WGPEER_A_PUBLIC_KEY"))),
        None if endpoint is None else Endpoint(address=ip_address(endpoint["addr"]), port=endpoint["port"]),
        frozenset(IPv4Network(address) for address in addresses if address and ":" not in address),
        part.get_attr("WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL") or 0,
        handshake["tv_sec"] + handshake["tv_nsec"] / 1e9 if handshake["tv_sec"] else None,
        part.get_attr("WGPEER_A_RX_BYTES") or 0,
        part.get_attr("WGPEER_A_TX_BYTES") or 0,
    )


def peer_attributes(change: PeerChange) -> list[tuple[str, Any]]:
    attributes: list[tuple[str, Any]] = [("WGPEER_A_PUBLIC_KEY", str(change.public_key))]
    flags = _WGPEER_F_REMOVE_ME if change.remove else 0
    flags |= _WGPEER_F_UPDATE_ONLY if change.update_only else 0
    flags |= _WGPEER_F_REPLACE_ALLOWEDIPS if change.allowed_ips is not None else 0
    attributes.append(("WGPEER_A_FLAGS", flags))
    if change.endpoint is not None:
        where = {"addr": str(change.endpoint.address), "port": change.endpoint.port}
        attributes.append(("WGPEER_A_ENDPOINT", where))
    if change.keepalive_s is not None:
        attributes.append(("WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL", change.keepalive_s))
    if change.allowed_ips is not None:
        attributes.append(("WGPEER_A_ALLOWEDIPS", [{"attrs": _address(n)} for n in sorted(change.allowed_ips)]))
    return attributes


def _address(network: IPv4Network) -> list[tuple[str, Any]]:
    return [
        ("WGALLOWEDIP_A_FAMILY", socket.AF_INET),
        ("WGALLOWEDIP_A_IPADDR", network.network_address.packed),
        ("WGALLOWEDIP_A_CIDR_MASK", network.prefixlen),
    ]


def _encoded(key: bytes) -> str:
    return base64.b64encode(key).decode("ascii")


def _decoded(key: bytes | str) -> bytes:
    return base64.b64decode(key)
