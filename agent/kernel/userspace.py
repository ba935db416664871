"""The userspace backend: wireguard-go, for nodes whose kernel has no WireGuard.

The agent makes the TUN on the node, moves it into the task's namespace, brings it up there and hands its descriptor to
the host of userspace devices (userspace_host.py). wireguard-go, which learns from its first look that the TUN is up,
then opens its UDP socket where it runs: in the node's namespace. Its name on the node stands in the interface's alias,
so that a restarted agent finds it again. When its namespace goes, so does the TUN, and with it the process.
"""

import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from agent.kernel import hosting, rtnetlink, tun, uapi
from agent.kernel import namespace as namespaces
from agent.kernel.api import ALIAS, INTERFACE
from agent.kernel.hosting import Answer, Command, List, SetMtu, Start, Stop
from agent.kernel.node import Place, temporary_name
from agent.kernel.peers import Device, PeerChange, requests
from agent.kernel.ports import seemingly_free
from agent.kernel.rtnetlink import Calls, Link, Netlink
from agent.ops import CreateInterface
from hivewire.errors import HivewireError, KernelBusy, NoPermission, NoWireGuard
from hivewire.ids import TaskId

_ANSWER_S: Final = 5
_START_S: Final = 5
_LOOK_S: Final = 0.001


class HostClient:
    """Asks the host of userspace devices; for all threads."""

    def __init__(self, directory: Path, calls: Calls) -> None:
        self._path = directory / hosting.SOCKET
        self._calls = calls

    def ask(self, command: Command, *fds: int) -> Answer:
        """Raises NoWireGuard where no host listens, KernelBusy where it refuses or does not answer."""
        self._calls.add()
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
                connection.settimeout(_ANSWER_S)
                connection.connect(str(self._path))
                socket.send_fds(connection, [msgspec.json.encode(command)], list(fds))
                answer = hosting.ANSWERS.decode(connection.recv(hosting.LIMIT_BYTES))
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise NoWireGuard(
                f"hivewire-userspace does not run on this node: nobody listens on {self._path}"
            ) from error
        except PermissionError as error:
            raise NoPermission(f"{self._path} may not be opened: run the agent as root") from error
        except (OSError, msgspec.DecodeError) as error:
            raise KernelBusy(f"hivewire-userspace does not answer on {self._path}: {error}") from error
        if answer.error:
            raise KernelBusy(f"hivewire-userspace refused: {answer.error}")
        return answer


