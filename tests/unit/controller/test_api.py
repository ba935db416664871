"""The admin API over a fake source: every route, who gets in, pages, and errors."""

import base64
import json
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from test_view_states import BASE_ROUTES, NOW, FakeSource, shop

from controller.api.app import create_app
from controller.api.auth import TokenSet
from hivewire.errors import InvalidInput, StoreUnavailable

TOKEN = "correct-horse-battery-staple-0123456789"


class Broken(FakeSource):
    """Fails with the error that it was given."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def state(self) -> object:  # type: ignore[override]
        raise self.error


@pytest.fixture
def tokens(tmp_path: Path) -> TokenSet:
    path = tmp_path / "admin_token"
    path.write_text(TOKEN + "\n")
    return TokenSet.load(path)


def connect(source: FakeSource, tokens: TokenSet, *, token: str | None = TOKEN) -> TestClient:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    app = create_app(source, tokens, "0.1.0", now=lambda: NOW)
    return TestClient(app, headers=headers, raise_server_exceptions=False)


@pytest.fixture
def api(tokens: TokenSet) -> TestClient:
    return connect(FakeSource(), tokens)


@pytest.mark.parametrize("path", BASE_ROUTES)
def test_every_route_answers_and_is_documented(api: TestClient, path: str) -> None:
    """Each route gives JSON, and the OpenAPI document knows it."""
    answer = api.get(f"/api/v1{path}")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-request-id"]
    known = [p.removeprefix("/api/v1").split("/") for p in api.get("/api/openapi.json").json()["paths"]]
    parts = path.split("/")
    assert any(
        len(parts) == len(other) and all(a == b or b.startswith("{") for a, b in zip(parts, other, strict=True))
        for other in known
    )


def test_documents_hold_what_the_view_says(api: TestClient) -> None:
    """Fields arrive under their names, times in RFC 3339 and enumerations as words."""
    link = api.get("/api/v1/links/shop_web/shop_api").json()
    assert (link["state"], link["last_handshake"], link["ports"]) == ("secure", "2027-01-15T07:59:26Z", ["8080/tcp"])
    assert api.get("/api/v1/version").json() == {"version": "0.1.0", "api_version": "v1"}
    assert api.get("/api/v1/checks").json()["categories"][0]["categoryName"] == "swarm"


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", 3),
        ("stack=shop", 3),
        ("stack=billing", 1),
        ("stack=nowhere", 0),
        ("source=shop_web", 1),
        ("destination=shop_db", 1),
        ("state=pending", 1),
        ("state=secure&source=shop_api", 0),
        ("internal=true", 0),
    ],
)
def test_links_are_filtered(api: TestClient, query: str, expected: int) -> None:
    """Every filter of the list of links does what its name says; several go together."""
    assert len(api.get(f"/api/v1/links?{query}").json()["items"]) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("services?stack=shop", ["shop_api", "shop_db", "shop_web"]),
        ("services?meshed=false", ["billing_ledger", "blog_page"]),
        ("services?meshed=true&limit=1", ["shop_api"]),
    ],
)
def test_services_are_filtered(api: TestClient, path: str, expected: list[str]) -> None:
    """Services can be asked for by stack, and by being in the mesh."""
    assert [it["name"] for it in api.get(f"/api/v1/{path}").json()["items"]] == expected


def test_findings_are_filtered(api: TestClient) -> None:
    """Findings can be asked for by stack and severity."""
    counts = [len(api.get(f"/api/v1/findings?{query}").json()["items"]) for query in ("", "stack=shop", "stack=blog")]
    assert counts == [1, 1, 0]
    assert api.get("/api/v1/findings?severity=error").json()["items"] == []


@pytest.mark.parametrize("path", ["services", "links", "nodes", "findings"])
def test_pages_put_together_are_the_whole_list(api: TestClient, path: str) -> None:
    """Following next_cursor item by item gives every item once, in the order of the whole list."""
    whole = api.get(f"/api/v1/{path}").json()
    assert (whole["next_cursor"], whole["revision"]) == (None, 18211)
    items, cursor = [], ""
    while True:
        page = api.get(f"/api/v1/{path}?limit=1" + (f"&cursor={cursor}" if cursor else "")).json()
        items += page["items"]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert items == whole["items"]


@pytest.mark.parametrize(
    "cursor", ["x", "%%%", base64.b64encode(b"{}").decode(), base64.b64encode(b"[1]").decode(), "é", "bnVsbA"]
)
def test_cursor_that_was_not_given_out_is_refused(api: TestClient, cursor: str) -> None:
    """A made-up cursor is a clear 400."""
    answer = api.get("/api/v1/links", params={"cursor": cursor})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_cursor")


@pytest.mark.parametrize("path", [*BASE_ROUTES, "/../openapi.json"])
def test_unknown_parameter_is_refused(api: TestClient, path: str) -> None:
    """A parameter that a route does not know is 400, with its name."""
    answer = api.get(f"/api/v1{path}?colour=red" if path[1] != "." else "/api/openapi.json?colour=red")
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_parameter")
    assert answer.json()["errors"] == [{"parameter": "colour", "detail": "unknown parameter"}]


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "state=broken", "internal=perhaps"])
def test_bad_value_is_refused_and_named(api: TestClient, query: str) -> None:
    """A value outside of what the route takes is 400 and names the parameter."""
    problem = api.get(f"/api/v1/links?{query}").json()
    assert (problem["status"], problem["errors"][0]["parameter"]) == (400, query.partition("=")[0])


@pytest.mark.parametrize(
    ("path", "method", "status", "code"),
    [
        ("/api/v1/services/nope", "GET", 404, "not_found"),
        ("/api/v1/nodes/nope", "GET", 404, "not_found"),
        ("/api/v1/links/shop_web/nope", "GET", 404, "not_found"),
        ("/api/v1/nothing", "GET", 404, "not_found"),
        ("/docs", "GET", 404, "not_found"),
        ("/redoc", "GET", 404, "not_found"),
        ("/api/v1/links", "POST", 405, "method_not_allowed"),
    ],
)
def test_errors_are_problems(api: TestClient, path: str, method: str, status: int, code: str) -> None:
    """Every error is problem+json with all members, the message repeating the detail."""
    answer = api.request(method, path)
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.status_code, problem["status"], problem["code"], problem["instance"]) == (status, status, code, path)
    assert problem["message"] == problem["detail"]
    assert problem["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (StoreUnavailable("etcd does not answer"), 503, "unavailable"),
        (InvalidInput("no"), 400, "invalid_input"),
        (ZeroDivisionError("secret detail"), 500, "internal"),
    ],
)
def test_error_of_the_source_is_a_problem(tokens: TokenSet, error: Exception, status: int, code: str) -> None:
    """Our own errors keep their text; a bug shows nothing but a request id."""
    answer = connect(Broken(error), tokens).get("/api/v1/status")
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert "secret detail" not in answer.text
    assert ("retry-after" in answer.headers) == (status == 503)


def test_before_the_first_reading_nothing_is_made_up(tokens: TokenSet) -> None:
    """Without a state the API says that it is unavailable, and the probes that they wait."""
    api = connect(FakeSource(current=None), tokens)
    assert api.get("/api/v1/links").status_code == 503
    assert api.get("/readyz").json()["detail"] == "not ready: state"
    assert api.get("/livez").status_code == 200


def test_probes_need_no_token_and_tell_no_details(tokens: TokenSet) -> None:
    """/readyz names the parts that fail; why is for those with a token."""
    good, bad = shop(), shop(components=(*shop().components[:2], *bad_store()))
    api = connect(FakeSource(good), tokens, token=None)
    assert (api.get("/livez").text, api.get("/readyz").text) == ("ok\n", "ok\n")
    assert api.get("/readyz?verbose").text == "[+] swarm\n[+] store\n[+] leader\nok\n"
    api = connect(FakeSource(bad), tokens, token=None)
    assert (api.get("/readyz").status_code, api.get("/readyz").json()["code"]) == (503, "not_ready")
    verbose = api.get("/readyz?verbose")
    assert (verbose.status_code, "10.0.0.1" in verbose.text) == (503, False)
    assert verbose.text.endswith("[-] etcd\nnot ready: etcd\n")


def bad_store() -> tuple[object, ...]:
    from controller.state import Component

    return (Component("etcd", False, "10.0.0.1 does not answer"),)


def test_stale_link_is_noticed_between_requests(tokens: TokenSet) -> None:
    """The API remembers what a silent end had sent, so that the next request sees whether sending went on."""
    from test_view_states import API1, DB1, both, interfaces

    source = FakeSource(reports=interfaces(*both(API1, DB1, 360, 1, 700)))
    api = connect(source, tokens)
    path = "/api/v1/links/shop_api/shop_db"
    assert api.get(path).json()["state"] == "idle"
    source.reports = interfaces(*both(API1, DB1, 360, 1, 7000))
    assert api.get(path).json()["state"] == "stale"


def test_answers_are_plain_json(api: TestClient) -> None:
    """No answer holds a key of WireGuard or the token."""
    for path in BASE_ROUTES:
        text = json.dumps(api.get(f"/api/v1{path}").json())
        assert TOKEN not in text
        assert "public_key" not in text
