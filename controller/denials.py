"""Who tried what: what the tasks noted by address, joined to the names that people know. Pure.

An end is a service where its address is that of one of its tasks, or its VIP, on a network of the task that noted it;
else it stays an address. A client outside of the mesh that uses a VIP shows as the load balancer of its node, which
Swarm puts between the two.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import IPv4Address
from typing import Final

from controller.api.shapes import AttemptView, DenialView, DeniedCount, LabelView, SuggestionView
from controller.policy.compile import MeshDefaults
from controller.policy.suggest import Suggestion, Wish, commands, stack_files, suggest
from controller.state import MeshState
from controller.swarm.snapshot import Task
from hivewire.ids import NetworkId, ServiceId, TaskId
from hivewire.records import PeerRecord, PortRange, Protocol
from hivewire.reports import DenialEntry, Direction, FlowEntry, Reason, TaskDenials

STATUS_S: Final = 300
"""What ``status`` counts."""

_PROTOCOLS: Final = {1: "icmp", 6: "tcp", 17: "udp"}
_IGMP: Final = 2
"""What kernels tell each other about groups: nobody's attempt."""
_LINKABLE: Final = {6: Protocol.TCP, 17: Protocol.UDP}


@dataclass(frozen=True, slots=True)
class End:
    """One end of an attempt. ``service`` is None for an address that is nobody's."""

    name: str
    service: ServiceId | None = None


@dataclass(frozen=True, slots=True, order=True)
class What:
    source: str
    destination: str
    protocol: int
    port: int

    @property
    def words(self) -> str:
        """The name of the protocol."""
        return _PROTOCOLS.get(self.protocol, f"ip{self.protocol}")


@dataclass(slots=True)
class _Row:
    source: End
    destination: End
    counts: Counter[tuple[bool, bool]] = field(default_factory=Counter)
    """By whether it was dropped, and whether the source noted it."""
    reasons: dict[bool, set[str]] = field(default_factory=lambda: {False: set(), True: set()})
    tasks: dict[bool, set[str]] = field(default_factory=lambda: {False: set(), True: set()})
    seen: dict[bool, tuple[float, float]] = field(default_factory=dict)
    """First and last time, by whether it was dropped."""

    @property
    def passes(self) -> bool:
        """Whether it did when it was seen last."""
        return max(self.seen, key=lambda dropped: (self.seen[dropped][1], dropped)) is False

    @property
    def last_seen(self) -> float:
        return max(last for _, last in self.seen.values())

    @property
    def dropped(self) -> int:
        return self.counts[True, False] + self.counts[True, True]

    @property
    def passed(self) -> int:
        """Both ends note what passes; and what the source lets go does not pass where the destination drops it."""
        into, out = self.counts[False, False], self.counts[False, True]
        return into if self.counts[True, False] else max(into, out)

    def see(self, entry: DenialEntry | FlowEntry, *, dropped: bool) -> None:
        first, last = self.seen.get(dropped, (entry.first_seen, entry.last_seen))
        self.seen[dropped] = min(first, entry.first_seen), max(last, entry.last_seen)


