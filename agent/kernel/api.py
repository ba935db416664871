"""The seam between the agent and what programs a namespace: kernel WireGuard, or wireguard-go where there is none."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final, Protocol

from agent.observed import NotedCounters, NotedEntry, ObservedTask
from agent.ops import Op
from hivewire.ids import TaskId
from hivewire.records import Address

INTERFACE: Final = "wg0"
"""Name of the interface inside every task namespace."""

ALIAS: Final = "hivewire"
"""The interface's alias (IFLA_IFALIAS) begins with this: what does not is not ours and is never touched."""


@dataclass(frozen=True, slots=True)
class Namespace:
    """A task's network namespace: a path, and the identity (device, inode) that was behind it when it was looked at."""

    task: TaskId
    path: str
    device: int
    inode: int


@dataclass(frozen=True, slots=True)
class Underlay:
    """The interface of the node that carries its underlay address."""

    address: Address
    interface: str
    mtu: int


class Session(Protocol):
    """A namespace held open for a moment. Not thread-safe; each thread opens its own."""

    def observe(self) -> ObservedTask:
        """Read what is there. Raises NamespaceGone, KernelBusy."""

    def apply(self, ops: Iterable[Op]) -> None:
        """Carry out the operations in order.

        What exists already is done, and so is the removal of what is absent. Raises NamespaceGone, KernelBusy,
        NoPermission, NoWireGuard; the operations before the failing one stay applied.
        """

    def flows(self) -> frozenset[IPv4Address]:
        """Both ends of the connections under way; an address that a rule gave another one for is none of them.

        Raises KernelBusy.
        """

    def noted_counters(self) -> NotedCounters:
        """How much the rules noted since they are there. Raises KernelBusy."""

    def noted_entries(self, name: str) -> tuple[NotedEntry, ...]:
        """What is in the set of this name; nothing where there is none. Raises KernelBusy."""


class Kernel(Protocol):
    """A way of making WireGuard interfaces on this node."""

    @property
    def backend(self) -> str:
        """``kernel`` or ``userspace``."""

    @property
    def calls(self) -> int:
        """Netlink and UAPI requests and nft transactions since the start."""

    def find(self, task: TaskId, path: str) -> Namespace:
        """The namespace behind a path. Raises NamespaceGone where there is none, or where it is the node's own."""

    def open(self, namespace: Namespace) -> AbstractContextManager[Session]:
        """Hold the namespace open for one pass. Raises NamespaceGone where another one is behind the path by now."""

    def forget(self, task: TaskId) -> None:
        """The task is gone: free what is held for it outside its namespace. The interface went with the namespace."""

    def underlay(self, address: Address) -> Underlay:
        """The interface that carries the address, measured now. Raises NoPermission, InvalidSettings if none does."""
