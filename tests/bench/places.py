"""Where a measurement runs: network namespaces of nodes, of tasks, and of devices made by hand.

Tools are this machine's own and enter only the network namespace, so that no image needs to hold one and the engine
that a node runs does not matter.
"""

import subprocess
from dataclasses import dataclass
from pathlib import PurePath

from lab import cgroups
from lab.command import CLEAN_ENVIRONMENT, Completed, run
from lab.errors import LabError
from lab.lab import Lab
from proof.deployed import Deployed, Task


@dataclass(frozen=True, slots=True)
class Place:
    """A network namespace, by a path that this machine can open."""

    path: str

    def argv(self, *words: str) -> tuple[str, ...]:
        return ("nsenter", f"--net={self.path}", *words)

    def run(self, *words: str, check: bool = True, text_in: str | None = None, timeout_s: float = 60) -> Completed:
        """Raises CommandFailed, LabError as lab.command.run does."""
        return run(*self.argv(*words), check=check, text_in=text_in, timeout_s=timeout_s, env=CLEAN_ENVIRONMENT)

    def run_from(self, container: int, *words: str, check: bool = True, text_in: str | None = None) -> Completed:
        """A program of a container's image in this namespace; ``container`` is the id of one of its processes."""
        argv = ("nsenter", f"--mount=/proc/{container}/ns/mnt", f"--net={self.path}", *words)
        return run(*argv, check=check, text_in=text_in, timeout_s=60, env=CLEAN_ENVIRONMENT)

    def start(self, *words: str) -> "subprocess.Popen[bytes]":
        """A program in the background that says nothing; whoever starts it ends it."""
        quiet = subprocess.DEVNULL
        return subprocess.Popen(
            self.argv(*words), stdin=quiet, stdout=quiet, stderr=quiet, env=CLEAN_ENVIRONMENT, start_new_session=True
        )


def of_node(lab: Lab, name: str) -> Place:
    return Place(f"/run/netns/{lab.node(name).namespace}")


def of_task(mesh: Deployed, task: Task) -> Place:
    """Found through the node's first process, for the engine keeps namespaces in the node's own /run."""
    # Not below /var/run: that is a link to /run, which would lead out of the node again.
    return Place(f"/proc/{mesh.lab.node(task.node).pid}/root/run/docker/netns/{PurePath(mesh.sandbox(task)).name}")


def process_of(mesh: Deployed, task: Task) -> int:
    """A process of the task, by the id that it has on this machine; the engine knows only the one on its node."""
    for tree in cgroups.trees():
        members = tree / task.node / task.container / "cgroup.procs"
        if members.exists() and (found := members.read_text().split()):
            return int(found[0])
    raise LabError(f"no process of {task.name} in the lab's control groups")
