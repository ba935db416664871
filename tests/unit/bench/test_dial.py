"""The client that counts new connections, over loopback."""

import socket
import threading

from tests.bench import dial


def test_connections_are_counted_when_they_are_made() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        accepted = 0

        def accept() -> None:
            nonlocal accepted
            while True:
                try:
                    server.accept()[0].close()
                except OSError:
                    return
                accepted += 1

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        result = dial.dial("127.0.0.1", server.getsockname()[1], 0.2)
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)
    assert result["made"] > 0
    assert result["failed"] == 0
    assert accepted >= result["made"] - dial.UNDER_WAY


def test_a_refused_connection_is_a_failed_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    result = dial.dial("127.0.0.1", port, 0.1)
    assert result["made"] == 0
    assert result["failed"] > 0
