"""Prometheus metrics: what the mesh looks like at the moment of the scrape, and what this API did.

Nothing that a client chooses becomes a label: services, states and reasons do; paths are the templates of routes.
Times are timestamps, so that they stay true however old the scrape is. What is known beforehand begins at zero.
"""

import platform
import threading
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Final

from fastapi import APIRouter, Query, Request, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import BaseModel, ConfigDict

from controller import claims, denials, view
from controller.api import openapi
from controller.api.access import Role, Rule
from controller.api.shapes import AgentState, ClaimState, LinkState, TaskState
from controller.policy.findings import KINDS
from controller.state import MeshState
from hivewire.errors import CAUSES, Unavailable
from hivewire.records import (
    CLAIMS,
    GUARDS,
    MESH_KEY,
    NODES,
    PEERS,
    POLICIES,
    QUARANTINES,
    STATUS,
    Mode,
    split_key,
)
from hivewire.reports import Reason, TaskDenials

METRICS_PATH: Final = "/metrics"
UNKNOWN: Final = "unknown"
"""An end that is no service's."""
MAX_SERIES: Final = 10_000
"""Of denied packets; what finds no room counts as unknown."""
FORGET_S: Final = 6 * 3600.0
"""An entry that no agent has told of for so long is not waited for any more."""

_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"})
_OUTSIDE: Final = "unmeshed"
_NODE_STATES: Final = ("ready", "stale", "agent_missing", "down")
_RECORDS: Final = tuple(
    split_key(prefix)[0] for prefix in (MESH_KEY, NODES, CLAIMS, PEERS, POLICIES, GUARDS, STATUS, QUARANTINES)
)
_ON_A_LINK: Final = (Reason.WRONG_PORT, Reason.PLAINTEXT, Reason.NO_BACKEND)

Values = dict[tuple[str, ...], float]
"""By the values of the labels."""

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for every counter, which says when this process began


@dataclass(frozen=True, slots=True)
class Vitals:
    """What the controller knows of itself."""

    certificates: Mapping[str, float] = field(default_factory=dict)
    """By purpose, when they expire: Unix time."""
    store_watch_restarts: int = 0
    store_lists: int = 0
    store_history_changes: int = 0
    """How often the store turned out to have been wiped or replaced."""
    records_refused: Mapping[str, int] = field(default_factory=dict)
    """By cause, how often a stored record was not believed."""


