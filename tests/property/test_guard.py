"""The guard over arbitrary networks: it never opens what is enforced, and the order of facts does not matter."""

from ipaddress import IPv4Address

from hypothesis import given, settings
from hypothesis import strategies as st

from agent.guard.desired import Holder, LocalNetwork, Stage, guard
from agent.guard.render import Closed, Open, render
from controller.policy.compile import MeshDefaults, compile_mesh
from controller.policy.guards import compile_guards
from hivewire.ids import ContainerId, NetworkId, ServiceId
from hivewire.records import GuardRecord, Mode
from tests.strategies import snapshots

UNTIMED = settings(deadline=None)
SERVICES = tuple(map(ServiceId, ("api", "db", "spy", "new", "")))

addresses = st.integers(2, 9).map(lambda n: IPv4Address(f"10.0.1.{n}"))
some_services = st.lists(st.sampled_from(SERVICES[:3]), unique=True).map(lambda found: tuple(sorted(found)))
records = st.builds(
    lambda strict, enforced, exempt, vips: GuardRecord(
        network=NetworkId("n"),
        name="app",
        strict=strict,
        enforced=enforced,
        exempt=exempt,
        exempt_vips=tuple(sorted(vips)),
    ),
    st.booleans(),
    some_services,
    some_services,
    st.sets(addresses, max_size=2),
)
holders = st.lists(st.tuples(st.sampled_from(SERVICES), addresses, st.sampled_from(Stage)), max_size=8).map(
    lambda found: tuple(
        Holder(ContainerId(str(i)), service, address, "", stage) for i, (service, address, stage) in enumerate(found)
    )
)
networks = st.builds(LocalNetwork, holders, st.none() | addresses.filter(lambda a: int(a) % 2 == 0))
macs = st.sets(addresses.map(lambda a: f"02:42:0a:00:01:{int(a) & 255:02x}")).map(frozenset)


@UNTIMED
@given(records, networks, macs)
def test_an_attached_enforced_task_never_passes(record: GuardRecord, local: LocalNetwork, seen: frozenset[str]) -> None:
    """Whatever else holds its address: default names it, strict does not."""
    rules = guard(record, local, seen)
    enforced = {h.address for h in local.holders if h.stage is Stage.ATTACHED and h.service in record.enforced}
    if isinstance(rules, Open):
        assert enforced.isdisjoint(rules.addresses)
    else:
        assert enforced <= set(rules.addresses)


@UNTIMED
@given(records, networks, macs)
def test_strict_opens_only_what_is_known_to_be_exempt(
    record: GuardRecord, local: LocalNetwork, seen: frozenset[str]
) -> None:
    """An address that passes is an exempt task's, an exempt VIP or the balancer's."""
    rules = guard(record, local, seen)
    if isinstance(rules, Open):
        known = {h.address for h in local.holders if h.service in set(record.exempt) - set(record.enforced)}
        assert set(rules.addresses) <= known | set(record.exempt_vips) | {local.load_balancer}
    else:
        assert isinstance(rules, Closed)
        assert not record.strict


@UNTIMED
@given(records, networks, macs, st.randoms())
def test_the_order_of_facts_does_not_matter(
    record: GuardRecord, local: LocalNetwork, seen: frozenset[str], random: object
) -> None:
    """The same containers in another order give the same text, so a quiet node changes nothing."""
    shuffled = list(local.holders)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    again = LocalNetwork(tuple(shuffled), local.load_balancer)
    assert render(guard(record, again, seen)) == render(guard(record, local, seen))


@UNTIMED
@given(snapshots())
def test_nobody_is_enforced_and_exempt(snapshot: object) -> None:
    """Whatever the labels: the lists of a record exclude each other, and an enforced service is in its records."""
    policies = compile_mesh(snapshot, {}, MeshDefaults(Mode.ENFORCE)).policies  # type: ignore[arg-type]
    guards = compile_guards(snapshot, policies)  # type: ignore[arg-type]
    for record in guards.records.values():
        assert set(record.enforced).isdisjoint(record.exempt)
        assert record == compile_guards(snapshot, policies).records[record.network]  # type: ignore[arg-type]
    for policy in policies.values():
        if policy.mode is Mode.ENFORCE:
            assert all(policy.service in guards.records[n.id].enforced for n in policy.networks)
