"""The threads of the guard.

new files (inotify) --on_created--> strict: shut at once
                          |
engine events --on_network+
records ------on_records--+--> queue of overlay namespaces --> reconcile --> nftables there
every minute --resync-----'    (a thread of its own)
"""

import threading
from pathlib import Path
from typing import Final

from agent.book import Book
from agent.denials import DenialBook
from agent.grace import Grace
from agent.guard.reconciler import GuardReconciler, Outcome
from agent.kernel.edges import NodeEdges
from agent.kernel.inotify import NewFiles
from agent.kernel.overlay import OverlayNamespaces
from agent.tasks import LocalTasks
from hivewire import logs
from hivewire.errors import HivewireError, NamespaceGone, SwarmUnavailable, Unsupported
from hivewire.ids import NodeId, ServiceId, TaskId
from hivewire.reports import TaskDenials
from hivewire.store.api import Store
from hivewire.workqueue import WorkQueue

_SLOW_S: Final = 30.0
_TURN_S: Final = 0.5


class Guard:
    """Builds the guard and runs it."""

    def __init__(
        self,
        tasks: LocalTasks,
        store: Store,
        book: Book,
        folder: Path,
        resync_s: float,
        node: NodeId,
        grace: Grace | None = None,
    ) -> None:
        self._tasks = tasks
        self._folder = folder
        self._resync_s = resync_s
        self._stop = threading.Event()
        self._queue: WorkQueue[str] = WorkQueue()
        self._denials = DenialBook()
        self._overlays = OverlayNamespaces(folder)
        self.reconciler = GuardReconciler(
            networks=tasks,
            overlays=self._overlays,
            edges=NodeEdges(),
            store=store,
            queue=self._queue,
            book=book,
            node=node,
            # Whose addresses they are is for the controller to say: they are of no single task.
            notes=lambda file, space: self._denials.read(TaskId(file), ServiceId(""), space),
            spares=(grace or Grace()).holds,
        )
        self._threads = [
            threading.Thread(target=self._watch_files, name="guard-files"),
            threading.Thread(target=self._watch_engine, name="guard-events", daemon=True),
            threading.Thread(target=self._resync, name="guard-resync"),
            threading.Thread(target=self._work, name="guard"),
        ]

    def start(self) -> None:
        self._tasks.on_sandbox(lambda: self.reconciler.on_network(None))
        self.reconciler.mirror.start()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """What is in place stays in place."""
        self._stop.set()
        self._queue.close()
        for thread in self._threads:
            if not thread.daemon:
                thread.join()
        self.reconciler.mirror.stop()

    def denials(self) -> tuple[TaskDenials, ...]:
        """What the guard dropped on the networks of this node, until now."""
        self.read_denials()
        return self._denials.reports()

    def read_denials(self) -> None:
        """Take down what the guard noted."""
        self.reconciler.read_notes()
        self._denials.leave_but(frozenset(map(TaskId, self._overlays.list())))

    def _watch_files(self) -> None:
        log = logs.get()
        while not self._stop.is_set():
            try:
                with NewFiles(self._folder) as files:
                    self.reconciler.resync()  # those that came before the watch
                    while not self._stop.is_set():
                        for file in files.wait(_TURN_S):
                            self._on_created(file)
            except HivewireError as error:
                log.warning("guard.unwatched", error=str(error))
                self._stop.wait(_TURN_S)

    def _on_created(self, file: str) -> None:
        try:
            outcome = self.reconciler.on_created(file)
        except HivewireError as error:
            # The loop comes next, and again until it works.
            logs.get().warning("guard.late", namespace=file, error=str(error))
        else:
            if outcome is not None:
                _tell(outcome)

    def _watch_engine(self) -> None:
        while not self._stop.is_set():
            try:
                self.reconciler.on_network(None)
                for network in self._tasks.network_events():
                    self.reconciler.on_network(network)
            except SwarmUnavailable as error:
                logs.get().warning("events.lost", error=str(error))
            self._stop.wait(_TURN_S)

    def _resync(self) -> None:
        while not self._stop.wait(self._resync_s):
            self.reconciler.resync()

    def _work(self) -> None:
        log = logs.get()
        while (file := self._queue.get()) is not None:
            try:
                outcome = self.reconciler.reconcile(file)
            except NamespaceGone:
                self._queue.retry(file)  # not mounted yet, or on its way out; the next pass sees which
            except Unsupported as error:
                self._queue.done(file)
                self._queue.add_after(file, _SLOW_S)
                log.error("guard.failed", namespace=file, error=str(error))
            except HivewireError as error:
                delay_s = self._queue.retry(file)
                log.warning("guard.retry", namespace=file, error=str(error), again_in_s=round(delay_s, 2))
            except Exception:
                self._queue.retry(file)
                log.exception("guard.bug", namespace=file)
            else:
                self._queue.done(file)
                _tell(outcome)


def _tell(outcome: Outcome) -> None:
    log = logs.get()
    if outcome.ops:
        log.info("guard.applied", namespace=outcome.file, network=outcome.network, outcome=outcome.summary,
                 ops="; ".join(outcome.ops), since_created_s=outcome.since_created_s)  # fmt: skip
    else:
        log.debug("guard.unchanged", namespace=outcome.file, network=outcome.network, outcome=outcome.summary)
