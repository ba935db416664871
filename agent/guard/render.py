"""The nftables table of one overlay namespace, as text. Pure: the same rules give the same text and digest.

In such a namespace a bridge joins one veth per local task, one to the node's load balancer and a VXLAN port to the
other nodes. What comes in through anything but the VXLAN port was sent by somebody local, what goes out there is for
somebody local: only local ends are judged, each node judges its own. Both hooks stand around the whole bridge, so that
a frame that is routed by the bridge's own address meets them too. ARP always passes: it tells who has an address.
Frames of WireGuard do not come here at all; its sockets are on the node.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final

from agent.rules.render import UNLISTED, note_name, note_sets
from hivewire.reports import Direction, Reason

TABLE: Final = "bridge hivewire"
UPLINK: Final = "vxlan*"

FROM_TASKS: Final = "from_tasks"
TO_TASKS: Final = "to_tasks"
COUNTERS: Final = (FROM_TASKS, TO_TASKS)
"""Named counters of the table: frames dropped that local tasks sent, and that were meant for them."""
NOTES: Final = {
    FROM_TASKS: note_name(Reason.NO_LINK, Direction.OUT, enforce=True),
    TO_TASKS: note_name(Reason.NO_LINK, Direction.IN, enforce=True),
}
"""Under which name the frames of a counter are noted with their addresses, as the rules of tasks do it."""


@dataclass(frozen=True, slots=True)
class Closed:
    """The default guard: everything passes but frames from and to these."""

    addresses: tuple[IPv4Address, ...]
    macs: tuple[str, ...]
    """Their hardware addresses, which cover IPv6 and addresses that a task gave itself."""
    ports: tuple[int, ...] = ()
    """Their ports of the bridge, by index, which cover whatever a task says of itself; known once it runs."""


@dataclass(frozen=True, slots=True)
class Open:
    """The strict guard: nothing passes but IPv4 from and to these local ends."""

    addresses: tuple[IPv4Address, ...]
    closed_ports: tuple[int, ...] = ()
    """Ports of the bridge, by index, whose tasks are none of these, whatever addresses they give themselves."""


Rules = Closed | Open

SHUT: Final = Open(())
"""What a strict network begins with, before anything is known of it."""


@dataclass(frozen=True, slots=True)
class Count:
    packets: int
    octets: int


def render(rules: Rules) -> tuple[str, str]:
    """The text for ``nft -f`` and its digest, which stands in the table's comment."""
    body = "\n".join(_body(rules))
    digest = hashlib.sha256(body.encode()).hexdigest()[:16]
    return f'table {TABLE} {{\n\tcomment "{digest}"\n{body}\n}}\n', digest


def counting_on(text: str, counts: Mapping[str, Count]) -> str:
    """The text of a table that takes over these counters from the one that it replaces."""
    for name, count in counts.items():
        text = text.replace(_counter(name, Count(0, 0)), _counter(name, count), 1)
    return text


def _body(rules: Rules) -> Iterator[str]:
    for name in COUNTERS:
        yield f"\t{_counter(name, Count(0, 0))}"
    yield from note_sets(NOTES.values())
    for counter, name in NOTES.items():
        yield f"\tchain {name} {{"
        yield from (f"\t\t{rule}" for rule in _noting(name, f'counter name "{counter}" drop'))
        yield "\t}"
    yield from _judged(FROM_TASKS, "prerouting priority -300", "iifname", _judge(rules, "saddr", "iif", FROM_TASKS))
    yield from _judged(TO_TASKS, "postrouting priority 300", "oifname", _judge(rules, "daddr", "oif", TO_TASKS))


def _judge(rules: Rules, end: str, port: str, counter: str) -> Iterator[str]:
    drop, noted = f'counter name "{counter}" drop', f"goto {NOTES[counter]}"
    match rules:
        case Closed(addresses, macs, ports):
            if addresses:
                yield f"ip {end} {_set(map(str, addresses))} {noted}"
            if macs:
                yield f"ether {end} {_set(macs)} {drop}"
            if ports:
                yield f"{port} {_set(map(str, ports))} {drop}"
        case Open(addresses, ports):
            if ports:
                yield f"{port} {_set(map(str, ports))} {noted}"
            if addresses:
                yield f"ip {end} {_set(map(str, addresses))} accept"
            yield noted


def _noting(name: str, drop: str) -> Iterator[str]:
    """Connections are not tracked here: of TCP only what opens one tells which side is the client."""
    entry = f"update @{name} {{ ip saddr . ip daddr . meta l4proto ."
    yield f"counter name {name}"
    yield f"tcp flags & (fin | syn | rst | ack) == syn {entry} tcp dport counter }} {drop}"
    yield f"meta l4proto udp {entry} udp dport counter }} {drop}"
    yield f"meta l4proto != {{ tcp, udp }} {entry} 0 counter }} {drop}"
    yield f"counter name {UNLISTED} {drop}"


def _judged(name: str, hook: str, interface: str, rules: Iterable[str]) -> Iterator[str]:
    """A chain at a hook and the one that it leads to, which has all that looks into sets: decision 18."""
    yield f"\tchain judge_{name} {{"
    yield from (f"\t\t{rule}" for rule in rules)
    yield "\t}"
    yield f"\tchain {name} {{"
    yield f"\t\ttype filter hook {hook}; policy accept;"
    yield f'\t\t{interface} "{UPLINK}" accept'
    yield "\t\tether type arp accept"
    yield f"\t\tgoto judge_{name}"
    yield "\t}"


def _counter(name: str, count: Count) -> str:
    return f"counter {name} {{ packets {count.packets} bytes {count.octets} }}"


def _set(words: Iterable[str]) -> str:
    return "{ " + ", ".join(words) + " }"
