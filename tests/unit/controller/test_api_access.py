"""Every route of the app against everybody who may come: the matrix is made from the routes themselves."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from test_view_states import FakeSource, shop

from controller.api.access import Role, Rule, find, rules
from controller.api.app import create_app
from controller.api.auth import MetricsAuth, TokenSet

TOKENS = {role: f"{role.value}-token-of-forty-characters-0123456789" for role in Role}
NOBODY, STRANGER = "no token", "bad token"
WHO = [NOBODY, STRANGER, *Role]

DECIDED: dict[tuple[str, str], Role | None] = {
    ("GET", "/livez"): None,
    ("GET", "/readyz"): None,
    ("GET", "/metrics"): Role.VIEWER,
    ("GET", "/api/openapi.json"): Role.VIEWER,
    ("GET", "/api/v1/version"): Role.VIEWER,
    ("GET", "/api/v1/status"): Role.VIEWER,
    ("GET", "/api/v1/findings"): Role.VIEWER,
    ("GET", "/api/v1/checks"): Role.VIEWER,
    ("GET", "/api/v1/denials"): Role.VIEWER,
    ("GET", "/api/v1/suggestions"): Role.VIEWER,
    ("GET", "/api/v1/services"): Role.VIEWER,
    ("GET", "/api/v1/services/{name}"): Role.VIEWER,
    ("GET", "/api/v1/links"): Role.VIEWER,
    ("GET", "/api/v1/links/{source}/{destination}"): Role.VIEWER,
    ("GET", "/api/v1/nodes"): Role.VIEWER,
    ("GET", "/api/v1/nodes/{name}"): Role.VIEWER,
    ("GET", "/api/v1/claims"): Role.VIEWER,
    ("GET", "/api/v1/decisions"): Role.VIEWER,
    ("GET", "/api/v1/quarantines"): Role.VIEWER,
    ("POST", "/api/v1/quarantines"): Role.OPERATOR,
    ("DELETE", "/api/v1/quarantines/{kind}/{name}"): Role.OPERATOR,
    ("GET", "/api/v1/audit"): Role.ADMIN,
}
"""What was decided; a route that is not here was not."""

ANSWERS = {
    ("GET", "/api/v1/decisions"): 400,  # its parameters are missing
    ("POST", "/api/v1/quarantines"): 400,  # so is its body
    ("DELETE", "/api/v1/quarantines/{kind}/{name}"): 404,  # nothing is held
}
"""What those who may use a route get here, if not 200."""

PARAMETERS = {"name": "shop_web", "source": "shop_web", "destination": "shop_api", "kind": "service"}


def app(tokens: TokenSet | None = None, metrics_auth: MetricsAuth = MetricsAuth.AUTO) -> FastAPI:
    return create_app(FakeSource(shop()), tokens or TokenSet.none(), "0.1.0", metrics_auth=metrics_auth)


RULES = rules(app())


@pytest.fixture
def tokens(tmp_path: Path) -> TokenSet:
    path = tmp_path / "tokens"
    path.write_text("".join(f"{role.value}:{token}\n" for role, token in TOKENS.items()))
    return TokenSet.load(path)


def expected(rule: Rule, who: str | Role) -> int:
    if rule.role is None or (isinstance(who, Role) and who.suffices(rule.role)):
        return ANSWERS.get((rule.method, rule.path), 200)
    return 403 if isinstance(who, Role) else 401


def headers(who: str | Role) -> dict[str, str]:
    if who == NOBODY:
        return {}
    return {"Authorization": f"Bearer {TOKENS[who] if isinstance(who, Role) else 'x' * 40}"}


def matrix() -> Iterator[object]:
    for rule in RULES:
        for who in WHO:
            name = who.value if isinstance(who, Role) else who
            yield pytest.param(rule, who, id=f"{rule.method} {rule.path} {name}")


@pytest.mark.parametrize(("rule", "who"), list(matrix()))
def test_every_route_for_everybody(tokens: TokenSet, rule: Rule, who: str | Role) -> None:
    """Exactly those whose role suffices get past the gate, whatever else is wrong with their request."""
    path = rule.path.format(**({"name": "node-1"} if "nodes" in rule.path else {}) or PARAMETERS)
    answer = TestClient(app(tokens)).request(rule.method, path, headers=headers(who))
    assert answer.status_code == expected(rule, who)


def test_every_route_was_decided_on() -> None:
    """A new route fails here until somebody has said who may use it; so does one whose role changes."""
    assert {(rule.method, rule.path): rule.role for rule in RULES} == DECIDED


def test_a_route_without_a_role_keeps_the_app_from_being_made() -> None:
    """Nothing is served by default."""
    made = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    made.get("/api/v1/new")(lambda: None)
    with pytest.raises(TypeError, match="/api/v1/new does not say which role"):
        rules(made)


@pytest.mark.parametrize(("method", "who", "status"), [
    ("GET", NOBODY, 401), ("GET", Role.VIEWER, 404), ("POST", Role.OPERATOR, 403), ("POST", Role.ADMIN, 404),
])  # fmt: skip
def test_what_is_no_route_takes_a_role_as_well(tokens: TokenSet, method: str, who: str | Role, status: int) -> None:
    """Nobody learns without a token what exists; a write that no rule covers takes the most."""
    assert TestClient(app(tokens)).request(method, "/api/v1/nothing", headers=headers(who)).status_code == status


@pytest.mark.parametrize(
    ("rule_path", "path"), [("/api/v1/services/{name}", "/api/v1/services/a_b"), (None, "/api/v1/services/a/b")]
)
def test_rules_are_found_by_path(rule_path: str | None, path: str) -> None:
    """A parameter is one part of a path."""
    found = find(RULES, "GET", path)
    assert (found.path if found else None) == rule_path


@pytest.mark.parametrize(
    ("setting", "address", "status"),
    [
        (MetricsAuth.AUTO, "127.0.0.1", 200),
        (MetricsAuth.AUTO, "192.0.2.1", 401),
        (MetricsAuth.ALWAYS, "127.0.0.1", 401),
        (MetricsAuth.NEVER, "192.0.2.1", 200),
    ],
)
def test_metrics_have_their_own_switch(tokens: TokenSet, setting: MetricsAuth, address: str, status: int) -> None:
    """Without a token they are for this machine, for nobody, or for everybody; nothing else opens with them."""
    api = TestClient(app(tokens, setting), client=(address, 1))
    assert api.get("/metrics").status_code == status
    assert api.get("/api/v1/status").status_code == 401
