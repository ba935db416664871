"""The gate, over overlay namespaces and edges of a few values."""

import pytest

from agent.guard import edge
from agent.guard.gate import Gate
from agent.guard.render import SHUT, Closed, render
from hivewire.errors import KernelBusy
from hivewire.ids import NetworkId
from hivewire.records import GuardRecord
from tests.fakes.overlays import FakeEdges, FakeOverlays, FakeSpace

NETWORK = NetworkId("abcdefghij0123456789")
FILE = "7-abcdefghij"
OTHER = "8-zyxwvutsrq"


class Rig:
    """A node with a strict network, whose edge an agent made once, and another network."""

    def __init__(self) -> None:
        self.overlays = FakeOverlays()
        self.edges = FakeEdges()
        record = GuardRecord(network=NETWORK, name="app", strict=True, vnis=(4097,))
        self.edges.apply(edge.table_of(NETWORK), edge.render(record)[0])
        self.gate = Gate(self.overlays, self.edges)

    def add(self, file: str) -> FakeSpace:
        self.overlays.spaces[file] = space = FakeSpace()
        return space


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_a_strict_network_is_shut_and_no_other(rig: Rig) -> None:
    """What has an edge is shut, as an agent would begin; once, whatever comes of it; what has none stays as it is."""
    strict, other = rig.add(FILE), rig.add(OTHER)
    assert rig.gate.shut_all({FILE, OTHER, "1a2b3c4d5e6f", "lb_abcdefghi", "default"}) == frozenset()
    assert (strict.text, other.text) == (render(SHUT)[0], "")
    assert rig.gate.shut_all({FILE}) == frozenset()
    assert len(strict.applied) == 1


def test_a_guard_is_left_alone(rig: Rig) -> None:
    """An agent was there first: it knows more."""
    space = rig.add(FILE)
    space.apply(render(Closed((), ()))[0], {})
    before = space.text
    assert not rig.gate.shut(FILE)
    assert space.text == before


def test_a_network_that_is_strict_no_more_stays_open(rig: Rig) -> None:
    """Its agent removed the edge."""
    rig.edges.remove(edge.table_of(NETWORK))
    space = rig.add(FILE)
    assert not rig.gate.shut(FILE)
    assert space.applied == []


def test_what_the_kernel_refuses_is_tried_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are shut meanwhile; a file that is gone is forgotten."""
    monkeypatch.setattr("agent.guard.gate.MOUNT_S", 0.0)
    first, second = rig.add(FILE), rig.add("9-abcdefghij")
    with monkeypatch.context() as refusing:

        def refuse(text: str) -> bool:
            raise KernelBusy("no")

        refusing.setattr(first, "create", refuse)
        assert rig.gate.shut_all({FILE, "9-abcdefghij", "10-abcdefghij"}) == {FILE}
        assert second.text
    assert rig.gate.shut_all({FILE}) == frozenset()
    assert first.text == render(SHUT)[0]
