"""Every way to write a label wrong that we know of, and exactly what the operator reads then.

``BAD_LABELS`` is the table. Each row is a label of the service web in the stack shop, and the one finding it causes;
the end-to-end suite deploys the same rows on a real Swarm.
"""

from dataclasses import dataclass

import pytest

from controller.policy.compile import MeshDefaults, compile_mesh
from controller.policy.labels import parse_labels
from controller.swarm.snapshot import Service
from hivewire.records import Finding, Mode, Severity
from tests.builders import service, service_id, snapshot

NAME = "shop_web"
WEB = service_id(NAME)


@dataclass(frozen=True)
class BadLabel:
    """A label and the finding that it must cause."""

    what: str
    label: str
    value: str
    code: str
    message: str
    remedy: str
    is_on_container: bool = False

    @property
    def service(self) -> Service:
        """The service with this label, beside a good one in the right place."""
        labels = {self.label: self.value}
        if self.is_on_container:
            return service(NAME, container_labels=labels)
        return service(NAME, labels)

    @property
    def finding(self) -> Finding:
        return Finding(
            code=self.code,
            severity=Severity.ERROR,
            subject=NAME,
            message=self.message,
            remedy=self.remedy,
            label=self.label,
        )


# fmt: off
BAD_LABELS = [
    BadLabel("links without a service", "hivewire.links", ":80",
             "HW110", 'hivewire.links: cannot read ":80"',
             "write service:port or service:port/udp, separated by commas"),
    BadLabel("links without a port after the colon", "hivewire.links", "api:",
             "HW110", 'hivewire.links: cannot read "api:"',
             "write service:port or service:port/udp, separated by commas"),
    BadLabel("links with two colons", "hivewire.links", "api:8080:80",
             "HW110", 'hivewire.links: cannot read "api:8080:80"',
             "write service:port or service:port/udp, separated by commas"),
    BadLabel("links as a URL", "hivewire.links", "http://api:80",
             "HW110", 'hivewire.links: cannot read "http://api:80"',
             "write service:port or service:port/udp, separated by commas"),
    BadLabel("links with semicolons", "hivewire.links", "api:80;db:5432",
             "HW110", 'hivewire.links: cannot read "api:80;db:5432"',
             "write service:port or service:port/udp, separated by commas"),
    BadLabel("links as a JSON list", "hivewire.links", '["api:80"]',
             "HW110", 'hivewire.links: cannot read "["api:80"]"',
             "write service:port or service:port/udp, separated by commas"),
    BadLabel("links with three parts", "hivewire.links", "a/b/c:80",
             "HW110", 'hivewire.links: cannot read "a/b/c:80"',
             "write service:port or service:port/udp, separated by commas"),
    BadLabel("links with a star", "hivewire.links", "billing/*:80",
             "HW110", 'hivewire.links: cannot read "billing/*:80"',
             "write service:port or service:port/udp, separated by commas"),
    BadLabel("links with a dot in the name", "hivewire.links", "api.internal:80",
             "HW110", 'hivewire.links: cannot read "api.internal:80"',
             "write service:port or service:port/udp, separated by commas"),
    BadLabel("links with an accent", "hivewire.links", "caf\u00e9:80",
             "HW110", 'hivewire.links: cannot read "caf\xe9:80"',
             "type it again in plain letters and digits: U+00E9 is neither"),
    BadLabel("links with a Cyrillic letter", "hivewire.links", "\u0430pi:80",
             "HW110", 'hivewire.links: cannot read "\u0430pi:80"',
             "type it again in plain letters and digits: U+0430 is neither"),
    BadLabel("links with a no-break space", "hivewire.links", "api:80\u00a0db:5432",
             "HW110", 'hivewire.links: cannot read "api:80\\u00a0db:5432"',
             "type it again in plain letters and digits: U+00A0 is neither"),
    BadLabel("links with a name of 64 letters", "hivewire.links", "a" * 64 + ":80",
             "HW110", 'hivewire.links: cannot read "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\u2026"',
             "write service:port or service:port/udp, separated by commas"),
    BadLabel("links with a port above 65535", "hivewire.links", "api:99999",
             "HW111", 'hivewire.links: "api:99999" has port "99999", which is not 1-65535',
             "use the port the service listens on inside its container, not a published port"),
    BadLabel("links with port 0", "hivewire.links", "api:0",
             "HW111", 'hivewire.links: "api:0" has port "0", which is not 1-65535',
             "use the port the service listens on inside its container, not a published port"),
    BadLabel("links with a port by name", "hivewire.links", "api:http",
             "HW111", 'hivewire.links: "api:http" has port "http", which is not 1-65535',
             "use the port the service listens on inside its container, not a published port"),
    BadLabel("links with a negative port", "hivewire.links", "api:-80",
             "HW111", 'hivewire.links: "api:-80" has port "-80", which is not 1-65535',
             "use the port the service listens on inside its container, not a published port"),
    BadLabel("links with a leading zero", "hivewire.links", "api:080",
             "HW111", 'hivewire.links: "api:080" has port "080", which is not 1-65535',
             "use the port the service listens on inside its container, not a published port"),
    BadLabel("links with an open range", "hivewire.links", "api:80-",
             "HW111", 'hivewire.links: "api:80-" has port "80-", which is not 1-65535',
             "use the port the service listens on inside its container, not a published port"),
    BadLabel("links with a range backwards", "hivewire.links", "api:90-80",
             "HW111", 'hivewire.links: "api:90-80" has ports "90-80", which end before they begin',
             "write the lower port first"),
    BadLabel("links with a mistyped protocol", "hivewire.links", "api:8080/tpc",
             "HW112", 'hivewire.links: "api:8080/tpc" has protocol "tpc"',
             "use tcp (the default) or udp"),
    BadLabel("links with sctp", "hivewire.links", "api:8080/sctp",
             "HW112", 'hivewire.links: "api:8080/sctp" has protocol "sctp"',
             "use tcp (the default) or udp"),
    BadLabel("links with a protocol in capitals", "hivewire.links", "api:8080/TCP",
             "HW112", 'hivewire.links: "api:8080/TCP" has protocol "TCP"',
             "use tcp (the default) or udp"),
    BadLabel("links with an empty protocol", "hivewire.links", "api:8080/",
             "HW110", 'hivewire.links: cannot read "api:8080/"',
             "write service:port or service:port/udp, separated by commas"),
    BadLabel("links with one good and one bad entry", "hivewire.links", "api:80, db:x",
             "HW111", 'hivewire.links: "db:x" has port "x", which is not 1-65535',
             "use the port the service listens on inside its container, not a published port"),
    BadLabel("links to itself", "hivewire.links", "web:80",
             "HW202", "hivewire.links: a service cannot link to itself",
             "remove it; replicas of one service need no link"),
    BadLabel("links to itself by its full name", "hivewire.links", "shop/web:80",
             "HW202", "hivewire.links: a service cannot link to itself",
             "remove it; replicas of one service need no link"),
    BadLabel("too many links", "hivewire.links", " ".join(f"s{i}:80" for i in range(257)),
             "HW115", "hivewire.links: has 257 entries, 256 are the most",
             "write neighbouring ports as a range, such as 3000-3100"),
    BadLabel("too much text", "hivewire.links", "a" * 8193,
             "HW115", "hivewire.links: has 8193 characters, 8192 are the most",
             "shorten it"),
    BadLabel("ports with a service", "hivewire.ports", "db:5432",
             "HW110", 'hivewire.ports: cannot read "db:5432"',
             "write a port, or a port with /udp, separated by commas"),
    BadLabel("ports as compose publishes them", "hivewire.ports", "8080:80",
             "HW110", 'hivewire.ports: cannot read "8080:80"',
             "write a port, or a port with /udp, separated by commas"),
    BadLabel("ports by name", "hivewire.ports", "http",
             "HW111", 'hivewire.ports: "http" has port "http", which is not 1-65535',
             "use the port the service listens on inside its container, not a published port"),
    BadLabel("ports above 65535", "hivewire.ports", "65536",
             "HW111", 'hivewire.ports: "65536" has port "65536", which is not 1-65535',
             "use the port the service listens on inside its container, not a published port"),
    BadLabel("ports with an unknown protocol", "hivewire.ports", "53/dns",
             "HW112", 'hivewire.ports: "53/dns" has protocol "dns"',
             "use tcp (the default) or udp"),
    BadLabel("ports with digits of another script", "hivewire.ports", "\u0668\u0660",
             "HW110", 'hivewire.ports: cannot read "\u0668\u0660"',
             "type it again in plain letters and digits: U+0668 is neither"),
    BadLabel("allow everybody", "hivewire.allow", "*",
             "HW110", 'hivewire.allow: cannot read "*"',
             "write stack/service, stack/* or a service's full name, separated by commas"),
    BadLabel("allow with a port", "hivewire.allow", "billing/ledger:7000",
             "HW110", 'hivewire.allow: cannot read "billing/ledger:7000"',
             "write stack/service, stack/* or a service's full name, separated by commas"),
    BadLabel("allow with an empty stack", "hivewire.allow", "/ledger",
             "HW110", 'hivewire.allow: cannot read "/ledger"',
             "write stack/service, stack/* or a service's full name, separated by commas"),
    BadLabel("enable neither true nor false", "hivewire.enable", "on",
             "HW103", 'hivewire.enable: "on" is neither true nor false',
             'write "true" or "false"'),
    BadLabel("enable in capitals", "hivewire.enable", "True",
             "HW103", 'hivewire.enable: "True" is neither true nor false',
             'write "true" or "false"'),
    BadLabel("enable as the word null", "hivewire.enable", "null",
             "HW103", 'hivewire.enable: "null" is neither true nor false',
             'write "true" or "false"'),
    BadLabel("an unknown mode", "hivewire.mode", "strict",
             "HW105", 'hivewire.mode: there is no mode "strict"',
             "use enforce (the default), observe or off"),
    BadLabel("a mistyped mode", "hivewire.mode", "enforced",
             "HW105", 'hivewire.mode: there is no mode "enforced"',
             'did you mean "enforce"?'),
    BadLabel("no mode", "hivewire.mode", "",
             "HW105", 'hivewire.mode: there is no mode ""',
             "use enforce (the default), observe or off"),
    BadLabel("two networks", "hivewire.network", "front, back",
             "HW109", 'hivewire.network: "front, back" is not the name of a network',
             "write the name of one overlay network, as the stack file or docker network ls has it"),
    BadLabel("no network", "hivewire.network", "",
             "HW109", 'hivewire.network: "" is not the name of a network',
             "write the name of one overlay network, as the stack file or docker network ls has it"),
    BadLabel("rotate without a unit", "hivewire.rotate", "3600",
             "HW104", 'hivewire.rotate: "3600" is not a duration',
             "write a number with a unit: s, m or h, such as 30s, 12h or 1h30m"),
    BadLabel("rotate in days", "hivewire.rotate", "1d",
             "HW104", 'hivewire.rotate: "1d" is not a duration',
             "write a number with a unit: s, m or h, such as 30s, 12h or 1h30m"),
    BadLabel("rotate in words", "hivewire.rotate", "12 hours",
             "HW104", 'hivewire.rotate: "12 hours" is not a duration',
             "write a number with a unit: s, m or h, such as 30s, 12h or 1h30m"),
    BadLabel("rotate too often", "hivewire.rotate", "30s",
             "HW108", 'hivewire.rotate: "30s" is out of range',
             "use 1m to 8784h"),
    BadLabel("rotate too rarely", "hivewire.rotate", "9000h",
             "HW108", 'hivewire.rotate: "9000h" is out of range',
             "use 1m to 8784h"),
    BadLabel("rotate off", "hivewire.rotate", "off",
             "HW104", 'hivewire.rotate: "off" is not a duration',
             "write a number with a unit: s, m or h, such as 30s, 12h or 1h30m"),
    BadLabel("keepalive without a unit", "hivewire.keepalive", "25",
             "HW104", 'hivewire.keepalive: "25" is not a duration',
             "write a number with a unit: s, m or h, such as 30s, 12h or 1h30m"),
    BadLabel("keepalive below a second", "hivewire.keepalive", "500ms",
             "HW107", 'hivewire.keepalive: "500ms" is not a whole number of seconds',
             'use 1s to 65535s, or "off"'),
    BadLabel("keepalive of nothing", "hivewire.keepalive", "0s",
             "HW107", 'hivewire.keepalive: "0s" is out of range',
             'use 1s to 65535s, or "off"'),
    BadLabel("keepalive too long", "hivewire.keepalive", "20h",
             "HW107", 'hivewire.keepalive: "20h" is out of range',
             'use 1s to 65535s, or "off"'),
    BadLabel("a negative keepalive", "hivewire.keepalive", "-25s",
             "HW104", 'hivewire.keepalive: "-25s" is not a duration',
             "write a number with a unit: s, m or h, such as 30s, 12h or 1h30m"),
    BadLabel("an MTU in words", "hivewire.mtu", "auto",
             "HW106", 'hivewire.mtu: "auto" is not an MTU, which is 576-65455',
             "leave the label out: the agents measure the path"),
    BadLabel("an MTU too small", "hivewire.mtu", "500",
             "HW106", 'hivewire.mtu: "500" is not an MTU, which is 576-65455',
             "leave the label out: the agents measure the path"),
    BadLabel("an MTU too large", "hivewire.mtu", "70000",
             "HW106", 'hivewire.mtu: "70000" is not an MTU, which is 576-65455',
             "leave the label out: the agents measure the path"),
    BadLabel("a singular label", "hivewire.link", "api:80",
             "HW102", 'unknown label "hivewire.link"',
             'did you mean "hivewire.links"?'),
    BadLabel("a label in capitals", "Hivewire.Links", "api:80",
             "HW102", 'unknown label "Hivewire.Links"',
             'did you mean "hivewire.links"?'),
    BadLabel("a label with an underscore", "hivewire_links", "api:80",
             "HW102", 'unknown label "hivewire_links"',
             'did you mean "hivewire.links"?'),
    BadLabel("a label with a blank behind it", "hivewire.links ", "api:80",
             "HW102", 'unknown label "hivewire.links "',
             'did you mean "hivewire.links"?'),
    BadLabel("a label nobody knows", "hivewire.colour", "red",
             "HW102", 'unknown label "hivewire.colour"',
             "after hivewire. comes one of allow, enable, keepalive, links, mode, mtu, network, ports, rotate"),
    BadLabel("the bare prefix", "hivewire", "true",
             "HW102", 'unknown label "hivewire"',
             "after hivewire. comes one of allow, enable, keepalive, links, mode, mtu, network, ports, rotate"),
    BadLabel("a label of networks", "hivewire.guard", "strict",
             "HW102", 'unknown label "hivewire.guard"',
             "hivewire.guard is a label of a network: move it under networks.<name>.labels"),
    BadLabel("a label on the container", "hivewire.enable", "true",
             "HW101", 'label "hivewire.enable" is on the container, where the mesh does not look',
             "move it under services.web.deploy.labels", is_on_container=True),
    BadLabel("an unknown label on the container", "hivewire.link", "api:80",
             "HW101", 'label "hivewire.link" is on the container, where the mesh does not look',
             'move it under services.web.deploy.labels, as "hivewire.links"', is_on_container=True),
    BadLabel("a label in capitals on the container", "HIVEWIRE.PORTS", "80",
             "HW101", 'label "HIVEWIRE.PORTS" is on the container, where the mesh does not look',
             'move it under services.web.deploy.labels, as "hivewire.ports"', is_on_container=True),
]
# fmt: on

