"""Routes that answer "why", and the only ones that write: quarantines.

Each write says for the audit what it is about; that it happened, and by whom, the gate notes.
"""

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Annotated, Final

import msgspec
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from controller import quarantine
from controller.api import openapi
from controller.api.access import Role
from controller.api.auth import Subject
from controller.api.problems import ApiError
from controller.api.shapes import DecisionView, Page, PathView, QuarantineView, StepView
from controller.policy import why
from controller.policy.verdict import Verdict
from controller.state import MeshState, StateSource
from controller.view import Silences
from hivewire.errors import InvalidInput
from hivewire.records import PortRange, Protocol, QuarantineKind, QuarantineRecord
from hivewire.reports import TaskDenials

LATELY_MIN: Final = 5
"""Attempts are counted over so many minutes."""


class DecisionQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    source: str = Field(max_length=300, description="A service, a task, or an overlay address.")
    destination: str = Field(max_length=300, description="A service, a task, or an overlay address.")
    port: int | None = Field(None, ge=1, le=65535, description="Of the destination; without one: any that is linked.")
    protocol: Protocol = Field(Protocol.TCP, description="tcp or udp.")
    stack: str = Field("", max_length=300, description="Where short names are looked for first.")


class QuarantineQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    kind: QuarantineKind | None = Field(None, description="Only of this kind.")
    name: str | None = Field(None, max_length=300, description="Only this one, by name or id.")


class StackQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    stack: str = Field("", max_length=300, description="Where short names are looked for first.")


class QuarantineBody(BaseModel):
    """Who is to be shut out, and why."""

    model_config = ConfigDict(extra="forbid")

    kind: QuarantineKind
    name: str = Field(min_length=1, max_length=300)
    reason: str = Field("", max_length=200)
    stack: str = Field("", max_length=300)


def router(source: StateSource, silences: Callable[[], Silences], now: Callable[[], float]) -> APIRouter:
    routes = APIRouter()

    @routes.get("/decisions", **openapi.says(DecisionView))
    def read_decision(query: Annotated[DecisionQuery, Query()]) -> Response:
        state = source.state()
        port = None
        if query.port is not None:
            port = PortRange(protocol=query.protocol, first=query.port, last=query.port)
        question = why.ask(state, query.source, query.destination, port, stack=query.stack)
        reports = source.ask(why.concerned(state, question))
        decision = why.decide(state, question, reports, now(), silences())
        attempts = _attempts(state, question, source.denials(), now())
        return _json(_decision_view(decision, attempts, now()))

    @routes.get("/quarantines", **openapi.says(Page[QuarantineView]))
    def list_quarantines(query: Annotated[QuarantineQuery, Query()]) -> Response:
        state = source.state()
        records = [
            record
            for record in state.quarantines
            if query.kind in (None, record.kind) and query.name in (None, record.name, record.id)
        ]
        reports = source.ask(frozenset().union(*(quarantine.concerned(state, record) for record in records)))
        items = [_quarantine_view(record, quarantine.progress(state, record, reports)) for record in records]
        return _json(Page(items=items, next_cursor=None, revision=state.revision))

    @routes.post("/quarantines", status_code=201, **openapi.says(QuarantineView, 201, role=Role.OPERATOR))
    def create_quarantine(request: Request, body: QuarantineBody, query: Annotated[StackQuery, Query()]) -> Response:
        subject: Subject = request.scope["state"]["subject"]
        if not body.reason.isprintable():
            raise InvalidInput("the reason is one line of printable text")
        state = source.state()
        id_, name = quarantine.target(state, body.kind, body.name, body.stack or query.stack)
        record = QuarantineRecord(
            kind=body.kind, id=id_, name=name, reason=body.reason, by=subject.role.value, since=now()
        )
        _tell_about(request, record)
        source.quarantine(record)
        progress = quarantine.Progress((), {}, ())
        return _json(_quarantine_view(record, progress, is_closed=False), 201)

    @routes.delete("/quarantines/{kind}/{name}", status_code=204, **openapi.says_nothing(role=Role.OPERATOR))
    def delete_quarantine(
        request: Request, kind: QuarantineKind, name: str, query: Annotated[StackQuery, Query()]
    ) -> Response:
        state = source.state()
        record = quarantine.standing(state, kind, name, query.stack)
        if record is None:
            held = ", ".join(f"{it.kind.value} {it.name}" for it in state.quarantines) or "nothing"
            raise ApiError(404, "not_found", f"{kind.value} {name} is not quarantined; quarantined: {held}")
        _tell_about(request, record)
        source.release(record.kind, record.id)
        return Response(status_code=204)

    return routes


def _tell_about(request: Request, record: QuarantineRecord) -> None:
    """Say for the audit what this request writes."""
    about = {"kind": record.kind.value, "id": record.id, "name": record.name, "reason": record.reason}
    request.scope["state"]["about"] = about


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _decision_view(decision: why.Decision, attempts: int, now: float) -> DecisionView:
    path, handshake = decision.path, decision.last_handshake
    return DecisionView(
        source=decision.source,
        destination=decision.destination,
        port=decision.port or None,
        allowed=decision.verdict is Verdict.ALLOWED,
        verdict=decision.verdict,
        step=decision.step,
        is_encrypted=decision.is_encrypted,
        steps=[StepView(name=step.name, is_ok=step.is_ok, text=step.text) for step in decision.steps],
        fix=decision.fix,
        unknown_nodes=list(decision.unknown),
        source_tasks=decision.source_tasks,
        destination_tasks=decision.destination_tasks,
        last_handshake=None if handshake is None else datetime.fromtimestamp(handshake, UTC),
        handshake_age_seconds=None if handshake is None else round(max(0.0, now - handshake), 3),
        received_bytes=decision.received_bytes,
        sent_bytes=decision.sent_bytes,
        path=None
        if path is None
        else PathView(
            source_task=path.source_task,
            source_node=path.source_node,
            source_address=path.source_address,
            source_endpoint=path.source_endpoint,
            destination_task=path.destination_task,
            destination_node=path.destination_node,
            destination_address=path.destination_address,
            destination_endpoint=path.destination_endpoint,
            mtu=path.mtu,
        ),
        attempts=attempts,
    )


def _quarantine_view(
    record: QuarantineRecord, progress: quarantine.Progress, *, is_closed: bool | None = None
) -> QuarantineView:
    return QuarantineView(
        kind=record.kind,
        id=record.id,
        name=record.name,
        reason=record.reason,
        by=record.by,
        since=datetime.fromtimestamp(record.since, UTC),
        is_closed=progress.is_closed if is_closed is None else is_closed,
        closed_nodes=list(progress.closed),
        open_nodes=dict(progress.open),
        unknown_nodes=list(progress.unknown),
    )


def _attempts(state: MeshState, question: why.Question, denials: Iterable[TaskDenials], now: float) -> int:
    """What was dropped lately on this way; where both ends noted it, it counts once."""
    ours, theirs = (why.addresses(state, end) for end in (question.source, question.destination))
    counts = {"in": 0, "out": 0}
    for task in denials:
        for entry in task.entries:
            fits = question.port is None or (
                entry.port == question.port.first and entry.protocol == _NUMBERS[question.port.protocol]
            )
            if entry.dropped and fits and entry.source in ours and entry.destination in theirs:
                since = int(now // 60) - LATELY_MIN
                counts[entry.direction.value] += sum(count for minute, count in entry.minutes if minute > since)
    return max(counts.values())


_NUMBERS: Final = {Protocol.TCP: 6, Protocol.UDP: 17}
