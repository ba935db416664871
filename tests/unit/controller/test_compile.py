"""From snapshots to policies: each rule of the compiler on literal input."""

from collections.abc import Mapping

import msgspec
import pytest

from controller.policy.compile import Compiled, MeshDefaults, PendingLink, compile_mesh
from controller.swarm.snapshot import SwarmSnapshot
from hivewire.ids import ServiceId
from hivewire.records import Mode, Network, PolicyRecord
from tests.builders import link, network, network_id, node, node_id, ports, service, service_id, snapshot

MESH = MeshDefaults(Mode.ENFORCE)
NOTHING: Mapping[ServiceId, PolicyRecord] = {}


def compiled(*services: object, previous: Mapping[ServiceId, PolicyRecord] = NOTHING, **options: object) -> Compiled:
    """Compile a snapshot of these services."""
    return compile_mesh(snapshot(*services, **options), previous, MESH)  # type: ignore[arg-type]


def names(result: Compiled) -> list[str]:
    """Who is in the mesh."""
    return sorted(p.name for p in result.policies.values())


def texts(result: Compiled, *codes: str) -> list[str]:
    """Findings as ``code subject: message | remedy``, of these codes or all."""
    found = [f for f in result.findings if not codes or f.code in codes]
    return [f"{f.code} {f.subject}: {f.message} | {f.remedy}" for f in found]


def out_links(result: Compiled, name: str) -> list[str]:
    policy = result.policies[service_id(name)]
    return [f"{x.name} {x.network} {','.join(map(str, x.ports))}" for x in policy.out_links]


def test_the_complete_policies_of_a_small_shop() -> None:
    """A link gives each end its half, with VIPs, subnets and the same ports; replicas may talk among themselves."""
    result = compiled(
        service("shop_web", {"hivewire.links": "api:8080"}, vips={"shop_app": "10.1.0.10"}),
        service(
            "shop_api",
            {"hivewire.mode": "observe", "hivewire.keepalive": "25s", "hivewire.mtu": "1400", "hivewire.rotate": "1h"},
            vips={"shop_app": "10.1.0.20"},
        ),
        service("shop_cron"),
    )
    networks = (Network(id=network_id("shop_app"), name="shop_app", subnets=("10.1.0.0/24",)),)
    assert result == Compiled(
        policies={
            service_id("shop_api"): PolicyRecord(
                service=service_id("shop_api"),
                name="shop_api",
                stack="shop",
                mode=Mode.OBSERVE,
                networks=networks,
                in_links=(link("shop_web", "8080"),),
                self_links=(link("shop_api", vip="10.1.0.20"),),
                keepalive_s=25,
                mtu=1400,
                rotate_s=3600,
                labels={
                    "hivewire.keepalive": "25s",
                    "hivewire.mode": "observe",
                    "hivewire.mtu": "1400",
                    "hivewire.rotate": "1h",
                },
            ),
            service_id("shop_web"): PolicyRecord(
                service=service_id("shop_web"),
                name="shop_web",
                stack="shop",
                mode=Mode.ENFORCE,
                networks=networks,
                out_links=(link("shop_api", "8080", vip="10.1.0.20"),),
                self_links=(link("shop_web", vip="10.1.0.10"),),
                labels={"hivewire.links": "api:8080"},
            ),
        }
    )


def test_an_empty_cluster_compiles_to_nothing() -> None:
    """No service, no policy, no finding."""
    assert compile_mesh(SwarmSnapshot(cluster="c"), {}, MESH) == Compiled()


def test_a_service_without_labels_stays_out() -> None:
    """A cluster in which nobody says anything of Hivewire has no mesh."""
    assert compiled(service("shop_web"), service("db")) == Compiled()


# Names.


def test_names_are_looked_up_in_the_own_stack_first() -> None:
    """A short name is the own stack's service, and a finding says that another one has it too."""
    result = compiled(
        service("shop_web", {"hivewire.links": "db:1"}), service("shop_db"), service("db", {"hivewire.enable": ""})
    )
    assert out_links(result, "shop_web") == ["shop_db net-shop_app 1/tcp"]
    assert texts(result, "HW205") == [
        'HW205 shop_web: hivewire.links: "db" is shop_db, but a service "db" exists too'
        " | rename one of them if the other one is meant"
    ]


