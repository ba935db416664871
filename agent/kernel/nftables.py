"""Hivewire's nftables table in a task's namespace: read what is in force and what it noted, replace it, remove it.

The table's comment carries the digest of the rules and how many of what the kernel must hold for them, so telling
what is applied costs a few netlink dumps, no process and no memory of what was applied; so do its counters, and one
dump more per set that they say has something new. A table is made by ``nft``, in one transaction, and put in the place
of another one in steps, so that no packet is judged by a half of either.
"""

import errno
import hashlib
import re
import struct
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final

from agent.kernel.decode import attributes
from agent.kernel.encode import attribute
from agent.kernel.rtnetlink import Netlink, Request
from agent.observed import NotedCounters, NotedEntry
from agent.rules.render import FORGET_S
from hivewire.errors import KernelBusy, NoWireGuard

TABLE: Final = "hivewire"
FAMILIES: Final = ("ip", "inet")
"""Of a task's table. Two: an older version may have used the other one."""
_NUMBERS: Final = {"ip": 2, "inet": 1, "bridge": 7}
"""As the kernel calls families (linux/netfilter.h)."""

ALTERED: Final = "altered"
"""In the place of a digest: there is a table, and it does not hold what its comment says."""

# linux/netfilter/nfnetlink.h, nf_tables.h; libnftnl/udata.h for the comment.
_NFNL_SUBSYS_NFTABLES: Final = 10
_NFT_MSG_GETTABLE: Final = 1
_NFT_MSG_DELTABLE: Final = 2
_NFT_MSG_DELCHAIN: Final = 5
_NFTA_TABLE_NAME: Final = 1
_NFTA_TABLE_FLAGS: Final = 2
_NFTA_TABLE_HANDLE: Final = 4
_NFTA_TABLE_USERDATA: Final = 6
_NFT_TABLE_F_DORMANT: Final = 1
_UDATA_TABLE_COMMENT: Final = 0
_NFTA_NAME: Final = 2
"""Of a set or an object; every part names its table in attribute 1 (_NFTA_OBJ_TABLE)."""
_NFT_MSG_GETCHAIN: Final = 4
_NFTA_CHAIN_HANDLE: Final = 2
_NFTA_CHAIN_NAME: Final = 3
_NFTA_CHAIN_HOOK: Final = 4
_NFTA_CHAIN_POLICY: Final = 5
_NFT_MSG_GETRULE: Final = 7
_NFTA_RULE_HANDLE: Final = 3
_NFT_MSG_GETSET: Final = 10
_NFTA_SET_FLAGS: Final = 3
_NFTA_SET_HANDLE: Final = 16
_NFT_SET_ANONYMOUS: Final = 1
_NFT_SET_EVAL: Final = 0x20
"""Filled by rules: what it holds is nobody's word."""
_NFTA_OBJ_HANDLE: Final = 6
_NF_DROP: Final = 0
_NFPROTO_INET: Final = 1
_NFT_MSG_GETOBJ: Final = 19
_NFTA_OBJ_TABLE: Final = 1
_NFTA_OBJ_NAME: Final = 2
_NFTA_OBJ_TYPE: Final = 3
_NFTA_OBJ_DATA: Final = 4
_NFT_OBJECT_COUNTER: Final = 1
_NFTA_COUNTER_PACKETS: Final = 2
_NFT_MSG_GETSETELEM: Final = 13
_NFTA_SET_ELEM_LIST_TABLE: Final = 1
_NFTA_SET_ELEM_LIST_SET: Final = 2
_NFTA_SET_ELEM_LIST_ELEMENTS: Final = 3
_NFTA_SET_ELEM_KEY: Final = 1
_NFTA_SET_ELEM_TIMEOUT: Final = 4
_NFTA_SET_ELEM_EXPIRATION: Final = 5
_NFTA_SET_ELEM_EXPR: Final = 7
_NFTA_SET_ELEM_EXPRESSIONS: Final = 11
_NFTA_DATA_VALUE: Final = 1
_NFTA_EXPR_DATA: Final = 2
_BODY_AT: Final = 20
"""Netlink header (16 bytes) and struct nfgenmsg (4 bytes), which begins with the family."""
_FAMILY_AT: Final = 16

