"""What a node's own credentials may do in etcd, on a real Swarm: a worker its own records, a manager everything."""

import json
import time

import pytest
from proof.claims import WEB
from proof.deployed import STACK, Deployed, Task, wait_for

pytestmark = pytest.mark.e2e

ROOT = "/hivewire/v1/"
CERTIFICATES = "/var/lib/docker/swarm/certificates"


def node_id(mesh: Deployed, name: str) -> str:
    return mesh.docker("node", "inspect", "-f", "{{.ID}}", name).strip()


def agent(mesh: Deployed, node: str) -> Task:
    return next(task for task in mesh.tasks(f"{STACK}_agent") if task.node == node)


def worker(mesh: Deployed) -> str:
    """The last node: no other test's demo depends on its coming back."""
    return mesh.lab.nodes[-1].name


def etcdctl(mesh: Deployed, node: str, *arguments: str) -> str:
    """What etcdctl says with a node's certificate, from the agent's container there; errors included."""
    files = f"--cert={CERTIFICATES}/swarm-node.crt --key={CERTIFICATES}/swarm-node.key"
    etcd = next(task for task in mesh.tasks(f"{STACK}_etcd"))
    endpoint = f"--endpoints=https://{mesh.lab.node(etcd.node).address}:2379"
    # The server's certificate names no address; a name that leads there is what gRPC's override is to Hivewire.
    command = (
        f"ETCDCTL_API=3 etcdctl --command-timeout=5s --insecure-skip-tls-verify {endpoint} {files} "
        f"--cacert={CERTIFICATES}/swarm-root-ca.crt"
    )
    line = f"{command} {' '.join(arguments)} 2>&1 || true"
    return mesh.exec(agent(mesh, node), "sh", "-c", line)


def may(mesh: Deployed, node: str, *arguments: str) -> bool:
    said = etcdctl(mesh, node, *arguments)
    if "permission denied" in said or "user name not found" in said:
        return False
    assert "rror" not in said, said
    return True


def test_a_worker_writes_its_own_records_alone(mesh: Deployed) -> None:
    """With a real worker's certificate: own claim yes; another node's, and all that managers write, no."""
    node, other = worker(mesh), mesh.lab.nodes[1].name
    own, theirs = node_id(mesh, node), node_id(mesh, other)
    key = f"{ROOT}status/{own}/no-task"
    assert may(mesh, node, "put", key, "1")
    assert may(mesh, node, "del", key)
    assert may(mesh, node, "get", "--prefix", f"{ROOT}claims/{own}/")
    for readable in ("mesh", "policies/", "peers/", "guards/", "quarantines/"):
        assert may(mesh, node, "get", "--prefix", "--keys-only", ROOT + readable), readable
    for refused in (f"claims/{theirs}/t", f"nodes/{theirs}", f"nodes/{own}x", "policies/s", "peers/s/t", "guards/n",
                    "quarantines/node/x", "mesh", "leader"):  # fmt: skip
        assert not may(mesh, node, "put", ROOT + refused, "1"), refused
        assert not may(mesh, node, "del", ROOT + refused), refused
    for command in (("auth", "disable"), ("user", "list"), ("user", "add", "x", "--no-password"),
                    ("user", "grant-role", own, "root"), ("role", "list"), ("snapshot", "save", "/dev/null"),
                    ("member", "add", "x", "--peer-urls=https://127.0.0.1:1")):  # fmt: skip
        assert not may(mesh, node, *command), command


def test_a_manager_may(mesh: Deployed) -> None:
    """With a manager's certificate everything is allowed: users are the Swarm's nodes and root."""
    users = set(etcdctl(mesh, mesh.manager, "user", "list").split())
    assert users == {"root", *(node_id(mesh, node.name) for node in mesh.lab.nodes)}
    assert may(mesh, mesh.manager, "put", f"{ROOT}status/nobody/nothing", "1")
    assert may(mesh, mesh.manager, "del", f"{ROOT}status/nobody/nothing")


