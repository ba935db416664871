"""Docker's bridge for the way out, docker_gwbridge, as the node sees it. Read only.

Every task on an overlay network that is not internal has an interface there too, beside those of all other tasks of
its node. Facts: libnetwork default_gateway.go (libnGWNetwork); rtnetlink(7), linux/if_link.h.
"""

import contextlib
import errno
import socket
from ipaddress import IPv4Interface
from typing import Final

from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from agent.kernel.node import translated
from agent.kernel.rtnetlink import NETLINK_ROUTE, Calls, Netlink, Request, body
from agent.observed import Bridge

NAME: Final = "docker_gwbridge"
_RTM_GETLINK: Final = 18
_RTM_GETADDR: Final = 22


def way_out(calls: Calls, name: str = NAME) -> Bridge | None:
    """None where the node has no such bridge, or not yet. Raises KernelBusy, NoPermission."""
    with translated("read the bridge of the way out"), contextlib.closing(Netlink(NETLINK_ROUTE, calls)) as netlink:
        link = ifinfmsg()
        link["attrs"] = [("IFLA_IFNAME", name)]
        try:
            (data, *_) = netlink.ask(Request(_RTM_GETLINK, body(link)))
        except OSError as error:
            if error.errno == errno.ENODEV:
                return None
            raise
        found = ifinfmsg(data)
        found.decode()
        message = ifaddrmsg()
        message["family"] = socket.AF_INET
        for data in netlink.dump(Request(_RTM_GETADDR, body(message))):
            address = ifaddrmsg(data)
            address.decode()
            if address["index"] == found["index"]:
                written = f"{address.get_attr('IFA_LOCAL')}/{address['prefixlen']}"
                return Bridge(IPv4Interface(written), str(found.get_attr("IFLA_ADDRESS")))
    return None
