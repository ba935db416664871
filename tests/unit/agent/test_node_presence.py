"""The agent's word about its node: measured, under a lease, written again when it was lost."""

import threading
from collections.abc import Callable
from ipaddress import ip_address

import pytest

from agent.kernel.api import Underlay
from agent.node import KEEPALIVE_S, LEASE_S, NodePresence, underlay_address
from hivewire.errors import InvalidSettings, LeaseExpired, StoreUnavailable
from hivewire.records import Address, Doubt, NodeRecord, decode, node_key
from hivewire.store.memory import MemoryStore
from tests.fakes.clock import FakeClock
from tests.fakes.signatures import Unsigned
from tests.unit.agent.values import node

KEY = node_key(node().node)


class Script(threading.Event):
    """A stop that does, instead of each wait, the next thing of a script; at its end it is set."""

    def __init__(self, clock: FakeClock, *steps: Callable[[], None]) -> None:
        super().__init__()
        self._clock = clock
        self._steps = list(steps)
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.waits.append(timeout)
        self._clock.advance(timeout)
        if self._steps:
            self._steps.pop(0)()
        else:
            self.set()
        return self.is_set()


class Rig:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.store = MemoryStore(self.clock)
        self.mtu = 1500
        self.error: Exception | None = None
        self.changes = 0
        self.presence = NodePresence(self.store, Unsigned(), node(), self.measure, self.changed)

    def measure(self, address: Address) -> Underlay:
        if self.error is not None:
            raise self.error
        return Underlay(address, "eth0", self.mtu)

    def changed(self) -> None:
        self.changes += 1

    def stored(self) -> NodeRecord | None:
        item = self.store.get(KEY)
        return None if item is None else decode(NodeRecord, item.value)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_first_step(rig: Rig) -> None:
    """The record is written under a lease."""
    rig.presence.step()
    assert rig.stored() == node()
    item = rig.store.get(KEY)
    assert item is not None
    assert item.lease != 0


def test_quiet(rig: Rig) -> None:
    """Further steps keep the lease and write nothing."""
    for _ in range(5):
        rig.presence.step()
        rig.clock.advance(LEASE_S - 1)
    assert rig.stored() == node()
    assert rig.store.revision == 2
    assert rig.changes == 0


def test_silent_agent(rig: Rig) -> None:
    """Without steps the record goes with its lease."""
    rig.presence.step()
    rig.clock.advance(LEASE_S)
    assert rig.stored() is None


def test_changed_mtu(rig: Rig) -> None:
    """Another MTU of the underlay is noted, told, and written."""
    rig.presence.step()
    rig.mtu = 9000
    rig.presence.step()
    assert rig.presence.record == node(mtu=9000)
    assert rig.stored() == node(mtu=9000)
    assert rig.changes == 1
    rig.presence.step()
    assert (rig.changes, rig.store.revision) == (1, 3)


def test_lost_lease(rig: Rig) -> None:
    """A step whose lease is gone says so, so that a new one is made."""
    rig.presence.step()
    rig.clock.advance(LEASE_S)
    with pytest.raises(LeaseExpired):
        rig.presence.step()


def test_run_writes_again_after_a_lost_lease(rig: Rig) -> None:
    """When the lease ran out, or the store was wiped, the loop writes the record again at once."""
    seen: list[NodeRecord | None] = []

    def look() -> None:
        seen.append(rig.stored())

    def lose() -> None:
        rig.clock.advance(LEASE_S)
        assert rig.stored() is None

    script = Script(rig.clock, look, lose, look, rig.store.faults.wipe, look)
    rig.presence.run(script)
    assert seen == [node(), node(), node()]
    assert set(script.waits) == {KEEPALIVE_S}


def test_run_while_the_store_is_away(rig: Rig) -> None:
    """While the store is away the loop goes on, with growing delays up to the usual one, and writes when it is back."""
    seen: list[NodeRecord | None] = []
    away, back = (lambda is_away=is_away: rig.store.faults.set_unavailable(is_away) for is_away in (True, False))

    def nothing() -> None:
        pass

    script = Script(rig.clock, away, *[nothing] * 6, back, lambda: seen.append(rig.stored()))
    rig.presence.run(script)
    assert seen == [node()]
    failed = script.waits[1:8]
    assert failed == sorted(failed)
    assert (failed[0] < 1, failed[-1]) == (True, KEEPALIVE_S)
    assert script.waits[8:] == [KEEPALIVE_S, KEEPALIVE_S]


