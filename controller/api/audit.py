"""Who wrote what: every request that is no read leaves a line in the log, and the last ones can be asked for.

The log is the record; what is kept here is in memory only, of this controller alone.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import msgspec
from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from controller.api import openapi
from controller.api.access import Role
from controller.api.pages import DEFAULT_LIMIT, MAX_LIMIT
from controller.api.shapes import AuditResult, AuditView, Page
from hivewire import logs

KEPT: Final = 1000

_LONGEST: Final = 300
_log = logs.get(part="api")


class Journal:
    """The last writes. Thread-safe."""

    def __init__(self, now: Callable[[], float]) -> None:
        """``now`` is Unix time in seconds."""
        self._now = now
        self._lock = threading.Lock()
        self._entries: deque[AuditView] = deque(maxlen=KEPT)

    def note(
        self, *, role: str, token: str, address: str, action: str, path: str, status: int, request_id: str, about: Any
    ) -> None:
        """``about`` is what the route said of what it wrote: kind, id, name and reason, as far as it came."""
        result = AuditResult.FAILED
        if status < 400:
            result = AuditResult.DONE
        elif status == 403:
            result = AuditResult.REFUSED
        entry = AuditView(
            time=datetime.fromtimestamp(self._now(), UTC),
            role=role,
            token=token,
            address=address,
            action=action,
            path="".join(char if char.isprintable() else "?" for char in path[:_LONGEST]),
            **{name: str(about.get(name, "")) for name in ("kind", "id", "name", "reason")},
            result=result,
            status=status,
            request_id=request_id,
        )
        with self._lock:
            self._entries.append(entry)
        fields = msgspec.to_builtins(entry)
        del fields["time"]  # the line has its own
        _log.info("audit", **fields)

    def entries(self) -> Sequence[AuditView]:
        """The newest first."""
        with self._lock:
            return tuple(reversed(self._entries))


class AuditQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    limit: int = Field(DEFAULT_LIMIT, ge=1, le=MAX_LIMIT, description="How many items at most, the newest first.")


def router(journal: Journal) -> APIRouter:
    routes = APIRouter()

    @routes.get("/audit", **openapi.says(Page[AuditView], role=Role.ADMIN))
    def list_audit(query: Annotated[AuditQuery, Query()]) -> Response:
        items = list(journal.entries()[: query.limit])
        answer = Page(items=items, next_cursor=None, revision=0)
        return Response(msgspec.json.encode(answer), media_type="application/json")

    return routes
