"""The command line against a real server on loopback: what it prints, and how it ends."""

import json
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from test_view_states import (
    API1,
    DB1,
    NODE1,
    NOW,
    WEB1,
    FakeSource,
    agent,
    both,
    interfaces,
    shop,
    shop_interfaces,
    status,
)
from typer.testing import CliRunner, Result

from controller.api.app import create_app
from controller.api.auth import TokenSet
from controller.api.server import ApiServer
from controller.cli import client, main
from controller.state import Component, MeshState
from hivewire.records import TaskPhase

TOKEN = "correct-horse-battery-staple-0123456789"


@dataclass
class Command:
    """Runs ``hivewire`` in this process, against the server of the test."""

    source: FakeSource
    address: str
    token_file: Path

    def __call__(self, *args: str, **environment: str | None) -> Result:
        values = {"HIVEWIRE_ADDR": self.address, "HIVEWIRE_TOKEN_FILE": str(self.token_file), **environment}
        return CliRunner().invoke(main.app, [*args], env=values)

    def json(self, *args: str) -> object:
        return json.loads(self(*args, "-o", "json").stdout)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    path = tmp_path_factory.mktemp("tokens") / "admin_token"
    path.write_text(f"viewer:{TOKEN}\n")
    source = FakeSource()
    server = ApiServer(create_app(source, TokenSet.load(path), "0.1.0", now=lambda: NOW), "127.0.0.1", 0)
    server.start()
    yield Command(source, f"http://127.0.0.1:{server.port}", path)
    server.stop()


@pytest.fixture
def hivewire(server: Command) -> Command:
    """The command, against a mesh in which everything works."""
    server.source.current, server.source.reports = shop(), shop_interfaces()
    return replace(server)


def broken_shop() -> MeshState:
    """Only node-1 has an agent, nobody leads, one task failed and the others wait."""
    statuses = {WEB1: status(WEB1, TaskPhase.FAILED, "kernel refuses")}
    return shop(nodes={NODE1: agent(NODE1, 1)}, leader="", statuses=statuses)


STALE = interfaces(*both(WEB1, API1, 34, 5, 5), (API1, DB1, (None, 0, 999)), (DB1, API1, (None, 0, 0)))

