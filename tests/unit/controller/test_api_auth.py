"""Who may use the API, and that a token is never to be seen."""

import os
import re
import stat
from pathlib import Path

import pytest
import structlog
from fastapi.testclient import TestClient
from test_view_states import BASE_ROUTES, FakeSource

from controller.api.access import Role
from controller.api.app import create_app
from controller.api.auth import FAILURE_WINDOW_S, MAX_FAILURES, Failures, TokenSet, counted_as, ensure_token, is_local
from controller.api.server import ApiServer
from hivewire.errors import InvalidSettings

ONE = "first-token-0123456789-0123456789-abc"
TWO = "second-token-0123456789-0123456789-ab"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "admin_token", ONE + "\n")


def connect(path: Path) -> TestClient:
    return TestClient(create_app(FakeSource(), TokenSet.load(path), "0.1.0"))


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize("route", [*BASE_ROUTES, "/nothing", ""])
def test_everything_below_api_needs_a_token(path: Path, route: str) -> None:
    """Without a token every path is 401 with a challenge, also one that does not exist."""
    answer = connect(path).get(f"/api/v1{route}")
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("route", ["/api", "/api/", "/api/openapi.json", "/%61pi/v1/status"])
def test_no_other_spelling_gets_round_the_gate(path: Path, route: str) -> None:
    """The document and escaped paths need a token as well."""
    assert connect(path).get(route).status_code == 401


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", f"Basic {ONE}", ONE, f"Bearer {ONE}x", f"Bearer {ONE[:-1]}"]
)
def test_wrong_header_is_refused(path: Path, header: str) -> None:
    """Anything but the scheme Bearer with the exact token is 401."""
    assert connect(path).get("/api/v1/status", headers={"Authorization": header}).status_code == 401


def test_scheme_is_read_in_any_case(path: Path) -> None:
    """Schemes of authentication have no case."""
    assert connect(path).get("/api/v1/status", headers={"Authorization": f"bearer {ONE}"}).status_code == 200


def test_two_tokens_are_good_at_once(tmp_path: Path) -> None:
    """A file with two lines lets both in, with their roles."""
    tokens = TokenSet.load(write(tmp_path / "t", f"{ONE}\n\nviewer:{TWO}\n"))
    assert (tokens.role(ONE.encode()), tokens.role(TWO.encode()), tokens.role(b"x")) == (Role.ADMIN, Role.VIEWER, None)


def test_changed_file_is_read_again(path: Path) -> None:
    """A new token counts from the next request on, the old one no longer."""
    tokens = TokenSet.load(path)
    write(path, TWO + "\nmore-" + TWO)
    assert (tokens.role(ONE.encode()), tokens.role(TWO.encode())) == (None, Role.ADMIN)


@pytest.mark.parametrize("broken", ["", "short", None])
def test_bad_change_keeps_the_old_tokens(path: Path, broken: str | None) -> None:
    """A file that is gone or cannot be used changes nothing, until it is good again."""
    tokens = TokenSet.load(path)
    path.unlink()
    if broken is not None:
        write(path, broken)
    assert tokens.role(ONE.encode()) is Role.ADMIN
    write(path, TWO)
    assert (tokens.role(ONE.encode()), tokens.role(TWO.encode())) == (None, Role.ADMIN)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "holds no token"),
        ("\n \n", "holds no token"),
        ("secretsecret", "line 1: the token has 12 characters, at least 32"),
        (f"{ONE}\nadmin:secretsecret", "line 2: the token has 12"),
        (f"secretsecret:{ONE}", "line 1: before the colon stands no role"),
        (f"{ONE} secretsecret", "line 1: a token is of printable"),
        (ONE + "\u00e9", "line 1: a token is of printable"),
    ],
)
def test_unusable_file_is_refused_without_its_text(tmp_path: Path, text: str, reason: str) -> None:
    """The error names line and reason, and nothing of what stands there."""
    with pytest.raises(InvalidSettings, match=re.escape(reason)) as caught:
        TokenSet.load(write(tmp_path / "t", text))
    assert "secretsecret" not in str(caught.value)
    assert ONE not in str(caught.value)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    """A path without a file is a setting to correct."""
    with pytest.raises(InvalidSettings, match="cannot be read: No such file"):
        TokenSet.load(tmp_path / "nope")


def test_made_token_is_private_good_and_kept(tmp_path: Path) -> None:
    """A token is made once, for the owner only, and nothing else stays in the folder."""
    path = tmp_path / "hivewire" / "admin_token"
    assert ensure_token(path)
    first = path.read_text()
    assert not ensure_token(path)
    assert path.read_text() == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == ["admin_token"]
    assert TokenSet.load(path).role(first.strip().encode()) is Role.ADMIN


def test_token_that_cannot_be_made_is_a_setting(tmp_path: Path) -> None:
    """A place that cannot be written to is told with its path."""
    blocked = write(tmp_path / "file", "")
    with pytest.raises(InvalidSettings, match="no token can be made"):
        ensure_token(blocked / "admin_token")