@pytest.mark.parametrize("written", ["billing_ledger:7", "billing/ledger:7"])
def test_other_stacks_are_reached_by_stack_or_full_name(written: str) -> None:
    """Both ways to name a service of another stack lead to it."""
    result = compiled(
        service("shop_web", {"hivewire.links": written}), service("billing_ledger", {"hivewire.allow": "shop/web"})
    )
    assert out_links(result, "shop_web") == ["billing_ledger net-shop_app 7/tcp"]


UNKNOWN = [
    ("shop_web", "dbb:1", 'no service "dbb" in stack "shop" and none named "dbb"', 'did you mean "db"? '),
    ("shop_web", "shop/dbb:1", 'no service "dbb" in stack "shop"', 'did you mean "shop/db"? '),
    ("shop_web", "nowhere/x:1", 'no service "x" in stack "nowhere"', ""),
    ("shop_web", "db/tpc", 'no service "tpc" in stack "db"', 'did you mean "db/tcp"? '),
    ("web", "dbb:1", 'no service named "dbb"', ""),
]


@pytest.mark.parametrize(("source", "written", "message", "hint"), UNKNOWN)
def test_an_unknown_target_waits(source: str, written: str, message: str, hint: str) -> None:
    """A link to what does not exist is pending, since stacks are deployed in any order; a close name is offered."""
    result = compiled(service(source, {"hivewire.links": written}), service("shop_db"))
    assert texts(result) == [
        f"HW201 {source}: hivewire.links: {message} | {hint}the link stays pending until it is deployed"
    ]
    assert [(p.source_name, p.target, p.code) for p in result.pending] == [(source, None, "HW201")]


def test_a_waiting_link_is_made_when_its_target_comes() -> None:
    """Once the target is there, the link is too, and nothing is pending."""
    web = service("shop_web", {"hivewire.links": "db:1"})
    before = compiled(web)
    after = compiled(web, service("shop_db"), previous=before.policies)
    assert before.pending == (PendingLink(web.id, "shop_web", "db", None, (ports("1"),), "HW201"),)
    assert out_links(after, "shop_web") == ["shop_db net-shop_app 1/tcp"]
    assert after.pending == ()


# Enrolment and modes.


def test_a_link_enrols_its_target_to_observe() -> None:
    """Nobody is cut by somebody else's label: a target without labels observes, and is told how to enforce."""
    result = compiled(
        service("shop_web", {"hivewire.links": "db:1"}),
        service("shop_api", {"hivewire.links": "db:2"}),
        service("shop_db"),
    )
    assert result.policies[service_id("shop_db")].mode is Mode.OBSERVE
    assert texts(result) == [
        "HW303 shop_db: is in the mesh by links from shop_api, shop_web; it runs in observe"
        ' | to enforce it, add hivewire.mode: "enforce" to it'
    ]
    assert [x.name for x in result.policies[service_id("shop_db")].in_links] == ["shop_api", "shop_web"]


def test_one_label_of_its_own_makes_a_service_follow_the_mesh() -> None:
    """Any label is enough to take part, in the mode of the mesh."""
    result = compiled(service("shop_web", {"hivewire.links": "db:1"}), service("shop_db", {"hivewire.ports": "1"}))
    assert result.policies[service_id("shop_db")].mode is Mode.ENFORCE
    assert result.findings == ()


SWITCHED_OFF = [
    ({"hivewire.enable": "false"}, 'hivewire.enable: "false" from shop_db'),
    ({"hivewire.mode": "off"}, 'set hivewire.mode: "observe" or "enforce" on shop_db'),
]


@pytest.mark.parametrize(("label", "remedy"), SWITCHED_OFF)
def test_a_service_that_is_switched_off_is_out(label: dict[str, str], remedy: str) -> None:
    """It has no policy, links to it are pending with a warning, and its own links do nothing."""
    result = compiled(
        service("shop_web", {"hivewire.links": "db:1"}), service("shop_db", label | {"hivewire.links": "web:2"})
    )
    assert names(result) == ["shop_web"]
    assert result.policies[service_id("shop_web")].out_links == ()
    assert texts(result) == [
        "HW305 shop_db: is switched off, so hivewire.links has no effect | ",
        f"HW302 shop_web: link shop_web -> shop_db: shop_db is switched off | remove the link, or {remedy}",
    ]
    assert [p.code for p in result.pending] == ["HW302"]


