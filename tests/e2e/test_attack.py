"""Who can write anything into etcd tries to get into links: nothing in any task's namespace changes, and it shows.

A worker's real credentials sign, a manager's write, which is all that a stranger with etcd's disk could do and more.
"""

import shlex
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path

import msgspec
import pytest
from proof.claims import API, DB, SPY, WEB
from proof.deployed import STACK, Deployed, Task, wait_for

from hivewire.errors import UnverifiedRecord
from hivewire.identity import IdentityFiles, IdentitySource
from hivewire.ids import NetworkId, NodeId, ServiceId, TaskId
from hivewire.keys import PrivateKey
from hivewire.records import (
    MESH_KEY,
    GuardRecord,
    MeshRecord,
    Mode,
    PeerRecord,
    PolicyRecord,
    QuarantineKind,
    QuarantineRecord,
    Record,
    encode,
    guard_key,
    key_of,
    peer_key,
    policy_key,
)
from hivewire.signed import Managers, SwarmSignatures
from tests.e2e.test_access import CERTIFICATES, agent, etcdctl, node_id, worker

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

SERVICES = (WEB, API, DB)


@dataclass
class Thief:
    """Root on a worker that can write to etcd whatever it likes."""

    mesh: Deployed
    node: NodeId
    signatures: SwarmSignatures

    def put(self, key: str, value: bytes) -> None:
        assert "OK" in etcdctl(self.mesh, self.mesh.manager, "put", key, "--", shlex.quote(value.decode("ascii")))

    def get(self, key: str) -> bytes:
        said = etcdctl(self.mesh, self.mesh.manager, "get", "--print-value-only", key)
        return said.removesuffix("\n").encode()

    def delete(self, key: str) -> None:
        etcdctl(self.mesh, self.mesh.manager, "del", key)

    def is_mended(self, kind: type[Record], key: str, *, was_there: bool = True) -> bool:
        """Whether a manager's record is below the key again, or nothing where nothing was."""
        if not was_there:
            return not self.get(key)
        try:
            self.signatures.verify(kind, key, self.get(key))
        except UnverifiedRecord:
            return False
        return True


@pytest.fixture
def thief(mesh: Deployed, tmp_path: Path) -> Thief:
    name = worker(mesh)
    files = IdentityFiles.in_folder(tmp_path)
    for path in (files.certificate, files.key, files.roots):
        path.write_text(mesh.lab.exec(name, "cat", f"{CERTIFICATES}/{path.name}").stdout)
    manager = NodeId(node_id(mesh, mesh.manager))
    signatures = SwarmSignatures(IdentitySource(files), Managers(lambda: frozenset({manager})))
    return Thief(mesh, NodeId(node_id(mesh, name)), signatures)


def held(mesh: Deployed) -> dict[str, tuple[str, ...]]:
    """What the kernels hold for every task of the demo: peers, routes, rules. No secret is in it."""
    found = {}
    for task in (task for service in SERVICES for task in mesh.tasks(service)):
        peers = "\n".join(f"{key} {peer['allowed_ips']}" for key, peer in sorted(mesh.wireguard(task).items()))
        routes = mesh.in_namespace(task, "ip", "route", "show", "dev", "wg0")
        found[task.name] = (peers, "\n".join(sorted(routes.splitlines())), rules(mesh, task))
    return found


def rules(mesh: Deployed, task: Task) -> str:
    """What the table says of itself: the digest of its text and how much of it there is. The image's nft made it."""
    path = mesh.lab.docker(task.node, "inspect", "-f", "{{.NetworkSettings.SandboxKey}}", task.container).stdout.strip()
    listed = mesh.exec(agent(mesh, task.node), "nsenter", f"--net={path}", "nft", "list", "table", "inet", "hivewire")
    return next(line.strip() for line in listed.splitlines() if "comment" in line)


def service_id(mesh: Deployed, name: str) -> ServiceId:
    return ServiceId(mesh.docker("service", "inspect", "-f", "{{.ID}}", name).strip())


