"""What the agent and the host of userspace devices say to each other: one JSON request and one answer per connection.

The host keeps the processes of wireguard-go, so that they outlive the agent. It listens on a Unix socket in the folder
where those processes have theirs, which both containers mount. The request to start a device carries the descriptor
of its TUN.
"""

import re
from pathlib import Path
from typing import Final

import msgspec

DIRECTORY: Final = Path("/var/run/wireguard")
"""Where wireguard-go looks for its sockets; compiled into it (ipc/uapi_unix.go)."""

SOCKET: Final = "hivewire.host"
LIMIT_BYTES: Final = 65536

# Only such a name is ever made, changed or removed on the node: no operator's interface has one.
_NAME: Final = re.compile(r"hw[0-9a-z]{1,13}")


class Start(msgspec.Struct, frozen=True, tag="start", forbid_unknown_fields=True):
    """Run a device on the TUN whose descriptor comes with the request."""

    name: str


class Stop(msgspec.Struct, frozen=True, tag="stop", forbid_unknown_fields=True):
    """End a device; it is no error if there is none."""

    name: str


class SetMtu(msgspec.Struct, frozen=True, tag="mtu", forbid_unknown_fields=True):
    """Tell a device the MTU of its TUN, which it cannot see from the node's namespace."""

    name: str
    mtu: int


class List(msgspec.Struct, frozen=True, tag="list", forbid_unknown_fields=True):
    """Say which devices run."""


Command = Start | Stop | SetMtu | List


class Answer(msgspec.Struct, frozen=True):
    error: str = ""
    """Empty: done."""
    names: tuple[str, ...] = ()
    """Devices that run now."""
    version: str = ""
    """Of wireguard-go."""
    offload: bool = False
    """Which TUN this wireguard-go can read: see tun.make."""


# Made here, before there are threads: see hivewire/records.py.
COMMANDS: Final = msgspec.json.Decoder(Command)
ANSWERS: Final = msgspec.json.Decoder(Answer)


def is_device_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def uapi_socket(directory: Path, name: str) -> Path:
    return directory / f"{name}.sock"