class UserspaceDriver:
    """Implements Driver. The kernel's links are TUNs."""

    backend = "userspace"
    kind = "tun"

    def __init__(self, directory: Path, calls: Calls) -> None:
        self._directory = directory
        self._host = HostClient(directory, calls)
        self._calls = calls

    def check(self) -> None:
        """Raises NoWireGuard where no host listens on this node, KernelBusy, NoPermission."""
        self._host.ask(List())

    def create(self, place: Place, op: CreateInterface) -> Link:
        name = temporary_name(place.namespace.task)
        # What a broken-off attempt left ends here: its TUN goes with it.
        offload = self._host.ask(Stop(name)).offload
        try:
            index = self._start(place, name, op.mtu, offload=offload)
            self._configure(name, op)
            # Renamed at last: what has the name is complete.
            _rename(place.routes, index)
            return Link(index, INTERFACE, self.kind, _alias(name), op.mtu, is_up=True)
        except BaseException:
            with contextlib.suppress(HivewireError):
                self._host.ask(Stop(name))
            raise

    def _start(self, place: Place, name: str, mtu: int, *, offload: bool) -> int:
        with contextlib.ExitStack() as stack:
            node = stack.enter_context(contextlib.closing(Netlink(rtnetlink.NETLINK_ROUTE, self._calls)))
            fd = tun.make(name, offload=offload)
            stack.callback(os.close, fd)
            made = rtnetlink.link_named(node, name)
            if made is None:
                raise KernelBusy(f"{name} is gone as soon as it was made")
            with namespaces.opened(place.namespace) as target:
                rtnetlink.change_link(node, made.index, namespace_fd=target)
            moved = rtnetlink.link_named(place.routes, name)
            if moved is None:
                raise KernelBusy(f"{name} did not arrive in the namespace of the task")
            with contextlib.suppress(OSError):
                rtnetlink.loosen_source_check(place.routes, moved.index)
            rtnetlink.change_link(place.routes, moved.index, alias=_alias(name), mtu=mtu, up=True)
            self._host.ask(Start(name), fd)
        return moved.index

    def _configure(self, name: str, op: CreateInterface) -> None:
        self._wait_until_up(name)
        self._host.ask(SetMtu(name, op.mtu))
        uapi.check_answer(self._talk(name, uapi.set_device(private_key=op.private_key)))
        for port in seemingly_free(op.first_port, op.last_port):
            try:
                uapi.check_answer(self._talk(name, uapi.set_device(listen_port=port)))
            except uapi.PortInUse:
                continue
            return
        raise KernelBusy(f"all UDP ports from {op.first_port} to {op.last_port} of this node are in use")

    def _wait_until_up(self, name: str) -> None:
        deadline = time.monotonic() + _START_S
        # It opens a socket on some port as soon as it knows that its TUN is up; only from then on is a port refused.
        while uapi.parse_device(self._talk(name, uapi.GET)).listen_port == 0:
            if time.monotonic() > deadline:
                raise KernelBusy(f"wireguard-go did not bring {name} up within {_START_S} s")
            time.sleep(_LOOK_S)

    def read(self, place: Place, link: Link) -> Device:
        return uapi.parse_device(self._talk(_device_name(link), uapi.GET))

    def change_peers(self, place: Place, link: Link, changes: Iterable[PeerChange]) -> None:
        for request in requests(changes):
            uapi.check_answer(self._talk(_device_name(link), uapi.set_peers(request)))

    def set_mtu(self, place: Place, link: Link, mtu: int) -> None:
        rtnetlink.change_link(place.routes, link.index, mtu=mtu)
        self._host.ask(SetMtu(_device_name(link), mtu))

    def remove(self, place: Place, link: Link) -> None:
        self._host.ask(Stop(_device_name(link)))
        rtnetlink.remove_link(place.routes, link.index)

    def forget(self, task: TaskId) -> None:
        # Without a host there is no process either.
        with contextlib.suppress(NoWireGuard):
            self._host.ask(Stop(temporary_name(task)))

    def _talk(self, name: str, request: bytes) -> bytes:
        self._calls.add()
        path = hosting.uapi_socket(self._directory, name)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(_ANSWER_S)
                connection.connect(str(path))
                connection.sendall(request)
                parts = [b""]
                while not b"".join(parts[-2:]).endswith(uapi.END):
                    part = connection.recv(65536)
                    if not part:
                        break
                    parts.append(part)
        except OSError as error:
            raise KernelBusy(f"the userspace device {name} does not answer on {path}: {error.strerror}") from error
        return b"".join(parts)


def _alias(name: str) -> str:
    return f"{ALIAS}:{name}"


def _device_name(link: Link) -> str:
    name = link.alias.partition(":")[2]
    if not hosting.is_device_name(name):
        raise KernelBusy(f"the alias of {link.name} does not name its userspace device: {link.alias!r}")
    return name


def _rename(netlink: Netlink, index: int) -> None:
    try:
        rtnetlink.change_link(netlink, index, name=INTERFACE)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        # Before Linux 6.2 only a link that is down is renamed (dev_change_name in net/core/dev.c); wireguard-go may
        # notice and then takes up to a second to come back.
        rtnetlink.change_link(netlink, index, up=False)
        rtnetlink.change_link(netlink, index, name=INTERFACE)
        rtnetlink.change_link(netlink, index, up=True)
