"""What the labels mean when they are right."""

import pytest

from controller.policy.labels import (
    LABELS,
    AllowSpec,
    LinkSpec,
    Name,
    ParsedLabels,
    coalesce,
    parse_labels,
    quote,
    read_allow,
    read_boolean,
    read_keepalive,
    read_link,
    read_rotate,
    split_list,
)
from hivewire.errors import InvalidPolicy
from hivewire.records import Mode, Protocol, Severity
from tests.builders import ports, service

LINKS = [
    ("db", LinkSpec("db", Name("", "db"))),
    ("db:5432", LinkSpec("db:5432", Name("", "db"), ports("5432"))),
    ("db:5432-5440", LinkSpec("db:5432-5440", Name("", "db"), ports("5432-5440"))),
    ("dns:53/udp", LinkSpec("dns:53/udp", Name("", "dns"), ports("53/udp"))),
    ("db:1/tcp", LinkSpec("db:1/tcp", Name("", "db"), ports("1"))),
    ("dns/udp", LinkSpec("dns/udp", Name("", "dns"), None, Protocol.UDP)),
    ("billing/ledger", LinkSpec("billing/ledger", Name("billing", "ledger"))),
    ("billing/ledger:7000", LinkSpec("billing/ledger:7000", Name("billing", "ledger"), ports("7000"))),
    ("billing/ledger:7/udp", LinkSpec("billing/ledger:7/udp", Name("billing", "ledger"), ports("7/udp"))),
    ("billing/ledger/tcp", LinkSpec("billing/ledger/tcp", Name("billing", "ledger"), None, Protocol.TCP)),
    ("billing/tcp", LinkSpec("billing/tcp", Name("", "billing"), None, Protocol.TCP)),
    ("billing/tcp:80", LinkSpec("billing/tcp:80", Name("billing", "tcp"), ports("80"))),
    ("billing_tcp", LinkSpec("billing_tcp", Name("", "billing_tcp"))),
    ("shop-eu_api-2:8080", LinkSpec("shop-eu_api-2:8080", Name("", "shop-eu_api-2"), ports("8080"))),
]


@pytest.mark.parametrize(("text", "expected"), LINKS, ids=[text for text, _ in LINKS])
def test_links_are_read(text: str, expected: LinkSpec) -> None:
    """Every form of a link has one reading; a trailing /tcp or /udp is always a protocol."""
    assert read_link(text) == expected


@pytest.mark.parametrize(
    "value", ["a:1,b:2", "a:1 b:2", "a:1, b:2", " a:1\n,\n\tb:2 ,", ",,a:1,,b:2,,", "a:1,\nb:2\n", "a:1\r\nb:2"]
)
def test_lists_take_commas_and_white_space(value: str) -> None:
    """Commas, blanks and lines separate alike, so that block scalars of YAML work."""
    assert split_list(value) == ("a:1", "b:2")


def test_all_labels_together() -> None:
    """Each of the nine labels lands in its field, and the labels are kept as they were written."""
    labels = {
        "hivewire.links": "db:5432",
        "hivewire.ports": "8081 8080, 53/udp",
        "hivewire.allow": "billing/*, edge/proxy old_thing",
        "hivewire.enable": "yes",
        "hivewire.mode": " observe ",
        "hivewire.network": "front",
        "hivewire.rotate": "1h30m",
        "hivewire.keepalive": "25s",
        "hivewire.mtu": "1380",
    }
    assert set(labels) == set(LABELS)
    assert parse_labels(service("shop_web", labels)) == ParsedLabels(
        links=(LinkSpec("db:5432", Name("", "db"), ports("5432")),),
        ports=(ports("8080-8081"), ports("53/udp")),
        allow=(
            AllowSpec("billing/*", "billing"),
            AllowSpec("edge/proxy", "edge", "proxy"),
            AllowSpec("old_thing", "", "old_thing"),
        ),
        enable=True,
        mode=Mode.OBSERVE,
        network="front",
        rotate_s=5400,
        keepalive_s=25,
        mtu=1380,
        own=labels,
    )


def test_labels_of_others_do_not_count() -> None:
    """What does not begin with hivewire is not ours, on the service and on the container."""
    others = {"traefik.enable": "maybe", "com.hivewire.links": ":", "hivewired.links": ":", "my.hivewire.links": ":"}
    parsed = parse_labels(service("shop_web", others, container_labels=others))
    assert parsed == ParsedLabels()
    assert not parsed.is_present


