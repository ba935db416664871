"""Whether the rules that a task's table should hold are there, asked of the real nftables in a namespace of its own."""

import contextlib
import json
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Address

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.kernel import nftables, rtnetlink
from agent.kernel.api import Namespace
from agent.kernel.encode import attribute
from agent.kernel.namespace import identify, run_in
from agent.kernel.rtnetlink import Calls, Netlink, Request
from agent.rules.closed import closed
from agent.rules.render import Backends, RuleSet, Source, render
from hivewire.ids import TaskId
from tests.contract.test_kernel_denials import namespace
from tests.needs import need_namespaces
from tests.unit.agent.values import ports

ADDRESSES = [IPv4Address(f"10.8.0.{n}") for n in range(5, 25)]
RULES = RuleSet(
    enforce=True,
    overlay_interfaces=("eth0",),
    backends=(Backends(IPv4Address("10.8.0.99"), IPv4Address("10.8.0.2"), tuple(ADDRESSES[:3])),),
    sources=(
        Source("lb", tuple(ADDRESSES[:3]), (ports("80"), ports("53/udp"))),
        Source("db", (ADDRESSES[4],), None, (ports("5432"),)),
    ),
)


@dataclass(frozen=True)
class Held:
    """A namespace with a table in it."""

    namespace: Namespace
    tables: Netlink

    def set(self, text: str) -> None:
        nftables.replace(self.tables, self.nft, text)

    def nft(self, text: str) -> None:
        run_in(self.namespace, lambda: nftables.apply(text))

    @property
    def applied(self) -> str:
        return nftables.applied(self.tables)

    @property
    def rules(self) -> list[tuple[str, int]]:
        """Chain and handle of each rule."""
        found = nftables._parts(self.tables, nftables._NFT_MSG_GETRULE)
        return [(part[2].rstrip(b"\0").decode(), int.from_bytes(part[3], "big")) for part in found]


@pytest.fixture(scope="module")
def held() -> Iterator[Held]:
    need_namespaces()
    with namespace() as pid:
        space = identify(TaskId("held"), f"/proc/{pid}/ns/net")
        with contextlib.closing(run_in(space, lambda: Netlink(rtnetlink.NETLINK_NETFILTER, Calls()))) as tables:
            yield Held(space, tables)


SOURCES = st.builds(
    Source,
    st.just("s"),
    st.lists(st.sampled_from(ADDRESSES), min_size=1, unique=True).map(tuple),
    st.sampled_from([None, (), (ports("80"),), (ports("80"), ports("1000-2000/udp"))]),
    st.sampled_from([(), (ports("5432"),)]),
)
BACKENDS = st.builds(
    Backends,
    st.just(IPv4Address("10.8.0.99")),
    st.just(IPv4Address("10.8.0.2")),
    st.lists(st.sampled_from(ADDRESSES), unique=True).map(tuple),
)
RULE_SETS = st.builds(
    RuleSet,
    st.booleans(),
    st.sampled_from([(), ("eth0",), ("eth0", "eth1")]),
    st.lists(BACKENDS, max_size=1).map(tuple),
    st.lists(SOURCES, max_size=3).map(tuple),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rules=RULE_SETS, data=st.data())
def test_what_was_applied_is_recognised_and_any_missing_or_foreign_rule_too(
    held: Held, rules: RuleSet, data: st.DataObject
) -> None:
    """Untouched, the table answers with its digest; without any one of its rules, or with another added, not."""
    text, digest = render(rules)
    held.set(text)
    assert held.applied == digest
    chain, handle = data.draw(st.sampled_from(held.rules))
    another = f"add rule inet hivewire {chain} accept\n" if data.draw(st.booleans()) else ""
    held.nft(f"delete rule inet hivewire {chain} handle {handle}\n{another}")
    assert held.applied == nftables.ALTERED
    held.set(text)
    assert held.applied == digest


@pytest.mark.parametrize(
    "harm",
    [
        "add rule inet hivewire from_peers accept",
        "insert rule inet hivewire input accept",
        "flush chain inet hivewire from_overlay",
        "flush table inet hivewire",
        "flush set inet hivewire peers",
        "add element inet hivewire callers { 10.8.0.77 }",
        "delete element inet hivewire callers { 10.8.0.5 }\nadd element inet hivewire callers { 10.8.0.77 }",
        "chain inet hivewire forward { policy accept; }",
        "add chain inet hivewire early { type filter hook input priority -200; }",
        "add table inet hivewire { flags dormant; }",
    ],
)
def test_what_a_person_may_do_is_noticed(held: Held, harm: str) -> None:
    """Flushing, adding, exchanging or switching off anything that decides about packets is no longer what was set."""
    text, digest = render(RULES)
    held.set(text)
    assert held.applied == digest
    held.nft(harm + "\n")
    assert held.applied == nftables.ALTERED


def test_a_quarantine_that_was_weakened_is_noticed(held: Held) -> None:
    """The table of a quarantine is looked at in the same way."""
    shut = closed(("eth0",))
    held.set(shut.text)
    assert held.applied == shut.digest
    chain, handle = held.rules[0]
    held.nft(f"delete rule inet hivewire {chain} handle {handle}\n")
    assert held.applied == nftables.ALTERED


