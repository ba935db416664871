"""The commands why, quarantine and release against a real server on loopback: what they print, and how they end."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import structlog
from test_cli import Command
from test_view_states import (
    API,
    API1,
    DB1,
    NODE2,
    NOW,
    WEB1,
    WEB2,
    FakeSource,
    interfaces,
    shop,
    shop_interfaces,
)

from controller.api.app import create_app
from controller.api.auth import TokenSet
from controller.api.server import ApiServer
from controller.cli.operations import read_destination
from hivewire.records import QuarantineKind, QuarantineRecord

TOKENS = {role: f"{role}-token-of-forty-characters-0123456789" for role in ("viewer", "operator", "admin")}
RECORD = QuarantineRecord(kind=QuarantineKind.SERVICE, id=API, name="shop_api", reason="odd", by="admin", since=NOW)


class Obedient(FakeSource):
    """Agents that close as soon as they are told, unless they are silent."""

    def quarantine(self, record: QuarantineRecord) -> None:
        super().quarantine(record)
        assert self.current is not None
        self.current = replace(self.current, quarantines=(record,))
        self.reports = {
            task: msgspec.structs.replace(it, quarantined=task == API1)
            for task, it in interfaces(alone=(WEB1, WEB2, API1, DB1)).items()
        }

    def release(self, kind: QuarantineKind, id_: str) -> None:
        super().release(kind, id_)
        assert self.current is not None
        self.current = replace(self.current, quarantines=())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "all").write_text("".join(f"{role}:{token}\n" for role, token in TOKENS.items()))
    for role, token in TOKENS.items():
        (folder / role).write_text(token)
    source = Obedient()
    server = ApiServer(create_app(source, TokenSet.load(folder / "all"), "0.1.0", now=lambda: NOW), "127.0.0.1", 0)
    server.start()
    yield Command(source, f"http://127.0.0.1:{server.port}", folder / "operator")
    server.stop()


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """The server runs in this process: its log is no output of the command."""
    with structlog.testing.capture_logs():
        yield


@pytest.fixture
def hivewire(server: Command) -> Command:
    """The command with an operator's token, against a mesh in which everything works."""
    server.source.current, server.source.reports = shop(), shop_interfaces()
    server.source.silent, server.source.written = frozenset(), []
    return replace(server)


ALLOWED = """\
ALLOWED  shop_web -> shop_api:8080/tcp
  1. √ mesh: both services are in the mesh (stack shop)
  2. √ quarantine: nobody is quarantined
  3. √ link: shop_web has a link to shop_api: 8080/tcp
  4. √ consent: same stack, none needed
  5. √ mode: shop_api enforces: the link's ports are open, and nothing else
  6. √ admission: 2 tasks of shop_web and 1 task of shop_api admitted
  7. √ interfaces: every task has its WireGuard interface
  8. √ peers: 2 of 2 pairs of tasks have each other as peers
  9. – rules: unknown: the agents do not say
 10. √ tunnel: last handshake 34 s ago
  encrypted by WireGuard, 2 x 1 tasks, newest handshake 34s, received 2.1 MB, sent 312 kB
  path shop_web.1@node-1 10.0.1.5 -> shop_api.1@node-2 10.0.1.5   \
underlay 192.0.2.1:51820 -> 192.0.2.1:51820   MTU 1420
"""  # noqa: RUF001

DENIED = """\
DENIED  shop_web -> shop_db:5432/tcp
  1. √ mesh: both services are in the mesh (stack shop)
  2. √ quarantine: nobody is quarantined
  3. × link: shop_web has none to shop_db
  4. – consent: same stack, none needed
  5. × mode: shop_db enforces: what no link allows is dropped
  6. – admission: not reached
  7. – interfaces: not reached
  8. – peers: not reached
  9. – rules: not reached
 10. – tunnel: not reached
To allow it:
  docker service update --label-add hivewire.links="db:5432" shop_web     (no task restarts)
"""  # noqa: RUF001


