"""WireGuard keys: the arithmetic of RFC 7748, their text, and that private ones stay private."""

import base64
import copy
import pickle
import traceback

import pytest

from hivewire.errors import InvalidInput
from hivewire.keys import PrivateKey, PublicKey

# RFC 7748, section 6.1.
ALICE = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
ALICE_PUBLIC = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
BOB = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
BOB_PUBLIC = bytes.fromhex("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")

# Every value whose point has a low order; the last two write 0 and 1 in another way.
LOW_ORDER = {
    "0": "0000000000000000000000000000000000000000000000000000000000000000",
    "1": "0100000000000000000000000000000000000000000000000000000000000000",
    "order 8": "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "other of order 8": "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "p - 1": "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "p": "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "p + 1": "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
}


@pytest.mark.parametrize(("private", "public"), [(ALICE, ALICE_PUBLIC), (BOB, BOB_PUBLIC)])
def test_public_key(private: bytes, public: bytes) -> None:
    """The public key of a private one is that of RFC 7748."""
    assert PrivateKey(private).public() == PublicKey(public)


def test_reveal() -> None:
    """The key given to a device is the one that was put in."""
    assert PrivateKey(ALICE).reveal() == ALICE


def test_generated_keys_differ() -> None:
    """Every generated key is another one."""
    assert len({PrivateKey.generate().reveal() for _ in range(50)}) == 50


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_wrong_length(length: int) -> None:
    """Neither kind of key has another length than 32 bytes."""
    for kind in (PublicKey, PrivateKey):
        with pytest.raises(InvalidInput, match="32 bytes"):
            kind(bytes(length))


def test_text() -> None:
    """A public key is written and read as wg writes it."""
    key = PublicKey(ALICE_PUBLIC)
    assert str(key) == "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo="
    assert PublicKey.parse(str(key)) == key
    assert key.raw == ALICE_PUBLIC
    assert key.short == "hSDwCYkw"
    assert repr(key) == "PublicKey(hSDwCYkw…)"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTm==",
        "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo",
        "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=\n",
        " hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=",
        "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo==",
        "hSDwCYkwp1R0i33ctD73Wg2_Og0mOBr066SpjqqbTmo=",
        ALICE_PUBLIC.hex(),
        "é" * 44,
    ],
)
def test_text_of_no_key(text: str) -> None:
    """What is not exactly the base64 of 32 bytes is refused."""
    with pytest.raises(InvalidInput):
        PublicKey.parse(text)


def test_one_text_per_key() -> None:
    """A text whose spare bits are set is refused: two texts of one key would count as two keys."""
    with pytest.raises(InvalidInput):
        PublicKey.parse("hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmp=")


def test_equality_and_order() -> None:
    """Public keys compare, sort and hash by their bytes, and equal nothing else."""
    low, high = sorted([PublicKey(BOB_PUBLIC), PublicKey(ALICE_PUBLIC)])
    assert (low.raw, high.raw) == (ALICE_PUBLIC, BOB_PUBLIC)
    assert {low, PublicKey(ALICE_PUBLIC)} == {low}
    assert low != ALICE_PUBLIC
    assert low != high


def test_private_equality() -> None:
    """Private keys compare by value, and equal ones hash alike."""
    assert PrivateKey(ALICE) == PrivateKey(ALICE)
    assert PrivateKey(ALICE) != PrivateKey(BOB)
    assert PrivateKey(ALICE) != PublicKey(ALICE)
    assert hash(PrivateKey(ALICE)) == hash(PrivateKey(ALICE))


@pytest.mark.parametrize("has_top_bit", [False, True])
@pytest.mark.parametrize("name", LOW_ORDER)
def test_low_order_points(name: str, has_top_bit: bool) -> None:
    """A public key with which no secret can be agreed is told apart, with the bit that X25519 ignores and without."""
    raw = bytearray(bytes.fromhex(LOW_ORDER[name]))
    raw[31] = raw[31] & 0x7F | has_top_bit << 7
    assert not PublicKey(bytes(raw)).is_usable


def test_a_key_in_disguise() -> None:
    """Another writing of a key, with which the same secret is agreed, is no device's."""
    double = bytearray(ALICE_PUBLIC)
    double[31] |= 0x80
    assert PublicKey(ALICE_PUBLIC).is_canonical
    assert not PublicKey(bytes(double)).is_canonical
    p = (1 << 255) - 19
    for number in range(p - 3, 1 << 255):
        assert PublicKey(number.to_bytes(32, "little")).is_canonical == (number < p)
    assert all(PrivateKey.generate().public().is_canonical for _ in range(20))


def test_usable_keys() -> None:
    """Keys of real devices are usable."""
    assert PublicKey(ALICE_PUBLIC).is_usable
    assert PublicKey(BOB_PUBLIC).is_usable
    assert all(PrivateKey.generate().public().is_usable for _ in range(20))


def forms(raw: bytes) -> list[str]:
    """The ways in which something might print a key."""
    return [
        raw.hex(),
        base64.b64encode(raw).decode()[:-1],
        repr(raw)[2:-1],
        str(list(raw))[1:-1],
        str(int.from_bytes(raw, "little")),
    ]


@pytest.mark.parametrize(
    "show", [repr, str, "{}".format, "{!r:>3}".format, lambda k: f"{[k]} {({k: k},)}", "{0!s}".format]
)
def test_a_private_key_is_never_shown(show: object) -> None:
    """No way of printing a private key shows a part of it."""
    assert callable(show)
    text = show(PrivateKey(ALICE))
    assert "hidden" in text
    assert [form for form in forms(ALICE) if form in text] == []


@pytest.mark.parametrize("length", [31, 33])
def test_a_private_key_is_not_in_errors(length: int) -> None:
    """Refusing a private key does not show it."""
    raw = (ALICE * 2)[:length]
    with pytest.raises(InvalidInput) as caught:
        PrivateKey(raw)
    text = "".join(traceback.format_exception(caught.value))
    assert [form for form in forms(raw) if form in text] == []


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_private_key_is_not_pickled(protocol: int) -> None:
    """No protocol of pickle, nor a copy by it, serialises a private key."""
    with pytest.raises(TypeError, match="not serialised"):
        pickle.dumps({"key": PrivateKey(ALICE)}, protocol)
    with pytest.raises(TypeError, match="not serialised"):
        copy.deepcopy(PrivateKey(ALICE))


def test_a_private_key_has_no_attributes_to_list() -> None:
    """There is no dictionary of its attributes that something might print."""
    assert not hasattr(PrivateKey(ALICE), "__dict__")
