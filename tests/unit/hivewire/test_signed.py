"""Signed records: what a node of the Swarm wrote is believed for what it may write, and nothing else is."""

import base64
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hivewire.errors import InvalidRecord, RecordTooNew, SwarmUnavailable, UnverifiedRecord
from hivewire.identity import MANAGER, WORKER, IdentityFiles, IdentitySource
from hivewire.ids import ContainerId, NetworkId, NodeId, ServiceId, TaskId
from hivewire.keys import PrivateKey
from hivewire.records import (
    MESH_KEY,
    SCHEMA,
    ClaimRecord,
    Endpoint,
    GuardRecord,
    MeshRecord,
    Mode,
    NodeRecord,
    PeerRecord,
    PolicyRecord,
    QuarantineKind,
    QuarantineRecord,
    Record,
    StatusRecord,
    TaskPhase,
    claim_key,
    key_of,
    policy_key,
    writer_of,
)
from hivewire.signed import MAX_BYTES, MAX_BYTES_OF_NODES, MAX_SKEW, Managers, SwarmSignatures
from tests.fakes.clock import FakeClock
from tests.unit.hivewire.swarm_pki import SwarmCa, write

W1, W2 = NodeId("w1"), NodeId("w2")
TASK, SERVICE = TaskId("task1"), ServiceId("svc1")
KEY = str(PrivateKey.generate().public())
ENDPOINT = Endpoint(address=IPv4Address("192.0.2.1"), port=51820)
MESH = MeshRecord(mesh="cluster1")
POLICY = PolicyRecord(service=SERVICE, name="shop_web", stack="shop", mode=Mode.ENFORCE, networks=())


def claim(node: NodeId = W1) -> ClaimRecord:
    return ClaimRecord(
        task=TASK, service=SERVICE, node=node, container=ContainerId("c"), public_key=KEY, endpoint=ENDPOINT, epoch=1,
        serving=True,
    )  # fmt: skip


OF_NODES: tuple[Record, ...] = (
    claim(),
    StatusRecord(task=TASK, service=SERVICE, node=W1, phase=TaskPhase.READY),
    NodeRecord(
        node=W1, hostname="w1", agent_version="1", underlay_address=IPv4Address("192.0.2.1"), underlay_mtu=1500,
        backend="kernel", first_port=1, last_port=2,
    ),
)  # fmt: skip
OF_MANAGERS: tuple[Record, ...] = (
    MESH,
    POLICY,
    PeerRecord(
        task=TASK, task_name="shop_web.1", service=SERVICE, node=W1, public_key=KEY, endpoint=ENDPOINT, epoch=1,
        addresses={NetworkId("n"): IPv4Address("10.0.0.2")}, serving=True,
    ),
    GuardRecord(network=NetworkId("n"), name="shop_app"),
    QuarantineRecord(kind=QuarantineKind.NODE, id="w1", name="w1"),
)  # fmt: skip


@dataclass
class Pki:
    """A Swarm's nodes, and who among them is a manager by the word of the engines."""

    folder: Path
    ca: SwarmCa
    now: datetime
    managers: frozenset[NodeId] = frozenset({NodeId("m1"), NodeId("m2")})

    def node(self, name: str, role: str = WORKER, ca: SwarmCa | None = None) -> SwarmSignatures:
        return self.reading((ca or self.ca).source(self.folder, name, role))

    def reading(self, source: IdentitySource) -> SwarmSignatures:
        return SwarmSignatures(source, Managers(lambda: self.managers, lambda: 0.0), lambda: self.now)


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path, SwarmCa(), datetime.now(UTC))


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UnverifiedRecord) as caught:
        call()
    return caught.value.cause


def kind_of(record: Record) -> str:
    return type(record).__name__


@pytest.mark.parametrize("record", [*OF_NODES, *OF_MANAGERS], ids=kind_of)
def test_what_was_signed_is_read(pki: Pki, record: Record) -> None:
    """Every kind of record goes through, with its signer and a generation."""
    signer = pki.node("m1", MANAGER) if record in OF_MANAGERS else pki.node("w1")
    got = pki.node("w2").verify(type(record), key_of(record), signer.sign(record))
    assert got.record == record
    assert (got.signer.node, got.signer.role) == (("m1", MANAGER) if record in OF_MANAGERS else ("w1", WORKER))
    assert abs(got.generation - pki.now.timestamp() * 1000) < 1000


@pytest.mark.parametrize("record", OF_MANAGERS, ids=kind_of)
def test_workers_sign_nothing_of_managers(pki: Pki, record: Record) -> None:
    """A worker's signature below a manager's key is none, and the refusal is counted."""
    reader = pki.node("m1", MANAGER)
    data = pki.node("w1").sign(record)
    assert refusal(lambda: reader.verify(type(record), key_of(record), data)) == "role"
    assert reader.refused == {"role": 1}


