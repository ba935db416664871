"""The nftables text, compared with golden files, and shown to the real nft where there is one."""

from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path

import pytest

from agent.rules.closed import closed, is_closed
from agent.rules.render import Backends, RuleSet, Source, WayOut, render
from tests.real_nft import need_nft, nft
from tests.unit.agent.values import ports

GOLDEN = Path(__file__).parent / "golden"


def addresses(*written: str) -> tuple[IPv4Address, ...]:
    return tuple(map(IPv4Address, written))


def backends(vip: str, *behind: str) -> Backends:
    return Backends(IPv4Address(vip), IPv4Address("10.1.0.2"), addresses(*behind))


WAY_OUT = WayOut("eth2", IPv4Interface("172.18.0.1/16"), "02:42:a8:dc:8a:38")
CLOSED = closed(["eth1", "eth0", "eth0"], WAY_OUT)

RULE_SETS = {
    "nothing-linked": RuleSet(enforce=True, overlay_interfaces=("eth0",), backends=(), sources=()),
    "no-interface": RuleSet(enforce=True, overlay_interfaces=(), backends=(), sources=()),
    "observe": RuleSet(
        enforce=False,
        overlay_interfaces=("eth0",),
        backends=(backends("10.1.0.200", "10.1.0.5", "10.1.0.6"), backends("10.1.0.201", "10.1.0.7")),
        sources=(Source("shop_lb", addresses("10.1.0.9"), (ports("80"),)),),
        way_out=WAY_OUT,
    ),
    "enforce": RuleSet(
        enforce=True,
        overlay_interfaces=("eth0", "eth1"),
        backends=(
            backends("10.1.0.200", "10.1.0.5", "10.1.0.6", "10.1.0.7"),
            backends("10.1.0.201", "10.1.0.8"),
            backends("10.2.0.200"),
        ),
        sources=(
            Source("shop_db", addresses("10.1.0.5", "10.1.0.6", "10.1.0.7"), None, (ports("5432"), ports("53/udp"))),
            Source("shop_lb", addresses("10.1.0.9"), tuple(map(ports, ("80", "8080-8090", "53/udp", "53")))),
            Source("shop_web", addresses("10.1.0.2", "10.1.0.3"), ()),
        ),
        way_out=WAY_OUT,
    ),
    "both-ways": RuleSet(
        enforce=True,
        overlay_interfaces=("eth0",),
        backends=(),
        sources=(
            Source("shop_api", addresses("10.1.0.5", "10.1.0.6"), (ports("80-90"), ports("85-99"), ports("53/udp"))),
            Source("shop_api", addresses("10.1.0.6"), None, (ports("8080"),)),
        ),
    ),
}


def test_closed_golden() -> None:
    """The table of a quarantine drops everything on WireGuard and overlay interfaces, and says what it is."""
    found = CLOSED
    assert found.text == (GOLDEN / "closed.nft").read_text()
    assert is_closed(found.digest)
    assert f'comment "{found.digest}"' in found.text
    assert not is_closed(render(RULE_SETS["enforce"])[1])


@pytest.mark.usefixtures("_real_nft")
def test_real_nft_takes_the_closed_table() -> None:
    """nft and the kernel accept the table of a quarantine."""
    assert nft(CLOSED.text).returncode == 0


@pytest.mark.parametrize("name", RULE_SETS)
def test_golden(name: str) -> None:
    """The text is exactly that of the golden file, which a person has read."""
    assert render(RULE_SETS[name])[0] == (GOLDEN / f"{name}.nft").read_text()


@pytest.mark.parametrize("name", RULE_SETS)
def test_digest_stands_in_the_comment(name: str) -> None:
    """The digest that tells a change is the one that the table itself carries."""
    text, digest = render(RULE_SETS[name])
    assert text.startswith(f'table inet hivewire {{\n\tcomment "{digest}"\n')


def test_digests_differ() -> None:
    """Different rules have different digests, and the same rules the same one."""
    assert len({render(rules)[1] for rules in RULE_SETS.values()}) == len(RULE_SETS)
    assert {render(rules) for rules in RULE_SETS.values()} == {render(rules) for rules in RULE_SETS.values()}


@pytest.fixture(scope="module")
def _real_nft() -> None:
    need_nft("inet")


@pytest.mark.usefixtures("_real_nft")
@pytest.mark.parametrize("name", RULE_SETS)
def test_real_nft_takes_it(name: str) -> None:
    """nft and the kernel accept the text as it stands."""
    done = nft((GOLDEN / f"{name}.nft").read_text())
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.usefixtures("_real_nft")
def test_real_nft_refuses() -> None:
    """The check above can fail: nft does not take just any text."""
    assert nft((GOLDEN / "enforce.nft").read_text().replace("numgen inc", "numgen ink")).returncode != 0