def test_a_mesh_that_is_off_takes_only_those_who_ask() -> None:
    """With the default mode off, a service takes part by naming a mode."""
    shop = snapshot(service("shop_web", {"hivewire.links": "db:1"}), service("shop_api", {"hivewire.mode": "observe"}))
    assert names(compile_mesh(shop, {}, MeshDefaults(Mode.OFF))) == ["shop_api"]


# Consent.


def test_another_stack_must_consent() -> None:
    """Without a word of the target the link is pending, and the finding says which word."""
    web = service("shop_web", {"hivewire.links": "billing/ledger:7"})
    result = compiled(web, service("billing_ledger", {"hivewire.ports": "7"}))
    assert texts(result) == [
        "HW301 shop_web: link shop_web -> billing_ledger is waiting for consent"
        ' | add  hivewire.allow: "shop_web"  to billing_ledger'
    ]
    assert result.pending == (
        PendingLink(web.id, "shop_web", "billing_ledger", service_id("billing_ledger"), (ports("7"),), "HW301"),
    )
    assert result.policies[service_id("billing_ledger")].in_links == ()


def test_a_foreign_link_does_not_enrol() -> None:
    """A service of another stack that says nothing of Hivewire is left alone."""
    result = compiled(service("shop_web", {"hivewire.links": "billing/ledger:7"}), service("billing_ledger"))
    assert names(result) == ["shop_web"]


@pytest.mark.parametrize("allow", ["shop/*", "shop/web", "shop_web", "other, shop/web"])
def test_consent_is_given_by_allow(allow: str) -> None:
    """Each form of consent makes the link."""
    result = compiled(
        service("shop_web", {"hivewire.links": "billing/ledger:7"}),
        service("billing_ledger", {"hivewire.allow": allow}),
    )
    assert out_links(result, "shop_web") == ["billing_ledger net-shop_app 7/tcp"]


def test_services_without_a_stack_need_consent() -> None:
    """Two services that belong to no stack do not belong together."""
    web = service("web", {"hivewire.links": "db:1"})
    assert [p.code for p in compiled(web, service("db")).pending] == ["HW301"]
    assert out_links(compiled(web, service("db", {"hivewire.allow": "web"})), "web") == ["db net-shop_app 1/tcp"]


# Ports.


def test_ports_come_from_the_link_or_the_target() -> None:
    """A link without a port opens what its target offers, or only one protocol of that."""
    api = service("shop_api", {"hivewire.ports": "80 443 53/udp"})
    assert out_links(compiled(service("shop_web", {"hivewire.links": "api"}), api), "shop_web") == [
        "shop_api net-shop_app 80/tcp,443/tcp,53/udp"
    ]
    assert out_links(compiled(service("shop_web", {"hivewire.links": "api/udp"}), api), "shop_web") == [
        "shop_api net-shop_app 53/udp"
    ]
    assert out_links(compiled(service("shop_web", {"hivewire.links": "api:9"}), api), "shop_web") == [
        "shop_api net-shop_app 9/tcp"
    ]


NO_PORT = [
    ({}, "api", "and shop_api has no hivewire.ports", 'write "api:PORT", or add hivewire.ports to shop_api'),
    (
        {"hivewire.ports": "80"},
        "api/udp",
        "and shop_api has no hivewire.ports over udp",
        'write "api:PORT", or add hivewire.ports to shop_api',
    ),
    (
        {"hivewire.ports": "x"},
        "api",
        "and shop_api has no hivewire.ports",
        'correct the labels of shop_api, or write "api:PORT"',
    ),
]


@pytest.mark.parametrize(("labels", "written", "message", "remedy"), NO_PORT)
def test_a_link_needs_a_port_from_somewhere(labels: dict[str, str], written: str, message: str, remedy: str) -> None:
    """All ports are never meant by accident; the other links of the service are made all the same."""
    result = compiled(
        service("shop_web", {"hivewire.links": f"{written}, db:1"}), service("shop_api", labels), service("shop_db")
    )
    assert texts(result, "HW113") == [
        f'HW113 shop_web: hivewire.links: "{written}" names no port, {message} | {remedy}'
    ]
    assert out_links(result, "shop_web") == ["shop_db net-shop_app 1/tcp"]


