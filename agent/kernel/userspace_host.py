"""``hivewire-userspace``: keeps the processes of wireguard-go on a node whose kernel has no WireGuard.

They are not the agent's children, so that links go on while the agent is restarted or upgraded. The host knows nothing
of tasks: it runs a process on a TUN that it is given, says which ones run, ends them, and ends all when it is ended.

wireguard-go looks for its TUN by name in the node's namespace, while the TUN is in a task's. So the host holds a TUN
of the same name there, never up and never used, as long as the process runs: through it wireguard-go learns the MTU
(CreateTUNFromFile and MTU in its tun/tun_linux.go, RoutineTUNEventReader in device/tun.go).
"""

import argparse
import contextlib
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, assert_never

import msgspec

from agent.kernel import hosting, rtnetlink, tun
from agent.kernel.hosting import Answer, Command, List, SetMtu, Start, Stop, is_device_name, uapi_socket
from agent.kernel.rtnetlink import Calls, Netlink
from hivewire import logs
from hivewire.errors import NoWireGuard
from hivewire.process import harden

_PROGRAM: Final = "wireguard-go"
_PROBE: Final = "hwprobe"
_LOOK_S: Final = 0.002
_PATIENCE_S: Final = 2
"""For a client to send what it came for, and for a process to end by itself."""


@dataclass(frozen=True, slots=True)
class _Device:
    process: subprocess.Popen[bytes]
    stand_in: int
    """Descriptor of the TUN of the same name in the node's namespace."""


class Host:
    """The devices of this node. One thread."""

    def __init__(self, directory: Path, program: str, log: Any) -> None:
        self._directory = directory
        self._program = program
        self._log = log
        self._devices: dict[str, _Device] = {}
        self.version = _version(program)
        self.offload = _makes_offload(program, directory)

    def clear(self) -> None:
        """Remove what an earlier host left. A process whose socket is removed ends (UAPIListen, ipc/uapi_linux.go)."""
        for path in self._directory.glob("hw*.sock"):
            if is_device_name(path.stem):
                path.unlink(missing_ok=True)

    def answer(self, request: bytes, fds: list[int]) -> Answer:
        """Do what is asked. The descriptors are closed by the caller."""
        try:
            command = hosting.COMMANDS.decode(request)
            self._do(command, fds)
        except (msgspec.DecodeError, ValueError) as error:
            return Answer(error=f"the request is wrong: {error}")
        except OSError as error:
            return Answer(error=error.strerror or str(error))
        return Answer("", tuple(sorted(self._devices)), self.version, self.offload)

    def _do(self, command: Command, fds: list[int]) -> None:
        match command:
            case Start(name):
                if len(fds) != 1:
                    raise ValueError("a device needs the descriptor of its TUN")
                self._start(_checked(name), fds[0])
            case Stop(name):
                self._stop(_checked(name))
            case SetMtu(name, mtu):
                if _checked(name) not in self._devices:
                    raise ValueError(f"no device {name}")
                tun.set_mtu(name, mtu)
            case List():
                pass
            case _:
                assert_never(command)

    def _start(self, name: str, fd: int) -> None:
        self._stop(name)
        path = uapi_socket(self._directory, name)
        path.unlink(missing_ok=True)
        with contextlib.ExitStack() as stack:
            stand_in = tun.make(name)
            stack.callback(os.close, stand_in)
            # Listening before the process runs, so that a client need not wait for it to begin.
            listener = stack.enter_context(_listener(path, socket.SOCK_STREAM))
            stack.callback(path.unlink, missing_ok=True)
            given = {"WG_TUN_FD": str(fd), "WG_UAPI_FD": str(listener.fileno())}
            process = _spawn(self._program, name, given, fd, listener.fileno())
            stack.pop_all()
            listener.close()
        self._devices[name] = _Device(process, stand_in)
        self._log.info("device started", device=name, pid=process.pid)

    def _stop(self, name: str) -> None:
        device = self._devices.get(name)
        if device is None:
            return
        device.process.terminate()
        try:
            device.process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            device.process.kill()
            device.process.wait()
        self._ended(name)

    def reap(self) -> None:
        """Forget the devices whose process has ended."""
        for name in [name for name, device in self._devices.items() if device.process.poll() is not None]:
            self._ended(name)

    def _ended(self, name: str) -> None:
        device = self._devices.pop(name)
        os.close(device.stand_in)
        uapi_socket(self._directory, name).unlink(missing_ok=True)
        self._log.info("device ended", device=name, pid=device.process.pid, status=device.process.returncode)

    def close(self) -> None:
        """End all devices."""
        for device in self._devices.values():
            device.process.terminate()
        for name in list(self._devices):
            self._stop(name)


