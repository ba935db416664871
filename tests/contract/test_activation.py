"""Agents start again, and the mesh comes and goes around running connections: what their streams go through.

The agents are the real ones but for engine, Swarm and controller (agents.py); namespaces, devices, routes and rules
are real, and the streams are real sockets.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hivewire.records import Mode
from tests.contract.agents import PORT, VIP, Cluster, OverlayBench
from tests.contract.test_kernel import Task, _missing
from tests.streams import Streams, start_server, stop


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
        streams = Streams(self.bench.enter(source or self.caller), str(host or self.called.address), PORT)
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
    direct, balanced = world.streams(), world.streams(VIP)
    cluster.work(3.0)  # all that is still to do, such as a handshake that one side waited for
    revision = cluster.store.list("/").revision
    for _ in range(3):
        cluster.restart()
        cluster.work(1.0)
        assert [agent.ops for agent in cluster.agents] == [[], []]
    assert cluster.store.list("/").revision == revision
    for verdict in (direct.end(), balanced.end()):
        print(verdict)
        assert verdict.is_whole, verdict
