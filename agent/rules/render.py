"""The nftables table of one task, as text. Pure: the same values give the same text, so its digest tells a change.

The table balances the VIPs of linked services among their tasks, in the task's own namespace and before Docker's
chains; and where the mode is ``enforce`` it closes whatever is no link: on the WireGuard interface all but the ports
of links, on the overlay interfaces everything. The ways through docker_gwbridge, the ingress network and loopback
(where Docker's DNS answers) stay as Docker made them; but other tasks of the node, who share docker_gwbridge, are no
way out. Docker keeps them apart in the node's own firewall, for IPv4 only and until somebody flushes it.

What a packet costs does not grow with the links: its source leads to the few rules of its service by one look into a
map, and so does a VIP to its backends.

What is closed is noted: one counter and one dynamic set per reason, both of the same name. A set holds source,
destination, protocol and port with a counter each, forgets what was quiet for a while, and has a fixed size; what
finds no room is counted as ``unlisted``. In ``observe`` the same is noted for new connections, and nothing is closed.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface
from typing import Final

from hivewire.records import PortRange, Protocol
from hivewire.reports import Direction, Reason

TABLE = "inet hivewire"
WIREGUARD = "wg0"

UNLISTED = "unlisted"
"""Counter of what was noted without its addresses: no room in the set, or no IPv4."""
FLOWS = "flows"
"""Counter and set of connections over overlay networks that were there before the table, in ``observe`` only."""
ENTRIES = 1024
"""How many entries one set holds at most; some 150 bytes each."""
FORGET_S = 300
"""A set forgets an entry that nothing was added to for this long."""

# Chains, one for each of its kind.
_PEERS: Final = "peers_"
_VIP: Final = "vip_"
_ERRORS: Final = "icmp type { destination-unreachable, time-exceeded, parameter-problem }"


@dataclass(frozen=True, slots=True)
class Backends:
    """A VIP and the tasks behind it."""

    vip: IPv4Address
    source: IPv4Address
    """The task's own address on the VIP's network."""
    addresses: tuple[IPv4Address, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """Tasks of a linked service, and the ports that they may open connections to."""

    name: str
    addresses: tuple[IPv4Address, ...]
    ports: tuple[PortRange, ...] | None
    """Empty: all. None: none, the link goes the other way."""
    answers: tuple[PortRange, ...] = ()
    """The ports of theirs that answer to our own connections."""


@dataclass(frozen=True, slots=True)
class WayOut:
    """The task's interface on docker_gwbridge, and the node's end of that bridge: the only one to talk with there."""

    interface: str
    gateway: IPv4Interface
    mac: str
    """Of the bridge itself: what it routes comes from there, what comes from another task does not."""


@dataclass(frozen=True, slots=True)
class RuleSet:
    enforce: bool
    overlay_interfaces: tuple[str, ...]
    backends: tuple[Backends, ...]
    sources: tuple[Source, ...]
    way_out: WayOut | None = None


def render(rules: RuleSet) -> tuple[str, str]:
    """The text for ``nft -f`` and its digest, which stands in the table's comment."""
    body = "\n".join(_chains(rules))
    digest = hashlib.sha256(body.encode()).hexdigest()[:16]
    return f'table {TABLE} {{\n\tcomment "{digest}"\n{body}\n}}\n', digest


def note_name(reason: Reason, direction: Direction, *, enforce: bool) -> str:
    """The name of the counter, of the set and of the chain that note this."""
    return f"{'denied' if enforce else 'passed'}_{reason.value}_{direction.value}"


@dataclass(frozen=True, slots=True)
class _Note:
    """Something that no link allows, at one place."""

    reason: Reason
    direction: Direction
    may_answer: bool
    """Whether the packet may belong to a connection that the other side opened."""

    def verdict(self, *, enforce: bool) -> str:
        if not enforce:
            return "accept"
        return "reject with icmp host-unreachable" if self.reason is Reason.NO_BACKEND else "drop"


_WRONG_PORT = _Note(Reason.WRONG_PORT, Direction.IN, may_answer=True)
_NO_LINK_IN = _Note(Reason.NO_LINK, Direction.IN, may_answer=True)
_PLAINTEXT_IN = _Note(Reason.PLAINTEXT, Direction.IN, may_answer=True)
_NO_LINK_OUT = _Note(Reason.NO_LINK, Direction.OUT, may_answer=True)
_PLAINTEXT_OUT = _Note(Reason.PLAINTEXT, Direction.OUT, may_answer=True)
_NO_BACKEND = _Note(Reason.NO_BACKEND, Direction.OUT, may_answer=False)
_NOTES = (_WRONG_PORT, _NO_LINK_IN, _PLAINTEXT_IN, _NO_LINK_OUT, _PLAINTEXT_OUT, _NO_BACKEND)


