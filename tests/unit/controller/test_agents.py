"""Questions to agents over real mTLS on the loopback, with certificates shaped as Swarm issues them."""

import http.server
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from controller.agents import AgentQuestions
from hivewire.errors import InvalidIdentity
from hivewire.identity import MANAGER, WORKER, IdentityFiles, IdentitySource, load, peer_role, server_context
from hivewire.ids import NodeId, ServiceId, TaskId
from hivewire.records import NodeRecord
from hivewire.reports import INTERFACES_PATH, AgentReport, InterfaceReport
from tests.fakes.clock import FakeClock

CLUSTER = "swarm-cluster"
N1, N2 = NodeId("node1idofaswarmnodexxxxxx"), NodeId("node2idofaswarmnodexxxxxx")
ME = NodeId("managerofaswarmxxxxxxxxxx")


class SwarmCa:
    """Issues node certificates: CN is the node id, OU the role, O the cluster; the names are role and node id."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "swarm-ca")])
        certificate = (
            _builder(self._name, self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        self._root = certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, folder: Path, node: NodeId, role: str) -> IdentityFiles:
        """A node's files as they lie below Docker's folder, with the headers of a manager's key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, CLUSTER),
                x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
                x509.NameAttribute(NameOID.COMMON_NAME, node),
            ]
        )
        names = [role, node, *(["swarm-ca"] if role == MANAGER else [])]
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        certificate = (
            _builder(subject, self._name, key)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(authority, critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        if role == MANAGER:
            first, rest = pem.split(b"\n", 1)
            pem = first + b"\nkek-version: 0\nraft-dek: CAES\n\n" + rest
        folder.mkdir()
        files = IdentityFiles.in_folder(folder)
        files.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        files.key.write_bytes(pem)
        files.roots.write_bytes(self._root)
        return files


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=90))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=not signs_certificates,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def interface(task: str) -> InterfaceReport:
    return InterfaceReport(
        task=TaskId(task), service=ServiceId("s"), public_key="k", listen_port=51800, mtu=1420, peers=()
    )


def body_of(node: NodeId, *tasks: str) -> bytes:
    return msgspec.json.encode(AgentReport(node=node, taken_at=1.0, interfaces=tuple(interface(t) for t in tasks)))


class FakeAgent(http.server.ThreadingHTTPServer):
    """Answers as an agent does, with whatever body and status it is told to."""

    daemon_threads = True

    def __init__(self, files: IdentityFiles, body: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.body = body
        self.status = 200
        self.asked: list[tuple[str, str]] = []
        """Path and the role of who asked."""
        self._context = server_context(load(files))

    def get_request(self) -> tuple[socket.socket, Any]:
        plain, address = super().get_request()
        try:
            return self._context.wrap_socket(plain, server_side=True), address
        except OSError:
            plain.close()
            raise

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class _Answer(http.server.BaseHTTPRequestHandler):
    server: FakeAgent

    def do_GET(self) -> None:
        assert isinstance(self.connection, ssl.SSLSocket)
        self.server.asked.append((self.path, peer_role(self.connection)))
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, format: str, *args: object) -> None:
        """Tests need no log of it."""


class Rig:
    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.ca = SwarmCa()
        self.clock = FakeClock()
        self._folder = folder
        self._stack = stack
        self.files = self.ca.issue(folder / "me", ME, MANAGER)
        self.questions = AgentQuestions(IdentitySource(self.files), monotonic=self.clock)
        stack.callback(self.questions.close)

    def agent(
        self, node: NodeId, *tasks: str, certified_as: NodeId | None = None, ca: SwarmCa | None = None
    ) -> FakeAgent:
        files = (ca or self.ca).issue(
            self._folder / f"{node}-{len(list(self._folder.iterdir()))}", certified_as or node, WORKER
        )
        return self._stack.enter_context(serving(FakeAgent(files, body_of(node, *tasks))))

    def ask(self, **ports: int) -> set[str]:
        """The tasks that are answered for; ``ports`` by node, n1 and n2."""
        nodes = [record({"n1": N1, "n2": N2}[name], port) for name, port in ports.items()]
        return {str(task) for task in self.questions.interfaces(nodes)}


@contextmanager
def serving(agent: FakeAgent) -> Iterator[FakeAgent]:
    loop = threading.Thread(target=agent.serve_forever, args=(0.01,))
    loop.start()
    try:
        yield agent
    finally:
        agent.shutdown()
        agent.server_close()
        loop.join()


def record(node: NodeId, port: int) -> NodeRecord:
    return NodeRecord(
        node=node,
        hostname=f"host-{node}",
        agent_version="1",
        underlay_address=IPv4Address("127.0.0.1"),
        underlay_mtu=1500,
        backend="kernel",
        first_port=51800,
        last_port=52799,
        report_port=port,
    )


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with ExitStack() as stack:
        yield Rig(tmp_path, stack)


