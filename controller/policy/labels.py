"""Read the labels of one service: text in, values and findings out.

Lists are separated by commas and/or ASCII white space; empty entries do not count. A value is read strictly: what is
not understood is an error, never a guess, because a guess would open or close traffic that nobody asked for.

``/`` stands for two things. A trailing ``/tcp`` or ``/udp`` is always a protocol; any other ``/`` before the port
separates a stack from a service. A service that is itself called ``tcp`` is therefore written in full, ``shop_tcp``.

The ``read_*`` functions raise InvalidPolicy; ``parse_labels`` never does: it turns every error into a finding.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Final, TypeVar

from controller.policy.findings import finding, has_error, in_order
from controller.swarm.snapshot import Service
from hivewire.errors import InvalidPolicy
from hivewire.records import Finding, Mode, PortRange, Protocol

LINKS: Final = "hivewire.links"
PORTS: Final = "hivewire.ports"
ALLOW: Final = "hivewire.allow"
ENABLE: Final = "hivewire.enable"
MODE: Final = "hivewire.mode"
NETWORK: Final = "hivewire.network"
ROTATE: Final = "hivewire.rotate"
KEEPALIVE: Final = "hivewire.keepalive"
MTU: Final = "hivewire.mtu"
LABELS: Final = (ALLOW, ENABLE, KEEPALIVE, LINKS, MODE, MTU, NETWORK, PORTS, ROTATE)

LONGEST_VALUE: Final = 8192
MOST_ENTRIES: Final = 256
# The bounds of WireGuard's PersistentKeepalive, a u16 of seconds.
KEEPALIVE_RANGE: Final = (1, 65535)
ROTATE_RANGE: Final = (60, 366 * 24 * 3600)
# 576 is the least that every IPv4 path carries; 80 is what WireGuard adds to a packet over IPv6.
MTU_RANGE: Final = (576, 65535 - 80)

_SHOWN: Final = 60
_BLANKS: Final = " \t\r\n\f\v"
_SEPARATORS: Final = re.compile(r"[,\s]+", re.ASCII)
# What swarmkit takes for the name of a service (manager/controlapi/common.go, at most 63 characters).
_NAME: Final = re.compile(r"[A-Za-z0-9](?:[-_]*[A-Za-z0-9])*")
_NAME_LENGTH: Final = 63
# Network names are freer: anything that Docker's own names may hold.
_NETWORK_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_PORTS: Final = re.compile(r"([0-9]+)(?:-([0-9]+))?")
_PORT_LIKE: Final = re.compile(r"[A-Za-z0-9.+-]+")
_PROTOCOL_LIKE: Final = re.compile(r"[A-Za-z0-9]+")
_DURATION: Final = re.compile(r"(?:[0-9]{1,9}(?:\.[0-9]{1,9})?(?:ms|s|m|h))+")
_DURATION_PART: Final = re.compile(r"([0-9.]+)(ms|s|m|h)")
_UNIT_S: Final = {"ms": Fraction(1, 1000), "s": Fraction(1), "m": Fraction(60), "h": Fraction(3600)}
_BOOLEANS: Final = {"true": True, "1": True, "yes": True, "": True, "false": False, "0": False, "no": False}
_OURS: Final = re.compile(r"hivewire(?:[._:/\s-].*)?", re.DOTALL)
_ELSEWHERE: Final = {
    "hivewire.guard": "hivewire.guard is a label of a network: move it under networks.<name>.labels",
}

_KNOWN: Final = "after hivewire. comes one of " + ", ".join(label.partition(".")[2] for label in LABELS)
_LINK_FORM: Final = "write service:port or service:port/udp, separated by commas"
_PORT_FORM: Final = "write a port, or a port with /udp, separated by commas"
_ALLOW_FORM: Final = "write stack/service, stack/* or a service's full name, separated by commas"
_PORT_HINT: Final = "use the port the service listens on inside its container, not a published port"
_DURATION_HINT: Final = "write a number with a unit: s, m or h, such as 30s, 12h or 1h30m"

T = TypeVar("T")


@dataclass(frozen=True, slots=True, order=True)
class Name:
    """A service as a label names it. ``stack`` is empty where none was written."""

    stack: str
    service: str

    def __str__(self) -> str:
        return f"{self.stack}/{self.service}" if self.stack else self.service


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """One entry of ``hivewire.links``."""

    text: str
    target: Name
    ports: PortRange | None = None
    """None: whatever the target offers."""
    protocol: Protocol | None = None
    """Where no port was written: only this protocol of what the target offers."""


@dataclass(frozen=True, slots=True)
class AllowSpec:
    """One entry of ``hivewire.allow``."""

    text: str
    stack: str = ""
    service: str = ""
    """Empty: every service of the stack. Without a stack: a full name."""

    def admits(self, source: Service) -> bool:
        if not self.stack:
            return source.name == self.service
        if source.stack != self.stack:
            return False
        return not self.service or source.name == f"{self.stack}_{self.service}"


@dataclass(frozen=True, slots=True)
class ParsedLabels:
    """What the labels of one service say. A value is only to be used where ``is_valid``."""

    links: tuple[LinkSpec, ...] = ()
    ports: tuple[PortRange, ...] = ()
    allow: tuple[AllowSpec, ...] = ()
    enable: bool | None = None
    mode: Mode | None = None
    network: str = ""
    rotate_s: int = 0
    keepalive_s: int = 0
    mtu: int = 0
    own: Mapping[str, str] = field(default_factory=dict)
    """The labels that were read, as written."""
    findings: tuple[Finding, ...] = ()

    @property
    def is_valid(self) -> bool:
        return not has_error(self.findings)

    @property
    def is_present(self) -> bool:
        """Whether the service says anything of Hivewire, right or wrong, in the right place or not."""
        return bool(self.own or self.findings)

    @property
    def is_switched_off(self) -> bool:
        return self.enable is False or self.mode is Mode.OFF


class _Bad(InvalidPolicy):
    """What is wrong with a value: becomes a finding."""

    def __init__(self, code: str, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}: {remedy}")
        self.code = code
        self.problem = problem
        self.remedy = remedy


def parse_labels(service: Service) -> ParsedLabels:
    """Read every label of the service that is meant for Hivewire. Raises nothing: errors are findings."""
    found: list[Finding] = _misplaced(service)
    own: dict[str, str] = {}
    for key in sorted(service.labels):
        if key in LABELS:
            own[key] = service.labels[key]
        elif _is_ours(key):
            found.append(_unknown(service, key))
    reader = _Reader(service, own, found)
    links = reader.many(LINKS, read_link, _LINK_FORM)
    ports = reader.many(PORTS, read_ports, _PORT_FORM)
    found.extend(_self_links(service, links))
    found.extend(_repeated_ports(service, LINKS, [(str(s.target), s.ports) for s in links if s.ports]))
    found.extend(_repeated_ports(service, PORTS, [("", p) for p in ports]))
    return ParsedLabels(
        links=links,
        ports=coalesce(ports),
        allow=reader.many(ALLOW, read_allow, _ALLOW_FORM),
        enable=reader.one(ENABLE, read_boolean, None),
        mode=reader.one(MODE, read_mode, None),
        network=reader.one(NETWORK, read_network, ""),
        rotate_s=reader.one(ROTATE, read_rotate, 0),
        keepalive_s=reader.one(KEEPALIVE, read_keepalive, 0),
        mtu=reader.one(MTU, read_mtu, 0),
        own=own,
        findings=in_order(found),
    )


class _Reader:
    """Applies a ``read_*`` function to a label and keeps what goes wrong as findings."""

    def __init__(self, service: Service, own: Mapping[str, str], found: list[Finding]) -> None:
        self._service = service
        self._own = own
        self._found = found

    def one(self, label: str, read: Callable[[str], T], default: T) -> T:
        value = self._own.get(label)
        if value is None:
            return default
        try:
            return read(value.strip(_BLANKS))
        except _Bad as bad:
            self._keep(label, bad)
            return default

    def many(self, label: str, read: Callable[[str], T], form: str) -> tuple[T, ...]:
        value = self._own.get(label, "")
        try:
            entries = split_list(value)
        except _Bad as bad:
            self._keep(label, bad)
            return ()
        good: list[T] = []
        for entry in entries:
            try:
                good.append(read(entry))
            except _Bad as bad:
                self._keep(label, bad)
        return tuple(good)

    def _keep(self, label: str, bad: _Bad) -> None:
        message = f"{label}: {bad.problem}"
        self._found.append(finding(bad.code, self._service.name, message, bad.remedy, label=label))


def split_list(value: str) -> tuple[str, ...]:
    """The entries of a list. Raises InvalidPolicy where there is more than anybody means."""
    if len(value) > LONGEST_VALUE:
        raise _Bad("HW115", f"has {len(value)} characters, {LONGEST_VALUE} are the most", "shorten it")
    entries = tuple(entry for entry in _SEPARATORS.split(value) if entry)
    if len(entries) > MOST_ENTRIES:
        problem = f"has {len(entries)} entries, {MOST_ENTRIES} are the most"
        raise _Bad("HW115", problem, "write neighbouring ports as a range, such as 3000-3100")
    return entries


def read_link(text: str) -> LinkSpec:
    """Read ``[STACK/]SERVICE[:PORT[-PORT]][/tcp|/udp]``. Raises InvalidPolicy."""
    name, colon, rest = text.partition(":")
    if not colon:
        name, protocol = _cut_protocol(text)
        return LinkSpec(text, _name(text, name), None, protocol)
    target = _name(text, name)
    return LinkSpec(text, target, _port_range(text, rest, _LINK_FORM))


def read_ports(text: str) -> PortRange:
    """Read ``PORT[-PORT][/tcp|/udp]``. Raises InvalidPolicy."""
    return _port_range(text, text, _PORT_FORM)


def read_allow(text: str) -> AllowSpec:
    """Read ``STACK/SERVICE``, ``STACK/*`` or the full name of a service. Raises InvalidPolicy."""
    stack, slash, service = text.partition("/")
    parts = [stack] if not slash else [stack] if service == "*" else [stack, service]
    if not all(_is_name(part) for part in parts):
        raise _Bad("HW110", f"cannot read {quote(text)}", _plain_letters(text) or _ALLOW_FORM)
    if not slash:
        return AllowSpec(text, "", stack)
    return AllowSpec(text, stack, "" if service == "*" else service)


def read_boolean(text: str) -> bool:
    """Read true, 1, yes or nothing, and false, 0 or no. Raises InvalidPolicy."""
    try:
        return _BOOLEANS[text]
    except KeyError:
        raise _Bad("HW103", f"{quote(text)} is neither true nor false", 'write "true" or "false"') from None


def read_mode(text: str) -> Mode:
    """Read enforce, observe or off. Raises InvalidPolicy."""
    try:
        return Mode(text)
    except ValueError:
        close = _close(text.lower(), [mode.value for mode in Mode])
        remedy = f'did you mean "{close}"?' if close else "use enforce (the default), observe or off"
        raise _Bad("HW105", f"there is no mode {quote(text)}", remedy) from None


def read_network(text: str) -> str:
    """Read the name of one network. Raises InvalidPolicy."""
    if not _NETWORK_NAME.fullmatch(text):
        remedy = "write the name of one overlay network, as the stack file or docker network ls has it"
        raise _Bad("HW109", f"{quote(text)} is not the name of a network", remedy)
    return text


def read_rotate(text: str) -> int:
    """Read a duration as whole seconds. Raises InvalidPolicy."""
    return _whole_seconds("HW108", read_duration(text), text, ROTATE_RANGE, "use 1m to 8784h")


def read_keepalive(text: str) -> int:
    """Read a duration as whole seconds, or ``off`` as 0. Raises InvalidPolicy."""
    if text == "off":
        return 0
    return _whole_seconds("HW107", read_duration(text), text, KEEPALIVE_RANGE, 'use 1s to 65535s, or "off"')


def read_duration(text: str) -> Fraction:
    """Read a duration as Go writes it, in seconds; without its units below a millisecond. Raises InvalidPolicy."""
    if len(text) > _SHOWN or not _DURATION.fullmatch(text):
        raise _Bad("HW104", f"{quote(text)} is not a duration", _DURATION_HINT)
    return sum((Fraction(n) * _UNIT_S[unit] for n, unit in _DURATION_PART.findall(text)), Fraction(0))


def read_mtu(text: str) -> int:
    """Read an MTU in bytes. Raises InvalidPolicy."""
    least, most = MTU_RANGE
    if re.fullmatch(r"[1-9][0-9]{0,5}", text) and least <= int(text) <= most:
        return int(text)
    remedy = "leave the label out: the agents measure the path"
    raise _Bad("HW106", f"{quote(text)} is not an MTU, which is {least}-{most}", remedy)


def coalesce(ports: Iterable[PortRange]) -> tuple[PortRange, ...]:
    """The same ports in as few ranges as possible, in order: overlapping and neighbouring ranges become one."""
    merged: list[PortRange] = []
    for item in sorted(ports, key=port_order):
        last = merged[-1] if merged else None
        if last is not None and last.protocol is item.protocol and item.first <= last.last + 1:
            merged[-1] = PortRange(protocol=last.protocol, first=last.first, last=max(last.last, item.last))
        else:
            merged.append(item)
    return tuple(merged)


def port_order(ports: PortRange) -> tuple[str, int, int]:
    """Sorts ports; the protocol is an enumeration and has no order of its own."""
    return ports.protocol.value, ports.first, ports.last


def quote(text: str) -> str:
    """The text in quotation marks, shortened, with what cannot be seen written out."""
    shown = text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
    return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in shown) + '"'


def short_name(service: Service) -> str:
    """The name that the stack file has: without the stack."""
    return service.name.removeprefix(f"{service.stack}_") if service.stack else service.name


def without_stray_labels(service: Service, labels: Mapping[str, str]) -> Service:
    """The service as it would be with only these labels."""
    return replace(service, labels=labels, container_labels={})


def _cut_protocol(text: str) -> tuple[str, Protocol | None]:
    name, slash, last = text.rpartition("/")
    if slash and last in ("tcp", "udp"):
        return name, Protocol(last)
    return text, None


def _name(text: str, name: str) -> Name:
    stack, slash, service = name.partition("/")
    parts = [stack, service] if slash else [name]
    if not all(_is_name(part) for part in parts):
        raise _Bad("HW110", f"cannot read {quote(text)}", _plain_letters(text) or _LINK_FORM)
    return Name(stack, service) if slash else Name("", name)


def _is_name(text: str) -> bool:
    return len(text) <= _NAME_LENGTH and bool(_NAME.fullmatch(text))


def _plain_letters(text: str) -> str:
    strange = next((c for c in text if not c.isascii()), "")
    return f"type it again in plain letters and digits: U+{ord(strange):04X} is neither" if strange else ""


def _port_range(text: str, written: str, form: str) -> PortRange:
    ports, slash, protocol = written.partition("/")
    if not _PORT_LIKE.fullmatch(ports) or (slash and not _PROTOCOL_LIKE.fullmatch(protocol)):
        raise _Bad("HW110", f"cannot read {quote(text)}", _plain_letters(text) or form)
    first, last = _port_numbers(text, ports)
    if slash and protocol not in ("tcp", "udp"):
        problem = f"{quote(text)} has protocol {quote(protocol)}"
        raise _Bad("HW112", problem, "use tcp (the default) or udp")
    return PortRange(protocol=Protocol(protocol or "tcp"), first=first, last=last)


def _port_numbers(text: str, ports: str) -> tuple[int, int]:
    match = _PORTS.fullmatch(ports)
    numbers = [part for part in match.groups() if part is not None] if match else [ports]
    for number in numbers:
        if not re.fullmatch(r"[1-9][0-9]{0,4}", number) or int(number) > 65535:
            raise _Bad("HW111", f"{quote(text)} has port {quote(number)}, which is not 1-65535", _PORT_HINT)
    first, last = int(numbers[0]), int(numbers[-1])
    if first > last:
        problem = f"{quote(text)} has ports {quote(ports)}, which end before they begin"
        raise _Bad("HW111", problem, "write the lower port first")
    return first, last


def _whole_seconds(code: str, seconds: Fraction, text: str, bounds: tuple[int, int], remedy: str) -> int:
    if seconds.denominator != 1:
        raise _Bad(code, f"{quote(text)} is not a whole number of seconds", remedy)
    if not bounds[0] <= seconds <= bounds[1]:
        raise _Bad(code, f"{quote(text)} is out of range", remedy)
    return int(seconds)


def _is_ours(key: str) -> bool:
    return bool(_OURS.fullmatch(key.strip(_BLANKS).lower()))


def _close(text: str, words: Iterable[str]) -> str:
    return next(iter(difflib.get_close_matches(text, sorted(words), n=1, cutoff=0.6)), "")


def _close_label(key: str) -> str:
    """The label that was meant; only what follows the prefix counts, since every label begins alike."""
    prefix = "hivewire."
    word = re.sub(r"[_:/\s-]+", ".", key.strip(_BLANKS).lower()).removeprefix(prefix)
    close = _close(word, [label.removeprefix(prefix) for label in LABELS])
    return prefix + close if close else ""


def _unknown(service: Service, key: str) -> Finding:
    close = _close_label(key)
    remedy = _ELSEWHERE.get(key) or (f'did you mean "{close}"?' if close else _KNOWN)
    return finding("HW102", service.name, f"unknown label {quote(key)}", remedy, label=key)


def _misplaced(service: Service) -> list[Finding]:
    found = []
    for key in sorted(service.container_labels):
        if not _is_ours(key):
            continue
        message = f"label {quote(key)} is on the container, where the mesh does not look"
        if service.stack:
            remedy = f"move it under services.{short_name(service)}.deploy.labels"
        else:
            remedy = f"docker service update --container-label-rm {key} --label-add {key}=... {service.name}"
        if key not in LABELS and (close := _close_label(key)):
            remedy = f'{remedy}, as "{close}"'
        found.append(finding("HW101", service.name, message, remedy, label=key))
    return found


def _self_links(service: Service, links: Iterable[LinkSpec]) -> list[Finding]:
    names = {Name("", service.name)}
    if service.stack:
        names |= {Name("", short_name(service)), Name(service.stack, short_name(service))}
    if not any(link.target in names for link in links):
        return []
    message = f"{LINKS}: a service cannot link to itself"
    return [finding("HW202", service.name, message, "remove it; replicas of one service need no link", label=LINKS)]


def _repeated_ports(service: Service, label: str, entries: list[tuple[str, PortRange]]) -> list[Finding]:
    found = []
    for index, (name, ports) in enumerate(entries):
        before = [p for n, p in entries[:index] if n == name and p.protocol is ports.protocol]
        if any(p.first <= ports.last and ports.first <= p.last for p in before):
            what = f"{name}:{ports}" if name else str(ports)
            found.append(
                finding("HW114", service.name, f'{label}: "{what}" is there already', "remove it", label=label)
            )
    return found
