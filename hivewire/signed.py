"""Signed records: who wrote a record is proven by its signature, so etcd need not be believed.

A record lies in the store as a JWS in compact form (RFC 7515), signed ES256 with the Swarm certificate of the node that
wrote it. The payload is the record. The header holds what the signature binds it to:

    alg   ES256
    x5c   the certificate, and the intermediates that lead to a root (there are some while a Swarm's CA rotates)
    key   where the record lies: a copy under another key is no record
    gen   its generation, which only grows: milliseconds since 1970, or one more than the last where that is larger

A node may sign what lies under its own id in ``nodes/``, ``claims/`` and ``status/``; all else only a manager may.
"""

import base64
import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Generic, Protocol, TypeVar

import jwt
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import NameOID
from cryptography.x509.verification import PolicyBuilder, Store

from hivewire.errors import HivewireError, InvalidIdentity, UnverifiedRecord
from hivewire.identity import MANAGER, WORKER, Identity, IdentitySource
from hivewire.ids import NodeId
from hivewire.records import Record, decode, encode, key_of, writer_of

R = TypeVar("R", bound=Record)

ALGORITHM: Final = "ES256"
#: By so much the clocks of two nodes may differ. Swarm dates its certificates back by an hour on top of that.
MAX_SKEW: Final = timedelta(minutes=5)
#: No record is larger: etcd takes 1.5 MiB in one request.
MAX_BYTES: Final = 1 << 20
#: A node's own records are small, and it may write as many as it likes.
MAX_BYTES_OF_NODES: Final = 1 << 16
#: Certificates that were verified already; more than nodes and their renewals there never are.
_MAX_CERTIFICATES: Final = 10_000
_MAX_CHAIN: Final = 8
#: The engine is asked again whether a node is a manager after this time, and at most this often for an unknown one.
_MANAGERS_AGE_S: Final = 30.0
_MANAGERS_AGAIN_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Signer:
    """Who signed, as the Swarm's CA says."""

    node: NodeId
    role: str
    fingerprint: str
    """SHA-256 of the certificate, in hex."""
    valid_from: datetime
    valid_until: datetime


@dataclass(frozen=True, slots=True)
class Signed(Generic[R]):
    """A record, and what its signature says of it."""

    record: R
    generation: int
    signer: Signer


class Signatures(Protocol):
    """Signs what this node writes, and verifies what it reads. All methods may be called by any thread."""

    def sign(self, record: Record) -> bytes:
        """The bytes to store below the record's key. Raises InvalidIdentity."""
        ...

    def verify(self, kind: type[R], key: str, data: bytes) -> Signed[R]:
        """Read what is stored below a key. Raises UnverifiedRecord, InvalidRecord and RecordTooNew."""
        ...

    refused: Counter[str]
    """How often a record was not believed, by cause; one that stays is looked at again and again."""

    def is_worn(self, signed: Signed[Any]) -> bool:
        """Whether a record that this node may sign should be signed anew: soon nobody could verify it."""
        ...

    @property
    def reached(self) -> int:
        """The highest generation that a clock which is right may have given."""
        ...

    def outrun(self, generation: int) -> None:
        """Sign with higher generations only from now on."""
        ...


@dataclass(frozen=True, slots=True)
class _Certificate:
    signer: Signer
    key: ec.EllipticCurvePublicKey


class Managers:
    """The Swarm's managers as the node's own engine names them. A certificate says manager until it expires; a node
    that was demoted is none from the moment on that the engine leaves it out.
    """

    def __init__(self, ask: Callable[[], frozenset[NodeId]], monotonic: Callable[[], float] = time.monotonic) -> None:
        """``ask`` may raise: then what was known before still counts."""
        self._ask = ask
        self._monotonic = monotonic
        self._asking = threading.Lock()
        self._known: frozenset[NodeId] = frozenset()
        self._asked_at = float("-inf")

    def __contains__(self, node: object) -> bool:
        # An engine that hangs holds up one thread, and those that have to wait for its answer: to take a manager for
        # none, because the question is still under way, would be an answer as well.
        if self._is_due(node) and self._asking.acquire(blocking=node not in self._known):
            try:
                if self._is_due(node):
                    with suppress(HivewireError):
                        self._known = self._ask()
                    self._asked_at = self._monotonic()
            finally:
                self._asking.release()
        return node in self._known

    def _is_due(self, node: object) -> bool:
        patience_s = _MANAGERS_AGE_S if node in self._known else _MANAGERS_AGAIN_S
        return self._monotonic() - self._asked_at >= patience_s


