"""The text protocol of userspace WireGuard (``get=1``, ``set=1``), from and to values. Pure.

Specification: wireguard.com/xplatform, "Configuration Protocol". Keys are in hexadecimal, a request and an answer end
with an empty line, unknown keys in an answer are ignored.
"""

import errno
import os
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Network
from typing import Final

from agent.kernel.peers import Device, PeerChange
from agent.observed import ObservedPeer
from hivewire.errors import InvalidInput, KernelBusy
from hivewire.keys import PrivateKey, PublicKey
from hivewire.records import Endpoint, parse_address

GET: Final = b"get=1\n\n"
END: Final = b"\n\n"


class PortInUse(KernelBusy):
    """Another socket has the listen port."""


def set_device(*, private_key: PrivateKey | None = None, listen_port: int | None = None) -> bytes:
    """A request that sets what is given of the device itself."""
    lines = ["set=1"]
    if private_key is not None:
        lines.append(f"private_key={private_key.reveal().hex()}")
    if listen_port is not None:
        lines.append(f"listen_port={listen_port}")
    return _request(lines)


def set_peers(changes: Iterable[PeerChange]) -> bytes:
    """A request that carries out the changes in order."""
    return _request(["set=1", *(line for change in changes for line in _peer_lines(change))])


def _request(lines: list[str]) -> bytes:
    return ("\n".join(lines) + "\n\n").encode("ascii")


def _peer_lines(change: PeerChange) -> Iterator[str]:
    yield f"public_key={change.public_key.raw.hex()}"
    if change.remove:
        yield "remove=true"
        return
    if change.update_only:
        yield "update_only=true"
    if change.endpoint is not None:
        yield f"endpoint={change.endpoint}"
    if change.allowed_ips is not None:
        yield "replace_allowed_ips=true"
        for network in sorted(change.allowed_ips):
            yield f"allowed_ip={network}"
    # Last, so that the keepalive that it sends finds everything else in place.
    if change.keepalive_s is not None:
        yield f"persistent_keepalive_interval={change.keepalive_s}"


def check_answer(answer: bytes) -> None:
    """Raise PortInUse or KernelBusy if the device refused the request."""
    _pairs(answer)


def parse_device(answer: bytes) -> Device:
    """Read the answer to GET. Raises KernelBusy where it is no such answer."""
    public_key: PublicKey | None = None
    port = 0
    peers: dict[PublicKey, ObservedPeer] = {}
    lines: list[tuple[str, str]] = []
    try:
        for key, value in _pairs(answer):
            if key == "public_key":
                _add_peer(peers, lines)
                lines = [(key, value)]
            elif lines:
                lines.append((key, value))
            elif key == "private_key":
                private = bytes.fromhex(value)
                public_key = PrivateKey(private).public() if any(private) else None
            elif key == "listen_port":
                port = int(value)
        _add_peer(peers, lines)
    except (ValueError, OverflowError, InvalidInput):
        # Not chained: the text may hold the private key.
        raise KernelBusy("a userspace device gave an answer that cannot be read") from None
    return Device(public_key, port, peers)


def _pairs(answer: bytes) -> list[tuple[str, str]]:
    if not answer.endswith(END):
        raise KernelBusy("a userspace device broke off its answer")
    pairs = []
    for line in answer.decode("ascii", errors="replace").split("\n"):
        key, separator, value = line.partition("=")
        if separator:
            pairs.append((key, value))
    if not pairs or pairs[-1][0] != "errno":
        raise KernelBusy("a userspace device gave no outcome")
    try:
        code = abs(int(pairs[-1][1]))
    except ValueError:
        raise KernelBusy("a userspace device gave an outcome that cannot be read") from None
    if code == errno.EADDRINUSE:
        raise PortInUse("the UDP port is in use")
    if code:
        raise KernelBusy(f"a userspace device refused a request: {_reason(code)}")
    return pairs[:-1]


def _reason(code: int) -> str:
    try:
        return os.strerror(code)
    except OverflowError:
        return f"error {code}"


def _add_peer(peers: dict[PublicKey, ObservedPeer], lines: list[tuple[str, str]]) -> None:
    if not lines:
        return
    public_key = PublicKey(bytes.fromhex(lines[0][1]))
    values = dict(lines)
    seconds, nanoseconds = (int(values.get(f"last_handshake_time_{unit}", 0)) for unit in ("sec", "nsec"))
    peers[public_key] = ObservedPeer(
        public_key,
        _endpoint(values.get("endpoint")),
        frozenset(IPv4Network(value) for key, value in lines if key == "allowed_ip" and ":" not in value),
        int(values.get("persistent_keepalive_interval", 0)),
        seconds + nanoseconds / 1e9 if seconds or nanoseconds else None,
        int(values.get("rx_bytes", 0)),
        int(values.get("tx_bytes", 0)),
    )


def _endpoint(text: str | None) -> Endpoint | None:
    if text is None:
        return None
    address, _, port = text.rpartition(":")
    number = int(port)
    try:
        return Endpoint(address=parse_address(address.removeprefix("[").removesuffix("]")), port=number)
    except ValueError:
        # A peer may roam to an address with a zone; Hivewire has none to compare it with.
        return None