def test_run_leaves(rig: Rig) -> None:
    """An agent that ends takes its record away at once, and an absent store does not keep it from ending."""
    rig.presence.run(Script(rig.clock))
    assert rig.stored() is None
    other = Rig()
    other.presence.run(Script(other.clock, lambda: other.store.faults.set_unavailable(True)))


def test_measuring_fails(rig: Rig) -> None:
    """An underlay address that no interface has ends nothing, and the record comes when it is back."""
    seen: list[NodeRecord | None] = []

    def heal() -> None:
        seen.append(rig.stored())
        rig.error = None

    rig.error = InvalidSettings("no interface has it")
    rig.presence.run(Script(rig.clock, heal, lambda: seen.append(rig.stored())))
    assert seen == [None, node()]


def test_step_while_the_store_is_away(rig: Rig) -> None:
    """A step tells that the store is away."""
    rig.store.faults.set_unavailable(True)
    with pytest.raises(StoreUnavailable):
        rig.presence.step()


@pytest.mark.parametrize(
    ("setting", "joined", "address"),
    [
        ("", "192.0.2.1", "192.0.2.1"),
        ("10.9.9.9", "192.0.2.1", "10.9.9.9"),
        ("10.9.9.9", "", "10.9.9.9"),
        ("", "2001:db8::1", "2001:db8::1"),
        ("FD00:0::7", "192.0.2.1", "fd00::7"),
    ],
)
def test_underlay_address(setting: str, joined: str, address: str) -> None:
    """The setting goes before the address that the node joined with."""
    assert underlay_address(setting, joined) == ip_address(address)


@pytest.mark.parametrize(
    ("setting", "joined", "shown"),
    [
        ("", "", "''"),
        ("fe80::1", "192.0.2.1", "fe80::1"),
        ("fd00::1%eth0", "192.0.2.1", "fd00::1%eth0"),
        ("::ffff:192.0.2.1", "192.0.2.1", "::ffff:192.0.2.1"),
        ("::", "192.0.2.1", "::"),
        ("", "::1", "::1"),
        ("ff02::1", "192.0.2.1", "ff02::1"),
        ("eth0", "192.0.2.1", "eth0"),
        ("", "127.0.0.1", "127.0.0.1"),
        ("", "0.0.0.0", "0.0.0.0"),
        ("0.0.0.0", "192.0.2.1", "0.0.0.0"),
    ],
)
def test_no_underlay_address(setting: str, joined: str, shown: str) -> None:
    """An address where no other node reaches this one is refused, with the setting to make."""
    with pytest.raises(InvalidSettings, match="set HIVEWIRE_UNDERLAY_ADDRESS") as caught:
        underlay_address(setting, joined)
    assert shown in str(caught.value)


def test_doubts_are_told(rig: Rig) -> None:
    """What the agent does not believe is in its record, the curable first, as much of it as there is room for."""
    doubts = [Doubt(key=f"k{n:04}" * 100, reason="r" * 1000) for n in range(200)]
    doubts.append(Doubt(key="z", reason="older", seen=7))
    rig.presence = NodePresence(rig.store, Unsigned(), node(), rig.measure, rig.changed, doubts=lambda: doubts)
    rig.presence.step()
    stored = rig.stored()
    assert stored is not None
    assert stored.doubts[0] == Doubt(key="z", reason="older", seen=7)
    assert len(stored.doubts) == 100
    assert max(len(it.key) + len(it.reason) for it in stored.doubts) <= 600
    doubts.clear()
    rig.presence.step()
    stored = rig.stored()
    assert stored is not None
    assert stored.doubts == ()


def test_what_somebody_put_in_its_place_goes(rig: Rig) -> None:
    """Another value, the same without the lease, and a deletion are put right at the next step."""
    rig.presence.step()
    good = rig.store.get(KEY)
    assert good is not None
    for spoil in (
        lambda: rig.store.put(KEY, b"nonsense"),
        lambda: rig.store.put(KEY, good.value),
        lambda: rig.store.delete(KEY),
    ):
        spoil()
        rig.presence.step()
        item = rig.store.get(KEY)
        assert item is not None
        assert (item.value, item.lease) == (good.value, good.lease)
