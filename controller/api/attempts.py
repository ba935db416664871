"""Routes about attempts that no link allows: what was denied, and which labels would allow it."""

import re
from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any, Final

import msgspec
from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from controller import denials
from controller.api import openapi
from controller.api.pages import DEFAULT_LIMIT, MAX_LIMIT, page
from controller.api.problems import ApiError
from controller.api.shapes import DenialView, Page, SuggestionView
from controller.state import StateSource

_DURATION: Final = re.compile(r"(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,6})s)?")


class SuggestionQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    stack: str | None = Field(None, description="Only what has an end in this stack.")


class DenialQuery(SuggestionQuery):
    limit: int = Field(DEFAULT_LIMIT, ge=1, le=MAX_LIMIT, description="How many items at most.")
    cursor: str | None = Field(None, max_length=4096, description="next_cursor of the page before.")
    since: str | None = Field(
        None, max_length=40, description="Only what was seen since: a time as in RFC 3339, or so long ago, as 5m."
    )
    source: str | None = Field(None, description="Only from this service or address.")
    destination: str | None = Field(None, description="Only to this service or address.")
    dropped: bool | None = Field(None, description="Only what was dropped (true), or only what enforce would drop.")


def router(source: StateSource, now: Callable[[], float]) -> APIRouter:
    """``now`` is Unix time in seconds."""
    made = APIRouter()

    @made.get("/denials", **openapi.says(Page[DenialView]))
    def list_denials(query: Annotated[DenialQuery, Query()]) -> Response:
        state, at = source.state(), now()
        since = None if query.since is None else _since(query.since, at)
        items = [
            item
            for item in denials.rows(state, source.denials(), at, since)
            if query.source in (None, item.source)
            and query.destination in (None, item.destination)
            and query.dropped in (None, item.dropped)
        ]
        if query.stack is not None:
            names = {it.name for it in state.swarm.services.values() if it.stack == query.stack}
            items = [item for item in items if item.source in names or item.destination in names]
        return _json(page(items, denials.row_key, query.limit, query.cursor, state.revision))

    @made.get("/suggestions", **openapi.says(SuggestionView))
    def read_suggestions(query: Annotated[SuggestionQuery, Query()]) -> Response:
        return _json(denials.suggestions(source.state(), source.denials(), query.stack))

    return made


def _since(text: str, now: float) -> float:
    """Unix time. Raises ApiError for what is neither a time nor a duration."""
    found = _DURATION.fullmatch(text)
    if text and found is not None:
        hours, minutes, seconds = (int(part or 0) for part in found.groups())
        return now - hours * 3600 - minutes * 60 - seconds
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        at = None
    if at is None or at.tzinfo is None:
        raise ApiError(400, "invalid_parameter", "since: write 5m, 1h30m, or a time such as 2027-01-15T08:00:00Z")
    return at.timestamp()


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
