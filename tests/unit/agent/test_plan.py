"""From what is there to what should be: the exact operations, in order."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network

import pytest

from agent.desired import DesiredTask
from agent.observed import ObservedInterface, ObservedPeer, ObservedTask
from agent.ops import (
    AddPeer,
    AddRoute,
    CreateInterface,
    ForgetFlows,
    Op,
    PeerSpec,
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
from agent.plan import SESSION_S, plan, plan_quarantine, plan_removal
from agent.rules.closed import closed
from tests.unit.agent.values import OWN, endpoint, node, private_key, public_key, route, spec

NOW = 1_700_000_000.0
NEW_KEY = private_key(99)

ONE, TWO = sorted((spec(5), spec(6)), key=lambda s: s.public_key)
CLOSED = closed(["eth0"])
TO_ONE, TO_TWO = (Route(next(iter(s.allowed_ips)), IPv4Address(OWN)) for s in (ONE, TWO))


def addresses(*peers: PeerSpec) -> frozenset[IPv4Address]:
    return frozenset(network.network_address for peer in peers for network in peer.allowed_ips)


def desired(*peers: PeerSpec, routes: Iterable[Route] = (), mtu: int = 1440, digest: str = "new") -> DesiredTask:
    return DesiredTask(
        mtu=mtu,
        address=IPv4Address(OWN),
        peers={p.public_key: p for p in peers},
        routes=frozenset(routes),
        rules=f"text of {digest}",
        rules_digest=digest,
    )


def seen(wanted: PeerSpec, *, last_handshake: float | None = None) -> ObservedPeer:
    return ObservedPeer(
        wanted.public_key, wanted.endpoint, wanted.allowed_ips, wanted.keepalive_s, last_handshake=last_handshake
    )


def observed(
    *peers: ObservedPeer,
    routes: Iterable[Route] = (),
    mtu: int = 1440,
    is_up: bool = True,
    rules: str = "new",
    addresses: Mapping[IPv4Address, str] | None = None,
) -> ObservedTask:
    interface = ObservedInterface("wg0", public_key(2), 51820, mtu, is_up, {p.public_key: p for p in peers})
    return ObservedTask(addresses or {}, interface, frozenset(routes), rules)


def planned(wanted: DesiredTask, there: ObservedTask, *, prune: bool = True, now: float = NOW) -> tuple[Op, ...]:
    return plan(wanted, there, new_key=NEW_KEY, node=node(), now=now, prune=prune)


def test_from_nothing() -> None:
    """Interface, up, peers, routes, rules: peers can receive before anything leads to them."""
    assert planned(desired(ONE, TWO, routes=(TO_ONE, TO_TWO)), ObservedTask()) == (
        CreateInterface(NEW_KEY, 1440, 51820, 51829, IPv4Address(OWN)),
        SetUp(),
        AddPeer(ONE),
        AddPeer(TWO),
        *(AddRoute(r) for r in sorted((TO_ONE, TO_TWO), key=str)),
        SetRules("text of new", "new"),
    )


def test_nothing_to_do() -> None:
    """Where all is as wanted there is no operation, whether or not the store is complete."""
    wanted, there = desired(ONE, routes=(TO_ONE,)), observed(seen(ONE), routes=(TO_ONE,))
    assert planned(wanted, there) == planned(wanted, there, prune=False) == ()


def test_what_goes_away() -> None:
    """Rules, then routes, then peers: nothing leads to a peer any more when it goes."""
    there = observed(seen(ONE), seen(TWO), routes=(TO_ONE, TO_TWO), rules="old")
    assert planned(desired(ONE, routes=(TO_ONE,)), there) == (
        SetRules("text of new", "new"),
        RemoveRoute(TO_TWO),
        ForgetFlows(addresses(TWO)),
        RemovePeer(TWO.public_key),
    )


def test_a_change_adds_before_it_removes() -> None:
    """The new peer and route stand before the rules change, and the old ones go after that."""
    there = observed(seen(ONE), routes=(TO_ONE,), rules="old")
    assert planned(desired(TWO, routes=(TO_TWO,)), there) == (
        AddPeer(TWO),
        AddRoute(TO_TWO),
        SetRules("text of new", "new"),
        RemoveRoute(TO_ONE),
        ForgetFlows(addresses(ONE)),
        RemovePeer(ONE.public_key),
    )


def test_without_prune_nothing_is_removed() -> None:
    """While the store may be incomplete, peers and routes that it does not name stay, and so do the rules for them."""
    there = observed(seen(ONE), routes=(TO_ONE,), rules="old")
    assert planned(desired(TWO, routes=(TO_TWO,)), there, prune=False) == (AddPeer(TWO), AddRoute(TO_TWO))


def test_without_prune_a_vip_stays() -> None:
    """A VIP whose backends are not known again yet keeps its route and its rules."""
    vip = route("10.1.0.200")
    assert planned(desired(ONE, routes=(TO_ONE,)), observed(seen(ONE), routes=(TO_ONE, vip)), prune=False) == ()


@pytest.mark.parametrize(
    "there",
    [
        pytest.param(observed(seen(ONE), seen(TWO), routes=(TO_ONE,), rules="old"), id="peer"),
        pytest.param(observed(seen(ONE), routes=(TO_ONE, TO_TWO), rules="old"), id="route"),
    ],
)
def test_without_prune_rules_that_do_not_know_all_wait(there: ObservedTask) -> None:
    """One peer or one route alone that the store does not name keeps the rules that were made for it."""
    assert planned(desired(ONE, routes=(TO_ONE,)), there, prune=False) == ()


def test_new_peers_come_in_the_order_of_their_keys() -> None:
    """However the records came: the same work is the same messages."""
    assert planned(desired(TWO, ONE), observed()) == (AddPeer(ONE), AddPeer(TWO))


@pytest.mark.parametrize(
    ("there", "rest"),
    [
        pytest.param(observed(seen(ONE), routes=(TO_ONE,), rules="old"), (AddPeer(TWO), AddRoute(TO_TWO)), id="known"),
        pytest.param(observed(seen(ONE), seen(TWO), routes=(TO_ONE, TO_TWO), rules=""), (), id="no rules at all"),
    ],
)
def test_without_prune_rules_that_know_all_are_set(there: ObservedTask, rest: tuple[Op, ...]) -> None:
    """While the store may be incomplete, rules are set that know all that is in place, or where there are none."""
    wanted = desired(ONE, TWO, routes=(TO_ONE, TO_TWO))
    assert planned(wanted, there, prune=False) == (*rest, SetRules("text of new", "new"))


def test_no_rules_at_all_are_worse_than_few() -> None:
    """Where the table is gone it is set again, even by records that do not name every peer there."""
    there = observed(seen(ONE), seen(TWO), routes=(TO_ONE, TO_TWO), rules="")
    assert planned(desired(ONE, routes=(TO_ONE,)), there, prune=False) == (SetRules("text of new", "new"),)


def test_mtu() -> None:
    """A changed MTU is set on the interface that is there."""
    assert planned(desired(mtu=1380), observed(mtu=1440)) == (SetMtu(1380),)


def test_interface_that_is_down() -> None:
    """A link that went down lost its routes: it comes up and gets them again, whatever was seen of them."""
    there = observed(seen(ONE), routes=(TO_ONE,), is_up=False)
    assert planned(desired(ONE, routes=(TO_ONE,)), there) == (SetUp(), AddRoute(TO_ONE))


def test_route_from_another_source() -> None:
    """A route to the same destination is replaced by the new one, which must not be removed after that."""
    old, new = route("10.1.0.5", "10.1.0.3"), route("10.1.0.5")
    assert planned(desired(routes=(new,)), observed(routes=(old,))) == (AddRoute(new),)


@pytest.mark.parametrize(
    ("last_handshake", "ops"),
    [
        pytest.param(None, (UpdatePeer(ONE.public_key, endpoint=ONE.endpoint),), id="never"),
        pytest.param(NOW - SESSION_S, (UpdatePeer(ONE.public_key, endpoint=ONE.endpoint),), id="session over"),
        pytest.param(NOW - SESSION_S + 1, (), id="in session"),
        pytest.param(NOW + 5, (), id="the clock was set back"),
    ],
)
def test_endpoint(last_handshake: float | None, ops: tuple[Op, ...]) -> None:
    """Another endpoint than the record's is left alone while handshakes succeed, and corrected when they do not."""
    roamed = replace(seen(ONE, last_handshake=last_handshake), endpoint=endpoint(77))
    assert planned(desired(ONE), observed(roamed)) == ops


