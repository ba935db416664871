"""Messages to and from WireGuard in the kernel, compared with what ``wg`` and a kernel said to each other.

``recordings/wg.txt`` holds the messages, ``recordings/record.py`` made them and says how.
"""

import base64
import contextlib
import logging
import pickle
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.kernel import decode, encode
from agent.kernel.decode import attributes
from agent.kernel.encode import attribute
from agent.kernel.peers import Device, PeerChange
from agent.observed import ObservedPeer
from hivewire.errors import KernelBusy
from hivewire.keys import PrivateKey, PublicKey
from hivewire.records import Endpoint
from tests.unit.agent.recordings.record import key

RECORDINGS = Path(__file__).parent / "recordings" / "wg.txt"
BODY_AT = 16
GENERIC_BYTES = 4
IFNAME, PRIVATE_KEY, FLAGS, PORT, PEERS = 2, 3, 5, 6, 8


def endpoint(address: str, port: int) -> Endpoint:
    where: Any = IPv6Address(address) if ":" in address else IPv4Address(address)
    return Endpoint(address=where, port=port)


def private(word: str) -> PrivateKey:
    return PrivateKey(base64.b64decode(key(word)))


def networks(*texts: str) -> frozenset[IPv4Network]:
    return frozenset(map(IPv4Network, texts))


DEVICE = private("device")
FIRST, SECOND, THIRD = (private(word).public() for word in ("first", "second", "third"))
NINE = endpoint("192.0.2.9", 9)
RANGE = networks("10.9.0.1", "10.9.1.0/24")
MANY = [IPv4Network(f"10.8.{n // 250}.{n % 250}") for n in range(200)]


def recorded(name: str, speaker: str) -> list[bytes]:
    lines = (line.split() for line in RECORDINGS.read_text().splitlines())
    return [bytes.fromhex(message) for found, who, message in lines if (found, who) == (name, speaker)]


def said(name: str) -> dict[int, bytes]:
    """What ``wg`` asked for in its one message: the attributes of the device."""
    (message,) = recorded(name, ">")
    return dict(attributes(message, BODY_AT + GENERIC_BYTES))


def ours(*changes: PeerChange) -> bytes:
    """The peers of our one message."""
    (body,) = encode.set_peers(7, changes)
    return dict(attributes(body, GENERIC_BYTES))[PEERS]


# -- requests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("update", PeerChange(FIRST, endpoint=NINE, keepalive_s=0)),
        ("replace", PeerChange(FIRST, allowed_ips=networks("10.9.0.3"))),
        ("remove", PeerChange(SECOND, remove=True)),
        ("add", PeerChange(SECOND, False, False, endpoint("192.0.2.1", 51821), RANGE, 25)),
        ("add-six", PeerChange(SECOND, False, False, endpoint("2001:db8::2", 51822), RANGE, 25)),
        ("addresses", PeerChange(THIRD, allowed_ips=frozenset(MANY[:50]))),
    ],
)
def test_one_peer_is_told_as_wg_tells_it(name: str, change: PeerChange) -> None:
    """Some values alone, a removal, a whole new peer with an endpoint of either family, many addresses."""
    assert ours(change) == said(name)[PEERS]


def test_key_and_port_are_told_as_wg_tells_them() -> None:
    """In one message; what is recorded of the key is its length, for the kernel had wiped it."""
    wg = said("setconf")
    device = dict(attributes(encode.set_device(7, private_key=DEVICE, listen_port=51820), GENERIC_BYTES))
    assert device[PORT] == wg[PORT]
    assert (device[PRIVATE_KEY], wg[PRIVATE_KEY]) == (DEVICE.reveal(), bytes(32))


def test_a_dump_is_asked_for_as_wg_asks() -> None:
    """The same command and version; we name the interface by its index, wg by its name."""
    (message,) = recorded("show", ">")
    body = message[BODY_AT:]
    assert encode.get_device(7) == body[:GENERIC_BYTES] + attribute(1, struct.pack("=I", 7))
    assert body[GENERIC_BYTES:] == attribute(IFNAME, b"wg0\0")


def test_the_configuration_of_wg_replaces_all_peers_and_ours_never_does() -> None:
    """WGDEVICE_F_REPLACE_PEERS, with which setconf ends every session, is in no message of ours."""
    assert said("setconf")[FLAGS] == struct.pack("=I", 1)
    bodies = [encode.set_device(1, private_key=DEVICE, listen_port=1), encode.get_device(1)]
    bodies += encode.set_peers(1, [PeerChange(FIRST, allowed_ips=frozenset(MANY)), PeerChange(SECOND, remove=True)])
    for body in bodies:
        assert FLAGS not in dict(attributes(body, GENERIC_BYTES))