@pytest.mark.parametrize("label", ["hivewire.links", "hivewire.ports", "hivewire.allow", "hivewire.enable"])
def test_a_bare_label_is_presence(label: str) -> None:
    """A label without a value is no error: it says that the service takes part."""
    parsed = parse_labels(service("shop_web", {label: ""}))
    assert parsed.is_valid
    assert parsed.is_present
    assert not parsed.is_switched_off


@pytest.mark.parametrize(
    ("text", "expected"),
    [("true", True), ("1", True), ("yes", True), ("", True), ("false", False), ("0", False), ("no", False)],
)
def test_booleans(text: str, expected: bool) -> None:
    """There are seven ways to write a boolean."""
    assert read_boolean(text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("60s", 60), ("1m", 60), ("12h", 43200), ("1h30m", 5400), ("1.5h", 5400), ("60000ms", 60), ("8784h", 31622400)],
)
def test_durations(text: str, expected: int) -> None:
    """Durations are written as in Go, down to milliseconds, and come out as whole seconds."""
    assert read_rotate(text) == expected


def test_keepalive_can_be_off() -> None:
    """The word off is the same as no keepalive."""
    assert read_keepalive("off") == 0
    assert read_keepalive("1s") == 1
    assert read_keepalive("65535s") == 65535


def test_a_port_twice_is_said_and_does_no_harm() -> None:
    """A port that is there already is a warning; the labels stay in force, the port counts once."""
    parsed = parse_labels(service("shop_db", {"hivewire.ports": "80 443 70-90 443/udp"}))
    assert parsed.is_valid
    assert [(f.code, f.severity, f.message) for f in parsed.findings] == [
        ("HW114", Severity.WARNING, 'hivewire.ports: "70-90/tcp" is there already')
    ]
    assert parsed.ports == (ports("70-90"), ports("443"), ports("443/udp"))


def test_a_link_twice_is_said() -> None:
    """The same port of the same service twice is a warning; of two services it is nothing."""
    assert [
        f.message for f in parse_labels(service("shop_web", {"hivewire.links": "a:80 b:80 a:80 a:80/udp"})).findings
    ] == ['hivewire.links: "a:80/tcp" is there already']


def test_every_error_is_found_at_once() -> None:
    """One pass tells of everything that is wrong, in order of the codes."""
    labels = {"hivewire.links": "a:x b:0 c:1/z", "hivewire.mtu": "big", "hivewire.lnks": "a:1"}
    found = parse_labels(service("shop_web", labels, container_labels={"hivewire.mode": "off"})).findings
    assert [f.code for f in found] == ["HW101", "HW102", "HW106", "HW111", "HW111", "HW112"]


def test_a_service_without_a_stack_is_told_another_way() -> None:
    """Where there is no stack file, the way out of a misplaced label is a command."""
    [found] = parse_labels(service("web", container_labels={"hivewire.enable": "true"})).findings
    assert found.remedy == (
        "docker service update --container-label-rm hivewire.enable --label-add hivewire.enable=... web"
    )


@pytest.mark.parametrize(
    ("text", "source", "expected"),
    [
        ("shop/web", "shop_web", True),
        ("shop/web", "shop_api", False),
        ("shop/*", "shop_web", True),
        ("shop/*", "shopping_web", False),
        ("shop_web", "shop_web", True),
        ("web", "shop_web", False),
    ],
)
def test_consent(text: str, source: str, expected: bool) -> None:
    """A service of a stack, a whole stack, or an exact full name is let in, and nobody else."""
    assert read_allow(text).admits(service(source)) is expected


def test_consent_for_a_stack_needs_the_stack() -> None:
    """A service that only looks as if it were of the stack, by its name, is not let in by the stack's name."""
    impostor = service("shop_web", stack="")
    assert not read_allow("shop/web").admits(impostor)
    assert not read_allow("shop/*").admits(impostor)


def test_coalesce() -> None:
    """Overlapping and neighbouring ranges of one protocol become one, in order."""
    mixed = [ports("90"), ports("80-85"), ports("86"), ports("53/udp"), ports("84-88"), ports("54/udp")]
    assert coalesce(mixed) == (ports("80-88"), ports("90"), ports("53-54/udp"))


def test_quoted_text_is_short_and_visible() -> None:
    """What a person reads back has no control characters and is never long."""
    assert quote("a\x00b\u200b") == '"a\\u0000b\\u200b"'
    assert len(quote("x" * 5000)) == 62


def test_read_functions_raise_invalid_policy() -> None:
    """Called directly, a reader says the problem and the way out in one line."""
    with pytest.raises(InvalidPolicy, match='"api:0" has port "0", which is not 1-65535: use the port'):
        read_link("api:0")
