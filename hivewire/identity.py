"""The Swarm PKI as Hivewire's identity: read a node's certificate and key, and speak TLS with them.

Every Swarm node holds a certificate of the Swarm CA: CN is the node id, OU ``swarm-manager`` or ``swarm-worker``,
O the cluster id; the names in it are the OU and the node id (swarmkit ca/certificates.go). Swarm renews it in place,
so it is read again whenever the files change.
"""

import os
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import NameOID

from hivewire.errors import InvalidIdentity
from hivewire.ids import NodeId

MANAGER: Final = "swarm-manager"
WORKER: Final = "swarm-worker"
SWARM_CERTIFICATES: Final = Path("/var/lib/docker/swarm/certificates")

_BLOCK: Final = re.compile(rb"-----BEGIN ([A-Z ]+)-----\r?\n(.*?)-----END \1-----\r?\n?", re.DOTALL)
_OTHER_CREDENTIALS: Final = (
    "set HIVEWIRE_IDENTITY_CERT, HIVEWIRE_IDENTITY_KEY and HIVEWIRE_IDENTITY_CA to other credentials"
)


@dataclass(frozen=True, slots=True)
class IdentityFiles:
    """Where certificate (with its chain), private key and trusted roots lie; all PEM."""

    certificate: Path
    key: Path
    roots: Path

    @classmethod
    def in_folder(cls, folder: Path = SWARM_CERTIFICATES) -> "IdentityFiles":
        return cls(folder / "swarm-node.crt", folder / "swarm-node.key", folder / "swarm-root-ca.crt")

    @property
    def stamp(self) -> tuple[tuple[int, int], ...]:
        """Changes whenever one of the files was replaced. Raises InvalidIdentity where one is absent."""
        return tuple((s.st_mtime_ns, s.st_ino) for s in (_stat(p) for p in (self.certificate, self.key, self.roots)))


@dataclass(frozen=True, slots=True)
class Identity:
    """A node's credentials at one moment. The key is never shown."""

    node: NodeId
    role: str
    """``swarm-manager`` or ``swarm-worker``."""
    cluster: str
    expires: datetime
    certificate_pem: bytes = field(repr=False)
    key_pem: bytes = field(repr=False)
    roots_pem: bytes = field(repr=False)
    """One root; two while ``docker swarm ca --rotate`` is under way."""

    @property
    def is_manager(self) -> bool:
        return self.role == MANAGER


class IdentitySource:
    """Gives the present identity, and reads the files again when they change. Thread-safe enough: reads are whole."""

    def __init__(self, files: IdentityFiles) -> None:
        self._files = files
        self._read: tuple[tuple[tuple[int, int], ...], Identity] | None = None

    def current(self) -> Identity:
        """Raises InvalidIdentity."""
        stamp = self._files.stamp
        if self._read is None or self._read[0] != stamp:
            self._read = (stamp, load(self._files))
        return self._read[1]


def load(files: IdentityFiles) -> Identity:
    """Read and check the credentials. Raises InvalidIdentity."""
    certificate_pem, roots_pem = _read(files.certificate), _read(files.roots)
    key_pem = strip_pem_headers(_read(files.key), str(files.key))
    try:
        certificate = x509.load_pem_x509_certificates(certificate_pem)[0]
        x509.load_pem_x509_certificates(roots_pem)
    except ValueError as error:
        raise InvalidIdentity(f"{files.certificate} or {files.roots} holds no certificate: {error}") from error
    try:
        key = load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError) as error:
        raise InvalidIdentity(f"{files.key} cannot be read as a private key; {_OTHER_CREDENTIALS}") from error
    if key.public_key() != certificate.public_key():
        # Swarm writes the two files one after the other: a reader between them sees a pair that does not fit.
        raise InvalidIdentity(f"{files.key} does not fit {files.certificate}: being renewed, or from another node")
    return Identity(
        node=NodeId(_name(certificate, NameOID.COMMON_NAME, files.certificate)),
        role=_name(certificate, NameOID.ORGANIZATIONAL_UNIT_NAME, files.certificate),
        cluster=_name(certificate, NameOID.ORGANIZATION_NAME, files.certificate),
        expires=certificate.not_valid_after_utc,
        certificate_pem=certificate_pem,
        key_pem=key_pem,
        roots_pem=roots_pem,
    )


