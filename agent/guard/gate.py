"""Shuts the new overlay namespaces of strict networks on a node whose agent is not there yet.

An engine that starts starts the agent and all other tasks at the same time, so that tasks of the node's strict networks
may run before there is a guard. Containers of no service that have a restart policy it starts before it joins the
Swarm (moby 20.10 and 26.1: NewDaemon ends with daemon.restore, createAndStartCluster comes after it in
cmd/dockerd/daemon.go). The gate is such a container, on the network of the node.

It asks nobody, neither engine nor store, and remembers nothing: a network is strict where the node's own namespace has
its edge (edge.py), which outlives engine and agent. What it makes is what an agent begins with, and only where there is
no guard; all that comes after it is the agent's.
"""

import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from agent.guard import edge
from agent.guard.render import SHUT, render
from agent.kernel.edges import Edges, NodeEdges
from agent.kernel.inotify import NewFiles
from agent.kernel.overlay import MOUNT_S, OverlayNamespaces, Overlays, network_of, open_new
from agent.settings import AgentSettings
from hivewire import __version__, logs
from hivewire.errors import HivewireError, KernelBusy, NamespaceGone
from hivewire.process import harden, stop_event
from hivewire.settings import load

#: So long what the kernel refused is left alone, and so long it takes to hear that the process should end.
_TURN_S: Final = 0.5


class Gate:
    """Of one thread."""

    def __init__(self, overlays: Overlays, edges: Edges) -> None:
        self._overlays = overlays
        self._edges = edges
        self._refused = frozenset[str]()

    def shut(self, file: str) -> bool:
        """Shut the file's namespace where its network is strict and nobody guards it yet; whether it was shut now.

        Raises NamespaceGone, KernelBusy, NoPermission.
        """
        network = network_of(file)
        if network is None or edge.table_of(network) not in self._edges.read():
            return False
        with open_new(self._overlays, file, time.monotonic() + MOUNT_S) as space:
            return space.create(render(SHUT)[0])

    def shut_all(self, files: Iterable[str]) -> frozenset[str]:
        """The same for several; those that the kernel refused, for what is not shut is open."""
        log, left = logs.get(), set[str]()
        for file in sorted(files):
            try:
                if self.shut(file):
                    log.info("gate.shut", namespace=file)
            except NamespaceGone:
                continue
            except HivewireError as error:
                left.add(file)
                if file not in self._refused:
                    log.error("gate.late", namespace=file, error=str(error))
        self._refused = frozenset(left)
        return self._refused


def run(folder: Path, stop: threading.Event) -> None:
    """Shut what is there and what comes, until ``stop`` is set."""
    log = logs.get()
    overlays = OverlayNamespaces(folder)
    gate = Gate(overlays, NodeEdges())
    log.info("gate.started", version=__version__, folder=str(folder))
    said = ""
    while not stop.is_set():
        try:
            with NewFiles(folder) as files:
                said = ""
                left = gate.shut_all(overlays.list())  # those that came before the watch
                while not stop.is_set():
                    left = gate.shut_all({*left, *files.wait(_TURN_S)})
        except KernelBusy as error:
            if str(error) != said:  # not twice a second
                log.warning("gate.unwatched", error=str(error))
            said = str(error)
            stop.wait(_TURN_S)
    log.info("gate.stopped")


def main() -> None:
    try:
        harden()
        settings = load(AgentSettings)
        logs.setup("gate", level=settings.log_level, style=settings.log_format)
        run(settings.namespaces, stop_event())
    except HivewireError as error:
        sys.exit(f"hivewire-gate: {error}")


if __name__ == "__main__":
    main()
