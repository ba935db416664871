"""The guard's threads: they notice new namespaces, come back after errors, and end when told to."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.book import Book
from agent.guard.desired import LocalNetwork
from agent.guard.loops import Guard
from agent.guard.reconciler import Outcome
from hivewire.errors import KernelBusy, NamespaceGone, NoPermission, SwarmUnavailable
from hivewire.ids import NetworkId, NodeId
from hivewire.store.memory import MemoryStore
from tests.fakes.signatures import Unsigned

FILE = "1-abcdefghij"
PATIENCE_S = 30.0


class FakeTasks:
    """An engine whose stream of events breaks once and is silent afterwards."""

    def __init__(self) -> None:
        self.streams = 0
        self.over = threading.Event()

        self.listeners: list[Callable[[], None]] = []

    def on_sandbox(self, listener: Callable[[], None]) -> None:
        self.listeners.append(listener)

    def network(self, network: NetworkId, name: str) -> LocalNetwork:
        return LocalNetwork()

    def network_events(self) -> Iterator[NetworkId | None]:
        self.streams += 1
        if self.streams == 1:
            raise SwarmUnavailable("the engine does not answer")
        self.over.wait()
        yield None


@pytest.fixture
def tasks() -> Iterator[FakeTasks]:
    tasks = FakeTasks()
    yield tasks
    tasks.over.set()


def started(tasks: FakeTasks, folder: Path) -> Guard:
    guard = Guard(tasks, MemoryStore(), Book(Unsigned()), folder, 60.0, NodeId("n"))  # type: ignore[arg-type]
    guard.start()
    return guard


def until(question: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not question():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


@pytest.mark.parametrize(
    "error",
    [NamespaceGone("gone"), KernelBusy("busy"), SwarmUnavailable("away"), ValueError("a bug")],
    ids=lambda error: type(error).__name__,
)
def test_a_new_namespace_is_worked_on_until_it_works(
    error: Exception, tasks: FakeTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is noticed at once, and whatever a pass raises it comes again."""
    guard = started(tasks, tmp_path)
    seen: list[str] = []

    def reconcile(file: str) -> Outcome:
        seen.append(file)
        if len(seen) < 3:
            raise error
        return Outcome(file, "guarded", ops=("close nothing",))

    monkeypatch.setattr(guard.reconciler, "reconcile", reconcile)
    try:
        (tmp_path / FILE).touch()
        until(lambda: len(seen) >= 3)
    finally:
        guard.stop()
    assert set(seen) == {FILE}


def test_what_a_node_cannot_do_is_not_tried_all_the_time(
    tasks: FakeTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a capability another try is of no use before somebody changes something."""
    seen: list[str] = []

    def reconcile(file: str) -> Outcome:
        seen.append(file)
        raise NoPermission("give the agent CAP_SYS_ADMIN")

    guard = started(tasks, tmp_path)
    monkeypatch.setattr(guard.reconciler, "reconcile", reconcile)
    try:
        guard.reconciler.on_network(None)
        (tmp_path / FILE).touch()
        until(lambda: seen)
        until(lambda: tasks.streams == 2)
        time.sleep(0.3)
    finally:
        guard.stop()
    assert len(seen) < 10


def test_a_namespace_that_became_known_is_looked_at(tasks: FakeTasks, tmp_path: Path) -> None:
    """When the engine has told where a task lives, its networks are passed over again, to find its port."""
    (tmp_path / FILE).touch()
    guard = started(tasks, tmp_path)
    try:
        passes: list[str] = []
        until(lambda: tasks.streams == 2 and tasks.listeners)
        guard.reconciler.reconcile = lambda file: passes.append(file) or Outcome(file, "in order")  # type: ignore
        time.sleep(0.1)
        passes.clear()
        tasks.listeners[0]()
        until(lambda: FILE in passes)
    finally:
        guard.stop()


def test_the_folder_may_come_later(tasks: FakeTasks, tmp_path: Path) -> None:
    """Where the engine has not made its folder yet the watch waits for it."""
    folder = tmp_path / "netns"
    guard = started(tasks, folder)
    try:
        folder.mkdir()
        (folder / FILE).touch()
        until(lambda: folder.exists())
    finally:
        guard.stop()


def test_stopping_ends_the_threads(tasks: FakeTasks, tmp_path: Path) -> None:
    """None is left but the one that waits for the engine, which ends with the process."""
    guard = started(tasks, tmp_path)
    guard.stop()
    left = {thread.name for thread in threading.enumerate() if thread.name.startswith("guard")}
    assert left <= {"guard-events"}
