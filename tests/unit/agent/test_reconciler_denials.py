"""The loop takes down what rules noted before it replaces or removes them, and reads without writing."""

from ipaddress import IPv4Address

import pytest

from agent.observed import NotedCounters, NotedEntry
from agent.ops import SetRules
from hivewire.errors import KernelBusy
from hivewire.records import Mode
from tests.unit.agent.test_task_reconciler import WEB, WEB_1, Rig
from tests.unit.agent.values import OWN, peer, policy

NAME = "denied_no_link_in"


@pytest.fixture
def noting() -> Rig:
    """A task of web that is in the mesh and has noted three packets."""
    rig = Rig()
    rig.mesh(WEB, peer(5))
    rig.run_task()
    rig.settle()
    rig.namespace.noted = {NAME: (noted(3),)}
    return rig


def noted(count: int) -> NotedEntry:
    return NotedEntry(IPv4Address("10.1.0.9"), IPv4Address(OWN), 6, 8080, count)


def counts(rig: Rig) -> list[int]:
    return [entry.count for task in rig.agent.denials() for entry in task.entries]


def test_on_demand_the_kernel_is_asked(noting: Rig) -> None:
    """A report holds what was noted until this moment, and asking writes nothing, neither here nor there."""
    revision = noting.store.revision
    noting.take_ops()
    assert counts(noting) == [3]
    noting.namespace.noted = {NAME: (noted(5),)}
    assert counts(noting) == [5]
    assert (noting.take_ops(), noting.store.revision) == ([], revision)


def test_what_was_noted_survives_new_rules(noting: Rig) -> None:
    """When peers change the table is replaced; what came since the last reading is in the sum."""
    noting.put(peer(6))
    noting.settle()
    assert any(isinstance(op, SetRules) for op in noting.take_ops())
    assert noting.namespace.noted == {}
    noting.namespace.noted = {NAME: (noted(2),)}
    assert counts(noting) == [5]


def test_what_was_noted_survives_leaving_the_mesh(noting: Rig) -> None:
    """A service that is switched off keeps what its tasks noted, and they are read no more."""
    noting.put(policy(mode=Mode.OFF))
    noting.settle()
    assert noting.namespace.rules == ""
    assert noting.agent.meshed() == ()
    assert counts(noting) == [3]


def test_what_was_noted_survives_the_task(noting: Rig) -> None:
    """What a task noted until the last reading is reported after its end, too."""
    assert counts(noting) == [3]
    noting.end_task(WEB_1)
    noting.settle()
    assert noting.agent.meshed() == ()
    assert counts(noting) == [3]


def test_counters_that_cannot_be_read_hold_nothing_up(noting: Rig) -> None:
    """New rules are set all the same."""
    noting.kernel.fail(NotedCounters, KernelBusy("not now"))
    noting.put(peer(6))
    noting.settle()
    assert any(isinstance(op, SetRules) for op in noting.take_ops())
    assert counts(noting) == []
