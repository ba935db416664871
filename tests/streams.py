"""A stream of numbered packets and a TCP connection, run as a program in any namespace: what was lost on the way?

``serve`` echoes. ``send`` sends a number every few milliseconds over UDP and over one TCP connection until its standard
input ends, waits for what is under way, and prints one JSON object. Both ends use the standard library only, so any
Python runs them.
"""

import argparse
import json
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PERIOD_S = 0.004
_LAST_S = 2.0
"""How long to wait for echoes after the last number."""
_SO_RCVBUFFORCE = 33
"""asm-generic/socket.h: beyond what the machine allows everybody."""
_KEPT_BYTES = 8 << 20
_NUMBER = struct.Struct("!Q")
_ECHO = struct.Struct("!Qi")
"""The number, and how many segments of this connection the server sent again."""
# Of struct tcp_info (linux/tcp.h): tcpi_total_retrans, tcpi_dsack_dups.
_TOTAL_RETRANS_AT = 100
_DSACK_DUPS_AT = 216


def sent_again(tcp: socket.socket) -> int:
    """Segments that this end of the connection has sent again because they were lost.

    On a busy machine an answer takes longer than the sender waits; then the receiver has both and says so (RFC 2883).
    """
    info = tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    total, needless = (int(struct.unpack_from("=I", info, at)[0]) for at in (_TOTAL_RETRANS_AT, _DSACK_DUPS_AT))
    return max(0, total - needless)


def _udp() -> socket.socket:
    """A socket that keeps what comes while its process waits for a processor: that would be no loss on the way."""
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _KEPT_BYTES)
    return udp


def serve(port: int) -> None:
    """Echo until standard input ends."""
    udp = _udp()
    udp.setsockopt(socket.IPPROTO_IP, 8, 1)  # IP_PKTINFO: answer from the address that was asked
    udp.bind(("", port))
    listener = socket.create_server(("", port))
    threading.Thread(target=_accept, args=(listener,), daemon=True).start()
    threading.Thread(target=_end_with_input, daemon=True).start()
    print("ready", flush=True)
    while True:
        data, sent_to, _, sender = udp.recvmsg(2048, 256)
        udp.sendmsg([data], sent_to, 0, sender)


def _end_with_input() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def _accept(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_echo, args=(connection,), daemon=True).start()