@pytest.mark.parametrize("record", OF_NODES, ids=kind_of)
@pytest.mark.parametrize(("name", "role"), [("w2", WORKER), ("m1", MANAGER)])
def test_nobody_signs_for_another_node(pki: Pki, record: Record, name: str, role: str) -> None:
    """What lies below a node's id only that node may sign; a manager is no exception."""
    data = pki.node(name, role).sign(record)
    assert refusal(lambda: pki.node("m2", MANAGER).verify(type(record), key_of(record), data)) == "role"


def test_a_copy_under_another_key_is_no_record(pki: Pki) -> None:
    """A signature holds for one key: another policy's, or another task's claim, is not taken in its place."""
    data = pki.node("m1", MANAGER).sign(POLICY)
    reader = pki.node("w1")
    assert refusal(lambda: reader.verify(PolicyRecord, policy_key(ServiceId("svc2")), data)) == "path"
    assert refusal(lambda: reader.verify(ClaimRecord, claim_key(W1, TASK), data)) == "path"


def test_another_swarm_is_not_believed(pki: Pki) -> None:
    """A certificate of the right shape from another CA is worth nothing."""
    stranger = pki.node("m1", MANAGER, SwarmCa())
    assert refusal(lambda: pki.node("w1").verify(MeshRecord, MESH_KEY, stranger.sign(MESH))) == "certificate"


def test_a_demoted_manager_is_none(pki: Pki) -> None:
    """Its certificate may say manager for a long time yet; the engines know better."""
    data = pki.node("m1", MANAGER).sign(MESH)
    reader = pki.node("w1")
    assert reader.verify(MeshRecord, MESH_KEY, data).record == MESH
    pki.managers = frozenset({NodeId("m2")})
    assert refusal(lambda: pki.node("w2").verify(MeshRecord, MESH_KEY, data)) == "role"


def test_two_roots_while_the_ca_rotates(pki: Pki) -> None:
    """With both roots in the file both are believed; when the old one is gone, what it signed is not."""
    new = SwarmCa("swarm-ca-2")
    old_record, new_record = pki.node("m1", MANAGER).sign(MESH), pki.node("m2", MANAGER, new).sign(MESH)
    issued = new.issue("w1")
    files = write(pki.folder / "both", issued.certificate, issued.key_pem(), pki.ca.pem + new.pem)
    reader = pki.reading(IdentitySource(files))
    for data in (old_record, new_record):
        assert reader.verify(MeshRecord, MESH_KEY, data).record == MESH
    write(pki.folder / "both", issued.certificate, issued.key_pem(), new.pem)
    assert reader.verify(MeshRecord, MESH_KEY, new_record).record == MESH
    assert refusal(lambda: reader.verify(MeshRecord, MESH_KEY, old_record)) == "certificate"


@pytest.mark.parametrize(
    ("off", "cause"),
    [
        (timedelta(hours=-1) - MAX_SKEW + timedelta(minutes=1), None),
        (timedelta(hours=-1) - MAX_SKEW - timedelta(minutes=1), "clock"),
        (timedelta(days=90) + MAX_SKEW - timedelta(minutes=1), None),
        (timedelta(days=90) + MAX_SKEW + timedelta(minutes=1), "clock"),
    ],
)
def test_clocks_may_differ_by_a_little(pki: Pki, off: timedelta, cause: str | None) -> None:
    """Before a certificate begins and after it ends there are a few minutes of grace; beyond them the text says why."""
    data = pki.node("m1", MANAGER).sign(MESH)
    pki.now += off
    reader = pki.node("w1")
    for _ in range(2):  # the second time the certificate may be a known one
        if cause is None:
            assert reader.verify(MeshRecord, MESH_KEY, data).record == MESH
        else:
            with pytest.raises(
                UnverifiedRecord, match=r"certificate of node m1 .* clock says .* set the clock"
            ) as caught:
                reader.verify(MeshRecord, MESH_KEY, data)
            assert caught.value.cause == cause


def test_generations_only_grow(pki: Pki) -> None:
    """Also where the clock stands still or goes back, and after reading what another manager signed ahead of it."""
    one, two = pki.node("m1", MANAGER), pki.node("m2", MANAGER)
    seen = [one.verify(MeshRecord, MESH_KEY, one.sign(MESH)).generation for _ in range(3)]
    pki.now -= timedelta(minutes=2)
    last = one.sign(MESH)
    seen += [
        two.verify(MeshRecord, MESH_KEY, last).generation,
        two.verify(MeshRecord, MESH_KEY, two.sign(MESH)).generation,
    ]
    assert seen == sorted(set(seen))