_KEY: Final = struct.Struct("!4s4sB3xH2x")
"""Source, destination, protocol, port: each part of a key fills whole words of 4 bytes."""

_DECLARED: Final = re.compile(rf"table (?:{'|'.join(_NUMBERS)}) {TABLE} \{{")
_BLOCK: Final = re.compile(r"\s*(chain|set|counter|map) (\S+) \{")
_COMMENT: Final = re.compile(r'(\s*comment "[^" ]*)"')
_HOOK: Final = re.compile(r"\s*type \S+ hook ")
_ADDRESS: Final = re.compile(r"\d+\.\d+\.\d+\.\d+")
_NFT_S: Final = 30


@dataclass(frozen=True, slots=True)
class _Census:
    """What a table must hold. The comment says it after the digest."""

    chains: int
    rules: int
    drops: int
    """Chains with policy drop."""
    elements: str
    """Digest of the elements of named sets that rules do not fill."""

    def __str__(self) -> str:
        return f"{self.chains} {self.rules} {self.drops} {self.elements}"


def applied(netlink: Netlink) -> str:
    """The digest of the rules that are in force; empty where there is no table, ALTERED where somebody changed it.

    Raises OSError, KernelBusy.
    """
    found = list(_tables(netlink))
    if not found:
        return ""
    if any(name != TABLE for _, name, _ in found):
        return ALTERED
    family, _, table = found[0]
    said, _, census = comment(table.get(_NFTA_TABLE_USERDATA, b"")).partition(" ")
    is_dormant = _number(table.get(_NFTA_TABLE_FLAGS, b"")) & _NFT_TABLE_F_DORMANT
    return said if said and not is_dormant and census == _held(netlink, family) else ALTERED


def _held(netlink: Netlink, family: int) -> str:
    """The census of the table, empty where it is not as one transaction made it.

    A table gives out its handles in order and never again (nf_tables_alloc_handle in net/netfilter/nf_tables_api.c):
    where nothing was put in the place of something else, the highest is the number of its parts. What is not noticed:
    "nft replace rule" of a rule without a set of its own, which newer kernels give the handle of the old one (seen on
    Linux 6.18).
    """
    chains = _parts(netlink, _NFT_MSG_GETCHAIN, family)
    rules = _parts(netlink, _NFT_MSG_GETRULE, family)
    sets = _parts(netlink, _NFT_MSG_GETSET, family)
    objects = _parts(netlink, _NFT_MSG_GETOBJ, family)
    handles = {_number(part.get(_NFTA_CHAIN_HANDLE, b"")) for part in chains}
    handles |= {_number(part.get(_NFTA_RULE_HANDLE, b"")) for part in rules}
    handles |= {_number(part.get(_NFTA_SET_HANDLE, b"")) for part in sets}
    handles |= {_number(part.get(_NFTA_OBJ_HANDLE, b"")) for part in objects}
    parts = len(chains) + len(rules) + len(sets) + len(objects)
    if len(handles) != parts or max(handles, default=0) != parts:
        return ""
    drops = [part for part in chains if part.get(_NFTA_CHAIN_POLICY) == _NF_DROP.to_bytes(4, "big")]
    names = [
        part.get(_NFTA_NAME, b"").rstrip(bytes(1)).decode(errors="replace")
        for part in sets
        if not _number(part.get(_NFTA_SET_FLAGS, b"")) & (_NFT_SET_ANONYMOUS | _NFT_SET_EVAL)
    ]
    elements = [(name, key) for name in names for key in _keys(netlink, name, family)]
    return str(_Census(len(chains), len(rules), len(drops), _elements_digest(elements)))


def _parts(netlink: Netlink, kind: int, family: int = _NFPROTO_INET, table: str = TABLE) -> list[dict[int, bytes]]:
    """All of one kind that a table has."""
    wanted = attribute(_NFTA_OBJ_TABLE, _text(table))
    found = (dict(attributes(each, _BODY_AT)) for each in netlink.dump(_request(kind, family, wanted)))
    # Not every kernel heeds the table in a question for all of a kind.
    return [part for part in found if part.get(_NFTA_OBJ_TABLE) == _text(table)]