def strip_pem_headers(pem: bytes, name: str = "the key") -> bytes:
    """The key without the headers that Swarm's managers put into it (``kek-version``, ``raft-dek``).

    Go accepts them; OpenSSL, BoringSSL and gRPC refuse the file. Raises InvalidIdentity for a key that a locked
    Swarm (``docker swarm update --autolock``) has encrypted, and where there is no PEM block.
    """
    block = _BLOCK.search(pem)
    if block is None:
        raise InvalidIdentity(f"{name} holds no PEM block; {_OTHER_CREDENTIALS}")
    kind, body = block.group(1), block.group(2)
    lines = body.splitlines()
    headers = [line for line in lines if b":" in line]
    if b"ENCRYPTED" in kind or any(h.startswith(b"Proc-Type:") and b"ENCRYPTED" in h for h in headers):
        raise InvalidIdentity(
            f"{name} is encrypted, because the Swarm is locked (autolock); {_OTHER_CREDENTIALS}, "
            "or unlock for good with: docker swarm update --autolock=false"
        )
    base64 = [line.strip() for line in lines if line.strip() and b":" not in line]
    return b"\n".join([b"-----BEGIN %s-----" % kind, *base64, b"-----END %s-----" % kind, b""])


def server_context(identity: Identity) -> ssl.SSLContext:
    """TLS for a server that talks to nodes of this Swarm only."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    return _with_identity(context, identity)


def open_server_context(certificate_pem: bytes, key_pem: bytes) -> ssl.SSLContext:
    """TLS for a server whose clients show no certificate. Raises ssl.SSLError for a pair that OpenSSL does not take."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    _load_pair(context, certificate_pem, key_pem)
    return context


def client_context(identity: Identity) -> ssl.SSLContext:
    """TLS for a client; connect with ``server_hostname`` set to the id, or the role, of the node expected there."""
    return _with_identity(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), identity)


def peer_role(connection: ssl.SSLSocket) -> str:
    """The OU of the certificate at the other end, which TLS has verified already; empty where there is none."""
    subject: tuple[tuple[tuple[str, str], ...], ...] = (connection.getpeercert() or {}).get("subject", ())  # type: ignore[assignment]
    return next((v for rdn in subject for k, v in rdn if k == "organizationalUnitName"), "")


def _with_identity(context: ssl.SSLContext, identity: Identity) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=identity.roots_pem.decode("ascii"))
    _load_pair(context, identity.certificate_pem, identity.key_pem)
    return context


def _load_pair(context: ssl.SSLContext, certificate_pem: bytes, key_pem: bytes) -> None:
    # The ssl module reads a chain from files only; a memory file keeps the key off every disk.
    with _memory_file(certificate_pem) as certificate, _memory_file(key_pem) as key:
        context.load_cert_chain(certificate, key)


@contextmanager
def _memory_file(content: bytes) -> Iterator[str]:
    descriptor = os.memfd_create("identity", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _name(certificate: x509.Certificate, oid: x509.ObjectIdentifier, path: Path) -> str:
    values = certificate.subject.get_attributes_for_oid(oid)
    if not values:
        raise InvalidIdentity(f"{path} is no certificate of a Swarm node: its subject has no {oid._name}")
    return str(values[0].value)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidIdentity(
            f"cannot read {path} ({error.strerror}): is this node part of a Swarm, and is "
            f"{SWARM_CERTIFICATES} of the node mounted there? Else {_OTHER_CREDENTIALS}"
        ) from error


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise InvalidIdentity(f"cannot read {path} ({error.strerror}); {_OTHER_CREDENTIALS}") from error
