"""Leader election by a lease: of all controllers one writes, and only while it leads.

The leader's key hangs on its lease. Every write of a leader is a transaction that holds only while the key still
exists since the revision in which this leader created it, so a leader that was deposed without noticing cannot write.
"""

import threading
import time
from collections.abc import Callable
from typing import Final

import msgspec

from controller.access import LOCKED_OUT
from hivewire import logs
from hivewire.errors import HivewireError, LeaseExpired, NoPermission, NotLeader, RevisionConflict
from hivewire.ids import NodeId
from hivewire.records import LEADER_KEY
from hivewire.store.api import CreateRevisionIs, IsAbsent, KeyValue, LeaseId, Put, Store

LEASE_S: Final = 10
_RENEW_S: Final = 3.0
_TRY_S: Final = 2.0


class LeaderRecord(msgspec.Struct, frozen=True, kw_only=True):
    node: NodeId
    hostname: str


LEADERS: Final = msgspec.json.Decoder(LeaderRecord)
"""Made here, before there are threads: see hivewire/records.py."""


class Leadership:
    """``run`` it on a thread of its own; ``guard`` is asked before each write."""

    def __init__(
        self,
        store: Store,
        me: LeaderRecord,
        on_won: Callable[[], None],
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._me = me
        self._on_won = on_won
        self._monotonic = monotonic
        self._log = logs.get()
        self._wake = threading.Event()
        self._lease: LeaseId | None = None
        self._created = 0
        self._renewed_at = float("-inf")
        self.terms = 0
        """How often it was elected. Revisions do not tell terms apart: a wiped store counts them anew."""

    @property
    def is_leader(self) -> bool:
        return bool(self._term())

    def guard(self) -> CreateRevisionIs:
        """What must hold in every transaction of the leader. Raises NotLeader."""
        created = self._term()
        if not created:
            raise NotLeader("another controller leads")
        return CreateRevisionIs(LEADER_KEY, created)

    def holds(self, item: KeyValue | None) -> bool:
        """Whether this is the leader's key as this controller wrote it. A wiped store counts revisions anew."""
        return item is not None and (item.create_revision, item.lease) == (self._created, self._lease)

    def nudge(self) -> None:
        """The leader's key went: try at once."""
        self._wake.set()

    def run(self, stop: threading.Event) -> None:
        said = ""
        while not stop.is_set():
            try:
                self.step()
                said = ""
            except LeaseExpired:
                continue
            except HivewireError as error:
                remedy = LOCKED_OUT if isinstance(error, NoPermission) else ""
                if said != str(error):
                    self._log.warning("leader.unknown", error=str(error), **({"remedy": remedy} if remedy else {}))
                said = str(error)
            self._wake.wait(_RENEW_S if self.is_leader else _TRY_S)
            self._wake.clear()
        self._resign()

    def step(self) -> None:
        """Renew what we have, else try to get it. Raises StoreUnavailable."""
        if self._lease is not None and self._created:
            asked_at = self._monotonic()
            # The lease may outlive the key, where a person deleted that.
            if self._is_renewed(self._lease) and self.holds(self._store.get(LEADER_KEY)):
                has_lapsed = not self.is_leader
                self._renewed_at = asked_at
                if has_lapsed:  # what was to be written meanwhile was not
                    self._on_won()
                return
            self._log.warning("leader.lost")
            self._lease, self._created = None, 0
        self._stand()

    def _term(self) -> int:
        """The revision in which this leader's key was created; 0: it does not lead.

        Read once: a guard on revision 0 would hold exactly while nobody leads.
        """
        created = self._created
        return created if self._monotonic() - self._renewed_at < LEASE_S else 0

    def _is_renewed(self, lease: LeaseId) -> bool:
        try:
            self._store.keepalive(lease)
        except LeaseExpired:
            return False
        return True

    def _stand(self) -> None:
        asked_at = self._monotonic()
        lease, self._lease = self._lease, None
        if lease is None or not self._is_renewed(lease):
            lease = self._store.grant_lease(LEASE_S)
        put = Put(LEADER_KEY, msgspec.json.encode(self._me), lease)
        try:
            created = self._store.txn((IsAbsent(LEADER_KEY),), (put,))
        except RevisionConflict:
            self._lease = lease
            return
        # After any other error the outcome is unknown: that lease is left to run out, and with it what it may hold.
        self._lease, self._created, self._renewed_at = lease, created, asked_at
        self.terms += 1
        self._log.info("leader.won", node=self._me.node, hostname=self._me.hostname)
        self._on_won()

    def _resign(self) -> None:
        self._created = 0
        if self._lease is not None:
            try:
                self._store.revoke(self._lease)
            except HivewireError as error:
                self._log.debug("leader.unrevoked", error=str(error))
