"""What happens to a connection between two services, step by step, and the command that changes it. Pure.

The first steps are what is declared, from the same compilation that the agents get; the later ones are what the
kernels hold, as their agents tell at this moment. So a link that is declared and does not work is BROKEN, and so is one
that should be closed and is not. What no agent tells is said to be unknown, never guessed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from controller import names, quarantine
from controller.names import End, NamedTask
from controller.policy.explain import add_to_label, closed_by, covers, link_to, no_link
from controller.policy.labels import ALLOW
from controller.policy.verdict import StepName, Verdict
from controller.state import MeshState
from controller.swarm.snapshot import Service
from controller.view import INITIATION_BYTES, SESSION_S, Silences
from hivewire.ids import NodeId, ServiceId, TaskId
from hivewire.records import Link, Mode, PolicyRecord, PortRange, TaskPhase
from hivewire.reports import AgentReport, InterfaceReport, PeerReport

_MANY: Final = 3
"""How many examples a sentence names."""


@dataclass(frozen=True, slots=True)
class Step:
    name: StepName
    is_ok: bool | None
    """None: not reached, not needed, or not known."""
    text: str


@dataclass(frozen=True, slots=True)
class Path:
    """One pair of tasks; the one that shook hands last."""

    source_task: str
    source_node: str
    source_address: str
    source_endpoint: str
    destination_task: str
    destination_node: str
    destination_address: str
    destination_endpoint: str
    mtu: int


@dataclass(frozen=True, slots=True)
class Decision:
    source: str
    destination: str
    port: str
    """Empty: any that the link opens."""
    verdict: Verdict
    step: StepName | None
    """Where it ends; None: it does not."""
    is_encrypted: bool
    steps: tuple[Step, ...]
    fix: str = ""
    """A command, or what to do where no command does it."""
    unknown: tuple[str, ...] = ()
    """Nodes whose agents do not answer."""
    source_tasks: int = 0
    destination_tasks: int = 0
    last_handshake: float | None = None
    received_bytes: int | None = None
    sent_bytes: int | None = None
    """As the source sees them, over all pairs."""
    path: Path | None = None


@dataclass(frozen=True, slots=True)
class Question:
    source: End
    destination: End
    port: PortRange | None = None


def ask(state: MeshState, source: str, destination: str, port: PortRange | None = None, *, stack: str = "") -> Question:
    """Ends are services (within ``stack`` by their short name), tasks, or overlay addresses. Raises InvalidInput."""
    start = names.find_end(state, source, stack)
    return Question(start, names.find_end(state, destination, stack or start.service.stack), port)


def concerned(state: MeshState, question: Question) -> frozenset[NodeId]:
    """Nodes whose agents have to be asked."""
    return frozenset(t.node for end in (question.source, question.destination) for t in _tasks_of(state, end) if t.node)


def addresses(state: MeshState, end: End) -> frozenset[str]:
    """Overlay addresses of an end: those of its tasks, and the VIPs of a service."""
    found = {str(vip) for vip in end.service.vips.values()} if end.task is None else set()
    for task in _tasks_of(state, end):
        for known in (state.peers.get(task.id), state.tasks.get(task.id)):
            found |= {str(address) for address in known.addresses.values()} if known else set()
    return frozenset(found)


def decide(
    state: MeshState,
    question: Question,
    reports: Mapping[NodeId, AgentReport],
    now: float,
    silences: Silences | None = None,
) -> Decision:
    """``reports`` are the answers of the nodes that are concerned; ``now`` is Unix time; see view for ``silences``."""
    return _Inquiry(state, question, reports, now, silences or {}).decide()


def _tasks_of(state: MeshState, end: End) -> list[NamedTask]:
    if end.task is not None:
        return [end.task]
    return [task for task in names.tasks(state) if task.service == end.service.id]


@dataclass(frozen=True, slots=True)
class _Pair:
    source: NamedTask
    destination: NamedTask
    here: PeerReport
    there: PeerReport

    @property
    def last_handshake(self) -> float | None:
        times = [end.last_handshake for end in (self.here, self.there) if end.last_handshake is not None]
        return max(times, default=None)


@dataclass(slots=True)
class _Found:
    """What a step found. ``bad`` is wrong; ``late`` is on its way, which is wrong only where nothing else works."""

    bad: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    fix: str = ""


class _Inquiry:
    """The working memory of one decision."""

    def __init__(
        self,
        state: MeshState,
        question: Question,
        reports: Mapping[NodeId, AgentReport],
        now: float,
        silences: Silences,
    ) -> None:
        self._state = state
        self._question = question
        self._start, self._end, self._port = question.source.service, question.destination.service, question.port
        self._reports = reports
        self._now = now
        self._silences = silences
        self._interfaces = {i.task: i for report in reports.values() for i in report.interfaces}
        self._policies = tuple(_in_force(state, end) for end in (self._start.id, self._end.id))
        self._ours, self._theirs = _tasks_of(state, question.source), _tasks_of(state, question.destination)
        self._steps: list[Step] = []
        self._fix = ""
        self._ended_at: StepName | None = None

    def decide(self) -> Decision:
        declared, is_encrypted = self._declared()
        pairs: list[_Pair] = []
        if declared is Verdict.DENIED:
            verdict = self._is_closed()
        elif is_encrypted:
            pairs = self._works()
            verdict = Verdict.BROKEN if self._ended_at else Verdict.ALLOWED
        else:
            verdict = Verdict.ALLOWED
        self._fill("not reached" if self._ended_at else "not needed, the connection is outside of the mesh")
        newest = max(pairs, key=lambda pair: (pair.last_handshake or 0, pair.source.name), default=None)
        return Decision(
            source=self._question.source.name,
            destination=self._question.destination.name,
            port="" if self._port is None else str(self._port),
            verdict=verdict,
            step=self._ended_at,
            is_encrypted=is_encrypted and verdict is Verdict.ALLOWED,
            steps=tuple(self._steps),
            fix=self._fix,
            unknown=self._unknown_nodes() if is_encrypted or declared is Verdict.DENIED else (),
            source_tasks=len(self._ours),
            destination_tasks=len(self._theirs),
            last_handshake=newest.last_handshake if newest else None,
            received_bytes=sum(pair.here.received_bytes for pair in pairs) if pairs else None,
            sent_bytes=sum(pair.here.sent_bytes for pair in pairs) if pairs else None,
            path=self._path(newest) if newest else None,
        )

    # What is declared.

    def _declared(self) -> tuple[Verdict, bool]:
        """The verdict of labels and people, and whether the tunnel carries the connection."""
        self._membership()
        if self._quarantined():
            return Verdict.DENIED, False
        ours, theirs = self._policies
        if self._start.id == self._end.id:
            return self._between_replicas(ours)
        link = link_to(ours, self._end) if theirs is not None else None
        if link is not None and covers(link, self._port):
            self._say(StepName.LINK, True, f"{self._start.name} has a link to {self._end.name}: {_ports(link)}")
            self._say(StepName.CONSENT, True, self._consent())
            self._say(StepName.MODE, True, _mode_of_link(self._end.name, theirs))
            return Verdict.ALLOWED, True
        self._no_link(link)
        closing = closed_by((ours, theirs), self._start, self._end, link)
        if self._is_apart():
            return Verdict.DENIED, False
        if closing:
            self._say(StepName.MODE, False, f"{closing} enforces: what no link allows is dropped")
            return Verdict.DENIED, False
        self._ended_at, is_tunnelled = None, link is not None or link_to(theirs, self._start) is not None
        how = "inside the tunnel of another link" if is_tunnelled else "in clear"
        self._say(StepName.MODE, True, f"nobody enforces on this way: it passes, {how}")
        return Verdict.ALLOWED, is_tunnelled

    def _membership(self) -> None:
        outside = [end.name for end, p in zip((self._start, self._end), self._policies, strict=True) if p is None]
        if outside:
            self._say(StepName.MESH, False, f"{_and(dict.fromkeys(outside))} {_is(outside)} not in the mesh")
            return
        stacks = list(dict.fromkeys(s for s in (self._start.stack, self._end.stack) if s))
        where = f" ({'stack' if len(stacks) == 1 else 'stacks'} {_and(stacks)})" if stacks else ""
        self._say(StepName.MESH, True, f"both services are in the mesh{where}")

    def _quarantined(self) -> bool:
        """Whether all tasks of an end are shut out."""
        for tasks, end in ((self._ours, self._question.source), (self._theirs, self._question.destination)):
            records = [quarantine.over(self._state.quarantines, t.service, t.id, t.node) for t in tasks]
            if not tasks:
                records = [quarantine.over(self._state.quarantines, end.service.id, TaskId(""), NodeId(""))]
            over = [record for record in records if record is not None]
            if over and len(over) == len(records):
                self._end_at(StepName.QUARANTINE, f"{end.name} is {quarantine.words(over[0])}")
                self._fix = f"hivewire release {over[0].kind.value} {over[0].name}"
                return True
        some = [t.name for t in (*self._ours, *self._theirs) if self._is_shut(t)]
        text = f"{_some(some)} {_is(some)} quarantined, other tasks are not" if some else "nobody is quarantined"
        self._say(StepName.QUARANTINE, True, text)
        self._ours = [task for task in self._ours if not self._is_shut(task)]
        self._theirs = [task for task in self._theirs if not self._is_shut(task)]
        return False

    def _is_shut(self, task: NamedTask) -> bool:
        return quarantine.over(self._state.quarantines, task.service, task.id, task.node) is not None

    def _between_replicas(self, policy: PolicyRecord | None) -> tuple[Verdict, bool]:
        self._say(StepName.LINK, True, "tasks of one service need no link")
        self._say(StepName.CONSENT, None, "same service, none needed")
        is_meshed = policy is not None and bool(policy.self_links)
        self._say(StepName.MODE, True, _mode_of_link(self._start.name, policy) if is_meshed else "not in the mesh")
        return Verdict.ALLOWED, is_meshed

    def _no_link(self, link: Link | None) -> None:
        reason, fix = no_link(self._state.compiled, self._start, self._end, self._port, link)
        waiting = next(
            (p for p in self._state.compiled.pending if (p.source, p.target) == (self._start.id, self._end.id)), None
        )
        self._fix = fix
        if waiting is not None and waiting.code == "HW301":
            self._say(StepName.LINK, True, f"{self._start.name} asks for a link to {self._end.name}")
            self._end_at(StepName.CONSENT, f"{self._end.name} does not allow {self._start.name} [HW301]")
            stack, short = self._start.stack, self._start.name.removeprefix(f"{self._start.stack}_")
            entry = f"{stack}/{short}" if stack and short != self._start.name else self._start.name
            self._fix = add_to_label(self._end, ALLOW, entry)
            return
        reason = reason.removeprefix("link: ")
        if link is None and self._is_apart():
            reason, self._fix = f"{reason}, and they share no overlay network", _attach(self._end)
        self._end_at(StepName.LINK, reason)
        self._say(StepName.CONSENT, None, self._consent())

    def _is_apart(self) -> bool:
        ours, theirs = set(self._start.networks), set(self._end.networks)
        return bool(ours and theirs) and ours.isdisjoint(theirs)

    def _consent(self) -> str:
        if self._start.stack and self._start.stack == self._end.stack:
            return "same stack, none needed"
        return f"{self._end.name} has to allow {self._start.name}" if self._ended_at else f"{self._end.name} allows it"

    # What the kernels hold: where it should work.

    def _works(self) -> list[_Pair]:
        admitted = self._step(StepName.ADMISSION, self._admission())
        if not admitted:
            return []
        if not self._step(StepName.INTERFACES, self._with_interfaces()):
            return []
        found, pairs = self._peers()
        if not self._step(StepName.PEERS, found):
            return []
        if not self._step(StepName.RULES, self._rules()):
            return []
        self._tunnel(pairs)
        return pairs

    def _step(self, name: StepName, found: tuple[str, _Found, bool]) -> bool:
        """Say what a step found; whether the next one is of use. ``found`` ends with: whether anything works."""
        text, what, works = found
        wrong = what.bad or ([] if works else what.late)
        if wrong:
            self._end_at(name, _some(wrong))
            self._fix = what.fix
            return False
        if not works and what.unknown:
            self._say(name, None, f"unknown: {_some(what.unknown)}")
            return True
        notes = [*(what.late), *(f"unknown: {it}" for it in what.unknown)]
        self._say(name, True, text + (f"; {_some(notes)}" if notes else ""))
        return True

    def _admission(self) -> tuple[str, _Found, bool]:
        found = _Found()
        refused = {(it.node, it.task): it.reason for it in self._state.refused}
        for end, tasks in ((self._question.source, self._ours), (self._question.destination, self._theirs)):
            if not tasks:
                found.bad.append(f"no task of {end.service.name} runs")
                found.fix = f"docker service ps {end.service.name}"
        for task in self._each():
            status, host = self._state.statuses.get(task.id), self._hostname(task.node)
            if status is not None and status.phase is TaskPhase.FAILED:
                found.bad.append(f"{task.name} on {host}: {status.error or 'its agent failed'}")
                found.fix = found.fix or f"hivewire node inspect {host}"
            elif (task.node, task.id) in refused:
                found.bad.append(f"the claim of {task.name} on {host} is refused: {refused[task.node, task.id]}")
                found.fix = found.fix or f"hivewire node inspect {host}"
            elif task.id in self._state.peers:
                continue
            elif task.id in self._state.claims:
                found.late.append(f"{task.name} is not admitted yet")
                found.fix = found.fix or "hivewire check --wait 1m"
            elif task.node not in self._state.nodes:
                found.bad.append(f"no agent runs on {host}, where {task.name} is")
                found.fix = found.fix or f"docker node ps {host}"
            else:
                found.late.append(f"no agent has announced {task.name} yet")
                found.fix = found.fix or "hivewire check --wait 1m"
        ours, theirs = (self._known(tasks, self._state.peers) for tasks in (self._ours, self._theirs))
        works = bool(ours and theirs) and (self._start.id != self._end.id or len(ours) > 1 or ours != theirs)
        text = f"{_tasks(len(ours), self._start.name)} and {_tasks(len(theirs), self._end.name)} admitted"
        if self._start.id == self._end.id:
            text = f"{_tasks(len({t.id for t in (*ours, *theirs)}), self._start.name)} admitted"
        self._ours, self._theirs = ours, theirs
        if not works and not found.bad and not found.late:
            found.bad.append(f"{self._start.name} has one task only")
            found.fix = f"docker service scale {self._start.name}=2"
        return text, found, works

    def _with_interfaces(self) -> tuple[str, _Found, bool]:
        found = _Found()
        for task in self._each():
            host = self._hostname(task.node)
            if task.node not in self._reports:
                found.unknown.append(f"the agent on {host} does not answer")
                continue
            interface, peer = self._interfaces.get(task.id), self._state.peers[task.id]
            if interface is None:
                found.bad.append(f"{task.name} on {host} has no WireGuard interface")
            elif interface.public_key != peer.public_key:
                found.late.append(f"{task.name} on {host} has another key than the one that was admitted")
            found.fix = "docker service update --force hivewire_agent"
        found.unknown = list(dict.fromkeys(found.unknown))
        works = all(self._known(tasks, self._interfaces) for tasks in (self._ours, self._theirs))
        return "every task has its WireGuard interface", found, works

    def _peers(self) -> tuple[tuple[str, _Found, bool], list[_Pair]]:
        found, pairs, expected = _Found(fix="hivewire check --wait 1m"), [], 0
        for one in self._ours:
            for other in self._theirs:
                if one.id == other.id:
                    continue
                expected += 1
                here, there = self._sees(one, other), self._sees(other, one)
                found.bad += [
                    f"{a.name} on {self._hostname(a.node)} has no peer {b.name}"
                    for a, b, seen in ((one, other, here), (other, one, there))
                    if seen is None and a.id in self._interfaces
                ]
                if here is not None and there is not None:
                    pairs.append(_Pair(one, other, here, there))
        found.unknown = self._silent()
        text = f"{len(pairs)} of {expected} pairs of tasks have each other as peers"
        return (text, found, bool(pairs)), pairs

    def _rules(self) -> tuple[str, _Found, bool]:
        found, told = _Found(fix="docker service update --force hivewire_agent"), 0
        for task in self._each():
            interface, status = self._interfaces.get(task.id), self._state.statuses.get(task.id)
            policy = self._policies[0] if task.service == self._start.id else self._policies[1]
            if interface is None or interface.rules is None or policy is None:
                continue
            told += 1
            host = self._hostname(task.node)
            if not interface.rules:
                found.bad.append(f"{task.name} on {host} has no rules in force")
            elif interface.quarantined:
                found.late.append(f"{task.name} on {host} is still closed for a quarantine")
            elif status is not None and status.mode is not policy.mode:
                found.late.append(
                    f"{task.name} on {host} is still in mode {status.mode.value}, not {policy.mode.value}"
                )
        found.unknown = self._silent() or ([] if told else ["the agents do not say"])
        return f"in force in {_plural(told, 'task')}", found, told > len(found.late)

    def _tunnel(self, pairs: Sequence[_Pair]) -> None:
        broken = [pair for pair in pairs if self._is_failing(pair)]
        if broken:
            ends = sorted({f"{self._hostname(p.source.node)} <-> {self._hostname(p.destination.node)}" for p in broken})
            self._end_at(StepName.TUNNEL, f"handshakes get no answer: {_some(ends)} [HW403]")
            self._fix = "open the UDP ports of the agents (51820-52819) between these nodes"
            return
        times = [pair.last_handshake for pair in pairs if pair.last_handshake is not None]
        if not pairs:
            self._say(StepName.TUNNEL, None, f"unknown: {_some(self._silent())}")
        elif times and self._now - max(times) < SESSION_S:
            self._say(StepName.TUNNEL, True, f"last handshake {max(0, round(self._now - max(times)))} s ago")
        else:
            self._say(StepName.TUNNEL, True, "idle: nothing was sent lately, WireGuard is silent then")

    def _is_failing(self, pair: _Pair) -> bool:
        """Whether an end sends handshakes that nobody answers; as view judges it."""
        if pair.last_handshake is not None and self._now - pair.last_handshake < SESSION_S:
            return False
        for task, end in ((pair.source.id, pair.here), (pair.destination.id, pair.there)):
            silence = self._silences.get((task, end.public_key))
            before = 0 if end.last_handshake is None else None
            if silence is not None and silence.last_handshake == end.last_handshake:
                before = silence.sent_bytes
            if before is not None and end.sent_bytes - before > INITIATION_BYTES:
                return True
        return False

    # What the kernels hold: where it should be closed.

    def _is_closed(self) -> Verdict:
        """DENIED where that is so, BROKEN where a kernel still lets it through."""
        where, fix = self._ended_at, self._fix
        is_linked = any(
            policy is not None and link_to(policy, end) is not None
            for policy, end in zip(self._policies, (self._end, self._start), strict=True)
        )
        is_shut = where is StepName.QUARANTINE
        left = [
            f"{one.name} on {self._hostname(one.node)} still has peer {other.name}"
            for a, b in ((self._ours, self._theirs), (self._theirs, self._ours))
            for one in a
            for other in b
            if one.id != other.id and (is_shut or not is_linked) and self._sees(one, other) is not None
        ]
        if left:
            return self._still_open(StepName.PEERS, left)
        bare = [
            f"{task.name} on {self._hostname(task.node)} has no rules in force"
            for task in (*self._ours, *self._theirs)
            if (interface := self._interfaces.get(task.id)) is not None
            and interface.rules == ""
            and self._enforces(task)
        ]
        if bare:
            return self._still_open(StepName.RULES, bare)
        self._ended_at, self._fix = where, fix
        return Verdict.DENIED

    def _still_open(self, step: StepName, what: Sequence[str]) -> Verdict:
        self._end_at(step, f"should be closed, but {_some(what)}")
        self._fix = "docker service update --force hivewire_agent"
        return Verdict.BROKEN

    def _enforces(self, task: NamedTask) -> bool:
        policy = self._state.policies.get(task.service)
        return policy is not None and policy.mode is Mode.ENFORCE

    # Words and look-ups.

    def _say(self, name: StepName, is_ok: bool | None, text: str) -> None:
        self._steps.append(Step(name, is_ok, text))

    def _end_at(self, name: StepName, text: str) -> None:
        self._say(name, False, text)
        self._ended_at = name

    def _fill(self, text: str) -> None:
        """The steps that were not looked at, in their places."""
        said = {step.name: step for step in self._steps}
        self._steps = [said.get(name) or Step(name, None, text) for name in StepName]

    def _each(self) -> list[NamedTask]:
        return list({task.id: task for task in (*self._ours, *self._theirs)}.values())

    def _known(self, tasks: Iterable[NamedTask], where: Mapping[TaskId, object]) -> list[NamedTask]:
        return [task for task in tasks if task.id in where]

    def _sees(self, one: NamedTask, other: NamedTask) -> PeerReport | None:
        interface, key = self._interfaces.get(one.id), self._key(other)
        if interface is None or not key:
            return None
        return next((peer for peer in interface.peers if peer.public_key == key), None)

    def _key(self, task: NamedTask) -> str:
        """The key that its kernel has, else the one that was admitted or claimed."""
        known: InterfaceReport | None = self._interfaces.get(task.id)
        record = self._state.peers.get(task.id) or self._state.claims.get(task.id)
        return known.public_key if known else record.public_key if record else ""

    def _silent(self) -> list[str]:
        return [f"the agent on {host} does not answer" for host in self._unknown_nodes()]

    def _unknown_nodes(self) -> tuple[str, ...]:
        return tuple(sorted({self._hostname(t.node) for t in self._each() if t.node not in self._reports}))

    def _hostname(self, node: NodeId) -> str:
        known = self._state.swarm.nodes.get(node)
        return known.hostname if known else str(node) or "no node"

    def _path(self, pair: _Pair) -> Path | None:
        one, other = self._state.peers.get(pair.source.id), self._state.peers.get(pair.destination.id)
        if one is None or other is None:
            return None
        shared = next((n for n in sorted(one.addresses) if n in other.addresses), None)
        if shared is None:
            return None
        return Path(
            source_task=pair.source.name,
            source_node=self._hostname(pair.source.node),
            source_address=str(one.addresses[shared]),
            source_endpoint=str(one.endpoint),
            destination_task=pair.destination.name,
            destination_node=self._hostname(pair.destination.node),
            destination_address=str(other.addresses[shared]),
            destination_endpoint=str(other.endpoint),
            mtu=self._interfaces[pair.source.id].mtu,
        )


def _in_force(state: MeshState, service: ServiceId) -> PolicyRecord | None:
    """The policy of a service that is in the mesh."""
    policy = state.policies.get(service)
    return policy if policy is not None and policy.mode is not Mode.OFF else None


def _attach(service: Service) -> str:
    return f"docker service update --network-add NETWORK {service.name}"


def _mode_of_link(name: str, policy: PolicyRecord | None) -> str:
    if policy is not None and policy.mode is Mode.ENFORCE:
        return f"{name} enforces: the link's ports are open, and nothing else"
    return f"{name} observes: nothing is dropped there"


def _ports(link: Link) -> str:
    return ", ".join(str(port) for port in link.ports) or "all ports"


def _some(texts: Sequence[str]) -> str:
    rest = len(texts) - _MANY
    return ", ".join(texts[:_MANY]) + (f" and {rest} more" if rest > 0 else "")


def _and(texts: Iterable[str]) -> str:
    return " and ".join(texts)


def _is(texts: Sequence[str]) -> str:
    return "is" if len(set(texts)) == 1 else "are"


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _tasks(number: int, service: str) -> str:
    return f"{_plural(number, 'task')} of {service}"