# -- a kernel of three rules, to read requests with ---------------------------------------------------------------


@dataclass
class Told:
    endpoint: Endpoint | None = None
    allowed_ips: frozenset[IPv4Network] = frozenset()
    keepalive_s: int = 0


def u16(value: bytes) -> int:
    return int(struct.unpack("=H", value)[0])


def where(value: bytes) -> Endpoint | None:
    if not value:
        return None
    port = int.from_bytes(value[2:4], "big")
    if u16(value[:2]) == 2:
        assert len(value) == 16
        return endpoint(str(IPv4Address(value[4:8])), port)
    assert (u16(value[:2]), len(value)) == (10, 28)
    return endpoint(str(IPv6Address(value[8:24])), port)


def carry_out(bodies: Iterator[bytes], peers: dict[PublicKey, Told]) -> int:
    """Do to the peers what the messages say, as set_peer does; how many messages there were."""
    number = 0
    for number, body in enumerate(bodies, 1):  # noqa: B007 -- returned
        found = dict(attributes(body, GENERIC_BYTES))
        for _, part in attributes(found[PEERS], 0):
            change = dict(attributes(part, 0))
            assert list(change) == sorted(change, key=[1, 4, 5, 3, 9].index)
            public, flags = PublicKey(change[1]), int.from_bytes(change.get(3, b""), "little")
            if flags & 1 or (flags & 4 and public not in peers):
                peers.pop(public, None)
                continue
            peer = peers.setdefault(public, Told())
            peer.endpoint = where(change.get(4, b"")) or peer.endpoint
            if flags & 2:
                peer.allowed_ips = frozenset()
            if 5 in change:
                peer.keepalive_s = u16(change[5])
            added = frozenset(network(dict(attributes(each, 0))) for _, each in attributes(change.get(9, b""), 0))
            for other in peers.values():
                other.allowed_ips -= added
            peer.allowed_ips |= added
    return number


def network(found: dict[int, bytes]) -> IPv4Network:
    assert u16(found[1]) == 2
    (length,) = found[3]
    return IPv4Network((found[2], length))


KEYS = st.integers(1, 9).map(lambda n: PublicKey(n.to_bytes(32, "big")))
ENDPOINTS = st.builds(
    lambda address, port: endpoint(str(address), port),
    st.integers(0, 2**32 - 1).map(IPv4Address) | st.integers(0, 2**128 - 1).map(IPv6Address),
    st.integers(0, 65535),
)
NETWORKS = st.builds(
    lambda address, length: IPv4Network((address, length), strict=False), st.integers(0, 2**32 - 1), st.integers(0, 32)
)
CHANGES = st.builds(PeerChange, KEYS, st.just(True)) | st.builds(
    PeerChange,
    KEYS,
    st.just(False),
    st.booleans(),
    st.none() | ENDPOINTS,
    st.none() | st.frozensets(NETWORKS, max_size=4),
    st.none() | st.integers(0, 65535),
)


def wanted(changes: list[PeerChange]) -> dict[PublicKey, Told]:
    """What the changes mean, said without bytes."""
    peers: dict[PublicKey, Told] = {}
    for change in changes:
        if change.remove or (change.update_only and change.public_key not in peers):
            peers.pop(change.public_key, None)
            continue
        peer = peers.setdefault(change.public_key, Told())
        peer.endpoint = change.endpoint or peer.endpoint
        peer.keepalive_s = peer.keepalive_s if change.keepalive_s is None else change.keepalive_s
        if change.allowed_ips is not None:
            for other in peers.values():
                other.allowed_ips -= change.allowed_ips
            peer.allowed_ips = change.allowed_ips
    return peers


@given(st.lists(CHANGES, max_size=30), st.integers(1, 40))
def test_changes_mean_the_same_however_they_are_cut(changes: list[PeerChange], work: int) -> None:
    """Flags, values and order survive encoding, with one peer per message as with all in one."""
    peers: dict[PublicKey, Told] = {}
    carry_out(encode.set_peers(1, changes, work), peers)
    assert peers == wanted(changes)


def test_a_message_ends_before_it_is_long_for_the_kernel() -> None:
    """What costs a multiplication is counted, not what only changes a peer that is there."""
    new = [PeerChange(PublicKey(n.to_bytes(32, "big"))) for n in range(100)]
    known = [PeerChange(each.public_key, update_only=True, keepalive_s=0) for each in new]
    both = [change for pair in zip(new, known, strict=True) for change in pair]
    assert len(list(encode.set_peers(1, new, 10))) == len(list(encode.set_peers(1, both, 10))) == 10
    assert len(list(encode.set_peers(1, known, 10))) == 1


