"""What Docker Engines answer, read as tasks and events: API 1.41 (20.10) and 1.52 (29)."""

import gc
from copy import deepcopy
from ipaddress import IPv4Address
from typing import Any

import pytest

from agent.tasks import LocalTask, LocalTasks, TaskEvent, parse_container, parse_event
from hivewire.errors import SwarmUnavailable, TaskGone
from hivewire.ids import ContainerId, NetworkId, ServiceId, TaskId

LABELS = {
    "com.docker.stack.namespace": "shop",
    "com.docker.swarm.node.id": "0zjrqqsbjfeejgv3ngn8mtvgl",
    "com.docker.swarm.service.id": "ke5rz3cmsp5i2hxwrfdhzhlvx",
    "com.docker.swarm.service.name": "shop_web",
    "com.docker.swarm.task": "",
    "com.docker.swarm.task.id": "so6tn3hk0e7hvrn6vcvh1sxrz",
    "com.docker.swarm.task.name": "shop_web.1.so6tn3hk0e7hvrn6vcvh1sxrz",
}
CONTAINER = "4f1c9be9f9a2f3c1bd3ae4f5ad0d04f8ba1ec1fd6e2dd6cbaf4e6b8f4b1e8a55"


def endpoint(network: str, address: str, **more: Any) -> dict[str, Any]:
    return {"NetworkID": network, "IPAddress": address, "Gateway": "", "GlobalIPv6Address": "", **more}


# As GET /containers/{id}/json of Engine 20.10 answers, without what nobody reads.
API_1_41: dict[str, Any] = {
    "Id": CONTAINER,
    "State": {
        "Status": "running",
        "Running": True,
        "Paused": False,
        "Restarting": False,
        "Pid": 4711,
        "ExitCode": 0,
        "StartedAt": "2023-11-14T22:13:20.123456789Z",
    },
    "Name": "/shop_web.1.so6tn3hk0e7hvrn6vcvh1sxrz",
    "Config": {"Hostname": "4f1c9be9f9a2", "Labels": LABELS},
    "NetworkSettings": {
        "Bridge": "",
        "SandboxID": "3e2d5c",
        "SandboxKey": "/var/run/docker/netns/3e2d5c",
        "IPAddress": "",
        "MacAddress": "",
        "Networks": {
            "ingress": endpoint("ingressid", "10.0.0.5", IPAMConfig={"IPv4Address": "10.0.0.5"}, Links=None),
            "shop_app": endpoint("appid", "10.0.1.3", IPAMConfig={"IPv4Address": "10.0.1.3"}, Links=None),
        },
    },
}
# Engine 29 has no top-level addresses any more, and its endpoints say less about themselves.
API_1_52: dict[str, Any] = {
    "Id": CONTAINER,
    "State": {
        "Status": "running",
        "Running": True,
        "Pid": 4711,
        "StartedAt": "2023-11-14T22:13:20.123456789Z",
        "Health": {"Status": "healthy", "FailingStreak": 0, "Log": []},
    },
    "Name": "/shop_web.1.so6tn3hk0e7hvrn6vcvh1sxrz",
    "Config": {"Hostname": "4f1c9be9f9a2", "Labels": LABELS},
    "NetworkSettings": {
        "SandboxID": "3e2d5c",
        "SandboxKey": "/var/run/docker/netns/3e2d5c",
        "Ports": {},
        "Networks": {
            "ingress": endpoint("ingressid", "10.0.0.5", GwPriority=0),
            "shop_app": endpoint("appid", "10.0.1.3", GwPriority=0),
        },
    },
}
TASK = LocalTask(
    task=TaskId("so6tn3hk0e7hvrn6vcvh1sxrz"),
    name="shop_web.1.so6tn3hk0e7hvrn6vcvh1sxrz",
    service=ServiceId("ke5rz3cmsp5i2hxwrfdhzhlvx"),
    container=ContainerId(CONTAINER),
    sandbox="/var/run/docker/netns/3e2d5c",
    addresses={NetworkId("ingressid"): IPv4Address("10.0.0.5"), NetworkId("appid"): IPv4Address("10.0.1.3")},
    is_healthy=True,
    started_at=1700000000.123456,
)

EITHER = pytest.mark.parametrize("answer", [API_1_41, API_1_52], ids=["1.41", "1.52"])


def changed(answer: dict[str, Any], part: str, **values: Any) -> dict[str, Any]:
    copy = deepcopy(answer)
    copy[part].update(values)
    return copy


@EITHER
def test_container(answer: dict[str, Any]) -> None:
    """A running container is its task, with its namespace and its addresses."""
    assert parse_container(answer) == TASK


@EITHER
@pytest.mark.parametrize(
    ("health", "is_healthy"),
    [(None, True), ("none", True), ("healthy", True), ("starting", False), ("unhealthy", False)],
)
def test_health(answer: dict[str, Any], health: str | None, is_healthy: bool) -> None:
    """A container is healthy where its check says so, and where it has none."""
    state = {"Health": None if health is None else {"Status": health, "FailingStreak": 0, "Log": []}}
    assert parse_container(changed(answer, "State", **state)).is_healthy is is_healthy