def test_allowed(hivewire: Command) -> None:
    """What passes ends with 0, and shows how."""
    done = hivewire("why", "shop_web", "shop_api:8080")
    assert (done.stdout, done.stderr, done.exit_code) == (ALLOWED, "", 0)


def test_denied(hivewire: Command) -> None:
    """What does not pass ends with 1, and shows the command that allows it; a viewer may ask."""
    viewer = replace(hivewire, token_file=hivewire.token_file.parent / "viewer")
    for done in (hivewire("why", "shop_web", "shop_db:5432"), viewer("-s", "shop", "why", "web", "db:5432/tcp")):
        assert (done.stdout, done.stderr, done.exit_code) == (DENIED, "", 1)


def test_broken(hivewire: Command) -> None:
    """What should pass and does not ends with 1, with what mends it."""
    hivewire.source.reports = {task: it for task, it in shop_interfaces().items() if task != API1}
    done = hivewire("why", "shop_web", "shop_api:8080")
    assert done.exit_code == 1
    assert done.stdout.splitlines()[0] == "BROKEN  shop_web -> shop_api:8080/tcp"
    assert "  7. × interfaces: shop_api.1 on node-2 has no WireGuard interface" in done.stdout  # noqa: RUF001
    assert done.stdout.splitlines()[-2] == "To mend it:"


def test_not_confirmed(hivewire: Command) -> None:
    """An agent that does not answer is named in the first line."""
    hivewire.source.silent = frozenset({NODE2})
    done = hivewire("why", "shop_web", "shop_api")
    first = "ALLOWED  shop_web -> shop_api   not confirmed: the agent on node-2 does not answer"
    assert (done.stdout.splitlines()[0], done.exit_code) == (first, 0)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("shop_wep", "shop_api"), 'hivewire: no service or task "shop_wep", did you mean "shop_web"?\n'),
        (("shop_web", "shop_api:http"), "hivewire: 'shop_api:http' is no destination; write NAME, NAME:PORT or "
         "NAME:PORT/udp\n"),
        (("shop_web", "shop_api:99999"), "hivewire: 'shop_api:99999' is no destination; write NAME, NAME:PORT or "
         "NAME:PORT/udp\n"),
    ],
)  # fmt: skip
def test_wrong_use(hivewire: Command, words: tuple[str, str], says: str) -> None:
    """An unknown name or a wrong port ends with 2."""
    done = hivewire("why", *words)
    assert (done.stdout, done.stderr, done.exit_code) == ("", says, 2)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("db", ("db", None, None)),
        ("billing/ledger:7000", ("billing/ledger", 7000, None)),
        ("shop_dns.1:53/udp", ("shop_dns.1", 53, "udp")),
        ("10.0.1.5:80/tcp", ("10.0.1.5", 80, "tcp")),
    ],
)
def test_destinations(text: str, read: tuple[str, int | None, str | None]) -> None:
    """A destination is a name, perhaps with port and protocol."""
    assert read_destination(text) == read


def test_quarantine_waits_until_it_is_closed(hivewire: Command) -> None:
    """It says on how many nodes it is closed and after how long; check and lists show it; release ends it."""
    done = hivewire("quarantine", "service", "shop_api", "--reason", "odd")
    assert (done.stderr, done.exit_code) == ("", 0)
    assert done.stdout.splitlines()[0] == "quarantined service shop_api"
    assert done.stdout.splitlines()[1].startswith("closed on 3 nodes in 0.")
    assert hivewire("quarantine", "ls").stdout == (
        "KIND      NAME       SINCE                  BY         CLOSED   REASON\n"
        "service   shop_api   2027-01-15T08:00:00Z   operator   3/3      odd\n"
    )
    assert "quarantined with service shop_api: odd" in hivewire("service", "ls").stdout
    assert "Quarantine  1 in force     -> hivewire quarantine ls" in hivewire("status").stdout
    assert "service shop_api is quarantined: odd" in hivewire("findings").stdout
    released = hivewire("release", "service", "shop_api")
    told = "released service shop_api: its links come back as its labels say\n"
    assert (released.stdout, released.exit_code) == (told, 0)
    assert hivewire("quarantine", "ls").stdout == "nobody is quarantined\n"
    assert len(hivewire.source.written) == 2


