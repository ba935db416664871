"""A stream of numbered packets and a TCP connection, run as a program in any namespace: what was lost on the way?

``serve`` echoes. ``send`` sends a number every few milliseconds over UDP and over one TCP connection until its standard
input ends, waits until nothing more comes, and prints one JSON object. Both ends use the standard library only, so any
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
"""Between two numbers on an ordinary machine. On a slow one they take the time that agents need."""
_QUIET_S = 1.0
"""After the last number, when nothing is missing: so long nothing may come that would tell of numbers sent twice."""
_LOST_S = 5.0
"""When so long nothing came, what is missing is lost; on a busy machine it may be late."""
_SO_RCVBUFFORCE = 33
"""asm-generic/socket.h: beyond what the machine allows everybody."""
_KEPT_BYTES = 8 << 20
_IP_PKTINFO = 8
_PKTINFO = struct.Struct("=i4s4s")
"""Interface, own address, destination: ip(7)."""
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
    udp.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
    udp.bind(("", port))
    listener = socket.create_server(("", port))
    threading.Thread(target=_accept, args=(listener,), daemon=True).start()
    threading.Thread(target=_end_with_input, daemon=True).start()
    print("ready", flush=True)
    while True:
        data, ((_, _, asked),), _, sender = udp.recvmsg(2048, 256)
        # From the address that was asked, but by the way that the routes say: not by that on which the question came.
        _, address, _ = _PKTINFO.unpack(asked)
        udp.sendmsg([data], [(socket.IPPROTO_IP, _IP_PKTINFO, _PKTINFO.pack(0, address, b""))], 0, sender)


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


class _Sender:
    """Sends numbers and counts their echoes."""

    def __init__(self, host: str, port: int, period_s: float) -> None:
        self._period_s = period_s
        self._udp = _udp()
        self._udp.connect((host, port))
        self._tcp = socket.create_connection((host, port), timeout=10)
        self._tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._tcp.setblocking(False)
        self._number, self._rest, self._broken = 0, b"", ""
        self._seen: set[int] = set()
        self._udp_sent = self._udp_errors = self._tcp_sent = self._tcp_back = self._server_again = 0
        self._longest_s = 0.0
        self._udp_came_at = self._came_at = time.monotonic()

    def run(self) -> dict[str, Any]:
        """Send until standard input ends; what came back."""
        print("sending", flush=True)
        due, is_open = time.monotonic(), True
        while is_open:
            now = time.monotonic()
            if now >= due:
                # Who waited for a processor does not make up for it: queues on the way do not hold such a burst.
                due = max(due + self._period_s, now)
                self._send_udp()
                self._send_tcp()
            ready = self._receive(min(0.05, max(0.0, due - time.monotonic())), sys.stdin)
            is_open = not (sys.stdin in ready and not os.read(sys.stdin.fileno(), 1))
        longest_s = self._longest_s
        self._drain(_QUIET_S)
        self._send_tcp()  # asks the server for its count when all is over
        self._drain(0.0)
        return {
            "udp_sent": self._udp_sent,
            "udp_back": len(self._seen),
            "udp_errors": self._udp_errors,
            "tcp_sent": self._tcp_sent,
            "tcp_back": self._tcp_back,
            "server_again": self._server_again,
            "client_again": 0 if self._broken else sent_again(self._tcp),
            "tcp_broken": self._broken,
            "longest_gap_ms": round(longest_s * 1000),
        }

    def _send_udp(self) -> None:
        self._number += 1
        try:
            self._udp.send(_NUMBER.pack(self._number))
            self._udp_sent += 1
        except OSError:
            self._udp_errors += 1

    def _send_tcp(self) -> None:
        if self._broken:
            return
        try:
            self._tcp_sent += self._tcp.send(_NUMBER.pack(self._number)) == _NUMBER.size
        except BlockingIOError:
            pass
        except OSError as error:
            self._broken = str(error)

    def _drain(self, quiet_s: float) -> None:
        """Take what still comes, until nothing is missing and nothing came for a while, or nothing came for long."""
        self._came_at = time.monotonic()
        while time.monotonic() < self._came_at + (_LOST_S if self._is_missing else quiet_s):
            self._receive(0.05)

    @property
    def _is_missing(self) -> bool:
        return len(self._seen) < self._udp_sent or (not self._broken and self._tcp_back < self._tcp_sent)

    def _receive(self, timeout_s: float, *others: Any) -> list[Any]:
        ready, _, _ = select.select([self._udp, *([] if self._broken else [self._tcp]), *others], [], [], timeout_s)
        if self._udp in ready:
            try:
                self._seen.add(_NUMBER.unpack(self._udp.recv(2048))[0])
                now = time.monotonic()
                self._longest_s = max(self._longest_s, now - self._udp_came_at)
                self._udp_came_at = self._came_at = now
            except OSError:
                self._udp_errors += 1
        if self._tcp in ready:
            try:
                data = self._tcp.recv(65536)
                self._broken = "" if data else "closed"
            except OSError as error:
                data, self._broken = b"", str(error)
            self._came_at = time.monotonic()
            self._take_tcp(data)
        return list(ready)

    def _take_tcp(self, data: bytes) -> None:
        self._rest += data
        whole = len(self._rest) // _ECHO.size * _ECHO.size
        for _, again in _ECHO.iter_unpack(self._rest[:whole]):
            self._tcp_back += 1
            self._server_again = again
        self._rest = self._rest[whole:]


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
    """Streams from one namespace to a server in another one.

    ``enter`` is the command that leads into a namespace, ``period_s`` the time from one number to the next.
    """

    def __init__(self, enter: Sequence[str], host: str, port: int, period_s: float) -> None:
        command = [*enter, sys.executable, __file__, "send", host, str(port), str(period_s)]
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
            process.wait(5)
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
        host, port, period_s = arguments.words
        print(json.dumps(_Sender(host, int(port), float(period_s)).run()), flush=True)


if __name__ == "__main__":
    main()
