"""From what was seen to labels that would allow it, by tables of literal clusters."""

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.policy.compile import MeshDefaults, compile_mesh
from controller.policy.suggest import LabelChange, Suggestion, Wish, commands, stack_files, suggest
from controller.swarm.snapshot import Service, SwarmSnapshot
from hivewire.records import Mode
from tests.builders import ports, service, service_id, snapshot

WEB = service("shop_web", {"hivewire.links": "api:8080"})
API = service("shop_api", {"hivewire.ports": "8080"})
PLAIN = service("shop_cron")
LEDGER = service("billing_ledger", {"hivewire.ports": "7000"})
OPEN_LEDGER = service("billing_ledger", {"hivewire.ports": "7000", "hivewire.allow": "shop/*"})
OUTSIDE = service("billing_old")
ALONE = service("loner")
OFF = service("shop_off", {"hivewire.enable": "false"})
BAD = service("shop_bad", {"hivewire.links": "api:99999"})
APART = service("shop_apart", {"hivewire.ports": "1"}, networks=("shop_other",))
SHOP = (WEB, API, PLAIN, LEDGER, OUTSIDE, ALONE, OFF, BAD, APART)


def wish(source: str, destination: str, port: str) -> Wish:
    return Wish(service_id(source), service_id(destination), ports(port))


def ask(*wishes: Wish, shop: tuple[Service, ...] = SHOP, mode: Mode = Mode.ENFORCE) -> Suggestion:
    taken, mesh = snapshot(*shop), MeshDefaults(mode)
    return suggest(wishes, taken, compile_mesh(taken, {}, mesh).policies, mesh)


def labels(made: Suggestion) -> dict[tuple[str, str], str]:
    return {(change.service, change.label): change.after for change in made.changes}


