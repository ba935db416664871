"""The one table of finding codes. A code never changes its meaning: people filter and alert on it.

1xx: a label cannot be read. 2xx: a name does not lead anywhere useful. 3xx: policy and consent. 4xx: nodes and tasks.
5xx: installation. ``docs/findings.md`` has a section for every row, and a test compares the two.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from hivewire.records import Finding, Severity


@dataclass(frozen=True, slots=True)
class Kind:
    """What all findings of one code have in common."""

    code: str
    severity: Severity
    title: str
    explanation: str

    @property
    def anchor(self) -> str:
        """Where the documentation explains the code."""
        return f"findings.md#{self.code.lower()}"


_E, _W, _I = Severity.ERROR, Severity.WARNING, Severity.INFO

_ROWS: Final = (
    ("HW101", _E, "label on the container", "The label stands under labels instead of deploy.labels."),
    ("HW102", _E, "unknown label", "No label of Hivewire has this name."),
    ("HW103", _E, "not a boolean", "hivewire.enable is neither true nor false."),
    ("HW104", _E, "not a duration", "The value is no duration such as 30s, 12h or 1h30m."),
    ("HW105", _E, "unknown mode", "hivewire.mode is none of enforce, observe and off."),
    ("HW106", _E, "bad MTU", "hivewire.mtu is no number, or outside of what WireGuard can carry."),
    ("HW107", _E, "keepalive out of range", "WireGuard takes whole seconds from 1 to 65535."),
    ("HW108", _E, "rotation interval out of range", "Keys rotate at most every minute and at least once a year."),
    ("HW109", _E, "name of a network expected", "hivewire.network names exactly one overlay network."),
    ("HW110", _E, "entry cannot be read", "An entry of a list does not have the form that the label asks for."),
    ("HW111", _E, "bad port", "A port is not a number from 1 to 65535, or a range ends before it begins."),
    ("HW112", _E, "bad protocol", "A protocol is neither tcp nor udp."),
    ("HW113", _E, "link without a port", "Neither the link nor the hivewire.ports of its target says which port."),
    ("HW114", _W, "port named twice", "A port is in the list more than once; it counts once."),
    ("HW115", _E, "list too long", "A label holds more entries, or more text, than Hivewire reads."),
    ("HW201", _W, "unknown service", "No service has the name that the link asks for; the link waits for it."),
    ("HW202", _E, "link to itself", "A service names itself as target; its replicas may talk without a link."),
    ("HW203", _E, "no network in common", "The two services share no overlay network on which a link could run."),
    ("HW204", _E, "cannot be in the mesh", "The service has no overlay network of its own: host network, or none."),
    (
        "HW205",
        _I,
        "name fits two services",
        "The service of the own stack is taken; another one has that name as well.",
    ),
    ("HW206", _W, "hivewire.network leads nowhere", "The service is not attached to a network of that name."),
    (
        "HW207",
        _I,
        "several networks in common",
        "Nothing says which of them; the first by name is taken.",
    ),
    (
        "HW208",
        _W,
        "network with option dsr",
        "Replies there come from another address, so no link can use it.",
    ),
    ("HW209", _I, "encrypted network", "Links do not run through the network's own encryption."),
    ("HW301", _W, "waiting for consent", "The target is in another stack and does not allow this service."),
    ("HW302", _W, "target is switched off", "The target has hivewire.enable false or hivewire.mode off."),
    ("HW303", _I, "in the mesh by a link", "A link points at a service without own labels: it runs in observe."),
    (
        "HW304",
        _I,
        "earlier labels in force",
        "The labels have an error: the last good ones stay, or no link is made.",
    ),
    ("HW305", _I, "labels without effect", "The service is switched off; its other labels do nothing."),
    ("HW306", _W, "task may change its network", "The service has CAP_NET_ADMIN: it could change its own rules."),
    ("HW307", _E, "unknown guard", "hivewire.guard of a network is neither strict nor default."),
    ("HW310", _W, "quarantined", "A person has shut tasks of the service, or of the node, out of the mesh."),
    ("HW320", _E, "record not believed", "A record in etcd is not signed by who may write it; it has no effect."),
    ("HW321", _E, "record not believed on a node", "The agent of a node does not believe a record of a manager."),
    ("HW401", _E, "no WireGuard on a node", "Neither the kernel of the node nor a userspace program offers WireGuard."),
    ("HW402", _W, "no agent on a node", "Tasks of the mesh on this node get no links."),
    ("HW403", _W, "handshake fails", "Two nodes do not reach each other over UDP."),
    ("HW404", _W, "MTU too small", "The path between two nodes carries less than WireGuard needs."),
    ("HW405", _W, "Windows node", "Windows nodes cannot be in the mesh."),
    (
        "HW501",
        _W,
        "options that Swarm ignores",
        "docker stack deploy drops options of the stack file silently.",
    ),
)

KINDS: Final[Mapping[str, Kind]] = MappingProxyType({row[0]: Kind(*row) for row in _ROWS})


def finding(code: str, subject: str, message: str, remedy: str = "", *, label: str = "") -> Finding:
    """A finding with the severity of its code. Raises KeyError for a code that the table does not have."""
    return Finding(
        code=code, severity=KINDS[code].severity, subject=subject, message=message, remedy=remedy, label=label
    )


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """By subject, code, label and text, each once: the same facts always give the same tuple."""
    return tuple(sorted(set(findings), key=lambda f: (f.subject, f.code, f.label, f.message, f.remedy)))


def has_error(findings: Iterable[Finding]) -> bool:
    return any(f.severity is Severity.ERROR for f in findings)


def render(item: Finding) -> str:
    """Two lines for a terminal or a log; one where there is nothing to do."""
    first = f"{item.severity.value.capitalize()} [{item.code}] ({item.subject}) {item.message}"
    return f"{first}\n    {item.remedy}" if item.remedy else first
