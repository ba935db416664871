"""What a task should hold, for tables of policies and peers."""

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address

import msgspec
import pytest

from agent.desired import DesiredTask, desired_task
from agent.rules.render import Backends, RuleSet, Source, render
from hivewire.records import Mode, PeerRecord, PolicyRecord
from tests.unit.agent.values import OWN, by_service, facts, link, peer, policy, ports, public_key, route, spec

VIP = "10.1.0.200"


def desired(record: PolicyRecord, *peers: PeerRecord) -> DesiredTask:
    return desired_task(facts(), record, by_service(*peers))


def backends(*addresses: str, vip: str = VIP, source: str = OWN) -> Backends:
    return Backends(IPv4Address(vip), IPv4Address(source), tuple(map(IPv4Address, addresses)))


def source(name: str, *addresses: str, to: tuple[str, ...] | None, answers: tuple[str, ...] = ("5432",)) -> Source:
    """``answers`` only where we link to it, and it does not link to us."""
    where = tuple(map(IPv4Address, addresses))
    if to is None:
        return Source(name, where, None, tuple(map(ports, answers)))
    return Source(name, where, tuple(map(ports, to)))


def rules(
    *, enforce: bool = True, interfaces: tuple[str, ...] = ("eth0",), vips: tuple[Backends, ...] = (), **of: Source
) -> str:
    return render(RuleSet(enforce, interfaces, vips, tuple(of.values())))[0]


def rotations(*addresses: str) -> list[tuple[IPv4Address, ...]]:
    parsed = tuple(map(IPv4Address, addresses))
    return [parsed[n:] + parsed[:n] for n in range(len(parsed))]


def test_link_out() -> None:
    """A link out gives peers, routes to them and to the VIP, and balances the VIP; its tasks may only ping back."""
    found = desired(policy(out=[link("db", "5432", vip=VIP)]), peer(5))
    assert found.peers == {public_key(5): spec(5)}
    assert found.routes == {route("10.1.0.5"), route(VIP)}
    assert found.rules == rules(vips=(backends("10.1.0.5"),), db=source("db", "10.1.0.5", to=None))


def test_link_in() -> None:
    """A link in gives peers and routes back to them, lets them open the link's ports, and has no VIP."""
    found = desired(policy(into=[link("lb", "80", "53/udp")]), peer(6, "lb"))
    assert found.peers == {public_key(6): spec(6)}
    assert found.routes == {route("10.1.0.6")}
    assert found.rules == rules(lb=source("lb", "10.1.0.6", to=("80", "53/udp")))


def test_links_both_ways() -> None:
    """Two services that link each other are one peer per task, with the ports of the link in and the VIP of the out."""
    found = desired(policy(out=[link("db", "5432", vip=VIP)], into=[link("db", "80")]), peer(5))
    assert found.peers == {public_key(5): spec(5)}
    assert found.rules == rules(
        vips=(backends("10.1.0.5"),),
        into=source("db", "10.1.0.5", to=("80",)),
        out=source("db", "10.1.0.5", to=None),
    )


def test_peers_of_other_services_are_left_out() -> None:
    """Records of services that no link names change nothing."""
    record = policy(out=[link("db", "5432", vip=VIP)])
    assert desired(record, peer(5), peer(9, "other")) == desired(record, peer(5))


def test_self_link() -> None:
    """Tasks of one service are peers of each other, never of themselves, yet each serves its own VIP as well."""
    me = peer(2, "web", OWN, task="web.1")
    found = desired(policy(own=[link("web", vip=VIP)]), me, peer(3, "web"))
    assert found.peers == {public_key(3): spec(3)}
    assert found.routes == {route("10.1.0.3"), route(VIP)}
    either = [
        rules(vips=(backends(*map(str, turn)),), web=source("web", OWN, "10.1.0.3", to=()))
        for turn in rotations(OWN, "10.1.0.3")
    ]
    assert found.rules in either


def test_two_networks() -> None:
    """On each network the source is the task's own address there, and both interfaces are closed."""
    record = policy(
        networks=("app", "data"),
        out=[link("db", "5432", vip=VIP), link("db", "5432", network="data", vip="10.2.0.200")],
    )
    both = peer(5, addresses={"app": "10.1.0.5", "data": "10.2.0.5"})
    found = desired_task(facts(addresses={"app": OWN, "data": "10.2.0.2"}), record, by_service(both))
    assert found.peers == {public_key(5): spec(5, "10.1.0.5", "10.2.0.5")}
    assert found.routes == {
        route("10.1.0.5"),
        route(VIP),
        route("10.2.0.5", "10.2.0.2"),
        route("10.2.0.200", "10.2.0.2"),
    }
    assert found.rules == rules(
        interfaces=("eth0", "eth1"),
        vips=(backends("10.1.0.5"), backends("10.2.0.5", vip="10.2.0.200", source="10.2.0.2")),
        app=source("db", "10.1.0.5", to=None),
        data=source("db", "10.2.0.5", to=None),
    )


