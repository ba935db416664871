"""The labels that would allow what was seen: from wishes to changes of labels, in words to paste. Pure.

A change only adds: every value keeps what it has. A service that gets its first label would be enforced from then on,
so it gets ``hivewire.mode: observe`` with it: a suggestion cuts nobody. ``hivewire.ports`` is never extended, because
that would open the port for everybody who links without naming one; the links name it instead. What is suggested is
compiled before it is told, and a wish that it would not fulfil is told as such.
"""

import json
import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from controller.policy.compile import Compiled, MeshDefaults, compile_mesh
from controller.policy.explain import covers, link_to
from controller.policy.labels import (
    ALLOW,
    LINKS,
    LONGEST_VALUE,
    MODE,
    MOST_ENTRIES,
    ParsedLabels,
    coalesce,
    parse_labels,
    port_order,
    split_list,
)
from controller.swarm.snapshot import Service, SwarmSnapshot
from hivewire.ids import ServiceId
from hivewire.records import Mode, PolicyRecord, PortRange


@dataclass(frozen=True, slots=True)
class Wish:
    """A connection that somebody tried to make."""

    source: ServiceId
    destination: ServiceId
    port: PortRange


@dataclass(frozen=True, slots=True)
class LabelChange:
    """A label as it is and as it would be; ``before`` is None where there is none."""

    service: str
    stack: str
    label: str
    before: str | None
    after: str


@dataclass(frozen=True, slots=True)
class Suggestion:
    changes: tuple[LabelChange, ...]
    """By service and label."""
    refused: Mapping[Wish, str]
    """Wishes that no change of labels here would fulfil, and why."""
    linked: frozenset[Wish]
    """Wishes that a link in force fulfils already."""


def suggest(
    wishes: Iterable[Wish], snapshot: SwarmSnapshot, policies: Mapping[ServiceId, PolicyRecord], mesh: MeshDefaults
) -> Suggestion:
    """What to write on which service. ``policies`` are those in force."""
    services = snapshot.services
    refused: dict[Wish, str] = {}
    linked: set[Wish] = set()
    open_: list[Wish] = []
    for wish in sorted(set(wishes), key=_order):
        if wish.source not in services or wish.destination not in services:
            refused[wish] = "one of the services is gone"
        elif _is_linked(wish, policies, services):
            linked.add(wish)
        elif reason := _obstacle(services[wish.source], services[wish.destination]):
            refused[wish] = reason
        else:
            open_.append(wish)
    labels = _labels(open_, services, mesh)
    # A label that outgrows what is read would take the service's other links with it: none of these wishes then.
    too_long = {service for service, values in labels.items() if any(not _fits(value) for value in values.values())}
    for wish in [wish for wish in open_ if wish.source in too_long or wish.destination in too_long]:
        refused[wish] = "its label would be too long: give the ports as ranges by hand"
        open_.remove(wish)
    labels = _labels(open_, services, mesh)
    compiled = _compiled(labels, snapshot, policies, mesh)
    for wish in [wish for wish in open_ if not _is_linked(wish, compiled.policies, services)]:
        refused[wish] = _reason(wish, compiled, services)
        open_.remove(wish)
    labels = _labels(open_, services, mesh)
    changes = [
        LabelChange(services[i].name, services[i].stack, label, services[i].labels.get(label), value)
        for i, values in labels.items()
        for label, value in values.items()
    ]
    return Suggestion(tuple(sorted(changes, key=lambda c: (c.service, c.label))), refused, frozenset(linked))


def commands(changes: Iterable[LabelChange]) -> list[str]:
    """A command per service, to paste into a shell. No task restarts: labels are no part of a task."""
    by_service: dict[str, list[str]] = defaultdict(list)
    for change in changes:
        by_service[change.service] += ["--label-add", shlex.quote(f"{change.label}={change.after}")]
    return [f"docker service update {' '.join(words)} {name}" for name, words in sorted(by_service.items())]


def stack_files(changes: Iterable[LabelChange]) -> dict[str, str]:
    """The same as a part of each stack's file, by stack. Services without a stack have none."""
    files: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for change in sorted(changes, key=lambda c: (c.stack, c.service, c.label)):
        if change.stack and change.service.startswith(f"{change.stack}_"):
            # A string of JSON is one of YAML.
            line = f"        {change.label}: {json.dumps(change.after)}"
            files[change.stack][change.service.removeprefix(f"{change.stack}_")].append(line)
    return {
        stack: "\n".join(
            ["services:", *(line for name, lines in parts.items() for line in _yaml(name, lines))],
        )
        for stack, parts in files.items()
    }