def test_what_rules_note_is_no_change(held: Held) -> None:
    """Entries that come and go in dynamic sets, and another program's table, leave the answer as it is."""
    text, digest = render(replace(RULES, enforce=False))
    held.set(text)
    held.nft("add element inet hivewire passed_no_link_in { 10.9.0.5 . 10.9.0.2 . tcp . 80 }\n")
    held.nft("add table ip nat\nadd chain ip nat x\nadd rule ip nat x accept\n")
    assert held.applied == digest


def test_no_table_is_no_digest(held: Held) -> None:
    """Where the table was deleted there is none."""
    held.set(render(RULES)[0])
    nftables.remove(held.tables)
    assert held.applied == ""


NEXT = nftables.following(nftables.TABLE)
LISTING = ("nft", "-j", "list", "ruleset", "inet")


def judging(held: Held) -> dict[str, int]:
    """How many chains at hooks each table has that is there."""
    listed = run_in(held.namespace, lambda: subprocess.run(LISTING, capture_output=True, text=True, check=True).stdout)
    parts = json.loads(listed)["nftables"]
    heads = [it["chain"]["table"] for it in parts if "hook" in it.get("chain", {})]
    return {it["table"]["name"]: heads.count(it["table"]["name"]) for it in parts if "table" in it}


def test_in_an_exchange_one_table_judges_whole_at_every_moment(held: Held) -> None:
    """A second one judges before the old one's chains leave their hooks, and goes when the new one does."""
    held.set(render(RULES)[0])
    before = judging(held)
    seen = []

    def watched(transaction: str) -> None:
        seen.append(judging(held))
        held.nft(transaction)
        seen.append(judging(held))

    text, digest = render(replace(RULES, enforce=False))
    nftables.replace(held.tables, watched, text)
    hooks, fewer = before[nftables.TABLE], before[nftables.TABLE] - 1  # observe forwards as it is told
    assert hooks > 1
    assert seen == [
        {nftables.TABLE: hooks},
        {nftables.TABLE: hooks, NEXT: fewer},
        {nftables.TABLE: 0, NEXT: fewer},
        {nftables.TABLE: fewer, NEXT: fewer},
    ]
    assert judging(held) == {nftables.TABLE: fewer}
    assert held.applied == digest


class Broken(Exception):
    """The agent ended here."""


@pytest.mark.parametrize(("whole", "and_then"), [(0, True), (1, False), (1, True), (2, False)])
def test_an_exchange_that_breaks_off_is_noticed_and_made_good(held: Held, whole: int, and_then: bool) -> None:
    """After so many transactions, or before the next one: something judges, and the next exchange cleans up."""
    held.set(render(RULES)[0])
    begun = 0

    def breaking(transaction: str) -> None:
        nonlocal begun
        begun += 1
        if begun > whole:
            raise Broken
        held.nft(transaction)
        if begun == whole and not and_then:
            raise Broken

    with pytest.raises(Broken):
        nftables.replace(held.tables, breaking, render(replace(RULES, sources=()))[0])
    assert any(judging(held).values())
    assert held.applied == (nftables.ALTERED if whole else render(RULES)[1])
    text, digest = render(replace(RULES, enforce=False))
    held.set(text)
    assert (held.applied, list(judging(held))) == (digest, [nftables.TABLE])


def test_what_an_earlier_exchange_left_never_judges_alone(held: Held) -> None:
    """It may allow what was revoked since: while the old table is whole, the new rules come in its place."""
    held.set(render(RULES)[0])
    text, digest = render(replace(RULES, sources=()))
    held.nft(render(replace(RULES, enforce=False))[0].replace("inet hivewire ", f"inet {NEXT} ", 1))
    alone = []

    def watched(transaction: str) -> None:
        if judging(held)[nftables.TABLE] == 0:
            tables = {name: table for _, name, table in nftables._tables(held.tables)}
            alone.append(nftables.comment(tables[NEXT][nftables._NFTA_TABLE_USERDATA]).partition(" ")[0])
        held.nft(transaction)

    nftables.replace(held.tables, watched, text)
    assert alone == [digest]
    assert held.applied == digest


def test_a_table_of_the_other_family_goes_too(held: Held) -> None:
    """An older version's table, with a chain at a hook, does not stay beside the new one."""
    nftables.remove(held.tables)
    held.nft("table ip hivewire {\n\tchain input {\n\t\ttype filter hook input priority 0; policy drop;\n\t}\n}\n")
    assert held.applied == nftables.ALTERED
    text, digest = render(RULES)
    held.set(text)
    assert held.applied == digest
    assert [(number, name) for number, name, _ in nftables._tables(held.tables)] == [(1, nftables.TABLE)]


def test_both_tables_are_removed(held: Held) -> None:
    """Where an exchange broke off, leaving the mesh leaves nothing either."""
    held.set(render(RULES)[0])
    held.nft("add table inet hivewire_next\n")
    assert held.applied == nftables.ALTERED
    nftables.remove(held.tables)
    assert (held.applied, judging(held)) == ("", {})


def test_the_kernels_refusal_of_one_request_undoes_all(held: Held) -> None:
    """A batch is carried out as a whole or not at all, and says what was wrong."""
    held.set(render(RULES)[0])
    before = judging(held)
    chain = [attribute(1, b"hivewire\0") + attribute(3, name) for name in (b"input\0", b"nosuch\0")]
    body = struct.pack("=BBH", 1, 0, 0)
    with pytest.raises(FileNotFoundError):
        held.tables.transact(10, [Request(10 << 8 | 5, body + named) for named in chain])
    assert judging(held) == before
