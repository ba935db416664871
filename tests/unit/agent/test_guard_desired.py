"""From a guard's record and the engine's facts to what is let through."""

from ipaddress import IPv4Address

import pytest

from agent.guard.desired import Holder, LocalNetwork, Stage, guard
from agent.guard.render import SHUT, Closed, Open
from hivewire.ids import ContainerId, NetworkId, ServiceId
from hivewire.records import GuardRecord

ENFORCED, EXEMPT, NEW = ServiceId("api"), ServiceId("spy"), ServiceId("new")
A, B, LB, VIP = map(IPv4Address, ("10.0.1.3", "10.0.1.4", "10.0.1.5", "10.0.1.2"))
MAC_A = "02:42:0a:00:01:03"

DEFAULT = GuardRecord(network=NetworkId("n"), name="app", enforced=(ENFORCED,))
STRICT = GuardRecord(
    network=NetworkId("n"), name="app", strict=True, enforced=(ENFORCED,), exempt=(EXEMPT,), exempt_vips=(VIP,)
)


def holder(service: str, address: IPv4Address = A, stage: Stage = Stage.ATTACHED, mac: str = "") -> Holder:
    return Holder(ContainerId(f"{service}-{stage.value}"), ServiceId(service), address, mac, stage)


def local(*holders: Holder, balancer: IPv4Address | None = None) -> LocalNetwork:
    return LocalNetwork(holders, balancer)


def test_default_closes_enforced_tasks_by_both_their_addresses() -> None:
    """Tasks of enforced services are closed, those of others are not, nor is the load balancer."""
    found = guard(DEFAULT, local(holder("api"), holder("spy", B), balancer=LB))
    assert found == Closed((A,), (MAC_A,))


def test_default_uses_the_hardware_address_that_the_engine_says() -> None:
    """Where a container has a hardware address of its own making, that one is closed."""
    assert guard(DEFAULT, local(holder("api", mac="aa:bb:cc:00:00:01"))) == Closed((A,), ("aa:bb:cc:00:00:01",))


@pytest.mark.parametrize("stage", [Stage.COMING, Stage.ATTACHED])
def test_default_closes_a_task_before_it_starts(stage: Stage) -> None:
    """A container that was made and not started is guarded as one that runs."""
    assert guard(DEFAULT, local(holder("api", stage=stage))) == Closed((A,), (MAC_A,))


def test_an_ended_task_is_guarded_until_its_veth_is_gone() -> None:
    """While the bridge still sees its hardware address an ended container is closed; then no more."""
    ended = local(holder("api", stage=Stage.ENDED))
    assert guard(DEFAULT, ended, frozenset({MAC_A})) == Closed((A,), (MAC_A,))
    assert guard(DEFAULT, ended) == Closed((), ())


@pytest.mark.parametrize("stage", [Stage.ENDED, Stage.COMING])
def test_an_address_belongs_to_whom_it_is_attached_to(stage: Stage) -> None:
    """Swarm gave the address of an enforced task to another one: only the living one counts."""
    facts = local(holder("api", stage=stage), holder("spy"))
    assert guard(DEFAULT, facts, frozenset({MAC_A})) == Closed((), ())
    assert guard(STRICT, facts, frozenset({MAC_A})) == Open((VIP, A))


def test_of_two_that_are_coming_the_enforced_one_counts() -> None:
    """In doubt an address is closed."""
    facts = local(holder("api", stage=Stage.COMING), holder("spy", stage=Stage.COMING))
    assert guard(DEFAULT, facts) == Closed((A,), (MAC_A,))
    assert guard(STRICT, facts) == Open((VIP,))


def test_strict_opens_exempt_tasks_vips_and_the_balancer() -> None:
    """Only what is known to be exempt passes."""
    found = guard(STRICT, local(holder("api"), holder("spy", B), balancer=LB))
    assert found == Open((VIP, B, LB))


@pytest.mark.parametrize("service", ["new", ""], ids=["a new service", "of no service"])
def test_strict_keeps_the_unknown_shut(service: str) -> None:
    """A service newer than the record, and a container of no service, are shut."""
    record = GuardRecord(network=NetworkId("n"), name="app", strict=True)
    assert guard(record, local(holder(service))) == SHUT


def test_strict_never_opens_what_an_enforced_task_holds() -> None:
    """Not though a record should call the service exempt as well, or its address a VIP."""
    record = GuardRecord(
        network=NetworkId("n"), name="app", strict=True, enforced=(ENFORCED,), exempt=(ENFORCED,), exempt_vips=(A,)
    )
    assert guard(record, local(holder("api"))) == SHUT
