"""Mutated records: what somebody could write to etcd who cannot sign."""

import base64
import json
import random
from collections import Counter
from collections.abc import Mapping

from hivewire.errors import InvalidRecord, RecordTooNew
from hivewire.records import (
    CLAIMS,
    GUARDS,
    MESH_KEY,
    NODES,
    PEERS,
    POLICIES,
    QUARANTINES,
    STATUS,
    ClaimRecord,
    GuardRecord,
    MeshRecord,
    NodeRecord,
    PeerRecord,
    PolicyRecord,
    QuarantineRecord,
    Record,
    StatusRecord,
)
from hivewire.signed import SwarmSignatures

KINDS: dict[str, type[Record]] = {
    MESH_KEY: MeshRecord, NODES: NodeRecord, CLAIMS: ClaimRecord, STATUS: StatusRecord, PEERS: PeerRecord,
    POLICIES: PolicyRecord, GUARDS: GuardRecord, QUARANTINES: QuarantineRecord,
}  # fmt: skip


def kind_of(key: str) -> type[Record]:
    return next(kind for prefix, kind in KINDS.items() if key.startswith(prefix))


class Mutations:
    """Of signed records: cut, lengthened, bits changed, parts and headers swapped or nonsense, other signers."""

    def __init__(
        self,
        good: Mapping[str, bytes],
        signers: Mapping[str, SwarmSignatures],
        reading: SwarmSignatures,
        seed: int,
    ) -> None:
        """``good`` are the records to begin with, all but the leader's; ``signers`` may sign few of them."""
        self._random = random.Random(seed)  # noqa: S311  the seed of a failure is said, to do it again
        self._good, self._signers, self._reading = dict(good), dict(signers), reading
        self.made: Counter[str] = Counter()

    def one(self) -> tuple[str, bytes]:
        key = self._random.choice(sorted(self._good))
        ways = {
            "cut": self._cut, "lengthened": self._lengthened, "bits changed": self._flipped,
            "parts swapped": self._mixed, "header changed": self._header, "payload changed": self._payload,
            "moved": self._moved, "no JWS": self._nonsense, "other signer": self._resigned,
            "signature changed": self._signature,
        }  # fmt: skip
        name = self._random.choice(sorted(ways))
        self.made[name] += 1
        return key, ways[name](key)

    def _cut(self, key: str) -> bytes:
        value = self._good[key]
        return value[: self._random.randrange(len(value))]

    def _lengthened(self, key: str) -> bytes:
        value, junk = self._good[key], self._random.randbytes(self._random.choice((1, 3, 100, 70_000)))
        at = self._random.randrange(len(value) + 1)
        return value[:at] + self._random.choice((junk, junk.hex().encode(), value)) + value[at:]

    def _flipped(self, key: str) -> bytes:
        value = bytearray(self._good[key])
        for _ in range(self._random.choice((1, 1, 2, 20))):
            value[self._random.randrange(len(value))] ^= 1 << self._random.randrange(8)
        return bytes(value)

    def _mixed(self, key: str) -> bytes:
        parts = self._good[key].split(b".")
        other = self._good[self._random.choice(sorted(self._good))].split(b".")
        return b".".join(self._random.choice(pair) for pair in zip(parts, other, strict=True))

    def _header(self, key: str) -> bytes:
        header, payload, signature = self._good[key].split(b".")
        words = json.loads(decoded(header))
        name = self._random.choice((*words, "jwk", "kid", "crit", "b64", "zip"))
        words[name] = self._random.choice(
            ("none", "HS256", "", None, 0, -1, 1 << 63, 1 << 70, [], {}, [[]], "x" * 5000, ["x"] * 9, words.get("x5c"))
        )
        if self._random.random() < 0.1:
            words = self._random.choice(([], "x", 1, {}, {"alg": "none"}))
        return b".".join((encoded(json.dumps(words).encode()), payload, signature))

    def _payload(self, key: str) -> bytes:
        header, payload, signature = self._good[key].split(b".")
        words = json.loads(decoded(payload))
        words[self._random.choice(sorted(words))] = self._random.choice(("", None, 1, [], {}, "off", "x" * 100))
        deep = b"[" * 20_000
        return b".".join((header, encoded(self._random.choice((json.dumps(words).encode(), deep))), signature))

    def _moved(self, key: str) -> bytes:
        return self._good[self._random.choice([other for other in sorted(self._good) if other != key])]

    def _nonsense(self, key: str) -> bytes:
        payload = decoded(self._good[key].split(b".")[1])
        return self._random.choice(
            (b"", b"..", b"a.b.c", payload, self._random.randbytes(50), b"{" * 5000, b"\xff" * 9)
        )

    def _resigned(self, key: str) -> bytes:
        """The same record, or one that opens more, by somebody who may not sign it."""
        record = self._reading.verify(kind_of(key), key, self._good[key]).record
        names = sorted(name for name, it in self._signers.items() if not self._may(name, key))
        return self._signers[self._random.choice(names)].sign(record)

    def _may(self, name: str, key: str) -> bool:
        try:
            signer = self._signers[name]
            self._reading.verify(
                kind_of(key), key, signer.sign(self._reading.verify(kind_of(key), key, self._good[key]).record)
            )
        except (InvalidRecord, RecordTooNew):
            return False
        return True

    def _signature(self, key: str) -> bytes:
        header, payload, signature = self._good[key].split(b".")
        raw = decoded(signature)
        changed = self._random.choice(
            (raw[:32] * 2, raw[32:] + raw[:32], bytes(64), b"\xff" * 64, raw + b"\0", b"", raw[:63])
        )
        return b".".join((header, payload, encoded(changed)))


def decoded(part: bytes) -> bytes:
    return base64.urlsafe_b64decode(part + b"=" * (-len(part) % 4))


def encoded(raw: bytes) -> bytes:
    return base64.urlsafe_b64encode(raw).rstrip(b"=")