def test_quarantine_as_json(hivewire: Command) -> None:
    """The JSON form is the API's, with the time that it took."""
    answer = hivewire.json("quarantine", "task", "shop_api.1")
    assert isinstance(answer, dict)
    assert (answer["kind"], answer["name"], answer["is_closed"]) == ("task", "shop_api.1", True)
    assert answer["took_seconds"] >= 0


def test_quarantine_that_is_not_closed_in_time(hivewire: Command) -> None:
    """Where an agent does not answer the command ends with 5, names the node, and says that the quarantine stands."""
    hivewire.source.silent = frozenset({NODE2})
    done = hivewire("quarantine", "service", "shop_api", "--wait", "1s")
    assert (done.stdout, done.exit_code) == ("", 5)
    assert done.stderr == (
        "hivewire: the quarantine stands, but after 1s it is not closed everywhere: node-2: its agent does not answer\n"
    )


def test_quarantine_without_waiting(hivewire: Command) -> None:
    """With no time to wait it writes, says so, and ends well."""
    hivewire.source.silent = frozenset({NODE2})
    done = hivewire("quarantine", "node", "node-2", "--wait", "0s")
    assert (done.stdout, done.exit_code) == ("quarantined node node-2, not waiting until it is closed\n", 0)


def test_viewers_may_not(hivewire: Command) -> None:
    """A viewer's token ends with 4, and says which is needed."""
    viewer = replace(hivewire, token_file=hivewire.token_file.parent / "viewer")
    for words in (("quarantine", "service", "shop_api"), ("release", "service", "shop_api")):
        done = viewer(*words)
        assert (done.exit_code, "role operator or admin is needed" in done.stderr) == (4, True)
    assert viewer("quarantine", "ls").exit_code == 0
    assert hivewire.source.written == []


def test_release_of_what_is_not_held(hivewire: Command) -> None:
    """It ends with 1."""
    done = hivewire("release", "service", "shop_db")
    assert done.exit_code == 1
    assert done.stderr == "hivewire: service shop_db is not quarantined; quarantined: nothing\n"


def test_unknown_service(hivewire: Command) -> None:
    """A service that is not there ends with 2."""
    assert hivewire("quarantine", "service", "shop_apy").exit_code == 2


def test_no_token_is_read_from_elsewhere(tmp_path: Path, hivewire: Command) -> None:
    """Without a token it ends with 4."""
    assert replace(hivewire, token_file=tmp_path / "none")("why", "shop_web", "shop_api").exit_code == 4


def test_claims_and_audit(hivewire: Command) -> None:
    """Claims are a table for everybody; the audit is for admins, and shows what was refused as well."""
    lines = hivewire("claims").stdout.splitlines()
    assert lines[0].split() == ["TASK", "SERVICE", "NODE", "STATE"]
    assert lines[1].split() == ["shop_api.1", "shop_api", "node-2", "admitted"]
    assert (len(lines), hivewire("claims", "--refused").stdout) == (5, "no claims\n")
    hivewire("quarantine", "node", "node-1", "--reason", "odd", "--wait", "0s")
    assert hivewire("audit").exit_code == 4
    result = replace(hivewire, token_file=hivewire.token_file.parent / "admin")("audit", "-n", "1")
    assert result.exit_code == 0, result.stderr
    header, row = result.stdout.splitlines()
    assert header.split()[:5] == ["TIME", "ROLE", "TOKEN", "ADDRESS", "RESULT"]
    assert row.split()[3:] == ["127.0.0.1", "done", "create_quarantine", "node", "node-1", "odd"]
