"""Which backend a node uses: the kernel's WireGuard where there is one, else wireguard-go where its host runs."""

from pathlib import Path
from typing import Literal

from agent.kernel import hosting, netlink
from agent.kernel.api import Kernel
from agent.kernel.node import Driver, NodeKernel
from agent.kernel.rtnetlink import Calls
from agent.kernel.userspace import UserspaceDriver
from hivewire.errors import NoWireGuard

Choice = Literal["auto", "kernel", "userspace"]


def select(choice: Choice = "auto", directory: Path = hosting.DIRECTORY) -> Kernel:
    """The Kernel of this node. ``directory`` is the folder of the userspace sockets.

    Raises NoWireGuard, NoPermission, KernelBusy.
    """
    calls = Calls()
    driver: Driver
    if choice == "kernel" or (choice == "auto" and netlink.is_offered(calls)):
        if choice == "kernel" and not netlink.is_offered(calls):
            raise NoWireGuard(
                "this kernel has no WireGuard: load the module wireguard, or set the backend to userspace"
            )
        driver = netlink.KernelDriver(calls)
    else:
        driver = userspace = UserspaceDriver(directory, calls)
        try:
            userspace.check()
        except NoWireGuard as error:
            raise NoWireGuard(
                "this node has no WireGuard: load the kernel's module wireguard (Linux 5.6 or later), "
                f"or run hivewire-userspace beside the agent ({error})"
            ) from error
    return NodeKernel(driver, calls)
