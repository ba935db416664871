"""The text protocol of userspace WireGuard, and what is told to devices."""

import contextlib
import errno
from ipaddress import IPv4Address, IPv4Network, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.kernel import decode, encode, peers, uapi
from agent.kernel.peers import Device, PeerBatch, PeerChange, RouteBatch
from agent.observed import ObservedPeer
from agent.ops import (
    AddPeer,
    AddRoute,
    Op,
    PeerSpec,
    RemovePeer,
    RemoveRoute,
    RemoveRules,
    Route,
    SetUp,
    UpdatePeer,
)
from hivewire.errors import HivewireError, KernelBusy
from hivewire.keys import PrivateKey, PublicKey
from hivewire.records import Endpoint

KEYS = st.binary(min_size=32, max_size=32).map(PublicKey)
ENDPOINTS = st.builds(
    lambda address, port: Endpoint(address=address, port=port),
    st.integers(0, 2**32 - 1).map(IPv4Address)
    | st.integers(0, 2**64 - 1).map(lambda low: IPv6Address(0x20010DB8 << 96 | low)),
    st.integers(1, 65535),
)
NETWORKS = st.builds(
    lambda address, length: IPv4Network((address, length), strict=False),
    st.integers(0, 2**32 - 1),
    st.integers(0, 32),
)
OBSERVED = st.builds(
    ObservedPeer,
    KEYS,
    st.none() | ENDPOINTS,
    st.frozensets(NETWORKS, max_size=4),
    st.integers(0, 65535),
    # Whole seconds: a float holds no nanoseconds of this century.
    st.none() | st.integers(1, 2**32).map(float),
    st.integers(0, 2**63),
    st.integers(0, 2**63),
)
DEVICES = st.tuples(
    st.none() | st.binary(min_size=32, max_size=32).filter(any).map(PrivateKey),
    st.integers(0, 65535),
    st.lists(OBSERVED, max_size=5, unique_by=lambda peer: peer.public_key),
)

ENDPOINT = Endpoint(address=IPv4Address("192.0.2.7"), port=51820)


def answer(key: PrivateKey | None, port: int, observed: list[ObservedPeer], extra: str = "") -> bytes:
    """What wireguard-go answers to GET for such a device."""
    lines = [f"private_key={key.reveal().hex()}"] if key else []
    lines += [f"listen_port={port}"] if port else []
    lines += [extra] if extra else []
    for peer in observed:
        seconds = int(peer.last_handshake or 0)
        lines += [f"public_key={peer.public_key.raw.hex()}", f"preshared_key={bytes(32).hex()}", "protocol_version=1"]
        lines += [f"endpoint={peer.endpoint}"] if peer.endpoint else []
        lines += [f"last_handshake_time_sec={seconds}", "last_handshake_time_nsec=0"]
        lines += [f"tx_bytes={peer.sent_bytes}", f"rx_bytes={peer.received_bytes}"]
        lines += [f"persistent_keepalive_interval={peer.keepalive_s}"]
        lines += [f"allowed_ip={network}" for network in peer.allowed_ips]
    return ("\n".join([*lines, "errno=0"]) + "\n\n").encode()


@given(DEVICES)
def test_a_device_is_read_as_it_was_written(device: tuple[PrivateKey | None, int, list[ObservedPeer]]) -> None:
    """Every value of a device and its peers survives, and the private key becomes the public one."""
    key, port, observed = device
    expected = Device(key.public() if key else None, port, {peer.public_key: peer for peer in observed})
    assert uapi.parse_device(answer(key, port, observed)) == expected


def test_unknown_keys_are_ignored() -> None:
    """A newer wireguard-go may say more, of the device and of peers."""
    text = answer(None, 5, [], "colour=blue").replace(b"errno", b"public_key=" + b"ab" * 32 + b"\nfeeling=good\nerrno")
    assert set(uapi.parse_device(text).peers) == {PublicKey(b"\xab" * 32)}


def test_what_only_the_node_itself_can_read_is_left_out() -> None:
    """A peer may have roamed to an address with a zone, and a person may have given it an IPv6 address."""
    text = b"public_key=" + b"ab" * 32 + b"\nendpoint=[fe80::1%eth0]:5\nallowed_ip=fd00::/8\nerrno=0\n\n"
    (peer,) = uapi.parse_device(text).peers.values()
    assert (peer.endpoint, peer.allowed_ips) == (None, frozenset())


def test_a_device_without_key_has_none() -> None:
    """wireguard-go before its key was set, in both ways in which versions say so."""
    assert uapi.parse_device(b"errno=0\n\n").public_key is None
    assert uapi.parse_device(b"private_key=" + b"00" * 32 + b"\nerrno=0\n\n").public_key is None


@given(st.binary())
def test_garbage_raises_only_our_errors(data: bytes) -> None:
    """Whatever a device answers, the loop gets an error that it knows."""
    for whole in (data, data + b"\nerrno=0\n\n", b"private_key=" + data + b"\nerrno=0\n\n"):
        with contextlib.suppress(HivewireError):
            uapi.parse_device(whole)


