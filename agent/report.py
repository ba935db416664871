"""Answers the controller's questions over mTLS: handshakes, counters, denials, read from the kernel when asked for."""

import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

import msgspec

from hivewire import logs
from hivewire.errors import InvalidIdentity
from hivewire.identity import MANAGER, Identity, IdentitySource, peer_role, server_context

_HANDSHAKE_TIMEOUT_S: Final = 5.0


class ReportServer(ThreadingHTTPServer):
    """Serves managers of this Swarm only, on an address of the node's underlay."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(
        self, address: tuple[str, int], identity: IdentitySource, reports: Mapping[str, Callable[[], msgspec.Struct]]
    ) -> None:
        """``reports``: what to answer with, by path."""
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)
        self._identity = identity
        self._reports = reports
        self._context: tuple[Identity, ssl.SSLContext] | None = None
        self.log = logs.get()

    def start(self) -> None:
        threading.Thread(target=self.serve_forever, name="report", daemon=True).start()

    def get_request(self) -> tuple[Any, Any]:
        """Wrap the connection; the handshake itself waits for the handler's own thread."""
        connection, address = super().get_request()
        try:
            connection.settimeout(_HANDSHAKE_TIMEOUT_S)
            return self._tls().wrap_socket(connection, server_side=True, do_handshake_on_connect=False), address
        except InvalidIdentity as error:
            connection.close()
            self.log.warning("report.identity", error=str(error))
            # The one kind of error after which a server goes on to the next connection.
            raise OSError("no identity to answer with") from error

    def answer(self, path: str) -> bytes | None:
        """None where there is no such report."""
        report = self._reports.get(path)
        return None if report is None else msgspec.json.encode(report())

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A stranger's handshake fails here, which is not worth more than a line."""
        self.log.debug("report.refused", client=str(client_address))

    def _tls(self) -> ssl.SSLContext:
        try:
            identity = self._identity.current()
        except InvalidIdentity:
            if self._context is None:
                raise
            return self._context[1]  # being renewed: the one before is still good
        if self._context is None or self._context[0] is not identity:
            self._context = (identity, server_context(identity))
        return self._context[1]


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer
    protocol_version = "HTTP/1.1"
    timeout = 10

    def setup(self) -> None:
        self.request.do_handshake()
        super().setup()

    def do_GET(self) -> None:
        if peer_role(self.connection) != MANAGER:
            self._send(403, b'{"message":"only managers may ask"}')
        elif (answer := self.server.answer(self.path)) is None:
            self._send(404, b'{"message":"no such report"}')
        else:
            self._send(200, answer)

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """A quiet node logs nothing."""
