"""Root on a worker, with its real certificate, over the real etcd, tries to get more than its own tasks' links."""

import time
from collections.abc import Iterator
from ipaddress import IPv4Address

import msgspec
import pytest
from lab.images import Images
from proof.claims import API, DB, WEB
from proof.deployed import Deployed, Task, wait_for

from hivewire.ids import ContainerId, ServiceId, TaskId
from hivewire.keys import PrivateKey
from hivewire.records import (
    CLAIMS,
    ClaimRecord,
    Endpoint,
    Mode,
    PeerRecord,
    PolicyRecord,
    claim_key,
    key_of,
    peer_key,
    policy_key,
)
from tests.attack.foothold import (
    Foothold,
    agent,
    bugs,
    held,
    hold,
    logs,
    manager,
    node_id,
    refusal_of,
    service_id,
)
from tests.attack.ledger import Ledger
from tests.e2e.test_mesh import all_peers_right, steady_requests

__all__ = ["hold", "manager"]
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

WHO = "worker's root"
FLOOD = 3000
LOW_ORDER = "AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="


@pytest.fixture(scope="module")
def mules(mesh: Deployed, hold: Foothold) -> Iterator[dict[str, Task]]:
    """Two tasks of the worker's own: one in the mesh, linked with nobody, and one outside of it."""
    for name, labels in (("mule", ("--label", "hivewire.enable=true")), ("stray", ())):
        mesh.docker(
            "service", "create", "--detach", "--name", name, "--network", "demo_app", *labels, "--constraint",
            f"node.hostname=={hold.name}", Images().demo, "sleep", "3600",
        )  # fmt: skip
    try:
        tasks = {name: wait_for(f"the {name}", lambda name=name: mesh.tasks(name), 60)[0] for name in ("mule", "stray")}
        key = claim_key(hold.node, TaskId(tasks["mule"].task))
        wait_for("the mule's claim", lambda: hold.get(key), 60)
        mesh.wait_ready(90)
        yield tasks
    finally:
        mesh.docker("service", "rm", "mule", "stray")


def claim(mesh: Deployed, hold: Foothold, task: Task, service: str, **other: object) -> ClaimRecord:
    """A claim for a task as the worker's agent would write it, but for what is given."""
    own = {
        "task": TaskId(task.task), "service": service_id(mesh, service), "node": hold.node,
        "container": ContainerId(task.container), "public_key": str(PrivateKey.generate().public()),
        "endpoint": Endpoint(address=IPv4Address(str(mesh.lab.node(hold.name).address)), port=51999),
        "epoch": int(time.time() * 1000) + 1000, "serving": True,
    }  # fmt: skip
    return ClaimRecord(**(own | other))  # type: ignore[arg-type]


def test_it_cannot_write_for_others(mesh: Deployed, hold: Foothold, manager: Foothold, ledger: Ledger) -> None:
    """Another node's claims, peers and policies: etcd refuses; by its known hole the record gets in, and is nothing."""
    before = held(mesh)
    other = node_id(mesh, mesh.lab.nodes[1].name)
    victim = mesh.tasks(API)[0]
    api = service_id(mesh, API)
    own_key = str(PrivateKey.generate().public())
    records = manager.records()
    stored = next(key for key in records if key.startswith(peer_key(api, TaskId(""))))
    peer = hold.signatures.verify(PeerRecord, stored, records[stored]).record
    policy = hold.signatures.verify(PolicyRecord, policy_key(api), records[policy_key(api)]).record
    wanted = {
        "to write another node's claim": msgspec.structs.replace(
            claim(mesh, hold, victim, API, node=other), task=TaskId("thief")
        ),
        "to write a peer": msgspec.structs.replace(peer, task=TaskId("thief"), public_key=own_key),
        "to give a peer its own key": msgspec.structs.replace(peer, public_key=own_key),
        "to switch a policy off": msgspec.structs.replace(policy, mode=Mode.OFF),
    }
    for what, record in wanted.items():
        key, value = key_of(record), hold.signatures.sign(record)
        was_there = key in records
        said = hold.refused("put", key, value)
        ledger.note(WHO, what, f"etcd: {said}", "etcd's answer")
        ((status, _, _),) = hold.do(("nested put", key, value))
        if status != "OK":
            ledger.note(WHO, f"{what}, by a nested transaction", f"etcd: {status}", "etcd's answer")
            continue
        trace = "HW320, record.refused"
        if "claims/" in key:
            # Often before the controller has seen it.
            wait_for("the end of it, by that node's own agent", lambda key=key: not manager.get(key), 30)
            trace = "none where the node's agent is faster"
        else:
            wait_for(f"a word about {key}", lambda key=key: key in logs(mesh, "controller"), 30)
            wait_for(
                "the end of it", lambda r=record, k=key, w=was_there: manager.is_mended(type(r), k, was_there=w), 30
            )
        assert held(mesh) == before, what
        ledger.note(WHO, f"{what}, by a nested transaction (CVE-2026-33343)", "not believed: a worker signed it", trace)
    mesh.wait_ready(60)
    assert held(mesh) == before


