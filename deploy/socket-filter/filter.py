#!/usr/bin/env python3
"""A Unix socket before the Docker Engine's that lets through what allowed.txt names, and refuses and logs the rest.

    filter.py ALLOWED ENGINE LISTEN

Only GET, no request bodies, no upgrades: starlette and httpx2 speak HTTP at both ends, so the engine gets a request
that was written anew here from its method, path and query, and nothing else of the caller's.
"""

import contextlib
import json
import os
import re
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import parse_qsl

import httpx2
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

VERSION = r"(?:/v1\.[0-9]{1,2})?"
ID = "[a-z0-9]{12,64}"


class Allowed:
    """The allow list."""

    def __init__(self, text: str) -> None:
        lines = (line.split() for line in text.splitlines() if line.strip() and not line.startswith("#"))
        self.rules = tuple((method, path, frozenset("".join(query).split(","))) for method, path, *query in lines)
        self._patterns = [re.compile(VERSION + re.escape(p).replace(r"\{id\}", ID)) for _, p, _ in self.rules]

    def find(self, method: str, path: str, query: str) -> str | None:
        """The rule that lets this through, as it stands in the list; None: refuse."""
        names = {name for name, _ in parse_qsl(query, keep_blank_values=True)}
        for (verb, shown, parameters), pattern in zip(self.rules, self._patterns, strict=True):
            if verb == method and pattern.fullmatch(path) and names <= parameters:
                return f"{verb} {shown}"
        return None


def application(allowed: Allowed, engine: str) -> Starlette:
    used: set[str] = set()

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        # A stream of events is silent for as long as nothing happens.
        limits = httpx2.Timeout(30, read=None)
        async with httpx2.AsyncClient(
            transport=httpx2.AsyncHTTPTransport(uds=engine, limits=httpx2.Limits(max_connections=None)),
            timeout=limits, base_url="http://engine",
        ) as client:  # fmt: skip
            app.state.client = client
            yield

    async def answer(request: Request) -> Response:
        # As it was sent, not as it reads decoded: what is escaped matches no rule.
        path = request.scope["raw_path"].decode("ascii", "replace").partition("?")[0]
        query = request.url.query
        rule = allowed.find(request.method, path, query)
        if rule is None:
            log("refused", method=request.method, path=path, query=query)
            return JSONResponse({"message": f"the socket filter does not allow {request.method} {path}"}, 403)
        if rule not in used:
            used.add(rule)
            log("first use", rule=rule)
        client: httpx2.AsyncClient = request.app.state.client
        try:
            reply = await client.send(client.build_request("GET", path + (f"?{query}" if query else "")), stream=True)
        except httpx2.TransportError as error:
            return JSONResponse({"message": f"the engine does not answer the socket filter: {error}"}, 502)

        async def body() -> AsyncIterator[bytes]:
            try:
                async for part in reply.aiter_raw():
                    yield part
            except httpx2.TransportError:
                log("engine ended a stream", path=path)
            finally:
                await reply.aclose()

        kept = {name: reply.headers[name] for name in ("content-type", "content-length") if name in reply.headers}
        return StreamingResponse(body(), reply.status_code, kept)

    methods = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE"]
    return Starlette(routes=[Route("/{path:path}", answer, methods=methods)], lifespan=lifespan)


def log(event: str, **fields: str) -> None:
    print(json.dumps({"component": "socket-filter", "event": event, **fields}), file=sys.stderr, flush=True)


def main() -> None:
    allowed, engine, listen = sys.argv[1:]
    app = application(Allowed(Path(allowed).read_text()), engine)
    Path(listen).unlink(missing_ok=True)
    os.umask(0o177)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(listen)
        listener.listen(128)
        config = uvicorn.Config(app, log_level="warning", access_log=False, ws="none", timeout_graceful_shutdown=2)
        log("ready", socket=listen)
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
