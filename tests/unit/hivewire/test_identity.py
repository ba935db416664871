"""The Swarm PKI as identity: files as Swarm writes them, and real TLS handshakes between nodes."""

import base64
import re
import socket
import ssl
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from hivewire.errors import InvalidIdentity
from hivewire.identity import (
    MANAGER,
    WORKER,
    Identity,
    IdentityFiles,
    IdentitySource,
    client_context,
    load,
    peer_role,
    server_context,
    strip_pem_headers,
)
from tests.unit.hivewire.swarm_pki import CLUSTER, NodeCertificate, SwarmCa, write

SWARM_HEADERS = "kek-version: 12\nraft-dek: EgQIAhABIgYKBBoCCAI="


@pytest.fixture(scope="module")
def ca() -> SwarmCa:
    return SwarmCa()


def identity(folder: Path, ca: SwarmCa, node: str, role: str = WORKER, *, roots: bytes = b"") -> Identity:
    issued = ca.issue(node, role)
    return load(write(folder / node, issued.certificate, issued.key_pem(), roots or ca.pem))


# -- reading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("role", "is_manager"), [(WORKER, False), (MANAGER, True)])
def test_what_a_certificate_says(tmp_path: Path, ca: SwarmCa, role: str, is_manager: bool) -> None:
    """Node, role and cluster are CN, OU and O of the certificate."""
    read = identity(tmp_path, ca, "node1", role)
    assert (read.node, read.role, read.cluster, read.is_manager) == ("node1", role, CLUSTER, is_manager)
    assert read.roots_pem == ca.pem