def test_links_to_one_service_are_merged() -> None:
    """Several entries for one target are one link; its ports are sorted and joined."""
    result = compiled(
        service("shop_web", {"hivewire.links": "api:90 api:53/udp api:80-85 shop/api:86 shop_api"}),
        service("shop_api", {"hivewire.ports": "87"}),
    )
    assert out_links(result, "shop_web") == ["shop_api net-shop_app 80-87/tcp,90/tcp,53/udp"]
    assert [x.ports for x in result.policies[service_id("shop_api")].in_links] == [
        (ports("80-87"), ports("90"), ports("53/udp"))
    ]


def test_two_services_may_link_both_ways() -> None:
    """A link in each direction is two links, each with its own ports."""
    result = compiled(service("shop_a", {"hivewire.links": "b:1"}), service("shop_b", {"hivewire.links": "a:2"}))
    a = result.policies[service_id("shop_a")]
    assert (a.out_links, a.in_links) == ((link("shop_b", "1"),), (link("shop_b", "2"),))


# Networks.


def two_networks(source: dict[str, str], target: dict[str, str]) -> Compiled:
    """A link between two services that share the networks shop_back and shop_front."""
    both = ("shop_back", "shop_front")
    return compiled(
        service("shop_web", {"hivewire.links": "db:1"} | source, networks=both),
        service("shop_db", {"hivewire.ports": "1"} | target, networks=both),
    )


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [("front", "back", "shop_front"), ("", "front", "shop_front"), ("shop_front", "", "shop_front")],
)
def test_the_network_is_chosen_by_the_source_then_the_target(source: str, target: str, expected: str) -> None:
    """Of several shared networks the link takes the one that its source names, else the target's."""
    result = two_networks(
        {"hivewire.network": source} if source else {}, {"hivewire.network": target} if target else {}
    )
    assert out_links(result, "shop_web") == [f"shop_db net-{expected} 1/tcp"]
    assert result.findings == ()


def test_the_first_network_by_name_is_taken_else() -> None:
    """Where nobody names one, the choice is the same every time, and is said."""
    result = two_networks({}, {})
    assert out_links(result, "shop_web") == ["shop_db net-shop_back 1/tcp"]
    assert texts(result) == [
        "HW207 shop_web: link shop_web -> shop_db uses network shop_back; they share shop_back, shop_front"
        ' | choose with hivewire.network: "shop_back"'
    ]
    assert [x.network for x in result.policies[service_id("shop_web")].self_links] == [
        "net-shop_back",
        "net-shop_front",
    ]


def test_a_network_that_the_service_does_not_have() -> None:
    """A name that leads nowhere is a warning; the link falls back to the next rule."""
    result = two_networks({"hivewire.network": "fornt"}, {"hivewire.network": "front"})
    assert out_links(result, "shop_web") == ["shop_db net-shop_front 1/tcp"]
    assert texts(result) == [
        'HW206 shop_web: hivewire.network: the service is attached to no network "fornt"'
        " | use one of shop_back, shop_front"
    ]


def test_no_common_network() -> None:
    """Without a network that both are attached to there can be no link, and the target is left alone."""
    result = compiled(
        service("shop_web", {"hivewire.links": "db:1"}, networks=["shop_a"]), service("shop_db", networks=["shop_b"])
    )
    assert names(result) == ["shop_web"]
    assert texts(result) == [
        "HW203 shop_web: link shop_web -> shop_db: the two share no overlay network"
        " | attach both to one overlay network without option dsr"
    ]


def test_ingress_never_carries_a_link() -> None:
    """Two services that share only the ingress network share nothing."""
    nets = [network("ingress", is_ingress=True), network("shop_a", "10.2.0.0/24"), network("shop_b", "10.3.0.0/24")]
    result = compiled(
        service("shop_web", {"hivewire.links": "db:1"}, networks=["ingress", "shop_a"]),
        service("shop_db", networks=["ingress", "shop_b"]),
        networks=nets,
    )
    assert [p.code for p in result.pending] == ["HW203"]
    assert [n.name for n in result.policies[service_id("shop_web")].networks] == ["shop_a"]