def _chains(rules: RuleSet) -> Iterator[str]:
    enforce = rules.enforce

    def goto(note: _Note) -> str:
        return f"goto {note_name(note.reason, note.direction, enforce=enforce)}"

    yield from _names(rules)
    vips = {b.vip: b for b in rules.backends}
    served = [b for b in vips.values() if b.addresses]
    # Docker's own chains sit at -100 (dstnat): ours must choose the backend before they see the packet.
    yield from _chain(
        "vips",
        "type nat hook output priority -110; policy accept;",
        _by_address("daddr", [((b.vip,), f"goto {_VIP}{n}") for n, b in enumerate(served, 1)]),
    )
    for n, backends in enumerate(served, 1):
        yield from _chain(f"{_VIP}{n}", "", [_balance(backends)])
    overlay = _set(f'"{name}"' for name in rules.overlay_interfaces)
    only_new = "" if enforce else "ct state new "
    unserved = (
        [f"ip daddr {_set(dead)} {only_new}{goto(_NO_BACKEND)}"]
        if (dead := [str(vip) for vip, b in vips.items() if not b.addresses])
        else []
    )
    sideways_in, sideways_out = aside(rules.way_out)
    yield from _chain(
        "input",
        "type filter hook input priority 0; policy accept;",
        [
            f'iifname "{WIREGUARD}" jump from_peers',
            *([f"iifname {overlay} jump from_overlay"] if rules.overlay_interfaces else []),
            *(answers(rules.way_out, "iifname") if enforce else ()),
            # What neighbours' kernels say to all of a bridge is nobody's attempt.
            *(f"{match} meta l4proto {{ igmp, ipv6-icmp }} drop" for match in sideways_in if enforce),
            *(f"{match} {only_new}{goto(_NO_LINK_IN)}" for match in sideways_in),
        ],
    )
    yield from _chain(
        "output",
        "type filter hook output priority 0; policy accept;",
        [
            *unserved,
            *([f"oifname {overlay} jump to_overlay"] if rules.overlay_interfaces else []),
            *(answers(rules.way_out, "oifname") if enforce else ()),
            *(f"{match} {only_new}{goto(_NO_LINK_OUT)}" for match in sideways_out),
        ],
    )
    if enforce:
        yield from _chain("forward", "type filter hook forward priority 0; policy drop;", ())
    # Nothing is let in for being established alone: each packet needs a link that is there now. What is related is an
    # error about a packet of ours, by which a path's MTU is learned; that somebody knows a better gateway is none.
    known = f"{_ERRORS} ct state related accept" if enforce else "ct state != new accept"
    groups = _groups(rules.sources)
    yield from _chain(
        "from_peers",
        "",
        [
            *([] if enforce else [known]),
            *_by_address("saddr", [(addresses, f"jump {_PEERS}{n}") for n, (addresses, _) in enumerate(groups, 1)]),
            *([known] if enforce else []),
            f"ip saddr @callers {goto(_WRONG_PORT)}",
            goto(_NO_LINK_IN),
        ],
    )
    for n, (_, group) in enumerate(groups, 1):
        yield from _chain(f"{_PEERS}{n}", "", _accept(group))
    # A connection from before is told apart from new ones, and looked at now and then only: it may carry anything.
    older = f"ct state established limit rate 50/second burst 100 packets goto {FLOWS}"
    there = () if enforce else (older, known)
    yield from _chain("from_overlay", "", [*there, f"ip saddr @peers {goto(_PLAINTEXT_IN)}", goto(_NO_LINK_IN)])
    yield from _chain("to_overlay", "", [*there, f"ip daddr @peers {goto(_PLAINTEXT_OUT)}", goto(_NO_LINK_OUT)])
    for note in _NOTES:
        name, verdict = note_name(note.reason, note.direction, enforce=enforce), note.verdict(enforce=enforce)
        # In ``observe`` only new connections come here, and the first packet of one is no answer.
        yield from _chain(name, "", _noting(name, verdict, may_answer=note.may_answer and enforce))
    if not enforce:
        yield from _chain(FLOWS, "", _noting(FLOWS, "accept", may_answer=True))


def _names(rules: RuleSet) -> Iterator[str]:
    """Counters and sets: declared before the chains that use them."""
    noted = [note_name(note.reason, note.direction, enforce=rules.enforce) for note in _NOTES]
    noted += [] if rules.enforce else [FLOWS]
    yield from note_sets(noted)
    yield from _addresses("peers", rules.sources)
    yield from _addresses("callers", (source for source in rules.sources if source.ports is not None))


def note_sets(names: Iterable[str]) -> Iterator[str]:
    """A counter and a set for each name, and the counter of what is not in a set."""
    noted = tuple(names)
    for name in (*noted, UNLISTED):
        yield f"\tcounter {name} {{"
        yield "\t}"
    for name in noted:
        yield f"\tset {name} {{"
        yield "\t\ttype ipv4_addr . ipv4_addr . inet_proto . inet_service"
        yield f"\t\tsize {ENTRIES}"
        yield "\t\tflags dynamic,timeout"
        yield f"\t\ttimeout {FORGET_S}s"
        yield "\t}"