def test_peer_without_an_endpoint() -> None:
    """A peer that has none gets the record's endpoint."""
    there = observed(replace(seen(ONE), endpoint=None))
    assert planned(desired(ONE), there) == (UpdatePeer(ONE.public_key, endpoint=ONE.endpoint),)


def test_update_names_only_what_differs() -> None:
    """Allowed IPs and keepalive change without touching the session, each only where it differs."""
    wider = replace(ONE, allowed_ips=ONE.allowed_ips | {IPv4Network("10.2.0.5")})
    assert planned(desired(wider), observed(seen(ONE))) == (UpdatePeer(ONE.public_key, allowed_ips=wider.allowed_ips),)
    kept = replace(ONE, keepalive_s=25)
    assert planned(desired(kept), observed(seen(ONE))) == (UpdatePeer(ONE.public_key, keepalive_s=25),)
    assert planned(desired(ONE), observed(seen(kept))) == (UpdatePeer(ONE.public_key, keepalive_s=0),)


def test_address_that_a_peer_loses() -> None:
    """Connections of an address that its peer has no more are forgotten, though the peer stays."""
    wider = replace(ONE, allowed_ips=ONE.allowed_ips | {IPv4Network("10.2.0.5")})
    assert planned(desired(ONE), observed(seen(wider))) == (
        UpdatePeer(ONE.public_key, allowed_ips=ONE.allowed_ips),
        ForgetFlows(frozenset({IPv4Address("10.2.0.5")})),
    )


