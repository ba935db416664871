"""Keeps users and roles of etcd equal to the Swarm's nodes; on a thread of its own, as many nodes are many calls.

Level-triggered: every reading of the Swarm wakes it, and it asks etcd only when it begins to lead, after a failure and
every ten minutes. What it wrote itself it knows. With a node's access go the records that only that node could remove.
"""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from controller.access import desired_access, plan_access
from controller.leader import Leadership
from controller.state import Component
from controller.swarm.snapshot import Node
from hivewire import logs
from hivewire.errors import HivewireError, NotLeader
from hivewire.ids import NodeId
from hivewire.records import CLAIMS, STATUS
from hivewire.store.api import MAX_TXN_OPS, Access, AccessControl, Delete, RemoveUser, Store

RESYNC_S: Final = 600.0
_RETRY_S: Final = 2.0
_LOGGED_OPS: Final = 20


class AccessStore(Store, AccessControl, Protocol):
    """Both sides of etcd."""


class AccessKeeper:
    """``on_nodes`` and ``component`` may be called by any thread; ``run`` it on its own."""

    def __init__(
        self,
        store: AccessStore,
        leadership: Leadership,
        me: NodeId,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._leadership = leadership
        self._me = me
        self._monotonic = monotonic
        self._log = logs.get()
        self._wake = threading.Event()
        self._nodes: Mapping[NodeId, Node] = {}
        # What etcd holds, as far as we know, since when, and in which term of ours that was read.
        self._observed: Access | None = None
        self._read_at = 0.0
        self._term = 0
        # Nodes that left, whose records are still to go.
        self._left: set[str] = set()
        self._error = ""

    def on_nodes(self, nodes: Mapping[NodeId, Node]) -> None:
        """The Swarm was read."""
        self._nodes = nodes
        self._wake.set()

    def component(self) -> Component:
        """For ``hivewire check``."""
        return Component("access", not self._error, self._error)

    def run(self, stop: threading.Event) -> None:
        while True:
            self._wake.wait(_RETRY_S if self._error else None)
            self._wake.clear()
            if stop.is_set():
                return
            try:
                self.step()
                self._error = ""
            except NotLeader:
                self._error = ""
            except HivewireError as error:
                self._observed = None
                if str(error) != self._error:
                    self._log.warning("access.retry", error=str(error))
                self._error = str(error)

    def wake(self) -> None:
        """Look again now, or see that it should stop."""
        self._wake.set()

    def step(self) -> None:
        """One look. Raises NotLeader, StoreUnavailable, NoPermission, RevisionConflict."""
        self._leadership.guard()
        term = self._leadership.terms
        nodes = self._nodes
        me = nodes.get(self._me)
        if me is None or not me.is_manager:
            # Not read yet, or about to stop being a manager: whoever leads next takes our access, we do not.
            return
        now = self._monotonic()
        if self._observed is None or term != self._term or now - self._read_at >= RESYNC_S:
            self._observed, self._read_at, self._term = self._store.access(), now, term
        desired = desired_access(nodes.values())
        ops = plan_access(desired, self._observed)
        for op in ops:
            self._leadership.guard()
            self._store.change_access(op)
        if ops:
            self._observed = desired
            self._left |= {op.user for op in ops if isinstance(op, RemoveUser) and op.user not in desired.users}
            shown = [str(op) for op in ops[:_LOGGED_OPS]]
            self._log.info("access.written", changes=len(ops), ops="; ".join(shown))
        for node in sorted(self._left):
            self._remove_records(node)
            self._left.discard(node)

    def _remove_records(self, node: str) -> None:
        deletes = [Delete(it.key) for p in (CLAIMS, STATUS) for it in self._store.list(f"{p}{node}/").items]
        for start in range(0, len(deletes), MAX_TXN_OPS):
            self._store.txn((self._leadership.guard(),), deletes[start : start + MAX_TXN_OPS])
        if deletes:
            self._log.info("node.records_removed", node=node, deletes=len(deletes))