def test_a_dsr_network_carries_no_link_but_is_closed() -> None:
    """The service is in the mesh by its other network; the dsr one is listed, so that enforcing closes it too."""
    nets = [network("shop_app"), network("shop_fast", "10.2.0.0/24", is_dsr=True)]
    both = ("shop_app", "shop_fast")
    result = compiled(
        service("shop_web", {"hivewire.links": "db:1, far:2"}, networks=both),
        service("shop_db", {"hivewire.ports": "1"}, networks=both),
        service("shop_far", networks=["shop_fast"]),
        networks=nets,
    )
    web = result.policies[service_id("shop_web")]
    assert [n.name for n in web.networks] == ["shop_app", "shop_fast"]
    assert [x.network for x in (*web.out_links, *web.self_links)] == ["net-shop_app", "net-shop_app"]
    assert texts(result, "HW204", "HW208") == [
        "HW208 shop_db: network shop_fast has option dsr, which links cannot use | create the network again without it",
        "HW204 shop_web: link shop_web -> shop_far: shop_far cannot be in it,"
        " all of its overlay networks have option dsr | attach both to one overlay network without option dsr",
        "HW208 shop_web: network shop_fast has option dsr, which links cannot use"
        " | create the network again without it",
    ]


def test_an_encrypted_network_is_mentioned_once() -> None:
    """That links do not use the network's own encryption is information about the network."""
    result = compiled(
        service("shop_web", {"hivewire.links": "db:1"}),
        service("shop_db", {"hivewire.ports": "1"}),
        networks=[network("shop_app", is_encrypted=True)],
    )
    assert texts(result) == [
        "HW209 shop_app: links do not run through the encryption of this network"
        " | nothing to do; option encrypted still covers traffic outside of the mesh"
    ]
    assert result.policies[service_id("shop_web")].findings == ()


def test_dnsrr_has_no_vip() -> None:
    """A link to a service without a VIP has none."""
    result = compiled(service("shop_web", {"hivewire.links": "db:1"}), service("shop_db", vips={}))
    assert result.policies[service_id("shop_web")].out_links == (link("shop_db", "1"),)


# What cannot be in the mesh.


@pytest.mark.parametrize(
    ("host_network", "networks", "why"),
    [
        (True, [], "it uses the host network"),
        (False, [], "it is attached to no overlay network"),
        (False, ["fast"], "all of its overlay networks have option dsr"),
    ],
)
def test_what_cannot_be_in_the_mesh_is_said(host_network: bool, networks: list[str], why: str) -> None:
    """Both the service itself and whoever links to it are told why; there is no policy for it."""
    nets = [network("shop_app"), network("fast", "10.2.0.0/24", is_dsr=True)]
    odd = service("shop_odd", {"hivewire.ports": "1"}, networks=networks, host_network=host_network)
    result = compiled(odd, service("shop_web", {"hivewire.links": "odd"}), networks=nets)
    assert names(result) == ["shop_web"]
    assert texts(result) == [
        f"HW204 shop_odd: cannot be in the mesh: {why} | attach it to an overlay network without option dsr",
        f"HW204 shop_web: link shop_web -> shop_odd: shop_odd cannot be in it, {why}"
        " | attach both to one overlay network without option dsr",
    ]


def test_a_task_that_may_change_its_network_is_said() -> None:
    """CAP_NET_ADMIN makes rules in the task's namespace a matter of trust."""
    result = compiled(service("shop_vpn", {"hivewire.enable": ""}, can_change_network=True))
    assert texts(result) == [
        "HW306 shop_vpn: its containers have CAP_NET_ADMIN and could change their own rules"
        " | remove it from cap_add, unless the service needs it"
    ]


def test_nodes_outside_of_the_mesh_are_said() -> None:
    """A ready Linux node without an agent and every Windows node are warnings; without agents, only those."""
    shop = snapshot(nodes=[node("n1"), node("n2"), node("n3", is_ready=False), node("w1", os="windows"), node("n4")])
    agents = frozenset({node_id("n1"), node_id("n4")})
    assert texts(compile_mesh(shop, {}, MESH, agents)) == [
        "HW402 n2: no agent runs on this node; tasks of the mesh there get no links"
        " | see with docker service ps why the agent's service has no task there",
        "HW405 w1: Windows nodes cannot be in the mesh; tasks there get no links"
        " | keep services of the mesh on Linux nodes",
    ]
    assert [f.code for f in compile_mesh(shop, {}, MESH, None).findings] == ["HW405"]