@given(st.sampled_from(["private_key", "public_key", "allowed_ip", "endpoint", "listen_port"]), st.text())
def test_a_wrong_value_raises_only_our_errors(key: str, value: str) -> None:
    """A value of a known key that cannot be read is no crash."""
    lines = f"public_key={'ab' * 32}\n{key}={value}\nerrno=0\n\n" if key[0] in "ae" else f"{key}={value}\nerrno=0\n\n"
    with contextlib.suppress(HivewireError):
        uapi.parse_device(lines.encode())


def test_an_unreadable_private_key_is_in_no_error() -> None:
    """Neither the message nor the chain of errors shows a key that was cut short."""
    secret = "5ec7e7" * 9
    with pytest.raises(KernelBusy) as caught:
        uapi.parse_device(f"private_key={secret}\nerrno=0\n\n".encode())
    assert secret not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("code", [-errno.EADDRINUSE, errno.EADDRINUSE])
def test_a_port_in_use_is_told_apart(code: int) -> None:
    """Versions differ in the sign of errno."""
    with pytest.raises(uapi.PortInUse):
        uapi.check_answer(f"errno={code}\n\n".encode())


@pytest.mark.parametrize(
    "text", [b"", b"errno=0", b"\n\n", b"a=b\n\n", b"errno=x\n\n", b"errno=-22\n\n", b"errno=9" * 9]
)
def test_what_is_no_success_is_an_error(text: bytes) -> None:
    """A refusal, a broken-off answer and none at all."""
    with pytest.raises(KernelBusy):
        uapi.check_answer(text)


def test_a_request_names_the_key_last_that_sends() -> None:
    """The keepalive that starts a handshake comes after the endpoint and the addresses."""
    change = PeerChange(PublicKey(b"\xab" * 32), False, True, ENDPOINT, frozenset({IPv4Network("10.0.0.1")}), 1)
    assert uapi.set_peers([change]) == (
        b"set=1\npublic_key=" + b"ab" * 32 + b"\nupdate_only=true\nendpoint=192.0.2.7:51820\n"
        b"replace_allowed_ips=true\nallowed_ip=10.0.0.1/32\npersistent_keepalive_interval=1\n\n"
    )


def test_a_removal_says_nothing_else() -> None:
    """A removed peer has no other lines."""
    request = uapi.set_peers([PeerChange(PublicKey(b"\xab" * 32), remove=True)])
    assert request == b"set=1\npublic_key=" + b"ab" * 32 + b"\nremove=true\n\n"


def spec(number: int, keepalive_s: int = 0, addresses: int = 1) -> PeerSpec:
    networks = frozenset(IPv4Network(number * 65536 + n) for n in range(addresses))
    return PeerSpec(PublicKey(number.to_bytes(32, "big")), ENDPOINT, networks, keepalive_s)


def test_adding_a_peer_starts_a_handshake_and_leaves_the_wanted_interval() -> None:
    """An interval is turned on, which sends, and off again in the same request where none is wanted."""
    told = list(peers.changes([AddPeer(spec(1)), AddPeer(spec(2, keepalive_s=25))]))
    assert [(change.public_key, change.keepalive_s) for change in told] == [
        (spec(1).public_key, 1),
        (spec(1).public_key, 0),
        (spec(2).public_key, 25),
    ]


def test_neighbours_are_put_together_in_order() -> None:
    """Peers with peers, routes with routes; nothing changes its place."""
    route = Route(IPv4Network("10.0.0.9"), IPv4Address("10.0.0.1"))
    add, remove, update = AddPeer(spec(1)), RemovePeer(spec(2).public_key), UpdatePeer(spec(1).public_key)
    ops: list[Op] = [SetUp(), add, remove, AddRoute(route), RemoveRoute(route), update, RemoveRules(), RemoveRules()]
    assert list(peers.batches(ops)) == [
        SetUp(),
        PeerBatch((add, remove)),
        RouteBatch((AddRoute(route), RemoveRoute(route))),
        PeerBatch((update,)),
        RemoveRules(),
        RemoveRules(),
    ]


def test_requests_to_a_userspace_device_are_short() -> None:
    """1,000 peers, one of them with very many addresses, come in several lists and in their order."""
    ops = [AddPeer(spec(number, keepalive_s=1, addresses=900 if number == 500 else 1)) for number in range(1, 1001)]
    lists = list(peers.requests(peers.changes(ops)))
    assert [change for part in lists for change in part] == list(peers.changes(ops))
    assert all(sum(len(change.allowed_ips or ()) for change in part) <= 1000 for part in lists)
    assert all(len(part) <= 400 for part in lists)


@given(st.lists(st.tuples(st.integers(0, 0x3FFF), st.binary(max_size=20)), max_size=6))
def test_attributes_are_read_as_they_were_written(values: list[tuple[int, bytes]]) -> None:
    """Types and values survive the padding."""
    data = b"".join(encode.attribute(kind, value) for kind, value in values)
    assert list(decode.attributes(data, 0)) == values


@given(st.binary())
def test_broken_attributes_end_the_reading(data: bytes) -> None:
    """A length that cannot be stops it; nothing loops or raises."""
    assert len(list(decode.attributes(data, 0))) <= len(data)