def test_a_renewed_certificate_signs_anew(pki: Pki) -> None:
    """What was signed with the certificate before is worn, of this node at once, of others past half of its time."""
    files = IdentityFiles.in_folder(pki.folder / "m1")
    one, two = pki.node("m1", MANAGER), pki.node("m2", MANAGER)
    signed = one.verify(MeshRecord, MESH_KEY, one.sign(MESH))
    assert not one.is_worn(signed)
    assert not two.is_worn(signed)
    renewed = pki.ca.issue("m1", MANAGER)
    write(files.certificate.parent, renewed.certificate, renewed.key_pem(), pki.ca.pem)
    assert one.is_worn(signed)
    assert not one.is_worn(one.verify(MeshRecord, MESH_KEY, one.sign(MESH)))
    pki.now += timedelta(days=46)
    assert not two.is_worn(signed), "two's certificate ends no later"


def test_half_renewed_files_do_not_stop_anybody(pki: Pki) -> None:
    """Between the two writes of a renewal the pair before stays in use."""
    one = pki.node("m1", MANAGER)
    one.sign(MESH)
    files = IdentityFiles.in_folder(pki.folder / "m1")
    files.certificate.write_bytes(pki.ca.issue("m1", MANAGER).certificate)
    assert pki.node("w1").verify(MeshRecord, MESH_KEY, one.sign(MESH)).record == MESH


def test_a_newer_schema_is_told_apart(pki: Pki) -> None:
    """Only a manager can say that this version is too old."""
    data = pki.node("m1", MANAGER).sign(MeshRecord(mesh="m", schema=SCHEMA + 1))
    with pytest.raises(RecordTooNew):
        pki.node("w1").verify(MeshRecord, MESH_KEY, data)
    assert refusal(lambda: pki.node("w1").verify(MeshRecord, MESH_KEY, b'{"mesh":"m","schema":9}')) == "form"


def test_algorithms_are_not_up_for_choice(pki: Pki) -> None:
    """Neither no signature at all, nor one keyed with what everybody knows."""
    head, body, signature = pki.node("m1", MANAGER).sign(MESH).split(b".")
    header = json.loads(base64.urlsafe_b64decode(head + b"=="))
    for name in ("none", "HS256", "ES384", "", None, 7):
        changed = base64.urlsafe_b64encode(json.dumps(header | {"alg": name}).encode()).rstrip(b"=")
        for end in (signature, b""):
            token = b".".join((changed, body, end))
            assert refusal(lambda token=token: pki.node("w1").verify(MeshRecord, MESH_KEY, token)) in (
                "form",
                "signature",
            )


def test_too_large(pki: Pki) -> None:
    """What etcd could hardly hold is not even looked at."""
    assert refusal(lambda: pki.node("w1").verify(MeshRecord, MESH_KEY, b"a" * (MAX_BYTES + 1))) == "size"
    large = b"a" * (MAX_BYTES_OF_NODES + 1)
    assert refusal(lambda: pki.node("w1").verify(ClaimRecord, claim_key(W1, TASK), large)) == "size"
    assert refusal(lambda: pki.node("w1").verify(MeshRecord, MESH_KEY, large)) == "form", "managers' may be larger"


SHARED: dict[str, tuple[SwarmSignatures, list[tuple[Record, bytes]]]] = {}


def _signed_once(folder: Path) -> tuple[SwarmSignatures, list[tuple[Record, bytes]]]:
    if "it" not in SHARED:
        pki = Pki(folder, SwarmCa(), datetime.now(UTC))
        manager, worker = pki.node("m1", MANAGER), pki.node("w1")
        tokens = [(r, manager.sign(r)) for r in OF_MANAGERS] + [(r, worker.sign(r)) for r in OF_NODES]
        SHARED["it"] = (pki.node("w2"), tokens)
    return SHARED["it"]


