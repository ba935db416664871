"""Records survive the wire, newer writers do not break older readers, and no bytes raise anything unexpected."""

import json
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hivewire.errors import InvalidRecord, RecordTooNew
from hivewire.ids import ContainerId, NetworkId, NodeId, ServiceId, TaskId
from hivewire.keys import PublicKey
from hivewire.records import (
    SCHEMA,
    ClaimRecord,
    Endpoint,
    Finding,
    GuardRecord,
    Link,
    MeshRecord,
    Mode,
    Network,
    NodeRecord,
    PeerRecord,
    PolicyRecord,
    PortRange,
    Protocol,
    QuarantineKind,
    QuarantineRecord,
    Record,
    Severity,
    StatusRecord,
    TaskPhase,
    claim_key,
    decode,
    encode,
    node_key,
    peer_key,
    policy_key,
    quarantine_key,
    split_key,
    status_key,
)

# A slow machine is no failure.
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
KINDS: tuple[type[Record], ...] = (
    MeshRecord,
    NodeRecord,
    ClaimRecord,
    PeerRecord,
    PolicyRecord,
    GuardRecord,
    StatusRecord,
    QuarantineRecord,
)

texts = st.text(max_size=12)
ids = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=25)
numbers = st.integers(-(2**63), 2**63 - 1)
addresses = st.integers(0, 2**32 - 1).map(IPv4Address)
keys = st.binary(min_size=32, max_size=32).map(lambda raw: str(PublicKey(raw)))
# IPv6 from a unicast prefix: an IPv4 address in disguise is none.
underlays = addresses | st.integers(0, 2**64 - 1).map(lambda low: IPv6Address(0x20010DB8 << 96 | low))
endpoints = st.builds(lambda a, p: Endpoint(address=a, port=p), underlays, st.integers(0, 65535))
port_ranges = st.builds(
    lambda protocol, a, b: PortRange(protocol=protocol, first=min(a, b), last=max(a, b)),
    st.sampled_from(Protocol),
    st.integers(1, 65535),
    st.integers(1, 65535),
)
links = st.builds(
    lambda s, n, net, p, v: Link(service=ServiceId(s), name=n, network=NetworkId(net), ports=tuple(p), vip=v),
    ids,
    texts,
    ids,
    st.lists(port_ranges, max_size=3),
    st.none() | addresses,
)
networks = st.builds(
    lambda i, n, s: Network(id=NetworkId(i), name=n, subnets=tuple(s)), ids, texts, st.lists(texts, max_size=2)
)
findings = st.builds(
    lambda c, s, w, m, r, lab: Finding(code=c, severity=s, subject=w, message=m, remedy=r, label=lab),
    texts,
    st.sampled_from(Severity),
    texts,
    texts,
    texts,
    texts,
)
records: st.SearchStrategy[Record] = st.one_of(
    st.builds(
        lambda n, name, strict, who, vips: GuardRecord(
            network=NetworkId(n),
            name=name,
            strict=strict,
            enforced=tuple(map(ServiceId, who[0])),
            exempt=tuple(map(ServiceId, who[1])),
            exempt_vips=tuple(vips),
        ),
        ids,
        texts,
        st.booleans(),
        st.tuples(st.lists(ids, max_size=3), st.lists(ids, max_size=3)),
        st.lists(addresses, max_size=3),
    ),
    st.builds(
        lambda s, m, mode, settled: MeshRecord(schema=s, mesh=m, mode=mode, settled=settled),
        st.integers(0, SCHEMA),
        texts,
        st.sampled_from(Mode),
        st.booleans(),
    ),
    st.builds(
        lambda n, h, v, a, numbers: NodeRecord(
            node=NodeId(n),
            hostname=h,
            agent_version=v,
            underlay_address=a,
            underlay_mtu=numbers[0],
            backend="kernel",
            first_port=numbers[1],
            last_port=numbers[2],
            report_port=numbers[3],
        ),
        ids,
        texts,
        texts,
        underlays,
        st.tuples(numbers, numbers, numbers, numbers),
    ),
    st.builds(
        lambda t, s, n, c, k, e, epoch, serving: ClaimRecord(
            task=TaskId(t),
            service=ServiceId(s),
            node=NodeId(n),
            container=ContainerId(c),
            public_key=k,
            endpoint=e,
            epoch=epoch,
            serving=serving,
        ),
        ids,
        ids,
        ids,
        ids,
        keys,
        endpoints,
        numbers,
        st.booleans(),
    ),
    st.builds(
        lambda t, name, s, n, k, e, epoch, a, serving: PeerRecord(
            task=TaskId(t),
            task_name=name,
            service=ServiceId(s),
            node=NodeId(n),
            public_key=k,
            endpoint=e,
            epoch=epoch,
            addresses={NetworkId(net): address for net, address in a.items()},
            serving=serving,
        ),
        ids,
        texts,
        ids,
        ids,
        keys,
        endpoints,
        numbers,
        st.dictionaries(ids, addresses, max_size=3),
        st.booleans(),
    ),
    st.builds(
        lambda s, n, stack, mode, nets, found, numbers, labels, fs: PolicyRecord(
            service=ServiceId(s),
            name=n,
            stack=stack,
            mode=mode,
            networks=tuple(nets),
            out_links=tuple(found[0]),
            in_links=tuple(found[1]),
            self_links=tuple(found[2]),
            keepalive_s=numbers[0],
            mtu=numbers[1],
            rotate_s=numbers[2],
            labels=labels,
            findings=tuple(fs),
        ),
        ids,
        texts,
        texts,
        st.sampled_from(Mode),
        st.lists(networks, max_size=2),
        st.tuples(st.lists(links, max_size=2), st.lists(links, max_size=2), st.lists(links, max_size=1)),
        st.tuples(numbers, numbers, numbers),
        st.dictionaries(texts, texts, max_size=3),
        st.lists(findings, max_size=2),
    ),
    st.builds(
        lambda t, s, n, p, i, k, numbers, mode, e: StatusRecord(
            task=TaskId(t),
            service=ServiceId(s),
            node=NodeId(n),
            phase=p,
            interface=i,
            public_key=k,
            mtu=numbers[1],
            mode=mode,
            error=e,
        ),
        ids,
        ids,
        ids,
        st.sampled_from(TaskPhase),
        texts,
        texts,
        st.tuples(numbers, numbers),
        st.sampled_from(Mode),
        texts,
    ),
    st.builds(
        lambda kind, i, n, reason, by, since: QuarantineRecord(
            kind=kind, id=i, name=n, reason=reason, by=by, since=since
        ),
        st.sampled_from(QuarantineKind),
        ids,
        texts,
        texts,
        texts,
        st.floats(0, 2**40),
    ),
)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@UNTIMED
@given(records)
def test_round_trip(record: Record) -> None:
    """What is written is read back equal, and writing that gives the same bytes."""
    data = encode(record)
    again = decode(type(record), data)
    assert again == record
    assert encode(again) == data