def test_it_cannot_claim_what_is_not_true(
    mesh: Deployed, hold: Foothold, manager: Foothold, mules: dict[str, Task], ledger: Ledger
) -> None:
    """Below its own id it writes what it likes; admission asks Swarm, and each lie is shown with its reason."""
    before = held(mesh)
    elsewhere = next(task for name in (API, WEB, DB) for task in mesh.tasks(name) if task.node != hold.name)
    peers = {key: value for key, value in manager.records().items() if "/peers/" in key}
    taken = next(hold.signatures.verify(PeerRecord, key, value).record for key, value in peers.items()
                 if "mule" not in key and not key.endswith(mules["mule"].task))  # fmt: skip
    mule, stray = mules["mule"], mules["stray"]
    own = next(hold.signatures.verify(PeerRecord, k, v).record for k, v in peers.items() if k.endswith(mule.task))
    neighbour = IPv4Address(str(mesh.lab.nodes[1].address))
    address = IPv4Address(str(mesh.lab.node(hold.name).address))
    nowhere = Endpoint(address=IPv4Address("10.77.0.99"), port=51999)
    lies: dict[str, tuple[Task, str, dict[str, object], str]] = {
        "to use a port outside of its range": (
            mule, "mule", {"endpoint": Endpoint(address=address, port=2379)}, "is outside",
        ),
        "to claim another node's task": (elsewhere, elsewhere.service, {}, "the task runs on node"),
        "to claim a task of a service that it does not run": (stray, API, {}, "the task belongs to service"),
        "to claim a task outside of the mesh": (stray, "stray", {}, "its service is not in the mesh"),
        "to point an endpoint at another node": (
            mule, "mule", {"endpoint": Endpoint(address=neighbour, port=51999)}, "is the address of node",
        ),
        "to point an endpoint at nobody": (mule, "mule", {"endpoint": nowhere}, "is no address of node"),
        "to reuse another task's key": (
            mule, "mule", {"public_key": taken.public_key}, "its public key belongs to task",
        ),
        "to claim with a key of low order": (mule, "mule", {"public_key": LOW_ORDER}, "low-order point"),
        "to bring an earlier key back": (
            mule, "mule", {"epoch": own.epoch}, "an earlier key does not come back",
        ),
    }  # fmt: skip
    # Its agent would correct what is written for the mule within milliseconds.
    mesh.lab.docker(hold.name, "pause", agent(mesh, hold.name).container)
    try:
        for what, (task, service, other, reason) in lies.items():
            record = claim(mesh, hold, task, service, **other)
            hold.done("put", key_of(record), hold.signatures.sign(record))
            said = refusal_of(mesh, task.task, hold.node, reason)
            assert not any(key.endswith(task.task) and _has(hold, key, value, record.public_key)
                           for key, value in manager.records().items() if "/peers/" in key), what  # fmt: skip
            ledger.note(WHO, what, said, "hivewire claims --refused, claim.refused, metrics")
            hold.done("delete", key_of(record))
    finally:
        mesh.lab.docker(hold.name, "unpause", agent(mesh, hold.name).container)
    metrics = mesh.exec(mesh.tasks("hivewire_controller")[0], "python3", "-c", _METRICS)
    assert 'hivewire_refused_claims{reason="endpoint"}' in metrics
    wait_for("the mule's own peer", lambda: any(k.endswith(mule.task) for k in manager.records() if "/peers/" in k), 60)
    mesh.wait_ready(90)
    assert held(mesh) == before
    assert bugs(mesh) == []


