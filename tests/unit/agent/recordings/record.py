"""Records what ``wg`` and a kernel say to each other over netlink; the output is ``wg.txt`` beside this file.

    deploy/vm/run .venv/bin/python tests/unit/agent/recordings/record.py > tests/unit/agent/recordings/wg.txt

A device nlmon in a network namespace of its own sees every message of its sockets as it is. Each line of the output is
a name, who speaks (``>`` wg, ``<`` the kernel) and the message in hexadecimal. The keys are made for the purpose; a
private key that the kernel was sent reads as zeros, because it wipes it before anybody else sees the message.
"""

import base64
import hashlib
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator

ETH_P_ALL = 3
NETLINK_GENERIC = 16
GENL_ID_CTRL = 0x10
NLM_F_REQUEST = 1


def key(word: str) -> str:
    """A key that everybody may know."""
    raw = bytearray(hashlib.sha256(word.encode()).digest())
    raw[0] &= 248
    raw[31] = (raw[31] & 127) | 64
    return base64.b64encode(raw).decode("ascii")


def public(word: str) -> str:
    return run("wg", "pubkey", text=key(word)).strip()


def run(*command: str, text: str = "") -> str:
    done = subprocess.run(command, input=text, text=True, capture_output=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{command}: {done.stderr}")
    return done.stdout


CONFIGURATION = f"""\
[Interface]
PrivateKey = {key("device")}
ListenPort = 51820

[Peer]
PublicKey = {public("first")}
Endpoint = 192.0.2.1:51821
AllowedIPs = 10.9.0.1/32, 10.9.1.0/24
PersistentKeepalive = 25

[Peer]
PublicKey = {public("second")}
Endpoint = [2001:db8::2]:51822
AllowedIPs = 10.9.0.2/32
"""


def steps() -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Name, command and its standard input."""
    update = ("wg", "set", "wg0", "peer", public("first"))
    third = ("wg", "set", "wg0", "peer", public("third"), "allowed-ips")
    second = ("wg", "set", "wg0", "peer", public("second"))
    many = [f"10.8.{n // 250}.{n % 250}/32" for n in range(200)]
    yield "setconf", ("wg", "setconf", "wg0", "/dev/stdin"), CONFIGURATION
    yield "update", (*update, "persistent-keepalive", "0", "endpoint", "192.0.2.9:9"), ""
    yield "replace", (*update, "allowed-ips", "10.9.0.3/32"), ""
    yield "show", ("wg", "show", "wg0", "dump"), ""
    yield "remove", (*second, "remove"), ""
    rest = ("persistent-keepalive", "25", "allowed-ips", "10.9.0.1/32,10.9.1.0/24")
    yield "add", (*second, "endpoint", "192.0.2.1:51821", *rest), ""
    yield "add-six", (*second, "endpoint", "[2001:db8::2]:51822", *rest), ""
    yield "other-family", (*third, "2001:db8::/64,10.9.0.4/32"), ""
    yield "addresses", (*third, ",".join(many[:50])), ""
    yield "more-addresses", (*third, ",".join(many)), ""
    yield "show-more", ("wg", "show", "wg0", "dump"), ""


def main() -> None:
    run("modprobe", "nlmon")
    if os.environ.get("HIVEWIRE_RECORDING") is None:
        os.environ["HIVEWIRE_RECORDING"] = "yes"
        os.execvp("unshare", ["unshare", "--net", sys.executable, *sys.argv])
    run("ip", "link", "add", "nlmon0", "type", "nlmon")
    run("ip", "link", "set", "nlmon0", "up")
    run("ip", "link", "add", "wg0", "type", "wireguard")
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as tap:
        tap.bind(("nlmon0", ETH_P_ALL))
        tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        tap.settimeout(0.3)
        for name, command, text in steps():
            run(*command, text=text)
            for mark, message in heard(tap):
                print(name, mark, message.hex())


def heard(tap: socket.socket) -> Iterator[tuple[str, bytes]]:
    """The messages of WireGuard's family since the last call."""
    while True:
        try:
            data, (_, protocol, *_) = tap.recvfrom(1 << 17)
        except TimeoutError:
            return
        offset = 0
        while protocol == NETLINK_GENERIC and offset + 16 <= len(data):
            size, family, flags = struct.unpack_from("=IHH", data, offset)
            # Neither acknowledgements nor the look-up of the family.
            if family > GENL_ID_CTRL:
                yield (">" if flags & NLM_F_REQUEST else "<"), data[offset : offset + size]
            offset += (size + 3) & ~3


if __name__ == "__main__":
    main()
