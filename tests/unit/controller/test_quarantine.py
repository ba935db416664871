"""Quarantines: who is shut out, what is told of it, and how far it is in force."""

import msgspec
import pytest
from test_view_states import (
    API,
    API1,
    DB1,
    NODE1,
    NODE2,
    NODE3,
    NOW,
    PAGE,
    WEB,
    WEB1,
    WEB2,
    FakeSource,
    interfaces,
    shop,
    shop_interfaces,
    status,
)

from controller import quarantine, view
from controller.api.shapes import Result, TaskState
from controller.state import MeshState, RefusedClaim
from hivewire.errors import InvalidInput
from hivewire.ids import NodeId, ServiceId, TaskId
from hivewire.records import QuarantineKind, QuarantineRecord, quarantine_keys

SERVICE = QuarantineRecord(kind=QuarantineKind.SERVICE, id=API, name="shop_api", reason="odd", by="admin", since=NOW)
TASK = QuarantineRecord(kind=QuarantineKind.TASK, id=WEB1, name="shop_web.1")
NODE = QuarantineRecord(kind=QuarantineKind.NODE, id=NODE2, name="node-2")
NONE = TaskId("")


def mesh(*records: QuarantineRecord, **changes: object) -> MeshState:
    return shop(quarantines=records, **changes)


@pytest.mark.parametrize(
    ("record", "shut"), [(SERVICE, {API1}), (TASK, {WEB1}), (NODE, {WEB2, API1})], ids=["service", "task", "node"]
)
def test_who_is_shut_out(record: QuarantineRecord, shut: set[TaskId]) -> None:
    """A service shuts out its tasks, a task itself, a node what runs on it."""
    places = {WEB1: (WEB, NODE1), WEB2: (WEB, NODE2), API1: (API, NODE2), DB1: (ServiceId("svc-db"), NODE3)}
    found = {task for task, (service, node) in places.items() if quarantine.over([record], service, task, node)}
    assert found == shut
    by_key = {
        task
        for task, (service, node) in places.items()
        if f"/hivewire/v1/quarantines/{record.kind.value}/{record.id}" in quarantine_keys(service, task, node)
    }
    assert by_key == shut


@pytest.mark.parametrize(
    ("kind", "name", "stack", "found"),
    [
        (QuarantineKind.SERVICE, "shop_api", "", (API, "shop_api")),
        (QuarantineKind.SERVICE, "api", "shop", (API, "shop_api")),
        (QuarantineKind.SERVICE, "blog_page", "", (PAGE, "blog_page")),
        (QuarantineKind.TASK, "shop_web.1", "", (WEB1, "shop_web.1")),
        (QuarantineKind.TASK, "task-web1", "", (WEB1, "shop_web.1")),
        (QuarantineKind.NODE, "node-2", "", (NODE2, "node-2")),
        (QuarantineKind.NODE, NODE2, "", (NODE2, "node-2")),
    ],
)
def test_targets_are_found(kind: QuarantineKind, name: str, stack: str, found: tuple[str, str]) -> None:
    """A service, task or node is found by name and by id."""
    assert quarantine.target(mesh(), kind, name, stack) == found


@pytest.mark.parametrize(
    ("kind", "name", "says"),
    [
        (QuarantineKind.SERVICE, "shop_apy", 'no service "shop_apy", did you mean "shop_api"?'),
        (QuarantineKind.TASK, "shop_web.7", 'no task "shop_web.7", did you mean "shop_web.2"?'),
        (QuarantineKind.NODE, "zzz", 'no node "zzz"'),
    ],
)
def test_unknown_targets(kind: QuarantineKind, name: str, says: str) -> None:
    """What is not there is refused, with the name that was perhaps meant."""
    with pytest.raises(InvalidInput) as caught:
        quarantine.target(mesh(), kind, name)
    assert str(caught.value) == says


def test_what_stands_is_found_though_it_is_gone() -> None:
    """A quarantine is found by the name or id of something that is no more."""
    gone = QuarantineRecord(kind=QuarantineKind.TASK, id="task-old", name="shop_web.9")
    for name in ("task-old", "shop_web.9"):
        assert quarantine.standing(mesh(gone), QuarantineKind.TASK, name) == gone
    assert quarantine.standing(mesh(gone), QuarantineKind.NODE, "task-old") is None


def closed(*tasks: TaskId) -> dict[TaskId, object]:
    """Reports in which nobody has a peer and these tasks are closed."""
    bare = interfaces(alone=(WEB1, WEB2, API1, DB1))
    return {task: msgspec.structs.replace(it, quarantined=task in tasks) for task, it in bare.items()}


def progress(state: MeshState, record: QuarantineRecord, reports: object, *silent: NodeId) -> quarantine.Progress:
    source = FakeSource(state, reports, frozenset(silent))  # type: ignore[arg-type]
    return quarantine.progress(state, record, source.ask(quarantine.concerned(state, record)))


