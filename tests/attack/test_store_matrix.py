"""Who x verb x kind of key, generated, on a real etcd with certificates as Swarm's; known ways around its checks too.

What etcd must ask, it must answer as the data model says. What it does not ask on the installed version gives away
no secret, because none is there, and opens nothing, because no reader believes what is written so.
"""

import base64
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from agent.book import Book
from controller.access import desired_access, plan_access
from controller.known import Known
from controller.swarm.snapshot import Node
from hivewire.identity import MANAGER, WORKER, IdentitySource
from hivewire.ids import ContainerId, NetworkId, NodeId, ServiceId, TaskId
from hivewire.keys import PrivateKey
from hivewire.records import (
    CLAIMS,
    GUARDS,
    LEADER_KEY,
    MESH_KEY,
    NODES,
    PEERS,
    POLICIES,
    QUARANTINES,
    STATUS,
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
    encode,
    key_of,
)
from hivewire.signed import Managers, SwarmSignatures
from hivewire.store.api import LeaseId, Put, TlsCredentials
from hivewire.store.etcd import EtcdSettings, EtcdStore
from hivewire.store.memory import MemoryStore
from hivewire.store.mirror import Mirror
from hivewire.store.writer import Writer
from tests.attack.ledger import Ledger
from tests.attack.verbs import BYPASSES, CALLS, FIRST_REVISION, LEASE, OPEN_TO_ALL, READS, WRITES, Etcd
from tests.contract.etcd_server import ABSENT, EtcdServer
from tests.unit.hivewire.swarm_pki import NodeCertificate, SwarmCa, write

WORKER_ID, OTHER_ID, MANAGER_ID, REMOVED_ID = NodeId("w1"), NodeId("w2"), NodeId("m1"), NodeId("w3")
SERVICE, TASK, NETWORK = ServiceId("svc1"), TaskId("task1"), NetworkId("net1")
WIREGUARD = PrivateKey.generate()
KEY = str(WIREGUARD.public())
ENDPOINT = Endpoint(address=IPv4Address("192.0.2.1"), port=51820)

WHO = ("worker", "other worker", "manager", "removed node", "another Swarm's manager", "no certificate")
MEMBERS = {"worker": WORKER_ID, "other worker": OTHER_ID, "manager": MANAGER_ID, "removed node": REMOVED_ID}

READABLE_BY_ALL = (MESH_KEY, POLICIES, PEERS, GUARDS, QUARANTINES)


def of_node(node: NodeId) -> tuple[Record, ...]:
    return (
        NodeRecord(
            node=node, hostname=node, agent_version="1", underlay_address=ENDPOINT.address, underlay_mtu=1500,
            backend="kernel", first_port=51820, last_port=52819,
        ),
        ClaimRecord(
            task=TASK, service=SERVICE, node=node, container=ContainerId("c"), public_key=KEY, endpoint=ENDPOINT,
            epoch=1, serving=True,
        ),
        StatusRecord(task=TASK, service=SERVICE, node=node, phase=TaskPhase.READY, public_key=KEY),
    )  # fmt: skip


OF_MANAGERS: tuple[Record, ...] = (
    MeshRecord(mesh="cluster1", settled=True),
    PolicyRecord(service=SERVICE, name="shop_web", stack="shop", mode=Mode.ENFORCE, networks=()),
    PeerRecord(
        task=TASK, task_name="shop_web.1", service=SERVICE, node=WORKER_ID, public_key=KEY, endpoint=ENDPOINT, epoch=1,
        addresses={NETWORK: IPv4Address("10.0.0.2")}, serving=True,
    ),
    GuardRecord(network=NETWORK, name="shop_app", enforced=(SERVICE,)),
    QuarantineRecord(kind=QuarantineKind.NODE, id="w2", name="w2"),
)  # fmt: skip
NODES_THERE = (WORKER_ID, OTHER_ID, REMOVED_ID)
RECORDS = {key_of(r): r for r in (*OF_MANAGERS, *(r for node in NODES_THERE for r in of_node(node)))}
#: Keys of every kind: each record's, the leader's, and one that is none of ours.
KEYS = (*RECORDS, LEADER_KEY, "elsewhere")


def may(who: str, key: str, *, to_write: bool) -> bool:
    """The data model, once more and in other words than the product's own."""
    if who == "manager":
        return True
    if who not in ("worker", "other worker"):
        return False
    node = MEMBERS[who]
    is_own = key == f"{NODES}{node}" or key.startswith((f"{CLAIMS}{node}/", f"{STATUS}{node}/"))
    return is_own or (not to_write and key.startswith(READABLE_BY_ALL))


def may_range(who: str, key: str, *, to_write: bool) -> bool:
    """Of a key and all that begin with it: a node's own record in ``nodes/`` is a single key."""
    return may(who, key, to_write=to_write) and (who == "manager" or not key.startswith(NODES))


