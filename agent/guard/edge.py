"""The nftables table of one strict network in the node's own namespace, as text. Pure.

The guard goes with the namespace that it stands in, and a namespace goes with the last task on it, or with the engine
that made it. The next one is made with the next task, and stands open until an agent is there to shut it. This table
does not go: as an overlay's VXLAN frames pass the node's own namespace on their way from and to other nodes, it lets
through the local ends that the guard lets through, and where there is no guard yet, none. It is there before the
first task of its network is, since a manager's record names the network's VXLAN identifiers.

Offsets are in bits from the UDP header: VXLAN's at 64 with the identifier at 96, the inner Ethernet type at 224, the
inner IPv4 source at 336 and destination at 368 (RFC 7348).
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final

from hivewire.ids import NetworkId
from hivewire.records import GuardRecord

PREFIX: Final = "hivewire-"
_ID_CHARACTERS: Final = 10
"""As in the names of overlay namespaces."""
_VNI, _TYPE, _SOURCE, _DESTINATION = "@th,96,24", "@th,224,16", "@th,336,32", "@th,368,32"


@dataclass(frozen=True, slots=True)
class Edge:
    """What a table says of itself: which rules it holds, and for which VXLAN identifiers."""

    digest: str
    vnis: frozenset[int]

    def __str__(self) -> str:
        return f"{self.digest} {','.join(map(str, sorted(self.vnis)))}"

    @classmethod
    def parse(cls, comment: str) -> "Edge":
        """Of a table's comment; whatever that says, it is one."""
        digest, _, vnis = comment.partition(" ")
        return cls(digest, frozenset(int(each) for each in vnis.split(",") if each.isdecimal()))


def table_of(network: NetworkId) -> str:
    """The name of the network's table."""
    return PREFIX + network[:_ID_CHARACTERS]


def render(record: GuardRecord, addresses: Iterable[IPv4Address] = ()) -> tuple[str, Edge]:
    """The text for ``nft -f`` and what stands in its comment. ``addresses`` are the local ends that are let through."""
    body = "\n".join(_body(record, sorted(addresses)))
    edge = Edge(hashlib.sha256(body.encode()).hexdigest()[:16], frozenset(record.vnis))
    return f'table inet {table_of(record.network)} {{\n\tcomment "{edge}"\n{body}\n}}\n', edge


def _body(record: GuardRecord, addresses: list[IPv4Address]) -> Iterator[str]:
    ours = f"udp dport {record.vxlan_port} {_VNI} {_set(map(str, sorted(record.vnis)))}"
    for hook, judge, end in (("output", "from_tasks", _SOURCE), ("input", "to_tasks", _DESTINATION)):
        yield f"\tchain {hook} {{"
        yield f"\t\ttype filter hook {hook} priority 0; policy accept;"
        yield f"\t\t{ours} jump {judge}"
        yield "\t}"
        yield f"\tchain {judge} {{"
        yield f"\t\t{_TYPE} 0x0806 return"  # ARP
        if addresses:
            yield f"\t\t{_TYPE} 0x0800 {end} {_set(f'0x{int(address):08x}' for address in addresses)} return"
        yield "\t\tcounter drop"
        yield "\t}"


def _set(words: Iterable[str]) -> str:
    return "{ " + ", ".join(words) + " }"
