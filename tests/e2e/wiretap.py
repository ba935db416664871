"""Captures behind the guard: on every port of the bridge in a node's overlay namespaces."""

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lab.node import Node
from lab.patience import patient


def entered(node: Node, file: str) -> list[str]:
    """The begin of a command line that runs in a network namespace of Docker on a node."""
    # /var/run is a link from the root, which would be followed on this machine.
    return ["nsenter", f"--net=/proc/{node.pid}/root/run/docker/netns/{file}"]


def overlay_files(node: Node, network: str) -> list[str]:
    """The overlay namespaces of a network, given by its id, on a node."""
    try:
        names = os.listdir(f"/proc/{node.pid}/root/run/docker/netns")
    except OSError:
        return []
    return sorted(n for n in names if re.fullmatch(rf"\d+-{network[:10]}", n))


class Tap:
    """tcpdump on every port of the bridge in an overlay namespace: what leaves it, after the guard had its say.

    Raises AssertionError where tcpdump does not start, as when the namespace is gone again.
    """

    def __init__(self, node: Node, file: str, write: Path) -> None:
        self.write = write
        argv = [*entered(node, file), "tcpdump", "-i", "any", "-Q", "out", "-n", "-U", "-s", "0", "--immediate-mode"]
        self._tcpdump = subprocess.Popen(
            [*argv, "-Z", "root", "-w", str(write)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        assert self._tcpdump.stderr is not None
        for line in self._tcpdump.stderr:
            if "listening on" in line:
                return
        self._tcpdump.communicate(timeout=patient(10))
        raise AssertionError("tcpdump does not listen")

    def stop(self) -> None:
        time.sleep(patient(0.2))
        self._tcpdump.send_signal(signal.SIGINT)
        self._tcpdump.communicate(timeout=patient(10))


@contextmanager
def tapped(nodes: Iterable[Node], networks: Iterable[str], folder: Path) -> Iterator[list[Path]]:
    """Tap the overlay namespaces of these networks, those that come in between as well; gives the files.

    A tap ends with its namespace's file: it would keep alive what the engine let go of.
    """
    places, files = [(node, network) for node in nodes for network in networks], []
    taps: dict[tuple[Node, str], Tap] = {}
    stop = threading.Event()

    def look() -> None:
        found = {(node, file) for node, network in places for file in overlay_files(node, network)}
        for place in taps.keys() - found:
            taps.pop(place).stop()
        for node, file in sorted(found - taps.keys(), key=lambda place: (place[0].name, place[1])):
            with suppress(AssertionError):
                write = folder / f"{len(files)}-{node.name}-{file}.pcap"
                taps[node, file] = Tap(node, file, write)
                files.append(write)

    def follow() -> None:
        while not stop.wait(0.02):
            look()

    look()
    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield files
    finally:
        stop.set()
        thread.join()
        for tap in taps.values():
            tap.stop()
