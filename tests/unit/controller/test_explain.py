"""Why a connection is let through or not."""

import pytest

from controller.policy.compile import MeshDefaults, compile_mesh
from controller.policy.explain import Decision, Step, explain
from controller.swarm.snapshot import Service
from hivewire.errors import InvalidInput
from tests.builders import ports, service, snapshot

WEB = service("shop_web", {"hivewire.links": "api:8080, billing/ledger:7000"})
API = service("shop_api", {"hivewire.ports": "8080", "hivewire.links": "cache:6379"})
CACHE = service("shop_cache")
DB = service("shop_db", {"hivewire.ports": "5432"})
LEDGER = service("billing_ledger", {"hivewire.ports": "7000"})
PLAIN = service("old_cron")
PAIR = service("old_mail")
SHOP = (WEB, API, CACHE, DB, LEDGER, PLAIN, PAIR)


def why(source: str, destination: str, port: str, shop: tuple[Service, ...] = SHOP) -> Decision:
    """Explain one connection in the shop."""
    taken = snapshot(*shop)
    return explain(compile_mesh(taken, {}, MeshDefaults()), taken, source, destination, ports(port))


def test_a_link_allows() -> None:
    """With a link for the port the answer is yes, and encrypted."""
    assert why("shop_web", "api", "8080") == Decision(
        source="shop_web",
        destination="shop_api",
        allowed=True,
        encrypted=True,
        steps=(
            Step("mesh: shop_web is in it, mode enforce", True),
            Step("mesh: shop_api is in it, mode enforce", True),
            Step("link: shop_web has a link to shop_api:8080/tcp", True),
        ),
    )


def test_no_link_denies_and_says_how_to_get_one() -> None:
    """Between enforced services no link means no; the fix is the whole command, with the links that are there."""
    decision = why("shop_web", "shop_db", "5432")
    assert not decision.allowed
    assert [step.text for step in decision.steps[2:]] == [
        "link: shop_web has none to shop_db",
        "mode: shop_db enforces, so what no link allows is dropped",
    ]
    assert decision.fix == (
        'docker service update --label-add hivewire.links="api:8080,billing/ledger:7000,db:5432" shop_web'
    )


def test_another_port_of_a_link_is_denied() -> None:
    """A link opens its ports and no other."""
    decision = why("shop_web", "shop_api", "9090")
    assert not decision.allowed
    assert decision.steps[2] == Step("link: shop_web has a link to shop_api, for 8080/tcp only", False)


def test_a_link_without_consent_is_denied() -> None:
    """What the finding of a pending link says is what the explanation says."""
    decision = why("shop_web", "billing/ledger", "7000")
    assert not decision.allowed
    assert decision.steps[2] == Step("link: link shop_web -> billing_ledger is waiting for consent [HW301]", False)
    assert decision.fix == 'add  hivewire.allow: "shop_web"  to billing_ledger'


def test_observe_lets_other_ports_through_the_tunnel() -> None:
    """To a service that observes, other ports of an existing link are let through, encrypted."""
    decision = why("shop_api", "cache", "6380")
    assert (decision.allowed, decision.encrypted) == (True, True)


def test_an_enforced_source_reaches_nobody_without_a_link() -> None:
    """Enforcing closes the way out as well."""
    decision = why("shop_web", "old_cron", "25")
    assert not decision.allowed
    assert decision.steps[-1].text == "mode: shop_web enforces, so what no link allows is dropped"


def test_outside_of_the_mesh_nothing_changes() -> None:
    """Two services that are not in the mesh talk as before, in clear."""
    decision = why("old_cron", "mail", "25")
    assert (decision.allowed, decision.encrypted) == (True, False)


def test_replicas_need_no_link() -> None:
    """Tasks of one service may always talk with each other."""
    decision = why("shop_db", "db", "1234")
    assert (decision.allowed, decision.encrypted) == (True, True)


def test_an_unknown_name_is_an_error() -> None:
    """A name that no service has is said, with a close one."""
    with pytest.raises(InvalidInput, match='no service "dbb", did you mean "db"'):
        why("shop_web", "dbb", "1")