@dataclass
class Site:
    """A real etcd with access control on, all kinds of records in it, and connections of everybody."""

    server: EtcdServer
    etcd: dict[str, Etcd]
    signatures: dict[str, SwarmSignatures]
    certificates: dict[str, NodeCertificate]
    good: dict[str, bytes]
    old: dict[str, bytes]
    """The same records as they were signed before."""
    manager: EtcdStore
    read: list[bytes] = field(default_factory=list)
    """Every byte that somebody who is no manager got to see."""

    def mend(self, key: str) -> None:
        """Everything below the key as it was."""
        for each, value in self.good.items():
            if each.startswith(key):
                self.manager.put(each, value, LeaseId(LEASE if each == LEADER_KEY else 0))
        self.manager.delete("thief")

    def secrets(self) -> Iterator[bytes]:
        yield WIREGUARD.reveal()
        yield base64.b64encode(WIREGUARD.reveal()).rstrip(b"=")
        for issued in self.certificates.values():
            number = issued.key.private_numbers().private_value.to_bytes(32, "big")
            yield from (number, number.hex().encode(), base64.b64encode(number).rstrip(b"="))
            yield from issued.key_pem().splitlines()[1:3]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if ABSENT:
        pytest.skip(ABSENT)
    folder = tmp_path_factory.mktemp("matrix")
    ca, stranger = SwarmCa(), SwarmCa("other-ca")
    roles = {name: MANAGER if name == "manager" else WORKER for name in MEMBERS}
    certificates = {name: ca.issue(MEMBERS[name], role) for name, role in roles.items()}
    certificates["another Swarm's manager"] = stranger.issue(MANAGER_ID, MANAGER)
    signatures = {}
    for name, issued in certificates.items():
        roots = stranger.pem if name == "another Swarm's manager" else ca.pem
        files = write(folder / name.replace(" ", "-"), issued.certificate, issued.key_pem(), roots)
        signatures[name] = SwarmSignatures(IdentitySource(files), Managers(lambda: frozenset({MANAGER_ID})))
    own = folder / "manager"
    tls = [f"--cert-file={own}/swarm-node.crt", f"--key-file={own}/swarm-node.key",
           f"--trusted-ca-file={own}/swarm-root-ca.crt"]  # fmt: skip
    server = EtcdServer(folder, ["--client-cert-auth", "--enable-grpc-gateway=false", *tls])
    server.start()
    etcd = {name: Etcd(server.endpoint, ca.pem, it.certificate, it.key_pem()) for name, it in certificates.items()}
    etcd["no certificate"] = Etcd(server.endpoint, ca.pem)
    mine = certificates["manager"]
    credentials = TlsCredentials(ca.pem, mine.certificate, mine.key_pem())
    manager = EtcdStore(EtcdSettings((server.endpoint,), lambda: credentials))
    signer_of = {key: _signer(key) for key in RECORDS}
    old = {key: signatures[signer_of[key]].sign(record) for key, record in RECORDS.items()}
    good = {key: signatures[signer_of[key]].sign(record) for key, record in RECORDS.items()}
    good |= {LEADER_KEY: b"{}", "elsewhere": b"x"}
    everybody = [Node(node, node, is_manager=node == MANAGER_ID) for node in MEMBERS.values()]
    for nodes in (everybody, [node for node in everybody if node.id != REMOVED_ID]):
        for change in plan_access(desired_access(nodes), manager.access()):
            manager.change_access(change)
    assert etcd["manager"].grant(LEASE).is_done
    found = Site(server, etcd, signatures, certificates, good, old, manager)
    while manager.put("elsewhere", b"x") < FIRST_REVISION:
        pass
    found.mend("")
    yield found
    for each in etcd.values():
        each.close()
    manager.close()
    server.kill()


def _signer(key: str) -> str:
    return next((who for who, node in MEMBERS.items() if f"/{node}" in key and not _is_managers(key)), "manager")


def _is_managers(key: str) -> bool:
    return key.startswith(READABLE_BY_ALL)


@pytest.mark.parametrize("who", WHO)
def test_etcd_asks_who_may(site: Site, ledger: Ledger, who: str) -> None:
    """Every read and every write of every kind of key is allowed exactly where the data model says so."""
    tried, refused = 0, 0
    for verbs, to_write in ((READS, False), (WRITES, True)):
        for (verb, call), key in itertools.product(verbs.items(), KEYS):
            allowed = (may_range if "prefix" in verb else may)(who, key, to_write=to_write)
            answer = call(site.etcd[who], key, site.good[key])
            assert answer.is_done == allowed, f"{who}: {verb} {key}: {answer}"
            tried, refused = tried + 1, refused + (not allowed)
            if who != "manager":
                site.read.append(answer.read)
            if to_write and allowed:
                site.mend(key)
    if who != "manager":
        ledger.note(who, f"{len(READS) + len(WRITES)} verbs x {len(KEYS)} kinds of key in etcd",
                    f"{refused} of {tried} refused, the others are its own or for all", "answer of etcd")  # fmt: skip


