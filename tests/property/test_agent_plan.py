"""Plans converge, whatever is there and wherever they are interrupted, and show no private key."""

import base64
from collections.abc import Iterable, Mapping
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from typing import assert_never

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.desired import DesiredTask, TaskFacts, desired_task
from agent.moving import undecided
from agent.observed import ObservedInterface, ObservedPeer, ObservedTask
from agent.ops import (
    AddPeer,
    AddRoute,
    CreateInterface,
    ForgetFlows,
    Op,
    RemoveInterface,
    RemovePeer,
    RemoveRoute,
    RemoveRules,
    Route,
    SetMtu,
    SetRules,
    SetUp,
    UpdatePeer,
)
from agent.plan import plan, plan_removal
from agent.rules.render import Backends, RuleSet, Source, render
from hivewire.ids import NetworkId, ServiceId, TaskId
from hivewire.keys import PrivateKey, PublicKey
from hivewire.records import Endpoint, Link, Mode, Network, PeerRecord, PolicyRecord, PortRange, Protocol
from tests.unit.agent.values import node

# A slow machine is no failure.
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
NOW = 1_700_000_000.0
NODE = node()
SERVICES = tuple(ServiceId(f"id-{n}") for n in ("web", "db", "lb"))
NETWORKS = (NetworkId("net-a"), NetworkId("net-b"))
OWN_TASK = TaskId("web.1")
# Few of everything, so that claims meet: addresses of network n are 10.n.0.x.
ADDRESSES = {network: [IPv4Address(f"10.{n}.0.{x}") for x in range(2, 7)] for n, network in enumerate(NETWORKS, 1)}
OWN = {network: addresses[0] for network, addresses in ADDRESSES.items()}
POOL = [address for addresses in ADDRESSES.values() for address in addresses]
VIPS = [IPv4Address(f"10.{n}.0.{200 + s}") for n in (1, 2) for s in range(len(SERVICES))]
KEYS = [PrivateKey(bytes([n]) * 32).public() for n in range(16, 136, 8)]
ENDPOINTS = [Endpoint(address=IPv4Address(f"192.0.2.{n}"), port=51820) for n in range(1, 4)]


# -- what may come ----------------------------------------------------------------------------------------------

port_ranges = st.builds(
    lambda protocol, ends: PortRange(protocol=protocol, first=min(ends), last=max(ends)),
    st.sampled_from(Protocol),
    st.tuples(st.integers(1, 65535), st.integers(1, 65535)),
)
links = st.builds(
    lambda service, network, ports, vip: Link(
        service=service,
        name=service,
        network=network,
        ports=tuple(ports),
        # As Swarm has it: one VIP per service and network.
        vip=IPv4Address(f"10.{NETWORKS.index(network) + 1}.0.{200 + SERVICES.index(service)}") if vip else None,
    ),
    st.sampled_from(SERVICES),
    st.sampled_from(NETWORKS),
    st.lists(port_ranges, max_size=2),
    st.booleans(),
)
policies = st.builds(
    lambda mode, networks, out, into, own, keepalive_s: PolicyRecord(
        service=SERVICES[0],
        name="web",
        stack="",
        mode=mode,
        networks=tuple(Network(id=n, name=n, subnets=()) for n in networks),
        out_links=tuple(out),
        in_links=tuple(into),
        self_links=tuple(link for link in own if link.service == SERVICES[0]),
        keepalive_s=keepalive_s,
    ),
    st.sampled_from([Mode.ENFORCE, Mode.OBSERVE]),
    st.sets(st.sampled_from(NETWORKS)).map(sorted),
    st.lists(links, max_size=3),
    st.lists(links, max_size=3),
    st.lists(links, max_size=2),
    st.sampled_from([0, 25]),
)


@st.composite
def peer_records(draw: st.DrawFn) -> dict[ServiceId, list[PeerRecord]]:
    """Records of the three services, our own task's perhaps among them; addresses may be claimed several times."""
    keys = draw(st.permutations(KEYS))
    records: dict[ServiceId, list[PeerRecord]] = {}
    for number in range(draw(st.integers(0, 6))):
        service = draw(st.sampled_from(SERVICES))
        is_own = number == 0 and service == SERVICES[0]
        networks = draw(st.sets(st.sampled_from(NETWORKS)))
        record = PeerRecord(
            task=OWN_TASK if is_own else TaskId(f"task-{number}"),
            task_name="",
            service=service,
            node=NODE.node,
            public_key=str(keys[number]),
            endpoint=draw(st.sampled_from(ENDPOINTS)),
            epoch=draw(st.integers(1, 3)),
            addresses={n: OWN[n] if is_own else draw(st.sampled_from(ADDRESSES[n])) for n in sorted(networks)},
            serving=draw(st.booleans()),
            underlay_mtu=draw(st.sampled_from([0, 1280, 1500, 9000])),
        )
        records.setdefault(service, []).append(record)
    return records


