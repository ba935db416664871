"""What the guard learns from the engine and from the folder of namespaces. Answers as of Engine 20.10 and 26.1."""

import os
from collections.abc import Mapping
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from agent.guard.desired import Holder, LocalNetwork, Stage
from agent.kernel.inotify import NewFiles
from agent.kernel.overlay import is_of
from agent.tasks import LocalTasks, parse_network
from hivewire.errors import KernelBusy
from hivewire.ids import ContainerId, NetworkId, ServiceId, TaskId

NETWORK, NAME = NetworkId("un37g4fb1wiblcnjlicphk8hp"), "net1"
NOW = 1795421020.0
LABELS = {"com.docker.swarm.task.id": "t", "com.docker.swarm.service.id": "s"}
ADDRESS, MAC = IPv4Address("10.0.1.8"), "02:42:0a:00:01:08"

RESERVED = {"IPAMConfig": {"IPv4Address": "10.0.1.8"}, "NetworkID": NETWORK, "IPAddress": "", "MacAddress": ""}
HELD = {"IPAMConfig": {"IPv4Address": "10.0.1.8"}, "NetworkID": NETWORK, "IPAddress": "10.0.1.8", "MacAddress": MAC}
ENDPOINT = {"Name": "s.1", "EndpointID": "e", "MacAddress": MAC, "IPv4Address": "10.0.1.8/24", "IPv6Address": ""}
BALANCER = {"Name": "net1-endpoint", "EndpointID": "f", "MacAddress": "", "IPv4Address": "10.0.1.6/24"}


def container(
    state: str, network: Mapping[str, Any] | None = None, *, key: str = NAME, labels: Mapping[str, str] = LABELS
) -> dict[str, Any]:
    networks = {} if network is None else {key: network}
    return {
        "Id": "c",
        "State": state,
        "Created": int(NOW) - 1,
        "Labels": labels,
        "NetworkSettings": {"Networks": networks},
    }


def read(*containers: Mapping[str, Any], attached: Mapping[str, Any] | None = None) -> LocalNetwork:
    return parse_network(NETWORK, NAME, containers, attached or {}, NOW)


def holder(stage: Stage, mac: str = "", service: str = "s") -> Holder:
    return Holder(ContainerId("c"), ServiceId(service), ADDRESS, mac, stage, TaskId("t") if service else None)


@pytest.mark.parametrize(
    ("state", "network", "attached", "expected"),
    [
        ("created", RESERVED, {}, holder(Stage.COMING)),
        ("created", RESERVED, {"c": ENDPOINT}, holder(Stage.ATTACHED, MAC)),
        ("running", HELD, {"c": ENDPOINT}, holder(Stage.ATTACHED, MAC)),
        ("running", HELD, {}, holder(Stage.ATTACHED, MAC)),
        ("paused", HELD, {}, holder(Stage.ATTACHED, MAC)),
        ("exited", RESERVED, {"c": ENDPOINT}, holder(Stage.ATTACHED, MAC)),
        ("exited", RESERVED, {}, holder(Stage.ENDED)),
        ("dead", RESERVED, {}, holder(Stage.ENDED)),
    ],
)
def test_stages_of_a_container(
    state: str, network: Mapping[str, Any], attached: Mapping[str, Any], expected: Holder
) -> None:
    """From made to gone: the address is known before the container starts, and until its endpoint is gone."""
    assert read(container(state, network), attached=attached).holders == (expected,)


def test_a_network_is_known_by_name_before_it_is_by_id() -> None:
    """Where the engine does not give the id yet the name will do; another network is another one."""
    unnamed = {**RESERVED, "NetworkID": ""}
    assert read(container("created", unnamed)).holders == (holder(Stage.COMING),)
    other = {**RESERVED, "NetworkID": "other"}
    assert read(container("created", other, key="net2")).holders == ()