def _addresses(name: str, sources: Iterable[Source]) -> Iterator[str]:
    yield f"\tset {name} {{"
    yield "\t\ttype ipv4_addr"
    addresses = sorted({address for source in sources for address in source.addresses})
    if addresses:
        yield f"\t\telements = {_set(map(str, addresses))}"
    yield "\t}"


def _noting(name: str, verdict: str, *, may_answer: bool) -> Iterator[str]:
    """Count, list, decide. Where the set is full a rule ends before its verdict, and the last one counts that."""
    protocols = _set(p.value for p in Protocol)
    yield f"counter name {name}"
    if may_answer:
        entry = "ip daddr . ip saddr . meta l4proto . th sport"
        yield f"meta l4proto {protocols} ct direction reply update @{name} {{ {entry} counter }} {verdict}"
    entry = "ip saddr . ip daddr . meta l4proto ."
    yield f"meta l4proto {protocols} update @{name} {{ {entry} th dport counter }} {verdict}"
    yield f"meta l4proto != {protocols} update @{name} {{ {entry} 0 counter }} {verdict}"
    yield f"counter name {UNLISTED} {verdict}"


def _by_address(end: str, verdicts: Sequence[tuple[Iterable[IPv4Address], str]]) -> Iterator[str]:
    """One rule that finds the verdict of an address, however many there are."""
    entries = [f"{address} : {verdict}" for addresses, verdict in verdicts for address in addresses]
    if entries:
        yield f"ip {end} vmap {_set(entries)}"


def aside(way_out: WayOut | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What tells a packet from or to another task on docker_gwbridge: coming in and going out.

    Coming in it is what the bridge did not send, IPv6 included. Going out, groups are everybody; of those what the
    kernel itself says is left alone. Answers are none of it: where a published port of this node is asked for by a task
    of this node, the node translates addresses, and the two ends then talk past it.
    """
    if way_out is None:
        return (), ()
    to, gateway = f'oifname "{way_out.interface}"', way_out.gateway
    others = _set((str(gateway.network), "224.0.0.0/4", "255.255.255.255"))
    return (f'iifname "{way_out.interface}" ether saddr != {way_out.mac}',), (
        f"{to} ip daddr {others} ip daddr != {gateway.ip} ip protocol != igmp",
        f"{to} ip6 daddr {{ fe80::/10, ff00::/8 }} meta l4proto != ipv6-icmp",
    )


def answers(way_out: WayOut | None, interface: str) -> tuple[str, ...]:
    """On docker_gwbridge, in a connection that the other side opened or was asked for."""
    if way_out is None:
        return ()
    return (f'{interface} "{way_out.interface}" ct state established ct direction reply accept',)


def _groups(sources: Iterable[Source]) -> list[tuple[tuple[IPv4Address, ...], tuple[Source, ...]]]:
    """Addresses of the same rights together: a service may be linked in both directions."""
    rights: dict[IPv4Address, list[Source]] = {}
    for source in sources:
        for address in source.addresses:
            rights.setdefault(address, []).append(source)
    groups: dict[tuple[Source, ...], list[IPv4Address]] = {}
    for address, theirs in sorted(rights.items()):
        groups.setdefault(tuple(theirs), []).append(address)
    return [(tuple(addresses), group) for group, addresses in groups.items()]


def _balance(backends: Backends) -> str:
    if len(backends.addresses) == 1:
        return f"dnat ip to {backends.addresses[0]}"
    entries = ", ".join(f"{i} : {a}" for i, a in enumerate(backends.addresses))
    return f"dnat ip to numgen inc mod {len(backends.addresses)} map {{ {entries} }}"


def _accept(group: Sequence[Source]) -> Iterator[str]:
    """What one address may send: to the ports of links, answers from those of ours, and pings both ways."""
    if any(source.ports == () for source in group):
        yield "accept"
        return
    for protocol in Protocol:
        if ports := _ports(protocol, (source.ports or () for source in group)):
            yield f"{protocol.value} dport {ports} accept"
        if answers := _ports(protocol, (source.answers for source in group)):
            yield f"{protocol.value} sport {answers} ct state established ct direction reply accept"
    yield "icmp type { echo-request, echo-reply } accept"


def _ports(protocol: Protocol, several: Iterable[Iterable[PortRange]]) -> str:
    """Those of the protocol, as a set; empty where there are none. Ranges that meet are joined, as nft wants it."""
    spans: list[tuple[int, int]] = []
    for first, last in sorted((p.first, p.last) for ports in several for p in ports if p.protocol is protocol):
        if spans and first <= spans[-1][1] + 1:
            spans[-1] = (spans[-1][0], max(last, spans[-1][1]))
        else:
            spans.append((first, last))
    return _set(str(first) if first == last else f"{first}-{last}" for first, last in spans) if spans else ""


def _set(words: Iterable[str]) -> str:
    return "{ " + ", ".join(words) + " }"


def _chain(name: str, hook: str, rules: Iterable[str]) -> Iterator[str]:
    yield f"\tchain {name} {{"
    if hook:
        yield f"\t\t{hook}"
    for rule in rules:
        yield f"\t\t{rule}"
    yield "\t}"