class Meters:
    """What this API did. The known series begin at zero."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "hivewire_http_requests",
            "Requests by method, template of the route (empty: there is none) and status.",
            ("method", "route", "code"),
            registry=registry,
        )
        self._seconds = Histogram(
            "hivewire_http_request_duration_seconds",
            "From the request's head to the end of the answer.",
            ("method", "route"),
            buckets=(0.005, 0.05, 0.5, 5.0),
            registry=registry,
        )
        self._refused = Counter(
            "hivewire_auth_failures",
            "Requests that were not let in: invalid_token, rate_limited, forbidden.",
            ("reason",),
            registry=registry,
        )
        for reason in ("invalid_token", "rate_limited", "forbidden"):
            self._refused.labels(reason)

    def begin(self, rules: Iterable[Rule]) -> None:
        for rule in rules:
            self._requests.labels(rule.method, rule.path, "200" if rule.method == "GET" else "403")
            self._seconds.labels(rule.method, rule.path)

    def answered(self, method: str, route: str, code: int, seconds: float) -> None:
        method = method if method in _METHODS else "other"
        self._requests.labels(method, route, str(code)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def refused(self, reason: str) -> None:
        self._refused.labels(reason).inc()


class DeniedPackets:
    """Adds up what agents note, so that it only grows: their entries come and go with tasks, and agents miss."""

    def __init__(self) -> None:
        self._entries: dict[denials.Noted, tuple[int, float]] = {}
        """How much of an entry was counted already, and when it was told last."""
        self.totals: Tally[tuple[str, str, str]] = Tally()
        """By source, destination and reason."""
        self.by_guard = 0
        """How much of it the guards of networks noted."""

    def take(self, state: MeshState, reports: Iterable[TaskDenials], now: float) -> None:
        known = {service.name for service in state.swarm.services.values()} | {UNKNOWN}
        for gone in [key for key in self.totals if not known.issuperset(key[:2])]:
            del self.totals[gone]
        for entry in denials.dropped(state, reports):
            before, _ = self._entries.get(entry.key, (0, 0.0))
            self._entries[entry.key] = (entry.count, now)
            more = entry.count - before if entry.count >= before else entry.count
            names = (entry.source or UNKNOWN, entry.destination or UNKNOWN)
            key = (*(name if name in known else UNKNOWN for name in names), entry.reason.value)
            if key not in self.totals and len(self.totals) >= MAX_SERIES:
                key = (UNKNOWN, UNKNOWN, entry.reason.value)
            self.totals[key[0], key[1], key[2]] += more
            self.by_guard += more if entry.is_guard else 0
        self._entries = {key: seen for key, seen in self._entries.items() if now - seen[1] < FORGET_S}


class MeshCollector(Collector):
    """Reads the mesh at each scrape."""

    def __init__(
        self,
        draw: Callable[[], view.Picture],
        reports: Callable[[], Iterable[TaskDenials]],
        vitals: Callable[[], Vitals],
        version: str,
    ) -> None:
        self._draw = draw
        self._reports = reports
        self._vitals = vitals
        self._version = version
        self._lock = threading.Lock()
        self._denied = DeniedPackets()

    def collect(self) -> Iterator[Metric]:
        build = {"version": self._version, "python": platform.python_version()}
        yield InfoMetricFamily("hivewire_build", "This controller.", value=build)
        yield from _vitals(self._vitals())
        try:
            picture = self._draw()
        except Unavailable:
            # Before the first reading nothing is made up: the mesh's metrics are absent, and this one says why.
            yield _gauge("hivewire_component_up", "1 while a part works.", ("component",), {("state",): 0})
            return
        yield from _mesh(picture)
        with self._lock:
            self._denied.take(picture.state, self._reports(), picture.now)
            yield from _denied(picture, self._denied)


def _mesh(picture: view.Picture) -> Iterator[Metric]:
    state = picture.state
    up: Values = {("state",): 1.0, **{(it.name,): float(it.is_ok) for it in state.components}}
    yield _gauge("hivewire_component_up", "1 while a part works.", ("component",), up)
    yield GaugeMetricFamily("hivewire_leader", "1 on the controller that leads.", value=float(state.is_leader))
    yield GaugeMetricFamily("hivewire_quarantines", "Quarantines that stand.", value=len(state.quarantines))
    modes = [policy.mode.value for policy in state.policies.values()]
    outside = [_OUTSIDE] * len(state.swarm.services.keys() - state.policies.keys())
    every = (*(mode.value for mode in Mode), _OUTSIDE)
    yield _count("hivewire_services", "Services by mode.", every, [*modes, *outside])
    links = [it.state.value for it in picture.links if not it.is_internal]
    yield _count("hivewire_links", "Links between services by state.", [it.value for it in LinkState], links)
    tasks = [task.state.value for task in picture.tasks.values()]
    yield _count("hivewire_tasks", "Tasks of the mesh by state.", [it.value for it in TaskState], tasks)
    yield _count("hivewire_nodes", "Nodes by state.", _NODE_STATES, _nodes(picture))
    found = Tally((it.severity.value, it.code) for it in picture.findings)
    codes: Values = {(kind.severity.value, kind.code): 0.0 for kind in KINDS.values()}
    codes |= {key: float(count) for key, count in found.items()}
    yield _gauge("hivewire_findings", "Findings by code.", ("severity", "code"), codes)
    rows = [row.state.value for row in claims.rows(state)]
    yield _count("hivewire_claims", "Claims of agents by what became of them.", [it.value for it in ClaimState], rows)
    refused: Values = {(name,): float(count) for name, count in claims.refused_by_class(state)}
    yield _gauge("hivewire_refused_claims", "Claims that are refused now, by reason.", ("reason",), refused)
    # By the first part of their key. By cause they are counted where they are read, among the vitals.
    parts = [split_key(key)[0] for key in state.unverified]
    shown = [part if part in _RECORDS else "other" for part in parts]
    unverified: Values = {(kind,): float(shown.count(kind)) for kind in (*_RECORDS, "other")}
    about = "Records in the store that count as not written, because they are not signed as they should be."
    yield _gauge("hivewire_unverified_records", about, ("kind",), unverified)


def _nodes(picture: view.Picture) -> list[str]:
    found = []
    for node in view.nodes(picture):
        if not node.is_ready:
            found.append("down")
        elif node.agent is AgentState.MISSING:
            found.append("agent_missing")
        else:
            found.append("stale" if node.agent_answers is False else "ready")
    return found


def _denied(picture: view.Picture, denied: DeniedPackets) -> Iterator[Metric]:
    totals: Values = {(UNKNOWN, UNKNOWN, reason.value): 0.0 for reason in Reason}
    for link in picture.links:
        if link.pairs_expected and not link.is_internal:
            totals |= {(link.source, link.destination, reason.value): 0.0 for reason in _ON_A_LINK}
    metric = CounterMetricFamily(
        "hivewire_denied_packets",
        "Packets dropped because no link allows them; an end that is no service's is unknown.",
        labels=("source", "destination", "reason"),
    )
    totals |= {key: float(count) for key, count in denied.totals.items()}
    for key, value in sorted(totals.items()):
        metric.add_metric(key, value)
    yield metric
    yield CounterMetricFamily(
        "hivewire_guard_denied_packets",
        "Those among the denied packets that the guard of a network dropped, outside of the tasks' namespaces.",
        value=denied.by_guard,
    )


def _vitals(vitals: Vitals) -> Iterator[Metric]:
    expiry: Values = {(purpose,): at for purpose, at in vitals.certificates.items()}
    about = "When a certificate expires, Unix time."
    yield _gauge("hivewire_certificate_expiry_timestamp_seconds", about, ("purpose",), expiry)
    causes: Values = {(cause,): float(vitals.records_refused.get(cause, 0)) for cause in CAUSES}
    refusals = CounterMetricFamily(
        "hivewire_record_refusals",
        "How often a stored record was not believed, by cause; one that stays is looked at again and again.",
        labels=("cause",),
    )
    for labels, value in causes.items():
        refusals.add_metric(labels, value)
    yield refusals
    counters = {
        "hivewire_store_watch_restarts": ("Watches of the store that were opened.", vitals.store_watch_restarts),
        "hivewire_store_lists": ("Complete lists of a prefix of the store.", vitals.store_lists),
        "hivewire_store_history_changes": (
            "How often the store turned out to have been wiped or replaced.",
            vitals.store_history_changes,
        ),
    }
    for name, (words, value) in counters.items():
        yield CounterMetricFamily(name, words, value=value)


def _count(name: str, about: str, states: Iterable[str], seen: Iterable[str]) -> Metric:
    counts = Tally(seen)
    values: Values = {(state,): float(counts[state]) for state in states}
    return _gauge(name, about, ("state",), values)


def _gauge(name: str, about: str, labels: tuple[str, ...], values: Values) -> Metric:
    metric = GaugeMetricFamily(name, about, labels=labels)
    for key, value in sorted(values.items()):
        metric.add_metric(key, value)
    return metric


class NoQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")


def router(registry: CollectorRegistry) -> APIRouter:
    """``/metrics`` in the format that the scraper asks for. Whether it takes a token is the gate's matter."""
    ProcessCollector(registry=registry)
    routes = APIRouter(tags=["probes"])

    @routes.get(METRICS_PATH, **openapi.says_text("Metrics for Prometheus.", role=Role.VIEWER))
    def read_metrics(request: Request, query: Annotated[NoQuery, Query()]) -> Response:
        encode, kind = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), media_type=kind)

    return routes
