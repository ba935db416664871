"""Who gets the processors: what is measured comes before what else runs on the machine, and equals are treated alike.

Processors are shared out among control groups first. So for the time of a measurement this program, and with it every
tool that it starts, is in one of the lab's, and the lab's gets more weight than the rest of the machine. A wireguard-go
that was started by hand goes where the product's is, beside that: neither may have a larger share than the other.
With kernel WireGuard there is nothing to do, for the kernel's threads are in no such group.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from lab.settings import CGROUP

FACTOR = 10
"""Of the weight that a control group has by itself."""


def tree(controller: str) -> Path | None:
    """Where the hierarchy of a controller is mounted: that of version 1 if there is one, else version 2."""
    second = None
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        if kind == "cgroup" and controller in options.split(","):
            return Path(where)
        if kind == "cgroup2":
            second = Path(where)
    return second


@contextlib.contextmanager
def ahead() -> Iterator[None]:
    """Needs a lab. Does nothing where the machine has no control groups for this."""
    with contextlib.ExitStack() as undo:
        for root in _trees():
            lab = root / CGROUP
            for name in ("cpu.shares", "cpu.weight"):
                if (lab / name).exists():
                    before = (lab / name).read_text()
                    (lab / name).write_text(str(int(before) * FACTOR))
                    undo.callback((lab / name).write_text, before)
            if lab.exists():
                undo.enter_context(_within(lab / "bench", root))
        yield


@contextlib.contextmanager
def _within(group: Path, root: Path) -> Iterator[None]:
    """This process, and what it starts, in a control group of its own."""
    home = group_of(os.getpid(), root)
    group.mkdir(exist_ok=True)
    _join(os.getpid(), group)
    try:
        yield
    finally:
        _join(os.getpid(), home)
        with contextlib.suppress(OSError):  # a tool has not quite ended; `lab down` removes it
            group.rmdir()


def is_ahead() -> bool:
    """Whether this process is in a control group of the lab."""
    root = tree("cpuacct")
    return root is not None and CGROUP in group_of(os.getpid(), root).parts


def spent_s() -> float | None:
    """Processor seconds of all that runs in the lab, tools included while they are ahead; None where nobody counts."""
    root = tree("cpuacct")
    lab = (root or Path("/nowhere")) / CGROUP
    if (lab / "cpuacct.usage").exists():
        return int((lab / "cpuacct.usage").read_text()) / 1e9
    if (lab / "cpu.stat").exists():
        return int((lab / "cpu.stat").read_text().split()[1]) / 1e6  # "usage_usec N" is its first line
    return None


def beside(pid: int, node: Path) -> None:
    """Put a process where the product's wireguard-go of the node with this network namespace is."""
    for root in _trees():
        groups = {group_of(other, root) for other in _wireguard_go(node) if other != pid}
        for group in sorted(group for group in groups if CGROUP in group.parts)[:1]:
            _join(pid, group)


def _trees() -> set[Path]:
    """The hierarchies that share out processors, and that count what was used of them."""
    return {root for root in (tree("cpu"), tree("cpuacct")) if root is not None}


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
    """The control group of a process in the hierarchy that is mounted there: cgroups(7)."""
    paths = {}
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        paths.update({tree(controller): path for controller in controllers.split(",")})
    return root / paths.get(root, "/").lstrip("/")


def _join(pid: int, group: Path) -> None:
    (group / "cgroup.procs").write_text(str(pid))
