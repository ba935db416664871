"""The cgroups of tasks: `/hivewire-lab/<node>/<container>` in every hierarchy (v1) or in one (v2).

Beside them is the engine's, as on a machine with systemd. Outside of any, each of its many processes would have as
large a share of the processors as all tasks of all nodes have together, and a start of several tasks left the agents
without.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

from lab.errors import LabError
from lab.patience import patient
from lab.settings import CGROUP


def trees() -> list[Path]:
    """List the lab's folder in each mounted hierarchy where it exists."""
    return [root / CGROUP for root, _ in _hierarchies() if (root / CGROUP).is_dir()]


def make_for_engine(node: str) -> list[Path]:
    """Make the cgroup of a node's engine where processors are shared out; which files take the engine in."""
    made = []
    for root, options in _hierarchies():
        group = root / CGROUP / node / "engine"
        controllers = root / "cgroup.controllers"  # version 2 only
        if "cpu" in (controllers.read_text().split() if controllers.exists() else options):
            group.mkdir(parents=True, exist_ok=True)
            if controllers.exists():
                for above in (root, root / CGROUP, root / CGROUP / node):
                    (above / "cgroup.subtree_control").write_text("+cpu")
            made.append(group / "cgroup.procs")
    return made


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


def _hierarchies() -> Iterator[tuple[Path, list[str]]]:
    """Where they are mounted, with the options of each mount."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        if kind in ("cgroup", "cgroup2"):
            yield Path(where.encode().decode("unicode_escape")), options.split(",")


def _folders(tree: Path) -> list[Path]:
    """List a tree's folders, each before those in it; what goes away meanwhile is passed over."""
    return [Path(where) for where, _, _ in os.walk(tree)]
