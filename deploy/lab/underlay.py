"""The underlay: a namespace with a bridge, and a network namespace linked to it for each node."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from lab.command import run
from lab.node import Node
from lab.settings import BRIDGE, NETWORK, PREFIX, REGISTRY_ADDRESS, UNDERLAY

NETNS = Path("/run/netns")


def build(nodes: Sequence[Node]) -> None:
    """Make all namespaces, links and addresses. No route leads out."""
    bits = NETWORK.prefixlen
    for name in (UNDERLAY, *(node.namespace for node in nodes)):
        run("ip", "netns", "add", name)
    _batch(
        UNDERLAY,
        f"link add {BRIDGE} type bridge forward_delay 0",
        f"address add {REGISTRY_ADDRESS}/{bits} dev {BRIDGE}",
        f"link set {BRIDGE} up",
        "link set lo up",
        # Both ends are made in their namespaces, so a crash in between leaves nothing on the machine.
        *(f"link add {node.name} type veth peer name eth0 netns {node.namespace}" for node in nodes),
        *(f"link set {node.name} master {BRIDGE} up" for node in nodes),
    )
    for node in nodes:
        _batch(
            node.namespace,
            "link set lo up",
            f"address add {node.address}/{bits} dev eth0",
            "link set eth0 up",
        )


def plug(node: Node, connected: bool) -> None:
    """Put a node's cable in or pull it."""
    run("ip", "-n", UNDERLAY, "link", "set", node.name, "up" if connected else "down")


def namespaces() -> list[str]:
    """List the lab's network namespaces that exist now."""
    return sorted(path.name for path in NETNS.glob(PREFIX + "*"))


def remove() -> None:
    """Remove the lab's network namespaces; their links go with them."""
    for name in namespaces():
        if run("ip", "netns", "del", name, check=False).returncode != 0:
            (NETNS / name).unlink(missing_ok=True)  # a name left by a crash, with nothing mounted on it
    if NETNS.is_dir() and not any(NETNS.iterdir()):
        # `ip netns add` mounts this folder on itself; when nobody uses it the machine is as before.
        run("umount", str(NETNS), check=False)
        with contextlib.suppress(OSError):  # somebody made a namespace meanwhile
            NETNS.rmdir()


def _batch(namespace: str, *lines: str) -> None:
    run("ip", "-n", namespace, "-batch", "-", text_in="\n".join(lines) + "\n")