def _spawn(program: str, name: str, environment: dict[str, str], *fds: int) -> subprocess.Popen[bytes]:
    constant = {"PATH": os.environ.get("PATH", os.defpath), "LOG_LEVEL": "error", "WG_PROCESS_FOREGROUND": "1"}
    return subprocess.Popen(
        [program, "--foreground", name],
        stdin=subprocess.DEVNULL,
        env=constant | environment,
        pass_fds=fds,
        start_new_session=True,
    )


def _version(program: str) -> str:
    """As the program shows it: for people only."""
    try:
        shown = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    except subprocess.TimeoutExpired:
        return ""
    return (shown.stdout.splitlines() or [""])[0]


def _makes_offload(program: str, directory: Path) -> bool:
    """Which TUN this wireguard-go makes when it makes its own, for that is the one that it can read.

    Its version does not say: it called itself 0.0.20230223 before the change and for two years after it. Raises
    NoWireGuard where it makes none.
    """
    path = uapi_socket(directory, _PROBE)
    path.unlink(missing_ok=True)
    with (
        contextlib.closing(Netlink(rtnetlink.NETLINK_ROUTE, Calls())) as netlink,
        _listener(path, socket.SOCK_STREAM) as listener,
        _spawn(program, _PROBE, {"WG_UAPI_FD": str(listener.fileno())}, listener.fileno()) as process,
    ):
        try:
            deadline = time.monotonic() + _PATIENCE_S
            while time.monotonic() < deadline and process.poll() is None:
                found = rtnetlink.tun_has_offload(netlink, _PROBE)
                if found is not None:
                    return found
                time.sleep(_LOOK_S)
        finally:
            process.kill()
            path.unlink(missing_ok=True)
    raise NoWireGuard(f"{program} makes no TUN: is /dev/net/tun there, and CAP_NET_ADMIN given?")


def _checked(name: str) -> str:
    if not is_device_name(name):
        raise ValueError(f"{name!r} is no name of a device")
    return name


def _listener(path: Path, kind: int) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    listener.listen(64)
    return listener


def serve(host: Host, listener: socket.socket) -> None:
    """Answer until the process is told to end by SIGTERM or SIGINT."""
    with _signals() as signals, selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(signals, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    _serve_one(host, listener)
                elif {signal.SIGTERM, signal.SIGINT} & set(signals.recv(4096)):
                    return
            host.reap()


def _serve_one(host: Host, listener: socket.socket) -> None:
    client, _ = listener.accept()
    fds: list[int] = []
    with client:
        client.settimeout(_PATIENCE_S)
        # A client that went away gets no answer, which is its own loss.
        with contextlib.suppress(OSError):
            request, fds, _, _ = socket.recv_fds(client, hosting.LIMIT_BYTES, 4)
            try:
                answer = host.answer(request, fds)
            finally:
                for fd in fds:
                    os.close(fd)
            client.send(msgspec.json.encode(answer))


@contextlib.contextmanager
def _signals() -> Iterator[socket.socket]:
    """A socket that gives the number of each signal as a byte."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        yield reader
    finally:
        signal.set_wakeup_fd(before)
        reader.close()
        writer.close()


def main() -> None:
    """Run the host until it is told to end."""
    parser = argparse.ArgumentParser(prog="hivewire-userspace", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--directory", type=Path, default=hosting.DIRECTORY, help="folder of the sockets")
    parser.add_argument("--program", default=_PROGRAM, help="the wireguard-go to run")
    arguments = parser.parse_args()
    harden()
    logs.setup("userspace")
    log = logs.get()
    program = shutil.which(arguments.program)
    if program is None:
        log.error("wireguard-go is missing", program=arguments.program, remedy="install the package wireguard-go")
        sys.exit(1)
    arguments.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = arguments.directory / hosting.SOCKET
    path.unlink(missing_ok=True)
    try:
        host = Host(arguments.directory, program, log)
    except (NoWireGuard, OSError) as error:
        log.error("no userspace device can be made", error=str(error))
        sys.exit(1)
    host.clear()
    with _listener(path, socket.SOCK_SEQPACKET) as listener:
        log.info("ready", socket=str(path), version=host.version, offload=host.offload)
        own = path.stat().st_ino
        try:
            serve(host, listener)
        finally:
            # Swarm may have started the next host already; then the socket at this path is that one's.
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino == own:
                    path.unlink()
            host.close()


if __name__ == "__main__":
    main()
