"""The wire format of the store: exact bytes, defaults, what is refused, and the layout of keys."""

import subprocess
import sys
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address

import pytest

from hivewire.errors import InvalidRecord, RecordTooNew
from hivewire.ids import ContainerId, NetworkId, NodeId, ServiceId, TaskId
from hivewire.records import (
    LEADER_KEY,
    MESH_KEY,
    SCHEMA,
    ClaimRecord,
    Endpoint,
    Finding,
    Link,
    MeshRecord,
    Mode,
    Network,
    NodeRecord,
    PeerRecord,
    PolicyRecord,
    PortRange,
    Protocol,
    Record,
    Severity,
    StatusRecord,
    TaskPhase,
    claim_key,
    decode,
    decode_all,
    encode,
    node_key,
    peer_key,
    peers_prefix,
    policy_key,
    split_key,
    status_key,
    to_builtins,
)

KEY = "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo="
ENDPOINT = Endpoint(address=IPv4Address("192.0.2.1"), port=51820)

MESH = MeshRecord(mesh="cluster1", mode=Mode.OBSERVE, settled=True)
NODE = NodeRecord(
    node=NodeId("n1"),
    hostname="alpha",
    agent_version="0.1.0",
    underlay_address=IPv4Address("192.0.2.1"),
    underlay_mtu=1500,
    backend="kernel",
    first_port=51820,
    last_port=52819,
    report_port=9481,
)
CLAIM = ClaimRecord(
    task=TaskId("t1"),
    service=ServiceId("s1"),
    node=NodeId("n1"),
    container=ContainerId("c1"),
    public_key=KEY,
    endpoint=ENDPOINT,
    epoch=1700000000000,
    serving=True,
)
PEER = PeerRecord(
    task=TaskId("t1"),
    task_name="shop_db.1",
    service=ServiceId("s1"),
    node=NodeId("n1"),
    public_key=KEY,
    endpoint=ENDPOINT,
    epoch=1700000000000,
    addresses={NetworkId("net2"): IPv4Address("10.2.0.5"), NetworkId("net1"): IPv4Address("10.1.0.5")},
    serving=False,
)
POLICY = PolicyRecord(
    service=ServiceId("s1"),
    name="shop_web",
    stack="shop",
    mode=Mode.ENFORCE,
    networks=(Network(id=NetworkId("net1"), name="shop_app", subnets=("10.1.0.0/24",)),),
    out_links=(
        Link(
            service=ServiceId("s2"),
            name="shop_db",
            network=NetworkId("net1"),
            ports=(PortRange(protocol=Protocol.TCP, first=5432, last=5432),),
            vip=IPv4Address("10.1.0.200"),
        ),
    ),
    in_links=(Link(service=ServiceId("s3"), name="shop_lb", network=NetworkId("net1"), ports=()),),
    keepalive_s=25,
    labels={"hivewire.links": "db:5432"},
    findings=(Finding(code="HW001", severity=Severity.WARNING, subject="shop_web", message="m", remedy="r"),),
)
STATUS = StatusRecord(
    task=TaskId("t1"), service=ServiceId("s1"), node=NodeId("n1"), phase=TaskPhase.FAILED, error="no way"
)
RECORDS: tuple[Record, ...] = (MESH, NODE, CLAIM, PEER, POLICY, STATUS)


def named(record: Record) -> str:
    return type(record).__name__


@pytest.mark.parametrize("record", RECORDS, ids=named)
def test_round_trip(record: Record) -> None:
    """What is written is read back equal."""
    assert decode(type(record), encode(record)) == record


@pytest.mark.parametrize(
    ("record", "data"),
    [
        (MESH, b'{"mesh":"cluster1","mode":"observe","settled":true}'),
        (
            CLAIM,
            b'{"container":"c1","endpoint":{"address":"192.0.2.1","port":51820},"epoch":1700000000000,"node":"n1",'
            b'"public_key":"hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=","service":"s1","serving":true,"task":"t1"}',
        ),
        (
            PEER,
            b'{"addresses":{"net1":"10.1.0.5","net2":"10.2.0.5"},"endpoint":{"address":"192.0.2.1","port":51820},'
            b'"epoch":1700000000000,"node":"n1","public_key":"hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=",'
            b'"service":"s1","serving":false,"task":"t1","task_name":"shop_db.1"}',
        ),
        (STATUS, b'{"error":"no way","node":"n1","phase":"failed","service":"s1","task":"t1"}'),
    ],
    ids=lambda value: named(value) if isinstance(value, Record) else "",
)
def test_bytes(record: Record, data: bytes) -> None:
    """The bytes are these, fields in order and defaults left out: a change of them is a change of the format."""
    assert encode(record) == data