def test_only_the_link_s_network() -> None:
    """A peer's address on a network that no link uses is neither allowed nor routed."""
    record = policy(networks=("app", "data"), out=[link("db", "5432")])
    both = peer(5, addresses={"app": "10.1.0.5", "data": "10.2.0.5"})
    found = desired_task(facts(addresses={"app": OWN, "data": "10.2.0.2"}), record, by_service(both))
    assert found.peers == {public_key(5): spec(5, "10.1.0.5")}
    assert found.routes == {route("10.1.0.5")}


def test_network_that_the_task_has_not() -> None:
    """A link over a network where the task has no address gives nothing, VIP included."""
    record = policy(networks=("app", "data"), out=[link("db", "5432", network="data", vip="10.2.0.200")])
    found = desired(record, peer(5, addresses={"data": "10.2.0.5"}))
    assert (found.peers, found.routes, found.rules) == ({}, frozenset(), rules())


def test_one_address_under_two_networks() -> None:
    """A record that names a linked address under a network that the task has not is taken for the linked one only."""
    found = desired(policy(out=[link("db")]), peer(5, addresses={"app": "10.1.0.5", "else": "10.1.0.5"}))
    assert found.routes == {route("10.1.0.5")}


@pytest.mark.parametrize(
    ("mode", "routes", "vips"),
    [
        pytest.param(Mode.ENFORCE, {route("10.1.0.5"), route(VIP)}, (backends(),), id="enforce closes the VIP"),
        pytest.param(Mode.OBSERVE, {route("10.1.0.5")}, (backends(),), id="observe leaves the VIP to Swarm"),
    ],
)
def test_vip_that_nobody_serves(mode: Mode, routes: set[object], vips: tuple[Backends, ...]) -> None:
    """A peer that does not serve stays a peer, and its VIP is closed in enforce and Swarm's in observe."""
    found = desired(policy(mode=mode, out=[link("db", "5432", vip=VIP)]), peer(5, serving=False))
    assert found.peers == {public_key(5): spec(5)}
    assert found.routes == routes
    assert found.rules == rules(enforce=mode is Mode.ENFORCE, vips=vips, db=source("db", "10.1.0.5", to=None))


@pytest.mark.parametrize("mode", [Mode.ENFORCE, Mode.OBSERVE])
def test_vip_with_one_serving_task(mode: Mode) -> None:
    """Only tasks that serve stand behind the VIP."""
    found = desired(policy(mode=mode, out=[link("db", "5432", vip=VIP)]), peer(5), peer(6, serving=False))
    assert route(VIP) in found.routes
    assert f"ip daddr vmap {{ {VIP} : goto vip_1 }}\n\t}}\n\tchain vip_1 {{\n\t\tdnat ip to 10.1.0.5\n" in found.rules


def test_vip_before_any_claim() -> None:
    """A linked service without a single peer is closed in enforce, before anyone serves it."""
    found = desired(policy(out=[link("db", "5432", vip=VIP)]))
    assert found.routes == {route(VIP)}
    assert found.rules == rules(vips=(backends(),))


@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 1)])
def test_address_claimed_twice(old: int, new: int) -> None:
    """Of two records with the same address the newer key has it, whichever comes first; the other is no peer."""
    first = peer(5, addresses="10.1.0.5", task="db.old", epoch=old)
    second = peer(6, addresses="10.1.0.5", task="db.new", epoch=new)
    winner = 5 if old > new else 6
    for records in ((first, second), (second, first)):
        found = desired(policy(out=[link("db", "5432", vip=VIP)]), *records)
        assert found.peers == {public_key(winner): spec(winner, "10.1.0.5")}
        assert "dnat ip to 10.1.0.5\n" in found.rules


def test_loser_of_an_address_keeps_the_others() -> None:
    """A task that lost one address to a newer one stays a peer with what is left to it."""
    record = policy(networks=("app", "data"), out=[link("db"), link("db", network="data")])
    old = peer(5, addresses={"app": "10.1.0.5", "data": "10.2.0.5"}, epoch=1)
    new = peer(6, addresses={"app": "10.1.0.5"}, epoch=2)
    found = desired_task(facts(addresses={"app": OWN, "data": "10.2.0.2"}), record, by_service(old, new))
    assert found.peers == {public_key(5): spec(5, "10.2.0.5"), public_key(6): spec(6, "10.1.0.5")}


def test_own_address_is_never_given_away() -> None:
    """A record that claims the task's own address, however new, gets no peer, no route and no way in."""
    found = desired(policy(out=[link("db", "5432", vip=VIP)], into=[link("db")]), peer(5, addresses=OWN, epoch=10**15))
    assert found.peers == {}
    assert found.routes == {route(VIP)}
    assert found.rules == rules(vips=(backends(),))


def test_own_record_owns_nothing() -> None:
    """An address that only an outdated record of the task itself claims belongs to the peer that has it now."""
    outdated = peer(2, "web", "10.1.0.5", task="web.1", epoch=10**15)
    found = desired(policy(out=[link("db")], own=[link("web")]), outdated, peer(5))
    assert found.peers == {public_key(5): spec(5)}
    assert found.routes == {route("10.1.0.5")}


