"""Connections that Swarm's IPVS balanced while nobody was in the mesh, and what becomes of them when it comes."""

from contextlib import ExitStack

import pytest
from proof.deployed import Deployed, wait_for

from tests.e2e.test_streams import CALLED, LINK, Pair, unharmed

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def test_a_link_opens_around_connections_by_name(mesh: Deployed) -> None:
    """In observe they keep their way; new ones go through WireGuard; the VIP moves when the old ones have ended."""
    with ExitStack() as stack:
        pair = Pair(mesh, stack)
        ids = mesh.docker("service", "inspect", "-f", "{{range .Endpoint.VirtualIPs}}{{.Addr}} {{end}}", CALLED)
        vip = ids.split()[0].split("/")[0]

        def way() -> str:
            words = mesh.in_namespace(pair.caller, "ip", "route", "get", vip).split()
            return words[words.index("dev") + 1]

        old = pair.streams(vip)
        with unharmed(pair, "the mesh enabled"):
            pair.label("--label-add", LINK, "--label-add", "hivewire.mode=observe")
            wait_for("the link", pair.is_linked, 60)
            new = pair.streams(vip)
        for what, streams in (("by name, since then", new), ("by name, from before", old)):
            verdict = streams.end()
            print(f"{what}: {verdict}")
            assert verdict.goes_on, f"{what}: {verdict}"
        assert way() != "wg0", "a stream over UDP is remembered for two minutes more"
        wait_for("the VIP's route", lambda: way() == "wg0", 180)