class _Addresses:
    """Whose address it is."""

    def __init__(self, state: MeshState) -> None:
        self._services = state.swarm.services
        self._own: dict[TaskId, set[IPv4Address]] = defaultdict(set)
        self._ends: dict[tuple[NetworkId, IPv4Address], ServiceId] = {}
        for service in state.swarm.services.values():
            self._ends.update(dict.fromkeys(service.vips.items(), service.id))
        holders: tuple[tuple[TaskId, Task | PeerRecord], ...] = (*state.tasks.items(), *state.peers.items())
        for id_, holder in holders:
            self._own[id_].update(holder.addresses.values())
            self._ends.update(dict.fromkeys(holder.addresses.items(), holder.service))
        self._anywhere = {address: service for (_, address), service in self._ends.items()}

    def name(self, service: ServiceId) -> End:
        known = self._services.get(service)
        return End(known.name, service) if known else End(service)

    def ends(self, report: TaskDenials, entry: DenialEntry | FlowEntry) -> tuple[End, End, bool]:
        """Source, destination, and whether the source is the task that noted it."""
        source, destination = IPv4Address(entry.source), IPv4Address(entry.destination)
        if not report.service:  # noted by the guard of a network, which stands between the two
            is_out = isinstance(entry, DenialEntry) and entry.direction is Direction.OUT
            return self._at(report.service, source), self._at(report.service, destination), is_out
        own = self._own.get(report.task, set())
        if source in own or destination in own:
            is_out = source in own
        else:  # the task has ended: all that is left of it is what it noted
            is_out = isinstance(entry, DenialEntry) and entry.direction is Direction.OUT
        here = self.name(report.service)
        if is_out:
            return here, self._at(report.service, destination), True
        return self._at(report.service, source), here, False

    def _at(self, observer: ServiceId, address: IPv4Address) -> End:
        known = self._services.get(observer)
        found = next((s for n in (known.networks if known else ()) if (s := self._ends.get((n, address)))), None)
        if found is None and known is None:
            found = self._anywhere.get(address)
        return self.name(found) if found is not None else End(str(address))


def rows(state: MeshState, reports: Iterable[TaskDenials], now: float, since: float | None = None) -> list[DenialView]:
    """What was dropped, and what would be in ``enforce``, by ends, port and outcome. ``since``: Unix time."""
    return [
        DenialView(
            source=what.source,
            destination=what.destination,
            protocol=what.words,
            port=what.port,
            dropped=dropped,
            count=count,
            reasons=sorted(row.reasons[dropped]),
            tasks=sorted(row.tasks[dropped]),
            first_seen=_time(row.seen[dropped][0]),
            last_seen=_time(row.seen[dropped][1]),
            last_seen_age_seconds=round(max(0.0, now - row.seen[dropped][1]), 3),
            detail=_detail(state, row),
        )
        for what, row in sorted(_join(state, _Addresses(state), reports, since).items())
        for dropped, count in ((False, row.passed), (True, row.dropped))
        if count
    ]


def _join(
    state: MeshState, addresses: _Addresses, reports: Iterable[TaskDenials], since: float | None = None
) -> dict[What, _Row]:
    """All that was noted, connections from before included, by ends and port."""
    names = {id_: task.name for id_, task in state.tasks.items()}
    names.update({id_: peer.task_name for id_, peer in state.peers.items()})
    joined: dict[What, _Row] = {}
    for report in reports:
        noted: tuple[DenialEntry | FlowEntry, ...] = (*report.entries, *report.flows)
        for entry in noted:
            if entry.protocol == _IGMP:
                continue
            source, destination, is_out = addresses.ends(report, entry)
            what = What(source.name, destination.name, entry.protocol, entry.port)
            if isinstance(entry, FlowEntry):
                joined.setdefault(what, _Row(source, destination)).see(entry, dropped=False)
            elif count := _count(entry, since):
                row = joined.setdefault(what, _Row(source, destination))
                row.see(entry, dropped=entry.dropped)
                row.counts[entry.dropped, is_out] += count
                row.reasons[entry.dropped].add(entry.reason.value)
                by = names.get(report.task, str(report.task)) if report.service else "guard"
                row.tasks[entry.dropped].add(by)
    return joined


Noted = tuple[str, str, str, str, int, int, str, float]
"""What tells one entry of one task from all others, whenever it is told again."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """One entry of what was dropped. Ends that are no service's are empty."""

    key: Noted
    source: str
    destination: str
    reason: Reason
    is_guard: bool
    count: int


