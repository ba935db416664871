"""The loop for one overlay namespace: join record and engine, compare with the table there, replace it.

Level-triggered as the loop of tasks is, and apart from it, with a mirror, a queue and a thread of its own: a task that
takes long to set up must not hold up the guard, which has to be there before the task's first packet. A table that is
there stays until a manager's record says that its network needs none: an agent that is away, an engine that does not
answer, a store that was wiped and a record that was deleted take nothing away.

For a strict network there is a second table, at the node's edge (edge.py), also while no task of it is here.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final, Protocol

from agent.book import DOUBT_S, Book
from agent.grace import LOOK_S
from agent.guard import edge
from agent.guard.desired import LocalNetwork, guard
from agent.guard.render import SHUT, Closed, Count, Rules, render
from agent.kernel.edges import Edges
from agent.kernel.overlay import MOUNT_S, Overlays, Space, is_of, open_new
from hivewire import logs
from hivewire.errors import KernelBusy, NamespaceGone
from hivewire.ids import ContainerId, NetworkId, NodeId
from hivewire.records import GUARDS, MESH_KEY, QUARANTINES, GuardRecord, quarantine_keys
from hivewire.store.api import Store
from hivewire.store.mirror import Mirror
from hivewire.workqueue import WorkQueue

_FOLLOWED: Final = (MESH_KEY, GUARDS, QUARANTINES)
#: A container is there before the engine names its networks, and tells nobody when it does.
FORMING_S: Final = 0.03
_EDGE: Final = "edge of "
"""So begins in the queue what is no file: the edge of a network."""
_ALL: Final = "all files and edges"


class Networks(Protocol):
    """What the loop asks of the engine."""

    def network(self, network: NetworkId, name: str) -> LocalNetwork: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one pass did, in the words of its log line."""

    file: str
    summary: str
    network: str = ""
    ops: tuple[str, ...] = ()
    since_created_s: float | None = None
    """From the first sign of the namespace to its guard being in place; only where this pass put it there."""


