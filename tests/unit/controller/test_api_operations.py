"""Decisions and quarantines through the API: who may, what is written, and what the audit log holds."""

from pathlib import Path
from typing import Any

import pytest
import structlog
from fastapi.testclient import TestClient
from test_view_states import API, NODE2, NOW, WEB1, FakeSource, shop

from controller.api.app import create_app
from controller.api.auth import TokenSet
from hivewire.errors import StoreUnavailable
from hivewire.records import QuarantineKind, QuarantineRecord

TOKENS = {role: f"{role}-token-of-forty-characters-0123456789" for role in ("viewer", "operator", "admin")}
RECORD = QuarantineRecord(kind=QuarantineKind.SERVICE, id=API, name="shop_api", reason="odd", by="admin", since=NOW)
BODY = {"kind": "service", "name": "shop_api", "reason": "behaves oddly"}


@pytest.fixture
def tokens(tmp_path: Path) -> TokenSet:
    path = tmp_path / "admin_token"
    path.write_text("".join(f"{role}:{token}\n" for role, token in TOKENS.items()))
    return TokenSet.load(path)


@pytest.fixture
def source() -> FakeSource:
    return FakeSource(shop(quarantines=(RECORD,)))


@pytest.fixture
def api(source: FakeSource, tokens: TokenSet) -> TestClient:
    return TestClient(create_app(source, tokens, "0.1.0", now=lambda: NOW), raise_server_exceptions=False)


def as_(role: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {TOKENS[role]}"}


def problem(answer: Any) -> tuple[int, str, str]:
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.status_code, answer.json()["code"], answer.json()["detail"]


def test_a_decision_for_everybody(api: TestClient) -> None:
    """Every role may ask; the answer has all of its fields."""
    path = "/api/v1/decisions?source=shop_web&destination=shop_db&port=5432&protocol=tcp"
    answer = api.get(path, headers=as_("viewer"))
    assert answer.status_code == 200
    assert answer.json() == {
        "source": "shop_web",
        "destination": "shop_db",
        "port": "5432/tcp",
        "allowed": False,
        "verdict": "denied",
        "step": "link",
        "is_encrypted": False,
        "steps": answer.json()["steps"],
        "fix": 'docker service update --label-add hivewire.links="db:5432" shop_web',
        "unknown_nodes": [],
        "source_tasks": 2,
        "destination_tasks": 1,
        "last_handshake": None,
        "handshake_age_seconds": None,
        "received_bytes": None,
        "sent_bytes": None,
        "path": None,
        "attempts": 0,
    }
    assert [(step["name"], step["is_ok"]) for step in answer.json()["steps"]] == [
        ("mesh", True),
        ("quarantine", True),
        ("link", False),
        ("consent", None),
        ("mode", False),
        ("admission", None),
        ("interfaces", None),
        ("peers", None),
        ("rules", None),
        ("tunnel", None),
    ]


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("source=shop_web", "invalid_parameter"),
        ("source=shop_web&destination=shop_db&port=0", "invalid_parameter"),
        ("source=shop_web&destination=shop_db&protocol=sctp", "invalid_parameter"),
        ("source=shop_web&destination=shop_dbb", "invalid_input"),
    ],
)
def test_bad_questions(api: TestClient, query: str, code: str) -> None:
    """What cannot be asked is 400."""
    assert problem(api.get(f"/api/v1/decisions?{query}", headers=as_("viewer")))[:2] == (400, code)


@pytest.mark.parametrize("role", ["operator", "admin"])
def test_writers_write(api: TestClient, source: FakeSource, role: str) -> None:
    """Operators and admins make and end quarantines; the record says who, why and since when."""
    answer = api.post("/api/v1/quarantines", json=BODY, headers=as_(role))
    assert (answer.status_code, answer.json()["id"], answer.json()["is_closed"]) == (201, API, False)
    assert source.written == [
        QuarantineRecord(
            kind=QuarantineKind.SERVICE, id=API, name="shop_api", reason="behaves oddly", by=role, since=NOW
        )
    ]
    done = api.delete("/api/v1/quarantines/service/shop_api", headers=as_(role))
    assert (done.status_code, done.content) == (204, b"")
    assert source.written[1:] == [(QuarantineKind.SERVICE, API)]


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/api/v1/quarantines"), ("DELETE", "/api/v1/quarantines/service/shop_api")]
)
def test_viewers_do_not(api: TestClient, source: FakeSource, method: str, path: str) -> None:
    """A viewer's write is 403 and writes nothing; without a token it is 401."""
    answer = api.request(method, path, json=BODY, headers=as_("viewer"))
    told = "a token with role operator or admin is needed, this one is viewer"
    assert problem(answer) == (403, "forbidden", told)
    assert problem(api.request(method, path, json=BODY))[0] == 401
    assert source.written == []


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"kind": "service"}, "invalid_parameter"),
        ({"kind": "stack", "name": "shop"}, "invalid_parameter"),
        ({**BODY, "colour": "red"}, "invalid_parameter"),
        ({**BODY, "reason": "x" * 201}, "invalid_parameter"),
        ({**BODY, "reason": "two\nlines"}, "invalid_input"),
        ({**BODY, "name": "shop_apy"}, "invalid_input"),
    ],
)
def test_bad_bodies(api: TestClient, source: FakeSource, body: dict[str, str], code: str) -> None:
    """What cannot be shut out is 400, and nothing is written."""
    assert problem(api.post("/api/v1/quarantines", json=body, headers=as_("admin")))[:2] == (400, code)
    assert source.written == []


