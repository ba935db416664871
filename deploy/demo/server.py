"""The HTTP server that the demo's services share: JSON answers, and a stop that loses no request."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

Answer = tuple[int, dict[str, object]]
Handle = Callable[[str, dict[str, str], str], Answer]  # path, query, address of the client

# Requests still come in for a moment after SIGTERM, until every balancer has dropped this task.
DRAIN_S = float(os.environ.get("DEMO_DRAIN_S", "1"))


class Server(ThreadingHTTPServer):
    """Waits at its close for the requests in flight."""

    daemon_threads = False
    block_on_close = True
    request_queue_size = 128


def identity() -> dict[str, object]:
    """Say which task this is."""
    return {
        "hostname": socket.gethostname(),
        "task": os.environ.get("DEMO_TASK", ""),
        "slot": os.environ.get("DEMO_SLOT", ""),
        "node": os.environ.get("DEMO_NODE", ""),
    }


def serve(handle: Handle, port: int = 8080) -> None:
    """Answer requests until SIGTERM, then drain, finish those in flight and return."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # seconds for a client to send its request

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            if parts.path == "/healthz":
                self._answer(200, {"ok": True})
                return
            query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
            self._answer(*handle(parts.path, query, str(self.client_address[0])))

        def _answer(self, status: int, content: dict[str, object]) -> None:
            body = json.dumps(content).encode() + b"\n"
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Stay quiet: one line per request would drown the demo's log."""

    server = Server(("0.0.0.0", port), Handler)

    def stop() -> None:
        time.sleep(DRAIN_S)
        server.shutdown()

    # shutdown() waits for the serving loop, which is what the signal interrupted: so from a thread.
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=stop).start())
    print(json.dumps({"listening": port, **identity()}), flush=True)
    server.serve_forever(poll_interval=0.1)
    server.server_close()