facts = st.builds(
    lambda networks, mtu: TaskFacts(
        task=OWN_TASK,
        service=SERVICES[0],
        addresses={n: OWN[n] for n in networks},
        interfaces={OWN[n]: f"eth{i}" for i, n in enumerate(networks)},
        underlay_mtu=mtu,
        underlay=NODE.underlay_address,
    ),
    st.sets(st.sampled_from(NETWORKS), min_size=1).map(sorted),
    st.sampled_from([1500, 9000]),
)
desired_tasks = st.builds(desired_task, facts, policies, peer_records())


@st.composite
def observed_tasks(draw: st.DrawFn) -> ObservedTask:
    """Anything that may be found: nothing, what an agent left behind half done, or what somebody made of it."""
    rules = draw(st.sampled_from(["", "0123456789abcdef", "fedcba9876543210"]))
    if draw(st.booleans()):
        return ObservedTask(rules=rules)
    owners = draw(st.dictionaries(st.sampled_from(POOL), st.sampled_from(KEYS), max_size=6))
    keys = {*owners.values(), *draw(st.sets(st.sampled_from(KEYS), max_size=3))}
    peers = {
        key: ObservedPeer(
            key,
            draw(st.sampled_from([None, *ENDPOINTS])),
            frozenset(IPv4Network(a) for a, owner in owners.items() if owner == key),
            draw(st.sampled_from([0, 25])),
            draw(st.sampled_from([None, NOW - 1000, NOW - 10])),
        )
        for key in sorted(keys)
    }
    is_up = draw(st.booleans())
    interface = ObservedInterface("wg0", KEYS[-1], 51820, draw(st.sampled_from([1440, 8940, 1280])), is_up, peers)
    sources = draw(st.dictionaries(st.sampled_from(POOL), st.sampled_from(sorted(OWN.values())), max_size=6))
    routes = frozenset(Route(IPv4Network(a), source) for a, source in sources.items())
    return ObservedTask({}, interface, routes if is_up else frozenset(), rules)


# -- what operations do -----------------------------------------------------------------------------------------


def apply(ops: Iterable[Op], there: ObservedTask) -> ObservedTask:
    """What is there after these operations, by the rules of WireGuard and of the kernel's routes."""
    for op in ops:
        there = after(op, there)
    return there


def after(op: Op, there: ObservedTask) -> ObservedTask:
    interface = there.interface
    match op:
        case CreateInterface(private_key, mtu, first, _):
            assert interface is None
            return replace(
                there, interface=ObservedInterface("wg0", private_key.public(), first, mtu, False), routes=frozenset()
            )
        case RemoveInterface():
            return replace(there, interface=None, routes=frozenset())
        case SetRules(_, digest):
            return replace(there, rules=digest)
        case RemoveRules():
            return replace(there, rules="")
    assert interface is not None, f"{op} without an interface"
    match op:
        case SetMtu(mtu):
            return replace(there, interface=replace(interface, mtu=mtu))
        case SetUp():
            return replace(there, interface=replace(interface, is_up=True))
        case AddPeer(spec):
            assert spec.public_key not in interface.peers
            added = ObservedPeer(spec.public_key, spec.endpoint, frozenset(), spec.keepalive_s)
            return with_peers(
                there, given_to(spec.public_key, spec.allowed_ips, {**interface.peers, added.public_key: added})
            )
        case UpdatePeer(key, endpoint, allowed_ips, keepalive_s):
            old = interface.peers[key]
            new = replace(
                old,
                endpoint=endpoint or old.endpoint,
                keepalive_s=old.keepalive_s if keepalive_s is None else keepalive_s,
            )
            peers = {**interface.peers, key: new}
            return with_peers(there, peers if allowed_ips is None else given_to(key, allowed_ips, peers))
        case RemovePeer(key):
            return with_peers(there, {k: p for k, p in interface.peers.items() if k != key})
        case ForgetFlows():
            return there
        case AddRoute(route):
            assert interface.is_up, "the network is down"
            others = frozenset(r for r in there.routes if r.destination != route.destination)
            return replace(there, routes=others | {route})
        case RemoveRoute(route):
            assert route in there.routes
            return replace(there, routes=there.routes - {route})
        case _:
            assert_never(op)