def test_wrong_tokens_are_limited_per_client() -> None:
    """After five wrong tokens a client waits for a minute; others do not."""
    now = [0.0]
    failures = Failures(lambda: now[0])
    for _ in range(MAX_FAILURES):
        assert failures.wait_s("10.0.0.1") == 0
        failures.add("10.0.0.1")
    assert (failures.wait_s("10.0.0.1"), failures.wait_s("10.0.0.2")) == (FAILURE_WINDOW_S, 0)
    now[0] = FAILURE_WINDOW_S - 0.5
    assert failures.wait_s("10.0.0.1") == 1
    now[0] = FAILURE_WINDOW_S
    assert failures.wait_s("10.0.0.1") == 0


def test_clients_in_memory_are_limited() -> None:
    """A thousand addresses cannot fill the memory."""
    failures = Failures(lambda: 0.0)
    for number in range(3000):
        failures.add(str(number))
    assert len(failures._times) == 1024


def test_sixth_wrong_token_is_429_also_for_the_right_one(path: Path) -> None:
    """A client that guessed too often is not even asked; a missing token is no guess."""
    api = connect(path)
    for _ in range(10):
        assert api.get("/api/v1/status").status_code == 401
    for _ in range(MAX_FAILURES):
        assert api.get("/api/v1/status", headers=bearer("wrong")).status_code == 401
    answer = api.get("/api/v1/status", headers=bearer(ONE))
    assert (answer.status_code, answer.json()["code"]) == (429, "rate_limited")
    assert int(answer.headers["retry-after"]) > 0
    assert api.get("/livez").status_code == 200


def test_no_token_is_ever_shown(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither answers, nor headers, log lines or representations hold a token, good or wrong."""
    tokens = TokenSet.load(path)
    api = TestClient(create_app(FakeSource(), tokens, "0.1.0"), raise_server_exceptions=False)
    wrong = TWO.replace("second", "secret")
    with structlog.testing.capture_logs() as logs:
        answers = [
            api.get("/api/v1/status", headers=bearer(ONE)),
            api.get("/api/v1/status", headers=bearer(wrong)),
            api.get("/api/v1/status", headers={"Authorization": wrong}),
            api.get(f"/api/v1/status?token={wrong}", headers=bearer(ONE)),
            api.get(f"/api/v1/links?{wrong}", headers=bearer(ONE)),
            api.get(f"/api/v1/links?limit={wrong}", headers=bearer(ONE)),
            api.get(f"/api/v1/links?cursor={wrong}", headers=bearer(ONE)),
        ]
        write(path, "broken")
        api.get("/api/v1/status", headers=bearer(ONE))
    seen = [answer.text + str(answer.headers) for answer in answers]
    everything = "\n".join([*seen, repr(tokens), str(logs), *capfd.readouterr()])
    assert [log["event"] for log in logs] == ["auth.failed", "auth.failed", "auth.tokens_kept"]
    assert ONE not in everything
    assert wrong not in everything


@pytest.mark.parametrize("address", [("127.0.0.1", 1), ("::1", 1), None])
def test_on_this_machine_the_right_token_is_never_locked_out(path: Path, address: tuple[str, int] | None) -> None:
    """Over loopback and the unix socket guesses are limited as well, but a good token counts all the same."""
    app = create_app(FakeSource(), TokenSet.load(path), "0.1.0")
    api = TestClient(app, client=address)  # type: ignore[arg-type]
    seen = [api.get("/api/v1/status", headers=bearer("wrong")).status_code for _ in range(MAX_FAILURES + 1)]
    assert seen == [401] * MAX_FAILURES + [429]
    assert api.get("/api/v1/status", headers=bearer(ONE)).status_code == 200


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("local", "local"),
    ],
)
def test_who_has_a_network_has_one_budget(address: str, name: str) -> None:
    """Guesses count per IPv4 address and per IPv6 network, whatever way the address is written."""
    assert counted_as(address) == name


@pytest.mark.parametrize(
    ("address", "is_here"), [("local", True), ("127.0.0.9", True), ("10.0.0.1", False), ("x", False)]
)
def test_what_is_this_machine(address: str, is_here: bool) -> None:
    """Only loopback and the unix socket are."""
    assert is_local(address) is is_here


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "example.net", ""])
def test_plain_http_is_for_loopback_only(path: Path, host: str) -> None:
    """An address that others can reach is refused at once."""
    with pytest.raises(InvalidSettings, match="loopback"):
        ApiServer(create_app(FakeSource(), TokenSet.load(path), "0.1.0"), host, 0)


def test_taken_port_is_a_setting(path: Path) -> None:
    """A second server on one port says which setting to change."""
    app = create_app(FakeSource(), TokenSet.load(path), "0.1.0")
    first = ApiServer(app, "127.0.0.1", 0)
    first.start()
    try:
        with pytest.raises(InvalidSettings, match=f"port {first.port}: Address already in use; choose another"):
            ApiServer(app, "127.0.0.1", first.port).start()
    finally:
        first.stop()
