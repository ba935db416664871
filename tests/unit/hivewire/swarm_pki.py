"""A CA and node certificates shaped like those of Swarm (swarmkit ca/certificates.go)."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hivewire.identity import MANAGER, WORKER, IdentityFiles, IdentitySource

CLUSTER = "cluster1"


@dataclass(frozen=True)
class NodeCertificate:
    certificate: bytes
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    def key_pem(
        self,
        *,
        headers: str = "",
        format: PrivateFormat = PrivateFormat.PKCS8,
        encryption: KeySerializationEncryption | None = None,
    ) -> bytes:
        """The key's file; ``headers`` go where Swarm's managers put theirs."""
        pem = self.key.private_bytes(Encoding.PEM, format, encryption or NoEncryption())
        if not headers:
            return pem
        first, rest = pem.split(b"\n", 1)
        return b"\n".join([first, headers.encode(), b"", rest])

    def locked_key_pem(self) -> bytes:
        """The key's file under autolock, as PKCS#8."""
        return self.key_pem(encryption=BestAvailableEncryption(b"SWMKEY-1-secret"))


class SwarmCa:
    def __init__(self, name: str = "swarm-ca") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = (
            self._builder(self._name, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(self._own_id, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        self.pem = certificate.public_bytes(Encoding.PEM)

    @property
    def _own_id(self) -> x509.SubjectKeyIdentifier:
        return x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=90))
        )

    def issue(self, node: str, role: str = WORKER, *, cluster: str = CLUSTER) -> NodeCertificate:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, cluster),
                x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
                x509.NameAttribute(NameOID.COMMON_NAME, node),
            ]
        )
        names = [role, node, *(["swarm-ca"] if role == MANAGER else [])]
        certificate = (
            self._builder(subject, key.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(n) for n in names]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(self._own_id), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return NodeCertificate(certificate.public_bytes(Encoding.PEM), key)

    def source(self, folder: Path, node: str, role: str = WORKER) -> IdentitySource:
        """A node's identity in a folder of its own."""
        issued = self.issue(node, role)
        return IdentitySource(write(folder / node, issued.certificate, issued.key_pem(), self.pem))


def write(folder: Path, certificate: bytes, key: bytes, roots: bytes) -> IdentityFiles:
    """Put the files where Swarm has them, each in one step as Swarm does."""
    folder.mkdir(parents=True, exist_ok=True)
    files = IdentityFiles.in_folder(folder)
    for path, content in ((files.certificate, certificate), (files.key, key), (files.roots, roots)):
        fresh = path.with_suffix(".new")
        fresh.write_bytes(content)
        fresh.replace(path)
    return files


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