@pytest.mark.parametrize("addresses", [0, 1, 999, 1000, 1001, 2500, 70_000])
def test_no_attribute_is_longer_than_its_length_can_say(addresses: int) -> None:
    """A peer with more addresses than an attribute holds keeps them all, and its keepalive comes last."""
    change = PeerChange(FIRST, False, False, NINE, frozenset(map(IPv4Network, range(addresses))), 1)
    other = PeerChange(SECOND, allowed_ips=networks("192.0.2.0/24"))
    bodies = list(encode.set_peers(1, [other, change, other], 1000))
    peers: dict[PublicKey, Told] = {FIRST: Told(allowed_ips=networks("10.0.0.1"))}
    carry_out(iter(bodies), peers)
    assert peers[FIRST] == Told(NINE, change.allowed_ips or frozenset(), 1)
    assert peers[SECOND].allowed_ips == other.allowed_ips
    last = [part for body in bodies for _, part in attributes(dict(attributes(body, 4))[PEERS], 0)]
    named = [dict(attributes(part, 0)) for part in last if dict(attributes(part, 0))[1] == FIRST.raw]
    assert [5 in part for part in named] == [False] * (len(named) - 1) + [True]


def test_many_small_changes_fit_too() -> None:
    """Updates cost the kernel nothing that is counted, so their bytes end a message."""
    changes = [PeerChange(FIRST, update_only=True, endpoint=NINE, keepalive_s=n) for n in range(3000)]
    peers = {FIRST: Told()}
    assert carry_out(encode.set_peers(1, changes), peers) > 1
    assert peers[FIRST] == Told(NINE, keepalive_s=2999)


# -- answers ----------------------------------------------------------------------------------------------------


def test_a_recorded_device_is_read() -> None:
    """Key, port and two peers, one of them with an IPv6 endpoint and without keepalive."""
    device = decode.parse_device(recorded("show", "<"))
    assert (device.public_key, device.listen_port) == (DEVICE.public(), 51820)
    assert device.peers == {
        FIRST: ObservedPeer(FIRST, NINE, networks("10.9.0.3")),
        SECOND: ObservedPeer(SECOND, endpoint("2001:db8::2", 51822), networks("10.9.0.2")),
    }


def test_a_recorded_dump_of_several_messages_is_put_together() -> None:
    """One peer has more addresses than a message holds; the next message goes on with it."""
    messages = recorded("show-more", "<")
    parts = [p for m in messages for _, p in attributes(dict(attributes(m, 20)).get(PEERS, b""), 0)]
    assert sum(dict(attributes(part, 0))[1] == THIRD.raw for part in parts) > 1
    device = decode.parse_device(messages)
    assert device.peers[THIRD].allowed_ips == set(MANY)
    assert device.peers[FIRST].endpoint == NINE


def test_addresses_of_the_other_family_are_left_out() -> None:
    """A person may have given a peer an IPv6 network: it is nobody's route here, and the IPv4 one beside it counts."""
    told = said("other-family")
    message = bytes(20) + attribute(PEERS, told[PEERS])
    (peer,) = decode.parse_device([message]).peers.values()
    assert peer.allowed_ips == networks("10.9.0.4")


PEER = st.builds(
    ObservedPeer,
    KEYS,
    st.none() | ENDPOINTS,
    st.frozensets(NETWORKS, max_size=8),
    st.integers(0, 65535),
    # Whole seconds: a float holds no nanoseconds of this century.
    st.none() | st.integers(1, 2**32).map(float),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
)


def written(peer: ObservedPeer, addresses: list[IPv4Network], first: bool) -> bytes:
    """A peer as a kernel writes it: all of it, or what of its addresses had no room before."""
    parts = [attribute(1, peer.public_key.raw)]
    if first:
        parts += [attribute(2, bytes(32)), attribute(6, struct.pack("=qq", int(peer.last_handshake or 0), 0))]
        parts += [attribute(5, struct.pack("=H", peer.keepalive_s)), attribute(8, struct.pack("=Q", peer.sent_bytes))]
        parts += [attribute(7, struct.pack("=Q", peer.received_bytes)), attribute(10, struct.pack("=I", 1))]
        if peer.endpoint is not None:
            told = ours(PeerChange(peer.public_key, endpoint=peer.endpoint))
            parts.append(attribute(4, dict(attributes(dict(attributes(told, 0))[0], 0))[4]))
    if addresses:
        told = ours(PeerChange(peer.public_key, allowed_ips=frozenset(addresses)))
        parts.append(attribute(9 | 0x8000, dict(attributes(dict(attributes(told, 0))[0], 0))[9]))
    return attribute(0x8000, b"".join(parts))