@EITHER
@pytest.mark.parametrize(
    ("written", "started_at"),
    [("2023-11-14T22:13:20Z", 1700000000.0), ("2023-11-14T23:13:20.5+01:00", 1700000000.5), ("", 0.0), ("soon", 0.0)],
)
def test_start_time(answer: dict[str, Any], written: str, started_at: float) -> None:
    """The container's start is read in any precision and zone, and an unreadable one is none."""
    assert parse_container(changed(answer, "State", StartedAt=written)).started_at == started_at


@EITHER
@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("State", {"Running": False, "Status": "exited"}),
        ("NetworkSettings", {"SandboxKey": ""}),
        ("Config", {"Labels": None}),
        ("Config", {"Labels": {"com.docker.swarm.task.id": "typed-by-somebody"}}),
    ],
)
def test_no_running_task(answer: dict[str, Any], part: str, values: dict[str, Any]) -> None:
    """A container that does not run, or is of no Swarm task, is none."""
    with pytest.raises(TaskGone):
        parse_container(changed(answer, part, **values))


@EITHER
@pytest.mark.parametrize(
    "networks", [None, {}, {"host": endpoint("hostid", "")}, {"none": endpoint("", "")}, {"six": endpoint("sixid", "")}]
)
def test_without_addresses(answer: dict[str, Any], networks: dict[str, Any] | None) -> None:
    """A network that gave no IPv4 address, as the host's, is left out."""
    assert parse_container(changed(answer, "NetworkSettings", Networks=networks)).addresses == {}


def event(action: str, **attributes: str) -> dict[str, Any]:
    """An event of Engine 29."""
    return {
        "Type": "container",
        "Action": action,
        "Actor": {"ID": CONTAINER, "Attributes": {**LABELS, "image": "web:1", **attributes}},
        "scope": "local",
        "time": 1700000000,
        "timeNano": 1700000000000000000,
    }


def old_event(action: str, **attributes: str) -> dict[str, Any]:
    """The same of Engine 20.10, which says some of it twice."""
    return {"status": action, "id": CONTAINER, "from": "web:1", **event(action, **attributes)}


@pytest.mark.parametrize("make", [event, old_event], ids=["1.52", "1.41"])
@pytest.mark.parametrize(
    ("action", "attributes", "verb", "stops"),
    [
        ("start", {}, "start", False),
        ("health_status: healthy", {}, "health_status", False),
        ("health_status: unhealthy", {}, "health_status", False),
        ("kill", {"signal": "15"}, "kill", True),
        ("kill", {"signal": "9"}, "kill", True),
        ("kill", {"signal": "3"}, "kill", True),
        ("kill", {"signal": "SIGTERM"}, "kill", True),
        ("kill", {}, "kill", True),
        ("die", {"exitCode": "0"}, "die", True),
        ("destroy", {}, "destroy", True),
    ],
)
def test_event(make: Any, action: str, attributes: dict[str, str], verb: str, stops: bool) -> None:
    """An event names its task, what happened, and whether the container is on its way out."""
    assert parse_event(make(action, **attributes)) == TaskEvent(TASK.task, verb, stops)


@pytest.mark.parametrize(
    "nothing",
    [
        {},
        {"Action": "start"},
        {"Action": "start", "Actor": None},
        {"Action": "start", "Actor": {"ID": CONTAINER, "Attributes": {"image": "web:1"}}},
        event("kill", signal="1"),
        event("kill", signal="SIGHUP"),
        event("kill", signal="10"),
    ],
)
def test_events_that_tell_nothing(nothing: dict[str, Any]) -> None:
    """Events of other containers, and signals that stop nobody, are left out."""
    assert parse_event(nothing) is None


@pytest.mark.parametrize(
    ("stops_by", "sent", "stops"),
    [
        ("SIGWINCH", "28", True),
        ("WINCH", "SIGWINCH", True),
        ("28", "28", True),
        ("SIGRTMIN+3", "37", True),
        ("SIGWINCH", "15", True),
        ("SIGWINCH", "1", False),
        ("SIGTERM", "28", False),
        ("nonsense", "28", False),
    ],
)
def test_a_stop_signal_of_its_own(stops_by: str, sent: str, stops: bool) -> None:
    """The signal that an image names for it stops its container, as httpd's WINCH does, and others do not."""
    found = parse_event(event("kill", signal=sent), {CONTAINER: stops_by}.__getitem__)
    assert (found is not None and found.stops) is stops


# The library leaves the sockets of connections that failed to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_no_engine() -> None:
    """An engine that is not there is unavailable, whatever is asked of it."""
    tasks = LocalTasks("unix:///nonexistent/docker.sock")
    with pytest.raises(SwarmUnavailable, match="does not answer"):
        tasks.node()
    with pytest.raises(SwarmUnavailable, match="does not answer"):
        tasks.list()
    with pytest.raises(SwarmUnavailable, match="does not answer"):
        tasks.get(TASK.task)
    with pytest.raises(SwarmUnavailable, match="does not answer"):
        list(tasks.events())
    gc.collect()
