"""Services of the mesh and services without labels on one network: Swarm's IPVS serves the latter as ever."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from proof.deployed import STACK, Deployed, Task, wait_for

from tests.kernel.side import CALLER, FREE, GUEST, MESHED, Side

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

BEATS = "/tmp/beats"
FLOWS = f"""
import json, socket, sys, time
# One connection for all the time, and a new one per turn; a line for each turn with what went wrong.
host = sys.argv[1]
def connected():
    channel = socket.create_connection((host, 8080), 20)
    answer = channel.makefile('rb')
    answer.readline()
    return channel, answer
def echo(channel, answer):
    channel.sendall(b'beat')
    assert answer.read(4) == b'beat', 'no echo'
old = connected()
with open("{BEATS}", "w", buffering=1) as beats:
    while True:
        wrong = []
        for name, get in (('old', lambda: old), ('new', connected)):
            try:
                pair = get()
                echo(*pair)
                if pair is not old:
                    pair[0].close()
            except (OSError, AssertionError) as error:
                wrong.append(f'{{name}}: {{error!r}}')
        beats.write(json.dumps(wrong) + chr(10))
        time.sleep(0.1)
"""


@pytest.fixture(scope="module")
def side(mesh: Deployed) -> Iterator[Side]:
    side = Side.deployed(mesh)
    yield side
    side.remove()


@contextmanager
def steady_flows(side: Side, client: str, host: str) -> Iterator[list[str]]:
    """Old and new connections all the time while the block runs; the list holds what went wrong."""
    task = side.task(client)
    side.mesh.exec(task, "rm", "-f", BEATS)
    side.mesh.lab.docker(task.node, "exec", "-d", task.container, "python3", "-c", FLOWS, host)
    wait_for("flows", lambda: len(_beats(side.mesh, task)) > 3, 30)
    wrong: list[str] = []
    yield wrong
    done = len(_beats(side.mesh, task))
    wait_for("flows that go on", lambda: len(_beats(side.mesh, task)) > done + 3, 30)
    wrong += [text for turn in _beats(side.mesh, task) for text in turn]


def _beats(mesh: Deployed, task: Task) -> list[list[str]]:
    return [json.loads(line) for line in mesh.exec(task, "cat", BEATS, check=False).splitlines(keepends=True)
            if line.endswith("\n")]  # fmt: skip


def test_a_service_without_labels_answers_by_its_vip_through_ipvs(side: Side) -> None:
    """Every task of `free` answers `guest`, who is seen as Swarm's balancer: IPVS is in the way, and nobody else."""
    vip, balancer = side.vip(FREE), side.balancer("n1")
    tasks = {address for task in side.mesh.tasks(FREE) for address in side.mesh.addresses(task)}
    for host in ("free", vip):
        assert set(side.ask(GUEST, host)) == {balancer}
    kernel = side.balanced("n1")
    assert all(_hex(address) in kernel for address in tasks), kernel


def test_a_meshed_service_sees_the_client_task_itself(side: Side) -> None:
    """By name and by VIP `meshed` sees the caller's own address, where IPVS would show the balancer's."""
    for host in ("meshed", side.vip(MESHED)):
        assert set(side.ask(CALLER, host)) == {side.address(CALLER)}


def test_a_stranger_is_not_let_in_by_ipvs(side: Side) -> None:
    """`guest` has no link to `meshed`: neither the VIP, behind which IPVS would pass it on, nor an address answers."""
    task = side.task(GUEST)
    addresses = [address for meshed in side.mesh.tasks(MESHED) for address in side.mesh.addresses(meshed)]
    for host in ("meshed", side.vip(MESHED), *addresses):
        assert side.mesh.probe(task, "tcp", host, "8080", timeout_s=1)["outcome"] != "reached", host
    # The control: the same probe gets through where nobody is in the way.
    assert side.mesh.probe(task, "tcp", "free", "8080", timeout_s=1)["outcome"] == "reached"


def test_who_enforces_reaches_no_service_without_a_link(side: Side) -> None:
    """`caller` enforces: `free` is on its network, and has no link, so its VIP stays silent, through IPVS as well."""
    task = side.task(CALLER)
    for host in ("free", side.vip(FREE)):
        assert side.mesh.probe(task, "tcp", host, "8080", timeout_s=1)["outcome"] != "reached", host


def test_flows_through_ipvs_do_not_notice_the_agent(side: Side) -> None:
    """With the agents of both ends killed and back, no connection of `guest` to `free` broke or failed, old or new."""
    mesh = side.mesh
    with steady_flows(side, GUEST, "free") as wrong:
        for agent in mesh.tasks(f"{STACK}_agent"):
            mesh.lab.docker(agent.node, "kill", "--signal", "KILL", agent.container)
            wait_for(f"a new agent on {agent.node}", lambda old=agent: _successor(mesh, old), 60)
        mesh.wait_ready(90)
    assert wrong == []
    assert set(side.ask(CALLER, "meshed")) == {side.address(CALLER)}


def _successor(mesh: Deployed, old: Task) -> Task | None:
    return next((t for t in mesh.tasks(old.service) if t.node == old.node and t.container != old.container), None)


def _hex(address: str) -> str:
    """An address as /proc/net/ip_vs has it."""
    return "".join(f"{int(part):02X}" for part in address.split("."))
