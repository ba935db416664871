"""What tasks noted, joined to names: by tables of reports over the shop."""

from collections.abc import Mapping
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import msgspec
import pytest
from fastapi.testclient import TestClient
from test_view_states import (
    API,
    API1,
    APP,
    DB,
    DB1,
    NOW,
    PAGE,
    PLACES,
    WEB1,
    WEB2,
    FakeSource,
    peer,
    shop,
    swarm,
)

from controller import denials
from controller.api.app import create_app
from controller.api.auth import TokenSet
from controller.api.shapes import DenialView
from controller.cli import render
from controller.cli.main import new_denials
from controller.state import MeshState
from hivewire.ids import ServiceId, TaskId
from hivewire.reports import DenialEntry, Direction, FlowEntry, Reason, TaskDenials

TOKEN = "correct-horse-battery-staple-0123456789"
ADDRESSES = {WEB1: "10.0.1.11", WEB2: "10.0.1.12", API1: "10.0.1.21", DB1: "10.0.1.31"}
DB_VIP, BALANCER, ELSEWHERE = "10.0.1.30", "10.0.1.4", "192.0.2.7"
IN, OUT = Direction.IN, Direction.OUT


def state() -> MeshState:
    """The shop with an address for each task, a VIP for db, and its network's subnet."""
    made = swarm()
    services = {id_: replace(it, networks=(APP,)) for id_, it in made.services.items()}
    services[DB] = replace(services[DB], vips={APP: IPv4Address(DB_VIP)})
    networks = {APP: replace(made.networks[APP], subnets=(IPv4Network("10.0.1.0/24"),))}
    peers = {id_: _at(id_) for id_ in PLACES}
    return shop(swarm=replace(made, services=services, networks=networks), peers=peers)


def _at(task: TaskId) -> object:
    return msgspec.structs.replace(peer(task), addresses={APP: IPv4Address(ADDRESSES[task])})


