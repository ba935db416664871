"""What is known of the paths to other nodes: who is asked, when, and what is made of the answers."""

from ipaddress import ip_address

import pytest

from agent.paths import FORGET_S, PathWatch
from hivewire.records import Endpoint
from tests.fakes.clock import FakeClock

NEAR = Endpoint(address=ip_address("192.0.2.2"), port=51820)
ALSO_NEAR = Endpoint(address=NEAR.address, port=51821)
FAR = Endpoint(address=ip_address("2001:db8::3"), port=51820)


class FakeSockets:
    """A network that carries so much to each address."""

    def __init__(self) -> None:
        self.carries: dict[object, int] = {}
        self.told: dict[object, int] = {}
        self.sent: list[tuple[Endpoint, int]] = []

    def send(self, endpoint: Endpoint, size: int) -> None:
        self.sent.append((endpoint, size))
        if size > self.carries.get(endpoint.address, size):
            self.told[endpoint.address] = self.carries[endpoint.address]

    def mtu(self, endpoint: Endpoint) -> int | None:
        return self.told.get(endpoint.address, 1500) if endpoint != FAR or endpoint.address in self.told else None


class Rig:
    def __init__(self) -> None:
        self.sockets, self.clock, self.changes = FakeSockets(), FakeClock(), 0
        self.watch = PathWatch(self.sockets, lambda: 1500, self._on_change, self.clock)

    def _on_change(self) -> None:
        self.changes += 1


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_each_node_is_asked_once_and_then_all_again(rig: Rig) -> None:
    """One datagram per node, not per peer; the new ones at once, all of them in their turn."""
    rig.watch([NEAR, ALSO_NEAR])
    rig.watch.send(only_new=True)
    assert rig.sockets.sent == [(ALSO_NEAR, 1500)]
    rig.watch([NEAR, FAR])
    rig.watch.send(only_new=True)
    assert rig.sockets.sent[1:] == [(FAR, 1500)]
    rig.watch.send(only_new=False)
    assert rig.sockets.sent[2:] == [(NEAR, 1500), (FAR, 1500)]


def test_only_what_matters_is_told(rig: Rig) -> None:
    """A path that carries less is a change, one that carries all that the underlay does is none."""
    rig.watch([NEAR, FAR])
    rig.watch.send(only_new=True)
    rig.watch.look()
    assert (rig.changes, rig.watch([])) == (0, {NEAR.address: 1500})
    rig.sockets.carries[NEAR.address] = 1400
    rig.watch.send(only_new=False)
    rig.watch.look()
    rig.watch.look()
    assert (rig.changes, rig.watch([])) == (1, {NEAR.address: 1400})
    rig.sockets.carries.clear()
    rig.sockets.told.clear()
    rig.watch.look()
    assert (rig.changes, rig.watch([])) == (2, {NEAR.address: 1500})


def test_who_is_no_peer_any_more_is_let_go(rig: Rig) -> None:
    """A node that nobody asks for is not sent to forever."""
    rig.watch([NEAR, FAR])
    rig.watch.look()
    rig.clock.advance(FORGET_S + 1)
    rig.watch([FAR])
    rig.watch.send(only_new=False)
    rig.watch.look()
    assert [endpoint for endpoint, _ in rig.sockets.sent] == [FAR]
    assert rig.watch([]) == {}