def _echo(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    rest = b""
    with connection:
        while data := connection.recv(65536):
            rest += data
            whole = len(rest) // _NUMBER.size * _NUMBER.size
            again = sent_again(connection)
            connection.sendall(b"".join(_ECHO.pack(n, again) for (n,) in _NUMBER.iter_unpack(rest[:whole])))
            rest = rest[whole:]


def send(host: str, port: int) -> dict[str, Any]:
    """Send until standard input ends; what came back."""
    udp = _udp()
    udp.connect((host, port))
    tcp = socket.create_connection((host, port), timeout=10)
    tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    tcp.setblocking(False)
    counts = {"udp_sent": 0, "udp_back": 0, "udp_errors": 0, "tcp_sent": 0, "tcp_back": 0, "server_again": 0}
    seen: set[int] = set()
    broken, rest, number, longest_s, last = "", b"", 0, 0.0, time.monotonic()
    due, ends_at = last, None
    print("sending", flush=True)
    while ends_at is None or time.monotonic() < ends_at:
        now = time.monotonic()
        if now >= due:
            # The very last number asks the server for its count when all is over.
            due, number = due + (PERIOD_S if ends_at is None else _LAST_S), number + 1
            try:
                if ends_at is None:
                    udp.send(_NUMBER.pack(number))
                    counts["udp_sent"] += 1
            except OSError:
                counts["udp_errors"] += 1
            try:
                counts["tcp_sent"] += not broken and tcp.send(_NUMBER.pack(number)) == _NUMBER.size
            except BlockingIOError:
                pass
            except OSError as error:
                broken = broken or str(error)
        readable = [udp] if broken else [udp, tcp]
        watched = [*readable, sys.stdin] if ends_at is None else readable
        ready, _, _ = select.select(watched, [], [], min(0.05, max(0.0, due - time.monotonic())))
        if udp in ready:
            try:
                seen.add(_NUMBER.unpack(udp.recv(2048))[0])
                longest_s, last = max(longest_s, time.monotonic() - last), time.monotonic()
            except OSError:
                counts["udp_errors"] += 1
        if tcp in ready:
            try:
                data = tcp.recv(65536)
            except OSError as error:
                data, broken = b"", broken or str(error)
            broken = broken or ("" if data else "closed")
            rest += data
            whole = len(rest) // _ECHO.size * _ECHO.size
            for _, again in _ECHO.iter_unpack(rest[:whole]):
                counts["tcp_back"] += 1
                counts["server_again"] = again
            rest = rest[whole:]
        if sys.stdin in ready and not sys.stdin.buffer.read1(1):
            ends_at = time.monotonic() + _LAST_S
            due = time.monotonic() + _LAST_S * 3 / 4
    counts["udp_back"] = len(seen)
    again = 0 if broken else sent_again(tcp)
    return {**counts, "client_again": again, "tcp_broken": broken, "longest_gap_ms": round(longest_s * 1000)}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a pair of streams went through."""

    udp_sent: int
    udp_back: int
    udp_errors: int
    tcp_sent: int
    tcp_back: int
    server_again: int
    client_again: int
    tcp_broken: str
    longest_gap_ms: int

    @property
    def lost(self) -> int:
        return self.udp_sent - self.udp_back + self.udp_errors

    @property
    def sent_again(self) -> int:
        return self.server_again + self.client_again

    @property
    def goes_on(self) -> bool:
        """Nothing was lost or broken, and there was something to lose.

        A way that takes longer than the one before makes TCP send its last segments again, though they were not lost.
        """
        return self.udp_sent > 0 and self.lost == 0 and self.tcp_sent == self.tcp_back > 0 and not self.tcp_broken

    @property
    def is_untouched(self) -> bool:
        """Nothing was sent again either."""
        return self.goes_on and self.sent_again == 0


class Streams:
    """Streams from one namespace to a server in another one. ``enter`` is the command that leads into a namespace."""

    def __init__(self, enter: Sequence[str], host: str, port: int) -> None:
        command = [*enter, sys.executable, __file__, "send", host, str(port)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        _await(self._process, "sending", f"no stream to {host}:{port}")

    def end(self) -> Verdict:
        """Stop sending and count."""
        out, _ = self._process.communicate(timeout=60)
        return Verdict(**json.loads(out))

    def kill(self) -> None:
        stop(self._process)


def start_server(enter: Sequence[str], port: int) -> "subprocess.Popen[str]":
    """A server in the namespace that ``enter`` leads to; the caller stops it."""
    command = [*enter, sys.executable, __file__, "serve", str(port)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    _await(process, "ready", f"no server on port {port}")
    return process


def stop(process: "subprocess.Popen[str]") -> None:
    """End it. What enters a namespace of processes stays outside itself, so the program ends with its input."""
    with process:
        if process.stdin is not None:
            process.stdin.close()
        try:
            process.wait(_LAST_S + 3)
        except subprocess.TimeoutExpired:
            process.kill()


def _await(process: "subprocess.Popen[str]", word: str, otherwise: str) -> None:
    assert process.stdout is not None
    if process.stdout.readline().strip() != word:
        stop(process)
        raise AssertionError(otherwise)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["serve", "send"])
    parser.add_argument("words", nargs="+")
    arguments = parser.parse_args()
    if arguments.command == "serve":
        serve(int(arguments.words[0]))
    else:
        print(json.dumps(send(arguments.words[0], int(arguments.words[1]))), flush=True)


if __name__ == "__main__":
    main()