@pytest.mark.parametrize("who", [who for who in WHO if who != "manager"])
def test_calls_about_no_key(site: Site, ledger: Ledger, who: str) -> None:
    """Users, roles, members, leases of others, snapshots: nobody but a manager; what etcd leaves to all is known."""
    for name, call in CALLS.items():
        answer = call(site.etcd[who])
        site.read.append(answer.read)
        if who in ("worker", "other worker") and name in OPEN_TO_ALL:
            continue
        if name in OPEN_TO_ALL and who == "removed node":
            continue  # it has a certificate of the Swarm, and these calls are not about users
        assert not answer.is_done, f"{who}: {name}"
    # Whatever it did, a manager can write again and users are what they were.
    assert CALLS["alarm disarm"](site.etcd["manager"]).is_done
    site.mend("")
    access = desired_access([Node(n, n, is_manager=n == MANAGER_ID) for n in (WORKER_ID, OTHER_ID, MANAGER_ID)])
    assert site.manager.access() == access
    ledger.note(who, f"{len(CALLS)} calls about no key: auth, members, leases, compact, alarm, snapshot",
                "refused but for what etcd leaves to all, which no record hangs on", "answer of etcd")  # fmt: skip


class Readers:
    """The controller's and the agent's way of reading, with what they believed before."""

    def __init__(self, site: Site) -> None:
        store = MemoryStore()
        self._writer = Writer(store, Mirror(store, lambda *_: None))
        reading = site.signatures["manager"]
        kinds = {NODES: NodeRecord, CLAIMS: ClaimRecord, STATUS: StatusRecord, PEERS: PeerRecord,
                 POLICIES: PolicyRecord, GUARDS: GuardRecord, QUARANTINES: QuarantineRecord}  # fmt: skip
        self._known = {prefix: Known(kind, prefix, self._writer, reading) for prefix, kind in kinds.items()}
        self._book = Book(site.signatures["other worker"])
        for key in RECORDS:
            self.take(key, site.good[key])

    def take(self, key: str, value: bytes) -> None:
        self._writer.write((), (Put(key, value),))
        for prefix, known in self._known.items():
            if key.startswith(prefix):
                known.refresh((key,))
        self._book.update(key, {key: value}, listed=False, now=0.0)

    def believed(self) -> dict[str, Record | None]:
        """By the controller, and by an agent."""
        found: dict[str, Record | None] = {}
        for known in self._known.values():
            found |= {f"controller {key}": record for key, record in known.records().items()}
        return found | {f"agent {key}": self._book.get(type(record), key) for key, record in RECORDS.items()}


@pytest.mark.parametrize("who", [who for who in WHO if who != "manager"])
def test_ways_around_are_worth_nothing(site: Site, ledger: Ledger, who: str) -> None:
    """What a known hole of etcd lets somebody write is believed by no reader, be it plain, signed by the writer, a copy
    of another key's record, or an old record.
    """
    readers = Readers(site)
    before = readers.believed()
    assert all(before.values()), "nothing is believed, so this shows nothing"
    through: set[str] = set()
    tried = 0
    for key, (verb, call) in itertools.product(RECORDS, BYPASSES.items()):
        node = MEMBERS.get(who)
        if may(who, key, to_write=True):
            continue
        kinds = type(RECORDS[key])
        copies = [site.good[other] for other, record in RECORDS.items() if type(record) is kinds and other != key]
        forged = [encode(RECORDS[key]), site.old[key], site.good[next(k for k in RECORDS if k != key)], *copies[:1]]
        if who in site.signatures:
            forged.append(site.signatures[who].sign(RECORDS[key]))
        for value in forged if "put" in verb else [b""]:
            answer = call(site.etcd[who], key, value)
            tried += 1
            site.read.append(answer.read)
            if not answer.is_done:
                continue
            assert node is not None, f"{who} has no certificate of the Swarm, and did: {verb}"
            through.add(verb)
            if "delete" in verb:  # it closes and never opens: see test_store_writer
                site.mend(key)
                continue
            item = site.manager.get(key)
            assert item is not None
            readers.take(key, item.value)
            assert readers.believed() == before, f"{who}: {verb} {key}"
            site.mend(key)
            readers.take(key, site.good[key])
    ledger.note(who, f"known holes of etcd x {len(RECORDS)} records, {tried} tries",
                f"no reader believes it; etcd let pass: {', '.join(sorted(through)) or 'nothing'}",
                "HW320, record.refused, hivewire_record_refusals_total" if through else "answer of etcd")  # fmt: skip


def test_no_secret_was_there_to_read(site: Site, ledger: Ledger) -> None:
    """In all that anybody could get out of etcd, allowed or not, is no private key; the records themselves are."""
    everything = b"\n".join(site.read)
    # Records are in base64 themselves.
    parts = re.findall(rb"[A-Za-z0-9_-]{100,}", everything)
    decoded = b"\n".join(base64.urlsafe_b64decode(part[: len(part) // 4 * 4]) for part in parts)
    assert KEY.encode() in decoded, "the records are not there, so this shows nothing"
    secrets = list(site.secrets())
    assert len(secrets) > 20
    assert not [secret for secret in secrets if secret in everything or secret in decoded]
    assert load_pem_private_key(site.certificates["worker"].key_pem(), None)
    ledger.note("anybody", f"to find a key in the {len(everything) >> 10} KiB that etcd gave away",
                "none is there: 0 hits", "none: nothing happened")  # fmt: skip
