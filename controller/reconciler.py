"""The controller's loop: observe Swarm, compile, admit claims, write what differs.

Every replica runs it whole, so that each can answer questions; only the leader's writes reach the store. Work comes as
keys: the mesh as a whole, one service's tasks, or one claim. Each pass reads the world again.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar, assert_never

import msgspec

from controller import quarantine
from controller.admission import CAN_SERVE, Evidence, Refused, judge
from controller.budget import Budget
from controller.known import Known, Word
from controller.leader import LEADERS, Leadership
from controller.policy.compile import Compiled, MeshDefaults, compile_mesh
from controller.policy.findings import KINDS, in_order
from controller.policy.guards import compile_guards
from controller.publish import Write, difference, transactions
from controller.state import Component, MeshState, PendingLink, RefusedClaim
from controller.swarm.api import Swarm
from controller.swarm.snapshot import Node, Service, SwarmSnapshot, Task
from hivewire import logs
from hivewire.errors import (
    InvalidRecord,
    NoPermission,
    NotLeader,
    RevisionConflict,
    StoreUnavailable,
    SwarmUnavailable,
    TaskGone,
)
from hivewire.ids import NodeId, ServiceId, TaskId
from hivewire.records import (
    CLAIMS,
    GUARDS,
    LEADER_KEY,
    MESH_KEY,
    NODES,
    PEERS,
    POLICIES,
    QUARANTINES,
    STATUS,
    ClaimRecord,
    GuardRecord,
    MeshRecord,
    Mode,
    NodeRecord,
    PeerRecord,
    PolicyRecord,
    QuarantineKind,
    QuarantineRecord,
    Record,
    StatusRecord,
    claim_key,
    guard_key,
    node_key,
    peer_key,
    policy_key,
    split_key,
    status_key,
)
from hivewire.signed import Signatures, Signed
from hivewire.store.api import Delete, KeyValue, Put, Store
from hivewire.store.mirror import Mirror
from hivewire.store.writer import Writer
from hivewire.workqueue import WorkQueue

R = TypeVar("R", bound=Record)
T = TypeVar("T")

#: After a change of a service its tasks are asked for this often, and this long after they stopped changing ...
SETTLE_PERIOD_S: Final = 0.5
#: ... but no longer than this after the change: what lasts longer is found by the slow listing.
SETTLE_LONGEST_S: Final = 120.0
#: Swarm moves the tasks of a node that comes or goes a moment after it says so, and does not say that.
FOLLOW_NODES_S: Final = 5.0
#: From so many claims on, one listing of all tasks costs less than as many questions.
MANY_CLAIMS: Final = 100
#: So long wait the claims of a node that writes more of them than it can have tasks.
FLOOD_WAIT_S: Final = 5.0
#: A change of a node's own record costs as much as so many claims: the whole mesh is read for it.
NODE_RECORD_COST: Final = 25
#: Those that Swarm no longer wants too: they are peers until they are gone, so that open connections drain.
EVERY_STATE: Final = frozenset[str]()
#: An empty store counts as filled when all running tasks have claimed, or after this time.
FILL_LONGEST_S: Final = 60.0
#: So long agents have, after the store was set back, to claim what is true now.
CORRECT_CLAIMS_S: Final = 10.0
DAY_MS: Final = 24 * 3600 * 1000


@dataclass(frozen=True, slots=True)
class WholeMesh:
    """Read services, networks and nodes; compile; write policies."""


@dataclass(frozen=True, slots=True)
class AllTasks:
    """List all running tasks, and judge every claim against that list."""


@dataclass(frozen=True, slots=True)
class ServiceTasks:
    """Read one service's tasks until they stop changing."""

    service: ServiceId


@dataclass(frozen=True, slots=True)
class Claim:
    """Judge what is claimed for one task: by its node's agent, and whoever else does."""

    task: TaskId


Work = WholeMesh | AllTasks | ServiceTasks | Claim


