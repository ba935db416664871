"""The report server over real TLS on the loopback: managers of this Swarm are answered, nobody else is."""

import contextlib
import http.client
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.report import ReportServer
from hivewire.identity import MANAGER, WORKER, IdentityFiles, IdentitySource, client_context
from hivewire.ids import NodeId, ServiceId, TaskId
from hivewire.reports import AGENT_REPORTS, INTERFACES_PATH, AgentReport, InterfaceReport, PeerReport
from tests.unit.hivewire.swarm_pki import SwarmCa, write

REPORT = AgentReport(
    node=NodeId("node1"),
    taken_at=1700000000.5,
    interfaces=(
        InterfaceReport(
            task=TaskId("t1"),
            service=ServiceId("s1"),
            public_key="key",
            listen_port=51820,
            mtu=1440,
            peers=(PeerReport(public_key="peer", last_handshake=None, received_bytes=1, sent_bytes=2),),
        ),
    ),
)


@pytest.fixture(scope="module")
def ca() -> SwarmCa:
    return SwarmCa()


@contextlib.contextmanager
def serving(identity: IdentitySource) -> Iterator[ReportServer]:
    server = ReportServer(("127.0.0.1", 0), identity, {INTERFACES_PATH: lambda: REPORT})
    server.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def server(tmp_path: Path, ca: SwarmCa) -> Iterator[ReportServer]:
    with serving(ca.source(tmp_path, "node1")) as running:
        yield running


def ask(
    server: ReportServer, context: ssl.SSLContext, path: str = INTERFACES_PATH, *, name: str = "node1"
) -> tuple[int, bytes]:
    """Ask as the controller does: connect to an address, expect a node."""
    raw = http.client.socket.create_connection(server.server_address[:2], timeout=30)  # type: ignore[attr-defined]
    with contextlib.closing(raw), context.wrap_socket(raw, server_hostname=name) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n".encode())
        with contextlib.closing(http.client.HTTPResponse(connection)) as answer:
            answer.begin()
            return answer.status, answer.read()


def manager(folder: Path, ca: SwarmCa) -> ssl.SSLContext:
    return client_context(ca.source(folder, "node2", MANAGER).current())


def test_a_manager_is_answered(server: ReportServer, tmp_path: Path, ca: SwarmCa) -> None:
    """A manager gets the report, and gets it again on a further connection."""
    for _ in range(2):
        status, body = ask(server, manager(tmp_path, ca))
        assert (status, AGENT_REPORTS.decode(body)) == (200, REPORT)


def test_a_worker_is_refused(server: ReportServer, tmp_path: Path, ca: SwarmCa) -> None:
    """A worker of the same Swarm is told that it may not ask, and learns nothing."""
    worker = client_context(ca.source(tmp_path, "node3", WORKER).current())
    status, body = ask(server, worker)
    assert status == 403
    assert b"interfaces" not in body
    assert ask(server, worker, "/other")[0] == 403


@pytest.mark.parametrize("path", ["/", "/v1/interfaces/", "/v1/interfaces?x=1"])
def test_other_paths(server: ReportServer, tmp_path: Path, ca: SwarmCa, path: str) -> None:
    """There is one report."""
    assert ask(server, manager(tmp_path, ca), path)[0] == 404


def test_strangers(server: ReportServer, tmp_path: Path, ca: SwarmCa) -> None:
    """Who is of another Swarm, shows no certificate or speaks no TLS gets nothing, and keeps nobody else away."""
    issued = SwarmCa().issue("node9", MANAGER)
    source = IdentitySource(write(tmp_path / "stranger", issued.certificate, issued.key_pem(), ca.pem))
    anonymous = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anonymous.load_verify_locations(cadata=ca.pem.decode())
    for context in (client_context(source.current()), anonymous):
        with pytest.raises((ssl.SSLError, ConnectionError, http.client.BadStatusLine)):
            ask(server, context)
    with http.client.socket.create_connection(server.server_address[:2], timeout=30) as raw:  # type: ignore[attr-defined]
        raw.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert b"HTTP" not in raw.recv(1000)
    assert ask(server, manager(tmp_path, ca))[0] == 200


def test_another_node_s_name(server: ReportServer, tmp_path: Path, ca: SwarmCa) -> None:
    """A controller that expects another node there finds out."""
    with pytest.raises(ssl.SSLCertVerificationError):
        ask(server, manager(tmp_path, ca), name="node7")


def served_certificate(server: ReportServer, context: ssl.SSLContext) -> str:
    raw = http.client.socket.create_connection(server.server_address[:2], timeout=30)  # type: ignore[attr-defined]
    with contextlib.closing(raw), context.wrap_socket(raw, server_hostname="node1") as connection:
        return ssl.DER_cert_to_PEM_cert(connection.getpeercert(binary_form=True) or b"")


def test_renewal(server: ReportServer, tmp_path: Path, ca: SwarmCa) -> None:
    """A renewed certificate is shown from the next connection on, and between two writes the one before."""
    context, renewed = manager(tmp_path, ca), ca.issue("node1")
    files = IdentityFiles.in_folder(tmp_path / "node1")
    before = served_certificate(server, context)
    assert before.split() == files.certificate.read_text().split()
    old_key = files.key.read_bytes()
    write(tmp_path / "node1", renewed.certificate, old_key, ca.pem)
    assert served_certificate(server, context) == before
    write(tmp_path / "node1", renewed.certificate, renewed.key_pem(), ca.pem)
    assert served_certificate(server, context).split() == renewed.certificate.decode().split()


def test_without_an_identity(tmp_path: Path, ca: SwarmCa) -> None:
    """A server whose first connection finds no usable identity refuses it, and answers once there is one."""
    issued = ca.issue("node1")
    files = write(tmp_path / "node1", issued.certificate, ca.issue("node1").key_pem(), ca.pem)
    with serving(IdentitySource(files)) as server:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            ask(server, manager(tmp_path, ca))
        files.key.unlink()
        files.key.write_bytes(issued.key_pem())
        assert ask(server, manager(tmp_path, ca))[0] == 200
