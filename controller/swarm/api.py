"""The seam between the controller and Swarm: what the controller asks, and what it is told."""

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from controller.swarm.snapshot import Service, SwarmInfo, SwarmSnapshot, Task
from hivewire.ids import ServiceId, TaskId

LIVE: Final = frozenset({"running", "ready"})
"""Desired states of tasks that Swarm wants to run."""


class EventKind(enum.Enum):
    SUBSCRIBED = "subscribed"
    """The subscription stands: what was read before may be old, so read again."""
    SERVICE = "service"
    NODE = "node"
    NETWORK = "network"


@dataclass(frozen=True, slots=True)
class SwarmEvent:
    """Something changed. An event is a hint to read again; it says nothing that one may build on."""

    kind: EventKind
    action: str = ""
    id: str = ""
    name: str = ""


class Swarm(Protocol):
    """Questions to a manager. Each raises SwarmUnavailable where it does not answer, NoPermission where it refuses."""

    def snapshot(self) -> SwarmSnapshot:
        """Services, networks and nodes as they are now, read one after the other."""
        ...

    def service(self, service: ServiceId) -> Service:
        """One service. Raises Gone."""
        ...

    def task(self, task: TaskId) -> Task:
        """One task, finished or not. Raises TaskGone."""
        ...

    def tasks(self, service: ServiceId | None = None, desired: frozenset[str] = LIVE) -> tuple[Task, ...]:
        """Tasks by id: of one service or all, with one of these desired states; an empty set asks for every task."""
        ...

    def info(self) -> SwarmInfo:
        """What the engine says of itself."""
        ...

    def events(self) -> Iterator[SwarmEvent]:
        """Changes of services, nodes and networks; Swarm announces none of tasks.

        The first event is SUBSCRIBED. Ends where nothing happened for a while, since a dead connection looks the
        same: subscribe again. Raises SwarmUnavailable where the stream breaks.
        """
        ...