def test_rotation_of_backends() -> None:
    """Tasks begin at different places of the same circle, and every place is somebody's first."""
    record, peers = policy(out=[link("db", vip=VIP)]), by_service(peer(5), peer(6), peer(7))
    circle = [
        rules(
            vips=(backends(*map(str, turn)),), db=source("db", "10.1.0.5", "10.1.0.6", "10.1.0.7", to=None, answers=())
        )
        for turn in rotations("10.1.0.5", "10.1.0.6", "10.1.0.7")
    ]
    texts = [desired_task(facts(f"web.{n}"), record, peers).rules for n in range(1, 4)]
    assert sorted(texts) == sorted(circle)


def test_order_of_records_is_no_matter() -> None:
    """The same records in another order give the same state, rules included."""
    record = policy(out=[link("db", vip=VIP), link("cache")], into=[link("lb", "80")], own=[link("web")])
    peers = [peer(5), peer(6), peer(7, "cache"), peer(8, "lb"), peer(9, "web"), peer(3, "lb")]
    assert desired(record, *peers) == desired(record, *reversed(peers))


@pytest.mark.parametrize(
    ("policy_mtu", "underlay_mtu", "mtu"),
    [(0, 1500, 1440), (0, 9000, 8940), (1300, 1500, 1300), (0, 600, 576)],
)
def test_mtu(policy_mtu: int, underlay_mtu: int, mtu: int) -> None:
    """The MTU is the label's, else the underlay's minus what WireGuard adds, and never below IPv4's least."""
    assert desired_task(facts(underlay_mtu=underlay_mtu), policy(mtu=policy_mtu), {}).mtu == mtu


@pytest.mark.parametrize(
    ("ours", "theirs", "path", "mtu"),
    [
        (1500, 1500, 0, 0),
        (1500, 0, 0, 0),  # an older agent does not say
        (1500, 9000, 0, 0),
        (9000, 1500, 0, 1440),
        (9000, 9000, 1500, 1440),
        (1500, 1450, 1400, 1328),
        (1500, 1500, 65536, 0),  # over loopback, to the node itself
        (1500, 20, 0, 576),  # nobody can make us useless
    ],
)
def test_mtu_of_a_pair(ours: int, theirs: int, path: int, mtu: int) -> None:
    """A route has an MTU of its own where the pair carries less than the interface, a multiple of the padding."""
    there = msgspec.structs.replace(peer(5), underlay_mtu=theirs)
    known = replace(facts(underlay_mtu=ours), paths={there.endpoint.address: path} if path else {})
    found = desired_task(known, policy(out=[link("db", vip=VIP)]), by_service(there))
    assert found.mtu == ours - 60
    assert {(r.destination, r.mtu) for r in found.routes} == {
        (IPv4Network("10.1.0.5"), mtu),
        (IPv4Network(VIP), mtu),  # the connection's size is that of the VIP's route
    }


def test_the_vip_has_the_mtu_of_its_smallest_backend() -> None:
    """A connection to the VIP may go to any of them."""
    peers = [msgspec.structs.replace(peer(n), underlay_mtu=mtu) for n, mtu in ((5, 1500), (6, 1450), (7, 1400))]
    found = desired_task(facts(), policy(out=[link("db", vip=VIP)]), by_service(*peers))
    assert {str(r.destination.network_address): r.mtu for r in found.routes} == {
        "10.1.0.5": 0, "10.1.0.6": 1376, "10.1.0.7": 1328, VIP: 1328,
    }  # fmt: skip


def test_a_labels_mtu_is_the_last_word() -> None:
    """Where a person set it, nothing measured counts."""
    there = msgspec.structs.replace(peer(5), underlay_mtu=1300)
    found = desired_task(facts(), policy(out=[link("db")], mtu=1400), by_service(there))
    assert (found.mtu, {r.mtu for r in found.routes}) == (1400, {0})


def test_mtu_over_ipv6() -> None:
    """IPv6 takes 20 bytes more."""
    assert desired_task(replace(facts(), underlay=IPv6Address("2001:db8::1")), policy(), {}).mtu == 1420


def test_keepalive() -> None:
    """The policy's keepalive goes to every peer."""
    found = desired(policy(out=[link("db")], keepalive_s=25), peer(5), peer(6))
    assert [p.keepalive_s for p in found.peers.values()] == [25, 25]


def test_observe_closes_nothing() -> None:
    """In observe no rule ends a packet's way, and what comes in is only noted."""
    found = desired(
        policy(mode=Mode.OBSERVE, out=[link("db", vip=VIP)], into=[link("lb", "80")]), peer(5), peer(6, "lb")
    )
    assert "drop" not in found.rules
    assert "reject" not in found.rules
    assert "hook forward" not in found.rules
    assert found.peers.keys() == {public_key(5), public_key(6)}


def test_every_route_leads_to_a_peer_or_a_vip() -> None:
    """What is routed to the interface without being a VIP is an allowed IP of some peer."""
    found = desired(policy(out=[link("db", vip=VIP)], into=[link("lb")]), peer(5), peer(6, "lb"))
    allowed = {network for p in found.peers.values() for network in p.allowed_ips}
    assert {r.destination for r in found.routes} - {IPv4Network(VIP)} == allowed
