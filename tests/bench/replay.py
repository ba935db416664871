"""The end of a sequence number, shown on both: Swarm's encrypted overlay network and a link.

Swarm's IPsec has ESP sequence numbers of 32 bits and new keys every 12 hours; after 2^32 packets between two nodes the
kernel refuses to send any more, and nothing says so (moby issue 52005). Here that many packets need not be sent: the
outgoing state of one node is taken away and put back as it was, but with its counter close to the end. WireGuard counts
in 64 bits and makes new keys every two minutes; a link runs beside it, over the same wire, at the same time.
"""

import re
from typing import Any

from lab.errors import LabError
from proof.deployed import Deployed

from tests.bench import places
from tests.bench.datapath import BENCH, CLIENT, SEALED, SERVER, between
from tests.bench.places import Place
from tests.bench.probes import Route

LAST = 0xFFFFFFFF
LEFT = 200
"""Packets until the end."""
PINGS = 400


def show(mesh: Deployed) -> dict[str, Any]:
    """Raises LabError where the encrypted network does not carry traffic to begin with."""
    sealed = between(mesh, f"{SEALED}_sealed-from", f"{SEALED}_sealed-to")
    link = between(mesh, f"{BENCH}_from", f"{BENCH}_to")
    node = places.of_node(mesh.lab, CLIENT)
    before = {"sealed": _pings(sealed, 20), "link": _pings(link, 20)}
    if not before["sealed"]:
        raise LabError("the encrypted overlay network answers no ping, so there is no end of it to show")
    refused = _refused(node)
    between_nodes = (str(mesh.lab.node(CLIENT).address), str(mesh.lab.node(SERVER).address))
    states = _set_counter(node, *between_nodes, LAST - LEFT)
    answered = {"sealed": _pings(sealed, PINGS), "link": _pings(link, PINGS)}
    after = {"sealed": _pings(sealed, 20), "link": _pings(link, 20)}
    refused = _refused(node) - refused
    # That it was the number and nothing else; and what is measured next finds the network as it was.
    _set_counter(node, *between_nodes, 0)
    return {
        "states_set": states,
        "packets_left": LEFT,
        "answered_of_20_before": before,
        f"answered_of_{PINGS}_across_the_end": answered,
        "answered_of_20_after": after,
        "answered_of_20_with_a_new_number": {"sealed": _pings(sealed, 20), "link": _pings(link, 20)},
        "refused_by_the_kernel": refused,
    }


def _set_counter(node: Place, source: str, target: str, sent: int) -> int:
    """Set how many packets were sent by all outgoing states between two nodes; returns how many there are.

    An update leaves the counter as it is (xfrm_state_update in net/xfrm/xfrm_state.c), so each state is deleted and
    added. Keys go through standard input: nobody else on this machine sees them.
    """
    lines = []
    listed = node.run("ip", "-o", "xfrm", "state", "list", "src", source, "dst", target).stdout
    for state in listed.splitlines():
        text = state.replace("\\", " ")
        spi = re.search(r"proto esp spi (0x[0-9a-f]+)", text)
        aead = re.search(r"aead (\S+) (0x[0-9a-f]+) (\d+)", text)
        mark = re.search(r"mark (0x[0-9a-f]+)(?:/(0x[0-9a-f]+))?", text)
        reqid = re.search(r"reqid (\d+)", text)
        if not spi or not aead:
            raise LabError("a state of the encrypted network is not as expected: no SPI, or no AEAD")
        who = f"src {source} dst {target} proto esp spi {spi[1]}"
        marked = f" mark {mark[1]} mask {mark[2] or '0xffffffff'}" if mark else ""
        lines.append(f"xfrm state delete {who}{marked}")
        lines.append(
            f"xfrm state add {who} reqid {reqid[1] if reqid else 0} mode transport{marked} replay-window 0"
            f" replay-oseq {sent:#x} aead {aead[1]} {aead[2]} {aead[3]}"
        )
    if not lines:
        raise LabError(f"no outgoing state from {source} to {target}: is the encrypted network in use?")
    # A batch of ip prints a failing line, which has a key in it: only its status is looked at.
    if node.run("ip", "-batch", "-", text_in="\n".join(lines) + "\n", check=False).returncode:
        raise LabError("the states of the encrypted network could not be set")
    return len(lines) // 2


def _pings(route: Route, count: int) -> int:
    """How many of so many are answered."""
    argv = ("ping", "-n", "-i", "0.02", "-c", str(count), "-W", "1", route.address)
    said = route.client.run(*argv, check=False, timeout_s=120).stdout
    found = re.search(r"(\d+) received", said)
    return int(found[1]) if found else 0


def _refused(node: Place) -> int:
    """Packets that the kernel did not send since a state's sequence number was used up."""
    for line in node.run("cat", "/proc/net/xfrm_stat").stdout.splitlines():
        name, value = line.split()
        if name == "XfrmOutStateSeqError":
            return int(value)
    return 0