GOLDEN = {
    "status": """\
Mesh        mesh-one   v0.1.0   mode enforce   revision 18211
Controller  leader node-1     Agents  3/3 up     Store  ok
Services    3 meshed / 5 total       Tasks   4/4 configured
Links       3   secure 1   idle 1   pending 1   stale 0
Denied      0 in the last 5 min
Findings    0 errors, 1 warning     -> hivewire findings
""",
    "service ls": """\
NAME       STACK   MODE      TASKS   IN   OUT   FINDINGS
shop_api   shop    enforce   1/1     1    2     1
shop_db    shop    enforce   1/1     1    0     0
shop_web   shop    enforce   2/2     0    1     0
""",
    "service ls --all -o wide": """\
NAME             STACK     MODE      TASKS   IN   OUT   FINDINGS   ID
billing_ledger   billing   -         0/0     1    0     0          svc-ledger
blog_page        blog      -         0/0     0    0     0          svc-page
shop_api         shop      enforce   1/1     1    2     1          svc-api
shop_db          shop      enforce   1/1     1    0     0          svc-db
shop_web         shop      enforce   2/2     0    1     0          svc-web
""",
    "service inspect shop_web": """\
shop_web   stack shop   mode enforce   tasks 2/2 configured
id svc-web   networks shop_app
    hivewire.links=api:8080

TASK         NODE     STATE        SERVING   INTERFACE   MTU    PEERS
shop_web.1   node-1   configured   yes       wg0         1420   1
shop_web.2   node-2   configured   yes       wg0         1420   1

SOURCE     DESTINATION   PORT       STATE    PEERS   HANDSHAKE   RX       TX
shop_web   shop_api      8080/tcp   secure   2/2     34s         2.1 MB   312 kB
""",
    "link ls": """\
SOURCE     DESTINATION      PORT       STATE     PEERS   HANDSHAKE   RX       TX
shop_api   billing_ledger   7000/tcp   pending   0/0     -           -        -        waits for hivewire.allow
shop_api   shop_db          5432/tcp   idle      1/1     6m          500 B    700 B
shop_web   shop_api         8080/tcp   secure    2/2     34s         2.1 MB   312 kB
""",
    "-s billing link ls": """\
SOURCE     DESTINATION      PORT       STATE     PEERS   HANDSHAKE   RX   TX
shop_api   billing_ledger   7000/tcp   pending   0/0     -           -    -    waits for hivewire.allow
""",
    "link ls --state secure -o wide": """\
SOURCE     DESTINATION   PORT       STATE    PEERS   HANDSHAKE   RX       TX       NETWORK    SECURE   STALE   UNKNOWN
shop_web   shop_api      8080/tcp   secure   2/2     34s         2.1 MB   312 kB   shop_app   2        0       0
""",
    "link inspect shop_web shop_api": """\
shop_web -> shop_api   ports 8080/tcp   networks shop_app
secure   2/2 pairs of tasks

SOURCE       NODE     DESTINATION   NODE     STATE    HANDSHAKE   RX       TX
shop_web.1   node-1   shop_api.1    node-2   secure   34s         2.1 MB   310 kB
shop_web.2   node-2   shop_api.1    node-2   secure   1m          1.0 kB   2.0 kB
""",
    "node ls": """\
HOSTNAME   ROLE      AGENT   VERSION   BACKEND   UNDERLAY    MTU    TASKS
node-1     manager   up      0.1.0     kernel    192.0.2.1   1500   1/1
node-2     worker    up      0.1.0     kernel    192.0.2.2   1500   2/2
node-3     worker    up      0.1.0     kernel    192.0.2.3   1500   1/1
""",
    "node inspect node-3": """\
node-3   worker   agent up 0.1.0   tasks 1/1 configured
id node-id-3   backend kernel   underlay 192.0.2.3 MTU 1500   UDP ports 51820-52819

TASK        NODE     STATE        SERVING   INTERFACE   MTU    PEERS
shop_db.1   node-3   configured   yes       wg0         1420   1
""",
    "findings": """\
Warning [HW301] (shop_api) link shop_api -> billing_ledger is waiting for consent
    add  hivewire.allow: "shop_api"  to billing_ledger
""",
    "check": """\
swarm
-----
√ the controller can read the Swarm
√ 3/3 nodes ready, 1 manager

nodes
-----
√ agent running on 3/3 nodes
√ agents have the controller's version (0.1.0)
√ kernel WireGuard on 3/3 nodes
√ agents answer the controller
√ 4/4 tasks configured

store
-----
√ the controller can read the store

controller
----------
√ node-1 leads

labels
------
√ 3 services enrolled, 3 links, no errors
‼ shop_api
    link shop_api -> billing_ledger is waiting for consent
    -> add  hivewire.allow: "shop_api"  to billing_ledger   [HW301]

links
-----
√ 3 links: 1 secure, 1 idle, 1 pending

Status: 0 failed, 1 warning, 11 ok
""",
    "healthcheck": "ok\n",
    "version": "client  0.1.0\nserver  0.1.0\n",
    "version --short": "0.1.0\n",
}