def test_a_fresh_container_without_networks_is_still_forming() -> None:
    """Only a task's, only before it starts, and only for a while: some have no network at all."""
    assert read(container("created")).is_forming
    assert not read(container("created", labels={})).is_forming
    assert not read(container("running")).is_forming
    assert not read({**container("created"), "Created": int(NOW) - 60}).is_forming


def test_a_container_of_no_service_holds_its_address_too() -> None:
    """One that a person attached is known as nobody's."""
    assert read(container("running", HELD, labels={})).holders == (holder(Stage.ATTACHED, MAC, ""),)


def test_the_load_balancer_is_told_apart() -> None:
    """Its address is the node's own, whatever else is attached."""
    found = read(container("running", HELD), attached={"lb-net1": BALANCER, "c": ENDPOINT})
    assert found.load_balancer == IPv4Address("10.0.1.6")
    assert len(found.holders) == 1
    assert read().load_balancer is None


@pytest.mark.parametrize("broken", [{}, {"NetworkSettings": None}, {"NetworkSettings": {"Networks": {NAME: None}}}])
def test_what_the_engine_leaves_out_is_no_error(broken: Mapping[str, Any]) -> None:
    """A container that is just being made or removed has no address."""
    assert read({"Id": "c", "State": "created", "Labels": None, **broken}).holders == ()


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("1-un37g4fb1w", True),
        ("17-un37g4fb1w", True),
        ("1-zyyrdfip21", False),
        ("lb_un37g4fb1", False),
        ("un37g4fb1w", False),
        ("1-un37g4fb1wi", False),
        ("ingress_sbox", False),
    ],
)
def test_files_of_a_network(file: str, expected: bool) -> None:
    """Number, hyphen, the first ten characters of the id; nothing else."""
    assert is_of(file, NETWORK) is expected


class FakeEngine:
    """One container of one task, as its client answers."""

    def containers(self, **_: object) -> list[dict[str, Any]]:
        return [container("running", HELD)]

    def inspect_container(self, _: str) -> dict[str, Any]:
        settings = {"SandboxKey": "/var/run/docker/netns/abc", "Networks": {}}
        return {"Id": "c", "Config": {"Labels": LABELS}, "State": {"Running": True}, "NetworkSettings": settings}

    def inspect_network(self, _: str) -> dict[str, Any]:
        return {"Containers": {"c": ENDPOINT}}


def test_where_a_task_lives_is_known_once_somebody_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network's answer has no namespaces; those that were learned of tasks are told with it, and told of once."""
    tasks, told = LocalTasks(), []
    monkeypatch.setattr(tasks, "_client", FakeEngine)
    tasks.on_sandbox(lambda: told.append(1))
    assert tasks.network(NETWORK, NAME).holders[0].sandbox == ""
    for _ in range(2):
        tasks.get(TaskId("t"))
    assert tasks.network(NETWORK, NAME).holders[0].sandbox == "/var/run/docker/netns/abc"
    assert told == [1]


def test_new_files_are_told_at_once(tmp_path: Path) -> None:
    """Each new name comes, in order; what was there before the watch does not."""
    (tmp_path / "before").touch()
    with NewFiles(tmp_path) as files:
        assert files.wait(0.0) == ()
        (tmp_path / "one").touch()
        (tmp_path / "a-longer-name").touch()
        os.rename(tmp_path / "before", tmp_path / "after")
        assert files.wait(10.0) == ("one", "a-longer-name", "after")
        assert files.wait(0.0) == ()


def test_a_folder_that_goes_away_ends_the_watch(tmp_path: Path) -> None:
    """Then the watch says so, rather than to stay silent for ever; and there is none of what is not there."""
    folder = tmp_path / "netns"
    folder.mkdir()
    with NewFiles(folder) as files:
        folder.rmdir()
        with pytest.raises(KernelBusy):
            files.wait(10.0)
    with pytest.raises(KernelBusy):
        NewFiles(folder)