class SwarmSignatures:
    """Signatures with the node's own Swarm certificate, verified against the Swarm's root CA."""

    def __init__(
        self, identity: IdentitySource, managers: Managers, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._identity = identity
        self._managers = managers
        self._now = now
        self._lock = threading.Lock()
        self._jws = jwt.PyJWS(algorithms=[ALGORITHM])
        self._own: tuple[Identity, ec.EllipticCurvePrivateKey, list[str], str] | None = None
        self._roots: bytes = b""
        self._trusted: Store | None = None
        self._certificates: dict[tuple[str, ...], _Certificate] = {}
        self._generation = 0
        self.refused: Counter[str] = Counter()

    def sign(self, record: Record) -> bytes:
        _, key, chain, _ = self._mine()
        with self._lock:
            self._generation = max(self._generation + 1, int(self._now().timestamp() * 1000))
            generation = self._generation
        headers = {"x5c": chain, "key": key_of(record), "gen": generation, "typ": None}
        return self._jws.encode(encode(record), key, ALGORITHM, headers).encode("ascii")

    def verify(self, kind: type[R], key: str, data: bytes) -> Signed[R]:
        try:
            payload, generation, signer = self._opened(key, data)
        except UnverifiedRecord as error:
            self.refused[error.cause] += 1
            raise
        record = decode(kind, payload)
        if key_of(record) != key:
            raise self._refusal("path", f"it is about {key_of(record)}")
        if writer_of(key) is None:
            with self._lock:  # a leader never falls behind the one before, whatever the two clocks say
                self._generation = max(self._generation, generation)
        return Signed(record, generation, signer)

    def is_worn(self, signed: Signed[Any]) -> bool:
        try:
            mine, _, _, fingerprint = self._mine()
        except InvalidIdentity:
            return False
        if signed.signer.node == mine.node:
            return signed.signer.fingerprint != fingerprint
        half = signed.signer.valid_from + (signed.signer.valid_until - signed.signer.valid_from) / 2
        return self._now() > half and mine.expires > signed.signer.valid_until

    @property
    def reached(self) -> int:
        return int((self._now() + MAX_SKEW).timestamp() * 1000)

    def outrun(self, generation: int) -> None:
        with self._lock:
            self._generation = max(self._generation, generation)

    def _refusal(self, cause: str, message: str) -> UnverifiedRecord:
        self.refused[cause] += 1
        return UnverifiedRecord(cause, message)

    def _opened(self, key: str, data: bytes) -> tuple[bytes, int, Signer]:
        most = MAX_BYTES if writer_of(key) is None else MAX_BYTES_OF_NODES
        if len(data) > most:
            raise UnverifiedRecord("size", f"it has {len(data)} bytes, the most is {most}")
        try:
            header = self._jws.get_unverified_header(data)
        except (jwt.PyJWTError, ValueError, RecursionError) as error:
            raise UnverifiedRecord("form", "it is no signed record") from error
        chain, path, generation = _chain(header.get("x5c")), header.get("key"), header.get("gen")
        if header.get("alg") != ALGORITHM or not chain or type(generation) is not int or generation < 0:
            raise UnverifiedRecord("form", "its header names no certificate, or no generation")
        if path != key:
            raise UnverifiedRecord("path", f"it was signed for another key, {str(path)[:200]!r}")
        certificate = self._certificate(chain)
        self._check_writer(key, certificate.signer)
        try:
            payload: bytes = self._jws.decode_complete(data, certificate.key, [ALGORITHM])["payload"]
        except (jwt.PyJWTError, ValueError, RecursionError) as error:
            raise UnverifiedRecord("signature", f"node {certificate.signer.node} did not sign this") from error
        return payload, generation, certificate.signer

    def _check_writer(self, key: str, signer: Signer) -> None:
        owner = writer_of(key)
        if owner is not None and signer.node != owner:
            raise UnverifiedRecord("role", f"node {signer.node} signed it, only node {owner} may")
        if owner is None and signer.role != MANAGER:
            raise UnverifiedRecord("role", f"node {signer.node} signed it, a worker; only managers may")
        if owner is None and signer.node not in self._managers:
            message = f"node {signer.node} signed it, which is no manager, or the engine has not heard of it yet"
            raise UnverifiedRecord("role", message, may_pass=True)

    # Certificates.

    def _certificate(self, chain: tuple[str, ...]) -> _Certificate:
        """Verify a chain, once. Raises UnverifiedRecord."""
        trusted = self._store()
        with self._lock:
            known = self._certificates.get(chain)
        if known is None:
            known = _verified(chain, trusted, self._now())
            with self._lock:
                if len(self._certificates) >= _MAX_CERTIFICATES:
                    self._certificates.clear()
                self._certificates[chain] = known
        elif _clamped(self._now(), known.signer.valid_from, known.signer.valid_until) is None:
            raise _out_of_time(known.signer, self._now())
        return known

    def _store(self) -> Store:
        """The roots that are trusted now: one, or two while the Swarm's CA rotates."""
        identity = self._mine()[0]
        with self._lock:
            if self._trusted is None or self._roots != identity.roots_pem:
                self._trusted = Store(x509.load_pem_x509_certificates(identity.roots_pem))
                self._roots = identity.roots_pem
                self._certificates.clear()
            return self._trusted

    def _mine(self) -> tuple[Identity, ec.EllipticCurvePrivateKey, list[str], str]:
        try:
            identity = self._identity.current()
        except InvalidIdentity:
            # While Swarm renews the files they do not fit each other for a moment.
            if self._own is None:
                raise
            return self._own
        if self._own is None or self._own[0] is not identity:
            key = load_pem_private_key(identity.key_pem, password=None)
            if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
                raise InvalidIdentity(f"the key of node {identity.node} is not on curve P-256, which {ALGORITHM} needs")
            chain = [c.public_bytes(Encoding.DER) for c in x509.load_pem_x509_certificates(identity.certificate_pem)]
            texts = [base64.b64encode(der).decode("ascii") for der in chain]
            self._own = (identity, key, texts, hashlib.sha256(chain[0]).hexdigest())
        return self._own


def _chain(value: object) -> tuple[str, ...]:
    """The certificates of a header; empty for anything else. Swarm's own chains have at most three."""
    texts = tuple(text for text in value if isinstance(text, str)) if isinstance(value, list) else ()
    return texts if len(texts) <= _MAX_CHAIN else ()


def _verified(chain: tuple[str, ...], trusted: Store, now: datetime) -> _Certificate:
    try:
        ders = [base64.b64decode(text, validate=True) for text in chain]
        leaf, *others = [x509.load_der_x509_certificate(der) for der in ders]
        signer = Signer(
            node=NodeId(_name(leaf, NameOID.COMMON_NAME)),
            role=_name(leaf, NameOID.ORGANIZATIONAL_UNIT_NAME),
            fingerprint=hashlib.sha256(ders[0]).hexdigest(),
            valid_from=leaf.not_valid_before_utc,
            valid_until=leaf.not_valid_after_utc,
        )
        key = leaf.public_key()
    except Exception as error:  # who writes to etcd chooses the bytes, and cryptography raises many kinds
        raise UnverifiedRecord("certificate", "its certificate cannot be read") from error
    at = _clamped(now, signer.valid_from, signer.valid_until)
    if at is None:
        raise _out_of_time(signer, now)
    try:
        PolicyBuilder().store(trusted).time(at).build_client_verifier().verify(leaf, others)
    except Exception as error:  # who writes to etcd chooses the bytes, and cryptography raises many kinds
        raise UnverifiedRecord("certificate", "its certificate is not one of this Swarm's CA") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or signer.role not in (MANAGER, WORKER) or not signer.node:
        raise UnverifiedRecord("certificate", "its certificate is not one of a Swarm node")
    return _Certificate(signer, key)


def _clamped(now: datetime, begin: datetime, end: datetime) -> datetime | None:
    """A moment within the validity, at most MAX_SKEW away from now; None where there is none."""
    at = min(max(now, begin), end)
    return at if abs(at - now) <= MAX_SKEW else None


def _out_of_time(signer: Signer, now: datetime) -> UnverifiedRecord:
    form, clock = "%Y-%m-%d %H:%M:%S UTC", f"{now:%Y-%m-%d %H:%M:%S} UTC"
    if now > signer.valid_until:
        when = f"expired {signer.valid_until.strftime(form)}"
        remedy = "set the clock, or let Swarm renew the certificate (docker swarm ca)"
    else:
        when = f"holds from {signer.valid_from.strftime(form)} on"
        remedy = f"set the clocks of both nodes, which may differ by {MAX_SKEW.seconds // 60} minutes"
    return UnverifiedRecord(
        "clock", f"the certificate of node {signer.node} {when}; this node's clock says {clock}: {remedy}"
    )


def _name(certificate: x509.Certificate, oid: x509.ObjectIdentifier) -> str:
    values = certificate.subject.get_attributes_for_oid(oid)
    return str(values[0].value) if len(values) == 1 else ""