ROWS = [pytest.param(row, id=row.what) for row in BAD_LABELS]
DB = service("shop_db", {"hivewire.ports": "5432", "hivewire.links": "cache:6379"})
CACHE = service("shop_cache")
MESH = MeshDefaults(Mode.ENFORCE)


def test_the_table_is_as_long_as_it_should_be() -> None:
    """There are many rows, each with a description of its own."""
    assert len(BAD_LABELS) >= 35
    assert len({row.what for row in BAD_LABELS}) == len(BAD_LABELS)


@pytest.mark.parametrize("row", ROWS)
def test_the_operator_reads_what_is_wrong(row: BadLabel) -> None:
    """A bad label causes one finding, with exactly this text and this way out."""
    assert parse_labels(row.service).findings == (row.finding,)


@pytest.mark.parametrize("row", ROWS)
def test_other_services_do_not_notice(row: BadLabel) -> None:
    """The policies of the other services are the same as without the service that has the bad label."""
    without = compile_mesh(snapshot(DB, CACHE), {}, MESH)
    compiled = compile_mesh(snapshot(DB, CACHE, row.service), {}, MESH)
    assert {i: p for i, p in compiled.policies.items() if i != WEB} == without.policies


@pytest.mark.parametrize("row", ROWS)
def test_a_new_service_gets_no_links(row: BadLabel) -> None:
    """Without earlier labels the service is in the mesh, closed, and can open no connection."""
    compiled = compile_mesh(snapshot(DB, CACHE, row.service), {}, MESH)
    policy = compiled.policies[WEB]
    assert (policy.mode, policy.out_links, policy.in_links, policy.labels) == (Mode.ENFORCE, (), (), {})
    assert row.finding in policy.findings
    assert row.finding in compiled.findings


@pytest.mark.parametrize("row", ROWS)
def test_a_known_service_keeps_its_last_good_labels(row: BadLabel) -> None:
    """With earlier labels every part of the policy stays as it was, but for what it says to people."""
    good = compile_mesh(snapshot(DB, CACHE, service(NAME, {"hivewire.links": "db", "hivewire.mtu": "1400"})), {}, MESH)
    compiled = compile_mesh(snapshot(DB, CACHE, row.service), good.policies, MESH)
    policy = compiled.policies[WEB]
    assert [link.name for link in policy.out_links] == ["shop_db"]
    assert policy.mtu == 1400
    assert policy.labels == {"hivewire.links": "db", "hivewire.mtu": "1400"}
    assert row.finding in policy.findings
    assert {i: p for i, p in compiled.policies.items() if i != WEB} == {
        i: p for i, p in good.policies.items() if i != WEB
    }