# Bad labels.


def test_a_bad_label_keeps_the_last_good_ones_and_fresh_facts() -> None:
    """The links stay as they were, while VIPs are the ones of now."""
    db = service("shop_db", {"hivewire.ports": "5432"}, vips={"shop_app": "10.1.0.2"})
    good = compiled(service("shop_web", {"hivewire.links": "db", "hivewire.mode": "observe"}), db)
    moved = service("shop_db", {"hivewire.ports": "5432"}, vips={"shop_app": "10.1.0.3"})
    result = compiled(service("shop_web", {"hivewire.links": "db:x, other:1"}), moved, previous=good.policies)
    web = result.policies[service_id("shop_web")]
    assert web.mode is Mode.OBSERVE
    assert web.out_links == (link("shop_db", "5432", vip="10.1.0.3"),)
    assert web.labels == {"hivewire.links": "db", "hivewire.mode": "observe"}
    assert [f.code for f in web.findings] == ["HW111", "HW304"]
    assert texts(result, "HW304") == ["HW304 shop_web: labels have an error: the last good ones stay in force | "]


def test_a_bad_label_of_the_target_keeps_links_to_it() -> None:
    """Others go on with what the target offered and allowed before."""
    web = service("shop_web", {"hivewire.links": "billing/ledger"})
    labels = {"hivewire.ports": "7", "hivewire.allow": "shop/*"}
    good = compiled(web, service("billing_ledger", labels))
    bad = service("billing_ledger", labels | {"hivewire.mtu": "tiny"})
    result = compiled(web, bad, previous=good.policies)
    assert result.policies[web.id] == good.policies[web.id]
    assert result.policies[bad.id].in_links == good.policies[bad.id].in_links


def test_a_new_service_with_a_bad_label_is_closed() -> None:
    """It enforces, with no link of its own; others of its stack may still link to it with a port."""
    result = compiled(service("shop_web", {"hivewire.links": "db:1"}), service("shop_db", {"hivewire.mode": "watch"}))
    db = result.policies[service_id("shop_db")]
    assert (db.mode, db.out_links, [x.name for x in db.in_links]) == (Mode.ENFORCE, (), ["shop_web"])
    assert texts(result, "HW304") == [
        "HW304 shop_db: labels have an error, and there are no earlier ones: it gets no links | "
    ]


def test_a_service_that_says_false_is_not_closed_by_a_typo() -> None:
    """Who clearly wants to be out stays out, whatever is wrong beside it."""
    result = compiled(service("shop_web", {"hivewire.enable": "false", "hivewire.mtu": "tiny"}))
    assert result.policies == {}
    assert texts(result) == [
        'HW106 shop_web: hivewire.mtu: "tiny" is not an MTU, which is 576-65455'
        " | leave the label out: the agents measure the path"
    ]


def test_earlier_labels_that_no_longer_read_do_not_count() -> None:
    """Stored labels with an error of their own are no way out: the service is closed."""
    web = service("shop_web", {"hivewire.links": ":"})
    stored = compiled(service("shop_web", {"hivewire.enable": ""})).policies[web.id]
    spoilt = {web.id: msgspec.structs.replace(stored, labels={"hivewire.mtu": "x"})}
    assert compiled(web, previous=spoilt).policies[web.id].labels == {}


def test_corrected_labels_are_in_force_at_once() -> None:
    """The last good labels are forgotten as soon as the present ones are good."""
    db = service("shop_db")
    good = compiled(service("shop_web", {"hivewire.links": "db:1"}), db)
    bad = compiled(service("shop_web", {"hivewire.links": "db:x"}), db, previous=good.policies)
    again = compiled(service("shop_web", {"hivewire.links": "db:2"}), db, previous=bad.policies)
    assert out_links(again, "shop_web") == ["shop_db net-shop_app 2/tcp"]
