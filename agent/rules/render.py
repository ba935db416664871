"""The nftables table of one task, as text. Pure: the same values give the same text, so its digest tells a change.

The table balances the VIPs of linked services among their tasks, in the task's own namespace and before Docker's
chains; and where the mode is ``enforce`` it closes whatever is no link: on the WireGuard interface all but the ports
of links, on the overlay interfaces everything. The ways through docker_gwbridge, the ingress network and loopback
(where Docker's DNS answers) stay as Docker made them.

What is closed is noted: one counter and one dynamic set per reason, both of the same name. A set holds source,
destination, protocol and port with a counter each, forgets what was quiet for a while, and has a fixed size; what
finds no room is counted as ``unlisted``. In ``observe`` the same is noted for new connections, and nothing is closed.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address

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
class RuleSet:
    enforce: bool
    overlay_interfaces: tuple[str, ...]
    backends: tuple[Backends, ...]
    sources: tuple[Source, ...]


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
    # Docker's own chains sit at -100 (dstnat): ours must choose the backend before they see the packet.
    yield from _chain("vips", "type nat hook output priority -110; policy accept;", map(_balance, _served(rules)))
    overlay = _set(f'"{name}"' for name in rules.overlay_interfaces)
    yield from _chain(
        "input",
        "type filter hook input priority 0; policy accept;",
        [
            f'iifname "{WIREGUARD}" jump from_peers',
            *([f"iifname {overlay} jump from_overlay"] if rules.overlay_interfaces else []),
        ],
    )
    only_new = "" if enforce else "ct state new "
    yield from _chain(
        "output",
        "type filter hook output priority 0; policy accept;",
        [
            *(f"ip daddr {b.vip} {only_new}{goto(_NO_BACKEND)}" for b in rules.backends if not b.addresses),
            *([f"oifname {overlay} jump to_overlay"] if rules.overlay_interfaces else []),
        ],
    )
    if enforce:
        yield from _chain("forward", "type filter hook forward priority 0; policy drop;", ())
    # Nothing is let in for being established alone: each packet needs a link that is there now.
    known = "ct state related accept" if enforce else "ct state != new accept"
    yield from _chain(
        "from_peers",
        "",
        [
            known,
            *(rule for source in rules.sources for rule in _accept(source)),
            f"ip saddr @callers {goto(_WRONG_PORT)}",
            goto(_NO_LINK_IN),
        ],
    )
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


def _served(rules: RuleSet) -> Iterator[Backends]:
    return (b for b in rules.backends if b.addresses)


def _balance(backends: Backends) -> str:
    if len(backends.addresses) == 1:
        return f"ip daddr {backends.vip} dnat ip to {backends.addresses[0]}"
    entries = ", ".join(f"{i} : {a}" for i, a in enumerate(backends.addresses))
    return f"ip daddr {backends.vip} dnat ip to numgen inc mod {len(backends.addresses)} map {{ {entries} }}"


def _accept(source: Source) -> Iterator[str]:
    who = f"ip saddr {_set(map(str, source.addresses))}"
    yield f"{who} icmp type {{ echo-request, echo-reply }} accept"
    if source.ports == ():
        yield f"{who} accept"
    for protocol in Protocol:
        ports = [p for p in source.ports or () if p.protocol is protocol]
        if ports:
            yield f"{who} {protocol.value} dport {_set(_span(p) for p in ports)} accept"
        answers = [p for p in source.answers if p.protocol is protocol]
        if answers:
            is_answer = "ct state established ct direction reply"
            yield f"{who} {protocol.value} sport {_set(_span(p) for p in answers)} {is_answer} accept"


def _span(ports: PortRange) -> str:
    return str(ports.first) if ports.first == ports.last else f"{ports.first}-{ports.last}"


def _set(words: Iterable[str]) -> str:
    return "{ " + ", ".join(words) + " }"


def _chain(name: str, hook: str, rules: Iterable[str]) -> Iterator[str]:
    yield f"\tchain {name} {{"
    if hook:
        yield f"\t\t{hook}"
    for rule in rules:
        yield f"\t\t{rule}"
    yield "\t}"