def forgeries(mesh: Deployed, thief: Thief) -> list[Record]:
    """What would open something, were it believed."""
    db, web = service_id(mesh, DB), service_id(mesh, WEB)
    policy = msgspec.structs.replace(
        thief.signatures.verify(PolicyRecord, policy_key(db), thief.get(policy_key(db))).record, findings=()
    )
    network = policy.networks[0].id
    claimed = etcdctl(mesh, mesh.manager, "get", "--prefix", "--keys-only", peer_key(db, TaskId(""))).split()
    key = claimed[0]
    peer = thief.signatures.verify(PeerRecord, key, thief.get(key)).record
    own_key = str(PrivateKey.generate().public())
    return [
        msgspec.structs.replace(policy, mode=Mode.OFF),
        msgspec.structs.replace(policy, mode=Mode.OBSERVE),
        msgspec.structs.replace(policy, in_links=(), out_links=()),
        msgspec.structs.replace(peer, public_key=own_key),
        PeerRecord(
            task=TaskId("thief"), task_name="thief.1", service=web, node=thief.node, public_key=own_key,
            endpoint=peer.endpoint, epoch=1, addresses={NetworkId(network): IPv4Address("10.99.0.9")}, serving=True,
        ),
        GuardRecord(network=network, name="demo_app"),
        QuarantineRecord(kind=QuarantineKind.SERVICE, id=db, name=DB),
        MeshRecord(mesh="other", mode=Mode.OFF, settled=True),
    ]  # fmt: skip


def reaches_db(mesh: Deployed, task: Task) -> bool:
    return bool(mesh.probe(task, "tcp", "db", "6379").get("outcome") == "reached")


def refusals(mesh: Deployed) -> str:
    done = mesh.lab.docker(mesh.manager, "service", "logs", "--raw", "--tail", "400", f"{STACK}_controller")
    return done.stdout + done.stderr  # the log of a container stays on the stream that it was written to


def test_forged_records_change_nothing(mesh: Deployed, thief: Thief) -> None:
    """Plain, signed by a worker, and cut: a manager's record takes its place again, the kernels never moved."""
    before = held(mesh)
    for record in forgeries(mesh, thief):
        key, signed = key_of(record), thief.signatures.sign(record)
        is_new = not thief.get(key)
        for value in (encode(record), signed, signed[: len(signed) // 2]):
            thief.put(key, value)
            wait_for(
                f"the end of a forged {key}", partial(thief.is_mended, type(record), key, was_there=not is_new), 30
            )
            assert held(mesh) == before, key
        assert key in refusals(mesh), "it shows in the log"
    mesh.wait_ready(60)


def test_deletions_open_nothing(mesh: Deployed, thief: Thief) -> None:
    """Policies, guards and the mesh deleted: written again, and nothing was open meanwhile."""
    before = held(mesh)
    db = service_id(mesh, DB)
    policy = thief.signatures.verify(PolicyRecord, policy_key(db), thief.get(policy_key(db))).record
    for kind, key in (
        (PolicyRecord, policy_key(db)),
        (GuardRecord, guard_key(policy.networks[0].id)),
        (MeshRecord, MESH_KEY),
    ):
        thief.delete(key)
        wait_for(f"{key} again", partial(thief.is_mended, kind, key), 30)
        assert held(mesh) == before, key
    mesh.wait_ready(60)


def test_an_old_policy_does_not_come_back(mesh: Deployed, thief: Thief) -> None:
    """A link that was once allowed and signed by a manager stays revoked, whoever puts the old record back."""
    db = service_id(mesh, DB)
    key = policy_key(db)
    mesh.update(SPY, "--label-add", "hivewire.links=db:6379")
    spy = mesh.tasks(SPY)[0]
    wait_for("the link", lambda: reaches_db(mesh, spy), 30)
    old = thief.get(key)
    mesh.update(SPY, "--label-rm", "hivewire.links")
    wait_for("the revocation", lambda: not reaches_db(mesh, spy), 30)
    wait_for("the new policy", lambda: thief.get(key) != old, 30)
    mesh.wait_ready(60)
    before = held(mesh)
    thief.put(key, old)
    wait_for("a newer policy", lambda: thief.get(key) != old, 30)
    assert held(mesh) == before
    assert not reaches_db(mesh, spy)
