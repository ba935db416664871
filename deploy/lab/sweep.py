"""Leave the machine as it was, whatever state a run ended in. Every step may find nothing to do."""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lab import cgroups, processes, underlay
from lab.command import run
from lab.settings import Settings


def leftovers(settings: Settings) -> list[str]:
    """Name what is there of a lab, in words; an empty list means a clean machine."""
    found = [f"network namespace {name}" for name in underlay.namespaces()]
    found += [f"process {pid}" for pid in _members(_recorded_namespaces(settings))]
    found += [f"cgroup {tree}" for tree in cgroups.trees()]
    found += [f"mount {path}" for path in _mounts(settings)]
    return found + [
        f"folder {path}" for path in (settings.state, settings.data) if path.exists() and not _is_bare(path)
    ]


def sweep(settings: Settings) -> None:
    """Remove everything of a lab but its caches.

    Raises LabError when a process or a cgroup does not go away.
    """
    namespaces = _recorded_namespaces(settings)
    # First the nodes' first processes: the kernel ends what runs under them, and their parents,
    # which are still there, collect them.
    processes.kill(pid for pid in _first_processes(settings) if processes.namespaces_of(pid) & namespaces)
    processes.kill_all(lambda: _members(namespaces))
    underlay.remove()
    cgroups.remove()
    for path in reversed(_mounts(settings)):
        run("umount", "--lazy", str(path), check=False)
    for folder in (settings.data, settings.state):
        if folder.is_dir():
            # By several processes, for these are a hundred thousand files.
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda entry: run("rm", "-rf", str(entry), timeout_s=300), folder.iterdir()))
            if not folder.is_mount():  # else it is a tmpfs that the caller gave
                folder.rmdir()


def _is_bare(path: Path) -> bool:
    """Tell whether a folder is a tmpfs that the caller gave, with nothing of ours in it."""
    return path.is_mount() and not any(path.iterdir())


def _recorded_namespaces(settings: Settings) -> frozenset[str]:
    """Collect the namespaces of the nodes from the state and from the names in /run/netns.

    Whoever is in one of them is part of the lab. Reading the names too covers a start that was cut
    off before it could write its state.
    """
    found: set[str] = set()
    for file in settings.state.glob("n*/namespaces"):
        found.update(file.read_text().split())
    for name in underlay.namespaces():
        found.add(f"net:[{(underlay.NETNS / name).stat().st_ino}]")
    return frozenset(found)


def _first_processes(settings: Settings) -> list[int]:
    found = []
    for file in settings.state.glob("n*/engine/init.pid"):
        with contextlib.suppress(OSError, ValueError):
            found.append(int(file.read_text()))
    return found


def _members(namespaces: frozenset[str]) -> list[int]:
    return sorted({*processes.inside(namespaces), *cgroups.members()})


def _mounts(settings: Settings) -> list[Path]:
    """List mounts below the lab's folders; normally none, since nodes mount in their own namespace."""
    found = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        path = Path(line.split()[1].encode().decode("unicode_escape"))
        if settings.state in path.parents or settings.data in path.parents:
            found.append(path)
    return found