GOLDEN_BROKEN = {
    "node ls": """\
HOSTNAME   ROLE      AGENT     VERSION   BACKEND   UNDERLAY    MTU    TASKS
node-1     manager   up        0.1.0     kernel    192.0.2.1   1500   0/1
node-2     worker    missing   -         -         -           -      0/2
node-3     worker    missing   -         -         -           -      0/1
""",
    "link ls": """\
SOURCE     DESTINATION      PORT       STATE     PEERS   HANDSHAKE   RX    TX
shop_api   billing_ledger   7000/tcp   pending   0/0     -           -     -       waits for hivewire.allow
shop_api   shop_db          5432/tcp   stale     1/1     -           0 B   999 B   no answer: node-2 <-> node-3
shop_web   shop_api         8080/tcp   secure    1/2     34s         5 B   5 B     1 of 2 pairs of tasks are configured
""",
    "check": """\
swarm
-----
√ the controller can read the Swarm
√ 3/3 nodes ready, 1 manager

nodes
-----
× agent running on 1/3 nodes
    none on node-2, node-3
    -> look at the tasks of the agent's service: docker service ps   [HW402]
√ agents have the controller's version (0.1.0)
√ kernel WireGuard on 1/1 nodes
√ agents answer the controller
× 0/4 tasks configured
    shop_web.1 on node-1: kernel refuses
    -> read the log of the agent on that node

store
-----
√ the controller can read the store

controller
----------
× a controller leads
    nobody leads: changes are not applied, what is applied stays
    -> look at the tasks of the controller's service: docker service ps

labels
------
√ 3 services enrolled, 3 links, no errors
‼ shop_api
    link shop_api -> billing_ledger is waiting for consent
    -> add  hivewire.allow: "shop_api"  to billing_ledger   [HW301]

links
-----
× shop_api -> shop_db
    no answer: node-2 <-> node-3
    -> a firewall between these nodes may drop the UDP ports of the agents   [HW403]
‼ shop_web -> shop_api
    1 of 2 pairs of tasks are configured
    -> look at: hivewire link inspect

Status: 4 failed, 2 warnings, 7 ok
""",  # noqa: RUF001
}  # fmt: skip


@pytest.mark.parametrize("line", GOLDEN)
def test_output_is_as_written_here(hivewire: Command, line: str) -> None:
    """Each command prints its golden text on stdout, nothing on stderr, and ends with 0."""
    result = hivewire(*line.split())
    assert (result.stdout, result.stderr, result.exit_code) == (GOLDEN[line], "", 0)


@pytest.mark.parametrize("line", GOLDEN_BROKEN)
def test_output_of_a_broken_mesh_is_as_written_here(hivewire: Command, line: str) -> None:
    """A mesh that does not work is shown as it is; only check ends with 1."""
    hivewire.source.current, hivewire.source.reports = broken_shop(), STALE
    result = hivewire(*line.split())
    assert (result.stdout, result.exit_code) == (GOLDEN_BROKEN[line], 1 if line == "check" else 0)


def test_status_as_json(hivewire: Command) -> None:
    """JSON is the API's document."""
    assert hivewire.json("status") == {
        "mesh": "mesh-one",
        "version": "0.1.0",
        "mode": "enforce",
        "revision": 18211,
        "leader": "node-1",
        "is_leader": True,
        "agents": {"up": 3, "nodes": 3},
        "services": {"meshed": 3, "total": 5},
        "tasks": {"configured": 4, "expected": 4},
        "links": {"total": 3, "secure": 1, "idle": 1, "pending": 1, "stale": 0, "unknown": 0},
        "findings": {"error": 0, "warning": 1, "info": 0},
        "denied": {"count": 0, "period_seconds": 300, "top": None},
        "quarantines": 0,
        "components": [{"name": name, "is_ok": True, "detail": ""} for name in ("swarm", "store", "leader")],
    }


def test_lists_as_json(hivewire: Command) -> None:
    """A list is one page with all items."""
    answer = hivewire.json("-s", "shop", "service", "ls")
    assert isinstance(answer, dict)
    assert (answer["next_cursor"], answer["revision"]) == (None, 18211)
    assert answer["items"][0] == {
        "id": "svc-api",
        "name": "shop_api",
        "stack": "shop",
        "is_meshed": True,
        "mode": "enforce",
        "tasks_configured": 1,
        "tasks_expected": 1,
        "links_in": 1,
        "links_out": 2,
        "findings": 1,
        "quarantine": None,
    }
    links = hivewire.json("link", "ls")
    assert isinstance(links, dict)
    assert links["items"][1] == {
        "source": "shop_api",
        "destination": "shop_db",
        "ports": ["5432/tcp"],
        "state": "idle",
        "reason": "",
        "is_internal": False,
        "networks": ["shop_app"],
        "pairs_expected": 1,
        "pairs_configured": 1,
        "pairs_secure": 0,
        "pairs_stale": 0,
        "pairs_unknown": 0,
        "last_handshake": "2027-01-15T07:54:00Z",
        "handshake_age_seconds": 360.0,
        "received_bytes": 500,
        "sent_bytes": 700,
    }
    nodes = hivewire.json("node", "ls")
    assert isinstance(nodes, dict)
    assert nodes["items"][0] == {
        "id": "node-id-1",
        "hostname": "node-1",
        "role": "manager",
        "os": "linux",
        "is_ready": True,
        "engine_version": "28.2.2",
        "agent": "up",
        "agent_answers": True,
        "agent_version": "0.1.0",
        "backend": "kernel",
        "underlay_address": "192.0.2.1",
        "underlay_mtu": 1500,
        "tasks_configured": 1,
        "tasks_expected": 1,
        "quarantine": None,
    }


