"""What people see of the mesh, by tables of literal states."""

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_view_states import (
    API,
    API1,
    DB,
    DB1,
    NODE2,
    NODE3,
    NOW,
    PLACES,
    WEB,
    WEB1,
    WEB2,
    End,
    agent,
    both,
    claim,
    interfaces,
    key,
    link,
    peer,
    policy,
    shop,
    shop_interfaces,
    status,
    task,
)

from controller import view
from controller.api.shapes import DeniedCount, LinkState, Result, TaskState
from controller.state import Component, MeshState, RefusedClaim
from hivewire.ids import TaskId
from hivewire.records import Doubt, Finding, Mode, Severity, TaskPhase
from hivewire.reports import InterfaceReport

SECURE, IDLE, STALE, PENDING, UNKNOWN = LinkState
QUIET = DeniedCount(count=0, period_seconds=300, top=None)

WEB1_API1 = both(WEB1, API1, 10, 5, 5)
WEB2_API1 = both(WEB2, API1, 10, 5, 5)
LINK_CASES = {
    "fresh handshakes on all pairs": (interfaces(*WEB1_API1, *WEB2_API1), SECURE, 2, ""),
    "one fresh, one quiet": (interfaces(*WEB1_API1, *both(WEB2, API1, 900, 1, 1)), SECURE, 2, ""),
    "all quiet for long": (interfaces(*both(WEB1, API1, 900, 1, 1), *both(WEB2, API1, 900, 1, 1)), IDLE, 2, ""),
    "configured, nothing was ever wanted": (
        interfaces(*both(WEB1, API1, None, 0, 0), *both(WEB2, API1, None, 0, 0)), IDLE, 2, "",
    ),
    "the first handshake is on its way": (
        interfaces((WEB1, API1, (None, 0, 148)), (API1, WEB1, (None, 0, 0)), *WEB2_API1), SECURE, 2, "",
    ),
    "handshakes without an answer": (
        interfaces((WEB1, API1, (None, 0, 296)), (API1, WEB1, (None, 0, 0)), *WEB2_API1),
        STALE, 2, "no answer: node-1 <-> node-2",
    ),
    "the destination's side gets no answer": (
        interfaces((WEB1, API1, (None, 0, 0)), (API1, WEB1, (None, 0, 1480)), *WEB2_API1),
        STALE, 2, "no answer: node-1 <-> node-2",
    ),
    "one pair is missing at one end": (
        interfaces((WEB1, API1, (None, 0, 0)), *WEB2_API1), SECURE, 1, "1 of 2 pairs of tasks are configured",
    ),
    "no end knows the other": (
        interfaces(alone=(WEB1, WEB2, API1)), PENDING, 0, "0 of 2 pairs of tasks are configured",
    ),
    "no agent answers": ({}, UNKNOWN, 0, "no answer from the agent on node-1, node-2"),
    "one agent does not answer": (
        interfaces((WEB1, API1, (900, 1, 1)), alone=(WEB2,)),
        PENDING, 0, "0 of 2 pairs of tasks are configured",
    ),
    "one end proves the other": (
        interfaces((WEB1, API1, (10, 1, 1)), (WEB2, API1, (10, 1, 1))), SECURE, 2, "",
    ),
    "one end alone proves nothing when quiet": (
        interfaces((WEB1, API1, (900, 1, 1)), (WEB2, API1, (900, 1, 1))),
        UNKNOWN, 0, "no answer from the agent on node-2",
    ),
}  # fmt: skip


def draw(state: MeshState, reports: dict[TaskId, InterfaceReport] | None = None) -> view.Picture:
    return view.draw(state, shop_interfaces() if reports is None else reports, NOW)


@pytest.mark.parametrize("name", LINK_CASES)
def test_state_of_a_link_follows_from_both_ends(name: str) -> None:
    """A link's state, its count of configured pairs and its reason are those of the table."""
    reports, state, configured, reason = LINK_CASES[name]
    shown = view.link(draw(shop(), reports), "shop_web", "shop_api")
    assert shown is not None
    assert (shown.state, shown.pairs_configured, shown.pairs_expected, shown.reason) == (state, configured, 2, reason)