def test_equal_records_have_equal_bytes() -> None:
    """Two writers of the same facts write the same bytes, in whatever order they learned them."""
    reversed_addresses = dict(reversed(PEER.addresses.items()))
    assert list(reversed_addresses) != list(PEER.addresses)
    other = PeerRecord(**{f: getattr(PEER, f) for f in PEER.__struct_fields__} | {"addresses": reversed_addresses})
    assert other == PEER
    assert encode(other) == encode(PEER)


@pytest.mark.parametrize(
    ("kind", "data", "record"),
    [
        (MeshRecord, b'{"mesh":"m"}', MeshRecord(schema=SCHEMA, mesh="m", mode=Mode.ENFORCE, settled=False)),
        (MeshRecord, b'{"mesh":"m","later":{"a":[1]}}', MeshRecord(mesh="m")),
        (
            Endpoint,
            b'{"address":"192.0.2.1","port":1,"later":null}',
            Endpoint(address=IPv4Address("192.0.2.1"), port=1),
        ),
        (Endpoint, b'{"address":"2001:DB8:0::7","port":1}', Endpoint(address=IPv6Address("2001:db8::7"), port=1)),
    ],
)
def test_what_other_versions_write(kind: type[Record], data: bytes, record: Record) -> None:
    """Fields that an older version does not write have defaults, and those of a newer one are ignored."""
    assert decode(kind, data) == record


def claim_with(old: bytes, new: bytes) -> bytes:
    data = encode(CLAIM)
    assert old in data
    return data.replace(old, new)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        pytest.param(MeshRecord, b"", id="nothing"),
        pytest.param(MeshRecord, b"\xff\xfe", id="no text"),
        pytest.param(MeshRecord, b"[]", id="no object"),
        pytest.param(MeshRecord, b"{}", id="missing field"),
        pytest.param(MeshRecord, b'{"mesh":1}', id="wrong type"),
        pytest.param(MeshRecord, b'{"mesh":null}', id="null"),
        pytest.param(MeshRecord, b'{"mesh":"m","mode":"strict"}', id="unknown mode"),
        pytest.param(MeshRecord, b'{"mesh":"\xff"}', id="no UTF-8"),
        pytest.param(MeshRecord, b'{"mesh":"m"} x', id="more behind it"),
        pytest.param(MeshRecord, b'{"mesh":"m","x":' + b"[" * 20000 + b"]" * 20000 + b"}", id="too deep"),
        pytest.param(PortRange, b'{"protocol":"tcp","first":0,"last":1}', id="port 0"),
        pytest.param(PortRange, b'{"protocol":"tcp","first":9,"last":8}', id="backwards"),
        pytest.param(PortRange, b'{"protocol":"tcp","first":1,"last":65536}', id="port too high"),
        pytest.param(PortRange, b'{"protocol":"tcp","first":1e400,"last":1}', id="infinite"),
        pytest.param(Endpoint, b'{"address":"192.0.2.1","port":65536}', id="endpoint's port too high"),
        pytest.param(Endpoint, b'{"address":"192.0.2.1","port":-1}', id="endpoint's port negative"),
        pytest.param(Endpoint, b'{"address":"192.0.2.256","port":1}', id="no address"),
        pytest.param(Endpoint, b'{"address":"::ffff:192.0.2.1","port":1}', id="IPv4 in disguise"),
        pytest.param(Endpoint, b'{"address":"fe80::1%eth0","port":1}', id="address with a zone"),
        pytest.param(Endpoint, b'{"address":5,"port":1}', id="address as a number"),
        pytest.param(Endpoint, b'{"address":true,"port":1}', id="address as a boolean"),
        pytest.param(ClaimRecord, claim_with(KEY.encode(), b"hSDwCYkw"), id="short key"),
        pytest.param(ClaimRecord, claim_with(b"Tmo=", b"Tmp="), id="key written otherwise"),
        pytest.param(ClaimRecord, claim_with(KEY.encode(), b""), id="no key"),
        pytest.param(PeerRecord, encode(PEER).replace(b"10.1.0.5", b"10.1.0"), id="peer without an address"),
        pytest.param(PeerRecord, encode(PEER).replace(b"Tmo=", b"Tmo"), id="peer's key"),
    ],
)
def test_unreadable(kind: type[Record], data: bytes) -> None:
    """Whatever the store holds, what cannot be read raises InvalidRecord and nothing else."""
    with pytest.raises(InvalidRecord):
        decode(kind, data)


