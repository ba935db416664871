"""WireGuard keys: Curve25519, 32 bytes, shown in base64 as ``wg`` shows them.

A private key never shows its value: not in ``repr``, ``str``, a comparison's message or a pickle.
"""

import base64
import binascii
import secrets
from typing import Final, NoReturn

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from hivewire.errors import InvalidInput

KEY_BYTES: Final = 32


class PublicKey:
    """A public key: safe to store, log and compare."""

    __slots__ = ("_raw",)

    def __init__(self, raw: bytes) -> None:
        if len(raw) != KEY_BYTES:
            raise InvalidInput(f"a WireGuard public key has {KEY_BYTES} bytes, not {len(raw)}")
        self._raw = bytes(raw)

    @classmethod
    def parse(cls, text: str) -> "PublicKey":
        """Read the base64 form. Raises InvalidInput."""
        return cls(_decode(text, "public"))

    @property
    def raw(self) -> bytes:
        return self._raw

    @property
    def short(self) -> str:
        """The first eight characters, enough for a person to tell keys apart."""
        return str(self)[:8]

    @property
    def is_usable(self) -> bool:
        """Whether an exchange with this key gives a secret: false for zero and all low-order points (RFC 7748, 6.1)."""
        try:
            X25519PrivateKey.from_private_bytes(_PROBE).exchange(X25519PublicKey.from_public_bytes(self._raw))
        except ValueError:
            return False
        return True

    @property
    def is_canonical(self) -> bool:
        """Whether it is written as devices write it: reduced, without the top bit. Else it may be another key's double,
        with which the same secret is agreed (RFC 7748, section 5).
        """
        return int.from_bytes(self._raw, "little") < _P

    def __str__(self) -> str:
        return base64.b64encode(self._raw).decode("ascii")

    def __repr__(self) -> str:
        return f"PublicKey({self.short}…)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PublicKey) and other._raw == self._raw

    def __lt__(self, other: "PublicKey") -> bool:
        return self._raw < other._raw

    def __hash__(self) -> int:
        return hash(self._raw)


class PrivateKey:
    """A private key: made in memory, handed to the kernel, never stored or shown."""

    __slots__ = ("_raw",)

    def __init__(self, raw: bytes) -> None:
        if len(raw) != KEY_BYTES:
            raise InvalidInput(f"a WireGuard private key has {KEY_BYTES} bytes, not {len(raw)}")
        self._raw = bytes(raw)

    @classmethod
    def generate(cls) -> "PrivateKey":
        return cls(secrets.token_bytes(KEY_BYTES))

    def reveal(self) -> bytes:
        """The raw key, for the one call that gives it to a WireGuard device."""
        return self._raw

    def public(self) -> PublicKey:
        return PublicKey(X25519PrivateKey.from_private_bytes(self._raw).public_key().public_bytes_raw())

    def __repr__(self) -> str:
        return "PrivateKey(hidden)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PrivateKey) and secrets.compare_digest(other._raw, self._raw)

    def __hash__(self) -> int:
        return hash(self.public())

    def __reduce__(self) -> NoReturn:
        raise TypeError("a private key is not serialised")


_P: Final = (1 << 255) - 19
# Any valid scalar does: only the shared secret's being zero or not is asked for.
_PROBE: Final = bytes([8]) + bytes(30) + bytes([64])


def _decode(text: str, kind: str) -> bytes:
    refusal = f"a WireGuard {kind} key is base64 of {KEY_BYTES} bytes"
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidInput(refusal) from error
    # The last character has two spare bits: one key must not have several texts, which are compared as texts.
    if base64.b64encode(raw).decode("ascii") != text:
        raise InvalidInput(refusal)
    return raw
