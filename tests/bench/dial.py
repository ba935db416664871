"""New TCP connections per second: a server that closes what it accepts, and a client that keeps some under way.

    python3 dial.py listen PORT
    python3 dial.py dial ADDRESS PORT SECONDS

Standard library only, and run as a program in a network namespace. A connection counts when its handshake is over;
it is then reset, so that neither side keeps it in TIME_WAIT and a client does not run out of ports.
"""

import contextlib
import errno
import json
import select
import socket
import struct
import sys
import time
from pathlib import Path

UNDER_WAY = 16
BACKLOG = 4096
RESET = struct.pack("ii", 1, 0)  # struct linger: on, zero seconds
BUSY = {errno.EINPROGRESS, errno.EADDRNOTAVAIL}


def listen(port: int) -> None:
    with contextlib.suppress(OSError):
        Path("/proc/sys/net/core/somaxconn").write_text(str(BACKLOG))
    with socket.create_server(("", port), backlog=BACKLOG) as server:
        while True:
            with contextlib.suppress(OSError):  # it was reset before we came to it
                server.accept()[0].close()


def dial(address: str, port: int, seconds: float) -> dict[str, float]:
    """Returns how many connections were made and how many failed, and in how many seconds."""
    poll = select.epoll()
    under_way: dict[int, socket.socket] = {}
    made = failed = 0
    start = time.perf_counter()
    while (now := time.perf_counter()) < start + seconds:
        while len(under_way) < UNDER_WAY:
            new = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            new.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            if new.connect_ex((address, port)) not in BUSY:
                new.close()
                failed += 1
                continue
            under_way[new.fileno()] = new
            poll.register(new.fileno(), select.EPOLLOUT)
        for number, _ in poll.poll(start + seconds - now, UNDER_WAY):
            done = under_way.pop(number)
            if done.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                made += 1
            else:
                failed += 1
            done.close()
    took = time.perf_counter() - start
    for left in under_way.values():
        left.close()
    return {"made": made, "failed": failed, "seconds": took}


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["listen", port]:
            listen(int(port))
        case ["dial", address, port, seconds]:
            print(json.dumps(dial(address, int(port), float(seconds))))
        case _:
            sys.exit(__doc__)