def test_check_as_json(hivewire: Command) -> None:
    """The report has success, readiness, and categories of checks."""
    report = hivewire.json("check")
    assert isinstance(report, dict)
    assert (report["success"], report["ready"], report["waiting_for"]) == (True, True, [])
    assert [it["categoryName"] for it in report["categories"]] == [
        "swarm", "nodes", "store", "controller", "labels", "links",
    ]  # fmt: skip
    assert report["categories"][4]["checks"][1] == {
        "description": "shop_api",
        "result": "warning",
        "error": "link shop_api -> billing_ledger is waiting for consent",
        "hint": 'add  hivewire.allow: "shop_api"  to billing_ledger',
        "code": "HW301",
    }


def test_long_lists_come_whole(hivewire: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """All pages are read, however long the list."""
    monkeypatch.setattr(client, "_PAGE", 2)
    answer = hivewire.json("service", "ls", "--all")
    assert isinstance(answer, dict)
    assert len(answer["items"]) == 5


@pytest.mark.parametrize("state", ["checks fail", "nothing answers", "state unknown"])
def test_waiting_ends_with_5(hivewire: Command, state: str) -> None:
    """When time is over the last thing that was waited for is told."""
    if state == "checks fail":
        hivewire.source.current = broken_shop()
    elif state == "nothing answers":
        hivewire.address = f"http://127.0.0.1:{free_port()}"
    else:
        hivewire.source.current = None
    result = hivewire("check", "--wait", "0s")
    assert result.exit_code == 5
    assert result.stderr.startswith("waiting: ")
    assert "hivewire: " in result.stderr


def test_waiting_ends_when_all_is_ready(hivewire: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command looks again until the report is ready, and says on stderr what it waits for."""
    hivewire.source.current = None

    def recover(_: float) -> None:
        hivewire.source.current = shop()

    monkeypatch.setattr("time.sleep", recover)
    result = hivewire("check", "--wait", "2m")
    assert (result.exit_code, result.stdout) == (0, GOLDEN["check"])
    assert result.stderr == "waiting: the Swarm has not been read yet\n"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("service inspect nope", 1, "there is no such service"),
        ("link inspect shop_web shop_db", 1, "there is no such link"),
        ("node inspect nope", 1, "there is no such node"),
        ("link ls --state x", 2, "state: Input should be"),
        ("check --wait soon", 2, "no duration; write 90s"),
        ("status --addr ftp://x", 2, "is no address"),
        ("status --addr http://192.0.2.1:9480", 2, "would send the token in clear"),
        ("status --token-file /nowhere", 4, "cannot be read: No such file"),
    ],
)
def test_failure_is_one_line_and_a_code(hivewire: Command, line: str, code: int, message: str) -> None:
    """A command that cannot answer prints one line on stderr and ends with the code for it."""
    result = hivewire(*line.split())
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (code, "", 1)
    assert result.stderr.startswith("hivewire: ")
    assert message in result.stderr


@pytest.mark.parametrize("line", ["nonsense", "status --colour", "service inspect", "-o yaml status"])
def test_wrong_use_ends_with_2(hivewire: Command, line: str) -> None:
    """What cannot be understood is wrong use."""
    assert hivewire(*line.split()).exit_code == 2


def test_unreachable_api_ends_with_3(hivewire: Command) -> None:
    """No answer is 3, and the message says what to set."""
    result = hivewire("status", HIVEWIRE_ADDR=f"http://127.0.0.1:{free_port()}")
    assert (result.exit_code, "HIVEWIRE_ADDR" in result.stderr) == (3, True)


def test_state_that_is_not_there_yet_ends_with_3(hivewire: Command) -> None:
    """A controller without a reading cannot answer."""
    hivewire.source.current = None
    result = hivewire("status")
    assert (result.exit_code, result.stderr) == (3, "hivewire: the Swarm has not been read yet\n")


def test_wrong_token_ends_with_4_and_is_not_shown(hivewire: Command, tmp_path: Path) -> None:
    """A token that the API does not know is 4; neither stream holds it."""
    wrong = "wrong-horse-battery-staple-0123456789-x"
    (tmp_path / "wrong").write_text(wrong)
    result = hivewire("status", "--token-file", str(tmp_path / "wrong"))
    assert (result.exit_code, wrong in result.output) == (4, False)
    assert "--token-file" in result.stderr


@pytest.mark.parametrize("content", ["", "\n", "ü"])
def test_file_without_a_token_ends_with_4(hivewire: Command, tmp_path: Path, content: str) -> None:
    """An empty or strange token file is told as such."""
    (tmp_path / "empty").write_text(content)
    result = hivewire("status", "--token-file", str(tmp_path / "empty"))
    assert (result.exit_code, "holds no token" in result.stderr) == (4, True)


def test_token_is_found_where_the_controller_puts_it(
    hivewire: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a setting the first default file that exists is taken; without one the message names them."""
    monkeypatch.setattr(client, "DEFAULT_TOKEN_FILES", (tmp_path / "nope", hivewire.token_file))
    assert hivewire("status", HIVEWIRE_TOKEN_FILE=None).exit_code == 0
    monkeypatch.setattr(client, "DEFAULT_TOKEN_FILES", (tmp_path / "nope",))
    result = hivewire("status", HIVEWIRE_TOKEN_FILE=None)
    assert (result.exit_code, "nope" in result.stderr) == (4, True)


def test_healthcheck_needs_no_token_and_says_no(hivewire: Command) -> None:
    """A controller that is not ready, or not there, is 1 with one line."""
    hivewire.source.current = shop(components=(Component("store", False, "x"),))
    result = hivewire("healthcheck", HIVEWIRE_TOKEN_FILE="/nowhere")
    assert (result.exit_code, result.stdout) == (1, "not ready: store\n")
    result = hivewire("healthcheck", HIVEWIRE_ADDR=f"http://127.0.0.1:{free_port()}")
    assert (result.exit_code, result.stdout.count("\n")) == (1, 1)


def test_version_without_a_server_still_tells_its_own(hivewire: Command) -> None:
    """The client's version is printed whatever the server does."""
    result = hivewire("version", HIVEWIRE_ADDR=f"http://127.0.0.1:{free_port()}")
    assert (result.exit_code, result.stdout) == (3, "client  0.1.0\n")


def test_interrupt_ends_with_130(hivewire: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while waiting is 130."""
    hivewire.source.current = None

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)
    assert hivewire("check", "--wait", "2m").exit_code == 130


def test_unknown_traffic_is_a_dash(hivewire: Command) -> None:
    """Where agents do not answer no number is shown."""
    hivewire.source.reports = {}
    row = hivewire("link", "ls", "--state", "unknown").stdout.splitlines()[1]
    assert row.split()[3:8] == ["unknown", "0/1", "-", "-", "-"]


def test_bug_of_the_controller_tells_its_request(hivewire: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure inside the controller is 3, with the id to look for in its log."""
    monkeypatch.setattr(hivewire.source, "interfaces", lambda: 1 / 0)
    result = hivewire("status")
    assert (result.exit_code, result.stderr.count("\n")) == (3, 1)
    assert re.search(r"\(request [0-9a-f]{32}\)$", result.stderr.strip())