def attempt(
    source: str,
    destination: str,
    port: int = 5432,
    count: int = 3,
    *,
    direction: Direction = IN,
    reason: Reason = Reason.NO_LINK,
    dropped: bool = True,
    protocol: int = 6,
    first: float = 100.0,
    last: float = 10.0,
) -> DenialEntry:
    """``first`` and ``last``: how long ago; every minute of it has the same share, the rest is in the last one."""
    minutes = ((int(NOW - last) // 60, count),)
    return DenialEntry(
        direction=direction,
        reason=reason,
        dropped=dropped,
        source=source,
        destination=destination,
        protocol=protocol,
        port=port,
        count=count,
        first_seen=NOW - first,
        last_seen=NOW - last,
        minutes=minutes,
    )


GUARD = ServiceId("")


def noted(
    task: TaskId, *entries: DenialEntry, flows: tuple[FlowEntry, ...] = (), service: ServiceId | None = None
) -> TaskDenials:
    owner = PLACES[task][0] if service is None else service
    return TaskDenials(task=task, service=owner, counters={}, unlisted=0, entries=entries, flows=flows)


def told(*reports: TaskDenials, since: float | None = None) -> list[tuple[str, str, int, bool, int]]:
    found = denials.rows(state(), reports, NOW, since)
    return [(it.source, it.destination, it.port, it.dropped, it.count) for it in found]


WEB_DB = (ADDRESSES[WEB1], ADDRESSES[DB1])
CASES: Mapping[str, tuple[tuple[TaskDenials, ...], list[tuple[str, str, int, bool, int]]]] = {
    "a task's address is its service": (
        (noted(DB1, attempt(*WEB_DB)),), [("shop_web", "shop_db", 5432, True, 3)],
    ),
    "a VIP is its service": (
        (noted(WEB1, attempt(ADDRESSES[WEB1], DB_VIP, direction=OUT)),), [("shop_web", "shop_db", 5432, True, 3)],
    ),
    "nobody's address stays one": (
        (noted(DB1, attempt(ELSEWHERE, ADDRESSES[DB1])),), [(ELSEWHERE, "shop_db", 5432, True, 3)],
    ),
    "tasks of one service are summed": (
        (noted(DB1, attempt(*WEB_DB), attempt(ADDRESSES[WEB2], ADDRESSES[DB1], count=4)),),
        [("shop_web", "shop_db", 5432, True, 7)],
    ),
    "what both ends let pass counts once": (
        (
            noted(DB1, attempt(*WEB_DB, count=5, dropped=False)),
            noted(WEB1, attempt(*WEB_DB, count=5, dropped=False, direction=OUT)),
        ),
        [("shop_web", "shop_db", 5432, False, 5)],
    ),
    "what one end lets go and the other drops is dropped": (
        (noted(DB1, attempt(*WEB_DB, count=9)), noted(WEB1, attempt(*WEB_DB, dropped=False, direction=OUT))),
        [("shop_web", "shop_db", 5432, True, 9)],
    ),
    "a change of mode leaves two rows": (
        (noted(DB1, attempt(*WEB_DB, count=2), attempt(*WEB_DB, count=4, dropped=False)),),
        [("shop_web", "shop_db", 5432, False, 4), ("shop_web", "shop_db", 5432, True, 2)],
    ),
    "an answer that is dropped on its way in belongs to its connection": (
        (noted(WEB1, attempt(*WEB_DB, direction=IN)),), [("shop_web", "shop_db", 5432, True, 3)],
    ),
    "a task that has ended is known by its service": (
        (noted(TaskId("gone"), attempt(ADDRESSES[WEB1], "10.0.1.99"), service=API),),
        [("shop_web", "shop_api", 5432, True, 3)],
    ),
    "what kernels tell each other is nobody's attempt": (
        (noted(WEB1, attempt(ADDRESSES[WEB1], "224.0.0.22", 0, direction=OUT, protocol=2)),), [],
    ),
    "a network's guard stands between two ends": (
        (
            noted(TaskId("1-abc"), attempt(*WEB_DB), attempt(*WEB_DB, count=2, direction=OUT), service=GUARD),
            noted(TaskId("2-abc"), attempt(*WEB_DB, count=4), service=GUARD),
        ),
        [("shop_web", "shop_db", 5432, True, 9)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_addresses_become_names(name: str) -> None:
    """Ends, port, outcome and count are those of the table."""
    reports, expected = CASES[name]
    assert told(*reports) == expected


@pytest.mark.parametrize(
    ("since", "expected"),
    [(None, 3), (NOW - 1000, 3), (NOW - 50, 3), (NOW - 5, 0)],
)
def test_since_counts_what_came_later(since: float | None, expected: int) -> None:
    """The count is of the time asked for, in whole minutes; what was seen last before it is left out."""
    found = told(noted(DB1, attempt(*WEB_DB, first=3000)), since=since)
    assert sum(count for *_, count in found) == expected


def test_since_looks_at_minutes() -> None:
    """Of attempts over a long time only those in the minutes asked for are counted."""
    minute = int(NOW) // 60
    long = msgspec.structs.replace(
        attempt(*WEB_DB, count=100, first=3000), minutes=((minute - 30, 60), (minute - 2, 30), (minute - 1, 10))
    )
    assert [count for *_, count in told(noted(DB1, long), since=NOW - 150)] == [40]


def test_a_balancer_is_explained() -> None:
    """An address of an overlay network that is no task's gets a word about what it may be; others get none."""
    near, far = (
        denials.rows(state(), [noted(DB1, attempt(source, ADDRESSES[DB1]))], NOW) for source in (BALANCER, ELSEWHERE)
    )
    assert near[0].detail == "10.0.1.4 is no task's: it may be a node's load balancer, between a VIP and its client"
    assert far[0].detail == ""


def test_the_count_of_the_status_is_of_what_was_dropped_lately() -> None:
    """Old attempts and those that pass do not count; the most frequent one is named."""
    made = denials.count(
        state(),
        [
            noted(DB1, attempt(*WEB_DB, count=14), attempt(*WEB_DB, port=1, last=301, first=400)),
            noted(API1, attempt(ADDRESSES[WEB1], ADDRESSES[API1], count=2), attempt(ELSEWHERE, ADDRESSES[API1],
                                                                                    count=50, dropped=False)),
        ],
        NOW,
    )  # fmt: skip
    assert (made.count, made.period_seconds) == (16, 300)
    assert made.top is not None
    assert (made.top.source, made.top.destination, made.top.count) == ("shop_web", "shop_db", 14)


def flow(source: str, destination: str, port: int) -> FlowEntry:
    return FlowEntry(
        source=source, destination=destination, protocol=6, port=port, first_seen=NOW - 9, last_seen=NOW - 5
    )


def test_suggestions_are_for_attempts_and_for_connections_from_before() -> None:
    """Both kinds get a label; what no label helps, and what a link allows already, is said."""
    reports = [
        noted(DB1, attempt(*WEB_DB, dropped=False), flows=(flow(*WEB_DB, 9000),)),
        noted(API1, attempt(ELSEWHERE, ADDRESSES[API1], 22), attempt(ADDRESSES[WEB1], ADDRESSES[API1], 8080)),
        noted(WEB1, attempt(ADDRESSES[API1], ADDRESSES[WEB1], 0, protocol=1)),
    ]
    made = denials.suggestions(state(), reports)
    seen = [(it.source, it.destination, it.port, it.passes, it.is_suggested, it.reason) for it in made.attempts]
    assert seen == [
        (ELSEWHERE, "shop_api", 22, False, False, "an end is no known service"),
        ("shop_api", "shop_web", 0, False, False, "links are for TCP and UDP ports"),
        ("shop_web", "shop_api", 8080, False, False, "a link allows it: new connections take it"),
        ("shop_web", "shop_db", 5432, True, True, ""),
        ("shop_web", "shop_db", 9000, True, True, ""),
    ]
    assert [(it.service, it.label, it.suggested) for it in made.labels] == [
        ("shop_web", "hivewire.links", "db:5432,db:9000"),
        ("shop_web", "hivewire.mode", "observe"),
    ]


@pytest.mark.parametrize(("dropped", "passed", "passes"), [(9.0, 3.0, True), (3.0, 9.0, False), (3.0, 3.0, False)])
def test_what_was_seen_last_says_whether_it_passes(dropped: float, passed: float, passes: bool) -> None:
    """After a change of mode the outcome of today counts, not that of before."""
    entries = attempt(*WEB_DB, last=dropped), attempt(*WEB_DB, dropped=False, last=passed)
    (seen,) = denials.suggestions(state(), [noted(DB1, *entries)]).attempts
    assert seen.passes is passes


def test_suggestions_of_one_stack() -> None:
    """Only what has an end in the stack is looked at."""
    reports = [noted(DB1, attempt(*WEB_DB)), noted(TaskId("p"), attempt(ELSEWHERE, "10.0.1.50"), service=PAGE)]
    assert {it.destination for it in denials.suggestions(state(), reports, "blog").attempts} == {"blog_page"}
    assert {it.destination for it in denials.suggestions(state(), reports, "shop").attempts} == {"shop_db"}


# -- the API and the command line ------------------------------------------------------------------------------------


@pytest.fixture
def api(tmp_path: Path) -> TestClient:
    path = tmp_path / "admin_token"
    path.write_text(TOKEN)
    noted_ = (
        noted(DB1, attempt(*WEB_DB, count=14), attempt(ELSEWHERE, ADDRESSES[DB1], 22, last=4000, first=4000)),
        noted(API1, attempt(ADDRESSES[WEB1], ADDRESSES[API1], 9090, dropped=False)),
    )
    app = create_app(FakeSource(current=state(), noted=noted_), TokenSet.load(path), "0.1.0", now=lambda: NOW)
    return TestClient(app, headers={"Authorization": f"Bearer {TOKEN}"}, raise_server_exceptions=False)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", 3),
        ("since=5m", 2),
        ("since=2h", 3),
        ("since=2027-01-15T07:55:00Z", 2),
        ("source=shop_web", 2),
        ("destination=shop_db", 2),
        ("dropped=true", 2),
        ("dropped=false&source=shop_web", 1),
        ("stack=shop", 3),
        ("stack=billing", 0),
    ],
)
def test_denials_are_filtered(api: TestClient, query: str, expected: int) -> None:
    """Every filter does what its name says; several go together."""
    answer = api.get(f"/api/v1/denials?{query}")
    assert (answer.status_code, len(answer.json()["items"])) == (200, expected)


@pytest.mark.parametrize(
    "query", ["since=soon", "since=-5m", "since=", "since=2027-01-15T07:55:00", "dropped=x", "a=1"]
)
def test_a_wrong_query_is_a_problem(api: TestClient, query: str) -> None:
    """What cannot be read is refused as a problem, as everywhere."""
    answer = api.get(f"/api/v1/denials?{query}")
    assert (answer.status_code, answer.headers["content-type"]) == (400, "application/problem+json")
    assert answer.json()["code"] == "invalid_parameter"


def test_denials_come_in_pages(api: TestClient) -> None:
    """Pages fit together and hold every item once."""
    first = api.get("/api/v1/denials?limit=2").json()
    rest = api.get(f"/api/v1/denials?limit=2&cursor={first['next_cursor']}").json()
    assert len(first["items"]) == 2
    assert rest["next_cursor"] is None
    assert first["items"] + rest["items"] == api.get("/api/v1/denials").json()["items"]


def test_the_status_says_what_was_denied(api: TestClient) -> None:
    """The block of the status has a line for it, with the most frequent attempt."""
    text = render.status(api.get("/api/v1/status").json())
    assert "Denied      14 in the last 5 min (shop_web -> shop_db:5432/tcp, 14)     -> hivewire denials" in text


def test_the_table_has_the_latest_first(api: TestClient) -> None:
    """Rows as people read them, and with -o wide who noted it."""
    lines = render.denials(api.get("/api/v1/denials").json(), wide=True, color=False).splitlines()
    assert lines[0].split() == ["LAST", "SEEN", "COUNT", "SOURCE", "DESTINATION", "PORT", "OUTCOME", "REASON", "TASKS"]
    assert sorted(line.split()[:7] for line in lines[1:3]) == [
        ["10s", "14", "shop_web", "shop_db", "5432/tcp", "dropped", "no_link"],
        ["10s", "3", "shop_web", "shop_api", "9090/tcp", "passes", "no_link"],
    ]
    assert lines[3].split()[:7] == ["1h", "3", ELSEWHERE, "shop_db", "22/tcp", "dropped", "no_link"]
    assert render.denials({"items": []}, wide=False, color=False) == "nothing was denied"


def test_suggestions_are_shown_to_be_pasted() -> None:
    """Every attempt with what becomes of it, then the parts of the stack files, then the commands."""
    attempt_ = {
        "source": "shop_web", "destination": "shop_db", "protocol": "tcp", "port": 5432, "passes": True, "count": 3,
        "is_suggested": True, "reason": "",
    }  # fmt: skip
    answer = {
        "attempts": [attempt_, {**attempt_, "passes": False, "is_suggested": False, "reason": "no such service"}],
        "stack_files": {"shop": "services:\n  web:\n    deploy:"},
        "commands": ["docker service update --label-add a=b shop_web"],
    }
    assert render.suggestions(answer, color=False).splitlines() == [
        "SOURCE     DESTINATION   PORT       COUNT   TODAY                     THEN",
        "shop_web   shop_db       5432/tcp   3       passes, enforce cuts it   labels below allow it",
        "shop_web   shop_db       5432/tcp   3       dropped                   no such service",
        "",
        "# stack shop",
        "services:",
        "  web:",
        "    deploy:",
        "",
        "# the same at once; no task restarts",
        "docker service update --label-add a=b shop_web",
    ]
    assert render.suggestions({"attempts": []}, color=False) == "nothing was seen that no link allows"


def test_following_tells_what_is_new() -> None:
    """Only what grew is told, by how much; an agent that starts again counts from the beginning."""

    def answer(count: int) -> dict[str, list[dict[str, object]]]:
        return {"items": [{"source": "a", "destination": "b", "protocol": "tcp", "port": 1, "dropped": True,
                           "count": count, "last_seen": "2027-01-15T08:00:00Z", "reasons": ["no_link"]}]}  # fmt: skip

    seen: dict[str, int] = {}
    grown = [[more for _, more in new_denials(answer(count), seen)] for count in (2, 2, 5, 1)]
    assert grown == [[2], [], [3], [1]]
    line = render.denial(answer(2)["items"][0], 2)
    assert line.split() == ["08:00:00", "conn.denied", "a", "->", "b:1/tcp", "no_link", "x2"]


def test_views_are_sorted_by_their_key() -> None:
    """Pages need it: the order of rows is that of their keys."""
    found: list[DenialView] = denials.rows(
        state(), [report for reports, _ in CASES.values() for report in reports], NOW
    )
    assert [denials.row_key(it) for it in found] == sorted(denials.row_key(it) for it in found)
