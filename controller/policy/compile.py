"""From a reading of the cluster to what every service may do: ``compile_mesh``, a pure function.

    labels --parse--> labels in force --enrol, link--> policies, pending links, findings

Two rules shape everything here. A bad label touches only its own service, which keeps its last good labels as a
whole. And nobody is cut by somebody else's label: who is in the mesh only because a link points there, observes.
"""

import difflib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from controller.policy.findings import finding, in_order
from controller.policy.labels import (
    LINKS,
    MODE,
    NETWORK,
    LinkSpec,
    Name,
    ParsedLabels,
    coalesce,
    parse_labels,
    port_order,
    short_name,
    without_stray_labels,
)
from controller.swarm.snapshot import Network, Node, Service, SwarmSnapshot
from hivewire.ids import NetworkId, NodeId, ServiceId
from hivewire.records import Finding, Link, Mode, PolicyRecord, PortRange
from hivewire.records import Network as NetworkRecord

_NAMED: Final = 5
"""How many examples a sentence names."""


@dataclass(frozen=True, slots=True)
class MeshDefaults:
    """What holds where a service says nothing."""

    mode: Mode = Mode.ENFORCE


@dataclass(frozen=True, slots=True)
class PendingLink:
    """A link that somebody asked for and that is not there. ``code`` is that of the finding which says why."""

    source: ServiceId
    source_name: str
    target_name: str
    target: ServiceId | None
    """None: there is no such service."""
    ports: tuple[PortRange, ...]
    code: str


@dataclass(frozen=True, slots=True)
class Compiled:
    """Everything that follows from a snapshot. All of it sorted; none of it depends on the order of the input."""

    policies: Mapping[ServiceId, PolicyRecord] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    pending: tuple[PendingLink, ...] = ()


@dataclass(frozen=True, slots=True)
class Member:
    """A service with the labels that are in force, which may be older than the ones it has now."""

    service: Service
    labels: ParsedLabels
    is_labelled: bool
    is_broken: bool
    networks: tuple[Network, ...]
    """Its overlay networks, by name."""

    @property
    def usable(self) -> tuple[Network, ...]:
        """The networks that a link can run on."""
        return tuple(n for n in self.networks if not n.is_dsr)

    @property
    def obstacle(self) -> str:
        """Why it cannot be in the mesh; empty where it can."""
        if self.usable:
            return ""
        if self.service.host_network:
            return "it uses the host network"
        if self.networks:
            return "all of its overlay networks have option dsr"
        return "it is attached to no overlay network"

    def mode(self, mesh: MeshDefaults) -> Mode:
        if not self.is_labelled:
            return Mode.OBSERVE
        if self.labels.enable is False:
            return Mode.OFF
        return self.labels.mode or mesh.mode


@dataclass(frozen=True, slots=True)
class Resolution:
    """Where a name leads. ``shadowed`` is another service that has the name too, but in no stack."""

    target: ServiceId | None
    shadowed: ServiceId | None = None


class Directory:
    """Services by name, as labels and people write them."""

    def __init__(self, services: Mapping[ServiceId, Service]) -> None:
        self._services = services
        self._ids = {services[i].name: i for i in sorted(services, reverse=True)}

    def resolve(self, name: Name, stack: str) -> Resolution:
        """``stack`` is the one of the service that uses the name; its own services come first."""
        if name.stack:
            return Resolution(self._ids.get(f"{name.stack}_{name.service}"))
        exact = self._ids.get(name.service)
        near = self._ids.get(f"{stack}_{name.service}") if stack else None
        return Resolution(near, exact) if near is not None else Resolution(exact)

    def suggest(self, name: Name, stack: str) -> str:
        """A name that somebody may have meant, or nothing. Looks only where the name points: other stacks are not
        part of the answer, so that a policy does not change with their services.
        """
        if name.stack and self.resolve(Name("", name.stack), stack).target is not None:
            return f"{name.stack}/tcp"  # a mistyped protocol reads as the service of a stack
        where = name.stack or stack
        names = sorted(short_name(s) for s in self._services.values() if s.stack == where)
        close = next(iter(difflib.get_close_matches(name.service, names, n=1, cutoff=0.6)), "")
        return f"{name.stack}/{close}" if close and name.stack else close


def compile_mesh(
    snapshot: SwarmSnapshot,
    previous: Mapping[ServiceId, PolicyRecord],
    mesh: MeshDefaults,
    agents: frozenset[NodeId] | None = None,
) -> Compiled:
    """What the services of the snapshot may do.

    ``previous`` are the policies in force: a service with a bad label keeps the labels recorded there. ``agents``
    are the nodes with a running agent; None where that is not known, as for a stack file. Raises nothing for
    anything that a person can write into a label.
    """
    return _Compiler(snapshot, previous, mesh).run(agents)


