"""Who was shut out stays out: a removed node, an ended task, a link that was taken back; through a backup of etcd
that is older than all that, and everything started again upon it.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from lab.errors import LabError
from proof.claims import API, SPY, WEB
from proof.deployed import STACK, Deployed, Task, wait_for

from hivewire.identity import SWARM_CERTIFICATES
from hivewire.records import claim_key, node_key
from tests.attack.foothold import SERVICES, Foothold, agent, logs, node_id, on_worker
from tests.e2e.test_mesh import all_peers_right, update_state

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


def etcd_data(mesh: Deployed, node: str) -> Path:
    return mesh.lab.node(node).data / "volumes" / f"{STACK}_etcd" / "_data"


def stop(mesh: Deployed, *services: str) -> None:
    mesh.docker("service", "scale", "--detach", *(f"{STACK}_{name}=0" for name in services))
    for name in services:
        wait_for(f"no {name}", lambda name=name: not mesh.tasks(f"{STACK}_{name}"), 60)


def start(mesh: Deployed, *services: str) -> None:
    mesh.docker("service", "scale", "--detach", *(f"{STACK}_{name}=1" for name in services))


def keys_of(mesh: Deployed, tasks: list[Task]) -> dict[str, str]:
    """The public key of each task's device, as its peers have it."""
    found = {}
    everywhere = {key: peer for service in SERVICES for task in mesh.tasks(service)
                  for key, peer in mesh.wireguard(task).items()}  # fmt: skip
    for task in tasks:
        addresses = {f"{a}/32" for a in mesh.addresses(task)}
        found[task.name] = next(key for key, peer in everywhere.items() if addresses & set(peer["allowed_ips"]))
    return found


def holders(mesh: Deployed, keys: set[str]) -> Iterator[str]:
    """Tasks that have one of these as a peer."""
    for service in SERVICES:
        for task in mesh.tasks(service):
            try:
                if keys & set(mesh.wireguard(task)):
                    yield task.name
            except (LabError, ValueError, IndexError):  # it is just ending
                continue


def watched(mesh: Deployed, keys: set[str]) -> Callable[[], bool]:
    """Whether any task has one of these keys as a peer; one quick command for each task, all at once."""
    asks = []
    for task in (task for service in SERVICES for task in mesh.tasks(service)):
        alias = json.loads(mesh.in_namespace(task, "ip", "-j", "link", "show", "wg0"))[0].get("ifalias", "")
        if ":" in alias:
            asks.append(partial(mesh.exec, agent(mesh, task.node), "wg", "show", alias.split(":", 1)[1], "peers"))
        else:
            asks.append(partial(mesh.in_namespace, task, "wg", "show", "wg0", "peers"))
    pool = ThreadPoolExecutor(len(asks))

    def ask(call: Callable[[], str]) -> str:
        try:
            return call()
        except LabError:  # it is just ending
            return ""

    return lambda: any(keys & set(said.split()) for said in pool.map(ask, asks))


def reaches_db(mesh: Deployed) -> bool:
    spies = mesh.tasks(SPY)
    return bool(spies) and mesh.probe(spies[0], "tcp", "db", "6379", timeout_s=1.0).get("outcome") == "reached"