def test_progress_is_what_the_kernels_say() -> None:
    """Open while anybody has a peer of it or its own task is not closed; closed when no kernel does."""
    state = mesh(SERVICE)
    assert quarantine.concerned(state, SERVICE) == {NODE1, NODE2, NODE3}
    begun = progress(state, SERVICE, shop_interfaces())
    assert (begun.is_closed, begun.closed, begun.unknown) == (False, (), ())
    assert begun.open == {
        "node-1": "shop_api.1 is still a peer",
        "node-2": "shop_api.1 is open, shop_api.1 is still a peer",
        "node-3": "shop_api.1 is still a peer",
    }
    halfway = progress(state, SERVICE, closed())
    assert (halfway.closed, halfway.open) == (("node-1", "node-3"), {"node-2": "shop_api.1 is open"})
    done = progress(state, SERVICE, closed(API1))
    assert (done.is_closed, done.closed) == (True, ("node-1", "node-2", "node-3"))


def test_a_silent_agent_is_unknown() -> None:
    """A node whose agent does not answer is neither closed nor open."""
    found = progress(mesh(SERVICE), SERVICE, closed(API1), NODE2)
    assert (found.is_closed, found.closed, found.open, found.unknown) == (False, ("node-1", "node-3"), {}, ("node-2",))


def test_without_an_interface_the_status_tells() -> None:
    """A task that has no interface is closed when its agent says so."""
    reports = {task: it for task, it in closed().items() if task != API1}
    assert progress(mesh(SERVICE), SERVICE, reports).open == {"node-2": "shop_api.1 is open"}
    told = mesh(SERVICE, statuses={API1: msgspec.structs.replace(status(API1), quarantined=True)})
    assert progress(told, SERVICE, reports).is_closed


def test_service_that_is_not_in_the_mesh() -> None:
    """A service outside of the mesh has no interfaces, links or claims, and can be quarantined all the same."""
    page = QuarantineRecord(kind=QuarantineKind.SERVICE, id=PAGE, name="blog_page")
    assert progress(mesh(page), page, shop_interfaces()).is_closed


@pytest.mark.parametrize(
    ("record", "subject", "message", "remedy"),
    [
        (SERVICE, "shop_api", "service shop_api is quarantined: odd", "hivewire release service shop_api"),
        (TASK, "shop_web", "task shop_web.1 is quarantined", "hivewire release task shop_web.1"),
        (NODE, "node-2", "node node-2 is quarantined", "hivewire release node node-2"),
    ],
)
def test_findings(record: QuarantineRecord, subject: str, message: str, remedy: str) -> None:
    """Each quarantine is a finding about the service or node, and says how to end it."""
    (found,) = quarantine.findings(mesh(record))
    assert (found.code, found.subject, found.message) == ("HW310", subject, message)
    assert found.remedy.endswith(remedy)


def picture(*records: QuarantineRecord, **changes: object) -> view.Picture:
    return view.draw(mesh(*records, **changes), shop_interfaces(), NOW)


def test_views_show_it() -> None:
    """Tasks, services and nodes say that they are quarantined."""
    drawn = picture(SERVICE, TASK, NODE)
    shown = {it.name: it.quarantine for it in view.services(drawn)}
    assert shown["shop_api"] == "quarantined with service shop_api: odd"
    assert shown["shop_web"] == "shop_web.1, shop_web.2 quarantined with task shop_web.1"
    assert shown["shop_db"] is None
    assert {it.hostname: it.quarantine is not None for it in view.nodes(drawn)} == {
        "node-1": False,
        "node-2": True,
        "node-3": False,
    }
    assert [drawn.tasks[task].state for task in (WEB1, API1, DB1)] == [
        TaskState.QUARANTINED,
        TaskState.QUARANTINED,
        TaskState.CONFIGURED,
    ]


def test_links_to_it_wait_and_hold_up_nothing() -> None:
    """Its links are pending because of it; check warns, fails nothing and waits for nothing."""
    refused = (RefusedClaim(NODE2, API1, "quarantined with service shop_api: odd"),)
    drawn = picture(SERVICE, refused=refused)
    link = view.link(drawn, "shop_web", "shop_api")
    assert link is not None
    assert (link.state.value, link.reason, link.pairs_expected) == ("pending", "shop_api is quarantined", 0)
    report = view.checks(drawn, "0.1.0")
    assert (report.success, report.ready) == (True, True)
    shown = [check for part in report.categories for check in part.checks if check.code == "HW310"]
    assert [(check.result, check.error) for check in shown] == [
        (Result.WARNING, "service shop_api is quarantined: odd")
    ]


def test_a_quarantined_task_leaves_its_link_to_the_others() -> None:
    """Pairs with a quarantined task are not expected any more."""
    link = view.link(picture(TASK), "shop_web", "shop_api")
    assert link is not None
    assert (link.pairs_expected, link.pairs_configured) == (1, 1)