def given_to(
    key: PublicKey, allowed: frozenset[IPv4Network], peers: Mapping[PublicKey, ObservedPeer]
) -> dict[PublicKey, ObservedPeer]:
    """Cryptokey routing: the peer has these and no others, and nobody else has any of them."""
    return {k: replace(p, allowed_ips=allowed if k == key else p.allowed_ips - allowed) for k, p in peers.items()}


def with_peers(there: ObservedTask, peers: Mapping[PublicKey, ObservedPeer]) -> ObservedTask:
    assert there.interface is not None
    return replace(there, interface=replace(there.interface, peers=peers))


def planned(wanted: DesiredTask, there: ObservedTask, *, prune: bool, key: PrivateKey | None = None) -> tuple[Op, ...]:
    return plan(wanted, there, new_key=key or PrivateKey(bytes(32)), node=NODE, now=NOW, prune=prune)


def assert_is(there: ObservedTask, wanted: DesiredTask, *, prune: bool) -> None:
    """What is there is what was wanted; without ``prune`` more may be there."""
    assert there.interface is not None
    assert there.interface.is_up
    assert there.interface.mtu == wanted.mtu
    peers = there.interface.peers
    assert {k: (peers[k].allowed_ips, peers[k].keepalive_s) for k in wanted.peers} == {
        k: (s.allowed_ips, s.keepalive_s) for k, s in wanted.peers.items()
    }
    assert wanted.routes <= there.routes
    if prune:
        assert peers.keys() == wanted.peers.keys()
        assert there.routes == wanted.routes
        assert there.rules == wanted.rules_digest


# -- what must hold ---------------------------------------------------------------------------------------------


@UNTIMED
@given(desired_tasks, observed_tasks(), st.booleans())
def test_a_plan_reaches_its_aim(wanted: DesiredTask, there: ObservedTask, prune: bool) -> None:
    """After a plan all is as wanted, and the next plan is empty."""
    reached = apply(planned(wanted, there, prune=prune), there)
    assert_is(reached, wanted, prune=prune)
    assert planned(wanted, reached, prune=prune) == ()


@UNTIMED
@given(desired_tasks, observed_tasks(), st.booleans())
def test_a_plan_may_stop_anywhere(wanted: DesiredTask, there: ObservedTask, prune: bool) -> None:
    """However far a plan got, planning again from there reaches the same aim."""
    ops = planned(wanted, there, prune=prune)
    for count in range(len(ops)):
        half = apply(ops[:count], there)
        reached = apply(planned(wanted, half, prune=prune), half)
        assert_is(reached, wanted, prune=prune)
        assert planned(wanted, reached, prune=prune) == ()


@UNTIMED
@given(desired_tasks, desired_tasks)
def test_from_one_state_to_another(before: DesiredTask, wanted: DesiredTask) -> None:
    """From any state that was wanted once the next one is reached, and the interface stays the same."""
    there = apply(planned(before, ObservedTask(), prune=True), ObservedTask())
    ops = planned(wanted, there, prune=True)
    assert not [op for op in ops if isinstance(op, CreateInterface | RemoveInterface)]
    assert_is(apply(ops, there), wanted, prune=True)


@UNTIMED
@given(desired_tasks, observed_tasks())
def test_without_prune_nothing_is_lost(wanted: DesiredTask, there: ObservedTask) -> None:
    """Without pruning no operation removes anything, and no peer is gone afterwards."""
    ops = planned(wanted, there, prune=False)
    assert not [op for op in ops if isinstance(op, RemovePeer | RemoveRoute | RemoveRules | RemoveInterface)]
    if there.interface is not None:
        reached = apply(ops, there).interface
        assert reached is not None
        assert there.interface.peers.keys() <= reached.peers.keys()


@UNTIMED
@given(desired_tasks)
def test_a_plan_without_prune_is_enough_for_a_new_task(wanted: DesiredTask) -> None:
    """Where nothing is there yet, pruning makes no difference."""
    new = ObservedTask()
    assert planned(wanted, new, prune=False) == planned(wanted, new, prune=True)


@UNTIMED
@given(desired_tasks, observed_tasks())
def test_traffic_follows_its_peer(wanted: DesiredTask, there: ObservedTask) -> None:
    """At no step is a wanted route added before the peer that its destination belongs to."""
    vips_or_peers = {r.destination: None for r in wanted.routes}
    owners = {network: key for key, spec in wanted.peers.items() for network in spec.allowed_ips}
    for op in (ops := planned(wanted, there, prune=True)):
        there = after(op, there)
        if isinstance(op, AddRoute) and op.route.destination in owners:
            assert there.interface is not None
            owner = owners[op.route.destination]
            assert op.route.destination in there.interface.peers[owner].allowed_ips
        if isinstance(op, SetRules):
            assert {r.destination for r in there.routes} >= vips_or_peers.keys()
    kinds = [type(op) for op in ops]
    if SetRules in kinds:
        at = kinds.index(SetRules)
        assert not {RemoveRoute, RemovePeer} & set(kinds[:at])
        assert not {AddPeer, UpdatePeer, AddRoute} & set(kinds[at:])


