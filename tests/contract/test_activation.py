"""Agents start again, and the mesh comes and goes around running connections: what their streams go through.

The agents are the real ones but for engine, Swarm and controller (agents.py); namespaces, devices, routes and rules
are real, and the streams are real sockets.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from lab.patience import patient

from agent.moving import QUIET_S
from hivewire.records import Mode
from tests.contract.agents import PORT, VIP, Cluster, OverlayBench
from tests.contract.test_kernel import Task, _missing
from tests.streams import PERIOD_S, Streams, start_server, stop


class World:
    """A caller on the first node and a called task with a server on the second."""

    def __init__(self, stack: ExitStack, folder: Path, backend: str) -> None:
        self._stack = stack
        self.bench = OverlayBench(stack, folder, backend)
        self.cluster = Cluster(self.bench)
        self.caller, self.called = self.cluster.run("calling", 0), self.cluster.run("called", 1)
        server = start_server(self.bench.enter(self.called), PORT)

        stack.callback(stop, server)

    def is_enforced(self, task: Task) -> bool:
        return "denied_" in self.bench.run(task, "nft", "list", "ruleset")

    def streams(self, host: object = None, *, source: Task | None = None) -> Streams:
        enter, to = self.bench.enter(source or self.caller), str(host or self.called.address)
        streams = Streams(enter, to, PORT, patient(PERIOD_S))
        self._stack.callback(streams.kill)
        return streams

    @property
    def tasks(self) -> tuple[Task, Task]:
        return self.caller, self.called


@pytest.fixture(params=["userspace", "kernel"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    if reason := _missing(request.param):
        pytest.skip(reason)
    with ExitStack() as stack:
        yield World(stack, tmp_path, request.param)


@pytest.mark.parametrize("mode", [Mode.OBSERVE, Mode.ENFORCE])
def test_restarted_agents_touch_nothing(world: World, mode: Mode) -> None:
    """Agents that know nothing adopt what they find: no operation, no record, no packet lost, nothing sent again."""
    cluster = world.cluster
    cluster.link("calling", "called", modes=(mode, mode))
    cluster.until(lambda: cluster.are_linked(*world.tasks), "the link")
    cluster.work(3.0)  # all that is still to do, such as a handshake that one side waited for
    direct, balanced = world.streams(), world.streams(VIP)
    revision = cluster.store.list("/").revision
    for _ in range(3):
        cluster.restart()
        cluster.work(1.0)
        assert [agent.ops for agent in cluster.agents] == [[], []]
    assert cluster.store.list("/").revision == revision
    for verdict in (direct.end(), balanced.end()):
        print(verdict)
        assert verdict.is_untouched, verdict


@pytest.mark.parametrize("source_check", [0, 1, 2])
def test_a_connection_may_come_one_way_and_go_another(world: World, source_check: int) -> None:
    """Between the moves of the two sides, for as long as that takes, and however the host checks sources."""
    cluster = world.cluster
    for task in world.tasks:
        for name in ("all", "default", "eth0"):
            world.bench.run(task, "sysctl", "-qw", f"net.ipv4.conf.{name}.rp_filter={source_check}")
    direct = world.streams()
    cluster.link("calling", "called")
    cluster.until(lambda: all(map(cluster.has_interface, world.tasks)), "interfaces")
    for one, other in (world.tasks, world.tasks[::-1]):
        cluster.until(lambda: cluster.are_linked(*world.tasks), "the link")
        # As it is before the other side's agent has looked for the handshake.
        world.bench.run(one, "ip", "route", "del", f"{other.address}/32", "dev", "wg0")
        time.sleep(1.0)
        cluster.agents[one.node].reconciler.resync()
    cluster.until(lambda: cluster.are_linked(*world.tasks), "the link")
    assert (verdict := direct.end()).goes_on, verdict


def test_a_link_opens_around_running_connections(world: World) -> None:
    """In observe, streams from before by address and by VIP go on; one that begins meanwhile loses nothing either."""
    cluster = world.cluster
    world.bench.balance(world.called)
    direct, balanced = world.streams(), world.streams(VIP)
    cluster.link("calling", "called")
    cluster.until(lambda: all(map(cluster.has_interface, world.tasks)), "interfaces")
    during = world.streams(VIP)
    cluster.until(lambda: cluster.are_linked(*world.tasks), "the link")
    cluster.work(2.0)
    for verdict in (direct.end(), during.end(), balanced.end()):
        print(verdict)
        assert verdict.goes_on, verdict


def test_a_link_that_opens_late_waits_as_well(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first peer comes when its agent and the store are back: what Swarm balanced goes on even then."""
    monkeypatch.setattr("agent.moving.NEW_S", 0.5)
    cluster = world.cluster
    world.bench.balance(world.called)
    direct, balanced = world.streams(), world.streams(VIP)
    cluster.admits = lambda _claim: False
    cluster.link("calling", "called")
    cluster.until(lambda: all(map(cluster.has_interface, world.tasks)), "interfaces")
    cluster.work(2.0)
    cluster.admits = lambda _claim: True
    cluster.until(lambda: cluster.are_linked(*world.tasks), "the link")
    cluster.work(2.0)
    assert cluster.goes_through(world.caller, VIP) == "eth0"
    for verdict in (direct.end(), balanced.end()):
        print(verdict)
        assert verdict.goes_on, verdict