def _yaml(name: str, lines: list[str]) -> list[str]:
    return [f"  {name}:", "    deploy:", "      labels:", *lines]


def _order(wish: Wish) -> tuple[ServiceId, ServiceId, tuple[str, int, int]]:
    return wish.source, wish.destination, port_order(wish.port)


def _is_linked(wish: Wish, policies: Mapping[ServiceId, PolicyRecord], services: Mapping[ServiceId, Service]) -> bool:
    policy = policies.get(wish.source)
    if policy is not None and wish.source == wish.destination and policy.self_links:
        return True
    link = link_to(policy, services[wish.destination])
    return link is not None and covers(link, wish.port)


def _obstacle(source: Service, destination: Service) -> str:
    if source.id == destination.id:
        return "replicas of one service need no link once it is in the mesh"
    for service in (source, destination):
        labels = parse_labels(service)
        if not labels.is_valid:
            return f"the labels of {service.name} have an error: correct them first"
        if labels.is_switched_off:
            return f"{service.name} is switched off by its labels"
    return ""


def _labels(
    wishes: Iterable[Wish], services: Mapping[ServiceId, Service], mesh: MeshDefaults
) -> dict[ServiceId, dict[str, str]]:
    """The labels that change, by service, with their whole new values."""
    ports: dict[tuple[ServiceId, ServiceId], list[PortRange]] = defaultdict(list)
    for wish in wishes:
        ports[wish.source, wish.destination].append(wish.port)
    entries: dict[tuple[ServiceId, str], list[str]] = defaultdict(list)
    for (source, destination), wanted in ports.items():
        start, end = services[source], services[destination]
        entries[source, LINKS] += [f"{_name(end, start)}:{_port(p)}" for p in coalesce(wanted)]
        if not _consents(start, parse_labels(end), end):
            entries[destination, ALLOW].append(_full(start))
    found: dict[ServiceId, dict[str, str]] = defaultdict(dict)
    for (service, label), added in entries.items():
        found[service][label] = _extended(services[service].labels.get(label, ""), added)
        if mesh.mode is Mode.ENFORCE and not parse_labels(services[service]).is_present:
            found[service][MODE] = Mode.OBSERVE.value
    return dict(found)


def _extended(value: str, added: Iterable[str]) -> str:
    there = split_list(value)
    return ",".join([*there, *(entry for entry in sorted(set(added)) if entry not in there)])


def _fits(value: str) -> bool:
    return len(value) <= LONGEST_VALUE and value.count(",") < MOST_ENTRIES


def _name(end: Service, start: Service) -> str:
    """As ``start`` calls it."""
    if end.stack and end.stack == start.stack and end.name.startswith(f"{end.stack}_"):
        return end.name.removeprefix(f"{end.stack}_")
    return _full(end)


def _full(service: Service) -> str:
    if service.stack and service.name.startswith(f"{service.stack}_"):
        return f"{service.stack}/{service.name.removeprefix(f'{service.stack}_')}"
    return service.name


def _port(port: PortRange) -> str:
    return str(port).removesuffix("/tcp")


def _consents(start: Service, labels: ParsedLabels, end: Service) -> bool:
    return bool(start.stack and start.stack == end.stack) or any(allow.admits(start) for allow in labels.allow)


def _compiled(
    labels: Mapping[ServiceId, Mapping[str, str]],
    snapshot: SwarmSnapshot,
    policies: Mapping[ServiceId, PolicyRecord],
    mesh: MeshDefaults,
) -> Compiled:
    services = {
        id_: replace(service, labels={**service.labels, **labels.get(id_, {})})
        for id_, service in snapshot.services.items()
    }
    return compile_mesh(replace(snapshot, services=services), policies, mesh)


def _reason(wish: Wish, compiled: Compiled, services: Mapping[ServiceId, Service]) -> str:
    name, other = services[wish.source].name, services[wish.destination].name
    told = [f.message for f in compiled.findings if f.subject == name and other in f.message]
    return told[0] if told else f"no label makes a link from {name} to {other}"
