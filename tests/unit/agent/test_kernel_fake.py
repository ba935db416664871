"""What only the fake kernel does: failures on demand, a record of operations, several nodes in one memory."""

from ipaddress import IPv4Address, IPv4Network

import pytest

from agent.observed import ObservedTask
from agent.ops import AddPeer, AddRoute, CreateInterface, PeerSpec, Route, SetUp
from hivewire.errors import KernelBusy, NamespaceGone
from hivewire.ids import TaskId
from hivewire.keys import PrivateKey
from hivewire.records import Endpoint
from tests.fakes.kernel import FakeKernel, FakeUnderlay

TASK = TaskId("t1")
OWN, OTHER = IPv4Address("10.0.0.1"), IPv4Address("10.0.0.2")


def test_an_operation_fails_as_often_as_asked() -> None:
    """A failing operation does nothing, those before it stay, and the next try succeeds."""
    kernel = FakeKernel()
    kernel.add_namespace("/ns", {OWN: "eth0"})
    create = CreateInterface(PrivateKey.generate(), 1420, 1, 9)
    kernel.fail(SetUp, KernelBusy("injected"), times=2)
    for _ in range(2):
        with kernel.open(kernel.find(TASK, "/ns")) as session, pytest.raises(KernelBusy, match="injected"):
            session.apply([create, SetUp()])
    with kernel.open(kernel.find(TASK, "/ns")) as session:
        session.apply([SetUp()])
    assert kernel.ops == [(TASK, create), (TASK, create), (TASK, SetUp())]


def test_an_observation_can_fail() -> None:
    """The kernel may be busy for a reader, too."""
    kernel = FakeKernel()
    kernel.add_namespace("/ns")
    kernel.fail(ObservedTask, KernelBusy("injected"))
    with kernel.open(kernel.find(TASK, "/ns")) as session, pytest.raises(KernelBusy):
        session.observe()


def test_a_namespace_that_went_cannot_be_opened() -> None:
    """What was found before is gone, also when a new one has its path."""
    kernel = FakeKernel()
    kernel.add_namespace("/ns")
    found = kernel.find(TASK, "/ns")
    kernel.add_namespace("/ns")
    with pytest.raises(NamespaceGone), kernel.open(found):
        pass


def test_a_handshake_needs_both_sides_and_sets_the_clock() -> None:
    """The second side to add the other completes it, at the time of the underlay's clock."""
    underlay = FakeUnderlay(lambda: 77.0)
    kernels = [FakeKernel(underlay, IPv4Address(f"192.0.2.{n}")) for n in (1, 2)]
    keys = [PrivateKey.generate(), PrivateKey.generate()]
    spaces = [kernel.add_namespace("/ns", {OWN: "eth0", OTHER: "eth1"}) for kernel in kernels]
    specs = [
        PeerSpec(key.public(), Endpoint(address=kernel.address, port=5), frozenset({IPv4Network(address)}))
        for key, kernel, address in zip(keys, kernels, (OWN, OTHER), strict=True)
    ]
    for mine, theirs in ((0, 1), (1, 0)):
        with kernels[mine].open(kernels[mine].find(TASK, "/ns")) as session:
            session.apply([CreateInterface(keys[mine], 1420, 5, 5), AddPeer(specs[theirs])])
        device = spaces[mine].device
        assert device is not None
        assert device.peers[keys[theirs].public()].last_handshake == (None if mine == 0 else 77.0)
    assert not underlay.send(spaces[0], OWN, OTHER)
    with kernels[0].open(kernels[0].find(TASK, "/ns")) as session:
        session.apply([AddRoute(Route(IPv4Network(OTHER), OWN))])
    assert underlay.send(spaces[0], OWN, OTHER)


def test_no_key_is_shown() -> None:
    """Neither the fake device nor its record of operations shows a private key."""
    kernel, key = FakeKernel(), PrivateKey.generate()
    space = kernel.add_namespace("/ns")
    with kernel.open(kernel.find(TASK, "/ns")) as session:
        session.apply([CreateInterface(key, 1420, 1, 9)])
    assert key.reveal().hex() not in repr(space) + repr(kernel.ops)
    assert repr(key.reveal()) not in repr(space) + repr(kernel.ops)