def dropped(state: MeshState, reports: Iterable[TaskDenials]) -> Iterator[Dropped]:
    """Everything that was dropped and noted, one by one, for those who add it up."""
    addresses = _Addresses(state)
    for report in reports:
        for it in report.entries:
            if it.dropped and it.protocol != _IGMP:
                source, destination, _ = addresses.ends(report, it)
                names = [end.name if end.service is not None else "" for end in (source, destination)]
                key = (report.task, it.direction.value, it.source, it.destination, it.protocol, it.port)
                noted = (*key, it.reason.value, it.first_seen)
                yield Dropped(noted, names[0], names[1], it.reason, not report.service, it.count)


def row_key(row: DenialView) -> tuple[str, ...]:
    return row.source, row.destination, row.protocol, f"{row.port:05}", str(row.dropped)


def count(state: MeshState, reports: Iterable[TaskDenials], now: float) -> DeniedCount:
    """What was dropped in the last minutes, and the most frequent of it."""
    dropped = [row for row in rows(state, reports, now, now - STATUS_S) if row.dropped]
    top = max(dropped, key=lambda row: (row.count, row_key(row)), default=None)
    return DeniedCount(count=sum(row.count for row in dropped), period_seconds=STATUS_S, top=top)


def suggestions(state: MeshState, reports: Iterable[TaskDenials], stack: str | None = None) -> SuggestionView:
    """The labels that would allow what was seen, and what ``enforce`` would cut. ``stack``: with an end in it."""
    joined = {
        what: row
        for what, row in sorted(_join(state, _Addresses(state), reports).items())
        if stack is None or any(_is_in(state, stack, end.service) for end in (row.source, row.destination))
    }
    wishes = {what: wish for what, row in joined.items() if (wish := _wish(what, row)) is not None}
    made = suggest(wishes.values(), state.swarm, state.policies, MeshDefaults(state.mode))
    return SuggestionView(
        labels=[
            LabelView(service=it.service, stack=it.stack, label=it.label, current=it.before, suggested=it.after)
            for it in made.changes
        ],
        commands=commands(made.changes),
        stack_files=stack_files(made.changes),
        attempts=[
            AttemptView(
                source=what.source,
                destination=what.destination,
                protocol=what.words,
                port=what.port,
                passes=row.passes,
                count=row.dropped + row.passed,
                last_seen=_time(row.last_seen),
                is_suggested=what in wishes and wishes[what] not in made.refused and wishes[what] not in made.linked,
                reason=_why_not(what, wishes.get(what), made),
            )
            for what, row in joined.items()
        ],
        revision=state.revision,
    )


def _wish(what: What, row: _Row) -> Wish | None:
    source, destination, protocol = row.source.service, row.destination.service, _LINKABLE.get(what.protocol)
    if source is None or destination is None or protocol is None or not what.port:
        return None
    return Wish(source, destination, PortRange(protocol=protocol, first=what.port, last=what.port))


def _why_not(what: What, wish: Wish | None, made: Suggestion) -> str:
    if wish is None:
        return "an end is no known service" if what.protocol in _LINKABLE else "links are for TCP and UDP ports"
    if wish in made.linked:
        return "a link allows it: new connections take it"
    return made.refused.get(wish, "")


def _is_in(state: MeshState, stack: str, service: ServiceId | None) -> bool:
    known = None if service is None else state.swarm.services.get(service)
    return known is not None and known.stack == stack


def _count(entry: DenialEntry, since: float | None) -> int:
    if since is None or entry.first_seen >= since:
        return entry.count
    if entry.last_seen < since:
        return 0
    # Whole minutes: the one in which ``since`` lies counts.
    return sum(count for minute, count in entry.minutes if (minute + 1) * 60 > since)


def _detail(state: MeshState, row: _Row) -> str:
    for end in (row.source, row.destination):
        if end.service is None and _is_overlay(state, end.name):
            return f"{end.name} is no task's: it may be a node's load balancer, between a VIP and its client"
    return ""


def _is_overlay(state: MeshState, text: str) -> bool:
    try:
        address = IPv4Address(text)
    except ValueError:
        return False
    return any(address in subnet for network in state.swarm.networks.values() for subnet in network.subnets)


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
