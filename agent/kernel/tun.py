"""TUN devices: made by opening /dev/net/tun, gone when the last descriptor closes. Facts: linux/if_tun.h, tun.c.

A descriptor belongs to the namespace that its thread was in when it opened the file, and keeps that one alive.
So a TUN for a task is made in the node's namespace and moved: it then dies with the task's.
"""

import fcntl
import os
import socket
import struct
from typing import Final

_PATH: Final = "/dev/net/tun"
_TUNSETIFF: Final = 0x400454CA
_IFF_TUN: Final = 0x0001
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
_IFF_TUN_EXCL: Final = 0x8000
_SIOCSIFMTU: Final = 0x8922


def make(name: str, *, offload: bool = False) -> int:
    """A new TUN, down, and its descriptor, which is closed on exec and does not block. Raises OSError.

    ``offload``: packets carry the header of virtio_net, for segmentation and checksums in bulk, else four bytes of
    packet information.
    """
    fd = os.open(_PATH, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        # wireguard-go reads one of these two and nothing else (CreateTUN in its tun/tun_linux.go): with packet
        # information of four bytes until early 2023, with the header of virtio_net since.
        framing = _IFF_NO_PI | _IFF_VNET_HDR if offload else 0
        flags = _IFF_TUN | _IFF_TUN_EXCL | framing
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode("ascii"), flags))
    except BaseException:
        os.close(fd)
        raise
    return fd


def set_mtu(name: str, mtu: int) -> None:
    """Change the MTU of an interface of the calling thread's namespace. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        fcntl.ioctl(control, _SIOCSIFMTU, struct.pack("16si20x", name.encode("ascii"), mtu))