def test_all_agents_are_asked(rig: Rig) -> None:
    """The interfaces of all nodes come as one answer by task; the agents see a manager of their own Swarm."""
    one, two = rig.agent(N1, "t1", "t2"), rig.agent(N2, "t3")
    answer = rig.questions.interfaces([record(N1, one.port), record(N2, two.port)])
    assert answer == {TaskId(t): interface(t) for t in ("t1", "t2", "t3")}
    assert one.asked == two.asked == [(INTERFACES_PATH, MANAGER)]


def test_a_silent_agent_misses(rig: Rig) -> None:
    """Nothing is made up for a node where nobody listens, and the others are not held up."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert rig.ask(n1=rig.agent(N1, "t1").port, n2=port) == {"t1"}


def test_an_agent_without_a_port_is_not_asked(rig: Rig) -> None:
    """Port 0 says that the agent answers nowhere."""
    assert rig.ask(n1=0) == set()


def test_another_nodes_certificate_is_not_believed(rig: Rig) -> None:
    """Whoever answers at an address must be the node that is said to be there."""
    assert rig.ask(n1=rig.agent(N1, "t1", certified_as=N2).port, n2=rig.agent(N2, "t2").port) == {"t2"}


def test_another_swarms_certificate_is_not_believed(rig: Rig) -> None:
    """The right name from a foreign authority counts for nothing."""
    assert rig.ask(n1=rig.agent(N1, "t1", ca=SwarmCa()).port) == set()


def test_an_answer_in_another_nodes_name_is_not_believed(rig: Rig) -> None:
    """A node speaks for itself only."""
    agent = rig.agent(N1)
    agent.body = body_of(N2, "t2")
    assert rig.ask(n1=agent.port) == set()


@pytest.mark.parametrize(
    "body",
    [b"", b"\xff", b"{}", b'{"x":' + b"[" * 100_000, body_of(N1, "t1")[:-1]],
    ids=["none", "no text", "no report", "deep", "cut"],
)
def test_an_answer_that_cannot_be_read_misses(rig: Rig, body: bytes) -> None:
    """A broken agent costs its own answer."""
    agent = rig.agent(N1)
    agent.body = body
    assert rig.ask(n1=agent.port, n2=rig.agent(N2, "t2").port) == {"t2"}


def test_a_refusal_misses(rig: Rig) -> None:
    """An error is no answer, whatever it carries."""
    agent = rig.agent(N1, "t1")
    agent.status = 500
    assert rig.ask(n1=agent.port) == set()


def test_an_impossible_name_misses(rig: Rig) -> None:
    """An agent writes its own record: a name that TLS cannot ask for costs that answer only."""
    odd = msgspec.structs.replace(record(N1, rig.agent(N1, "t1").port), node=NodeId("." * 300))
    good = record(N2, rig.agent(N2, "t2").port)
    assert set(rig.questions.interfaces([odd, good])) == {"t2"}


def test_answers_are_kept_for_a_moment(rig: Rig) -> None:
    """Many who look at the dashboard cost the agents no more than one."""
    agent = rig.agent(N1, "t1")
    for _ in range(5):
        assert rig.ask(n1=agent.port) == {"t1"}
        rig.clock.advance(0.3)
    assert len(agent.asked) == 1
    rig.clock.advance(2.0)
    agent.body = body_of(N1, "t2")
    assert rig.ask(n1=agent.port) == {"t2"}
    assert len(agent.asked) == 2


def test_an_agent_that_came_back_is_heard(rig: Rig) -> None:
    """A failed question is forgotten with the next one."""
    agent = rig.agent(N1, "t1")
    agent.status = 503
    assert rig.ask(n1=agent.port) == set()
    agent.status = 200
    rig.clock.advance(2.0)
    assert rig.ask(n1=agent.port) == {"t1"}


def test_a_renewed_certificate_is_used(rig: Rig, tmp_path: Path) -> None:
    """After a rotation of the whole Swarm's authority the controller speaks with its new credentials."""
    agent = rig.agent(N1, "t1")
    assert rig.ask(n1=agent.port) == {"t1"}
    rig.ca = SwarmCa()
    rig.ca.issue(tmp_path / "me-new", ME, MANAGER)
    for name in ("swarm-node.crt", "swarm-node.key", "swarm-root-ca.crt"):
        (tmp_path / "me-new" / name).replace(tmp_path / "me" / name)
    rig.clock.advance(2.0)
    assert rig.ask(n1=agent.port, n2=rig.agent(N2, "t2").port) == {"t2"}


def test_without_an_identity_nobody_is_asked(rig: Rig) -> None:
    """That is an error of this node, and is said as one."""
    rig.files.key.unlink()
    agent = rig.agent(N1, "t1")
    with pytest.raises(InvalidIdentity):
        rig.ask(n1=agent.port)
    assert agent.asked == []
