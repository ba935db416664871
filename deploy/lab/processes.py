"""Find and end the lab's processes: those of its namespaces and cgroups, and no others."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from lab.errors import LabError
from lab.patience import patient

NAMESPACES = ("net", "mnt", "pid")


def namespaces_of(pid: int) -> frozenset[str]:
    """Name the namespaces that a process is in, such as `net:[4026532001]`; empty when it is gone."""
    found = set()
    for kind in NAMESPACES:
        try:
            found.add(os.readlink(f"/proc/{pid}/ns/{kind}"))
        except OSError:
            continue
    return frozenset(found)


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def inside(namespaces: frozenset[str]) -> list[int]:
    """List the processes that are in any of `namespaces`.

    Our own namespaces never count, whatever a stale file says: that would be the whole machine.
    """
    ours = namespaces - namespaces_of(os.getpid()) - namespaces_of(1)
    if not ours:
        return []
    pids = (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
    return [pid for pid in pids if pid != os.getpid() and namespaces_of(pid) & ours and is_alive(pid)]


def kill(pids: Iterable[int], grace_s: float = 1) -> None:
    """Send SIGKILL and wait up to `grace_s` seconds for the processes to go."""
    killed = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
    deadline = time.monotonic() + grace_s
    while any(Path(f"/proc/{pid}").exists() for pid in killed) and time.monotonic() < deadline:
        time.sleep(0.02)


def kill_all(find: Callable[[], Iterable[int]], timeout_s: float = 15) -> None:
    """Kill what `find` finds until it finds nothing.

    Raises LabError when something is still there after `timeout_s` seconds.
    """
    deadline = time.monotonic() + patient(timeout_s)
    while pids := list(find()):
        if time.monotonic() > deadline:
            raise LabError(f"processes {pids} do not end on SIGKILL; look at them with `ps -fp` and try again")
        kill(pids, grace_s=0.2)
