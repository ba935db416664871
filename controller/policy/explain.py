"""Why one service may reach another, or not, in words: the same policies that the agents get, read by a person.

This says what is declared. Whether tunnels are up is known to the agents, and is added by who asks them.
"""

import re
import shlex
from dataclasses import dataclass
from typing import Final

from controller.policy.compile import Compiled, Directory
from controller.policy.labels import LINKS, PORTS, Name, coalesce, read_link
from controller.swarm.snapshot import Service, SwarmSnapshot
from hivewire.errors import InvalidInput
from hivewire.records import Link, Mode, PolicyRecord, PortRange

_HARMLESS: Final = re.compile(r"[A-Za-z0-9_.:/,*-]*")


@dataclass(frozen=True, slots=True)
class Step:
    """One question on the way and its answer."""

    text: str
    is_ok: bool | None
    """None: the question did not come up."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a new connection is let through, whether it is encrypted, and what would change that."""

    source: str
    destination: str
    allowed: bool
    encrypted: bool
    steps: tuple[Step, ...]
    fix: str = ""


def explain(compiled: Compiled, snapshot: SwarmSnapshot, source: str, destination: str, port: PortRange) -> Decision:
    """Answer for a new connection from tasks of ``source`` to ``port`` of tasks of ``destination``.

    Both are names as in ``hivewire.links``; a short destination is looked for in the stack of the source first.
    Raises InvalidInput for a name that no service has.
    """
    directory = Directory(snapshot.services)
    start = _find(directory, snapshot, source, "")
    end = _find(directory, snapshot, destination, start.stack)
    ends = compiled.policies.get(start.id), compiled.policies.get(end.id)
    steps = [_membership(start, ends[0]), _membership(end, ends[1])]
    if start.id == end.id:
        return _between_replicas(start, ends[0], steps)
    link = link_to(ends[0], end)
    if link is not None and covers(link, port):
        steps.append(Step(f"link: {start.name} has a link to {end.name}:{port}", True))
        return Decision(start.name, end.name, True, True, tuple(steps))
    reason, fix = no_link(compiled, start, end, port, link)
    steps.append(Step(reason, False))
    closed = closed_by(ends, start, end, link)
    if closed:
        steps.append(Step(f"mode: {closed} enforces, so what no link allows is dropped", False))
        return Decision(start.name, end.name, False, False, tuple(steps), fix)
    steps.append(Step("mode: nobody enforces on this way, so nothing is dropped", True))
    return Decision(start.name, end.name, True, link is not None, tuple(steps), fix)


def _find(directory: Directory, snapshot: SwarmSnapshot, text: str, stack: str) -> Service:
    name = read_link(text).target
    exact = directory.resolve(Name("", name.service), "") if not name.stack else directory.resolve(name, "")
    target = directory.resolve(name, stack).target or exact.target
    if target is None:
        close = directory.suggest(name, stack)
        raise InvalidInput(f'no service "{text}"' + (f', did you mean "{close}"?' if close else ""))
    return snapshot.services[target]


def _membership(service: Service, policy: PolicyRecord | None) -> Step:
    if policy is None:
        return Step(f"mesh: {service.name} is not in it", False)
    return Step(f"mesh: {service.name} is in it, mode {policy.mode.value}", True)


def _between_replicas(service: Service, policy: PolicyRecord | None, steps: list[Step]) -> Decision:
    meshed = policy is not None and bool(policy.self_links)
    text = "link: replicas of one service need none"
    return Decision(service.name, service.name, True, meshed, (steps[0], Step(text, True)))


def link_to(policy: PolicyRecord | None, end: Service) -> Link | None:
    """The link out that leads to this service."""
    if policy is None:
        return None
    return next((link for link in policy.out_links if link.service == end.id), None)


def covers(link: Link, port: PortRange | None) -> bool:
    """Whether the link opens the port; None: any."""
    return port is None or coalesce([*link.ports, port]) == coalesce(link.ports)


def no_link(
    compiled: Compiled, start: Service, end: Service, port: PortRange | None, link: Link | None
) -> tuple[str, str]:
    """Why there is no link for this port, and what to do."""
    waiting = next((p for p in compiled.pending if p.source == start.id and p.target == end.id), None)
    if link is None and waiting is not None:
        because = [f for f in compiled.findings if f.subject == start.name and f.code == waiting.code]
        named = [f for f in because if end.name in f.message] or because
        if named:
            return f"link: {named[0].message} [{waiting.code}]", named[0].remedy
    fix = add_to_label(start, LINKS, _entry(start, end, port))
    if link is not None:
        ports = ", ".join(str(p) for p in link.ports)
        return f"link: {start.name} has a link to {end.name}, for {ports} only", fix
    return f"link: {start.name} has none to {end.name}", fix


def add_to_label(service: Service, label: str, entry: str) -> str:
    """The command that adds an entry to a label which is a list, and keeps those that it has."""
    value = ",".join(word for word in (*re.split(r"[,\s]+", service.labels.get(label, "")), entry) if word)
    # Somebody will paste this into a shell, and anybody may have written the label.
    quoted = f'"{value}"' if _HARMLESS.fullmatch(value) else shlex.quote(value)
    return f"docker service update --label-add {label}={quoted} {service.name}"


def _entry(start: Service, end: Service, port: PortRange | None) -> str:
    name = end.name
    if end.stack and end.name.startswith(f"{end.stack}_"):
        short = end.name.removeprefix(f"{end.stack}_")
        name = short if end.stack == start.stack else f"{end.stack}/{short}"
    if port is None:
        return name if PORTS in end.labels else f"{name}:PORT"
    return f"{name}:{str(port).removesuffix('/tcp')}"


def closed_by(
    ends: tuple[PolicyRecord | None, PolicyRecord | None], start: Service, end: Service, link: Link | None
) -> str:
    """Who drops the connection; nobody: an empty text.

    Between services with a link in either direction everything goes through the tunnel, and the receiving end
    filters. Without one it goes over the overlay network, which either end closes.
    """
    first, second = ends
    if second is not None and second.mode is Mode.ENFORCE:
        return end.name
    is_tunnelled = link is not None or (second is not None and link_to(second, start) is not None)
    if first is not None and first.mode is Mode.ENFORCE and not is_tunnelled:
        return start.name
    return ""