def test_later_schema() -> None:
    """A mesh of a later schema is told from one that cannot be read, and says what to do."""
    with pytest.raises(RecordTooNew, match="upgrade"):
        decode(MeshRecord, b'{"mesh":"m","schema":%d,"settled":true}' % (SCHEMA + 1))


def test_decode_all() -> None:
    """Unreadable records come apart, by key, and stop no others."""
    good, bad = decode_all(ClaimRecord, {"a": encode(CLAIM), "b": b"{", "c": encode(CLAIM)})
    assert good == {"a": CLAIM, "c": CLAIM}
    assert list(bad) == ["b"]
    assert isinstance(bad["b"], InvalidRecord)


@pytest.mark.parametrize(
    ("first", "last", "text"),
    [(80, 80, "80/tcp"), (8000, 8010, "8000-8010/tcp"), (1, 65535, "1-65535/tcp")],
)
def test_ports_are_shown(first: int, last: int, text: str) -> None:
    """A range of ports is shown as it is written in labels."""
    assert str(PortRange(protocol=Protocol.TCP, first=first, last=last)) == text


@pytest.mark.parametrize(("first", "last"), [(0, 1), (2, 1), (1, 65536), (-1, 5)])
def test_no_such_ports(first: int, last: int) -> None:
    """A range of ports that exists is valid."""
    with pytest.raises(ValueError, match="no range of ports"):
        PortRange(protocol=Protocol.UDP, first=first, last=last)


def test_endpoint_is_shown() -> None:
    """An endpoint is shown as wg shows it."""
    assert str(ENDPOINT) == "192.0.2.1:51820"


def test_linked_services() -> None:
    """Out, in and self links together name the services whose tasks are peers."""
    own = Link(service=ServiceId("s1"), name="shop_web", network=NetworkId("net1"), ports=())
    policy = PolicyRecord(
        service=ServiceId("s1"),
        name="shop_web",
        stack="shop",
        mode=Mode.ENFORCE,
        networks=(),
        out_links=POLICY.out_links,
        in_links=POLICY.in_links,
        self_links=(own,),
    )
    assert policy.linked_services == {"s1", "s2", "s3"}


def test_builtins() -> None:
    """For the API a record is plain JSON types, without defaults."""
    assert to_builtins(CLAIM)["endpoint"] == {"address": "192.0.2.1", "port": 51820}
    assert to_builtins(MESH) == {"mesh": "cluster1", "mode": "observe", "settled": True}


N, S, T = NodeId("n1"), ServiceId("s1"), TaskId("t1")


@pytest.mark.parametrize(
    ("key", "text", "parts"),
    [
        (lambda: MESH_KEY, "/hivewire/v1/mesh", ("mesh",)),
        (lambda: LEADER_KEY, "/hivewire/v1/leader", ("leader",)),
        (lambda: node_key(N), "/hivewire/v1/nodes/n1", ("nodes", "n1")),
        (lambda: claim_key(N, T), "/hivewire/v1/claims/n1/t1", ("claims", "n1", "t1")),
        (lambda: status_key(N, T), "/hivewire/v1/status/n1/t1", ("status", "n1", "t1")),
        (lambda: policy_key(S), "/hivewire/v1/policies/s1", ("policies", "s1")),
        (lambda: peer_key(S, T), "/hivewire/v1/peers/s1/t1", ("peers", "s1", "t1")),
        (lambda: peers_prefix(S), "/hivewire/v1/peers/s1/", ("peers", "s1", "")),
    ],
)
def test_keys(key: Callable[[], str], text: str, parts: tuple[str, ...]) -> None:
    """The layout of keys is this, and its parts can be told from a key."""
    assert key() == text
    assert split_key(text) == parts


@pytest.mark.parametrize("key", ["", "/hivewire/v1", "/hivewire/v2/mesh", "hivewire/v1/mesh", "/other"])
def test_foreign_keys(key: str) -> None:
    """A key outside the layout is refused."""
    with pytest.raises(InvalidRecord):
        split_key(key)


def test_threads_may_read_their_first_records_at_the_same_time() -> None:
    """A decoder that is made while others decode ends the process with SIGSEGV, some times in a hundred."""
    program = """
import sys, threading
sys.setswitchinterval(1e-6)
from hivewire import records
go = threading.Barrier(8)
def read():
    go.wait()
    try:
        records.decode(records.PeerRecord, b'{"endpoint": {"address": "192.0.2.1", "port": 9}}')
    except records.InvalidRecord:
        pass
threads = [threading.Thread(target=read) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
    ended = [subprocess.run([sys.executable, "-c", program], check=False).returncode for _ in range(12)]
    assert ended == [0] * len(ended)