def test_revocations_outlive_a_backup_of_etcd(mesh: Deployed, tmp_path: Path) -> None:
    """Remove a node, end a task, take a link back; put an earlier backup in place and start everything again."""
    mesh.update(SPY, "--label-add", "hivewire.links=db:6379")
    wait_for("the link", lambda: reaches_db(mesh), 60)
    mesh.update(API, "--force")  # one task on each node: all agents know all peers, and remember them
    wait_for("the update's end", lambda: update_state(mesh, API) == "completed", 120)
    wait_for("api everywhere", lambda: {t.node for t in mesh.tasks(API)} == {n.name for n in mesh.lab.nodes}, 120)
    mesh.wait_ready(120)
    thief = on_worker(mesh, tmp_path)
    on_node = [task for service in SERVICES for task in mesh.tasks(service) if task.node == thief.name]
    victim = next(task for task in mesh.tasks(API) if task.node != thief.name)
    assert on_node, "no task of the demo runs on the node that is to be removed"
    keys = keys_of(mesh, [*on_node, victim])
    gone = set(keys.values())
    copy = f"d=$(mktemp -d) && cp {SWARM_CERTIFICATES}/* $d && echo $d"
    folder = mesh.lab.exec(thief.name, "sh", "-c", copy).stdout.strip()

    server = mesh.tasks(f"{STACK}_etcd")[0].node
    stop(mesh, "etcd")
    shutil.copytree(etcd_data(mesh, server), tmp_path / "backup")
    start(mesh, "etcd")
    mesh.wait_ready(120)

    # Take the link back, end the task, remove the node.
    mesh.update(SPY, "--label-rm", "hivewire.links")
    wait_for("the link's end", lambda: not reaches_db(mesh), 60)
    mesh.lab.docker(victim.node, "kill", victim.container)
    own = node_id(mesh, thief.name)
    mesh.lab.docker(thief.name, "swarm", "leave", "--force")
    wait_for("the node down", lambda: "down" in mesh.docker("node", "inspect", "-f", "{{.Status.State}}", own), 60)
    still_peers = watched(mesh, gone)
    print(f"peers of the node's tasks just before its removal: {still_peers()}")
    mesh.docker("node", "rm", "--force", own)
    removed = time.monotonic()
    with ThreadPoolExecutor(1) as other:
        access = other.submit(lambda: wait_for("no access", lambda: _first_refusal(thief, folder), 60, 0.01) - removed)
        wait_for("no peer of the node's tasks", lambda: not still_peers(), 60, 0.01)
        peers_s = time.monotonic() - removed
        access_s = access.result()
    assert list(holders(mesh, gone)) == []
    print(f"node removed: no access to etcd after {access_s:.1f} s, no peer of its tasks after {peers_s:.1f} s")
    try:
        mesh.wait_ready(180)

        # The backup in the place of all that, and everything started again.
        stop(mesh, "etcd", "controller")
        data = etcd_data(mesh, server)
        for each in data.iterdir():
            shutil.rmtree(each) if each.is_dir() else each.unlink()
        shutil.copytree(tmp_path / "backup", data, dirs_exist_ok=True)
        for task in mesh.tasks(f"{STACK}_agent"):
            mesh.lab.docker(task.node, "kill", "--signal", "KILL", task.container)
        start(mesh, "etcd", "controller")
        wait_for("agents", lambda: len(mesh.tasks(f"{STACK}_agent")) == len(mesh.lab.nodes) - 1, 90)
        until, looks = time.monotonic() + 45, 0
        while time.monotonic() < until:
            assert list(holders(mesh, gone)) == [], "a peer that was taken away is back"
            assert not reaches_db(mesh), "a link that was taken back is open"
            looks += 1
        print(f"looked {looks} times in 45 s after the backup was in place")
        mesh.wait_ready(180)
        assert not _may_write(thief, folder)
        wait_for("all peers right", lambda: all_peers_right(mesh), 60)
        print("rolled back:", "store.rolled_back" in logs(mesh, "controller"))
    finally:
        _join_again(mesh, thief.name)
    wait_for("the new node's agent", lambda: any(t.node == thief.name for t in mesh.tasks(f"{STACK}_agent")), 90)
    mesh.wait_ready(180)
    again = Foothold(mesh, thief.name, tmp_path / "again")
    assert again.node != own, "it is another node now"
    wait_for("its record", lambda: again.believes(node_key(again.node), again.get(node_key(again.node))), 60)
    assert list(holders(mesh, gone)) == []
    # Its tasks are peers as everybody's.
    mesh.scale(WEB, 5)
    wait_for("peers on the node that joined again", lambda: all_peers_right(mesh), 90)
    assert any(task.node == thief.name for task in mesh.tasks(WEB))
    mesh.scale(WEB, 3)


def _first_refusal(thief: Foothold, folder: str) -> float:
    """When etcd refused, as of the clock that measures; 0: it did not."""
    return 0.0 if _may_write(thief, folder) else time.monotonic()


def _may_write(thief: Foothold, folder: str) -> bool:
    """With the certificate that was copied before the node was removed."""
    try:
        key = claim_key(thief.node, "x")  # type: ignore[arg-type]
        ((status, _, _),) = thief.do(("put", key, b"x"), folder=folder)
    except (LabError, StopIteration):
        return True  # etcd is away, or starting: nothing is known
    return status == "OK"


def _join_again(mesh: Deployed, name: str) -> None:
    token = mesh.docker("swarm", "join-token", "-q", "worker").strip()
    own, manager = mesh.lab.node(name).address, mesh.lab.node(mesh.manager).address
    words = ("swarm", "join", "--advertise-addr", str(own), "--token", token, f"{manager}:2377")
    mesh.lab.docker(name, *words, check=False)
