#!/usr/bin/env python3
"""A neighbour on the same overlay network that nobody linked: tries to reach what it is told to.

GET /tcp?host=api&port=8080 and GET /http?url=http://api:8080/ answer as the `probe` command does.
"""

from probe import probe_http, probe_tcp
from server import Answer, identity, serve


def answer(path: str, query: dict[str, str], _client: str) -> Answer:
    """Probe; 400 when the request names no target."""
    try:
        if path == "/tcp":
            return 200, {**probe_tcp(query["host"], int(query["port"]))}
        if path == "/http":
            return 200, {**probe_http(query["url"])}
    except (KeyError, ValueError) as error:
        return 400, {"error": f"give host and port, or url: {error!r}"}
    return 200, identity()


if __name__ == "__main__":
    serve(answer)