@pytest.mark.parametrize("format", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
def test_headers_of_managers(tmp_path: Path, ca: SwarmCa, format: PrivateFormat) -> None:
    """A manager's key with Swarm's PEM headers is read as if it had none, in both forms of a key."""
    issued = ca.issue("node1", MANAGER)
    with_headers = issued.key_pem(headers=SWARM_HEADERS, format=format)
    assert b"raft-dek" in with_headers
    read = load(write(tmp_path, issued.certificate, with_headers, ca.pem))
    assert read.key_pem == issued.key_pem(format=format)


def test_carriage_returns(ca: SwarmCa) -> None:
    """Lines that end as on Windows are read as well."""
    pem = ca.issue("node1").key_pem(headers=SWARM_HEADERS)
    assert strip_pem_headers(pem.replace(b"\n", b"\r\n")) == strip_pem_headers(pem)


def locked_keys(issued: NodeCertificate) -> dict[str, bytes]:
    plain = issued.key_pem(format=PrivateFormat.TraditionalOpenSSL)
    return {
        "PKCS#8": issued.locked_key_pem(),
        "PKCS#8 with Swarm's headers": issued.locked_key_pem().replace(
            b"KEY-----\n", f"KEY-----\n{SWARM_HEADERS}\n\n".encode(), 1
        ),
        "Proc-Type": plain.replace(
            b"KEY-----\n", b"KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-256-CBC,00112233\n\n", 1
        ),
    }


@pytest.mark.parametrize("kind", ["PKCS#8", "PKCS#8 with Swarm's headers", "Proc-Type"])
def test_autolock(tmp_path: Path, ca: SwarmCa, kind: str) -> None:
    """A key that a locked Swarm has encrypted is refused with the reason and both ways out."""
    issued = ca.issue("node1", MANAGER)
    files = write(tmp_path, issued.certificate, locked_keys(issued)[kind], ca.pem)
    with pytest.raises(InvalidIdentity, match="autolock") as caught:
        load(files)
    assert str(files.key) in str(caught.value)
    assert "HIVEWIRE_IDENTITY_KEY" in str(caught.value)
    assert "docker swarm update --autolock=false" in str(caught.value)


def test_pair_that_does_not_fit(tmp_path: Path, ca: SwarmCa) -> None:
    """Another node's key beside the certificate is refused, as between the two writes of a renewal."""
    files = write(tmp_path, ca.issue("node1").certificate, ca.issue("node1").key_pem(), ca.pem)
    with pytest.raises(InvalidIdentity, match="does not fit"):
        load(files)


@pytest.mark.parametrize("part", ["certificate", "key", "roots"])
@pytest.mark.parametrize("content", [b"", b"nonsense", b"-----BEGIN PRIVATE KEY-----\n!!\n-----END PRIVATE KEY-----\n"])
def test_files_that_are_none(tmp_path: Path, ca: SwarmCa, part: str, content: bytes) -> None:
    """A file that holds something else is refused by name."""
    issued = ca.issue("node1")
    files = write(tmp_path, issued.certificate, issued.key_pem(), ca.pem)
    path: Path = getattr(files, part)
    path.write_bytes(content)
    with pytest.raises(InvalidIdentity, match=re.escape(str(path))):
        load(files)


@pytest.mark.parametrize("part", ["certificate", "key", "roots"])
def test_absent_file(tmp_path: Path, ca: SwarmCa, part: str) -> None:
    """An absent file is named, with the question whether this is a Swarm node, on both ways of reading."""
    issued = ca.issue("node1")
    files = write(tmp_path, issued.certificate, issued.key_pem(), ca.pem)
    path: Path = getattr(files, part)
    path.unlink()
    with pytest.raises(InvalidIdentity, match=f"{re.escape(str(path))}.*part of a Swarm"):
        load(files)
    with pytest.raises(InvalidIdentity, match=re.escape(str(path))):
        IdentitySource(files).current()


def test_certificate_of_no_node(tmp_path: Path, ca: SwarmCa) -> None:
    """A certificate without a role, such as the CA's own, is no node's."""
    with pytest.raises(InvalidIdentity, match="organizationalUnitName"):
        load(write(tmp_path, ca.pem, _key_of(ca), ca.pem))


def _key_of(ca: SwarmCa) -> bytes:
    return ca._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


# -- renewal ----------------------------------------------------------------------------------------------------


def test_unchanged_files_are_read_once(tmp_path: Path, ca: SwarmCa) -> None:
    """As long as the files stay the same value comes, so that what was built from it can be kept."""
    source = ca.source(tmp_path, "node1")
    assert source.current() is source.current()


def test_renewal(tmp_path: Path, ca: SwarmCa) -> None:
    """A renewed certificate is used from the next question on."""
    source = ca.source(tmp_path, "node1")
    before, renewed = source.current(), ca.issue("node1")
    write(tmp_path / "node1", renewed.certificate, renewed.key_pem(), ca.pem)
    after = source.current()
    assert (before.certificate_pem == after.certificate_pem, after.certificate_pem) == (False, renewed.certificate)


def test_half_renewed(tmp_path: Path, ca: SwarmCa) -> None:
    """Between the two writes of a renewal the pair is refused; it is good again after the second."""
    source = ca.source(tmp_path, "node1")
    old_key = IdentityFiles.in_folder(tmp_path / "node1").key.read_bytes()
    source.current()
    renewed = ca.issue("node1")
    write(tmp_path / "node1", renewed.certificate, old_key, ca.pem)
    with pytest.raises(InvalidIdentity, match="being renewed"):
        source.current()
    write(tmp_path / "node1", renewed.certificate, renewed.key_pem(), ca.pem)
    assert source.current().certificate_pem == renewed.certificate


# -- secrets ----------------------------------------------------------------------------------------------------


def key_forms(issued: NodeCertificate) -> list[str]:
    """The secret number in all ways that something might print it."""
    number = issued.key.private_numbers().private_value
    raw = number.to_bytes(32, "big")
    lines = [line.decode() for line in issued.key_pem().splitlines()[1:-1]]
    return [raw.hex(), base64.b64encode(raw).decode(), str(number), repr(raw)[2:-1], "".join(lines), *lines[:2]]


def test_the_key_is_never_shown(tmp_path: Path, ca: SwarmCa) -> None:
    """Neither the value, nor its source, nor any error with its whole traceback shows a part of the key."""
    issued = ca.issue("node1")
    files = write(tmp_path, issued.certificate, issued.key_pem(), ca.pem)
    source = IdentitySource(files)
    shown = [repr(source.current()), str(source.current()), repr(source), f"{source.current()}"]

    broken = issued.key_pem().replace(b"PRIVATE KEY-----\nM", b"PRIVATE KEY-----\nA")
    for key in (
        broken,
        issued.key_pem().replace(b"-----END", b"!!-----END"),
        issued.key_pem(headers="Proc-Type: 4,ENCRYPTED"),
    ):
        files.key.write_bytes(key)
        with pytest.raises(InvalidIdentity) as caught:
            load(files)
        shown.append("".join(traceback.format_exception(caught.value)))
    files.key.write_bytes(issued.key_pem())
    files.certificate.write_bytes(ca.issue("node1").certificate)
    with pytest.raises(InvalidIdentity) as caught:
        load(files)
    shown.append("".join(traceback.format_exception(caught.value)))
    assert [form for form in key_forms(issued) for text in shown if form in text] == []


# -- TLS --------------------------------------------------------------------------------------------------------


@dataclass
class Handshake:
    """What each side made of it."""

    server: str | ssl.SSLError | ConnectionError
    client: str | ssl.SSLError | ConnectionError


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.settimeout(30)
    theirs.settimeout(30)
    with ours, theirs:
        yield ours, theirs


def shake(
    pair: tuple[socket.socket, socket.socket], server: Identity, client: ssl.SSLContext, server_hostname: str
) -> Handshake:
    """Let both sides shake hands and say a word; each gives the other's role, or its own error."""

    def side(
        connection: socket.socket, context: ssl.SSLContext, name: str | None
    ) -> str | ssl.SSLError | ConnectionError:
        try:
            with context.wrap_socket(connection, server_side=name is None, server_hostname=name) as wrapped:
                # With TLS 1.3 a client learns only by reading that its certificate was refused.
                wrapped.sendall(b"x")
                wrapped.recv(1)
                return peer_role(wrapped)
        except (ssl.SSLError, ConnectionError) as error:
            return error
        finally:
            connection.close()

    with ThreadPoolExecutor(2) as threads:
        one = threads.submit(side, pair[0], server_context(server), None)
        two = threads.submit(side, pair[1], client, server_hostname)
        return Handshake(one.result(), two.result())


@pytest.mark.parametrize("client_role", [WORKER, MANAGER])
@pytest.mark.parametrize("server_role", [WORKER, MANAGER])
def test_handshake_tells_roles(
    tmp_path: Path, ca: SwarmCa, pair: tuple[socket.socket, socket.socket], server_role: str, client_role: str
) -> None:
    """Two nodes of a Swarm trust each other, and each learns the other's role from its certificate."""
    server, client = identity(tmp_path, ca, "node1", server_role), identity(tmp_path, ca, "node2", client_role)
    assert shake(pair, server, client_context(client), "node1") == Handshake(client_role, server_role)


@pytest.mark.parametrize(
    ("name", "ok"), [("node1", True), ("swarm-worker", True), ("swarm-manager", False), ("node2", False)]
)
def test_server_hostname(
    tmp_path: Path, ca: SwarmCa, pair: tuple[socket.socket, socket.socket], name: str, ok: bool
) -> None:
    """A client accepts the id or the role of the node it wants, and no other node of the same Swarm."""
    server, client = identity(tmp_path, ca, "node1"), identity(tmp_path, ca, "node3", MANAGER)
    done = shake(pair, server, client_context(client), name)
    assert (done.client == WORKER) is ok
    assert isinstance(done.client, ssl.SSLCertVerificationError) is not ok


def test_foreign_client(tmp_path: Path, ca: SwarmCa, pair: tuple[socket.socket, socket.socket]) -> None:
    """A manager of another Swarm is refused by the server, whatever its certificate says."""
    stranger = identity(tmp_path, SwarmCa(), "node2", MANAGER, roots=ca.pem)
    done = shake(pair, identity(tmp_path, ca, "node1"), client_context(stranger), "node1")
    assert isinstance(done.server, ssl.SSLCertVerificationError)


def test_foreign_server(tmp_path: Path, ca: SwarmCa, pair: tuple[socket.socket, socket.socket]) -> None:
    """A server of another Swarm is refused by the client, though the name fits."""
    stranger = identity(tmp_path, SwarmCa(), "node1", roots=ca.pem)
    done = shake(pair, stranger, client_context(identity(tmp_path, ca, "node2")), "node1")
    assert isinstance(done.client, ssl.SSLCertVerificationError)


def test_client_without_a_certificate(tmp_path: Path, ca: SwarmCa, pair: tuple[socket.socket, socket.socket]) -> None:
    """Who shows no certificate is not served."""
    anonymous = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anonymous.load_verify_locations(cadata=ca.pem.decode())
    done = shake(pair, identity(tmp_path, ca, "node1"), anonymous, "node1")
    assert isinstance(done.server, ssl.SSLError)


def test_two_roots(tmp_path: Path, ca: SwarmCa, pair: tuple[socket.socket, socket.socket]) -> None:
    """While the Swarm changes its CA, nodes with certificates of both trust each other."""
    new, both = SwarmCa(), ca.pem
    both += new.pem
    server, client = identity(tmp_path, ca, "node1", roots=both), identity(tmp_path, new, "node2", roots=both)
    assert shake(pair, server, client_context(client), "node1") == Handshake(WORKER, WORKER)


def test_no_old_tls(tmp_path: Path, ca: SwarmCa) -> None:
    """Both sides speak TLS 1.3 only."""
    one = identity(tmp_path, ca, "node1")
    assert {c(one).minimum_version for c in (server_context, client_context)} == {ssl.TLSVersion.TLSv1_3}