CASES = {
    "a port more for a link that is there": (
        [("shop_web", "shop_api", "9090")], {("shop_web", "hivewire.links"): "api:8080,api:9090"},
    ),
    "another service": (
        [("shop_api", "shop_web", "80")], {("shop_api", "hivewire.links"): "web:80"},
    ),
    "udp is said": ([("shop_api", "shop_web", "53/udp")], {("shop_api", "hivewire.links"): "web:53/udp"}),
    "neighbouring ports become a range": (
        [("shop_api", "shop_web", port) for port in ("3000", "3001", "3002", "80")],
        {("shop_api", "hivewire.links"): "web:3000-3002,web:80"},
    ),
    "two services from one": (
        [("shop_web", "shop_cron", "1"), ("shop_web", "shop_api", "2")],
        {("shop_web", "hivewire.links"): "api:8080,api:2,cron:1"},
    ),
    "a first label would enforce": (
        [("shop_cron", "shop_api", "8080")],
        {("shop_cron", "hivewire.links"): "api:8080", ("shop_cron", "hivewire.mode"): "observe"},
    ),
    "another stack has to allow it": (
        [("shop_web", "billing_ledger", "7000")],
        {
            ("shop_web", "hivewire.links"): "api:8080,billing/ledger:7000",
            ("billing_ledger", "hivewire.allow"): "shop/web",
        },
    ),
    "another stack without labels": (
        [("shop_web", "billing_old", "1")],
        {
            ("shop_web", "hivewire.links"): "api:8080,billing/old:1",
            ("billing_old", "hivewire.allow"): "shop/web",
            ("billing_old", "hivewire.mode"): "observe",
        },
    ),
    "without a stack the whole name": (
        [("loner", "shop_api", "8080")],
        {
            ("loner", "hivewire.links"): "shop/api:8080",
            ("loner", "hivewire.mode"): "observe",
            ("shop_api", "hivewire.allow"): "loner",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_labels_that_would_allow_it(name: str) -> None:
    """The new values of the table, no more labels than these, and nothing refused."""
    wishes, expected = CASES[name]
    made = ask(*(wish(*words) for words in wishes))
    assert (labels(made), made.refused) == (expected, {})


def test_consent_that_is_there_is_not_asked_again() -> None:
    """Where the other stack allows it already, one label is enough."""
    made = ask(wish("shop_web", "billing_ledger", "7000"), shop=(WEB, API, OPEN_LEDGER))
    assert labels(made) == {("shop_web", "hivewire.links"): "api:8080,billing/ledger:7000"}


def test_in_an_observing_mesh_a_first_label_cuts_nobody() -> None:
    """The mode is not written where it is the mesh's anyway."""
    made = ask(wish("shop_cron", "shop_api", "8080"), mode=Mode.OBSERVE)
    assert labels(made) == {("shop_cron", "hivewire.links"): "api:8080"}


def test_what_is_linked_needs_nothing() -> None:
    """A wish that a link fulfils already is told apart."""
    done = wish("shop_web", "shop_api", "8080")
    assert ask(done) == Suggestion((), {}, frozenset({done}))


@pytest.mark.parametrize(
    ("source", "destination", "reason"),
    [
        ("shop_web", "shop_gone", "one of the services is gone"),
        ("shop_cron", "shop_cron", "replicas of one service need no link once it is in the mesh"),
        ("shop_off", "shop_api", "shop_off is switched off by its labels"),
        ("shop_web", "shop_off", "shop_off is switched off by its labels"),
        ("shop_bad", "shop_api", "the labels of shop_bad have an error: correct them first"),
        ("shop_web", "shop_apart", "link shop_web -> shop_apart: the two share no overlay network"),
    ],
)
def test_wishes_that_no_label_fulfils(source: str, destination: str, reason: str) -> None:
    """They are refused with a reason, change nothing, and hold no other wish up."""
    bad, good = wish(source, destination, "80"), wish("shop_api", "shop_web", "80")
    made = ask(bad, good)
    assert made.refused == {bad: reason}
    assert labels(made) == {("shop_api", "hivewire.links"): "web:80"}


def test_a_label_that_would_be_too_long_is_not_suggested() -> None:
    """More entries than a label may have would make an error of it, and take the links that work with it."""
    wishes = [wish("shop_web", "shop_api", str(port)) for port in range(1, 1200, 3)]
    made = ask(*wishes)
    assert made.changes == ()
    assert set(made.refused) == set(wishes)


def test_commands_keep_what_is_there_and_can_be_pasted() -> None:
    """One command per service, with whole values, read by a shell as they were meant."""
    made = ask(wish("shop_web", "shop_api", "9090"), wish("shop_cron", "shop_api", "8080"))
    assert [shlex.split(line) for line in commands(made.changes)] == [
        ["docker", "service", "update", "--label-add", "hivewire.links=api:8080", "--label-add",
         "hivewire.mode=observe", "shop_cron"],
        ["docker", "service", "update", "--label-add", "hivewire.links=api:8080,api:9090", "shop_web"],
    ]  # fmt: skip


def test_stack_files_are_parts_of_the_stacks_own() -> None:
    """Labels stand under deploy, in the stack of their service; a service without a stack is in no file."""
    made = ask(wish("shop_cron", "shop_api", "8080"), wish("loner", "billing_ledger", "7000"))
    assert stack_files(made.changes) == {
        "billing": (
            "services:\n  ledger:\n    deploy:\n      labels:\n"
            '        hivewire.allow: "loner"'
        ),
        "shop": (
            "services:\n  cron:\n    deploy:\n      labels:\n"
            '        hivewire.links: "api:8080"\n        hivewire.mode: "observe"'
        ),
    }  # fmt: skip


def test_a_value_of_somebody_cannot_leave_its_quotes() -> None:
    """Whatever stands in a label stays one word of the command."""
    change = LabelChange("shop_web", "shop", "hivewire.links", None, '$(id)\'; rm -rf "x"')
    (line,) = commands([change])
    assert shlex.split(line) == [
        "docker", "service", "update", "--label-add", f"hivewire.links={change.after}", "shop_web",
    ]  # fmt: skip


NAMES = [it.name for it in SHOP]
WISHES = st.lists(
    st.builds(
        wish,
        st.sampled_from(NAMES),
        st.sampled_from(NAMES),
        st.builds("{}{}".format, st.integers(1, 65535), st.sampled_from(["", "/udp"])),
    ),
    max_size=8,
)


def applied(made: Suggestion, shop: tuple[Service, ...]) -> SwarmSnapshot:
    """The cluster with the labels as suggested."""
    changed = []
    for it in shop:
        own = {change.label: change.after for change in made.changes if change.service == it.name}
        changed.append(service(it.name, {**it.labels, **own}, stack=it.stack, networks=names_of(it)))
    return snapshot(*changed)


def names_of(it: Service) -> list[str]:
    return [network.removeprefix("net-") for network in it.networks]


@given(WISHES)
def test_every_wish_is_fulfilled_or_refused(wishes: list[Wish]) -> None:
    """With the labels as suggested there is a link for every wish not refused, no new finding, and nobody is cut."""
    made = ask(*wishes)
    before = compile_mesh(snapshot(*SHOP), {}, MeshDefaults())
    after = compile_mesh(applied(made, SHOP), {}, MeshDefaults())
    again = suggest(wishes, applied(made, SHOP), after.policies, MeshDefaults())
    assert again.linked >= frozenset(wishes) - made.refused.keys()  # replicas may talk once they are in the mesh
    assert again.changes == ()
    errors = {(f.subject, f.code) for f in before.findings if f.severity.value == "error"}
    assert {(f.subject, f.code) for f in after.findings if f.severity.value == "error"} == errors
    enforced = {i for i, policy in before.policies.items() if policy.mode is Mode.ENFORCE}
    assert {i for i, policy in after.policies.items() if policy.mode is Mode.ENFORCE} == enforced