def test_promotion_and_demotion_are_followed(mesh: Deployed) -> None:
    """A promoted node may everything, a demoted one soon no more."""
    node = mesh.lab.nodes[1].name
    key = f"{ROOT}status/nobody/nothing"
    mesh.docker("node", "promote", node)
    try:
        wait_for("the manager's access", lambda: may(mesh, node, "put", key, "1"), 15)
    finally:
        # Swarm says that it is a manager before it is one, and takes the role back only then.
        reachable = ("node", "inspect", "-f", "{{with .ManagerStatus}}{{.Reachability}}{{end}}", node)
        wait_for("the second manager", lambda: mesh.docker(*reachable).strip() == "reachable", 30)
        # A manager answers within a time of Swarm's own, which a very slow machine exceeds.
        demote = ("node", "demote", node)
        wait_for("the demotion", lambda: mesh.lab.docker(mesh.manager, *demote, check=False).returncode == 0, 60)
    wait_for("a worker's access", lambda: not may(mesh, node, "put", key, "1"), 15)
    assert may(mesh, mesh.manager, "del", key)
    mesh.wait_ready(90)


def test_a_node_that_was_removed_loses_access(mesh: Deployed) -> None:
    """Within 5 s of `docker node rm` the node's certificate opens nothing, and the mesh of the others goes on."""
    node = worker(mesh)
    own = node_id(mesh, node)
    kept = json.loads(mesh.lab.exec(node, "sh", "-c", _COPY_OF_CREDENTIALS).stdout)
    try:
        mesh.lab.docker(node, "swarm", "leave", "--force")
        wait_for("the node down", lambda: "down" in mesh.docker("node", "inspect", "-f", "{{.Status.State}}", node), 60)
        mesh.docker("node", "rm", "--force", own)
        removed = time.monotonic()
        etcd = next(task for task in mesh.tasks(f"{STACK}_etcd"))
        ask = (
            f"ETCDCTL_API=3 etcdctl --command-timeout=5s --insecure-skip-tls-verify "
            f"--endpoints=https://{mesh.lab.node(etcd.node).address}:2379 --cert={kept['cert']} --key={kept['key']} "
            f"put {ROOT}status/{own}/x 1 2>&1 || true"
        )
        wait_for("no access", lambda: "OK" not in mesh.lab.exec(node, "sh", "-c", ask).stdout, 5)
        said = mesh.lab.exec(node, "sh", "-c", ask).stdout
        print(f"without access {time.monotonic() - removed:.1f} s after the removal: {said.strip()[-80:]}")
        assert "permission denied" in said
        assert own not in etcdctl(mesh, mesh.manager, "user", "list")
        assert own not in etcdctl(mesh, mesh.manager, "role", "list")
        mesh.wait_ready(120)
        for web in mesh.tasks(WEB):
            assert mesh.ask_web(web).get("status") == 200
    finally:  # the other tests' lab is whole again, with a node that Swarm and etcd have never seen
        token = mesh.docker("swarm", "join-token", "-q", "worker").strip()
        address = mesh.lab.node(mesh.manager).address
        mesh.lab.docker(node, "swarm", "join", "--advertise-addr", str(mesh.lab.node(node).address),
                        "--token", token, f"{address}:2377", check=False)  # fmt: skip
    wait_for("the new node's agent", lambda: any(it.node == node for it in mesh.tasks(f"{STACK}_agent")), 60)
    mesh.wait_ready(120)
    assert may(mesh, node, "put", f"{ROOT}status/{node_id(mesh, node)}/no-task", "1")
    assert may(mesh, node, "del", f"{ROOT}status/{node_id(mesh, node)}/no-task")


# The engine deletes the node's certificate when it leaves; a thief's copy stays. The folder goes with the lab.
_COPY_OF_CREDENTIALS = f"""
set -e; umask 077; d=$(mktemp -d)
cp {CERTIFICATES}/swarm-node.crt {CERTIFICATES}/swarm-node.key $d
printf '{{"cert": "%s", "key": "%s"}}' $d/swarm-node.crt $d/swarm-node.key
"""
