#!/usr/bin/env python3
"""Try to reach something from inside a task, by `docker exec`; prints JSON, exits 0 when reached.

probe tcp HOST PORT    one new TCP connection
probe http URL         one new HTTP request; an answer with an error status counts as not reached
HOST may be a service name (its VIP), tasks.NAME, or an address.
"""

import argparse
import http.client
import json
import sys
import time
from urllib.parse import urlsplit

from dial import TIMEOUT_S, Report, Unreached, dial, explain


def probe_tcp(host: str, port: int, timeout_s: float = TIMEOUT_S) -> Report:
    """Connect and close."""
    try:
        channel, report = dial(host, port, timeout_s)
    except Unreached as error:
        return error.report
    channel.close()
    return report


def probe_http(url: str, timeout_s: float = TIMEOUT_S) -> dict[str, object]:
    """Fetch a page; adds `status`, `body` (parsed where it is JSON) and `total_ms`."""
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname is None:
        raise ValueError(f"{url!r} is no http:// address")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    start = time.perf_counter()
    try:
        channel, report = dial(parts.hostname, parts.port or 80, timeout_s)
    except Unreached as error:
        return {**error.report}
    with channel:
        channel.settimeout(5 * timeout_s)  # connected is what matters; a slow answer is one too
        try:
            channel.sendall(f"GET {target} HTTP/1.0\r\nHost: {parts.netloc}\r\n\r\n".encode())
            reply = http.client.HTTPResponse(channel)
            reply.begin()
            body = reply.read().decode(errors="replace")
        except OSError as error:
            return {**explain(error, report).report}
        except http.client.HTTPException as error:
            return {**report, "outcome": "error", "detail": f"no valid answer: {error!r}"}
    total_ms = round((time.perf_counter() - start) * 1000, 2)
    return {**report, "status": reply.status, "body": _parsed(body), "total_ms": total_ms}


def _parsed(body: str) -> object:
    try:
        return json.loads(body)
    except ValueError:
        return body


def main() -> int:
    """Run one probe."""
    parser = argparse.ArgumentParser(prog="probe", description=__doc__.splitlines()[0])
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, metavar="SECONDS", help="to connect (default 3)")
    kinds = parser.add_subparsers(dest="kind", required=True)
    tcp = kinds.add_parser("tcp")
    tcp.add_argument("host")
    tcp.add_argument("port", type=int)
    page = kinds.add_parser("http")
    page.add_argument("url")
    options = parser.parse_args()
    result: dict[str, object]
    if options.kind == "tcp":
        result = {**probe_tcp(options.host, options.port, options.timeout)}
    else:
        result = probe_http(options.url, options.timeout)
    print(json.dumps(result))
    status = result.get("status", 200)
    return 0 if result["outcome"] == "reached" and isinstance(status, int) and status < 400 else 1


if __name__ == "__main__":
    sys.exit(main())
