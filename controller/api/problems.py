"""Errors of the API as problem details (RFC 9457), one form for all of them.

``code`` is stable and meant for programs, ``detail`` for people; ``message`` repeats it for those used to Docker.
"""

import uuid
from http import HTTPStatus
from typing import Any, Final

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from hivewire import logs
from hivewire.errors import Conflict, Gone, HivewireError, InvalidInput, Unavailable

MEDIA_TYPE: Final = "application/problem+json"
RETRY_AFTER_S: Final = 2

_log = logs.get(part="api")

_CODES: Final = {404: "not_found", 405: "method_not_allowed"}
_NAME_CHARACTERS: Final = frozenset("abcdefghijklmnopqrstuvwxyz_")


class ProblemError(msgspec.Struct, frozen=True, kw_only=True):
    parameter: str
    detail: str


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong. Look at ``code`` in programs."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    message: str
    instance: str
    code: str
    request_id: str
    errors: list[ProblemError] = []


class ApiError(Exception):
    """A request that gets no answer, with the problem to tell instead."""

    def __init__(self, status: int, code: str, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.headers = headers or {}


def request_id(scope: Any) -> str:
    """The id of this request; made on first use."""
    state = scope.setdefault("state", {})
    return str(state.setdefault("request_id", uuid.uuid4().hex))


def respond(scope: Any, error: ApiError, errors: list[ProblemError] | None = None) -> Response:
    problem = Problem(
        title=HTTPStatus(error.status).phrase,
        status=error.status,
        detail=error.detail,
        message=error.detail,
        instance=scope["path"],
        code=error.code,
        request_id=request_id(scope),
        errors=errors or [],
    )
    return Response(msgspec.json.encode(problem), error.status, error.headers, MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Make every error of this app a problem."""
    app.exception_handler(ApiError)(_on_api_error)
    app.exception_handler(HTTPException)(_on_http_error)
    app.exception_handler(RequestValidationError)(_on_invalid_request)
    app.exception_handler(HivewireError)(_on_hivewire_error)
    app.exception_handler(Exception)(_on_bug)


async def _on_api_error(request: Request, error: ApiError) -> Response:
    return respond(request.scope, error)


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    code = _CODES.get(error.status_code, "http_error")
    detail = "there is nothing at this path" if error.status_code == 404 else str(error.detail)
    return respond(request.scope, ApiError(error.status_code, code, detail, dict(error.headers or {})))


async def _on_invalid_request(request: Request, error: RequestValidationError) -> Response:
    found = [_parameter_error(each) for each in error.errors()]
    detail = "; ".join(f"{each.parameter}: {each.detail}" for each in found)
    return respond(request.scope, ApiError(400, "invalid_parameter", detail), found)


def _parameter_error(error: Any) -> ProblemError:
    # The value is never repeated, nor a name that no parameter could have: it may be a token in the wrong place.
    name = str(error["loc"][-1])
    name = name if len(name) <= 32 and _NAME_CHARACTERS.issuperset(name) else "(a parameter)"
    is_unknown = error["type"] == "extra_forbidden"
    return ProblemError(parameter=name, detail="unknown parameter" if is_unknown else str(error["msg"]))


async def _on_hivewire_error(request: Request, error: HivewireError) -> Response:
    match error:
        case Unavailable():
            told = ApiError(503, "unavailable", str(error), {"Retry-After": str(RETRY_AFTER_S)})
        case InvalidInput():
            told = ApiError(400, "invalid_input", str(error))
        case Conflict():
            told = ApiError(409, "conflict", str(error))
        case Gone():
            told = ApiError(404, "not_found", str(error))
        case _:
            told = ApiError(500, "unsupported", str(error))
    return respond(request.scope, told)


async def _on_bug(request: Request, error: Exception) -> Response:
    _log.error("api.failed", request_id=request_id(request.scope), path=request.url.path, error=type(error).__name__)
    detail = "the controller failed to answer; its log has the reason under this request_id"
    return respond(request.scope, ApiError(500, "internal", detail))
