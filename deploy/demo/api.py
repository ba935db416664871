#!/usr/bin/env python3
"""Middle of the demo: counts each request in `db` and leaves the caller's marker there."""

import time

from dial import Report, Unreached, dial, explain
from resp import Connection, RespError
from server import Answer, identity, serve


def answer(_path: str, query: dict[str, str], client: str) -> Answer:
    """Write to `db`; 502 with the reason when that failed."""
    marker = query.get("marker", "")
    me: dict[str, object] = {**identity(), "client": client}
    start = time.perf_counter()
    try:
        hop, db = ask_db(marker)
    except Unreached as error:
        reason = {"ok": False, "hop": "api->db", "error": str(error), "marker": marker}
        return 502, {**reason, "api": me, "db": error.report}
    me["total_ms"] = round((time.perf_counter() - start) * 1000, 2)
    me["to_db"] = hop
    return 200, {"ok": True, "marker": marker, "api": me, "db": db}


def ask_db(marker: str) -> tuple[Report, dict[str, object]]:
    """Count, store the marker, read it back, and ask which address `db` sees; raises Unreached."""
    channel, report = dial("db", 6379)
    with channel:
        try:
            db = Connection(channel)
            count = db.call("INCR", "requests")
            db.call("SET", "marker", marker)
            stored = db.call("GET", "marker")
            client = dict(pair.split("=", 1) for pair in str(db.call("CLIENT", "INFO")).split() if "=" in pair)
        except OSError as error:
            raise explain(error, report) from error
        except RespError as error:
            raise Unreached({**report, "outcome": "error", "detail": str(error)}) from error
    return report, {"count": count, "stored": stored, "client": client.get("addr", "").rpartition(":")[0]}


if __name__ == "__main__":
    serve(answer)