def _keys(netlink: Netlink, name: str, family: int) -> Iterator[bytes]:
    for message in _listing(netlink, name, family):
        listed = dict(attributes(message, _BODY_AT)).get(_NFTA_SET_ELEM_LIST_ELEMENTS, b"")
        for _, element in attributes(listed, 0):
            key = dict(attributes(element, 0)).get(_NFTA_SET_ELEM_KEY, b"")
            yield dict(attributes(key, 0)).get(_NFTA_DATA_VALUE, b"")


def _elements_digest(elements: Iterable[tuple[str, bytes]]) -> str:
    lines = sorted(f"{name} {key.hex()}" for name, key in elements)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _announced(text: str) -> _Census:
    """What a kernel holds that took this text, in which each rule, hook and list of elements has a line."""
    chains, rules, drops, elements, kind, name = 0, 0, 0, list[tuple[str, bytes]](), "", ""
    for line in text.splitlines()[1:]:
        if (block := _BLOCK.fullmatch(line)) is not None:
            kind, name = block.groups()
            chains += kind == "chain"
        elif line.strip() == "}":
            kind = ""
        elif kind == "chain":
            is_hook = _HOOK.match(line) is not None
            rules += not is_hook
            drops += is_hook and "policy drop;" in line
        elif kind == "set" and line.strip().startswith("elements"):
            elements += [(name, IPv4Address(word).packed) for word in _ADDRESS.findall(line)]
    return _Census(chains, rules, drops, _elements_digest(elements))


def counters(netlink: Netlink, family: int = _NFPROTO_INET) -> NotedCounters:
    """The named counters of Hivewire's table, and which table that is. Raises OSError, KernelBusy."""
    generation = _number(_table(netlink).get(_NFTA_TABLE_HANDLE, b""))
    if not generation:
        return NotedCounters()
    wanted = attribute(_NFTA_OBJ_TABLE, _text(TABLE))
    wanted += attribute(_NFTA_OBJ_TYPE, _NFT_OBJECT_COUNTER.to_bytes(4, "big"))
    packets = {}
    for message in netlink.dump(_request(_NFT_MSG_GETOBJ, family, wanted)):
        found = dict(attributes(message, _BODY_AT))
        # An older kernel answers for all tables.
        if found.get(_NFTA_OBJ_TABLE) == _text(TABLE):
            name = found.get(_NFTA_OBJ_NAME, b"").rstrip(bytes(1)).decode(errors="replace")
            packets[name] = _packets(found.get(_NFTA_OBJ_DATA, b""))
    return NotedCounters(generation, packets)


def entries(netlink: Netlink, name: str, family: int = _NFPROTO_INET) -> tuple[NotedEntry, ...]:
    """The entries of one set of Hivewire's table; nothing where there is none. Raises OSError, KernelBusy."""
    return tuple(entry for message in _listing(netlink, name, family) for entry in _entries(message))


def _listing(netlink: Netlink, name: str, family: int) -> list[bytes]:
    wanted = attribute(_NFTA_SET_ELEM_LIST_TABLE, _text(TABLE)) + attribute(_NFTA_SET_ELEM_LIST_SET, _text(name))
    try:
        return netlink.dump(_request(_NFT_MSG_GETSETELEM, family, wanted))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return []
        raise


def _table(netlink: Netlink) -> dict[int, bytes]:
    """Attributes of Hivewire's table; nothing where there is none."""
    return next((table for _, name, table in _tables(netlink) if name == TABLE), {})


def _tables(netlink: Netlink, table: str = TABLE) -> Iterator[tuple[int, str, dict[int, bytes]]]:
    """Family, name and attributes of the tables of this name and of that which follows it."""
    try:
        messages = netlink.dump(_request(_NFT_MSG_GETTABLE, 0, b""))
    except OSError as error:
        # What nfnetlink answers for a part of it that the kernel does not have.
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return
        raise
    names = {_text(name): name for name in (table, following(table))}
    for message in messages:
        found = dict(attributes(message, _BODY_AT))
        if (name := names.get(found.get(_NFTA_TABLE_NAME, b""))) is not None:
            yield message[_FAMILY_AT], name, found