class _Compiler:
    """The working memory of one compilation."""

    def __init__(self, snapshot: SwarmSnapshot, previous: Mapping[ServiceId, PolicyRecord], mesh: MeshDefaults) -> None:
        self._mesh = mesh
        self._directory = Directory(snapshot.services)
        self._found: dict[ServiceId, list[Finding]] = defaultdict(list)
        self._general: list[Finding] = []
        self._pending: set[PendingLink] = set()
        # By source and target: the network of that pair, and the ports.
        self._links: dict[tuple[ServiceId, ServiceId], tuple[Network, list[PortRange]]] = {}
        self._out: dict[ServiceId, list[Link]] = defaultdict(list)
        self._in: dict[ServiceId, list[Link]] = defaultdict(list)
        self._nodes = snapshot.nodes
        self._members = {
            i: self._member(snapshot.services[i], snapshot.networks, previous.get(i)) for i in sorted(snapshot.services)
        }

    def run(self, agents: frozenset[NodeId] | None) -> Compiled:
        enrolled = [i for i, member in self._members.items() if self._enrols_itself(member)]
        for source in enrolled:
            for spec in self._members[source].labels.links:
                self._link(self._members[source], spec)
        by_link = self._enrolled_by_link(frozenset(enrolled))
        self._settle_links()
        members = sorted([*enrolled, *by_link])
        for i in members:
            self._describe(self._members[i])
        self._general += _about_nodes(self._nodes, agents)
        self._general += self._about_networks()
        policies = {i: self._policy(self._members[i]) for i in members}
        findings = [*self._general, *(f for found in self._found.values() for f in found)]
        pending = sorted(
            self._pending,
            key=lambda p: (p.source_name, p.target_name, p.code, tuple(port_order(r) for r in p.ports)),
        )
        return Compiled(policies, in_order(findings), tuple(pending))

    def _member(self, service: Service, networks: Mapping[NetworkId, Network], previous: PolicyRecord | None) -> Member:
        written = parse_labels(service)
        self._found[service.id] += written.findings
        in_force = written
        if not written.is_valid:
            in_force = self._last_good(service, written, previous)
        overlays = [networks[n] for n in service.networks if n in networks and not networks[n].is_ingress]
        return Member(
            service=service,
            labels=in_force,
            is_labelled=written.is_present,
            is_broken=not written.is_valid,
            networks=tuple(sorted(_unique(overlays), key=lambda n: (n.name, n.id))),
        )

    def _last_good(self, service: Service, written: ParsedLabels, previous: PolicyRecord | None) -> ParsedLabels:
        """The labels of a service whose present ones have an error."""
        if previous is not None and previous.labels:
            earlier = parse_labels(without_stray_labels(service, previous.labels))
            if earlier.is_valid:
                self._note(service, "HW304", "labels have an error: the last good ones stay in force", "")
                return earlier
        if written.is_switched_off:
            return ParsedLabels(enable=False)
        self._note(service, "HW304", "labels have an error, and there are no earlier ones: it gets no links", "")
        return ParsedLabels()

    def _enrols_itself(self, member: Member) -> bool:
        if not member.is_labelled:
            return False
        if member.mode(self._mesh) is Mode.OFF:
            idle = sorted({LINKS} & set(member.labels.own))
            if idle:
                self._note(member.service, "HW305", f"is switched off, so {idle[0]} has no effect", "", LINKS)
            return False
        if member.obstacle:
            message = f"cannot be in the mesh: {member.obstacle}"
            self._note(member.service, "HW204", message, "attach it to an overlay network without option dsr")
            return False
        return True

    def _link(self, source: Member, spec: LinkSpec) -> None:
        """Make the link, or say why not."""
        resolution = self._directory.resolve(spec.target, source.service.stack)
        if resolution.target is None:
            self._no_target(source, spec)
            return
        target = self._members[resolution.target]
        if target is source:
            # Reached only by a full name that the service of another stack would have had.
            self._refuse(source, spec, target, "HW202", f"{LINKS}: a service cannot link to itself", "remove it")
            return
        if resolution.shadowed not in (None, resolution.target):
            message = f'{LINKS}: "{spec.target}" is {target.service.name}, but a service "{spec.target}" exists too'
            self._note(source.service, "HW205", message, "rename one of them if the other one is meant", LINKS)
        pair = f"{source.service.name} -> {target.service.name}"
        name = target.service.name
        if target.is_labelled and target.mode(self._mesh) is Mode.OFF:
            remedy = f"remove the link, or {_switch_on(target)}"
            self._refuse(source, spec, target, "HW302", f"link {pair}: {name} is switched off", remedy)
        elif target.obstacle:
            remedy = "attach both to one overlay network without option dsr"
            self._refuse(
                source, spec, target, "HW204", f"link {pair}: {name} cannot be in it, {target.obstacle}", remedy
            )
        elif not (shared := _shared(source, target)):
            remedy = "attach both to one overlay network without option dsr"
            self._refuse(source, spec, target, "HW203", f"link {pair}: {_apart(source, target)}", remedy)
        elif not _consents(source, target):
            remedy = f'add  hivewire.allow: "{source.service.name}"  to {name}'
            self._refuse(source, spec, target, "HW301", f"link {pair} is waiting for consent", remedy)
        elif not (ports := _ports(spec, target)):
            self._refuse(source, spec, target, "HW113", _no_port(spec, name), _port_remedy(spec, target))
        else:
            key = source.service.id, target.service.id
            if key not in self._links:
                self._links[key] = self._network(source, target, shared), []
            self._links[key][1].extend(ports)

    def _no_target(self, source: Member, spec: LinkSpec) -> None:
        stack, name = source.service.stack, spec.target
        if name.stack:
            message = f'{LINKS}: no service "{name.service}" in stack "{name.stack}"'
        elif stack:
            message = f'{LINKS}: no service "{name}" in stack "{stack}" and none named "{name}"'
        else:
            message = f'{LINKS}: no service named "{name}"'
        close = self._directory.suggest(name, stack)
        remedy = "the link stays pending until it is deployed"
        if close:
            remedy = f'did you mean "{close}"? {remedy}'
        self._refuse(source, spec, None, "HW201", message, remedy)

    def _refuse(
        self, source: Member, spec: LinkSpec, target: Member | None, code: str, message: str, remedy: str
    ) -> None:
        self._note(source.service, code, message, remedy, LINKS)
        self._pending.add(
            PendingLink(
                source=source.service.id,
                source_name=source.service.name,
                target_name=str(spec.target) if target is None else target.service.name,
                target=None if target is None else target.service.id,
                ports=() if spec.ports is None else (spec.ports,),
                code=code,
            )
        )

    def _network(self, source: Member, target: Member, shared: tuple[Network, ...]) -> Network:
        """Which of the shared networks the link runs on: the source's word, the target's, else the first by name."""
        if len(shared) == 1:
            return shared[0]
        for side in (source, target):
            chosen = _chosen(side)
            if chosen in shared:
                return chosen
        names = ", ".join(n.name for n in shared)
        message = (
            f"link {source.service.name} -> {target.service.name} uses network {shared[0].name}; they share {names}"
        )
        self._note(source.service, "HW207", message, f'choose with {NETWORK}: "{shared[0].name}"', NETWORK)
        return shared[0]

    def _settle_links(self) -> None:
        """Give each link to both of its ends, with the same network and ports."""
        for (source, target), (network, ports) in self._links.items():
            ranges = coalesce(ports)
            self._out[source].append(_as_link(self._members[target].service, network, ranges, is_out=True))
            self._in[target].append(_as_link(self._members[source].service, network, ranges, is_out=False))

    def _enrolled_by_link(self, enrolled: frozenset[ServiceId]) -> list[ServiceId]:
        sources: dict[ServiceId, list[str]] = defaultdict(list)
        for source, target in self._links:
            if target not in enrolled:
                sources[target].append(self._members[source].service.name)
        for target, names in sources.items():
            message = f"is in the mesh by links from {_some(sorted(names))}; it runs in observe"
            self._note(self._members[target].service, "HW303", message, f'to enforce it, add {MODE}: "enforce" to it')
        return sorted(sources)

    def _describe(self, member: Member) -> None:
        """Findings about a service of the mesh that concern no link."""
        if member.labels.network and _chosen(member) is None:
            names = ", ".join(n.name for n in member.usable)
            message = f'{NETWORK}: the service is attached to no network "{member.labels.network}"'
            self._note(member.service, "HW206", message, f"use one of {names}", NETWORK)
        for network in member.networks:
            if network.is_dsr:
                message = f"network {network.name} has option dsr, which links cannot use"
                self._note(member.service, "HW208", message, "create the network again without it")
        if member.service.can_change_network:
            message = "its containers have CAP_NET_ADMIN and could change their own rules"
            self._note(member.service, "HW306", message, "remove it from cap_add, unless the service needs it")

    def _about_networks(self) -> Iterable[Finding]:
        used = {network.id: network for network, _ in self._links.values()}
        for network in used.values():
            if network.is_encrypted:
                message = "links do not run through the encryption of this network"
                remedy = "nothing to do; option encrypted still covers traffic outside of the mesh"
                yield finding("HW209", network.name, message, remedy)

    def _policy(self, member: Member) -> PolicyRecord:
        service, labels = member.service, member.labels
        return PolicyRecord(
            service=service.id,
            name=service.name,
            stack=service.stack,
            mode=member.mode(self._mesh),
            networks=tuple(
                NetworkRecord(id=n.id, name=n.name, subnets=tuple(str(s) for s in sorted(n.subnets)))
                for n in member.networks
            ),
            out_links=_in_order(self._out[service.id]),
            in_links=_in_order(self._in[service.id]),
            self_links=_in_order([_as_link(service, n, (), is_out=True) for n in member.usable]),
            keepalive_s=labels.keepalive_s,
            mtu=labels.mtu,
            rotate_s=labels.rotate_s,
            labels={key: labels.own[key] for key in sorted(labels.own)},
            findings=in_order(self._found[service.id]),
        )

    def _note(self, service: Service, code: str, message: str, remedy: str, label: str = "") -> None:
        self._found[service.id].append(finding(code, service.name, message, remedy, label=label))


