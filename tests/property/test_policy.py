"""What holds of every cluster and every label, however people write them."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.policy import labels
from controller.policy.compile import Compiled, MeshDefaults, compile_mesh
from controller.policy.findings import KINDS
from controller.policy.labels import coalesce, parse_labels
from controller.swarm.snapshot import SwarmSnapshot
from hivewire.errors import InvalidPolicy
from hivewire.ids import ServiceId
from hivewire.records import Finding, Mode, PolicyRecord, PortRange, Protocol, decode, encode
from tests import strategies
from tests.builders import service

READERS: list[Callable[[str], Any]] = [
    labels.split_list,
    labels.read_link,
    labels.read_ports,
    labels.read_allow,
    labels.read_boolean,
    labels.read_mode,
    labels.read_network,
    labels.read_rotate,
    labels.read_keepalive,
    labels.read_mtu,
]
MESH = MeshDefaults(Mode.ENFORCE)

modes = st.sampled_from(Mode)
port_ranges = st.builds(
    lambda protocol, ends: PortRange(protocol=protocol, first=min(ends), last=max(ends)),
    st.sampled_from(Protocol),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
)


def compiled(shop: SwarmSnapshot, mode: Mode = Mode.ENFORCE) -> Compiled:
    """Compile without a past."""
    return compile_mesh(shop, {}, MeshDefaults(mode))


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
@given(text=strategies.junk)
def test_readers_raise_only_invalid_policy(read: Callable[[str], Any], text: str) -> None:
    """Whatever stands in a label, a reader gives a value or raises InvalidPolicy."""
    with contextlib.suppress(InvalidPolicy):
        read(text)


@given(st.dictionaries(st.text(max_size=20) | st.sampled_from(labels.LABELS), strategies.junk, max_size=5))
def test_parsing_never_raises(written: dict[str, str]) -> None:
    """Any labels of service and container give values and findings of known codes, with short texts."""
    parsed = parse_labels(service("shop_web", written, container_labels=written))
    for found in parsed.findings:
        assert found.severity is KINDS[found.code].severity
        assert found.remedy
        assert len(found.message) < 300


@given(st.lists(port_ranges, max_size=8))
def test_coalescing_keeps_every_port(ranges: list[PortRange]) -> None:
    """The same ports are covered, by disjoint ranges in order, and doing it again changes nothing."""
    merged = coalesce(ranges)
    assert each_port(merged) == each_port(ranges)
    assert len(each_port(merged)) == sum(r.last - r.first + 1 for r in merged)
    assert coalesce(merged) == merged
    assert coalesce(reversed(ranges)) == merged


def each_port(ranges: "list[PortRange] | tuple[PortRange, ...]") -> set[tuple[Protocol, int]]:
    return {(r.protocol, port) for r in ranges for port in range(r.first, r.last + 1)}


@given(strategies.snapshots(), modes, st.randoms(use_true_random=False))
def test_the_order_of_the_input_does_not_matter(shop: SwarmSnapshot, mode: Mode, random: Any) -> None:
    """However services, networks and labels are ordered, the outcome is the same, bytes and order included."""
    services, networks = list(shop.services.items()), list(shop.networks.items())
    random.shuffle(services)
    random.shuffle(networks)
    mixed = [(i, replace(s, labels=dict(reversed(list(s.labels.items()))))) for i, s in services]
    first = compiled(shop, mode)
    second = compiled(replace(shop, services=dict(mixed), networks=dict(networks)), mode)
    assert first == second
    assert list(first.policies) == list(second.policies)
    assert [encode(p) for p in first.policies.values()] == [encode(p) for p in second.policies.values()]


@given(strategies.snapshots(), modes)
def test_links_are_symmetric(shop: SwarmSnapshot, mode: Mode) -> None:
    """A links to B exactly where B is linked from A, on the same network and with the same ports."""
    policies = compiled(shop, mode).policies
    out = {(a, x.service, x.network, x.ports) for a, p in policies.items() for x in p.out_links}
    into = {(x.service, b, x.network, x.ports) for b, p in policies.items() for x in p.in_links}
    assert out == into


@given(strategies.snapshots(), modes)
def test_policies_are_well_formed(shop: SwarmSnapshot, mode: Mode) -> None:
    """No policy is off, links run on networks of both ends that can carry them, have ports, and are in order."""
    for i, policy in compiled(shop, mode).policies.items():
        mine = {n.id for n in policy.networks}
        assert policy.service == i
        assert policy.mode is not Mode.OFF
        assert policy.self_links
        for link in (*policy.out_links, *policy.in_links):
            assert link.service != i
            assert link.ports == coalesce(link.ports) != ()
        for link in (*policy.out_links, *policy.in_links, *policy.self_links):
            assert link.network in mine
            assert link.network in shop.services[link.service].networks
            assert not shop.networks[link.network].is_dsr
        for links in (policy.out_links, policy.in_links, policy.self_links):
            order = [(x.name, x.service, x.network) for x in links]
            assert order == sorted(set(order))


@given(strategies.snapshots(), modes)
def test_nobody_is_cut_by_somebody_else(shop: SwarmSnapshot, mode: Mode) -> None:
    """A service that says nothing of Hivewire is never enforced, and never linked from another stack."""
    for i, policy in compiled(shop, mode).policies.items():
        mine = shop.services[i]
        if not parse_labels(mine).is_present:
            assert policy.mode is Mode.OBSERVE
            assert {shop.services[x.service].stack for x in policy.in_links} == {mine.stack}


@given(strategies.snapshots(), modes)
def test_other_stacks_need_consent(shop: SwarmSnapshot, mode: Mode) -> None:
    """A link between stacks is there only where the target has allowed its source."""
    for i, policy in compiled(shop, mode).policies.items():
        target = shop.services[i]
        for link in policy.in_links:
            source = shop.services[link.service]
            if not source.stack or source.stack != target.stack:
                assert any(allow.admits(source) for allow in parse_labels(target).allow)


@given(strategies.snapshots(), strategies.services("shop_web"), modes)
def test_an_unrelated_service_changes_nothing_else(shop: SwarmSnapshot, template: Any, mode: Mode) -> None:
    """A service of a stack that nobody names and that names nobody leaves every other policy as it was."""
    kept = {k: v for k, v in template.labels.items() if k not in ("hivewire.links", "com.docker.stack.namespace")}
    other = service(
        "zoo_lion", kept, container_labels=template.container_labels, networks=[n[4:] for n in template.networks]
    )
    before = compiled(shop, mode).policies
    after = compiled(replace(shop, services={**shop.services, other.id: other}), mode).policies
    assert {i: p for i, p in after.items() if i != other.id} == before


@given(strategies.snapshots(), modes)
def test_compiling_again_changes_nothing(shop: SwarmSnapshot, mode: Mode) -> None:
    """With its own outcome as the past, the outcome is the same: a quiet cluster writes nothing."""
    first = compiled(shop, mode)
    assert compile_mesh(shop, first.policies, MeshDefaults(mode)).policies == first.policies


@given(strategies.snapshots(), strategies.snapshots())
def test_a_second_pass_settles(before: SwarmSnapshot, after: SwarmSnapshot) -> None:
    """After any change one pass is enough: the next one with the same cluster changes nothing."""
    past = compiled(before).policies
    once = compile_mesh(after, past, MESH).policies
    assert compile_mesh(after, once, MESH).policies == once


@given(strategies.snapshots(), strategies.junk)
def test_a_bad_label_touches_only_its_own_service(shop: SwarmSnapshot, value: str) -> None:
    """When a label of one service turns bad, every policy of every other service stays, and its own links too.

    Only what the others are told may change: a pending link to the service then needs its labels corrected first.
    """

    def in_force(policies: Mapping[ServiceId, PolicyRecord], but: ServiceId) -> dict[ServiceId, PolicyRecord]:
        return {k: msgspec.structs.replace(p, findings=()) for k, p in policies.items() if k != but}

    past = compiled(shop).policies
    for i in shop.services:
        if i not in past or not past[i].labels:
            continue
        spoilt = replace(shop.services[i], labels={**shop.services[i].labels, "hivewire.nonsense": value})
        now = compile_mesh(replace(shop, services={**shop.services, i: spoilt}), past, MESH).policies
        assert in_force(now, i) == in_force(past, i)
        assert now[i].out_links == past[i].out_links
        assert (now[i].mode, now[i].labels) == (past[i].mode, past[i].labels)


@given(strategies.snapshots(), modes)
def test_records_survive_the_wire(shop: SwarmSnapshot, mode: Mode) -> None:
    """Every policy and every finding is the same after encoding and decoding."""
    outcome = compiled(shop, mode)
    for policy in outcome.policies.values():
        assert decode(PolicyRecord, encode(policy)) == policy
    for found in outcome.findings:
        assert decode(Finding, encode(found)) == found


@given(strategies.snapshots(), modes)
def test_findings_are_in_one_place_and_in_both(shop: SwarmSnapshot, mode: Mode) -> None:
    """What a policy says of its service is among all findings, and all of them are of known codes and distinct."""
    outcome = compiled(shop, mode)
    assert all(f.code in KINDS for f in outcome.findings)
    assert len(set(outcome.findings)) == len(outcome.findings)
    for policy in outcome.policies.values():
        assert {f for f in outcome.findings if f.subject == policy.name} == set(policy.findings)
        assert all(f.subject == policy.name for f in policy.findings)
