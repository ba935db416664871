"""The controller's threads, one call at a time: what each does with errors, events and settings."""

import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from controller import wiring
from controller.reconciler import AllTasks, Claim, ServiceTasks, WholeMesh, Work
from controller.settings import ControllerSettings
from controller.swarm.api import EventKind, SwarmEvent
from hivewire.errors import InvalidIdentity, NotLeader, RevisionConflict, StoreUnavailable, SwarmUnavailable
from hivewire.ids import ServiceId, TaskId
from hivewire.records import NodeRecord
from hivewire.reports import InterfaceReport
from hivewire.workqueue import WorkQueue
from tests.fakes.clock import FakeClock
from tests.fakes.signatures import Unsigned
from tests.property.test_controller_rig import Cluster


class Failing:
    """A reconciler that fails once per error it is given, and stops the loop when it has worked off everything."""

    def __init__(self, queue: WorkQueue[Work], errors: Iterable[Exception], clock: FakeClock) -> None:
        self._queue = queue
        self._errors = list(errors)
        self._clock = clock
        self.worked: list[Work] = []

    def reconcile(self, work: Work) -> None:
        self.worked.append(work)
        self._clock.advance(60.0)  # so that a retry is due at once
        if self._errors:
            raise self._errors.pop(0)
        self._queue.close()


@pytest.mark.parametrize(
    "error",
    [
        RevisionConflict("somebody wrote"),
        NotLeader("another leads"),
        StoreUnavailable("no etcd"),
        SwarmUnavailable("no engine"),
        ValueError("a bug"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_work_that_fails_comes_back(error: Exception) -> None:
    """Whatever a pass raises, its key is worked on again, and the loop goes on."""
    clock = FakeClock()
    queue: WorkQueue[Work] = WorkQueue(clock=clock, jitter=lambda: 0.0)
    work = Claim(TaskId("t"))
    queue.add(work)
    failing = Failing(queue, [error, error], clock)
    wiring._work(queue, failing)  # type: ignore[arg-type]
    assert failing.worked == [work] * 3


def test_a_closed_queue_ends_the_loop() -> None:
    """Nothing is begun after the controller was told to stop."""
    queue: WorkQueue[Work] = WorkQueue()
    queue.add(WholeMesh())
    queue.close()
    failing = Failing(queue, [], FakeClock())
    wiring._work(queue, failing)  # type: ignore[arg-type]
    assert failing.worked == []


class Told:
    """A Swarm that tells these events, and sets ``stop`` at the end of its stream."""

    def __init__(self, stop: threading.Event, events: Iterable[SwarmEvent]) -> None:
        self._stop = stop
        self._events = events

    def events(self) -> Iterator[SwarmEvent]:
        yield from self._events
        self._stop.set()
        raise SwarmUnavailable("the stream broke")


def test_events_become_work() -> None:
    """Each kind of event adds exactly the work that it may have made necessary."""
    expected: dict[SwarmEvent, list[Work]] = {
        SwarmEvent(EventKind.SUBSCRIBED): [WholeMesh(), AllTasks()],
        SwarmEvent(EventKind.SERVICE, "update", "s1"): [WholeMesh(), ServiceTasks(ServiceId("s1"))],
        SwarmEvent(EventKind.NODE, "update", "n1"): [WholeMesh(), AllTasks()],
        SwarmEvent(EventKind.NETWORK, "create", "x"): [WholeMesh()],
    }
    for event, works in expected.items():
        replica = Cluster([]).start("m1")
        while replica.queue.get(0.0) is not None:
            pass  # what the start added
        for begun in (WholeMesh(), AllTasks()):
            replica.queue.done(begun)
        stop = threading.Event()
        wiring._watch_swarm(Told(stop, [event]), replica.reconciler, stop)  # type: ignore[arg-type]
        got = []
        while (work := replica.queue.get(0.0)) is not None:
            got.append(work)
        assert got == works


class Answering:
    """Agents that answer with what they were asked about, or cannot be asked."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked: list[NodeRecord] = []
        self._error = error

    def interfaces(self, nodes: Iterable[NodeRecord]) -> Mapping[TaskId, InterfaceReport]:
        if self._error:
            raise self._error
        self.asked += nodes
        return {}


def test_the_source_asks_the_agents_that_live() -> None:
    """The API's state is the reconciler's, and the agents asked are those in it."""
    cluster = Cluster()
    cluster.agent(cluster.node)
    cluster.settle()
    agents: Any = Answering()
    source = wiring.Source(cluster.one.reconciler, agents, cluster.store, Unsigned())
    assert source.state() == cluster.one.reconciler.state()
    assert source.interfaces() == {}
    assert [node.node for node in agents.asked] == [cluster.node]


def test_without_an_identity_the_api_still_answers() -> None:
    """A certificate that cannot be read hides the counters, not the mesh."""
    cluster = Cluster()
    cluster.settle()
    agents: Any = Answering(InvalidIdentity("being renewed"))
    assert wiring.Source(cluster.one.reconciler, agents, cluster.store, Unsigned()).interfaces() == {}


def test_tokens_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a token of its own the first start makes one, and the next start keeps it."""
    monkeypatch.setattr(wiring, "_SECRET", tmp_path / "absent")
    settings = ControllerSettings(state_folder=tmp_path / "state")
    wiring._tokens(settings)
    made = (tmp_path / "state" / "admin_token").read_bytes()
    assert len(made) >= 32
    wiring._tokens(settings)
    assert (tmp_path / "state" / "admin_token").read_bytes() == made


def test_waiting_for_swarm_ends_when_told_to() -> None:
    """A controller that is stopped before the engine answered just ends."""
    stop = threading.Event()
    stop.set()
    swarm: Any = Cluster([]).swarm
    swarm.is_down = True
    assert wiring._wait_for_swarm(swarm, stop) is None


def test_swarm_that_answers_is_not_waited_for() -> None:
    """What the engine says of itself is taken as soon as it says it."""
    cluster = Cluster([])
    swarm: Any = cluster.swarm
    info = wiring._wait_for_swarm(swarm, threading.Event())
    assert info is not None
    assert info.node == cluster.node
