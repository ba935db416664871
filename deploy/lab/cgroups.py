"""The cgroups of tasks: `/hivewire-lab/<node>/<container>` in every hierarchy (v1) or in one (v2)."""

import os
import time
from pathlib import Path

from lab.errors import LabError
from lab.patience import patient
from lab.settings import CGROUP


def trees() -> list[Path]:
    """List the lab's folder in each mounted hierarchy where it exists."""
    found = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind in ("cgroup", "cgroup2"):
            tree = Path(where.encode().decode("unicode_escape")) / CGROUP
            if tree.is_dir():
                found.append(tree)
    return found


def members() -> list[int]:
    """List the processes in the lab's cgroups."""
    pids: set[int] = set()
    for tree in trees():
        for folder in _folders(tree):
            try:
                pids.update(int(word) for word in (folder / "cgroup.procs").read_text().split())
            except OSError:
                continue  # the cgroup went away, or is threaded
    pids.discard(0)  # a process of a namespace that we do not see
    return sorted(pids)


def remove(timeout_s: float = 10) -> None:
    """Remove the lab's cgroups.

    Raises LabError when one is still busy after `timeout_s` seconds.
    """
    deadline = time.monotonic() + patient(timeout_s)
    while left := trees():
        for tree in left:
            for folder in reversed(_folders(tree)):  # deepest first: a cgroup with children cannot go
                try:
                    folder.rmdir()
                except OSError:
                    continue
        if trees() and time.monotonic() > deadline:
            raise LabError(f"cgroup {left[0]} is busy; see its cgroup.procs, end those processes, try again")
        time.sleep(0.02)


def _folders(tree: Path) -> list[Path]:
    """List a tree's folders, each before those in it; what goes away meanwhile is passed over."""
    return [Path(where) for where, _, _ in os.walk(tree)]
