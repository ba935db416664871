"""Who gets the processors: what is measured comes before what else runs on the machine, and equals are treated alike.

Processors are shared out among cgroups first. So for the time of a measurement this program, and with it every tool
that it starts, is in a cgroup of the lab, and the lab's gets more weight than the rest of the machine. A wireguard-go
that was started by hand goes where the product's is, beside that: neither may have a larger share than the other.
With kernel WireGuard there is nothing to do, for the kernel's threads are in no such group.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from lab.settings import CGROUP

FACTOR = 10
"""Of the weight that a cgroup has by itself."""


def tree() -> Path | None:
    """Where the hierarchy is mounted that shares out processors: that of version 1 if there is one, else version 2."""
    second = None
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        if kind == "cgroup" and "cpu" in options.split(","):
            return Path(where)
        if kind == "cgroup2":
            second = Path(where)
    return second


@contextlib.contextmanager
def ahead() -> Iterator[None]:
    """Needs a lab. Does nothing where the machine has no cgroups for this."""
    root = tree()
    lab = None if root is None else root / CGROUP
    weight = next((lab / name for name in ("cpu.shares", "cpu.weight") if (lab / name).exists()), None) if lab else None
    if root is None or lab is None or weight is None:
        yield
        return
    own, before, home = lab / "bench", weight.read_text(), group_of(os.getpid(), root)
    try:
        own.mkdir(exist_ok=True)
        _join(os.getpid(), own)
        weight.write_text(str(int(before) * FACTOR))
        yield
    finally:
        weight.write_text(before)
        _join(os.getpid(), home)
        with contextlib.suppress(OSError):  # a tool has not quite ended; `lab down` removes it
            own.rmdir()


def beside(pid: int, node: Path) -> None:
    """Put a process where the product's wireguard-go of the node with this network namespace is."""
    root = tree()
    if root is None:
        return
    groups = {group_of(other, root) for other in _wireguard_go(node) if other != pid}
    for group in sorted(group for group in groups if CGROUP in group.parts)[:1]:
        _join(pid, group)


def _wireguard_go(node: Path) -> list[int]:
    """Its processes whose sockets are on this node."""
    wanted = node.stat().st_ino
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if (process / "comm").read_text().strip() == "wireguard-go" and (
                process / "ns/net"
            ).stat().st_ino == wanted:
                found.append(int(process.name))
    return sorted(found)


def group_of(pid: int, root: Path) -> Path:
    """The cgroup of a process in the hierarchy that is mounted there: cgroups(7)."""
    paths = {}
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))
    found = paths.get("cpu", paths.get("", "/"))
    return root / found.lstrip("/")


def _join(pid: int, group: Path) -> None:
    (group / "cgroup.procs").write_text(str(pid))