@UNTIMED
@given(records, records)
def test_equal_bytes_are_equal_records(one: Record, other: Record) -> None:
    """Records of a kind have equal bytes exactly if they are equal."""
    if type(one) is type(other):
        assert (encode(one) == encode(other)) is (one == other)


def widened(value: Any, names: list[str], content: Any, *, is_map: bool = False) -> Any:
    """The same JSON with unknown fields in every object that is a record."""
    match value:
        case dict():
            # Of all objects only these two have names that are values, not fields.
            inner = {k: widened(v, names, content, is_map=k in ("addresses", "labels")) for k, v in value.items()}
            return inner if is_map else {**dict.fromkeys(names, content), **inner}
        case list():
            return [widened(item, names, content) for item in value]
        case _:
            return value


@UNTIMED
@given(records, st.lists(ids.map(lambda n: f"later_{n}"), min_size=1, max_size=3), json_values)
def test_unknown_fields_do_no_harm(record: Record, names: list[str], content: Any) -> None:
    """What a newer version adds, anywhere in a record, does not change what this one reads."""
    data = json.dumps(widened(json.loads(encode(record)), names, content)).encode()
    assert decode(type(record), data) == record


@UNTIMED
@given(records, st.randoms(use_true_random=False))
def test_order_of_fields_is_no_matter(record: Record, shuffle: Any) -> None:
    """The order in which a writer put the fields changes nothing."""
    fields = list(json.loads(encode(record)).items())
    shuffle.shuffle(fields)
    assert decode(type(record), json.dumps(dict(fields)).encode()) == record


def read(kind: type[Record], data: bytes) -> None:
    """Read, allowing exactly what is promised; what is read can be written and read again."""
    try:
        record = decode(kind, data)
    except InvalidRecord:
        return
    except RecordTooNew:
        assert kind is MeshRecord
        return
    assert decode(kind, encode(record)) == record


@UNTIMED
@given(st.sampled_from(KINDS), st.binary(max_size=60))
@example(MeshRecord, b"")
@example(MeshRecord, b'{"mesh":"m","x":' + b'{"x":' * 5000)
@example(PeerRecord, b"[" * 100_000)
def test_any_bytes(kind: type[Record], data: bytes) -> None:
    """No bytes whatever raise anything but the two promised errors."""
    read(kind, data)


@UNTIMED
@given(st.sampled_from(KINDS), json_values)
def test_any_json(kind: type[Record], value: Any) -> None:
    """No JSON whatever raises anything but the two promised errors."""
    read(kind, json.dumps(value).encode())


@UNTIMED
@given(records, st.data(), json_values)
def test_any_field_replaced(record: Record, data: st.DataObject, value: Any) -> None:
    """A record with any one value replaced by any other raises nothing but the two promised errors."""
    tree = json.loads(encode(record))
    holder: Any = tree
    while True:
        key = data.draw(
            st.sampled_from(sorted(holder)) if isinstance(holder, dict) else st.sampled_from(range(len(holder)))
        )
        inner = holder[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            holder[key] = value
            break
        holder = inner
    read(type(record), json.dumps(tree).encode())


@UNTIMED
@given(records, st.integers(0, 400), st.binary(min_size=1, max_size=3))
def test_damaged_bytes(record: Record, at: int, damage: bytes) -> None:
    """A record with some bytes overwritten, or cut off there, raises nothing but the two promised errors."""
    data = encode(record)
    read(type(record), data[:at] + damage + data[at + len(damage) :])
    read(type(record), data[:at])


@UNTIMED
@given(ids, ids)
def test_keys_have_their_parts(one: str, other: str) -> None:
    """From every key the ids it was made of can be told, and no two kinds of record share a key."""
    node, service, task = NodeId(one), ServiceId(one), TaskId(other)
    made = {
        node_key(node): ("nodes", one),
        claim_key(node, task): ("claims", one, other),
        status_key(node, task): ("status", one, other),
        policy_key(service): ("policies", one),
        peer_key(service, task): ("peers", one, other),
        quarantine_key(QuarantineKind.NODE, one): ("quarantines", "node", one),
    }
    assert len(made) == 6
    assert {key: split_key(key) for key in made} == made
