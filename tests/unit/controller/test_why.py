"""Why a connection passes or not: every step that can fail, with what it says and the command that changes it."""

from dataclasses import replace
from ipaddress import IPv4Address

import msgspec
import pytest
from test_view_states import (
    API,
    API1,
    APP,
    DB,
    DB1,
    NODE2,
    NOW,
    PAGE,
    WEB,
    WEB1,
    WEB2,
    FakeSource,
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
    tcp,
)

from controller.names import find_end
from controller.policy.compile import Compiled, PendingLink
from controller.policy.verdict import StepName, Verdict
from controller.policy.why import Decision, ask, concerned, decide
from controller.state import MeshState, RefusedClaim
from controller.view import Silence
from hivewire.errors import InvalidInput
from hivewire.ids import NodeId, TaskId
from hivewire.records import Mode, PortRange, QuarantineKind, QuarantineRecord, TaskPhase
from hivewire.reports import InterfaceReport

RULES = {"rules": "0123456789abcdef"}


def told(**changes: InterfaceReport) -> dict[TaskId, InterfaceReport]:
    """What the agents tell while all is well, rules included; ``changes`` by task."""
    reports = shop_interfaces() | {TaskId(task): report for task, report in changes.items()}
    return {task: replace_report(report, rules=report.rules or "0123") for task, report in reports.items()}


def replace_report(report: InterfaceReport, **changes: object) -> InterfaceReport:
    return msgspec.structs.replace(report, **changes)


def mesh(**changes: object) -> MeshState:
    """The shop, with statuses in the mode of the policies and an address for each task."""
    statuses = {task: replace_status(task) for task in (WEB1, WEB2, API1, DB1)}
    return shop(**({"statuses": statuses} | changes))


def replace_status(task: TaskId) -> object:
    return msgspec.structs.replace(status(task), mode=Mode.ENFORCE)


def why(
    source: str,
    destination: str,
    port: int | None = None,
    *,
    state: MeshState | None = None,
    reports: dict[TaskId, InterfaceReport] | None = None,
    silent: frozenset[NodeId] = frozenset(),
    **more: object,
) -> Decision:
    state = state or mesh()
    source_ = FakeSource(state, told() if reports is None else reports, silent)
    question = ask(state, source, destination, None if port is None else tcp(port))
    return decide(state, question, source_.ask(concerned(state, question)), NOW, **more)  # type: ignore[arg-type]


def quarantined(kind: QuarantineKind, id_: str, name: str) -> MeshState:
    return mesh(quarantines=(QuarantineRecord(kind=kind, id=id_, name=name, reason="odd"),))


def waiting(code: str = "HW301") -> MeshState:
    """The target has not given its consent."""
    pending = PendingLink(
        source=API, source_name="shop_api", target_name="blog_page", target=PAGE, ports=(tcp(80),), code=code
    )
    policies = shop().policies | {PAGE: policy(PAGE)}
    return mesh(policies=policies, compiled=Compiled(policies, (), (pending,)))


def text(decision: Decision, name: StepName) -> str:
    (found,) = [step.text for step in decision.steps if step.name is name]
    return found


def test_what_works_is_allowed() -> None:
    """Every step is fine, the traffic is summed, and a path is shown."""
    found = why("shop_web", "shop_api", 8080)
    assert (found.verdict, found.step, found.fix, found.unknown) == (Verdict.ALLOWED, None, "", ())
    assert all(step.is_ok for step in found.steps)
    assert [step.name for step in found.steps] == list(StepName)
    assert (found.source_tasks, found.destination_tasks) == (2, 1)
    assert (found.received_bytes, found.sent_bytes, found.last_handshake) == (2_101_000, 312_000, NOW - 34)
    assert found.path is not None
    assert (found.path.source_task, found.path.destination_task) == ("shop_web.1", "shop_api.1")


def test_a_silent_pair_is_idle_and_allowed() -> None:
    """An old handshake on a pair that sends nothing is no fault."""
    found = why("shop_api", "shop_db", 5432)
    assert found.verdict is Verdict.ALLOWED
    assert text(found, StepName.TUNNEL).startswith("idle")