def _request(kind: int, family: int, wanted: bytes) -> Request:
    return Request(_NFNL_SUBSYS_NFTABLES << 8 | kind, struct.pack("=BBH", family, 0, 0) + wanted)


def _entries(message: bytes) -> Iterator[NotedEntry]:
    listed = dict(attributes(message, _BODY_AT)).get(_NFTA_SET_ELEM_LIST_ELEMENTS, b"")
    for _, element in attributes(listed, 0):
        found = dict(attributes(element, 0))
        key = dict(attributes(found.get(_NFTA_SET_ELEM_KEY, b""), 0)).get(_NFTA_DATA_VALUE, b"")
        if len(key) != _KEY.size:
            continue
        source, destination, protocol, port = _KEY.unpack(key)
        left_ms = _number(found.get(_NFTA_SET_ELEM_EXPIRATION, b""))
        # The kernel may leave the timeout out where it is that of the set.
        timeout_ms = _number(found.get(_NFTA_SET_ELEM_TIMEOUT, b"")) or FORGET_S * 1000
        idle_ms = max(0, timeout_ms - left_ms) if left_ms else 0
        expression = found.get(_NFTA_SET_ELEM_EXPR, b"")
        if not expression:
            several = attributes(found.get(_NFTA_SET_ELEM_EXPRESSIONS, b""), 0)
            expression = next((value for _, value in several), b"")
        packets = _packets(dict(attributes(expression, 0)).get(_NFTA_EXPR_DATA, b""))
        yield NotedEntry(IPv4Address(source), IPv4Address(destination), protocol, port, packets, idle_ms / 1000)


def _packets(data: bytes) -> int:
    return _number(dict(attributes(data, 0)).get(_NFTA_COUNTER_PACKETS, b""))


def _number(data: bytes) -> int:
    return int.from_bytes(data, "big")


def _text(word: str) -> bytes:
    return word.encode() + bytes(1)


def comment(userdata: bytes) -> str:
    """The comment in a table's user data: type, length, value, as libnftnl writes them. Empty where there is none."""
    offset = 0
    while offset + 2 <= len(userdata):
        kind, size = userdata[offset], userdata[offset + 1]
        if kind == _UDATA_TABLE_COMMENT:
            return userdata[offset + 2 : offset + 2 + size].rstrip(bytes(1)).decode(errors="replace")
        offset += 2 + size
    return ""


def replace(netlink: Netlink | None, run: Callable[[str], None], text: str, families: Iterable[str] = FAMILIES) -> None:
    """Exchange Hivewire's tables of these families for the one that the text declares, with its census in the comment.

    Raises as ``exchange`` does.
    """
    if not _DECLARED.match(text):
        raise KernelBusy(f"the rules do not declare the table {TABLE}")
    exchange(netlink, run, _declaration(text), TABLE, families)


def exchange(
    netlink: Netlink | None, run: Callable[[str], None], text: str, table: str, families: Iterable[str]
) -> None:
    """Put the table that the text declares in the place of those of its name in these families.

    ``netlink`` is of the namespace, None where its kernel has no nftables; ``run`` carries out transactions there.
    Raises KernelBusy, OSError, and what ``run`` raises.

    A packet keeps the rules that it met when it came to a hook, but sets are looked up as they are at that time: where
    a transaction takes rules and their sets away together, it finds nothing. Then what a link allows is dropped, or
    passes what a guard should stop (nft_do_chain, nft_set_elem_active in net/netfilter; some packets in a hundred
    exchanges under load). So another table of the same rules judges meanwhile, and of the old one the chains at hooks
    go first, then what they looked up. What breaks off leaves a table that judges, and the other one, with which the
    next exchange begins.
    """
    if netlink is None or not (there := _there(netlink, families, table)):
        run(text)
        return
    family, other = text.split(maxsplit=2)[1], following(table)
    former = [each for each, name in there if name == table]
    if (family, other) in there and any(_heads(netlink, each, table) for each in former):
        _retire(netlink, family, other)
        there.remove((family, other))
    if (family, other) not in there:
        run(text.replace(f"table {family} {table} ", f"table {family} {other} ", 1))
    for each in former:
        _behead(netlink, each, table)
    run("".join(f"delete table {each} {table}\n" for each in former) + text)
    _retire(netlink, family, other)


