"""The admin API: routes over one StateSource. Policy is declared in labels and nowhere else: of the mesh's state only
quarantines are written (see ``operations``).

Answers are msgspec values of ``shapes``, made by ``controller.view``; FastAPI routes, checks the query and writes
the OpenAPI document, which takes its schemas from the same values (see ``openapi``).
"""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final

import msgspec
from fastapi import APIRouter, FastAPI, Query, Request, Response
from prometheus_client import CollectorRegistry
from pydantic import BaseModel, ConfigDict, Field

from controller import claims, denials, view
from controller.api import attempts, audit, metrics, openapi, operations, problems
from controller.api.access import ROLE_KEY, Role, rules
from controller.api.auth import Failures, Gate, MetricsAuth, TokenSet
from controller.api.metrics import Vitals
from controller.api.pages import DEFAULT_LIMIT, MAX_LIMIT, page
from controller.api.problems import ApiError
from controller.api.shapes import (
    CheckReport,
    ClaimState,
    ClaimView,
    FindingView,
    LinkDetail,
    LinkState,
    LinkView,
    NodeDetail,
    NodeView,
    Page,
    ServiceDetail,
    ServiceView,
    Shown,
    Status,
    Version,
)
from controller.state import MeshState, StateSource
from hivewire.errors import Unavailable
from hivewire.records import Severity

API_VERSION: Final = "v1"
_SHARED_S: Final = 2.0


class NoQuery(BaseModel):
    """No parameters; like every other query it refuses unknown ones."""

    model_config = ConfigDict(extra="forbid")


class PageQuery(NoQuery):
    limit: int = Field(DEFAULT_LIMIT, ge=1, le=MAX_LIMIT, description="How many items at most.")
    cursor: str | None = Field(None, max_length=4096, description="next_cursor of the page before.")


class ServiceQuery(PageQuery):
    stack: str | None = Field(None, description="Only services of this stack.")
    meshed: bool | None = Field(None, description="Only services inside (true) or outside (false) the mesh.")


class LinkQuery(PageQuery):
    stack: str | None = Field(None, description="Only links with an end in this stack.")
    source: str | None = Field(None, description="Only links from this service.")
    destination: str | None = Field(None, description="Only links to this service.")
    state: LinkState | None = Field(None, description="Only links in this state.")
    internal: bool | None = Field(None, description="Only links within a service (true), or between two (false).")


class FindingQuery(PageQuery):
    stack: str | None = Field(None, description="Only findings about this stack and its services.")
    severity: Severity | None = Field(None, description="Only findings of this severity.")


class ClaimQuery(PageQuery):
    refused: bool | None = Field(None, description="Only those that are refused (true), or only the others.")


class ReadyQuery(NoQuery):
    verbose: str | None = Field(None, description="List every component.")


Nothing = Annotated[NoQuery, Query()]


class _Observer:
    """Draws the mesh as it is now, and remembers between requests which ends have no session."""

    def __init__(self, source: StateSource, now: Callable[[], float]) -> None:
        self._source = source
        self._now = now
        self._lock = threading.Lock()
        self._silences: view.Silences = {}
        self._last: view.Picture | None = None

    def draw(self) -> view.Picture:
        """The newest picture. In a large mesh it takes a while to draw, so requests share one where they can."""
        state, interfaces = self._source.state(), self._source.interfaces()
        with self._lock:
            last, now = self._last, self._now()
            is_same = last is not None and last.interfaces is interfaces and last.state == state
            if last is None or not is_same or now - last.now > _SHARED_S:
                self._silences = view.follow(self._silences, interfaces, now)
                last = self._last = view.draw(state, interfaces, now, self._silences)
            return last

    def state(self) -> MeshState:
        return self._source.state()

    @property
    def silences(self) -> view.Silences:
        """What is known of ends without a session, from earlier pictures."""
        with self._lock:
            return self._silences

    def parts(self) -> Mapping[str, bool]:
        """Every component and whether it works."""
        try:
            state = self._source.state()
        except Unavailable:
            return {"state": False}
        return {component.name: component.is_ok for component in state.components}


def create_app(
    source: StateSource,
    tokens: TokenSet,
    version: str,
    *,
    now: Callable[[], float] = time.time,
    vitals: Callable[[], Vitals] = Vitals,
    metrics_auth: MetricsAuth = MetricsAuth.AUTO,
) -> FastAPI:
    """The ASGI application. ``version`` is this controller's, ``vitals`` what it knows of itself."""
    app = FastAPI(
        title="Hivewire",
        version=version,
        openapi_url=None,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
    )
    problems.install(app)
    observer, registry, journal = _Observer(source, now), CollectorRegistry(), audit.Journal(now)
    meters = metrics.Meters(registry)
    registry.register(metrics.MeshCollector(observer.draw, source.denials, vitals, version))
    below = f"/api/{API_VERSION}"
    app.include_router(_probes(observer))
    app.include_router(metrics.router(registry))
    app.include_router(_overview(observer, source, version, now), prefix=below, tags=["mesh"])
    app.include_router(attempts.router(source, now), prefix=below, tags=["denials"])
    app.include_router(_inventory(observer), prefix=below, tags=["inventory"])
    app.include_router(operations.router(source, lambda: observer.silences, now), prefix=below, tags=["operations"])
    app.include_router(audit.router(journal), prefix=below, tags=["operations"])

    @app.get("/api/openapi.json", include_in_schema=False, openapi_extra={ROLE_KEY: Role.VIEWER.value})
    def read_openapi(query: Nothing) -> Response:
        return _json(openapi.document(app))

    decided = rules(app)
    meters.begin(decided)
    app.add_middleware(
        Gate,
        rules=decided,
        tokens=tokens,
        failures=Failures(),
        journal=journal,
        meters=meters,
        metrics_auth=metrics_auth,
    )
    return app


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _found(value: Shown | None, what: str) -> Response:
    if value is None:
        raise ApiError(404, "not_found", f"there is no such {what}")
    return _json(value)