class GuardReconciler:
    """Thread-safe. Work comes as the file names of overlay namespaces, and as the edges of networks."""

    def __init__(
        self,
        *,
        networks: Networks,
        overlays: Overlays,
        edges: Edges,
        store: Store,
        queue: WorkQueue[str],
        book: Book,
        node: NodeId,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        notes: Callable[[str, Space], None] = lambda _file, _space: None,
        spares: Callable[[ContainerId], bool] = lambda _container: False,
    ) -> None:
        """``notes`` takes down what the guard of a file's namespace noted, before its table is replaced.

        ``spares`` tells who ran in clear until now and may for a moment more.
        """
        self._spares = spares
        self._closed: dict[str, frozenset[IPv4Address]] = {}
        self._notes = notes
        self._networks = networks
        self._overlays = overlays
        self._edges = edges
        self._queue = queue
        self._book = book
        self._node = node
        self._monotonic = monotonic
        self._sleep = sleep
        self._log = logs.get()
        self._lock = threading.Lock()
        self._created: dict[str, float] = {}
        self.mirror = Mirror(store, self.on_records, clock=monotonic)
        for prefix in _FOLLOWED:
            self.mirror.follow(prefix)

    # What happened: all but on_created only mark namespaces to be looked at.

    def on_records(self, prefix: str, changed_keys: frozenset[str], complete: bool) -> None:
        """Called by the mirror."""
        items = self.mirror.items(prefix)
        values = {key: (items[key].value if key in items else None) for key in changed_keys}
        self._book.update(prefix, values, listed=complete, now=self._monotonic())
        self._add_all()

    def on_network(self, network: NetworkId | None) -> None:
        """Something of the network changed on this node; None: of any."""
        for file in self._overlays.list():
            if network is None or is_of(file, network):
                self._queue.add(file)

    def on_created(self, file: str) -> Outcome | None:
        """A file is new. What is strict is shut here and now, for that needs no answer of the engine.

        Raises NamespaceGone, KernelBusy, Unsupported; None where nothing was done.
        """
        if file not in self._overlays.list():
            return None
        with self._lock:
            self._created[file] = self._monotonic()
        try:
            record = self._record(file)
            if record is None or not record.strict:
                return None
            with self._opened(file) as space:
                if space.observe().digest:
                    return None
                return self._apply(file, record, space, SHUT, {})
        finally:
            self._queue.add(file)

    def resync(self) -> None:
        """Look at every overlay namespace again."""
        if self._book.expire(self._monotonic()):
            self._log.info("guards.expired")
        self._add_all()

    # One pass.

    def reconcile(self, file: str) -> Outcome:
        """Raises SwarmUnavailable, NamespaceGone, KernelBusy, Unsupported; what is in place then stays."""
        if file == _ALL:
            self._add_all()
            return Outcome(file, "are looked at again")
        outcome = self._pass(file)
        self._look_again()
        return outcome

    def _pass(self, file: str) -> Outcome:
        if file.startswith(_EDGE):
            return self._reconcile_edge(file)
        if file not in self._overlays.list():
            with self._lock:
                self._created.pop(file, None)
                self._closed.pop(file, None)
            return Outcome(file, "is gone")
        record = self._record(file)
        if record is None:  # a deletion says nothing: whoever gets at etcd can delete
            return Outcome(file, "no guard known", ops=self._remove_outdated_edges(file))
        if not (record.strict or record.enforced):
            self._closed[file] = frozenset()
            return self._release(record, file)
        with self._opened(file) as space:
            observed = space.observe()
            digest, ops = observed.digest, []
            if record.strict and not digest:
                shut = self._apply(file, record, space, SHUT, {})
                ops, digest = list(shut.ops), render(SHUT)[1]
            local = self._networks.network(record.network, record.name)
            if local.is_forming:
                self._queue.add_after(file, FORMING_S)
            spared = self._spared(file, record, local, is_known=not observed.digest)
            if spared:
                self._queue.add_after(file, LOOK_S)
            ports = space.ports({h.sandbox for h in local.holders if h.sandbox})
            rules, since_created_s = guard(record, local, observed.macs, ports, self._shut_out(local), spared), None
            self._closed[file] = frozenset(rules.addresses if isinstance(rules, Closed) else ())
            if render(rules)[1] != digest:
                if observed.digest:
                    self._save_notes(file, space)
                done = self._apply(file, record, space, rules, observed.counts)
                ops += done.ops
                since_created_s = done.since_created_s if not observed.digest else None
        # The guard first: it has to be there before a task's first packet.
        ops += (*self._settle_edge(record, rules), *self._remove_outdated_edges(file))
        return Outcome(file, "guarded" if ops else "in order", record.name, tuple(ops), since_created_s)

    def _shut_out(self, local: LocalNetwork) -> frozenset[ContainerId]:
        """Tasks in quarantine. Their own rules do not bind one that makes its frames itself."""
        return frozenset(
            holder.container
            for holder in local.holders
            if holder.task and self._book.is_quarantined(quarantine_keys(holder.service, holder.task, self._node))
        )

    def _reconcile_edge(self, name: str) -> Outcome:
        """Where a task of the network is here, its namespace's pass does it."""
        records = self._book.below(GuardRecord, GUARDS)
        record = next((r for r in records if _EDGE + r.network == name), None)
        if record is None or any(is_of(file, record.network) for file in self._overlays.list()):
            return Outcome(name, "nothing to do")
        ops = self._settle_edge(record, SHUT)
        return Outcome(name, "guarded" if record.strict else "not guarded", record.name, ops)

    def _settle_edge(self, record: GuardRecord, rules: Rules) -> tuple[str, ...]:
        name = edge.table_of(record.network)
        there = self._edges.read().get(name)
        if not record.strict or isinstance(rules, Closed):
            if there is not None:
                self._edges.remove(name)
            return () if there is None else ("open the node's edge",)
        text, wanted = edge.render(record, rules.addresses)
        if not record.vnis or there == wanted:
            return ()
        self._edges.apply(name, text)
        return (f"at the node's edge {_words(rules)}",)

    def _remove_outdated_edges(self, file: str) -> tuple[str, ...]:
        """Swarm gives a VXLAN identifier to another network once the first is gone, of which nobody tells us."""
        others = {
            n: e for n, e in self._edges.read().items() if not is_of(file, NetworkId(n.removeprefix(edge.PREFIX)))
        }
        if not others:
            return ()
        with self._opened(file) as space:
            vnis = space.observe().vnis
        outdated = sorted(name for name, each in others.items() if each.vnis & vnis)
        for name in outdated:
            self._edges.remove(name)
        return tuple(f"remove the edge {name}" for name in outdated)

    def _spared(self, file: str, record: GuardRecord, local: LocalNetwork, *, is_known: bool) -> frozenset[ContainerId]:
        """Nobody whom a table has closed already: sparing only puts off what is not there yet."""
        closed = self._closed.get(file)
        if record.strict or (closed is None and not is_known):
            return frozenset()
        here = [h for h in local.holders if h.service in record.enforced and h.address not in (closed or ())]
        return frozenset(h.container for h in here if self._spares(h.container))

    def counts(self) -> dict[str, dict[str, Count]]:
        """What the guard dropped, by file and counter, since its table is there."""
        found = {}
        for file in sorted(self._overlays.list()):
            with contextlib.suppress(NamespaceGone), self._overlays.open(file) as space:
                if counts := space.observe().counts:
                    found[file] = dict(counts)
        return found

    def read_notes(self) -> None:
        """Take down what the guard noted on every network of this node."""
        for file in sorted(self._overlays.list()):
            with contextlib.suppress(NamespaceGone), self._overlays.open(file) as space:
                self._save_notes(file, space)

    def _save_notes(self, file: str, space: Space) -> None:
        """What cannot be read now holds nothing up."""
        with contextlib.suppress(KernelBusy):
            self._notes(file, space)

    def _release(self, record: GuardRecord, file: str) -> Outcome:
        ops = (*self._settle_edge(record, SHUT), *self._remove_outdated_edges(file))
        with self._opened(file) as space:
            if not space.observe().digest:
                return Outcome(file, "not guarded", ops=ops)
            self._save_notes(file, space)
            space.remove()
        return Outcome(file, "no longer guarded", ops=(*ops, "remove the guard"))

    def _apply(
        self, file: str, record: GuardRecord, space: Space, rules: Rules, counts: Mapping[str, Count]
    ) -> Outcome:
        space.apply(render(rules)[0], counts)
        age_s = self._age_s(file)
        return Outcome(file, "guarded", record.name, (_words(rules),), None if age_s is None else round(age_s, 4))

    def _record(self, file: str) -> GuardRecord | None:
        return next((r for r in self._book.below(GuardRecord, GUARDS) if is_of(file, r.network)), None)

    @contextlib.contextmanager
    def _opened(self, file: str) -> Iterator[Space]:
        """Open the namespace; a fresh one is waited for until it is mounted. Raises NamespaceGone."""
        with self._lock:
            created = self._created.get(file, float("-inf"))
        with open_new(self._overlays, file, created + MOUNT_S, self._monotonic, self._sleep) as space:
            yield space

    def _age_s(self, file: str) -> float | None:
        with self._lock:
            created = self._created.get(file)
        return None if created is None else self._monotonic() - created

    def _add_all(self) -> None:
        for file in self._overlays.list():
            self._queue.add(file)
        for record in self._book.below(GuardRecord, GUARDS):
            self._queue.add(_EDGE + record.network)
        self._look_again()

    def _look_again(self) -> None:
        if self._book.may_change(_FOLLOWED):
            self._queue.add_after(_ALL, DOUBT_S)


def _words(rules: Rules) -> str:
    """The rules for a log line."""
    addresses = ", ".join(map(str, rules.addresses)) or "nothing"
    said = f"close {addresses}" if isinstance(rules, Closed) else f"open only {addresses}"
    ports = rules.ports if isinstance(rules, Closed) else rules.closed_ports
    return f"{said}, ports {', '.join(map(str, ports))}" if ports else said