def remove(netlink: Netlink | None, families: Iterable[str] = FAMILIES, table: str = TABLE) -> None:
    """Leave no table of this name, in the order of ``exchange``. Raises KernelBusy, OSError."""
    if netlink is not None:
        for family, name in _there(netlink, families, table):
            _retire(netlink, family, name)


def following(table: str) -> str:
    """The name of the table that judges while this one is exchanged; else there is none."""
    return f"{table}_next"


def _there(netlink: Netlink, families: Iterable[str], table: str) -> list[tuple[str, str]]:
    """Family and name of the tables of this name and of that which follows it."""
    names = {_NUMBERS[family]: family for family in families}
    return [(names[number], name) for number, name, _ in _tables(netlink, table) if number in names]


def _retire(netlink: Netlink, family: str, table: str) -> None:
    """Remove a table of which no packet needs anything any more once it has no chain at a hook."""
    _behead(netlink, family, table)
    named = attribute(_NFTA_TABLE_NAME, _text(table))
    netlink.transact(_NFNL_SUBSYS_NFTABLES, [_request(_NFT_MSG_DELTABLE, _NUMBERS[family], named)])


def _behead(netlink: Netlink, family: str, table: str) -> None:
    """Take the chains of a table from their hooks; what those lead to stays."""
    number, named = _NUMBERS[family], attribute(_NFTA_OBJ_TABLE, _text(table))
    requests = [
        _request(_NFT_MSG_DELCHAIN, number, named + attribute(_NFTA_CHAIN_NAME, head))
        for head in _heads(netlink, family, table)
    ]
    if requests:
        netlink.transact(_NFNL_SUBSYS_NFTABLES, requests)


def _heads(netlink: Netlink, family: str, table: str) -> list[bytes]:
    """Names of the chains at hooks."""
    chains = _parts(netlink, _NFT_MSG_GETCHAIN, _NUMBERS[family], table)
    return [chain[_NFTA_CHAIN_NAME] for chain in chains if _NFTA_CHAIN_HOOK in chain]


def _declaration(text: str) -> str:
    """The text with the census in its comment."""
    return _COMMENT.sub(rf'\1 {_announced(text)}"', text, count=1)


def creation(text: str, family: str) -> str:
    """The transaction that makes the table that the text declares, and fails where there is one."""
    declared = _declaration(text)
    said = re.search(r'comment "[^"]*"', declared)
    # Only its own command gives a table a comment, and nft 1.0.6 loses what else stands in the block of a "create".
    return f"create table {family} {TABLE} {{ {said[0] if said else ''}; }}\n{declared}"


def apply(transaction: str) -> None:
    """Carry the transaction out in the namespace of the calling thread, in which a child starts.

    A process, not libnftables in this one: before it changes anything it reads what the namespace has, which a task
    with CAP_NET_ADMIN writes, and some of that crashes it (decision 10). Raises KernelBusy, NoWireGuard without nft.
    """
    try:
        done = subprocess.run(
            ["nft", "-f", "-"], input=transaction, text=True, capture_output=True, timeout=_NFT_S, check=False
        )
    except FileNotFoundError as error:
        raise NoWireGuard("nft is missing: install the package nftables") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelBusy(f"nft did not run: {error}") from error
    if done.returncode < 0:
        raise KernelBusy(
            f"nft crashed (signal {-done.returncode}) on the tables of this namespace: remove what the task put there"
        )
    if done.returncode != 0:
        raise KernelBusy(_reason(done.stderr))


def _reason(text: str) -> str:
    first = text.strip().splitlines()[:1]
    return f"nftables refused the rules: {first[0] if first else 'no reason given'}"