@given(
    st.binary(min_size=32, max_size=32).filter(any).map(PrivateKey),
    st.integers(0, 65535),
    st.lists(PEER, max_size=5, unique_by=lambda peer: peer.public_key),
    st.integers(1, 5),
    st.booleans(),
)
def test_a_device_is_read_as_it_was_written(
    secret: PrivateKey, port: int, peers: list[ObservedPeer], at_once: int, names_public_key: bool
) -> None:
    """Every value survives, wherever the dump is cut, and the key is found in both ways of saying it."""
    head = attribute(1, struct.pack("=I", 7)) + attribute(IFNAME, b"wg0\0") + attribute(PRIVATE_KEY, secret.reveal())
    head += attribute(4, secret.public().raw) if names_public_key else b""
    head += attribute(PORT, struct.pack("=H", port))
    pieces: list[bytes] = []
    for peer in peers:
        ordered = sorted(peer.allowed_ips)
        cuts = [ordered[start : start + at_once] for start in range(0, len(ordered), at_once)] or [[]]
        pieces += [written(peer, cut, first=number == 0) for number, cut in enumerate(cuts)]
    messages = [bytes(20) + head + (attribute(PEERS | 0x8000, pieces[0]) if pieces else b"")]
    messages += [bytes(20) + attribute(PEERS | 0x8000, piece) for piece in pieces[1:]]
    expected = Device(secret.public(), port, {peer.public_key: peer for peer in peers})
    assert decode.parse_device(messages) == expected


def test_a_device_without_a_key_has_none() -> None:
    """As it is right after its making, when the kernel names no key, and for one of zeros."""
    assert decode.parse_device([bytes(20)]).public_key is None
    assert decode.parse_device([]).public_key is None
    assert decode.parse_device([bytes(20) + attribute(PRIVATE_KEY, bytes(32))]).public_key is None


def test_the_private_key_of_a_dump_is_in_nothing_that_is_made_of_it(caplog: pytest.LogCaptureFixture) -> None:
    """Not in the value, its repr or its pickle, not in a log."""
    caplog.set_level(logging.DEBUG)
    device = decode.parse_device(recorded("show", "<"))
    secret = DEVICE.reveal()
    shown = repr(device) + str(device) + caplog.text
    assert secret.hex() not in shown
    assert str(secret)[2:-1] not in shown
    assert secret not in pickle.dumps((device.listen_port, repr(device), str(device.public_key)))


def test_the_private_key_is_in_no_error_about_a_broken_dump() -> None:
    """Neither in the words nor in what the error hangs on, nor in a variable of a frame of its traceback."""
    broken = bytes(20) + attribute(PRIVATE_KEY, DEVICE.reveal()) + attribute(PORT, b"\1")
    with pytest.raises(KernelBusy) as caught:
        decode.parse_device([broken])
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert DEVICE.reveal().hex() not in str(caught.value)


# -- anything at all ----------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=200), max_size=3))
def test_any_bytes_are_read_or_refused(messages: list[bytes]) -> None:
    """Only our own error, never another one, and never without end."""
    with contextlib.suppress(KernelBusy):
        decode.parse_device(messages)
    for message in messages:
        with contextlib.suppress(KernelBusy):
            decode.family_id(message)


RECORDED = [message for name in ("show", "show-more") for message in recorded(name, "<")]


@given(st.sampled_from(RECORDED), st.data())
def test_a_mutated_recording_is_read_or_refused(message: bytes, data: st.DataObject) -> None:
    """Bytes changed, cut out and put in, anywhere in a real dump."""
    mutated = bytearray(message)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, max(0, len(mutated) - 1)))
        length = data.draw(st.integers(0, 8))
        mutated[at : at + length] = data.draw(st.binary(max_size=8))
    with contextlib.suppress(KernelBusy):
        decode.parse_device([bytes(mutated), message])


ATTRIBUTES = st.recursive(
    st.tuples(st.integers(0, 12), st.binary(max_size=40)).map(lambda pair: attribute(*pair)),
    lambda inner: st.tuples(st.integers(0, 12), st.lists(inner, max_size=4)).map(
        lambda pair: attribute(pair[0] | 0x8000, b"".join(pair[1]))
    ),
    max_leaves=12,
)


@given(st.lists(ATTRIBUTES, max_size=4))
def test_well_formed_nonsense_is_read_or_refused(parts: list[bytes]) -> None:
    """Attributes of known kinds in every wrong place and length."""
    with contextlib.suppress(KernelBusy):
        decode.parse_device([bytes(20) + b"".join(parts)])