def _unique(networks: Iterable[Network]) -> list[Network]:
    """Each network once."""
    return list({n.id: n for n in networks}.values())


def network_named(name: str, stack: str, networks: Iterable[Network]) -> Network | None:
    """The network that a label names: the one of the own stack, else the one of exactly that name."""
    by_name = {n.name: n for n in networks}
    return (by_name.get(f"{stack}_{name}") if stack else None) or by_name.get(name)


def _chosen(member: Member) -> Network | None:
    name = member.labels.network
    return network_named(name, member.service.stack, member.usable) if name else None


def _shared(source: Member, target: Member) -> tuple[Network, ...]:
    theirs = {n.id for n in target.usable}
    return tuple(n for n in source.usable if n.id in theirs)


def _switch_on(target: Member) -> str:
    if target.labels.enable is False:
        return f'hivewire.enable: "false" from {target.service.name}'
    return f'set {MODE}: "observe" or "enforce" on {target.service.name}'


def _some(names: list[str]) -> str:
    """A few of the names, so that a sentence stays one."""
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _apart(source: Member, target: Member) -> str:
    theirs = {n.id for n in target.networks}
    common = [n.name for n in source.networks if n.id in theirs]
    return f"of {', '.join(common)}, all have option dsr" if common else "the two share no overlay network"