DENIED = [
    pytest.param(
        ("shop_web", "shop_db", 5432), mesh(), StepName.LINK, "shop_web has none to shop_db",
        'docker service update --label-add hivewire.links="db:5432" shop_web', id="no link",
    ),
    pytest.param(
        ("shop_web", "shop_api", 9090), mesh(), StepName.LINK, "shop_web has a link to shop_api, for 8080/tcp only",
        'docker service update --label-add hivewire.links="api:9090" shop_web', id="another port",
    ),
    pytest.param(
        ("shop_api", "blog_page", 80), waiting(), StepName.CONSENT, "blog_page does not allow shop_api [HW301]",
        'docker service update --label-add hivewire.allow="shop/api" blog_page', id="no consent",
    ),
    pytest.param(
        ("blog_page", "shop_db", 5432), mesh(), StepName.LINK, "blog_page has none to shop_db",
        'docker service update --label-add hivewire.links="shop/db:5432" blog_page', id="not in the mesh",
    ),
    pytest.param(
        ("shop_web", "shop_api", 8080), quarantined(QuarantineKind.SERVICE, API, "shop_api"), StepName.QUARANTINE,
        "shop_api is quarantined with service shop_api: odd", "hivewire release service shop_api", id="service",
    ),
    pytest.param(
        ("shop_web.1", "shop_api", 8080), quarantined(QuarantineKind.TASK, WEB1, "shop_web.1"), StepName.QUARANTINE,
        "shop_web.1 is quarantined with task shop_web.1: odd", "hivewire release task shop_web.1", id="task",
    ),
    pytest.param(
        ("shop_api", "shop_db", 5432), quarantined(QuarantineKind.NODE, NODE2, "node-2"), StepName.QUARANTINE,
        "shop_api is quarantined with node node-2: odd", "hivewire release node node-2", id="node",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("question", "state", "step", "says", "fix"), DENIED)
def test_denied(question: tuple[str, str, int], state: MeshState, step: StepName, says: str, fix: str) -> None:
    """What policy or a person closes is denied, at its step, with the command that opens it."""
    closed = interfaces(alone=(WEB1, WEB2, API1, DB1)) if state.quarantines else shop_interfaces()
    found = why(*question, state=state, reports={t: replace_report(r, rules="0123") for t, r in closed.items()})
    assert (found.verdict, found.step, found.fix) == (Verdict.DENIED, step, fix)
    assert text(found, step) == says
    assert not found.is_encrypted
    assert [s.text for s in found.steps][-1] == "not reached"


def without(*tasks: TaskId) -> dict[TaskId, InterfaceReport]:
    return {task: report for task, report in told().items() if task not in tasks}


def changed(task: TaskId, **changes: object) -> dict[TaskId, InterfaceReport]:
    return told() | {task: replace_report(told()[task], **changes)}


FAILED = replace(mesh(), statuses={**mesh().statuses, API1: status(API1, TaskPhase.FAILED, "no WireGuard")})
REFUSED = replace(
    mesh(), refused=(RefusedClaim(NODE2, API1, "its public key belongs to task x"),), peers={WEB1: peer(WEB1)}
)
NO_AGENT = replace(
    mesh(), nodes={n: r for n, r in mesh().nodes.items() if n != NODE2}, peers={WEB1: peer(WEB1)},
    claims={WEB1: claim(WEB1)},
)  # fmt: skip
NOT_ADMITTED = replace(mesh(), peers={WEB1: peer(WEB1), WEB2: peer(WEB2)})
NOT_ANNOUNCED = replace(NOT_ADMITTED, claims={WEB1: claim(WEB1), WEB2: claim(WEB2)})
GONE = replace(mesh(), tasks={}, claims={WEB1: claim(WEB1)}, peers={WEB1: peer(WEB1)})

BROKEN = [
    pytest.param(FAILED, None, StepName.ADMISSION, "shop_api.1 on node-2: no WireGuard", id="failed"),
    pytest.param(
        REFUSED, None, StepName.ADMISSION,
        "the claim of shop_api.1 on node-2 is refused: its public key belongs to task x", id="refused",
    ),
    pytest.param(
        NO_AGENT, None, StepName.ADMISSION,
        "no agent runs on node-2, where shop_web.2 is, no agent runs on node-2, where shop_api.1 is", id="no agent",
    ),
    pytest.param(NOT_ADMITTED, None, StepName.ADMISSION, "shop_api.1 is not admitted yet", id="not admitted"),
    pytest.param(
        NOT_ANNOUNCED, None, StepName.ADMISSION, "no agent has announced shop_api.1 yet", id="not announced"
    ),
    pytest.param(GONE, None, StepName.ADMISSION, "no task of shop_api runs", id="no task"),
    pytest.param(
        mesh(), without(API1), StepName.INTERFACES, "shop_api.1 on node-2 has no WireGuard interface", id="no device"
    ),
    pytest.param(
        mesh(), changed(API1, public_key=key(DB1)), StepName.PEERS,
        "shop_web.1 on node-1 has no peer shop_api.1, shop_web.2 on node-2 has no peer shop_api.1", id="another key",
    ),
    pytest.param(
        mesh(), changed(WEB1, peers=()), StepName.PEERS, "shop_web.1 on node-1 has no peer shop_api.1", id="no peer"
    ),
    pytest.param(
        mesh(), changed(API1, rules=""), StepName.RULES, "shop_api.1 on node-2 has no rules in force", id="no rules"
    ),
    pytest.param(
        mesh(), told(**interfaces(*both(WEB1, API1, None, 0, 999), *both(WEB2, API1, 5, 5, 5))), StepName.TUNNEL,
        "handshakes get no answer: node-1 <-> node-2 [HW403]", id="no answer",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("state", "reports", "step", "says"), BROKEN)
def test_broken(state: MeshState, reports: dict[TaskId, InterfaceReport] | None, step: StepName, says: str) -> None:
    """A declared link that cannot work is broken, at the step where it ends, and something can be done about it."""
    found = why("shop_web", "shop_api", 8080, state=state, reports=reports)
    assert (found.verdict, found.step) == (Verdict.BROKEN, step)
    assert text(found, step) == says
    assert found.fix


def test_a_session_that_ended_while_sending_is_broken() -> None:
    """An end that went on sending since its last session gets no answer."""
    silences = {(API1, key(DB1)): Silence(NOW - 360, 100)}
    found = why("shop_api", "shop_db", 5432, silences=silences)
    assert (found.verdict, found.step) == (Verdict.BROKEN, StepName.TUNNEL)


def test_one_late_task_is_a_note() -> None:
    """While other tasks work, one that has just started is said, and breaks nothing."""
    state = replace(mesh(), peers={t: peer(t) for t in (WEB1, API1, DB1)})
    found = why("shop_web", "shop_api", 8080, state=state)
    assert found.verdict is Verdict.ALLOWED
    assert text(found, StepName.ADMISSION).endswith("; shop_web.2 is not admitted yet")


def test_a_quarantined_task_is_left_out() -> None:
    """Where some tasks of a service are quarantined, the others count."""
    found = why("shop_web", "shop_api", 8080, state=quarantined(QuarantineKind.TASK, WEB1, "shop_web.1"))
    assert (found.verdict, found.source_tasks) == (Verdict.ALLOWED, 1)
    assert text(found, StepName.QUARANTINE) == "shop_web.1 is quarantined, other tasks are not"


def test_what_a_silent_agent_holds_is_unknown() -> None:
    """An agent that does not answer makes steps unknown; they are neither fine nor broken, and the node is named."""
    found = why("shop_web", "shop_api", 8080, silent=frozenset({NODE2}))
    assert (found.verdict, found.unknown) == (Verdict.ALLOWED, ("node-2",))
    assert [s.is_ok for s in found.steps][-4] is None
    assert text(found, StepName.TUNNEL) == "unknown: the agent on node-2 does not answer"


@pytest.mark.parametrize(
    ("state", "reports", "step", "says"),
    [
        pytest.param(
            mesh(), told(**interfaces(*both(WEB1, DB1, 5, 5, 5))), StepName.PEERS,
            "should be closed, but shop_web.1 on node-1 still has peer shop_db.1, "
            "shop_db.1 on node-3 still has peer shop_web.1", id="still a peer",
        ),
        pytest.param(
            mesh(), changed(DB1, rules=""), StepName.RULES,
            "should be closed, but shop_db.1 on node-3 has no rules in force", id="no rules",
        ),
    ],
)  # fmt: skip
def test_denied_on_paper_only_is_broken(
    state: MeshState, reports: dict[TaskId, InterfaceReport], step: StepName, says: str
) -> None:
    """Where a kernel still lets through what policy denies, the answer is not "denied"."""
    found = why("shop_web", "shop_db", 5432, state=state, reports=reports)
    assert (found.verdict, found.step, text(found, step)) == (Verdict.BROKEN, step, says)


def test_where_nobody_enforces_it_passes_in_clear() -> None:
    """Without a link, and with nobody who drops, the connection passes outside of the mesh, and that is said."""
    policies = {WEB: policy(WEB, mode=Mode.OBSERVE), DB: policy(DB, mode=Mode.OBSERVE)}
    found = why("shop_web", "shop_db", 5432, state=mesh(policies=policies))
    assert (found.verdict, found.is_encrypted) == (Verdict.ALLOWED, False)
    assert text(found, StepName.MODE) == "nobody enforces on this way: it passes, in clear"
    assert text(found, StepName.TUNNEL) == "not needed, the connection is outside of the mesh"


def test_tasks_of_one_service_need_no_link() -> None:
    """Replicas talk without a link; with only one there is nobody to talk with."""
    own = mesh(policies={WEB: policy(WEB, self_links=(replace_ports(WEB),))})
    pair = interfaces(*both(WEB1, WEB2, 5, 5, 5))
    found = why("shop_web", "shop_web", state=own, reports=pair)
    assert (found.verdict, found.is_encrypted) == (Verdict.ALLOWED, True)
    alone = mesh(policies={DB: policy(DB, self_links=(replace_ports(DB),))})
    found = why("shop_db", "shop_db", state=alone)
    assert (found.verdict, found.fix) == (Verdict.BROKEN, "docker service scale shop_db=2")


def replace_ports(service: object) -> object:
    return link(service)  # type: ignore[arg-type]


def test_a_label_cannot_become_a_command() -> None:
    """What somebody wrote into a label is quoted in the command that keeps it."""
    services = dict(mesh().swarm.services)
    services[WEB] = replace(services[WEB], labels={"hivewire.links": "api:8080 $(reboot)"})
    state = replace(mesh(), swarm=replace(mesh().swarm, services=services))
    fix = why("shop_web", "shop_db", 5432, state=state).fix
    assert fix == "docker service update --label-add hivewire.links='api:8080,$(reboot),db:5432' shop_web"


@pytest.mark.parametrize(
    ("written", "stack", "name"),
    [
        ("shop_web", "", "shop_web"),
        ("web", "shop", "shop_web"),
        ("shop/web", "", "shop_web"),
        ("svc-web", "", "shop_web"),
        ("shop_web.2", "", "shop_web.2"),
        ("web.2", "shop", "shop_web.2"),
        ("shop_web.2.task-web2", "", "shop_web.2"),
        ("task-web2", "", "shop_web.2"),
        ("10.0.1.77", "", "shop_db.1"),
    ],
)
def test_ends_are_found(written: str, stack: str, name: str) -> None:
    """A service, a task and an address are found by whatever people call them."""
    at = msgspec.structs.replace(peer(DB1), addresses={APP: IPv4Address("10.0.1.77")})
    state = mesh(peers={**mesh().peers, DB1: at})
    assert find_end(state, written, stack).name == name


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("shop_wep", 'no service or task "shop_wep", did you mean "shop_web"?'),
        ("web", 'no service or task "web", did you mean "shop_web"?'),
        ("zzz", 'no service or task "zzz"'),
        ("10.9.9.9", "no task or service has the overlay address 10.9.9.9"),
    ],
)
def test_unknown_ends(written: str, says: str) -> None:
    """A name that nothing has is refused, with the one that was perhaps meant."""
    with pytest.raises(InvalidInput) as caught:
        find_end(mesh(), written)
    assert str(caught.value) == says


def test_destination_is_looked_for_in_the_stack_of_the_source() -> None:
    """A short name of the destination is one of the source's own stack first."""
    assert ask(mesh(), "shop_web", "db", PortRange(protocol=tcp(1).protocol, first=1, last=2)).destination.name == (
        "shop_db"
    )
