"""Builds the agent and runs it.

engine events --on_event--.                                      .--> claims/, status/  (store)
records ------on_records--+--> queue of tasks --> reconcile -----+
every minute --resync-----'    (worker threads)                  '--> task namespace    (kernel)
the same, and new namespaces --> guard/loops.py, apart ------------> overlay namespaces
underlay, lease --> nodes/<node>; paths to other nodes, every minute
                                            questions of managers --> report over mTLS
every ten seconds --> what the rules noted --> denials, log
"""

import threading
import time

from agent.book import Book
from agent.grace import Grace
from agent.guard.loops import Guard
from agent.kernel.api import Kernel
from agent.kernel.bridge import way_out
from agent.kernel.paths import PathSockets
from agent.kernel.rtnetlink import Calls
from agent.kernel.selection import Choice, select
from agent.node import NodePresence, underlay_address
from agent.paths import PathWatch
from agent.reconciler import TaskReconciler
from agent.report import ReportServer
from agent.seen import Seen
from agent.settings import AgentSettings
from agent.tasks import LocalNode, LocalTasks
from hivewire import __version__, logs
from hivewire.connect import open_store
from hivewire.errors import HivewireError, InvalidInput, KernelBusy, NoWireGuard, SwarmUnavailable, Unsupported
from hivewire.identity import IdentitySource
from hivewire.ids import TaskId
from hivewire.process import stop_event
from hivewire.records import NodeRecord
from hivewire.reports import DENIALS_PATH, INTERFACES_PATH, AgentReport, DenialReport
from hivewire.signed import Managers, SwarmSignatures
from hivewire.workqueue import WorkQueue

# How long to leave a task alone that cannot work before somebody changes something; its events still come at once.
_SLOW_S = 30.0
# How often to look at what the rules of a task noted; the kernel keeps it for FORGET_S.
_DENIALS_S = 10.0


def run(settings: AgentSettings) -> bool:
    """Run until SIGTERM or SIGINT; false where a bug ended it. What is applied stays applied.

    Raises InvalidSettings, InvalidIdentity, Unsupported at the start.
    """
    log = logs.get()
    stop = stop_event()

    identity = IdentitySource(settings.identity_files)
    tasks = LocalTasks(settings.docker_socket)
    local = _wait_for_node(tasks, stop)
    if local is None:
        return True
    kernel = _wait_for_kernel(settings.backend, stop)
    if kernel is None:
        return True
    record = _node_record(settings, local, kernel)
    queue: WorkQueue[TaskId] = WorkQueue()
    store = open_store(settings, local.managers)
    signatures = SwarmSignatures(identity, Managers(lambda: tasks.node().manager_ids))
    calls = Calls()
    book, guard_book = (Book(signatures, Seen(settings.state_folder / f"{it}.sqlite")) for it in ("seen", "guard"))
    presence = NodePresence(
        store,
        signatures,
        record,
        kernel.underlay,
        lambda: queue_all(reconciler),
        doubts=lambda: (*book.doubts(), *guard_book.doubts()),
    )
    paths = PathWatch(PathSockets(), lambda: presence.record.underlay_mtu, lambda: queue_all(reconciler))
    grace = Grace()
    reconciler = TaskReconciler(
        node=lambda: presence.record,
        tasks=tasks,
        kernel=kernel,
        store=store,
        queue=queue,
        signatures=signatures,
        book=book,
        bridge=lambda: way_out(calls),
        paths=paths,
        grace=grace,
    )
    guard = Guard(tasks, store, guard_book, settings.namespaces, settings.resync_s, record.node, grace)
    server = ReportServer(
        (str(record.underlay_address), settings.report_port),
        identity,
        {
            INTERFACES_PATH: lambda: AgentReport(
                node=record.node, taken_at=time.time(), interfaces=reconciler.interfaces()
            ),
            DENIALS_PATH: lambda: DenialReport(
                node=record.node, taken_at=time.time(), tasks=(*reconciler.denials(), *guard.denials())
            ),
        },
    )

    log.info("agent.started", version=__version__, node=record.node, backend=kernel.backend,
             underlay=str(record.underlay_address), mtu=presence.record.underlay_mtu)  # fmt: skip
    guard.start()  # first: a task is guarded before it is anything else
    reconciler.mirror.start()
    server.start()
    loops = [
        threading.Thread(target=_watch_engine, args=(tasks, reconciler, stop), name="events", daemon=True),
        threading.Thread(target=_resync, args=(reconciler, settings.resync_s, stop), name="resync", daemon=True),
        threading.Thread(target=_watch_denials, args=(reconciler, guard, stop), name="denials", daemon=True),
        threading.Thread(target=presence.run, args=(stop,), name="node"),
        threading.Thread(target=paths.run, args=(stop,), name="paths"),
        *(
            threading.Thread(target=_work, args=(queue, reconciler), name=f"worker-{n}")
            for n in range(settings.workers)
        ),
    ]
    for loop in loops:
        loop.start()
    stop.wait()
    queue.close()
    for loop in loops:
        if not loop.daemon:
            loop.join()
    server.shutdown()
    reconciler.mirror.stop()
    guard.stop()
    store.close()
    log.info("agent.stopped")
    return not stop.is_bug


