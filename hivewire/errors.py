"""The errors of Hivewire: the class says what a reconcile loop does with it.

Adapters catch what their library raises and raise one of these with ``from``; nobody else names a library's
exception. A message is written for an operator: it names the thing, says what is wrong and what to do.
"""

from typing import Final


class HivewireError(Exception):
    """Root of everything that Hivewire raises on purpose."""


class InvalidInput(HivewireError):
    """A person must change something; trying again without a change is useless."""


class InvalidPolicy(InvalidInput):
    """A label's value cannot be read or does not make sense."""


class InvalidSettings(InvalidInput):
    """A setting of the process itself is missing or wrong; the process does not start."""


class InvalidRecord(InvalidInput):
    """A stored record cannot be read; it is ignored and shown, and the last good state stays."""


CAUSES: Final = ("size", "form", "path", "certificate", "role", "clock", "signature", "replay")


class UnverifiedRecord(InvalidRecord):
    """Nobody who may write a record has signed it so: it counts as not written.

    ``cause`` is one of ``CAUSES``, for counting. ``may_pass``: the same bytes may be good in a moment.
    """

    def __init__(self, cause: str, message: str, *, may_pass: bool = False) -> None:
        super().__init__(message)
        self.cause = cause
        self.may_pass = may_pass


class InvalidIdentity(InvalidInput):
    """A node certificate or key cannot be used."""


class Conflict(HivewireError):
    """Our view is old: observe again, at once."""


class RevisionConflict(Conflict):
    """A guarded transaction did not hold: somebody wrote in between."""


class WatchCompacted(Conflict):
    """The revision to watch from is gone from the store: list again."""


class NotLeader(Conflict):
    """Another controller leads: stop writing."""


class Unavailable(HivewireError):
    """An outside system does not answer now: keep what is applied, try later with backoff."""


class StoreUnavailable(Unavailable):
    """etcd does not answer."""


class SwarmUnavailable(Unavailable):
    """The Docker Engine does not answer, or its Swarm has no leader."""


class KernelBusy(Unavailable):
    """The kernel, or the userspace device, refused for now."""


class Gone(HivewireError):
    """The thing left: for a removal that is success, else forget the key."""


class NamespaceGone(Gone):
    """The network namespace of a task no longer exists."""


class TaskGone(Gone):
    """The task or its container no longer exists."""


class LeaseExpired(Gone):
    """The lease ran out: what hung on it was deleted by the store."""


class Unsupported(HivewireError):
    """This node or this version cannot do it: report once, check again slowly."""


class NoPermission(Unsupported):
    """A capability or an access right is missing."""


class NoWireGuard(Unsupported):
    """Neither the kernel nor a userspace implementation offers WireGuard here."""


class RecordTooNew(Unsupported):
    """A record was written by a newer version than this one."""
