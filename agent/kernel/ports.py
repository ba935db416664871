"""Which UDP ports of the node to try for a new device."""

import errno
import socket
from collections.abc import Iterator


def seemingly_free(first: int, last: int) -> Iterator[int]:
    """The ports of the range, both ends included, that can be bound in the namespace of the calling thread just now.

    A hint: somebody may be faster, so the device's own answer counts. It saves a device from being told one port after
    the other, which takes a request each and fills wireguard-go's log. Raises OSError where sockets cannot be made.
    """
    for port in range(first, last + 1):
        # Without SO_REUSEADDR, as WireGuard binds.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
            try:
                probe.bind(("0.0.0.0", port))
            except OSError as error:
                if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise
                continue
        yield port