def test_old_handshake_is_stale_only_when_sending_went_on() -> None:
    """An end without a session is broken once it sends more than one handshake, and not before."""
    ends = [(sent, both(API1, DB1, 360, 500, sent)) for sent in (700, 848, 849)]
    silences: view.Silences = {}
    states = []
    for _, pair in ends:
        reports = interfaces(*WEB1_API1, *WEB2_API1, *pair)
        silences = view.follow(silences, reports, NOW)
        shown = view.link(view.draw(shop(), reports, NOW, silences), "shop_api", "shop_db")
        states.append(shown and shown.state)
    assert states == [IDLE, IDLE, STALE]


def test_new_handshake_ends_the_silence() -> None:
    """What was sent before a later handshake is no sign of a fault."""
    before = view.follow({}, interfaces((API1, DB1, (400, 0, 700))), NOW)
    reports = interfaces((API1, DB1, (200, 0, 9000)))
    assert view.follow(before, reports, NOW) == {(API1, key(DB1)): (NOW - 200, 9000)}


def test_silence_is_forgotten_with_its_peer() -> None:
    """A peer that is gone leaves nothing behind."""
    before = view.follow({}, interfaces((API1, DB1, (400, 0, 700))), NOW)
    assert view.follow(before, interfaces(alone=(API1,)), NOW) == {}


def test_link_sums_its_pairs_as_the_source_sees_them() -> None:
    """Bytes are the source's, the handshake is the newest."""
    shown = view.link(draw(shop()), "shop_web", "shop_api")
    assert shown is not None
    assert (shown.received_bytes, shown.sent_bytes) == (2_101_000, 312_000)
    assert shown.handshake_age_seconds == 34
    assert [pair.source_task for pair in shown.pairs] == ["shop_web.1", "shop_web.2"]


def test_bytes_come_from_the_other_end_when_the_source_is_silent() -> None:
    """The destination's counters are the source's, turned round."""
    shown = view.link(draw(shop(), interfaces((DB1, API1, (10, 3, 8)))), "shop_api", "shop_db")
    assert shown is not None
    assert (shown.received_bytes, shown.sent_bytes, shown.state) == (8, 3, SECURE)


def test_unknown_traffic_is_not_zero() -> None:
    """Where no agent answers there are no numbers."""
    shown = view.link(draw(shop(), {}), "shop_api", "shop_db")
    assert shown is not None
    assert (shown.received_bytes, shown.sent_bytes, shown.last_handshake) == (None, None, None)


def test_link_without_tasks_waits_for_them() -> None:
    """A link whose target has no task is pending and says so."""
    state = shop()
    left = [id_ for id_ in PLACES if id_ != DB1]
    state = replace(
        state,
        tasks={id_: task(id_) for id_ in left},
        claims={id_: claim(id_) for id_ in left},
        peers={id_: peer(id_) for id_ in left},
    )
    shown = view.link(draw(state), "shop_api", "shop_db")
    assert shown is not None
    assert (shown.state, shown.reason) == (PENDING, "no task of shop_db is in the mesh")


def test_declared_link_not_in_force_is_pending() -> None:
    """A link that waits for consent shows its reason, and has no pairs."""
    shown = view.link(draw(shop()), "shop_api", "billing_ledger")
    assert shown is not None
    assert (shown.state, shown.reason, shown.ports, shown.pairs) == (
        PENDING, "waits for hivewire.allow", ["7000/tcp"], [],
    )  # fmt: skip


def test_link_within_a_service_counts_each_pair_once() -> None:
    """Two tasks of one service are one pair, and no declared link."""
    policies = {WEB: policy(WEB, self_links=(link(WEB),))}
    picture = draw(shop(policies=policies, pending=()), interfaces(*both(WEB1, WEB2, 10, 1, 1)))
    (shown,) = view.links(picture)
    assert (shown.is_internal, shown.state, shown.pairs_configured, shown.pairs_expected) == (True, SECURE, 1, 1)
    assert view.status(picture, "0.1.0", QUIET).links.total == 0