@UNTIMED
@given(desired_tasks, observed_tasks(), st.sets(st.sampled_from([*POOL, *VIPS])), st.booleans())
def test_a_route_waits_only_for_what_would_break(
    wanted: DesiredTask, there: ObservedTask, flows: set[IPv4Address], prune: bool
) -> None:
    """A route is put off exactly if connections run to a peer that never shook hands, or to a VIP; then all is reached.

    No route that is there is taken away for it.
    """

    def step(there: ObservedTask, flows: set[IPv4Address]) -> ObservedTask:
        held = undecided(wanted, there).held(flows).destinations
        ops = plan(wanted, there, new_key=PrivateKey(bytes(32)), node=NODE, now=NOW, prune=prune, held=held)
        return apply(ops, there)

    owners = {network: key for key, spec in wanted.peers.items() for network in spec.allowed_ips}
    peers = {} if there.interface is None else there.interface.peers
    shook = {key for key, peer in peers.items() if peer.last_handshake is not None}
    wanting = {r.destination for r in wanted.routes}
    before = {r.destination for r in there.routes}
    waiting = {n for n in wanting - before if n.network_address in flows and not (n in owners and owners[n] in shook)}
    reached = step(there, flows)
    assert {r.destination for r in reached.routes} & wanting == wanting - waiting

    assert reached.interface is not None
    assert step(reached, flows).routes == reached.routes
    shaken = {k: replace(p, last_handshake=NOW) for k, p in reached.interface.peers.items()}
    assert_is(step(with_peers(reached, shaken), flows - set(VIPS)), wanted, prune=prune)


@UNTIMED
@given(desired_tasks)
def test_an_allowed_ip_has_one_peer(wanted: DesiredTask) -> None:
    """No address belongs to two peers, none of them is our own, and each is routed from our own address."""
    allowed = [network for spec in wanted.peers.values() for network in spec.allowed_ips]
    assert len(allowed) == len(set(allowed))
    assert not {IPv4Network(a) for a in OWN.values()} & set(allowed)
    assert {r.destination for r in wanted.routes} >= set(allowed)
    assert len({r.destination for r in wanted.routes}) == len(wanted.routes)
    assert {r.source for r in wanted.routes} <= set(OWN.values())
    assert all(spec.allowed_ips for spec in wanted.peers.values())
    assert all(route.mtu == 0 or 576 <= route.mtu < wanted.mtu for route in wanted.routes)


@UNTIMED
@given(facts, policies, peer_records(), st.randoms())
def test_the_order_of_records_is_no_matter(
    task: TaskFacts, policy: PolicyRecord, records: dict[ServiceId, list[PeerRecord]], shuffle: object
) -> None:
    """The same records in another order, or those of services that are not linked, change nothing."""
    turned = {service: list(reversed(found)) for service, found in reversed(records.items())}
    linked = {service: found for service, found in records.items() if service in policy.linked_services}
    expected = desired_task(task, policy, records)
    assert desired_task(task, policy, turned) == expected
    assert desired_task(task, policy, linked) == expected


@UNTIMED
@given(observed_tasks())
def test_removal_leaves_nothing(there: ObservedTask) -> None:
    """Leaving the mesh takes everything away, from whatever state, and is then done."""
    left = apply(plan_removal(there), there)
    assert (left.interface, left.routes, left.rules) == (None, frozenset(), "")
    assert plan_removal(left) == ()


@UNTIMED
@given(desired_tasks, observed_tasks(), st.binary(min_size=32, max_size=32), st.booleans())
def test_no_operation_shows_the_key(wanted: DesiredTask, there: ObservedTask, raw: bytes, prune: bool) -> None:
    """No operation of any plan shows the new private key, in no form and by no way of printing."""
    secret = PrivateKey(b"\x5a" + raw[:30] + b"\xa5")
    ops = planned(wanted, there, prune=prune, key=secret)
    text = " ".join(f"{op} {op!r}" for op in (*ops, *plan_removal(there))) + repr(ops)
    value = secret.reveal()
    for form in (value.hex(), base64.b64encode(value).decode(), repr(value)[2:-1], str(list(value))):
        assert form not in text
    assert text.count("CreateInterface(") == 2 * sum(isinstance(op, CreateInterface) for op in ops)


