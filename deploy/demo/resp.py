"""As much of the database's wire protocol (RESP) as the demo speaks."""

import socket


class RespError(Exception):
    """The database refused, or what it sent is not understood."""


class Connection:
    """Calls commands over a connected socket."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._answers = channel.makefile("rb")

    def call(self, *words: str) -> str | int | None:
        """Send one command and return its answer; raises RespError, and OSError of the socket."""
        encoded = [word.encode() for word in words]
        request = b"*%d\r\n" % len(encoded) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded)
        self._channel.sendall(request)
        return self._read()

    def _read(self) -> str | int | None:
        line = self._answers.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionResetError("the database closed the connection")
        kind, rest = line[:1], line[1:-2].decode()
        match kind:
            case b"+":
                return rest
            case b":":
                return int(rest)
            case b"-":
                raise RespError(rest)
            case b"$":
                return self._read_bulk(int(rest))
        raise RespError(f"unexpected answer {line!r}")

    def _read_bulk(self, size: int) -> str | None:
        if size < 0:
            return None
        return self._answers.read(size + 2)[:-2].decode()