class MeshReconciler:
    """One thread calls ``reconcile``; ``state`` and the ``on_...`` methods may be called by any."""

    def __init__(
        self,
        *,
        swarm: Swarm,
        store: Store,
        leadership: Callable[[], Leadership],
        queue: WorkQueue[Work],
        signatures: Signatures,
        mode: Mode,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._swarm = swarm
        self._leadership = leadership
        self._queue = queue
        self._signatures = signatures
        self._defaults = MeshDefaults(mode)
        self._monotonic = monotonic
        self._log = logs.get()
        self._lock = threading.Lock()
        self._snapshot: SwarmSnapshot | None = None
        self._compiled: Compiled | None = None
        self._tasks: dict[TaskId, Task] = {}
        self._addresses: dict[str, list[Node]] = {}
        self._refused: dict[str, RefusedClaim] = {}
        self._changed_at: dict[ServiceId, float] = {}
        self._nodes_changed_at = float("-inf")
        self._filling_since: float | None = None
        self._all_tasks_read = False
        # Epoch and key of the claim that was admitted last, of every task that there is or that somebody claims.
        self._last: dict[TaskId, tuple[int, str]] = {}
        self._ports: dict[NodeId, tuple[int, int]] = {}
        self._budget = Budget(monotonic=monotonic)
        self._swarm_error = ""
        self.on_nodes: Callable[[Mapping[NodeId, Node]], None] = lambda _: None
        """Called with every reading of the Swarm, on the thread of ``reconcile``."""
        self.mirror = Mirror(store, self.on_records, clock=monotonic)
        self._writer = Writer(store, self.mirror)
        self._agents = Known(NodeRecord, NODES, self._writer, signatures, _words_of_agent)
        self._claims = Known(ClaimRecord, CLAIMS, self._writer, signatures, _words_of_claim)
        self._peers = Known(PeerRecord, PEERS, self._writer, signatures, _words_of_peer)
        self._policies = Known(PolicyRecord, POLICIES, self._writer, signatures)
        self._guards = Known(GuardRecord, GUARDS, self._writer, signatures)
        self._statuses = Known(StatusRecord, STATUS, self._writer, signatures)
        self._quarantines = Known(QuarantineRecord, QUARANTINES, self._writer, signatures)
        # By key, the generation that an agent has seen where the store holds an older one.
        self._wanted: dict[str, int] = {}
        self._peers_wait_until: float | None = None
        self._lost_quarantines: dict[str, QuarantineRecord] = {}
        self._known: dict[str, Known[Any]] = {
            NODES: self._agents,
            CLAIMS: self._claims,
            PEERS: self._peers,
            POLICIES: self._policies,
            GUARDS: self._guards,
            STATUS: self._statuses,
            QUARANTINES: self._quarantines,
        }
        for prefix in (MESH_KEY, LEADER_KEY, *self._known):
            self.mirror.follow(prefix)

    # What happened: each of these only adds work.

    def on_service(self, service: ServiceId) -> None:
        with self._lock:
            self._changed_at[service] = self._monotonic()
        self._queue.add(WholeMesh())
        self._queue.add(ServiceTasks(service))

    def on_network(self) -> None:
        self._queue.add(WholeMesh())

    def on_node(self) -> None:
        with self._lock:
            self._nodes_changed_at = self._monotonic()
        self._queue.add(WholeMesh())
        self._queue.add(AllTasks())

    def on_records(self, prefix: str, changed_keys: frozenset[str], complete: bool) -> None:
        """Called by the mirror."""
        self._look_at(prefix, changed_keys, complete)
        if prefix == CLAIMS:
            self._on_claims(changed_keys, complete=complete)
        elif prefix == LEADER_KEY:
            if not self.mirror.items(LEADER_KEY):
                self._leadership().nudge()
        elif prefix == NODES and changed_keys:
            self._on_agents({split_key(key)[1] for key in changed_keys})
        elif prefix in (POLICIES, GUARDS, MESH_KEY) and changed_keys:
            self._queue.add(WholeMesh())
        elif prefix == PEERS and any(key in self._peers.refused for key in changed_keys):
            self._queue.add(AllTasks())
        elif prefix == QUARANTINES and (changed_keys or self._lost_quarantines):
            for work in sorted({_judged_anew(key) for key in changed_keys}, key=str):
                self._queue.add(work)
            # Puts back what was deleted without a release, and removes what nobody may believe.
            self._queue.add(WholeMesh())
        elif prefix == PEERS and complete and changed_keys:
            self._queue.add(AllTasks())

    def _on_agents(self, nodes: set[str]) -> None:
        """Agents registered, changed their word or went; one that does so without end has to wait."""
        prompt = {node for node in nodes if self._budget.spend((node, "record"), NODE_RECORD_COST)}
        if prompt < nodes:
            self._queue.add_after(WholeMesh(), FLOOD_WAIT_S)
            self._queue.add_after(AllTasks(), FLOOD_WAIT_S)
        if not prompt:
            return
        self._queue.add(WholeMesh())
        with self._lock:
            waiting = sorted({r.task for r in self._refused.values() if r.node in prompt})
        for task in waiting:
            self._queue.add(Claim(task))
        if any(doubt.seen for agent in self._alive_agents().values() for doubt in agent.doubts):
            self._queue.add(AllTasks())

    def _on_claims(self, changed_keys: frozenset[str], *, complete: bool) -> None:
        """Judge them soon; those of a node that writes without end all together, and later."""
        by_node = defaultdict[NodeId, set[TaskId]](set)
        for key in changed_keys:
            by_node[_node_of(key)].add(_task_of(key))
        prompt = {n: tasks for n, tasks in by_node.items() if complete or self._budget.spend(n, len(tasks))}
        if len(prompt) < len(by_node):
            self._queue.add_after(AllTasks(), FLOOD_WAIT_S)
        tasks = frozenset[TaskId]().union(*prompt.values())
        if tasks and (complete or len(tasks) > MANY_CLAIMS):
            self._queue.add(AllTasks())
        else:
            for task in sorted(tasks):
                self._queue.add(Claim(task))

    def _look_at(self, prefix: str, changed_keys: frozenset[str], complete: bool) -> None:
        if complete:
            self._writer.relisted(prefix)
        known = self._known.get(prefix)
        quarantines = self._quarantines.records() if prefix == QUARANTINES else {}
        if known is not None and complete:
            known.relist()
        elif known is not None:
            known.refresh(changed_keys)
        # Nobody can make these again from Swarm: who was shut out stays so, whatever became of the store, until a
        # manager has signed the release.
        left = self._quarantines.records() if quarantines else {}
        self._lost_quarantines |= {k: q for k, q in quarantines.items() if k not in left and not q.released}

    def resync(self) -> None:
        for known in self._known.values():
            known.retry()
        self._queue.add(WholeMesh())
        self._queue.add(AllTasks())

    # One piece of work.

    def reconcile(self, work: Work) -> None:
        """Raises SwarmUnavailable, StoreUnavailable, RevisionConflict, and RecordTooNew where a newer version wrote the
        mesh; NotLeader never: a follower's pass is whole.
        """
        match work:
            case WholeMesh():
                self._whole_mesh()
            case AllTasks():
                self._judge_all()
            case ServiceTasks(service):
                self._service_tasks(service)
            case Claim(task):
                self._judge_one(task)
            case _:
                assert_never(work)

    def _whole_mesh(self) -> None:
        # Before the store was read, the last good labels of services are unknown: compiling would forget them.
        read = (self._policies, self._guards, self._agents)
        if not (all(known.is_complete for known in read) and self.mirror.synced(MESH_KEY)):
            self._queue.add_after(WholeMesh(), 0.1)
            return
        self._write_anew()
        snapshot = self._ask(self._swarm.snapshot)
        self.on_nodes(snapshot.nodes)
        with self._lock:
            before, snapshot_before = self._compiled, self._snapshot
        # A wiped store has forgotten the last good labels; we have not.
        previous = dict(before.policies) if before else {}
        previous |= {p.service: p for p in self._policies.records().values()}
        alive = self._alive_agents()
        known = {node: ports for node, ports in self._ports.items() if node in snapshot.nodes}
        self._ports = known | {node: (it.first_port, it.last_port) for node, it in alive.items()}
        agents = frozenset(alive)
        compiled = compile_mesh(snapshot, previous, self._defaults, agents)
        shut_out = frozenset(
            ServiceId(q.id)
            for q in self._quarantines.records().values()
            if q.kind is QuarantineKind.SERVICE and not q.released
        )
        guards = compile_guards(snapshot, compiled.policies, self._defaults.mode, shut_out)
        compiled = replace(compiled, findings=in_order((*compiled.findings, *guards.findings)))
        addresses = defaultdict[str, list[Node]](list)
        for node in snapshot.nodes.values():
            addresses[node.address].append(node)
        with self._lock:
            self._snapshot, self._compiled, self._addresses = snapshot, compiled, dict(addresses)
        # Before the write, which may fail: the next pass finds nothing new.
        if before is None or snapshot_before is None or (before.policies, snapshot_before.nodes) != (
            compiled.policies, snapshot.nodes,
        ):  # fmt: skip
            self._queue.add(AllTasks())
        self._log_findings(before, compiled)
        desired = _withdrawn(snapshot, self._policies.records().values(), self._guards.records().values())
        desired |= {policy_key(s): p for s, p in compiled.policies.items()}
        desired |= {guard_key(n): g for n, g in guards.records.items()}
        # In key order, guards come before policies: a service is guarded before it is anything else.
        policies = difference(desired, {**self._policies.stored(), **self._guards.stored()})
        stored = self._stored_mesh()
        mesh = self._mesh_record(snapshot, stored)
        writes = [] if mesh == stored else [Write(MESH_KEY, mesh)]
        quarantines = difference(self._standing(snapshot), self._quarantines.stored())
        # That the store is incomplete is said first, that it is complete last.
        policies = (*quarantines, *policies)
        self._write([*policies, *writes] if mesh.settled else [*writes, *policies], "policies.written")
        if self._leadership().is_leader:
            self._lost_quarantines = {}

    def _standing(self, snapshot: SwarmSnapshot) -> dict[str, Record]:
        """The quarantines, and the released ones of what is still there: agents that were away have yet to learn it."""
        known = self._lost_quarantines | self._quarantines.records()
        with self._lock:
            there = {*snapshot.services, *snapshot.nodes, *self._tasks} if self._all_tasks_read else None
        return {key: it for key, it in known.items() if not it.released or there is None or it.id in there}

    def _mesh_record(self, snapshot: SwarmSnapshot, stored: MeshRecord | None) -> MeshRecord:
        """An empty store is marked as being filled until every running task is a peer again."""
        settled = stored is not None and stored.settled
        if settled:
            self._filling_since = None
        else:
            now = self._monotonic()
            if self._filling_since is None:
                self._filling_since = now
            settled = stored is not None and (now - self._filling_since >= FILL_LONGEST_S or self._is_filled())
            if not settled:
                self._queue.add_after(WholeMesh(), 1.0)
        by_managers = (self._policies, self._guards, self._peers, self._quarantines)
        oldest = min((known.oldest for known in by_managers if known.oldest is not None), default=0)
        floor = max(oldest // DAY_MS * DAY_MS, 0 if stored is None else stored.floor)
        return MeshRecord(mesh=snapshot.cluster, mode=self._defaults.mode, settled=settled, floor=floor)

    def _is_filled(self) -> bool:
        """Whether every running task of the mesh has claimed, and is a peer or refused."""
        with self._lock:
            compiled, tasks = self._compiled, list(self._tasks.values())
            if compiled is None or not self._all_tasks_read or self._is_correcting():
                return False
            refused = {r.task for r in self._refused.values()}
        meshed = [t for t in tasks if t.service in compiled.policies and not self._why_shut_out(t)]
        wanted = {t.id for t in meshed if t.is_wanted and t.state == "running"}
        claimed = {c.task for c in self._claims.records().values()}
        peers = {p.task for p in self._peers.records().values()}
        return wanted <= claimed and wanted <= peers | refused

    def _is_correcting(self) -> bool:
        """Whether agents are still to claim what is true since the store was set back."""
        return self._peers_wait_until is not None and self._monotonic() < self._peers_wait_until

    def _judge_all(self) -> None:
        if not self._is_ready():
            self._queue.add_after(AllTasks(), 0.1)
            return
        self._write_anew()
        tasks = {task.id: task for task in self._ask(self._swarm.tasks)}
        claims = self._claims.records()
        claimed = {_task_of(key) for key in claims}
        tasks |= self._find_all(claimed - tasks.keys())  # on their way out, or not known to Swarm
        self._last = {task: last for task, last in self._last.items() if task in tasks or task in claimed}
        with self._lock:
            self._tasks = tasks
            self._all_tasks_read = True
            nodes_changed_at = self._nodes_changed_at
        self._judge(claims, self._peers.stored())
        if self._monotonic() - nodes_changed_at < FOLLOW_NODES_S:
            self._queue.add_after(AllTasks(), 1.0)

    def _write_anew(self) -> None:
        """Let what an agent does not believe, because it has seen a newer one, be signed anew where it still holds: the
        store is an older state of itself, such as a backup. Not quarantines: they are a person's word, which may have
        been another one since, and agents keep the one they know.
        """
        if not self._leadership().is_leader:
            return
        now, reached = self._monotonic(), self._signatures.reached
        for agent in self._alive_agents().values():
            wanted = {it.key: it.seen for it in agent.doubts if 0 < it.seen <= reached}
            old = {key: seen for key, seen in wanted.items() if self._is_older(key, seen)}
            if not old or not self._budget.spend((agent.node, "doubts"), len(old)):
                continue
            if self._peers_wait_until is None:
                self._log.warning("store.rolled_back", node=agent.node, records=len(old), example=min(old))
                # Claims are from then as well. Agents that have their policies again correct them first, and only
                # then is anybody told which keys they were.
                self._peers_wait_until = now + CORRECT_CLAIMS_S
                self._queue.add_after(AllTasks(), CORRECT_CLAIMS_S)
                # What the backup lacks is no absence: as with an empty store nobody removes anything meanwhile.
                mesh = self._signed_mesh()
                self._wanted[MESH_KEY] = 0 if mesh is None else mesh.generation
                self._queue.add(WholeMesh())
            self._signatures.outrun(max(old.values()))
            self._wanted |= {key: seen for key, seen in old.items() if not key.startswith(PEERS)}
            if now >= self._peers_wait_until:
                self._wanted |= old
        for known in (self._policies, self._guards, self._peers):
            known.write_anew({key: seen for key, seen in self._wanted.items() if key.startswith(known.prefix)})

    def _is_older(self, key: str, seen: int) -> bool:
        if key == MESH_KEY:
            return self._wanted.get(key, 0) < seen
        return any(known.is_older(key, seen) for known in (self._policies, self._guards, self._peers))

    def _service_tasks(self, service: ServiceId) -> None:
        if not self._is_ready():
            self._queue.add_after(AllTasks(), 0.1)
            return
        tasks = {task.id: task for task in self._ask(lambda: self._swarm.tasks(service, EVERY_STATE))}
        with self._lock:
            for task in [t.id for t in self._tasks.values() if t.service == service]:
                del self._tasks[task]
            self._tasks.update(tasks)
            snapshot, changed_at = self._snapshot, self._changed_at.get(service, float("-inf"))
        self._judge(self._claims.records(("service", service)), self._peers.stored(("service", service)))
        known = snapshot.services.get(service) if snapshot else None
        if _is_moving(known, tasks.values()) and self._monotonic() - changed_at < SETTLE_LONGEST_S:
            self._queue.add_after(ServiceTasks(service), SETTLE_PERIOD_S)
        else:
            with self._lock:
                if self._changed_at.get(service) == changed_at:
                    del self._changed_at[service]

    def _judge_one(self, task: TaskId) -> None:
        if not self._is_ready():
            self._queue.add_after(AllTasks(), 0.1)
            return
        claims = self._claims.records(("task", task))
        found = self._find(task) if claims else None
        with self._lock:
            if found is not None:
                self._tasks[task] = found
            elif claims:
                self._tasks.pop(task, None)
        self._judge(claims, self._peers.stored(("task", task)))
        # The agent saw the container start before Swarm's managers heard of it; nobody will tell when they do.
        is_early = found is not None and found.is_wanted and found.state not in CAN_SERVE
        if is_early and any(claim.serving for claim in claims.values()):
            self._queue.add_after(Claim(task), SETTLE_PERIOD_S)

    def _judge(self, claims: Mapping[str, ClaimRecord], stored: Mapping[str, Record | None]) -> None:
        """Make the stored peers what these claims become; ``stored`` are the peers that they may concern."""
        desired: dict[str, Record] = {}
        refused: dict[str, RefusedClaim] = {}
        owners: dict[str, TaskId] = {}
        for key, claim in sorted(claims.items()):
            node, task = _node_of(key), _task_of(key)
            verdict = judge(node, task, claim, self._evidence(task, claim, owners))
            if isinstance(verdict, Refused):
                refused[key] = RefusedClaim(node, task, verdict.reason)
            elif verdict is not None:
                desired[peer_key(verdict.service, verdict.task)] = verdict
                self._last[task] = (verdict.epoch, verdict.public_key)
                owners[claim.public_key] = task
        self._note_refused(claims, refused)
        self._write(difference(desired, stored), "peers.written")

    def _evidence(self, task: TaskId, claim: ClaimRecord, owners: Mapping[str, TaskId]) -> Evidence:
        """``owners`` hold the keys of claims that were admitted just now."""
        assert self._snapshot is not None  # noqa: S101  _is_ready
        assert self._compiled is not None  # noqa: S101
        node = self._snapshot.nodes.get(claim.node)
        neighbours = list(self._addresses.get(str(claim.endpoint.address), ()))
        if node is None or node.address != str(claim.endpoint.address):
            # No agent's word takes away the address that a node has in the Swarm.
            agents = self._agents.records(("address", str(claim.endpoint.address))).values()
            neighbours += [self._snapshot.nodes[it.node] for it in agents if it.node in self._snapshot.nodes]
        admitted = self._peers.record(peer_key(claim.service, claim.task))
        stored = (0, "") if admitted is None else (admitted.epoch, admitted.public_key)
        last = max(self._last.get(task, stored), stored)
        holders = [peer.task for peer in self._peers.records(("key", claim.public_key)).values()]
        agent = self._agents.record(node_key(claim.node))  # may name another node
        return Evidence(
            task=self._tasks.get(task),
            policy=self._compiled.policies.get(claim.service),
            node=node,
            agent=agent if agent is not None and agent.node == claim.node else None,
            neighbour=min((it for it in neighbours if it.id != claim.node), key=lambda it: it.id, default=None),
            key_owner=min(holders, default=owners.get(claim.public_key)),
            admitted=admitted,
            last_ports=self._ports.get(claim.node),
            last_epoch=last[0],
            last_key=last[1],
            quarantine=self._why_shut_out(claim),
        )

    def _why_shut_out(self, task: ClaimRecord | Task) -> str:
        id_ = task.id if isinstance(task, Task) else task.task
        record = quarantine.over(self._quarantines.records().values(), task.service, id_, task.node)
        return "" if record is None else quarantine.words(record)

    def _note_refused(self, judged: Iterable[str], refused: Mapping[str, RefusedClaim]) -> None:
        with self._lock:
            before, kept = self._refused, dict(self._refused)
            for key in judged:
                kept.pop(key, None)
            kept = {key: r for key, r in kept.items() if self._claims.record(key) is not None}
            self._refused = kept | dict(refused)
        for key, each in refused.items():
            if before.get(key) != each:
                self._log.warning("claim.refused", task=each.task, node=each.node, reason=each.reason)

    def _write(self, writes: Sequence[Write], event: str) -> None:
        if not writes:
            return
        try:
            for part in transactions(writes):
                guard = self._leadership().guard()
                self._check_view()
                self._writer.write((guard,), [self._op(write) for write in part])
                for known in self._known.values():
                    known.refresh(write.key for write in part if write.key.startswith(known.prefix))
        except NotLeader:
            return
        puts = sum(write.record is not None for write in writes)
        self._log.info(event, puts=puts, deletes=len(writes) - puts)

    def _op(self, write: Write) -> Put | Delete:
        return Delete(write.key) if write.record is None else Put(write.key, self._signatures.sign(write.record))

    def _check_view(self) -> None:
        """A leader whose mirror does not show its election yet would judge by what its predecessor left behind, or by
        a store that was wiped. Raises RevisionConflict, RecordTooNew.
        """
        if not self._leadership().holds(self.mirror.items(LEADER_KEY).get(LEADER_KEY)):
            raise RevisionConflict("the records read so far are older than this controller's election")
        self._stored_mesh()

    # What it reads.

    def _is_ready(self) -> bool:
        with self._lock:
            compiled = self._compiled is not None
        return compiled and all(known.is_complete for known in self._known.values())

    def _ask(self, question: Callable[[], T]) -> T:
        """Swarm's answer; whether it gives one is shown."""
        try:
            answer = question()
        except (SwarmUnavailable, NoPermission) as error:
            self._swarm_error = str(error)
            raise
        except TaskGone:
            self._swarm_error = ""
            raise
        self._swarm_error = ""
        return answer

    def _find(self, task: TaskId) -> Task | None:
        try:
            return self._ask(lambda: self._swarm.task(task)) if task else None
        except TaskGone:
            return None

    def _find_all(self, tasks: set[TaskId]) -> dict[TaskId, Task]:
        """Those of them that Swarm knows: by one question each, or by one listing where these would be many."""
        if len(tasks) <= MANY_CLAIMS:
            found = (self._find(task) for task in sorted(tasks))
            return {task.id: task for task in found if task is not None}
        listed = self._ask(lambda: self._swarm.tasks(None, EVERY_STATE))
        return {task.id: task for task in listed if task.id in tasks}

    def _alive_agents(self) -> dict[NodeId, NodeRecord]:
        """By node; what an agent says in another one's name does not count."""
        return {r.node: r for key, r in self._agents.records().items() if key == node_key(r.node)}

    def _stored_mesh(self) -> MeshRecord | None:
        """None where there is none, or none that can be read: it is written again. Raises RecordTooNew."""
        signed = self._signed_mesh()
        if signed is None or signed.generation <= self._wanted.get(MESH_KEY, -1) or self._signatures.is_worn(signed):
            return None
        return signed.record

    def _signed_mesh(self) -> Signed[MeshRecord] | None:
        """Raises RecordTooNew."""
        value = self._writer.get(MESH_KEY, MESH_KEY)
        try:
            return None if value is None else self._signatures.verify(MeshRecord, MESH_KEY, value)
        except InvalidRecord as error:
            self._log.warning("record.refused", key=MESH_KEY, error=str(error))
            return None

    # What it shows.

    def state(self) -> MeshState:
        """Raises SwarmUnavailable, StoreUnavailable before the first reading."""
        with self._lock:
            snapshot, compiled = self._snapshot, self._compiled
            tasks, refused = dict(self._tasks), dict(self._refused)
        if snapshot is None or compiled is None:
            if not self._swarm_error and not self.mirror.healthy:
                raise StoreUnavailable(self.mirror.last_error or "etcd has not been read yet")
            raise SwarmUnavailable(self._swarm_error or "the Swarm has not been read yet")
        leader = self.mirror.items(LEADER_KEY).get(LEADER_KEY)
        claims, statuses = self._claims.records(), self._statuses.records()
        return MeshState(
            swarm=snapshot,
            mode=self._defaults.mode,
            revision=max((self.mirror.revision(p) or 0 for p in (NODES, CLAIMS, PEERS, POLICIES, STATUS)), default=0),
            leader=_hostname(leader),
            is_leader=self._leadership().is_leader,
            policies=compiled.policies,
            findings=compiled.findings,
            pending=_pending(compiled),
            # Agents write claims and statuses: what one says of another node, or of a task there, does not count.
            nodes=self._alive_agents(),
            tasks=tasks,
            claims={c.task: c for key, c in _admitted_last(claims, refused) if key == claim_key(c.node, c.task)},
            peers={r.task: r for r in self._peers.records().values()},
            statuses={
                r.task: r
                for key, r in statuses.items()
                if key == status_key(r.node, r.task) and (r.task not in tasks or tasks[r.task].node == r.node)
            },
            refused=tuple(refused[key] for key in sorted(refused, key=lambda k: (refused[k].task, k))),
            components=self._components(leader is not None),
            compiled=compiled,
            quarantines=tuple(q for _, q in sorted(self._quarantines.records().items()) if not q.released),
            unverified={key: str(error) for known in self._known.values() for key, error in known.refused.items()},
        )

    def _components(self, has_leader: bool) -> tuple[Component, ...]:
        store_error = "" if self.mirror.healthy else (self.mirror.last_error or "etcd was not read yet")
        return (
            Component("swarm", not self._swarm_error, self._swarm_error),
            Component("store", not store_error, store_error),
            Component("leader", has_leader, "" if has_leader else "no controller leads"),
        )

    def _log_findings(self, before: Compiled | None, after: Compiled) -> None:
        known = set(before.findings) if before else set()
        for finding in after.findings:
            if finding not in known:
                self._log.warning("finding", code=finding.code, severity=finding.severity.value,
                                  subject=finding.subject, message=finding.message, remedy=finding.remedy)  # fmt: skip


def _withdrawn(
    snapshot: SwarmSnapshot, policies: Iterable[PolicyRecord], guards: Iterable[GuardRecord]
) -> dict[str, Record]:
    """What takes the place of records that no longer follow from any label, while service and network are there.

    Agents take no deletion for an order to open anything, since anybody with access to etcd can delete.
    """
    records: dict[str, Record] = {}
    for policy in policies:
        if policy.service in snapshot.services:
            records[policy_key(policy.service)] = PolicyRecord(
                service=policy.service, name=policy.name, stack=policy.stack, mode=Mode.OFF, networks=()
            )
    for guard in guards:
        if guard.network in snapshot.networks:
            records[guard_key(guard.network)] = GuardRecord(network=guard.network, name=guard.name)
    return records


def _pending(compiled: Compiled) -> tuple[PendingLink, ...]:
    """Pending links with the words of the findings that say why."""
    return tuple(
        PendingLink(
            source=link.source_name,
            destination=link.target_name,
            ports=",".join(map(str, link.ports)),
            reason=f"{KINDS[link.code].title} [{link.code}]",
        )
        for link in compiled.pending
    )


def _is_moving(service: Service | None, tasks: Iterable[Task]) -> bool:
    """Whether Swarm is still at work on a service: updating it, or starting and stopping its tasks."""
    if service is not None and service.is_updating:
        return True
    return any(t.is_wanted != (t.state == "running") for t in tasks if not t.is_finished)


def _judged_anew(key: str) -> Work:
    """What to do about a quarantine that began or ended."""
    parts = split_key(key)
    match parts[1:]:
        case (QuarantineKind.SERVICE.value, service):
            return ServiceTasks(ServiceId(service))
        case (QuarantineKind.TASK.value, task):
            return Claim(TaskId(task))
        case _:
            return AllTasks()


def _node_of(key: str) -> NodeId:
    """The node of ``claims/NODE/TASK``; empty for a key of another form."""
    parts = split_key(key)
    return NodeId(parts[1] if len(parts) == 3 else "")


def _task_of(key: str) -> TaskId:
    return TaskId(split_key(key)[-1])


def _words_of_agent(parts: tuple[str, ...], agent: NodeRecord | None) -> Iterable[Word]:
    return () if agent is None else (("address", str(agent.underlay_address)),)


def _words_of_claim(parts: tuple[str, ...], claim: ClaimRecord | None) -> Iterable[Word]:
    return (("task", parts[-1]), *([] if claim is None else [("service", claim.service)]))


def _words_of_peer(parts: tuple[str, ...], peer: PeerRecord | None) -> Iterable[Word]:
    return (("task", parts[-1]), ("service", parts[1]), *([] if peer is None else [("key", peer.public_key)]))


def _admitted_last(
    claims: Mapping[str, ClaimRecord], refused: Mapping[str, RefusedClaim]
) -> list[tuple[str, ClaimRecord]]:
    """So that of two claims for one task the refused one does not hide the other."""
    return sorted(claims.items(), key=lambda item: (item[0] not in refused, item[0]))


def _hostname(item: KeyValue | None) -> str:
    try:
        return "" if item is None else LEADERS.decode(item.value).hostname
    except msgspec.DecodeError:
        return ""
