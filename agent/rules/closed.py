"""The nftables table of a task in quarantine: nothing passes over WireGuard or an overlay network, whatever its links
say and however long a connection has been open. Pure.

Loopback stays, and with it Docker's DNS; so does the way out through docker_gwbridge, which is not the mesh's, but not
the way to other tasks on that bridge.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from agent.rules.render import TABLE, WIREGUARD, WayOut, answers, aside

_PREFIX: Final = "closed-"


@dataclass(frozen=True, slots=True)
class Closed:
    """The text for ``nft -f`` and its digest, which stands in the table's comment."""

    text: str
    digest: str


def closed(overlay_interfaces: Iterable[str], way_out: WayOut | None = None) -> Closed:
    """``overlay_interfaces``: all of them, ingress included."""
    names = ", ".join(f'"{name}"' for name in sorted({WIREGUARD, *overlay_interfaces}))
    ways = zip(("iifname", "oifname"), aside(way_out), strict=True)
    sideways_in, sideways_out = (
        "".join(f"\n\t\t{rule}" for rule in (*answers(way_out, name), *(f"{match} counter drop" for match in matches)))
        for name, matches in ways
    )
    body = f"""\
\tchain input {{
\t\ttype filter hook input priority 0; policy accept;
\t\tiifname {{ {names} }} counter drop{sideways_in}
\t}}
\tchain output {{
\t\ttype filter hook output priority 0; policy accept;
\t\toifname {{ {names} }} counter drop{sideways_out}
\t}}
\tchain forward {{
\t\ttype filter hook forward priority 0; policy drop;
\t}}"""
    digest = _PREFIX + hashlib.sha256(body.encode()).hexdigest()[:16]
    return Closed(f'table {TABLE} {{\n\tcomment "{digest}"\n{body}\n}}\n', digest)


def is_closed(digest: str) -> bool:
    """Whether rules with this digest are those of a quarantine."""
    return digest.startswith(_PREFIX)
