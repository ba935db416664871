"""The agent's word about its own node: measured, written under a lease, so that it goes when the agent goes."""

import threading
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import msgspec

from agent.kernel.api import Underlay
from hivewire import logs
from hivewire.errors import HivewireError, InvalidSettings, LeaseExpired
from hivewire.records import Address, Doubt, NodeRecord, node_key, parse_address
from hivewire.signed import Signatures, Signed
from hivewire.store.api import LeaseId, Put, Store

#: Seconds after which a silent agent counts as gone. Its tasks' links go on: only ``nodes/`` tells of it.
LEASE_S: Final = 15
KEEPALIVE_S: Final = 5.0
_MOST_DOUBTS: Final = 100
_LONGEST: Final = 300


class Measure(Protocol):
    def __call__(self, address: Address) -> Underlay: ...


class NodePresence:
    """Keeps ``nodes/<node>`` in the store equal to what is measured. ``run`` it on a thread of its own."""

    def __init__(
        self,
        store: Store,
        signatures: Signatures,
        record: NodeRecord,
        measure: Measure,
        on_change: Callable[[], None],
        *,
        doubts: Callable[[], Sequence[Doubt]] = tuple,
    ) -> None:
        """``doubts`` are what the agent does not believe of what it reads."""
        self._store = store
        self._signatures = signatures
        self._measure = measure
        self._on_change = on_change
        self._doubts = doubts
        self._log = logs.get()
        self._lease: LeaseId | None = None
        self._stored: Signed[NodeRecord] | None = None
        self._value = b""
        self.record = record

    def run(self, stop: threading.Event) -> None:
        failures = 0
        while not stop.is_set():
            try:
                self.step()
                failures = 0
            except LeaseExpired:
                self._lease = self._stored = None
                continue
            except HivewireError as error:
                failures += 1
                if failures == 1:
                    self._log.warning("node.unwritten", error=str(error))
            stop.wait(KEEPALIVE_S if failures == 0 else min(KEEPALIVE_S, 0.2 * 2**failures))
        self._leave()

    def step(self) -> None:
        """Measure, keep the lease, write what changed. Raises LeaseExpired, StoreUnavailable."""
        self.remeasure()
        if self._lease is None:
            self._lease = self._store.grant_lease(LEASE_S)
        else:
            self._store.keepalive(self._lease)
        self.record = msgspec.structs.replace(self.record, doubts=_short(self._doubts()))
        stored = self._stored
        record, key = self.record, node_key(self.record.node)
        if stored is None or stored.record != record or self._signatures.is_worn(stored) or not self._is_there(key):
            value = self._signatures.sign(record)
            self._store.txn((), (Put(key, value, self._lease),))
            self._stored, self._value = self._signatures.verify(NodeRecord, key, value), value

    def _is_there(self, key: str) -> bool:
        """Whether the store holds what was written last: somebody else may have put something in its place."""
        item = self._store.get(key)
        return item is not None and (item.value, item.lease) == (self._value, self._lease)

    def remeasure(self) -> None:
        """Take the underlay's MTU as it is now. Raises InvalidSettings where no interface has the address."""
        mtu = self._measure(self.record.underlay_address).mtu
        if mtu != self.record.underlay_mtu:
            self._log.info("underlay.mtu", before=self.record.underlay_mtu, after=mtu)
            self.record = msgspec.structs.replace(self.record, underlay_mtu=mtu)
            self._on_change()

    def _leave(self) -> None:
        if self._lease is not None:
            try:
                self._store.revoke(self._lease)
            except HivewireError as error:
                self._log.debug("node.unrevoked", error=str(error))


def _short(doubts: Sequence[Doubt]) -> tuple[Doubt, ...]:
    """What a record has room for; those first that a manager can put right."""
    first = sorted(doubts, key=lambda it: (it.seen == 0, it.key))[:_MOST_DOUBTS]
    return tuple(Doubt(key=it.key[:_LONGEST], reason=it.reason[:_LONGEST], seen=it.seen) for it in first)


def underlay_address(setting: str, swarm_address: str) -> Address:
    """Where other nodes reach this one: as set, else the address that the node joined the Swarm with.

    Raises InvalidSettings where neither is an address of one node.
    """
    text = setting or swarm_address
    try:
        address = parse_address(text)
    except ValueError as error:
        raise InvalidSettings(
            f"the underlay address {text!r} is no IPv4 or IPv6 address: "
            "set HIVEWIRE_UNDERLAY_ADDRESS to this node's address"
        ) from error
    if address.version == 6 and address.is_link_local:
        raise InvalidSettings(
            f"{address} means another node on every link: set HIVEWIRE_UNDERLAY_ADDRESS to a global or unique local "
            "address of this node"
        )
    if address.is_unspecified or address.is_loopback or address.is_multicast:
        raise InvalidSettings(
            f"the node joined the Swarm as {address}, where no other node reaches it: "
            "set HIVEWIRE_UNDERLAY_ADDRESS to this node's address"
        )
    return address
