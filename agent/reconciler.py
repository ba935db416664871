"""The loop for one task: observe its namespace, compute what it should hold, plan, apply, claim and report.

Level-triggered: an event only says which task to look at again. Nothing here remembers what was applied; the kernel
is asked each time. What is kept between passes is what only events tell (a container that is being stopped), and what
saves a question whose answer cannot change (the container's addresses).
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Network
from typing import Final, Protocol

import msgspec

from agent.book import DOUBT_S, Book
from agent.denials import DenialBook
from agent.desired import DesiredTask, TaskFacts, desired_task
from agent.grace import LOOK_S, Grace
from agent.handshakes import Handshakes, Turn
from agent.kernel.api import Kernel, Session
from agent.moving import FRESH_S, QUIET_S, Leave, Move, Undecided, in_clear, undecided
from agent.observed import Bridge, ObservedInterface, ObservedTask
from agent.ops import CreateInterface, Op, RemoveRules, SetRules
from agent.own import OwnRecords
from agent.plan import plan, plan_quarantine, plan_removal
from agent.rules.closed import closed, is_closed
from agent.rules.render import WayOut
from agent.tasks import LocalTask, TaskEvent
from hivewire import logs
from hivewire.errors import HivewireError, InvalidInput, KernelBusy, NamespaceGone, TaskGone
from hivewire.ids import NodeId, ServiceId, TaskId
from hivewire.keys import PrivateKey
from hivewire.records import (
    MESH_KEY,
    QUARANTINES,
    Address,
    ClaimRecord,
    Endpoint,
    MeshRecord,
    Mode,
    NodeRecord,
    PeerRecord,
    PolicyRecord,
    Record,
    StatusRecord,
    TaskPhase,
    claim_key,
    peers_prefix,
    policy_key,
    quarantine_keys,
    status_key,
)
from hivewire.reports import InterfaceReport, PeerReport, TaskDenials
from hivewire.signed import Signatures
from hivewire.store.api import Store
from hivewire.store.mirror import Mirror
from hivewire.workqueue import WorkQueue

_FOLLOWED_ALWAYS: Final = (MESH_KEY, QUARANTINES)


class Tasks(Protocol):
    """What the loop asks of the engine."""

    def get(self, task: TaskId) -> LocalTask: ...

    def list(self) -> dict[TaskId, ServiceId]: ...


class Paths(Protocol):
    """What is known of the ways to other nodes."""

    def __call__(self, endpoints: Iterable[Endpoint], /) -> Mapping[Address, int]: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one pass did, in the words of its log line."""

    task: TaskId
    summary: str
    ops: tuple[Op, ...] = ()
    calls: int = 0
    """Requests to kernel and userspace devices; with several workers also those of other tasks meanwhile."""
    since_start_s: float | None = None
    """From the container's start to its interface being ready; only where this pass made the interface."""


