"""WireGuard as somebody makes it by hand, with `ip` and `wg`: what the product's links are held against.

Two kinds. Devices on the nodes themselves are what a person makes to join two machines. Devices in namespaces of their
own, whose UDP sockets stay on the nodes, have the very path of a link between two tasks, with the same addresses, the
same MTU and the same WireGuard, and nothing of Hivewire.

Everything is in namespaces of the lab or named like them, so `lab down` ends it after a crash too.
"""

import contextlib
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lab.command import run
from lab.errors import LabError
from lab.lab import Lab
from lab.settings import PREFIX

from tests.bench import places, turns
from tests.bench.places import Place
from tests.bench.probes import Route

FIRST_PORT = 40001
_SOCKETS = Path("/var/run/wireguard")
_PATIENCE_S = 10


@dataclass(slots=True)
class Workshop:
    """Makes devices in a lab, and takes them away again."""

    lab: Lab
    mtu: int
    wireguard_go: Path | None
    """The program where the kernel has no WireGuard: the product's own, for releases differ by a factor."""
    _undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _made: int = 0

    def on_nodes(self, client: str, server: str) -> Route:
        """A device on each of two nodes."""
        ends = (places.of_node(self.lab, client), places.of_node(self.lab, server))
        devices = [self._device(end) for end in ends]
        addresses = ("10.99.0.1", "10.99.0.2")
        self._join(devices, ends, addresses, (client, server))
        return Route(*ends, addresses[1])

    def in_namespaces(self, client: str, server: str, addresses: tuple[str, str]) -> Route:
        """A device in a new namespace per node, born on the node."""
        names, inside, devices = [], [], []
        for node in (client, server):
            device = self._device(places.of_node(self.lab, node))
            namespace = f"{PREFIX}bench-{device}"
            run("ip", "netns", "add", namespace)
            self._undo.callback(run, "ip", "netns", "del", namespace, check=False)
            places.of_node(self.lab, node).run("ip", "link", "set", device, "netns", namespace)
            place = Place(f"/run/netns/{namespace}")
            place.run("ip", "link", "set", "lo", "up")
            # Named as in a task, so that rules that were copied from one hold.
            place.run("ip", "link", "set", device, "name", "wg0")
            names.append("wg0" if self.wireguard_go is None else device)
            inside.append(place)
            devices.append(device)
        ends = (inside[0], inside[1])
        self._join(names, ends, addresses, (client, server), interface="wg0")
        return Route(*ends, addresses[1])

    def close(self) -> None:
        self._undo.close()

    def _device(self, node: Place) -> str:
        self._made += 1
        name = f"hwb{self._made}"
        if self.wireguard_go is None:
            node.run("ip", "link", "add", name, "mtu", str(self.mtu), "type", "wireguard")
        else:
            process = node.start(str(self.wireguard_go), "-f", name)
            self._undo.callback(_end, process)
            turns.beside(process.pid, Path(node.path))
            _wait(f"wireguard-go with {name}", lambda: (_SOCKETS / f"{name}.sock").exists())
            # While it still sees the device, which is about to leave its namespace.
            node.run("ip", "link", "set", name, "mtu", str(self.mtu))
        # What was moved into a namespace went with that.
        self._undo.callback(node.run, "ip", "link", "del", name, check=False)
        return name

    def _join(
        self,
        devices: list[str],
        ends: tuple[Place, Place],
        addresses: tuple[str, str],
        nodes: tuple[str, str],
        interface: str = "",
    ) -> None:
        """Keys, peers, addresses and routes for both ends."""
        private = [run("wg", "genkey").stdout for _ in ends]
        public = [run("wg", "pubkey", text_in=key).stdout.strip() for key in private]
        ports = [FIRST_PORT + 2 * self._made, FIRST_PORT + 2 * self._made + 1]
        for here, there in ((0, 1), (1, 0)):
            place, link = ends[here], interface or devices[here]
            endpoint = f"{self.lab.node(nodes[there]).address}:{ports[there]}"
            own = ("private-key", "/dev/stdin", "listen-port", str(ports[here]))
            peer = ("peer", public[there], "allowed-ips", f"{addresses[there]}/32", "endpoint", endpoint)
            place.run("wg", "set", devices[here], *own, *peer, text_in=private[here])
            place.run("ip", "address", "add", f"{addresses[here]}/32", "dev", link)
            place.run("ip", "link", "set", link, "mtu", str(self.mtu), "up")
            place.run("ip", "route", "add", f"{addresses[there]}/32", "dev", link)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait(what: str, happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not happened():
        if time.monotonic() > deadline:
            raise LabError(f"not within {_PATIENCE_S} s: {what}")
        time.sleep(0.05)
