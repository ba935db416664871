"""Meshed services on a network that Swarm encrypts: WireGuard is not encrypted again, the others keep their IPsec."""

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from proof.claims import WIREGUARD_PORTS
from proof.deployed import Deployed

from tests.kernel.side import CALLER, FREE, GUEST, MESHED, Side

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

SEALED = "esp or udp port 4500"
OVERLAY = "udp port 4789"
ASKED = 20
LARGE = "greater 1000"  # what is said; what else may be sealed meanwhile, such as ARP, is small


@pytest.fixture(scope="module")
def side(mesh: Deployed) -> Iterator[Side]:
    side = Side.deployed(mesh, "--opt", "encrypted")
    yield side
    side.remove()


def test_wireguard_is_not_encrypted_twice(side: Side, tmp_path: Path) -> None:
    """What `caller` and `meshed` say crosses the underlay in WireGuard alone: no ESP carries it, and nothing is clear.

    The control is the same conversation of `guest` and `free` in a second capture: that is in ESP, and not in clear.
    """
    side.ask(CALLER, "meshed", 2 * len(side.mesh.tasks(MESHED)))  # handshakes and neighbours are known now
    side.ask(GUEST, "free", 2 * len(side.mesh.tasks(FREE)))
    text = f"MARK{secrets.token_hex(600)}"
    with side.mesh.lab.capture(tmp_path / "meshed.pcap") as meshed:
        assert set(side.ask(CALLER, "meshed", ASKED, text)) == {side.address(CALLER)}
    with side.mesh.lab.capture(tmp_path / "free.pcap") as free:
        assert set(side.ask(GUEST, "free", ASKED, text)) == {side.balancer("n1")}
    counts = {
        (name, what): wire.count(f"({what}) and {LARGE}")
        for name, wire in (("meshed", meshed), ("free", free))
        for what in (WIREGUARD_PORTS, SEALED, OVERLAY)
    }
    print(counts)
    # The text and its echo, in each connection.
    assert counts["meshed", WIREGUARD_PORTS] >= 2 * ASKED
    assert counts["free", SEALED] >= 2 * ASKED, "the control is not encrypted by Swarm: nothing is shown"
    assert counts["meshed", SEALED] == 0
    assert (counts["meshed", OVERLAY], counts["free", OVERLAY]) == (0, 0)
    for wire in (meshed, free):
        assert not wire.contains(text[:40].encode())


def test_a_stranger_is_shut_out_of_meshed_services(side: Side) -> None:
    """The guard's rules hold on an encrypted network as well: `guest` does not reach `meshed`, only `free`."""
    task = side.task(GUEST)
    for host in ("meshed", side.vip(MESHED), *side.mesh.addresses(side.task(MESHED))):
        assert side.mesh.probe(task, "tcp", host, "8080", timeout_s=1)["outcome"] != "reached", host
    assert side.mesh.probe(task, "tcp", "free", "8080", timeout_s=1)["outcome"] == "reached"