def test_ports_of_all_networks_are_shown_once_in_order() -> None:
    """A link over two networks is one link."""
    parts = (link(API, 9090, 8080), msgspec.structs.replace(link(API, 8080), network="net-other"))
    shown = view.links(draw(shop(policies={WEB: policy(WEB, *parts), API: policy(API)}, pending=())))
    assert [(it.ports, it.networks) for it in shown] == [(["8080/tcp", "9090/tcp"], ["net-other", "shop_app"])]


TASK_CASES: dict[str, tuple[dict[str, object], TaskState, str]] = {
    "all there": ({}, TaskState.CONFIGURED, ""),
    "Swarm still starts it": (
        {"tasks": {DB1: task(DB1, "preparing")}, "claims": {}, "peers": {}},
        TaskState.WAITING, "Swarm has it in state preparing",
    ),
    "no agent said a word": ({"claims": {}, "peers": {}}, TaskState.WAITING, "no agent has announced it yet"),
    "not admitted": ({"peers": {}}, TaskState.WAITING, "the controller has not admitted it yet"),
    "not applied": ({"statuses": {}}, TaskState.WAITING, "its agent has not finished yet"),
    "failed": (
        {"statuses": {DB1: status(DB1, TaskPhase.FAILED, "no WireGuard")}}, TaskState.FAILED, "no WireGuard",
    ),
    "refused": ({"refused": (RefusedClaim(NODE3, DB1, "wrong node"),)}, TaskState.REFUSED, "wrong node"),
    "newer than the list of tasks": ({"tasks": {}}, TaskState.CONFIGURED, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", TASK_CASES)
def test_state_of_a_task_says_how_far_it_got(name: str) -> None:
    """A task's state and detail are those of the table."""
    changes, state, detail = TASK_CASES[name]
    shown = view.service(draw(shop(**changes)), "shop_db")
    assert shown is not None
    assert [(it.state, it.detail) for it in shown.tasks] == [(state, detail)]


def test_services_count_tasks_links_and_findings() -> None:
    """Every service of the Swarm is listed, those outside the mesh with nothing."""
    rows = {
        it.name: (it.is_meshed, it.mode, it.tasks_configured, it.tasks_expected, it.links_in, it.links_out, it.findings)
        for it in view.services(draw(shop()))
    }
    assert rows == {
        "billing_ledger": (False, None, 0, 0, 1, 0, 0),
        "blog_page": (False, None, 0, 0, 0, 0, 0),
        "shop_api": (True, Mode.ENFORCE, 1, 1, 1, 2, 1),
        "shop_db": (True, Mode.ENFORCE, 1, 1, 1, 0, 0),
        "shop_web": (True, Mode.ENFORCE, 2, 2, 0, 1, 0),
    }


def test_service_whose_mode_is_off_is_outside() -> None:
    """A policy with mode off makes no service of the mesh."""
    shown = view.service(draw(shop(policies={DB: policy(DB, mode=Mode.OFF)})), "shop_db")
    assert shown is not None
    assert (shown.is_meshed, shown.mode, shown.tasks_expected) == (False, Mode.OFF, 0)


@pytest.mark.parametrize("name", ["shop_db", DB])
def test_service_is_found_by_name_and_id(name: str) -> None:
    """Names and ids are both accepted."""
    shown = view.service(draw(shop()), name)
    assert shown is not None
    assert shown.id == DB


def test_what_is_not_there_is_none() -> None:
    """Unknown names have no view."""
    picture = draw(shop())
    assert (view.service(picture, "x"), view.node(picture, "x"), view.link(picture, "x", "y")) == (None, None, None)


def test_node_without_agent_invents_nothing() -> None:
    """What only the agent knows is null while it is missing."""
    state = shop()
    shown = view.node(draw(replace(state, nodes={})), "node-3")
    assert shown is not None
    assert (shown.agent.value, shown.agent_version, shown.backend, shown.underlay_mtu) == ("missing", None, None, None)
    assert shown.tasks_expected == 1


def test_node_says_whether_its_agent_answers() -> None:
    """An agent with tasks and without reports does not answer; one without tasks is not asked."""
    answers = {it.hostname: it.agent_answers for it in view.nodes(draw(shop(), interfaces(alone=(WEB1, DB1))))}
    assert answers == {"node-1": True, "node-2": False, "node-3": True}
    empty = view.node(draw(shop(tasks={}, claims={}, peers={})), "node-1")
    assert empty is not None
    assert empty.agent_answers is None


def test_status_counts_everything_once() -> None:
    """The status block adds up."""
    shown = msgspec.to_builtins(view.status(draw(shop()), "0.1.0", QUIET))
    assert shown["agents"] == {"up": 3, "nodes": 3}
    assert shown["services"] == {"meshed": 3, "total": 5}
    assert shown["tasks"] == {"configured": 4, "expected": 4}
    assert shown["links"] == {"total": 3, "secure": 1, "idle": 1, "pending": 1, "stale": 0, "unknown": 0}
    assert shown["findings"] == {"error": 0, "warning": 1, "info": 0}


def test_findings_are_the_worst_first_and_each_once() -> None:
    """A finding of both the mesh and a policy is shown once; errors lead."""
    bad = Finding(code="HW999", severity=Severity.ERROR, subject="shop_db", message="broken")
    state = shop()
    shown = view.findings(draw(replace(state, findings=(*state.findings, bad))))
    assert [(it.severity, it.code) for it in shown] == [(Severity.ERROR, "HW999"), (Severity.WARNING, "HW301")]


def test_what_a_node_does_not_believe_is_a_finding() -> None:
    """With the node's name, the record and the reason; what the controller does not believe either is said once."""
    doubts = (
        Doubt(key="/hivewire/v1/policies/x", reason="the clock"),
        Doubt(key="/hivewire/v1/peers/s/t", reason="no"),
    )
    nodes = {**shop().nodes, NODE2: agent(NODE2, 2, doubts=doubts)}
    state = shop(nodes=nodes, unverified={"/hivewire/v1/peers/s/t": "no"})
    shown = [(it.code, it.message) for it in view.findings(draw(state)) if it.severity is Severity.ERROR]
    name = nodes[NODE2].hostname
    assert shown == [
        ("HW320", "the record /hivewire/v1/peers/s/t has no effect: no"),
        ("HW321", f"the agent on {name} does not believe the record /hivewire/v1/policies/x: the clock"),
    ]


BAD = Finding(code="HW110", severity=Severity.ERROR, subject="shop_web", message="cannot read", remedy="write")
CHECK_CASES: dict[str, tuple[MeshState, dict[TaskId, InterfaceReport], str, Result, bool]] = {
    "all is well": (shop(), shop_interfaces(), "3/3 nodes ready, 1 manager", Result.SUCCESS, True),
    "no leader": (shop(leader=""), shop_interfaces(), "a controller leads", Result.ERROR, False),
    "the store is away": (
        shop(components=(Component("store", False, "no answer"),)), shop_interfaces(),
        "the controller can read the store", Result.ERROR, False,
    ),
    "agent missing where a meshed task runs": (
        shop(nodes={}), shop_interfaces(), "agent running on 0/3 nodes", Result.ERROR, False,
    ),
    "agent of another version": (
        shop(nodes={**shop().nodes, NODE2: agent(NODE2, 2, agent_version="0.0.9")}), shop_interfaces(),
        "agents have the controller's version (0.1.0)", Result.WARNING, True,
    ),
    "userspace WireGuard": (
        shop(nodes={**shop().nodes, NODE2: agent(NODE2, 2, backend="userspace")}), shop_interfaces(),
        "kernel WireGuard on 2/3 nodes", Result.WARNING, True,
    ),
    "refused claim": (
        shop(refused=(RefusedClaim(NODE3, DB1, "wrong node"),)), shop_interfaces(),
        "claims of agents are admitted", Result.ERROR, False,
    ),
    "failed task": (
        shop(statuses={**shop().statuses, DB1: status(DB1, TaskPhase.FAILED, "no")}), shop_interfaces(),
        "3/4 tasks configured", Result.ERROR, False,
    ),
    "waiting task": (
        shop(statuses={WEB1: status(WEB1), API1: status(API1), DB1: status(DB1)}), shop_interfaces(),
        "3/4 tasks configured", Result.WARNING, False,
    ),
    "label error": (shop(findings=(BAD,)), shop_interfaces(), "shop_web", Result.ERROR, False),
    "no agent answers": (shop(), {}, "agents answer the controller", Result.WARNING, False),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECK_CASES)
def test_checks_find_what_does_not_work(name: str) -> None:
    """The check that the table names has the result of the table, and readiness follows."""
    state, reports, description, result, ready = CHECK_CASES[name]
    report = view.checks(draw(state, reports), "0.1.0")
    found = [it.result for category in report.categories for it in category.checks if it.description == description]
    assert (found, report.ready) == ([result], ready)
    assert report.success == all(it.result is not Result.ERROR for part in report.categories for it in part.checks)


def test_stale_link_fails_the_check_with_its_nodes() -> None:
    """A broken link is an error that names the nodes and the likely cause."""
    stale = interfaces(*WEB1_API1, *WEB2_API1, (API1, DB1, (None, 0, 999)), (DB1, API1, (None, 0, 0)))
    (only,) = [it for it in view.checks(draw(shop(), stale), "0.1.0").categories if it.category_name == "links"]
    (check,) = only.checks
    assert (check.description, check.error, check.code) == (
        "shop_api -> shop_db", "no answer: node-2 <-> node-3", "HW403",
    )  # fmt: skip


def test_idle_and_pending_links_are_ready() -> None:
    """Nothing is to be waited for when links are quiet or wait for a person."""
    report = view.checks(draw(shop()), "0.1.0")
    assert (report.success, report.ready, report.waiting_for) == (True, True, [])


def test_link_without_a_configured_pair_is_waited_for() -> None:
    """Readiness needs one configured pair for each link that has tasks."""
    reports = {**shop_interfaces(), **interfaces(alone=(DB1,))}
    report = view.checks(draw(shop(), reports), "0.1.0")
    assert report.waiting_for == ["link shop_api -> shop_db: 0 of 1 pairs of tasks are configured"]


ENDS = st.tuples(
    st.one_of(st.none(), st.floats(0, 1e6, allow_nan=False)), st.integers(0, 10**12), st.integers(0, 10**12)
)
PAIRS = st.sampled_from([(one, other) for one in PLACES for other in PLACES if one != other])


@given(st.dictionaries(PAIRS, ENDS), st.sets(st.sampled_from(sorted(PLACES))))
def test_counts_of_pairs_always_add_up(ends: dict[tuple[TaskId, TaskId], End], alone: set[TaskId]) -> None:
    """Whatever agents say, no link has more pairs than its tasks allow, and the reply can be written as JSON."""
    reports = interfaces(*((one, other, end) for (one, other), end in ends.items()), alone=tuple(alone))
    picture = draw(shop(), reports)
    for shown in view.links(picture):
        parts = (shown.pairs_configured, shown.pairs_unknown, shown.pairs_secure, shown.pairs_stale)
        assert all(0 <= part <= shown.pairs_expected for part in parts)
        assert shown.pairs_configured + shown.pairs_unknown <= shown.pairs_expected
        detail = view.link(picture, shown.source, shown.destination)
        assert detail is not None
        states = [pair.state for pair in detail.pairs]
        assert len(states) == shown.pairs_expected
        assert states.count(UNKNOWN) == shown.pairs_unknown
        assert states.count(STALE) == shown.pairs_stale
        assert states.count(PENDING) == shown.pairs_expected - shown.pairs_configured - shown.pairs_unknown
    assert msgspec.json.encode(view.checks(picture, "0.1.0"))