def test_the_vip_moves_when_its_last_old_connection_has_ended(world: World) -> None:
    """A connection that Swarm balanced keeps its way; without one the VIP is routed, and fails closed, at once."""
    cluster = world.cluster
    world.bench.balance(world.called)
    balanced = world.streams(VIP)
    cluster.link("calling", "called")
    cluster.until(lambda: cluster.are_linked(*world.tasks), "the link")
    assert cluster.goes_through(world.caller, VIP) == "eth0"
    assert (verdict := balanced.end()).goes_on, verdict
    # A stream over UDP is remembered for two minutes after its last packet.
    world.bench.forget(world.caller, VIP)
    cluster.until(lambda: cluster.goes_through(world.caller, VIP) == "wg0", "the VIP's route")
    fresh = world.streams(VIP)
    cluster.work(1.0)
    assert (verdict := fresh.end()).goes_on, verdict


def test_nobody_sends_to_a_side_that_does_not_know_it(world: World) -> None:
    """While the other side has not accepted us, running connections go on in clear; then they move."""
    cluster = world.cluster
    direct = world.streams()
    # The called task never learns of the caller's key.
    cluster.admits = lambda claim: claim.task == world.called.id
    cluster.link("calling", "called")
    cluster.until(lambda: all(map(cluster.has_interface, world.tasks)), "interfaces")
    cluster.work(3.0)
    assert not cluster.are_linked(*world.tasks)
    cluster.admits = lambda _claim: True
    cluster.until(lambda: cluster.are_linked(*world.tasks), "the link")
    cluster.work(1.0)
    assert (verdict := direct.end()).goes_on, verdict


def test_a_fresh_task_waits_for_nobody(world: World) -> None:
    """Where nothing runs between two tasks yet, routes are there as soon as the peer is known."""
    cluster = world.cluster
    cluster.admits = lambda claim: claim.task == world.called.id
    cluster.link("calling", "called")
    cluster.until(lambda: cluster.goes_through(world.caller, world.called.address) == "wg0", "the caller's route")
    assert cluster.goes_through(world.caller, VIP) == "wg0"


@pytest.mark.parametrize("called", [Mode.OBSERVE, Mode.ENFORCE])
def test_enforcement_waits_for_running_connections_to_move(world: World, called: Mode) -> None:
    """A service that ran in clear is enforced when its linked connections have moved, and loses nothing."""
    cluster = world.cluster
    direct = world.streams()
    cluster.work(0.5)  # the agents have seen that it is in no mesh
    cluster.link("calling", "called", modes=(Mode.ENFORCE, called))
    cluster.until(lambda: cluster.are_linked(*world.tasks), "the link")
    cluster.until(lambda: world.is_enforced(world.caller), "enforcement")
    if called is Mode.ENFORCE:
        cluster.until(lambda: world.is_enforced(world.called), "enforcement")
    cluster.work(1.0)
    assert (verdict := direct.end()).goes_on, verdict


def test_enforcement_does_not_wait_forever(world: World) -> None:
    """What cannot move is cut in the end: in enforce nothing stays in clear."""
    cluster = world.cluster
    direct = world.streams()
    cluster.work(0.5)
    cluster.admits = lambda claim: claim.task == world.called.id
    cluster.link("calling", "called", modes=(Mode.ENFORCE, Mode.OBSERVE))
    cluster.until(lambda: world.is_enforced(world.caller), "enforcement", 30)
    cluster.work(0.5)
    assert not direct.end().goes_on


def test_a_new_task_of_an_enforced_service_gets_no_grace(world: World) -> None:
    """Its namespace is closed in the first pass, whatever it has open."""
    cluster = world.cluster
    cluster.link("calling", "called", modes=(Mode.ENFORCE, Mode.OBSERVE))
    cluster.until(lambda: world.is_enforced(world.caller), "enforcement")
    late = cluster.run("calling", 0)
    streams = world.streams(source=late)
    cluster.agents[0].ops.clear()
    cluster.agents[0].step()
    assert world.is_enforced(late)
    assert not streams.end().goes_on


def test_a_link_closes_around_running_connections(world: World) -> None:
    """Services that leave the mesh keep what runs between them, in clear again, however late one side hears of it."""
    cluster = world.cluster
    cluster.link("calling", "called")
    cluster.until(lambda: cluster.are_linked(*world.tasks), "the link")
    direct, balanced = world.streams(), world.streams(VIP)
    cluster.work(1.0)
    cluster.unlink("calling")
    cluster.agents[0].step()
    cluster.work(2 * QUIET_S)
    cluster.unlink("called")
    cluster.until(lambda: not any(map(cluster.has_interface, world.tasks)), "nothing left")
    cluster.work(0.5)
    for verdict in (direct.end(), balanced.end()):
        print(verdict)
        assert verdict.goes_on, verdict
