"""From policies to the guards of overlay networks."""

from collections.abc import Mapping
from dataclasses import replace
from ipaddress import IPv4Address

import pytest

from controller.policy.compile import MeshDefaults, compile_mesh
from controller.policy.guards import GUARD, Guards, compile_guards
from controller.swarm.snapshot import Network, Service
from hivewire.records import GUARDS, GuardRecord, Mode, decode, guard_key
from tests.builders import network, network_id, service, service_id, snapshot
from tests.property.test_controller_rig import Cluster

ENFORCED = service("shop_api", {"hivewire.mode": "enforce"}, vips={"shop_app": "10.1.0.2"})
OBSERVED = service("shop_web", {"hivewire.mode": "observe"}, vips={"shop_app": "10.1.0.3"})
UNLABELLED = service("shop_spy", vips={"shop_app": "10.1.0.4"})
OFF = service("shop_off", {"hivewire.enable": "false"})
BROKEN = service("shop_odd", {"hivewire.links": "api:99999"})


def labelled(name: str, labels: Mapping[str, str], **more: bool) -> Network:
    return replace(network(name, **more), labels=dict(labels))


def compiled(*services: Service, networks: tuple[Network, ...] | None = None) -> Guards:
    swarm = snapshot(*services, networks=networks)
    return compile_guards(swarm, compile_mesh(swarm, {}, MeshDefaults(Mode.ENFORCE)).policies)


def strict(*services: Service, value: str = "strict") -> Guards:
    return compiled(*services, networks=(labelled("shop_app", {GUARD: value}),))


def only(guards: Guards) -> GuardRecord:
    (record,) = guards.records.values()
    return record


def test_a_default_guard_names_enforced_services_only() -> None:
    """The record of a network without a label says who is enforced, sorted, and nothing else."""
    found = compiled(UNLABELLED, OBSERVED, ENFORCED, OFF, BROKEN)
    assert only(found) == GuardRecord(
        network=network_id("shop_app"),
        name="shop_app",
        enforced=tuple(sorted((service_id("shop_api"), service_id("shop_odd")))),
    )
    assert found.findings == ()


@pytest.mark.parametrize("services", [(), (UNLABELLED,), (OBSERVED, OFF)], ids=["nobody", "unlabelled", "not enforced"])
def test_without_an_enforced_service_there_is_no_default_guard(services: tuple[Service, ...]) -> None:
    """Nobody is to be kept from talking."""
    assert compiled(*services) == Guards()


def test_a_strict_guard_names_the_exempt_and_their_vips() -> None:
    """Who is in another mode, switched off or without labels is exempt; a broken new service is enforced."""
    found = strict(UNLABELLED, OBSERVED, ENFORCED, OFF, BROKEN)
    assert only(found) == GuardRecord(
        network=network_id("shop_app"),
        name="shop_app",
        strict=True,
        enforced=tuple(sorted((service_id("shop_api"), service_id("shop_odd")))),
        exempt=tuple(sorted(map(service_id, ("shop_spy", "shop_web", "shop_off")))),
        exempt_vips=(IPv4Address("10.1.0.3"), IPv4Address("10.1.0.4")),
    )


@pytest.mark.parametrize("value", ["strict", "default"])
def test_a_service_in_quarantine_is_guarded_whatever_its_mode(value: str) -> None:
    """The guard holds who makes frames itself, on a network where nobody else is enforced as well."""
    swarm = snapshot(OBSERVED, UNLABELLED, networks=(labelled("shop_app", {GUARD: value}),))
    policies = compile_mesh(swarm, {}, MeshDefaults(Mode.ENFORCE)).policies
    record = only(compile_guards(swarm, policies, Mode.ENFORCE, frozenset({OBSERVED.id})))
    assert record.enforced == (OBSERVED.id,)
    assert OBSERVED.id not in record.exempt


def test_only_a_strict_guard_knows_its_frames() -> None:
    """Identifiers and port of its VXLAN frames, by which nodes close it before anybody is on it."""
    for value, vnis in (("strict", (4097, 4099)), ("default", ())):
        wired = replace(labelled("shop_app", {GUARD: value}), vnis=(4097, 4099))
        swarm = replace(snapshot(ENFORCED, networks=(wired,)), vxlan_port=7777)
        record = only(compile_guards(swarm, compile_mesh(swarm, {}, MeshDefaults(Mode.ENFORCE)).policies))
        assert (record.vnis, record.vxlan_port) == (vnis, 7777 if vnis else 4789)