# -- rules ------------------------------------------------------------------------------------------------------

addresses = st.integers(1, 6).map(lambda n: IPv4Address(f"10.1.0.{n}"))
backends = st.builds(
    Backends,
    st.integers(200, 203).map(lambda n: IPv4Address(f"10.1.0.{n}")),
    st.just(IPv4Address("10.1.0.2")),
    st.lists(addresses, max_size=3, unique=True).map(tuple),
)
# One range of each protocol: those that meet are joined.
some_ports = st.lists(
    st.builds(
        lambda protocol, first, more: PortRange(protocol=protocol, first=first, last=first + more),
        st.sampled_from(Protocol),
        st.integers(80, 82),
        st.integers(0, 1),
    ),
    max_size=2,
    unique_by=lambda ports: ports.protocol,
)
sources = st.builds(
    Source,
    st.just("name"),
    st.lists(addresses, min_size=1, max_size=3, unique=True).map(sorted).map(tuple),
    # The rules name TCP before UDP: the order of the two means nothing.
    st.none() | some_ports.map(lambda ports: tuple(sorted(ports, key=lambda p: p.protocol.value))),
)


def plainly(rules: RuleSet) -> RuleSet:
    """Without what says nothing: a VIP or a source for the second time, and an order that is none."""
    vips = {b.vip: b for b in reversed(rules.backends)}
    claimed: set[IPv4Address] = set()
    kept = [s for s in rules.sources if claimed.isdisjoint(s.addresses) and not claimed.update(s.addresses)]
    return replace(
        rules,
        backends=tuple(sorted(vips.values(), key=lambda b: (not b.addresses, b.vip))),
        sources=tuple(sorted(kept, key=lambda s: s.addresses)),
    )


rule_sets = st.builds(
    lambda interfaces, served, closed, found: plainly(
        RuleSet(
            True,
            tuple(interfaces),
            (*(b for b in served if b.addresses), *(b for b in closed if not b.addresses)),
            tuple(found),
        )
    ),
    st.lists(st.sampled_from(["eth0", "eth1", "eth2"]), max_size=2),
    st.lists(backends, max_size=2),
    st.lists(backends, max_size=2),
    st.lists(sources, max_size=2),
)


def meaning(rules: RuleSet) -> object:
    """What the rules say, however it is put: the rights of each source, the backends of each VIP, and the rest."""

    def ports(source: Source) -> frozenset[tuple[Protocol, int]] | None:
        """None: all of them."""
        if source.ports == ():
            return None
        return frozenset((p.protocol, n) for p in source.ports or () for n in range(p.first, p.last + 1))

    rights: dict[IPv4Address, list[frozenset[tuple[Protocol, int]] | None]] = {}
    for source in rules.sources:
        for address in source.addresses:
            rights.setdefault(address, []).append(ports(source))
    allowed = {
        a: None if None in sets else frozenset[object]().union(*filter(None, sets)) for a, sets in rights.items()
    }
    callers = {a for source in rules.sources if source.ports is not None for a in source.addresses}
    vips = {b.vip: b.addresses for b in rules.backends}
    return rules.enforce, rules.overlay_interfaces, vips, allowed, callers


@UNTIMED
@given(rule_sets, rule_sets)
def test_other_rules_have_another_digest(one: RuleSet, other: RuleSet) -> None:
    """Rules that say other things have other digests, and equal texts have equal ones."""
    assert meaning(one) == meaning(other) or render(one)[1] != render(other)[1]
    assert (render(one)[1] == render(other)[1]) is (render(one) == render(other))


@UNTIMED
@given(rule_sets)
def test_modes_have_another_digest(rules: RuleSet) -> None:
    """The same links in another mode are other rules."""
    assert render(replace(rules, enforce=False))[1] != render(rules)[1]


@UNTIMED
@given(rule_sets, st.data())
def test_a_small_change_changes_the_digest(rules: RuleSet, data: st.DataObject) -> None:
    """Leaving out a single part of the rules changes the digest, unless another part says the same."""
    part = data.draw(st.sampled_from(["overlay_interfaces", "backends", "sources"]))
    items = getattr(rules, part)
    if items:
        gone = data.draw(st.integers(0, len(items) - 1))
        fewer = replace(rules, **{part: items[:gone] + items[gone + 1 :]})
        assert meaning(fewer) == meaning(rules) or render(fewer)[1] != render(rules)[1]
