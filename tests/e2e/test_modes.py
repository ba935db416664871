"""Modes and labels of services that are in use: what both allow goes on, what is revoked ends, everywhere."""

import time
from collections.abc import Iterator

import pytest
from lab.images import Images
from proof.deployed import Deployed, Task, wait_for

from tests.e2e import streams
from tests.e2e.test_access import agent

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

SERVER, CLIENT = "modes_server", "modes_client"
PORT = 7000
LINKS = f"{SERVER}:{PORT} {SERVER}:{PORT}/udp"


@pytest.fixture(scope="module")
def pair(mesh: Deployed) -> Iterator[tuple[Task, list[Task]]]:
    """A client on the first node, and a server on each of the two others, linked."""
    mesh.docker("network", "create", "--driver", "overlay", "modes")
    image = ("--detach", "--quiet", "--network", "modes", "--stop-grace-period", "1s")
    try:
        mesh.docker(
            "service", "create", *image, "--name", SERVER, "--mode", "global", "--constraint", "node.hostname!=n1",
            "--label", "hivewire.mode=enforce", "--label", f"hivewire.allow={CLIENT}",
            Images().demo, "python3", "-c", streams.SERVER, str(PORT),
        )  # fmt: skip
        mesh.docker(
            "service", "create", *image, "--name", CLIENT, "--constraint", "node.hostname==n1",
            "--label", f"hivewire.links={LINKS}", Images().demo, "sleep", "infinity",
        )  # fmt: skip
        wait_for("the tasks", lambda: len(mesh.tasks(SERVER)) == 2 and mesh.tasks(CLIENT), 60)
        mesh.wait_ready(60)
        yield mesh.tasks(CLIENT)[0], mesh.tasks(SERVER)
    finally:
        mesh.lab.docker(mesh.manager, "service", "rm", SERVER, CLIENT, check=False)
        wait_for(
            "the network gone",
            lambda: mesh.lab.docker(mesh.manager, "network", "rm", "modes", check=False).returncode == 0,
            30,
        )


def change_mode(mesh: Deployed, mode: str, *tasks: Task) -> None:
    """Of both services; returns once the rules of these tasks are the mode's."""
    for service in (SERVER, CLIENT):
        mesh.update(service, "--label-add", f"hivewire.mode={mode}")
    sign = {"enforce": "chain denied_no_link_in", "observe": "chain passed_no_link_in"}[mode]
    for task in tasks:
        wait_for(f"{mode} in {task.name}", lambda t=task: sign in table(mesh, t), 30, 0.1)


def table(mesh: Deployed, task: Task) -> str:
    """The rules of a task, as the nft of the image lists them, which made them."""
    listing = ("nft", "list", "table", "inet", "hivewire")
    return mesh.exec(agent(mesh, task.node), "nsenter", f"--net={mesh.sandbox(task)}", *listing, check=False)


def test_between_enforce_and_observe_no_connection_is_lost(mesh: Deployed, pair: tuple[Task, list[Task]]) -> None:
    """An open connection and a stream of datagrams over a link: back and forth they lose nothing."""
    client, servers = pair
    traffic = [streams.start(mesh, client, mesh.addresses(server)[0], PORT, "MODES") for server in servers]
    for mode in ("observe", "enforce", "observe", "enforce"):
        began = time.time()
        change_mode(mesh, mode, client, *servers)
        print(f"{mode}: {began:.3f} to {time.time():.3f}")
        for stream in traffic:
            stream.goes_on(mode)
    for stream in traffic:
        seen = stream.end()
        print(seen)
        assert (seen.connections, seen.lost, seen.refused) == (1, [], {})


def test_a_revoked_link_is_closed_on_every_node(mesh: Deployed, pair: tuple[Task, list[Task]]) -> None:
    """When its label is gone nothing more is delivered, over open connections neither; and with it again, it is."""
    client, servers = pair
    traffic = [streams.start(mesh, client, mesh.addresses(server)[0], PORT, "REVOKED", 0.005) for server in servers]
    done = mesh.update(CLIENT, "--label-rm", "hivewire.links", "--label-add", "hivewire.enable=true")
    time.sleep(2)
    before = [streams.heard(mesh, server) for server in servers]
    lasts = [stream.seen().last for stream in traffic]
    time.sleep(2)
    assert [streams.heard(mesh, server) for server in servers] == before, "something is still delivered"
    print("last answer after docker service update came back (s):", [round(last - done, 3) for last in lasts])
    mesh.update(CLIENT, "--label-add", f"hivewire.links={LINKS}")
    for stream in traffic:
        stream.goes_on("the link is back")
        stream.end()
