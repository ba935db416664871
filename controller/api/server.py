"""Serves the API in a thread of its own: plain HTTP on loopback or a unix socket, TLS everywhere else, always."""

import ipaddress
import os
import socket
import stat
import threading
from pathlib import Path
from typing import Any, Final

import uvicorn
from fastapi import FastAPI

from controller.api.tls import Contexts
from hivewire.errors import InvalidSettings

_START_S: Final = 10.0
_STOP_S: Final = 5


class _Server(uvicorn.Server):
    """Tells when it began or gave up."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.decided = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.decided.set()


class ApiServer:
    """One listener. A token must not travel in clear: where others can listen, it speaks TLS."""

    def __init__(self, app: FastAPI, host: str, port: int, contexts: Contexts | None = None) -> None:
        """``host``: an address, or the path of a unix socket; port 0 takes a free one. ``contexts`` are for TLS.

        Raises InvalidSettings for an address that is not loopback where there is no certificate.
        """
        self._host = host
        self._port = port
        self._is_plain = is_private(host)
        if not self._is_plain and contexts is None:
            raise InvalidSettings(f"the API speaks plain HTTP on loopback addresses only: {host} takes a certificate")
        # Headers such as X-Forwarded-For are not believed: failures are counted per client.
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level="error",  # what strangers send is not worth a line
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=_STOP_S,
            ssl_context_factory=None if self._is_plain or contexts is None else lambda *_: contexts.listening(),
        )
        self._server = _Server(config)
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        """Where it listens, once started."""
        return self._port

    def start(self) -> None:
        """Listen and serve; returns when requests are answered. Raises InvalidSettings where that cannot be."""
        try:
            listener = self._listen()
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise InvalidSettings(f"the API cannot listen on {self}: {reason}; choose another") from error
        self._thread = threading.Thread(target=self._run, args=(listener,), name="api", daemon=True)
        self._thread.start()
        self._server.decided.wait(_START_S)

    def stop(self) -> None:
        """Stop serving; requests that are under way get a few seconds."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join(_STOP_S + 1)
            if self._host.startswith("/"):
                Path(self._host).unlink(missing_ok=True)

    def __str__(self) -> str:
        return self._host if self._host.startswith("/") else f"{self._host}, port {self._port}"

    def _listen(self) -> socket.socket:
        """Raises OSError, InvalidSettings."""
        if self._host.startswith("/"):
            return _listen_at(Path(self._host))
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        listener = socket.create_server((self._host, self._port), family=family)
        address, self._port = listener.getsockname()[:2]
        if self._is_plain and not is_private(address):  # a name that leads somewhere else on this machine
            listener.close()
            raise InvalidSettings(f"{self._host} is {address} here, which is no loopback address: write 127.0.0.1")
        return listener

    def _run(self, listener: Any) -> None:
        try:
            self._server.run(sockets=[listener])
        finally:
            listener.close()
            self._server.decided.set()


def is_private(host: str) -> bool:
    """Whether nothing that is sent there leaves this machine."""
    if host.startswith("/"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen_at(path: Path) -> socket.socket:
    """A unix socket for the owner alone. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
        path.unlink()  # left behind by the controller before: a socket that is closed keeps its file
    made = socket.socket(socket.AF_UNIX)
    try:
        made.bind(str(path))
        path.chmod(0o600)  # nobody can connect before it listens
        made.listen()
    except OSError:
        made.close()
        raise
    return made
