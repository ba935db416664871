"""A real etcd as a child process on loopback, for contract tests: start, kill, restart, wipe, compact."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

#: Another etcd than the machine's own may be named, to run the suite on the version of the image.
BINARY = os.environ.get("HIVEWIRE_TEST_ETCD") or shutil.which("etcd")
ETCDCTL = shutil.which("etcdctl")

ABSENT = None if BINARY and ETCDCTL else "etcd and etcdctl are not installed (Debian: etcd-server, etcd-client)"


def free_ports(count: int) -> list[int]:
    """Return TCP ports that are free now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = 30.0) -> None:
    """Return when the condition holds; fail when it does not within the deadline."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"still waiting for: {what}"
        time.sleep(0.01)


class EtcdServer:
    """One single-node etcd; `tls` are further flags and make the client address https."""

    def __init__(self, folder: Path, tls: Sequence[str] = ()) -> None:
        self.folder = folder
        self._tls = tuple(tls)
        self._client_port, self._peer_port = free_ports(2)
        self._process: subprocess.Popen[bytes] | None = None
        self._log = folder / "etcd.log"

    @property
    def endpoint(self) -> str:
        """Return host:port for clients."""
        return f"127.0.0.1:{self._client_port}"

    def start(self) -> None:
        """Start it on its data directory and wait until it takes connections."""
        scheme = "https" if self._tls else "http"
        client, peer = f"{scheme}://{self.endpoint}", f"http://127.0.0.1:{self._peer_port}"
        command = [str(BINARY), "--name=one", f"--data-dir={self.folder / 'data'}"]
        command += [f"--listen-client-urls={client}", f"--advertise-client-urls={client}"]
        command += [f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}"]
        # Durability against power loss is not what these tests are about.
        command += [f"--initial-cluster=one={peer}", "--unsafe-no-fsync", "--logger=zap", *self._tls]
        environment = {**os.environ, "ETCD_UNSUPPORTED_ARCH": os.uname().machine}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        wait_until(self._answers, f"etcd to listen, see {self._log}")

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """Let it keep its connections and answer nothing."""
        assert self._process
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen one go on."""
        assert self._process
        self._process.send_signal(signal.SIGCONT)

    def wipe(self) -> None:
        """Delete its data; it must not be running."""
        assert self._process is None
        shutil.rmtree(self.folder / "data")

    def compact(self, revision: int) -> None:
        """Compact up to a revision."""
        self.ctl("compact", str(revision))

    def ctl(self, *words: str) -> None:
        """Run etcdctl without TLS."""
        command = [str(ETCDCTL), f"--endpoints={self.endpoint}", *words]
        environment = {**os.environ, "ETCDCTL_API": "3", "ETCD_UNSUPPORTED_ARCH": os.uname().machine}
        subprocess.run(command, check=True, capture_output=True, env=environment, timeout=30)

    def _answers(self) -> bool:
        assert self._process
        assert self._process.poll() is None, self._log.read_text(errors="replace")[-3000:]
        try:
            socket.create_connection(("127.0.0.1", self._client_port), timeout=1).close()
        except OSError:
            return False
        # The port is open before there is a leader; the log says when clients are served.
        return b"serving client traffic" in self._log.read_bytes()