def queue_all(reconciler: TaskReconciler) -> None:
    """Look at every task again, if the engine answers; the next resync does it else."""
    try:
        reconciler.resync()
    except SwarmUnavailable as error:
        logs.get().warning("resync.failed", error=str(error))


def _wait_for_node(tasks: LocalTasks, stop: threading.Event) -> LocalNode | None:
    while not stop.is_set():
        try:
            return tasks.node()
        except SwarmUnavailable as error:
            logs.get().warning("engine.unavailable", error=str(error))
            stop.wait(1)
    return None


def _wait_for_kernel(backend: Choice, stop: threading.Event) -> Kernel | None:
    """The host of userspace devices is a service of its own, which may start after the agent."""
    delay_s = 0.5
    while not stop.is_set():
        try:
            return select(backend)
        except (NoWireGuard, KernelBusy) as error:
            logs.get().error("wireguard.missing", error=str(error))
            stop.wait(delay_s)
            delay_s = min(2 * delay_s, _SLOW_S)
    return None


def _node_record(settings: AgentSettings, local: LocalNode, kernel: Kernel) -> NodeRecord:
    address = underlay_address(settings.underlay_address, local.address)
    return NodeRecord(
        node=local.node,
        hostname=local.hostname,
        agent_version=__version__,
        underlay_address=address,
        underlay_mtu=kernel.underlay(address).mtu,
        backend=kernel.backend,
        first_port=settings.first_port,
        last_port=settings.last_port,
        report_port=settings.report_port,
    )


def _watch_engine(tasks: LocalTasks, reconciler: TaskReconciler, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            queue_all(reconciler)
            for event in tasks.events():
                reconciler.on_event(event)
        except SwarmUnavailable as error:
            logs.get().warning("events.lost", error=str(error))
        stop.wait(0.5)


def _resync(reconciler: TaskReconciler, period_s: float, stop: threading.Event) -> None:
    while not stop.wait(period_s):
        queue_all(reconciler)


def _watch_denials(reconciler: TaskReconciler, guard: Guard, stop: threading.Event) -> None:
    """Look at one task after the other, so that the round takes as long however many there are."""
    while True:
        tasks = reconciler.meshed()
        for task in tasks:
            if stop.wait(_DENIALS_S / len(tasks)):
                return
            try:
                reconciler.read_denials(task)
            except Exception:  # noqa: BLE001 -- one reading that fails must not end all later ones
                logs.get().exception("denials.bug", task=task.task)
        try:
            guard.read_denials()
        except Exception:  # noqa: BLE001 -- as above
            logs.get().exception("denials.bug")
        if not tasks and stop.wait(_DENIALS_S):
            return


def _work(queue: WorkQueue[TaskId], reconciler: TaskReconciler) -> None:
    log = logs.get()
    while (task := queue.get()) is not None:
        try:
            outcome = reconciler.reconcile(task)
        except (InvalidInput, Unsupported) as error:
            queue.done(task)
            queue.add_after(task, _SLOW_S)
            log.error("task.failed", task=task, error=str(error))
        except HivewireError as error:
            delay_s = queue.retry(task)
            log.warning("task.retry", task=task, error=str(error), again_in_s=round(delay_s, 2))
        except Exception:
            queue.retry(task)
            log.exception("task.bug", task=task)
        else:
            queue.done(task)
            if outcome.ops:
                log.info("task.applied", task=task, outcome=outcome.summary, ops="; ".join(map(str, outcome.ops)),
                         calls=outcome.calls, since_start_s=outcome.since_start_s)  # fmt: skip
            else:
                log.debug("task.unchanged", task=task, outcome=outcome.summary)
