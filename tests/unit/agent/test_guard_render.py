"""The guard's nftables text, compared with golden files, and shown to the real nft where there is one."""

import re
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from agent.guard import edge
from agent.guard.render import FROM_TASKS, SHUT, TO_TASKS, Closed, Count, Open, Rules, counting_on, render
from hivewire.ids import NetworkId
from hivewire.records import GuardRecord
from tests.real_nft import need_nft, nft

GOLDEN = Path(__file__).parent / "golden" / "guard"
ONE, TWO = IPv4Address("10.0.1.3"), IPv4Address("10.0.1.4")

RULES: dict[str, Rules] = {
    "default-nobody": Closed((), ()),
    "default": Closed((ONE, TWO), ("02:42:0a:00:01:03", "02:42:0a:00:01:04")),
    "default-ports": Closed((ONE, TWO), ("02:42:0a:00:01:03", "02:42:0a:00:01:04"), (12, 14)),
    "strict-ports": Open((ONE, TWO), (12, 14)),
    "strict-shut": SHUT,
    "strict": Open((ONE, TWO)),
}


RECORD = GuardRecord(network=NetworkId("un37g4fb1wiblcnjlicphk8hp"), name="app", strict=True, vnis=(4097, 4099))
EDGES = {
    "edge-shut": edge.render(RECORD),
    "edge": edge.render(RECORD, (TWO, ONE)),
}


@pytest.mark.parametrize("name", EDGES)
def test_golden_edges(name: str) -> None:
    """The text is exactly that of the golden file, and its comment tells digest and identifiers."""
    text, told = EDGES[name]
    assert text == (GOLDEN / f"{name}.nft").read_text()
    assert edge.Edge.parse(text.split('"')[1]) == told
    assert told.vnis == {4097, 4099}


@pytest.mark.parametrize("comment", ["", "digest", "digest x,4097", " 4097"])
def test_any_comment_is_an_edge(comment: str) -> None:
    """What somebody else wrote there is read without an error, and is none of ours."""
    assert edge.Edge.parse(comment) not in {told for _, told in EDGES.values()}


@pytest.mark.parametrize("name", EDGES)
def test_real_nft_takes_the_edge(name: str) -> None:
    """nft and the kernel accept the text as it stands."""
    need_nft("inet")
    done = nft((GOLDEN / f"{name}.nft").read_text())
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", RULES)
def test_golden(name: str) -> None:
    """The text is exactly that of the golden file, which a person has read."""
    assert render(RULES[name])[0] == (GOLDEN / f"{name}.nft").read_text()


def test_the_digest_stands_in_the_comment_and_tells_rules_apart() -> None:
    """Each rule set has a digest of its own, which its table carries."""
    digests = set()
    for rules in RULES.values():
        text, digest = render(rules)
        assert text.startswith(f'table bridge hivewire {{\n\tcomment "{digest}"\n')
        digests.add(digest)
    assert len(digests) == len(RULES)


@pytest.mark.parametrize("name", RULES)
def test_nothing_at_a_hook_looks_into_a_set(name: str) -> None:
    """While tables are exchanged, a frame that is in such a chain would find the set empty, and be dropped for it."""
    heads = re.findall(r"\t\ttype filter hook .*\n(?:\t\t.*\n)+", render(RULES[name])[0])
    assert len(heads) == 2
    assert not [head for head in heads if "{" in head or "@" in head]


def test_counters_are_taken_over() -> None:
    """The table that replaces another one counts on from there, under the same digest."""
    text, digest = render(RULES["default"])
    counted = counting_on(text, {FROM_TASKS: Count(7, 700), "unknown": Count(1, 1)})
    assert f"counter {FROM_TASKS} {{ packets 7 bytes 700 }}" in counted
    assert f"counter {TO_TASKS} {{ packets 0 bytes 0 }}" in counted
    assert f'comment "{digest}"' in counted
    assert counting_on(text, {}) == text


@pytest.fixture(scope="module")
def _real_nft() -> None:
    need_nft("bridge")


@pytest.mark.usefixtures("_real_nft")
@pytest.mark.parametrize("name", RULES)
def test_real_nft_takes_it(name: str) -> None:
    """nft and the kernel accept the text as it stands."""
    done = nft((GOLDEN / f"{name}.nft").read_text())
    assert (done.returncode, done.stderr) == (0, "")