@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_changed_record_is_believed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Cut, lengthened, with bits changed or parts swapped: refused, or the very same record; never a crash."""
    reader, tokens = _signed_once(tmp_path_factory.getbasetemp() / "signed-once")
    record, token = data.draw(st.sampled_from(tokens))
    changed = bytearray(token)
    match data.draw(st.sampled_from(["cut", "insert", "change", "swap", "certificate", "garbage"])):
        case "cut":
            start = data.draw(st.integers(0, len(token) - 1))
            del changed[start : start + data.draw(st.integers(1, len(token)))]
        case "insert":
            where = data.draw(st.integers(0, len(token)))
            changed[where:where] = data.draw(st.binary(min_size=1, max_size=50))
        case "change":
            for _ in range(data.draw(st.integers(1, 4))):
                changed[data.draw(st.integers(0, len(token) - 1))] = data.draw(st.integers(0, 255))
        case "swap":
            parts, others = token.split(b"."), data.draw(st.sampled_from(tokens))[1].split(b".")
            which = data.draw(st.integers(0, 2))
            changed = bytearray(b".".join([*parts[:which], others[which], *parts[which + 1 :]]))
        case "certificate":  # the header stays one, so the bytes reach what reads certificates
            head, body, signature = token.split(b".")
            header = json.loads(base64.urlsafe_b64decode(head + b"=="))
            der = bytearray(base64.b64decode(header["x5c"][0]))
            for _ in range(data.draw(st.integers(1, 3))):
                der[data.draw(st.integers(0, len(der) - 1))] = data.draw(st.integers(0, 255))
            header["x5c"] = [base64.b64encode(der).decode()]
            changed = bytearray(b".".join((base64.urlsafe_b64encode(json.dumps(header).encode()), body, signature)))
        case _:
            changed = bytearray(data.draw(st.binary(max_size=300)))
    try:
        got = reader.verify(type(record), key_of(record), bytes(changed))
    except InvalidRecord:
        return
    assert got.record == record


def test_writers_of_keys() -> None:
    """Three folders belong to nodes, everything else to managers."""
    assert {writer_of(key_of(record)) for record in OF_NODES} == {W1}
    assert {writer_of(key_of(record)) for record in OF_MANAGERS} == {None}


def test_managers_are_asked_seldom() -> None:
    """The engine is asked again for a node it did not name, and else every half minute; silence changes nothing."""
    clock, asked = FakeClock(), 0
    answers: list[frozenset[NodeId] | None] = [frozenset({W1}), frozenset({W1, W2}), None, frozenset()]

    def ask() -> frozenset[NodeId]:
        nonlocal asked
        asked += 1
        answer = answers[min(asked, len(answers)) - 1]
        if answer is None:
            raise SwarmUnavailable("the engine does not answer")
        return answer

    managers = Managers(ask, clock)
    assert W1 in managers
    assert W2 not in managers
    assert asked == 1
    clock.advance(1.0)
    assert W2 in managers
    clock.advance(30.0)
    assert W1 in managers, "the engine is silent"
    assert asked == 3
    clock.advance(30.0)
    assert W1 not in managers


def test_who_asks_while_the_engine_is_asked_waits_for_its_answer() -> None:
    """A manager is never taken for none because another thread's question is under way; who is known waits for none."""
    clock, asked, may_answer = FakeClock(), threading.Semaphore(0), threading.Semaphore(0)

    def ask() -> frozenset[NodeId]:
        asked.release()
        assert may_answer.acquire(timeout=10.0)
        return frozenset({W1})

    managers = Managers(ask, clock)
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(managers.__contains__, W1) for _ in range(3)]
        assert asked.acquire(timeout=10.0)
        assert not wait(answers, timeout=0.2).done
        may_answer.release()
        assert [answer.result(10.0) for answer in answers] == [True] * 3
        clock.advance(30.0)
        slow = pool.submit(managers.__contains__, W1)
        assert asked.acquire(timeout=10.0)
        assert W1 in managers, "the engine is silent"
        may_answer.release()
        assert slow.result(10.0)
    assert not asked.acquire(blocking=False), "one question for all"


def test_a_worker_s_certificate_is_none_of_a_manager(pki: Pki) -> None:
    """A node that was promoted signs for managers only once Swarm has given it the certificate."""
    pki.managers |= {W1}
    data = pki.node("w1").sign(MESH)
    assert refusal(lambda: pki.node("w2").verify(MeshRecord, MESH_KEY, data)) == "role"


def test_a_certificate_that_was_good_expires(pki: Pki) -> None:
    """Having verified it before excuses nothing."""
    data, reader = pki.node("m1", MANAGER).sign(MESH), pki.node("w1")
    assert reader.verify(MeshRecord, MESH_KEY, data).record == MESH
    pki.now += timedelta(days=91)
    assert refusal(lambda: reader.verify(MeshRecord, MESH_KEY, data)) == "clock"


def test_a_record_lies_where_it_says(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that signs, below its own id, a claim that names another one, is not believed."""
    with monkeypatch.context() as patched:
        patched.setattr("hivewire.signed.key_of", lambda _: claim_key(W1, TASK))
        data = pki.node("w1").sign(claim(W2))
    assert refusal(lambda: pki.node("m1", MANAGER).verify(ClaimRecord, claim_key(W1, TASK), data)) == "path"


def test_generations_can_be_outrun(pki: Pki) -> None:
    """After a generation that others have seen the next one is higher; no clock that is right is further ahead."""
    signatures = pki.node("m1", MANAGER)
    ahead = signatures.reached
    signatures.outrun(ahead)
    signed = signatures.verify(MeshRecord, MESH_KEY, signatures.sign(MESH))
    assert signed.generation == ahead + 1
    assert ahead == int((pki.now + MAX_SKEW).timestamp() * 1000)
