"""The certificate that the API shows where it speaks TLS, followed while it is renewed."""

import ssl
import threading
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Protocol

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from hivewire import logs
from hivewire.errors import HivewireError, InvalidSettings
from hivewire.identity import Identity, IdentitySource, open_server_context

_log = logs.get(part="api")


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate with its chain, and its key, as PEM. The key is never shown."""

    expires: datetime
    certificate_pem: bytes = field(repr=False)
    key_pem: bytes = field(repr=False)


class Pairs(Protocol):
    def current(self) -> Pair:
        """The same value until there is another one. Raises InvalidSettings, InvalidIdentity."""


class NodePair:
    """The node's own, which Swarm renews."""

    def __init__(self, identity: IdentitySource) -> None:
        self._identity = identity
        self._made: tuple[Identity, Pair] | None = None

    def current(self) -> Pair:
        identity = self._identity.current()
        if self._made is None or self._made[0] is not identity:
            self._made = (identity, Pair(identity.expires, identity.certificate_pem, identity.key_pem))
        return self._made[1]


class StoredPair:
    """Two files, such as Docker secrets, read again when they change."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self._certificate = certificate
        self._key = key
        self._read: tuple[object, Pair] | None = None

    def current(self) -> Pair:
        try:
            found = [path.stat() for path in (self._certificate, self._key)]
            stamp = [(it.st_mtime_ns, it.st_size, it.st_ino) for it in found]
            if self._read is None or self._read[0] != stamp:
                self._read = (stamp, _pair(self._certificate, self._key))
        except OSError as error:
            raise InvalidSettings(f"the API's certificate: cannot read {error.filename}: {error.strerror}") from error
        return self._read[1]


def _pair(certificate: Path, key: Path) -> Pair:
    """Raises OSError, InvalidSettings."""
    certificate_pem, key_pem = certificate.read_bytes(), key.read_bytes()
    try:
        first = x509.load_pem_x509_certificates(certificate_pem)[0]
    except ValueError as error:
        raise InvalidSettings(f"HIVEWIRE_API_CERT: {certificate} holds no certificate in PEM") from error
    try:
        private = load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError) as error:
        raise InvalidSettings(f"HIVEWIRE_API_KEY: {key} is no private key in PEM without a password") from error
    if private.public_key() != first.public_key():
        raise InvalidSettings(f"HIVEWIRE_API_KEY: {key} does not fit {certificate}")
    return Pair(first.not_valid_after_utc, certificate_pem, key_pem)


class Contexts:
    """TLS contexts with the certificate of the moment: each handshake takes the newest. Thread-safe."""

    def __init__(self, pairs: Pairs) -> None:
        """Raises InvalidSettings, InvalidIdentity."""
        self._pairs = pairs
        self._lock = threading.Lock()
        self._error = ""
        pair = pairs.current()
        self._made = (pair, _context(pair))

    def listening(self) -> ssl.SSLContext:
        """For a listener: it takes no certificate of its own, but the newest at each handshake."""
        context = _context(self._made[0])
        context.sni_callback = self._on_hello
        return context

    def newest(self) -> ssl.SSLContext:
        """A pair that cannot be read, as one that is being replaced, leaves the one before in use."""
        with self._lock:
            try:
                pair = self._pairs.current()
                if pair is not self._made[0]:
                    self._made = (pair, _context(pair))
                    _log.info("api.certificate_read", expires=pair.expires.isoformat())
                self._error = ""
            except HivewireError as error:
                if str(error) != self._error:
                    self._error = str(error)
                    _log.warning("api.certificate_kept", error=self._error)
            return self._made[1]

    def _on_hello(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        # Called for every handshake, with and without a server name.
        connection.context = self.newest()


def _context(pair: Pair) -> ssl.SSLContext:
    try:
        return open_server_context(pair.certificate_pem, pair.key_pem)
    except ssl.SSLError as error:
        raise InvalidSettings(f"the API's certificate cannot be used for TLS: {error.reason}") from error