@pytest.mark.parametrize(
    ("there", "ops"),
    [
        pytest.param(
            observed(seen(ONE), seen(TWO), routes=(TO_ONE,), rules="old"),
            (
                SetRules(CLOSED.text, CLOSED.digest),
                ForgetFlows(addresses(ONE, TWO)),
                RemovePeer(ONE.public_key),
                RemovePeer(TWO.public_key),
            ),
            id="at first",
        ),
        pytest.param(observed(routes=(TO_ONE,), rules=CLOSED.digest), (), id="closed"),
        pytest.param(
            observed(seen(ONE), rules=CLOSED.digest),
            (ForgetFlows(addresses(ONE)), RemovePeer(ONE.public_key)),
            id="a peer came back",
        ),
        pytest.param(ObservedTask(), (SetRules(CLOSED.text, CLOSED.digest),), id="no interface"),
    ],
)
def test_quarantine(there: ObservedTask, ops: tuple[Op, ...]) -> None:
    """A task in quarantine is closed before anything else; it loses its peers, and keeps interface and routes."""
    assert plan_quarantine(CLOSED, there) == ops


def test_release() -> None:
    """After a quarantine peers and rules come back; interface, key and routes are still there."""
    there = observed(routes=(TO_ONE,), rules=CLOSED.digest)
    assert planned(desired(ONE, routes=(TO_ONE,)), there) == (AddPeer(ONE), SetRules("text of new", "new"))


def test_key_change() -> None:
    """A task's new key is a new peer, which takes the address over before the old key goes; connections go on."""
    renewed = replace(spec(7), allowed_ips=ONE.allowed_ips)
    there = observed(seen(ONE), routes=(TO_ONE,))
    assert planned(desired(renewed, routes=(TO_ONE,)), there) == (AddPeer(renewed), RemovePeer(ONE.public_key))


@pytest.mark.parametrize(
    ("there", "ops"),
    [
        (observed(seen(ONE), routes=(TO_ONE,)), (RemoveRules(), RemoveInterface())),
        (observed(rules=""), (RemoveInterface(),)),
        (ObservedTask(rules="old"), (RemoveRules(),)),
        (ObservedTask(), ()),
    ],
)
def test_removal(there: ObservedTask, ops: tuple[Op, ...]) -> None:
    """Leaving takes away what is there and nothing else; the interface takes peers and routes with it."""
    assert plan_removal(there) == ops


@pytest.mark.parametrize(
    ("op", "text"),
    [
        (CreateInterface(NEW_KEY, 1440, 51820, 51829), "create interface mtu 1440"),
        (SetMtu(1380), "set mtu 1380"),
        (SetUp(), "set up"),
        (AddPeer(spec(5)), f"add peer {public_key(5).short} 192.0.2.5:51825 10.1.0.5/32"),
        (
            UpdatePeer(public_key(5), endpoint(6), frozenset({IPv4Network("10.1.0.5")}), 25),
            f"update peer {public_key(5).short} endpoint 192.0.2.6:51826 allowed ips 10.1.0.5/32 keepalive 25s",
        ),
        (UpdatePeer(public_key(5), allowed_ips=frozenset()), f"update peer {public_key(5).short} allowed ips "),
        (RemovePeer(public_key(5)), f"remove peer {public_key(5).short}"),
        (
            ForgetFlows(frozenset({IPv4Address("10.1.0.10"), IPv4Address("10.1.0.9")})),
            "forget flows of 10.1.0.9,10.1.0.10",
        ),
        (AddRoute(route("10.1.0.5")), "add route 10.1.0.5/32 src 10.1.0.2"),
        (RemoveRoute(route("10.1.0.5")), "remove route 10.1.0.5/32 src 10.1.0.2"),
        (SetRules("table", "0123"), "set rules 0123"),
        (RemoveRules(), "remove rules"),
        (RemoveInterface(), "remove interface"),
    ],
)
def test_operations_print_themselves(op: Op, text: str) -> None:
    """An operation prints as the log shows it."""
    assert str(op) == text
