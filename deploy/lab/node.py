"""A node: the namespaces that stand for one machine, and the process that keeps them."""

import ipaddress
import time
from dataclasses import dataclass
from pathlib import Path

from lab import processes
from lab.command import Completed, detach, run
from lab.errors import LabError
from lab.patience import patient
from lab.settings import NETWORK, PREFIX, Settings

INIT = Path(__file__).with_name("node-init.sh")


@dataclass(frozen=True, slots=True)
class Node:
    """One node of the lab; `number` counts from 1."""

    number: int
    dir: Path
    data: Path

    @property
    def name(self) -> str:
        return f"n{self.number}"

    @property
    def address(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        return NETWORK[self.number]

    @property
    def namespace(self) -> str:
        return PREFIX + self.name

    @property
    def socket(self) -> Path:
        """The engine's socket, seen from outside the node."""
        return self.dir / "engine" / "docker.sock"

    @property
    def engine_log(self) -> Path:
        return self.dir / "dockerd.log"

    @property
    def pid(self) -> int:
        """Process id of the node's first process.

        Raises LabError when the node does not run.
        """
        pid = _read_pid(self.dir / "engine" / "init.pid")
        if pid is None or not processes.is_alive(pid):
            raise LabError(f"node {self.name} is not running; `lab down` and `lab up` start the lab again")
        return pid

    def enter(self, *argv: str) -> tuple[str, ...]:
        """Build the command line that runs `argv` in this node."""
        return ("nsenter", "-t", str(self.pid), "-m", "-u", "-n", "-p", "--", *argv)


def make(number: int, settings: Settings) -> Node:
    """Name the folders of node `number`."""
    return Node(number, settings.state / f"n{number}", settings.data / f"n{number}")


def start(node: Node, root: Path | None, seed: Path | None = None, timeout_s: float = 20) -> None:
    """Start the first process of a node whose network namespace exists, with the images of a seed.

    Raises LabError when the node is not ready within `timeout_s` seconds.
    """
    (node.dir / "engine").mkdir(parents=True, exist_ok=True)
    node.data.mkdir(parents=True, exist_ok=True)
    (node.dir / "engine" / "init.pid").unlink(missing_ok=True)
    log = node.dir / "init.log"
    namespace = ("nsenter", f"--net=/run/netns/{node.namespace}")
    unshare = ("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child")
    words = (f"NODE={node.name}", f"DIR={node.dir}", f"DATA={node.data}", f"ROOT={root or ''}", f"SEED={seed or ''}")
    detach((*namespace, *unshare, "env", *words, "sh", str(INIT)), log, node.dir / "unshare.pid")
    deadline = time.monotonic() + patient(timeout_s)
    while (pid := _read_pid(node.dir / "engine" / "init.pid")) is None:
        starter = _read_pid(node.dir / "unshare.pid")
        if time.monotonic() > deadline or (starter is not None and not processes.is_alive(starter)):
            said = log.read_text(errors="replace").strip()[-1000:]
            raise LabError(f"node {node.name} did not start: {said or 'no output'} (log: {log})")
        time.sleep(0.02)
    # Kept for `lab down`: whoever is in these namespaces belongs to the lab, also after a crash.
    (node.dir / "namespaces").write_text("\n".join(sorted(processes.namespaces_of(pid))))


def execute(
    node: Node, *argv: str, check: bool = True, text_in: str | None = None, timeout_s: float = 120
) -> Completed:
    """Run a program in the node; raises as `command.run` does."""
    return run(*node.enter(*argv), check=check, text_in=text_in, timeout_s=timeout_s)


def _read_pid(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
