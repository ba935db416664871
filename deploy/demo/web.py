#!/usr/bin/env python3
"""Front of the demo: every request goes through `api` to `db`, each time over new connections."""

import http.client
import json
import secrets
import time
from urllib.parse import urlencode

from dial import TIMEOUT_S, Report, Unreached, dial, explain
from server import Answer, identity, serve


def answer(_path: str, query: dict[str, str], client: str) -> Answer:
    """Ask `api` and add what this hop saw; 502 with the reason when a hop failed."""
    marker = query.get("marker") or f"marker-{secrets.token_hex(8)}"
    me = {**identity(), "client": client}
    start = time.perf_counter()
    try:
        hop, status, content = ask_api(marker)
    except Unreached as error:
        reason = {"ok": False, "hop": "web->api", "error": str(error), "marker": marker}
        return 502, {**reason, "web": me, "api": error.report}
    content["web"] = {**me, "total_ms": round((time.perf_counter() - start) * 1000, 2), "to_api": hop}
    return status, content


def ask_api(marker: str) -> tuple[Report, int, dict[str, object]]:
    """Fetch from one task of `api`; raises Unreached."""
    channel, report = dial("api", 8080)
    channel.settimeout(2 * TIMEOUT_S)  # `api` has its own attempt to make before it can answer
    with channel:
        try:
            target = "/?" + urlencode({"marker": marker})
            channel.sendall(f"GET {target} HTTP/1.0\r\nHost: api\r\n\r\n".encode())
            reply = http.client.HTTPResponse(channel)
            reply.begin()
            return report, reply.status, json.loads(reply.read())
        except OSError as error:
            raise explain(error, report) from error
        except (http.client.HTTPException, ValueError) as error:
            raise Unreached({**report, "outcome": "error", "detail": f"no valid answer: {error!r}"}) from error


if __name__ == "__main__":
    serve(answer)