class TaskReconciler:
    """Thread-safe for different tasks; the work queue never hands out one task twice at a time."""

    def __init__(
        self,
        *,
        node: Callable[[], NodeRecord],
        tasks: Tasks,
        kernel: Kernel,
        store: Store,
        queue: WorkQueue[TaskId],
        signatures: Signatures,
        book: Book,
        bridge: Callable[[], Bridge | None] = lambda: None,
        paths: Paths = lambda _endpoints: {},
        grace: Grace | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """``bridge`` is that of the node's tasks' way out, as it is now."""
        self._node = node
        self._bridge = bridge
        self._tasks = tasks
        self._kernel = kernel
        self._store = store
        self._queue = queue
        self._book = book
        self._paths = paths
        self._grace = grace or Grace(monotonic)
        self._monotonic = monotonic
        self._now = now
        self._log = logs.get()
        self._lock = threading.Lock()
        self._local: dict[TaskId, LocalTask] = {}
        # Of these the engine is asked again; until it has answered, what it said before is what we know.
        self._outdated: set[TaskId] = set()
        self._services: dict[TaskId, ServiceId] = {}
        self._handshakes = Handshakes()
        self._moves: dict[TaskId, Move] = {}
        # Tasks that send in clear again and still receive.
        self._leaving: dict[TaskId, Leave] = {}
        self._denials = DenialBook(now, monotonic)
        self._needs: dict[TaskId, frozenset[str]] = {}
        self._stopping: set[TaskId] = set()
        self._followed: set[str] = set()
        self.mirror = Mirror(store, self.on_records, clock=monotonic)
        self._own = OwnRecords(store, self.mirror, signatures, node().node)
        for prefix in (*_FOLLOWED_ALWAYS, *self._own.prefixes):
            self.mirror.follow(prefix)

    @property
    def store_writes(self) -> int:
        """Transactions that wrote claims and statuses since the start."""
        return self._own.transactions

    # What happened: each of these only marks tasks to be looked at.

    def on_event(self, event: TaskEvent) -> None:
        with self._lock:
            self._outdated.add(event.task)
            if event.stops:
                self._stopping.add(event.task)
            elif event.action == "start":
                self._stopping.discard(event.task)
        self._queue.add(event.task)

    def on_records(self, prefix: str, changed_keys: frozenset[str], complete: bool) -> None:
        """Called by the mirror."""
        if prefix in self._own.prefixes:
            self._add(self._own.lost(prefix, changed_keys, listed=complete))
            return
        items = self.mirror.items(prefix)
        values = {key: (items[key].value if key in items else None) for key in changed_keys}
        with self._lock:
            if prefix not in _FOLLOWED_ALWAYS and prefix not in self._followed:
                return  # let go of in the meantime: the book must not keep what nothing updates
            self._book.update(prefix, values, listed=complete, now=self._monotonic())
            touched = [task for task, needs in self._needs.items() if prefix in needs or prefix in _FOLLOWED_ALWAYS]
        self._add(touched)

    def resync(self) -> None:
        """Look at every task again, and clean up after those that left unseen. Raises SwarmUnavailable."""
        present = self._tasks.list()
        with self._lock:
            gone = self._services.keys() - present.keys()
            self._services.update(present)
            self._outdated.update(self._local)
        if self._book.expire(self._monotonic()):
            self._log.info("records.expired")
        self._add({*present, *gone, *self._own.tasks()})

    # One pass.

    def reconcile(self, task: TaskId) -> Outcome:
        """Raises whatever its adapters raise, after noting it in the task's status."""
        try:
            local = self._task(task)
        except TaskGone:
            return self._forget(task)
        try:
            outcome = self._pass(local)
        except NamespaceGone:
            # The container may be ending, or be in another namespace by now: the engine is asked again.
            with self._lock:
                self._local.pop(task, None)
            raise
        except HivewireError as error:
            self._note(local, error)
            raise
        with self._lock:
            needs = self._needs.get(task, frozenset())
        if self._book.may_change((*needs, *_FOLLOWED_ALWAYS)):
            self._queue.add_after(task, DOUBT_S)
        return outcome

    def interfaces(self) -> tuple[InterfaceReport, ...]:
        """What the kernel says now of every interface on this node."""
        with self._lock:
            local = list(self._local.values())
        reports = []
        for each in local:
            try:
                with self._session(each) as session:
                    observed = session.observe()
            except HivewireError:
                continue
            if observed.interface is not None:
                reports.append(_interface_report(each, observed.interface, observed.rules))
        return tuple(reports)

    def meshed(self) -> tuple[LocalTask, ...]:
        """The tasks of this node whose rules may have noted something."""
        with self._lock:
            local = list(self._local.values())
        policies = {it.service: self._book.get(PolicyRecord, policy_key(it.service)) for it in local}
        return tuple(it for it in local if (policy := policies[it.service]) is not None and policy.mode is not Mode.OFF)

    def read_denials(self, local: LocalTask) -> None:
        """Take down what the rules of a task noted. A task that is gone or not ready is passed over."""
        with suppress(HivewireError), self._session(local) as session:
            self._denials.read(local.task, local.service, session)

    def denials(self) -> tuple[TaskDenials, ...]:
        """What all tasks of this node noted, until now."""
        for local in self.meshed():
            self.read_denials(local)
        return self._denials.reports()

    def _pass(self, local: LocalTask) -> Outcome:
        policy = self._book.get(PolicyRecord, policy_key(local.service))
        if not self._follow(local, policy):
            return Outcome(local.task, "waits for records")
        if self._is_quarantined(local.service, local.task, self._node().node):
            return self._close(local, policy)
        mesh = self._book.get(MeshRecord, MESH_KEY)
        settled = mesh is not None and mesh.settled
        if policy is None:
            return self._reopen(local) if settled else Outcome(local.task, "no policy yet")
        if policy.mode is Mode.OFF:
            return self._leave(local)
        with self._lock:
            self._leaving.pop(local.task, None)
        node, calls_before = self._node(), self._kernel.calls
        with self._session(local) as session:
            observed = session.observe()
            peers = {s: self._peers(s) for s in policy.linked_services}
            move = self._move(local.task)
            policy = self._lenient(local, policy, session, observed, move)
            desired = desired_task(self._facts(local, policy, observed, node, peers), policy, peers)
            held = self._held(local, desired, observed, policy, peers, session, move)
            ops = plan(
                desired,
                observed,
                new_key=PrivateKey.generate(),
                node=node,
                now=self._now(),
                prune=settled and not any(self._book.is_in_doubt(peers_prefix(it)) for it in policy.linked_services),
                turn=self._turn(local, desired, observed.interface),
                held=held.destinations,
            )
            if ops:
                self._save_notes(local, session, observed, ops)
                session.apply(ops)
                ready_at = self._now()
                observed = session.observe()
        interface = observed.interface
        if interface is None:
            # Userspace devices can die at any moment; the next pass makes a new one.
            raise NamespaceGone(f"the interface of task {local.task} vanished")
        self._own.write(
            {
                claim_key(node.node, local.task): self._claim(local, node, interface),
                status_key(node.node, local.task): _status(local, node, policy, interface),
            }
        )
        self._look_again(local, move)
        if not ops:
            return Outcome(local.task, "in order")
        is_new = isinstance(ops[0], CreateInterface)
        since_start_s = round(ready_at - local.started_at, 4) if is_new and local.started_at else None
        return Outcome(local.task, "configured", ops, self._kernel.calls - calls_before, since_start_s)

    def _lenient(
        self, local: LocalTask, policy: PolicyRecord, session: Session, observed: ObservedTask, move: Move
    ) -> PolicyRecord:
        """The policy as it is to be applied now."""
        if policy.mode is not Mode.ENFORCE:
            self._grace.forget(local.container)
            return policy
        if not self._grace.holds(local.container):
            return policy
        flows = move.flows(self._monotonic(), session.flows)
        subnets = [IPv4Network(s) for network in policy.networks for s in network.subnets if ":" not in s]
        self._grace.look(
            local.container, moved=observed.interface is not None and not in_clear(flows, observed, subnets)
        )
        if not self._grace.holds(local.container):
            return policy
        return msgspec.structs.replace(policy, mode=Mode.OBSERVE)

    def _held(
        self,
        local: LocalTask,
        desired: DesiredTask,
        observed: ObservedTask,
        policy: PolicyRecord,
        peers: Mapping[ServiceId, list[PeerRecord]],
        session: Session,
        move: Move,
    ) -> Undecided:
        """What is not routed yet, for connections that would break. In ``enforce`` the old way is closed anyhow."""
        missing = undecided(desired, observed)
        # An interface that vanished under its rules, as a userspace device can: what it carried must not go in clear.
        has_vanished = observed.interface is None and bool(observed.rules)
        if policy.mode is Mode.ENFORCE or has_vanished or not missing:
            held = Undecided()
        else:
            links = {s: {a for peer in them for a in peer.addresses.values()} for s, them in peers.items()}
            routed = {route.destination.network_address for route in observed.routes}
            now, is_fresh = self._monotonic(), 0 < self._now() - local.started_at < FRESH_S
            candidates = move.candidates(missing, links, routed, now, is_fresh=is_fresh)
            held = candidates.held(move.flows(now, session.flows)) if candidates else candidates
        move.hold(held)
        return held

    def _move(self, task: TaskId) -> Move:
        with self._lock:
            return self._moves.setdefault(task, Move())

    def _look_again(self, local: LocalTask, move: Move) -> None:
        """What nobody tells of: handshakes that one waits for, and the end of connections."""
        now = self._monotonic()
        waits = [self._handshakes.wait_s(local.task, now), move.wait_s(now)]
        waits += [LOOK_S] if self._grace.holds(local.container) else []
        known = [wait for wait in waits if wait is not None]
        if known:
            self._queue.add_after(local.task, min(known))

    def _turn(self, local: LocalTask, desired: DesiredTask, interface: ObservedInterface | None) -> Turn:
        """Others can know the task's key once it was claimed."""
        claimed = self._own.read(ClaimRecord, claim_key(self._node().node, local.task))
        own = interface.public_key if interface is not None else None
        known = own if claimed is not None and str(own) == claimed.public_key else None
        there = interface.peers if interface is not None else {}
        return self._handshakes.turn(local.task, known, desired.peers, there, self._monotonic())

    def _facts(
        self,
        local: LocalTask,
        policy: PolicyRecord,
        observed: ObservedTask,
        node: NodeRecord,
        peers: Mapping[ServiceId, list[PeerRecord]],
    ) -> TaskFacts:
        if not any(network.id in local.addresses for network in policy.networks):
            names = ", ".join(n.name for n in policy.networks)
            raise InvalidInput(f"task {local.name} has no address on the overlay networks of its service ({names})")
        return TaskFacts(
            local.task,
            local.service,
            local.addresses,
            observed.addresses,
            node.underlay_mtu,
            node.underlay_address,
            self._paths(peer.endpoint for records in peers.values() for peer in records),
            self._way_out(local, observed),
        )

    def _way_out(self, local: LocalTask, observed: ObservedTask) -> WayOut | None:
        """The task's interface on the node's bridge for that, known by its address."""
        bridge, overlay = self._bridge(), set(local.addresses.values())
        if bridge is not None:
            for address, interface in sorted(observed.addresses.items()):
                if address in bridge.gateway.network and address not in overlay:
                    return WayOut(interface, bridge.gateway, bridge.mac)
        return None

    def _peers(self, service: ServiceId) -> list[PeerRecord]:
        """The tasks of a linked service. Those in quarantine are none, whether or not a controller leads to say so."""
        found = self._book.below(PeerRecord, peers_prefix(service))
        return [peer for peer in found if not self._is_quarantined(peer.service, peer.task, peer.node)]

    def _is_quarantined(self, service: ServiceId, task: TaskId, node: NodeId) -> bool:
        return self._book.is_quarantined(quarantine_keys(service, task, node))

    def _close(self, local: LocalTask, policy: PolicyRecord | None) -> Outcome:
        """Shut the task out, in the mesh or not. The claim of one that has an interface stays, for the release."""
        try:
            with self._session(local) as session:
                observed = session.observe()
                names = {observed.addresses[a] for a in local.addresses.values() if a in observed.addresses}
                ops = plan_quarantine(closed(names, self._way_out(local, observed)), observed)
                if ops:
                    self._save_notes(local, session, observed, ops)
                    session.apply(ops)
        except NamespaceGone:
            if policy is not None:
                raise
            return Outcome(local.task, "is in quarantine, and has no network of its own")
        node, interface = self._node(), observed.interface
        records: dict[str, Record] = {status_key(node.node, local.task): _closed_status(local, node, policy, interface)}
        if interface is not None:
            records[claim_key(node.node, local.task)] = self._claim(local, node, interface)
        self._own.write(records)
        return Outcome(local.task, "closed for a quarantine" if ops else "is in quarantine", ops)

    def _reopen(self, local: LocalTask) -> Outcome:
        """What a quarantine closed that is over, of a task outside the mesh. Nothing else: that there is no policy says
        nothing, for records can be deleted by whoever gets at etcd. A manager signs that a service left the mesh.
        """
        with suppress(NamespaceGone), self._session(local) as session:
            observed = session.observe()
            if observed.interface is None and not observed.rules:
                self._grace.seen_in_clear(local.container)
            if observed.interface is not None or not is_closed(observed.rules):
                return Outcome(local.task, "no policy")
        return self._leave(local)

    def _leave(self, local: LocalTask) -> Outcome:
        ops: tuple[Op, ...] = ()
        receiving = False
        # Nothing of ours is in a namespace that is gone, nor in the node's own, where tasks on its network are.
        with suppress(NamespaceGone), self._session(local) as session:
            observed = session.observe()
            if observed.interface is not None:
                # The other side sends through it until it has heard of this as well.
                with self._lock:
                    leave = self._leaving.setdefault(local.task, Leave())
                receiving = not leave.is_over(observed.interface, self._monotonic())
            ops = plan_removal(observed, receiving=receiving)
            self._save_notes(local, session, observed, ops)
            session.apply(ops)
            if not receiving:
                self._grace.left(local.container)
        self._unwrite(local.task)
        if receiving:
            self._queue.add_after(local.task, QUIET_S)
            return Outcome(local.task, "leaves the mesh", ops)
        with self._lock:
            self._leaving.pop(local.task, None)
            self._moves.pop(local.task, None)
        self._kernel.forget(local.task)
        return Outcome(local.task, "left the mesh" if ops else "not in the mesh", ops)

    def _forget(self, task: TaskId) -> Outcome:
        with self._lock:
            known = self._services.pop(task, None)
            local = self._local.pop(task, None)
            self._moves.pop(task, None)
            self._leaving.pop(task, None)
            self._outdated.discard(task)
            self._needs.pop(task, None)
            self._handshakes.forget(task)
            self._stopping.discard(task)
            self._refollow()
        if local is not None:
            self._grace.forget(local.container)
        self._denials.leave(task)
        self._kernel.forget(task)
        self._unwrite(task)
        return Outcome(task, "is gone" if known else "unknown")

    def _save_notes(self, local: LocalTask, session: Session, observed: ObservedTask, ops: Iterable[Op]) -> None:
        """What the rules noted goes with them: take it down before. Missing it holds nothing up."""
        if observed.rules and any(isinstance(op, SetRules | RemoveRules) for op in ops):
            with suppress(KernelBusy):
                self._denials.read(local.task, local.service, session)

    # What the pass stands on.

    def _task(self, task: TaskId) -> LocalTask:
        with self._lock:
            local = self._local.get(task)
            is_known = task not in self._outdated
            self._outdated.discard(task)
        if local is None or not is_known:
            try:
                local = self._tasks.get(task)
            except HivewireError:
                with self._lock:
                    self._outdated.add(task)
                raise
            with self._lock:
                self._local[task] = local
                self._services[task] = local.service
        return local

    def _session(self, local: LocalTask) -> AbstractContextManager[Session]:
        return self._kernel.open(self._kernel.find(local.task, local.sandbox))

    def _follow(self, local: LocalTask, policy: PolicyRecord | None) -> bool:
        """Follow what this task needs; whether all of it has been read completely."""
        needs = {policy_key(local.service)}
        if policy is not None:
            needs |= {peers_prefix(service) for service in policy.linked_services}
        with self._lock:
            self._needs[local.task] = frozenset(needs)
            self._refollow()
        own = all(self.mirror.synced(prefix) for prefix in self._own.prefixes)
        return own and all(self._book.is_complete(prefix) for prefix in (*needs, *_FOLLOWED_ALWAYS))

    def _refollow(self) -> None:
        """Follow what the tasks of this node need, and no more. Under the lock."""
        needed = frozenset[str]().union(*self._needs.values())
        for prefix in sorted(needed - self._followed):
            self.mirror.follow(prefix)
        for prefix in self._followed - needed:
            self.mirror.unfollow(prefix)
            self._book.drop(prefix)
        self._followed = set(needed)

    # What it writes.

    def _claim(self, local: LocalTask, node: NodeRecord, interface: ObservedInterface) -> ClaimRecord:
        before = self._own.read(ClaimRecord, claim_key(node.node, local.task))
        public_key = str(interface.public_key)
        if before is not None and before.public_key == public_key:
            epoch = before.epoch
        else:
            epoch = max(int(self._now() * 1000), before.epoch + 1 if before else 0)
        with self._lock:
            serving = local.is_healthy and local.task not in self._stopping
        return ClaimRecord(
            task=local.task,
            service=local.service,
            node=node.node,
            container=local.container,
            public_key=public_key,
            endpoint=Endpoint(address=node.underlay_address, port=interface.listen_port),
            epoch=epoch,
            serving=serving,
            underlay_mtu=node.underlay_mtu,
        )

    def _note(self, local: LocalTask, error: HivewireError) -> None:
        """Show the error in the task's status, if the store takes it; the error itself goes on to the loop."""
        node = self._node().node
        status = StatusRecord(
            task=local.task, service=local.service, node=node, phase=TaskPhase.FAILED, error=logs.redact(str(error))
        )
        try:
            self._own.write({status_key(node, local.task): status})
        except HivewireError:
            self._log.debug("status.unwritten", task=local.task)

    def _unwrite(self, task: TaskId) -> None:
        node = self._node().node
        self._own.remove((claim_key(node, task), status_key(node, task)))

    def _add(self, tasks: Iterable[TaskId]) -> None:
        for task in tasks:
            self._queue.add(task)


def _status(local: LocalTask, node: NodeRecord, policy: PolicyRecord, interface: ObservedInterface) -> StatusRecord:
    return StatusRecord(
        task=local.task,
        service=local.service,
        node=node.node,
        phase=TaskPhase.READY,
        interface=interface.name,
        public_key=str(interface.public_key),
        mtu=interface.mtu,
        mode=policy.mode,
    )


def _closed_status(
    local: LocalTask, node: NodeRecord, policy: PolicyRecord | None, interface: ObservedInterface | None
) -> StatusRecord:
    return StatusRecord(
        task=local.task,
        service=local.service,
        node=node.node,
        phase=TaskPhase.READY,
        interface=interface.name if interface else "",
        public_key=str(interface.public_key) if interface else "",
        mtu=interface.mtu if interface else 0,
        mode=policy.mode if policy else Mode.OFF,
        quarantined=True,
    )


def _interface_report(local: LocalTask, interface: ObservedInterface, rules: str) -> InterfaceReport:
    peers = sorted(interface.peers.values(), key=lambda p: p.public_key)
    return InterfaceReport(
        task=local.task,
        service=local.service,
        public_key=str(interface.public_key),
        listen_port=interface.listen_port,
        mtu=interface.mtu,
        rules=rules,
        quarantined=is_closed(rules),
        peers=tuple(
            PeerReport(
                public_key=str(p.public_key),
                last_handshake=p.last_handshake,
                received_bytes=p.received_bytes,
                sent_bytes=p.sent_bytes,
            )
            for p in peers
        ),
    )