def test_a_strict_network_is_guarded_before_anybody_is_on_it() -> None:
    """The record is there without any service, so that the first task finds the guard in place."""
    assert only(strict()).strict


def test_a_mesh_that_is_off_guards_only_who_asks_for_it() -> None:
    """Switching the mesh off opens strict networks again, but for those where a label enforces."""
    networks = (labelled("shop_app", {GUARD: "strict"}), labelled("other", {GUARD: "strict"}))
    swarm = snapshot(ENFORCED, UNLABELLED, networks=networks)
    policies = compile_mesh(swarm, {}, MeshDefaults(Mode.OFF)).policies
    assert set(compile_guards(swarm, policies, Mode.OFF).records) == {network_id("shop_app")}


@pytest.mark.parametrize("value", ["default", " default ", "strict", " strict "])
def test_known_values(value: str) -> None:
    """Both values are taken, with white space around them, and without a finding."""
    found = strict(ENFORCED, value=value)
    assert only(found).strict is ("strict" in value)
    assert found.findings == ()


@pytest.mark.parametrize("value", ["Strict", "true", "", "off"])
def test_an_unknown_value_is_strict_and_reported(value: str) -> None:
    """What cannot be read closes rather than opens, and a finding says so."""
    found = strict(UNLABELLED, value=value)
    assert only(found).strict
    (finding,) = found.findings
    assert (finding.code, finding.subject, finding.label) == ("HW307", "shop_app", GUARD)
    assert f'"{value}"' in finding.message


def test_who_cannot_be_in_the_mesh_though_it_asks_is_not_exempt() -> None:
    """On a strict network with option dsr a labelled service has no policy; it stays closed, others are exempt."""
    dsr = replace(labelled("shop_app", {GUARD: "strict"}), is_dsr=True)
    assert only(compiled(ENFORCED, UNLABELLED, OBSERVED, networks=(dsr,))).exempt == tuple(
        sorted((service_id("shop_spy"), service_id("shop_web")))
    )


def test_ingress_and_other_drivers_have_no_guard() -> None:
    """Not even with the label."""
    networks = (
        labelled("ingress", {GUARD: "strict"}, is_ingress=True),
        replace(network("host", driver="host"), labels={GUARD: "odd"}),
    )
    assert compiled(networks=networks) == Guards()


def test_each_network_has_its_own() -> None:
    """A service on two networks is guarded on both."""
    both = service("shop_api", {"hivewire.mode": "enforce"}, networks=("a", "b"))
    found = compiled(both, service("shop_spy", networks=("c",)))
    assert set(found.records) == {network_id("a"), network_id("b")}


# Written by the loop.


def stored(cluster: Cluster) -> dict[str, GuardRecord]:
    return {r.name: r for r in (decode(GuardRecord, value) for value in cluster.stored(GUARDS).values())}


def test_the_controller_writes_guards_and_takes_them_back() -> None:
    """The record comes with the first enforced service, changes with it, goes with it; passes between write nothing."""
    cluster = Cluster()
    web, db = cluster.shop()
    assert stored(cluster)["shop_app"].enforced == tuple(sorted((web, db)))
    assert set(cluster.stored(GUARDS)) == {guard_key(cluster.network)}
    cluster.settle(3.0)
    assert cluster.resync() == 0
    cluster.swarm.set_labels(web, {"hivewire.mode": "observe"})
    cluster.tell(web)
    cluster.settle()
    assert stored(cluster)["shop_app"].enforced == (db,)
    cluster.swarm.set_labels(db, {"hivewire.mode": "off"})
    cluster.tell(db)
    cluster.settle()
    assert stored(cluster)["shop_app"].enforced == (), "a deletion would prove nothing to an agent"
    cluster.settle(3.0)
    assert cluster.resync() == 0


def test_a_guard_that_somebody_else_changed_is_written_again() -> None:
    """A record that is lost or altered is put right, as every derived record is."""
    cluster = Cluster()
    cluster.shop()
    right = stored(cluster)
    cluster.store.put(guard_key(cluster.network), b"{}")
    cluster.settle()
    assert stored(cluster) == right
    cluster.store.delete(guard_key(cluster.network))
    cluster.settle()
    assert stored(cluster) == right


def test_a_bad_guard_label_is_among_the_findings() -> None:
    """The network is guarded as a strict one, and people are told."""
    cluster = Cluster()
    cluster.swarm.add_network("odd", labels={GUARD: "stirct"})
    cluster.shop()
    assert stored(cluster)["odd"].strict
    assert [f.subject for f in cluster.one.reconciler.state().findings if f.code == "HW307"] == ["odd"]