def _probes(observer: _Observer) -> APIRouter:
    router = APIRouter(tags=["probes"])

    @router.get("/livez", **openapi.says_text("Answers while the process lives.", role=None))
    def read_livez(query: Nothing) -> Response:
        return Response("ok\n", media_type="text/plain")

    about = "Answers 503 while a part does not work; details need a token."

    @router.get("/readyz", **openapi.says_text(about, role=None))
    def read_readyz(request: Request, query: Annotated[ReadyQuery, Query()]) -> Response:
        parts = observer.parts()
        failed = [name for name, is_ok in parts.items() if not is_ok]
        if query.verbose is not None:
            lines = [f"[{'+' if is_ok else '-'}] {name}" for name, is_ok in parts.items()]
            text = "\n".join([*lines, f"not ready: {', '.join(failed)}" if failed else "ok"])
            return Response(text + "\n", 503 if failed else 200, media_type="text/plain")
        if failed:
            raise ApiError(503, "not_ready", f"not ready: {', '.join(failed)}")
        return Response("ok\n", media_type="text/plain")

    return router


def _overview(observer: _Observer, source: StateSource, version: str, now: Callable[[], float]) -> APIRouter:
    router = APIRouter()

    @router.get("/version", **openapi.says(Version))
    def read_version(query: Nothing) -> Response:
        return _json(Version(version=version, api_version=API_VERSION))

    @router.get("/status", **openapi.says(Status))
    def read_status(query: Nothing) -> Response:
        picture = observer.draw()
        return _json(view.status(picture, version, denials.count(picture.state, source.denials(), now())))

    @router.get("/findings", **openapi.says(Page[FindingView]))
    def list_findings(query: Annotated[FindingQuery, Query()]) -> Response:
        picture = observer.draw()
        items = view.findings(picture)
        if query.stack is not None:
            names = view.stack_names(picture, query.stack)
            items = [item for item in items if item.subject in names]
        if query.severity is not None:
            items = [item for item in items if item.severity is query.severity]
        return _json(page(items, view.finding_key, query.limit, query.cursor, picture.state.revision))

    @router.get("/checks", **openapi.says(CheckReport))
    def read_checks(query: Nothing) -> Response:
        return _json(view.checks(observer.draw(), version))

    return router


def _inventory(observer: _Observer) -> APIRouter:
    router = APIRouter()

    @router.get("/services", **openapi.says(Page[ServiceView]))
    def list_services(query: Annotated[ServiceQuery, Query()]) -> Response:
        picture = observer.draw()
        items = view.services(picture)
        if query.stack is not None:
            items = [item for item in items if item.stack == query.stack]
        if query.meshed is not None:
            items = [item for item in items if item.is_meshed == query.meshed]
        return _json(page(items, lambda it: (it.name, it.id), query.limit, query.cursor, picture.state.revision))

    @router.get("/services/{name}", **openapi.says(ServiceDetail))
    def read_service(name: str, query: Nothing) -> Response:
        return _found(view.service(observer.draw(), name), "service")

    @router.get("/links", **openapi.says(Page[LinkView]))
    def list_links(query: Annotated[LinkQuery, Query()]) -> Response:
        picture = observer.draw()
        items = [item for item in view.links(picture) if _is_wanted(item, query)]
        if query.stack is not None:
            names = view.stack_names(picture, query.stack)
            items = [item for item in items if item.source in names or item.destination in names]
        return _json(page(items, view.link_key, query.limit, query.cursor, picture.state.revision))

    @router.get("/links/{source}/{destination}", **openapi.says(LinkDetail))
    def read_link(source: str, destination: str, query: Nothing) -> Response:
        return _found(view.link(observer.draw(), source, destination), "link")

    @router.get("/nodes", **openapi.says(Page[NodeView]))
    def list_nodes(query: Annotated[PageQuery, Query()]) -> Response:
        picture = observer.draw()
        items = view.nodes(picture)
        return _json(page(items, lambda it: (it.hostname, it.id), query.limit, query.cursor, picture.state.revision))

    @router.get("/nodes/{name}", **openapi.says(NodeDetail))
    def read_node(name: str, query: Nothing) -> Response:
        return _found(view.node(observer.draw(), name), "node")

    @router.get("/claims", **openapi.says(Page[ClaimView]))
    def list_claims(query: Annotated[ClaimQuery, Query()]) -> Response:
        state = observer.state()
        items = claims.rows(state)
        if query.refused is not None:
            items = [item for item in items if (item.state is ClaimState.REFUSED) == query.refused]
        return _json(page(items, claims.row_key, query.limit, query.cursor, state.revision))

    return router


def _is_wanted(link: LinkView, query: LinkQuery) -> bool:
    return (
        query.source in (None, link.source)
        and query.destination in (None, link.destination)
        and query.state in (None, link.state)
        and query.internal in (None, link.is_internal)
    )