_METRICS = "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:9480/metrics').read().decode())"


def _has(hold: Foothold, key: str, value: bytes, public_key: str) -> bool:
    return hold.believes(key, value) and hold.signatures.verify(PeerRecord, key, value).record.public_key == public_key


def test_an_ended_task_stays_out(
    mesh: Deployed, hold: Foothold, manager: Foothold, mules: dict[str, Task], ledger: Ledger
) -> None:
    """After its task's end the old claim, and a new one, are no peer; both stand there as of a task that is over."""
    mule = mules["mule"]
    key = claim_key(hold.node, TaskId(mule.task))
    old = hold.get(key)
    assert old
    mesh.lab.docker(hold.name, "kill", mule.container)
    wait_for("another mule", lambda: [task for task in mesh.tasks("mule") if task != mule], 60)
    wait_for("the claim's end", lambda: not hold.get(key), 30)
    before = held(mesh)
    for what, value in (
        ("to replay a claim after its task's end", old),
        ("to claim for a task that is over", hold.signatures.sign(claim(mesh, hold, mule, "mule"))),
    ):
        hold.done("put", key, value)
        time.sleep(1)  # longer than a claim takes to be judged: what must not come cannot be waited for
        assert not [k for k in manager.records() if "/peers/" in k and k.endswith(mule.task)], what
        ledger.note(WHO, what, "Swarm does not run the task: no peer", "hivewire claims (waiting), or record.refused")
    assert held(mesh) == before
    hold.done("delete", key)


def test_a_flood_of_claims_holds_nobody_up(mesh: Deployed, hold: Foothold, manager: Foothold, ledger: Ledger) -> None:
    """While it writes thousands of claims, requests go on, and a task of another node still becomes a peer."""
    record = ClaimRecord(
        task=TaskId("flood"), service=ServiceId("x"), node=hold.node, container=ContainerId("c"),
        public_key=str(PrivateKey.generate().public()), epoch=1, serving=True,
        endpoint=Endpoint(address=IPv4Address("10.77.0.3"), port=51999),
    )  # fmt: skip
    victim = next(task for task in mesh.tasks(API) if task.node != hold.name)
    prefix = f"{CLAIMS}{hold.node}/flood"
    # Of real claims, each signed for its own key.
    calls = []
    for number in range(200):
        one = msgspec.structs.replace(record, task=TaskId(f"flood-signed-{number}"))
        calls.append(("put", key_of(one), hold.signatures.sign(one)))
    with steady_requests(mesh, mesh.tasks(WEB)[0]) as wrong:
        said = hold.done("flood", prefix, hold.signatures.sign(record), FLOOD)
        assert all(status == "OK" for status, _, _ in hold.do(*calls))
        asked = time.monotonic()
        mesh.lab.docker(victim.node, "kill", victim.container)
        wait_for("a new task", lambda: len(mesh.tasks(API)) == 3 and victim not in mesh.tasks(API), 60)
        started_s = time.monotonic() - asked
        wait_for("its peers", lambda: all_peers_right(mesh), 60)
        ledger.figures["new task while 3,200 claims of a flood stand, from its start to all its peers"] = (
            f"{time.monotonic() - asked - started_s:.1f} s"
        )
    # The victim itself was killed: what it had answered may have failed; nothing else.
    assert len(wrong) <= 3, wrong
    assert bugs(mesh) == []
    hold.done("delete below", f"{CLAIMS}{hold.node}/flood")
    mesh.wait_ready(120)
    ledger.note(WHO, f"to flood the controller with {FLOOD + 200} claims ({said})",
                "judged together and later than others'; a listing instead of a question each",
                "HW320 for those not signed for their key, hivewire claims")  # fmt: skip


def test_it_reads_nothing_of_others(mesh: Deployed, hold: Foothold, ledger: Ledger) -> None:
    """Claims of other nodes, and who leads: etcd refuses, or gives away by its known hole what is no secret."""
    ((status, detail, _),) = hold.do(("try", "/hivewire/v1/leader"))
    assert status == "PERMISSION_DENIED", detail
    ledger.note(WHO, "to read who leads", f"etcd: {detail}", "etcd's answer")
