"""The metrics, as a Prometheus server reads them."""

import platform
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from test_view_states import API, DB, NODE1, NODE3, NOW, WEB1, FakeSource, shop, task

from controller.api.app import create_app
from controller.api.auth import TokenSet
from controller.api.metrics import MAX_SERIES, UNKNOWN, DeniedPackets, Vitals
from controller.policy.findings import KINDS
from controller.state import MeshState, RefusedClaim
from hivewire.ids import NetworkId, ServiceId, TaskId
from hivewire.reports import DenialEntry, Direction, Reason, TaskDenials

Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]
APP = NetworkId("net-app")


def connect(source: FakeSource, vitals: Vitals | None = None) -> TestClient:
    app = create_app(source, TokenSet.none(), "0.1.0", now=lambda: NOW, vitals=lambda: vitals or Vitals())
    return TestClient(app, client=("127.0.0.1", 1), raise_server_exceptions=False)


def scrape(api: TestClient) -> Samples:
    answer = api.get("/metrics")
    assert answer.status_code == 200
    families = text_string_to_metric_families(answer.text)
    return {(it.name, frozenset(it.labels.items())): it.value for family in families for it in family.samples}


def get(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((name, frozenset(labels.items())))


def addressed() -> MeshState:
    """The shop, with addresses of tasks on its network."""
    from ipaddress import IPv4Address

    state = shop()
    places = {id_: IPv4Address(f"10.0.1.{10 + n}") for n, id_ in enumerate(sorted(state.tasks))}
    tasks = {id_: replace(task(id_), addresses={APP: address}) for id_, address in places.items()}
    services = {id_: replace(it, networks=(APP,)) for id_, it in state.swarm.services.items()}
    return replace(state, tasks=tasks, peers={}, swarm=replace(state.swarm, services=services))


def denied(count: int, source: str, destination: str, *, service: str = DB, first_seen: float = 1.0) -> TaskDenials:
    entry = DenialEntry(
        direction=Direction.IN, reason=Reason.NO_LINK, dropped=True, source=source, destination=destination,
        protocol=6, port=5432, count=count, first_seen=first_seen, last_seen=2.0,
    )  # fmt: skip
    return TaskDenials(task=TaskId("task-db1"), service=ServiceId(service), counters={}, unlisted=0, entries=(entry,))


@pytest.fixture
def state() -> MeshState:
    return addressed()


def of(state: MeshState, id_: TaskId) -> str:
    return str(state.tasks[id_].addresses[APP])


def test_the_mesh_in_numbers() -> None:
    """States are counted, and those that nothing is in are zero rather than absent."""
    samples = scrape(connect(FakeSource()))
    assert get(samples, "hivewire_links", state="secure") == 1
    assert get(samples, "hivewire_links", state="stale") == 0
    assert get(samples, "hivewire_services", state="enforce") == 3
    assert get(samples, "hivewire_services", state="unmeshed") == 2
    assert get(samples, "hivewire_nodes", state="ready") == 3
    assert get(samples, "hivewire_nodes", state="agent_missing") == 0
    assert get(samples, "hivewire_tasks", state="configured") == 4
    assert get(samples, "hivewire_findings", severity="warning", code="HW301") == 1
    assert get(samples, "hivewire_leader") == 1
    assert get(samples, "hivewire_claims", state="admitted") == 4
    assert get(samples, "hivewire_refused_claims", reason="node") == 0
    assert get(samples, "hivewire_component_up", component="store") == 1
    assert get(samples, "hivewire_build_info", version="0.1.0", python=platform.python_version()) == 1
    for code, kind in KINDS.items():
        assert get(samples, "hivewire_findings", severity=kind.severity.value, code=code) is not None


def test_an_agent_that_is_away_and_a_claim_that_is_refused() -> None:
    """Each shows in its own series."""
    state = shop()
    refused = (RefusedClaim(NODE1, WEB1, "the task runs on node x, not on y"), RefusedClaim(NODE1, WEB1, "new words"))
    nodes = {id_: it for id_, it in state.nodes.items() if id_ != NODE3}
    samples = scrape(connect(FakeSource(replace(state, nodes=nodes, refused=refused, is_leader=False))))
    assert get(samples, "hivewire_nodes", state="agent_missing") == 1
    assert get(samples, "hivewire_refused_claims", reason="node") == 1
    assert get(samples, "hivewire_refused_claims", reason="other") == 1
    assert get(samples, "hivewire_leader") == 0


def test_records_that_cannot_be_trusted() -> None:
    """They count by what they would be; whatever stands in a key makes no label."""
    state = shop(unverified={"/hivewire/v1/claims/n/t": "no signature", "/hivewire/v1/made-up/x": "no signature"})
    samples = scrape(connect(FakeSource(state)))
    assert get(samples, "hivewire_unverified_records", kind="claims") == 1
    assert get(samples, "hivewire_unverified_records", kind="policies") == 0
    assert get(samples, "hivewire_unverified_records", kind="other") == 1


def test_refusals_of_records_are_counted() -> None:
    """By cause, from zero on."""
    samples = scrape(connect(FakeSource(shop()), Vitals(records_refused={"replay": 3})))
    assert get(samples, "hivewire_record_refusals_total", cause="replay") == 3
    assert get(samples, "hivewire_record_refusals_total", cause="clock") == 0


def test_before_the_first_reading_only_the_controller_is_told_of() -> None:
    """A scrape works at any time; no number of the mesh is made up."""
    samples = scrape(connect(FakeSource(None), Vitals({"node": 1.5e9}, 7, 8, 9)))
    assert get(samples, "hivewire_component_up", component="state") == 0
    assert get(samples, "hivewire_certificate_expiry_timestamp_seconds", purpose="node") == 1.5e9
    names = ("watch_restarts", "lists", "history_changes")
    assert [get(samples, f"hivewire_store_{name}_total") for name in names] == [7, 8, 9]
    assert not [name for name, _ in samples if name == "hivewire_links"]


def test_requests_count_by_route_and_not_by_path() -> None:
    """Whatever paths and methods a client makes up, the series stay the same."""
    api = connect(FakeSource())
    api.get("/livez")
    scrape(api)  # now the series of this very answer are there
    before = scrape(api)
    for path in ("/a", "/b", "/api/v1/services/x", "/api/v1/services/y"):
        api.get(path)
    api.request("BREW", "/coffee")
    samples = scrape(api)
    assert get(samples, "hivewire_http_requests_total", method="GET", route="/livez", code="200") == 1
    assert get(samples, "hivewire_http_requests_total", method="GET", route="", code="404") == 2
    assert get(samples, "hivewire_http_requests_total", method="GET", route="/api/v1/services/{name}", code="401") == 2
    assert get(samples, "hivewire_http_requests_total", method="other", route="", code="404") == 1
    new = {labels for name, labels in samples.keys() - before.keys() if name == "hivewire_http_requests_total"}
    assert len(new) == 3


def test_wrong_tokens_are_counted(tmp_path: Path) -> None:
    """By what was wrong with them."""
    path = tmp_path / "tokens"
    path.write_text("viewer:" + "v" * 40)
    api = TestClient(create_app(FakeSource(), TokenSet.load(path), "0.1.0"))
    good = {"Authorization": "Bearer " + "v" * 40}
    api.delete("/api/v1/quarantines/node/x", headers=good)
    api.get("/api/v1/status", headers={"Authorization": "Bearer x"})
    samples = {
        tuple(it.labels.values()): it.value
        for family in text_string_to_metric_families(api.get("/metrics", headers=good).text)
        for it in family.samples
        if it.name == "hivewire_auth_failures_total"
    }
    assert samples == {("invalid_token",): 1, ("forbidden",): 1, ("rate_limited",): 0}


def test_rules_of_the_format() -> None:
    """One prefix, a help text each, no second series for the begin of a counter, OpenMetrics for those who ask."""
    api = connect(FakeSource())
    families = list(text_string_to_metric_families(api.get("/metrics").text))
    assert all(it.name.startswith(("hivewire_", "process_")) and it.documentation for it in families)
    assert not [it for it in families if it.name.endswith("_created")]
    answer = api.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


def test_denied_packets_by_service(state: MeshState) -> None:
    """Ends that are services are named, others are unknown; what can happen on a link begins at zero."""
    noted = (denied(14, of(state, WEB1), of(state, TaskId("task-db1"))), denied(3, "203.0.113.7", "10.0.1.10"))
    source = FakeSource(state, noted=noted)
    samples = scrape(connect(source))
    name = "hivewire_denied_packets_total"
    assert get(samples, name, source="shop_web", destination="shop_db", reason="no_link") == 14
    assert get(samples, name, source=UNKNOWN, destination="shop_db", reason="no_link") == 3
    assert get(samples, name, source="shop_web", destination="shop_api", reason="wrong_port") == 0
    assert get(samples, name, source=UNKNOWN, destination=UNKNOWN, reason="plaintext") == 0
    assert not [labels for _, labels in samples if "203.0.113.7" in str(labels)]


def test_denied_packets_only_grow(state: MeshState) -> None:
    """A scrape adds what is new: entries that go, miss for a while, or begin anew take nothing away and count once."""
    book, web, db = DeniedPackets(), of(state, WEB1), of(state, TaskId("task-db1"))
    key = ("shop_web", "shop_db", "no_link")
    told = [
        ([denied(10, web, db)], 10),
        ([denied(10, web, db)], 10),
        ([], 10),  # its agent did not answer
        ([denied(15, web, db)], 15),
        ([denied(2, web, db, first_seen=9.0)], 17),  # the agent started again
    ]
    for reports, total in told:
        book.take(state, reports, NOW)
        assert book.totals[key] == total
    without = {id_: it for id_, it in state.swarm.services.items() if id_ != DB}
    book.take(replace(state, swarm=replace(state.swarm, services=without)), [], NOW)
    assert key not in book.totals


def test_what_guards_note_counts_apart_as_well(state: MeshState) -> None:
    """A guard's report has no service."""
    book = DeniedPackets()
    book.take(state, [denied(4, of(state, WEB1), of(state, TaskId("task-db1")), service="")], NOW)
    assert (book.by_guard, sum(book.totals.values())) == (4, 4)


def test_series_are_limited(state: MeshState) -> None:
    """Beyond the limit packets still count, as unknown."""
    book = DeniedPackets()
    book.totals.update({(UNKNOWN, UNKNOWN, str(number)): 1 for number in range(MAX_SERIES)})
    book.take(state, [denied(5, of(state, WEB1), of(state, TaskId("task-db1")))], NOW)
    assert book.totals[UNKNOWN, UNKNOWN, "no_link"] == 5
    assert ("shop_web", "shop_db", "no_link") not in book.totals


def test_claims_as_a_list() -> None:
    """Every claim with what became of it; a claim in another node's name is its own row."""
    state = shop()
    without = {id_: it for id_, it in state.peers.items() if id_ != WEB1}
    refused = (RefusedClaim(NODE3, TaskId("task-api1"), "the task runs on node n2, not on n3"),)
    api = connect(FakeSource(replace(state, peers=without, refused=refused)))
    path = "/api/v1/claims"
    assert api.get(path).status_code == 401
    from controller import claims

    rows = {(row.task, row.node): row for row in claims.rows(replace(state, peers=without, refused=refused))}
    assert len(rows) == 5
    assert (rows["task-web1", "node-1"].state.value, rows["task-web1", "node-1"].service) == ("waiting", "shop_web")
    assert rows["task-api1", "node-2"].state.value == "admitted"
    bad = rows["task-api1", "node-3"]
    assert (bad.state.value, bad.reason_class, bad.service, bad.task_name) == (
        "refused",
        "node",
        "shop_api",
        "shop_api.1",
    )
    assert API in {it.service for it in state.claims.values()}