def _consents(source: Member, target: Member) -> bool:
    """Services without a stack are nobody's neighbours: each may come from somebody else."""
    if source.service.stack and source.service.stack == target.service.stack:
        return True
    return any(allow.admits(source.service) for allow in target.labels.allow)


def _ports(spec: LinkSpec, target: Member) -> tuple[PortRange, ...]:
    if spec.ports is not None:
        return (spec.ports,)
    return tuple(p for p in target.labels.ports if spec.protocol in (None, p.protocol))


def _no_port(spec: LinkSpec, name: str) -> str:
    if spec.protocol is None:
        return f'{LINKS}: "{spec.text}" names no port, and {name} has no hivewire.ports'
    return f'{LINKS}: "{spec.text}" names no port, and {name} has no hivewire.ports over {spec.protocol.value}'


def _port_remedy(spec: LinkSpec, target: Member) -> str:
    if target.is_broken:
        return f'correct the labels of {target.service.name}, or write "{spec.target}:PORT"'
    return f'write "{spec.target}:PORT", or add hivewire.ports to {target.service.name}'


def _as_link(other: Service, network: Network, ports: tuple[PortRange, ...], *, is_out: bool) -> Link:
    vip = other.vips.get(network.id) if is_out else None
    return Link(service=other.id, name=other.name, network=network.id, ports=ports, vip=vip)


def _in_order(links: Iterable[Link]) -> tuple[Link, ...]:
    return tuple(sorted(links, key=lambda link: (link.name, link.service, link.network)))


def _about_nodes(nodes: Mapping[NodeId, Node], agents: frozenset[NodeId] | None) -> Iterable[Finding]:
    for node in nodes.values():
        if node.os.lower() == "windows":
            message = "Windows nodes cannot be in the mesh; tasks there get no links"
            yield finding("HW405", node.hostname, message, "keep services of the mesh on Linux nodes")
        elif agents is not None and node.is_ready and node.id not in agents:
            message = "no agent runs on this node; tasks of the mesh there get no links"
            remedy = "see with docker service ps why the agent's service has no task there"
            yield finding("HW402", node.hostname, message, remedy)