def test_release_of_what_is_not_held(api: TestClient) -> None:
    """It is 404, and says what is held."""
    answer = api.delete("/api/v1/quarantines/node/node-1", headers=as_("admin"))
    assert problem(answer) == (404, "not_found", "node node-1 is not quarantined; quarantined: service shop_api")


def test_list(api: TestClient) -> None:
    """The list says who, why, since when, and where it is in force; it can be asked for one."""
    answer = api.get("/api/v1/quarantines?kind=service&name=shop_api", headers=as_("viewer")).json()
    assert answer["items"] == [
        {
            "kind": "service",
            "id": API,
            "name": "shop_api",
            "reason": "odd",
            "by": "admin",
            "since": "2027-01-15T08:00:00Z",
            "is_closed": False,
            "closed_nodes": [],
            "open_nodes": {
                "node-1": "shop_api.1 is still a peer",
                "node-2": "shop_api.1 is open, shop_api.1 is still a peer",
                "node-3": "shop_api.1 is still a peer",
            },
            "unknown_nodes": [],
        }
    ]
    assert api.get("/api/v1/quarantines?kind=node", headers=as_("viewer")).json()["items"] == []


def test_every_write_is_audited(api: TestClient) -> None:
    """Each write leaves a line with who, what and why; it tells tokens apart and holds none of them."""
    with structlog.testing.capture_logs() as lines:
        for role in ("operator", "admin"):
            body = {"kind": "task", "name": "shop_web.1", "reason": "odd"}
            api.post("/api/v1/quarantines", json=body, headers=as_(role))
        api.delete("/api/v1/quarantines/service/shop_api", headers=as_("admin"))
        api.get("/api/v1/quarantines", headers=as_("admin"))
    audit = [line for line in lines if line["event"] == "audit"]
    made, ended = "create_quarantine", "delete_quarantine"
    wanted = [(made, "operator", WEB1), (made, "admin", WEB1), (ended, "admin", API)]
    assert [(line["action"], line["role"], line["id"]) for line in audit] == wanted
    assert [line["reason"] for line in audit] == ["odd", "odd", "odd"]
    marks = [line["token"] for line in audit]
    assert (len(set(marks)), marks[1] == marks[2], {len(mark) for mark in marks}) == (2, True, {8})
    assert all(line["request_id"] for line in audit)
    assert not [token for token in TOKENS.values() if token in str(lines)]


def test_a_store_that_is_away_is_told(tokens: TokenSet) -> None:
    """Where it cannot be written down the answer is 503, and the audit says that it failed."""

    class Away(FakeSource):
        def quarantine(self, record: QuarantineRecord) -> None:
            raise StoreUnavailable("etcd does not answer")

    app = create_app(Away(), tokens, "0.1.0", now=lambda: NOW)
    with structlog.testing.capture_logs() as lines:
        answer = TestClient(app).post("/api/v1/quarantines", json=BODY, headers=as_("admin"))
    assert problem(answer)[:2] == (503, "unavailable")
    told = [(line["result"], line["status"], line["name"]) for line in lines if line["event"] == "audit"]
    assert told == [("failed", 503, "shop_api")]


def test_the_audit_can_be_asked_for(api: TestClient) -> None:
    """Admins read who tried what, the newest first, refused writes included; reads are not in it."""
    api.post("/api/v1/quarantines", json=BODY, headers=as_("operator"))
    api.delete("/api/v1/quarantines/service/shop_api", headers=as_("viewer"))
    api.get("/api/v1/quarantines", headers=as_("viewer"))
    assert problem(api.get("/api/v1/audit", headers=as_("operator")))[0] == 403
    items = api.get("/api/v1/audit", headers=as_("admin")).json()["items"]
    fields = ("role", "action", "result", "status", "kind", "name", "reason", "path", "address", "time")
    assert [tuple(item[field] for field in fields) for item in items] == [
        ("viewer", "delete_quarantine", "refused", 403, "", "", "", "/api/v1/quarantines/service/shop_api",
         "testclient", "2027-01-15T08:00:00Z"),
        ("operator", "create_quarantine", "done", 201, "service", "shop_api", "behaves oddly", "/api/v1/quarantines",
         "testclient", "2027-01-15T08:00:00Z"),
    ]  # fmt: skip
    assert len(api.get("/api/v1/audit?limit=1", headers=as_("admin")).json()["items"]) == 1


def test_a_bug_in_a_write_is_audited(tokens: TokenSet) -> None:
    """What fails in a way that nobody thought of leaves its line, too."""

    class Buggy(FakeSource):
        def quarantine(self, record: QuarantineRecord) -> None:
            raise ZeroDivisionError

    api = TestClient(create_app(Buggy(), tokens, "0.1.0"), raise_server_exceptions=False)
    with structlog.testing.capture_logs() as lines:
        assert api.post("/api/v1/quarantines", json=BODY, headers=as_("admin")).status_code == 500
    assert [(it["result"], it["status"]) for it in lines if it["event"] == "audit"] == [("failed", 500)]


def test_silent_nodes_are_named(source: FakeSource, api: TestClient) -> None:
    """What an agent that does not answer holds is not confirmed."""
    source.silent = frozenset({NODE2})
    source.current = shop()
    answer = api.get("/api/v1/decisions?source=shop_web&destination=shop_api", headers=as_("viewer")).json()
    assert (answer["verdict"], answer["unknown_nodes"], answer["port"]) == ("allowed", ["node-2"], None)
