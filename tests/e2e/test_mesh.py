"""The main job on a real Swarm: labels become a WireGuard mesh between tasks, and what the mesh promises holds."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import docker
import pytest
from lab.errors import LabError
from lab.images import Images
from lab.patience import patient
from proof import claims
from proof.claims import API, DB, WEB
from proof.deployed import STACK, Deployed, Task, wait_for

from tests.contract import test_swarm
from tests.unit.controller.test_labels_bad import BAD_LABELS, BadLabel

pytestmark = pytest.mark.e2e


@contextmanager
def steady_requests(mesh: Deployed, web: Task) -> Iterator[list[str]]:
    """Ask web all the time while the block runs; the list holds what went wrong."""
    stop, wrong, asked = threading.Event(), [], []

    def ask() -> None:
        while not stop.is_set():
            report = mesh.ask_web(web)
            asked.append(report)
            if report.get("status") != 200:
                wrong.append(json.dumps(report))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield wrong
    finally:
        stop.set()
        thread.join()
    assert len(asked) > 5, "too few requests for a verdict"


def all_peers_right(mesh: Deployed) -> bool:
    try:
        for service in (WEB, API, DB):
            for task in mesh.tasks(service):
                claims.peers_of(mesh, task)
    except (claims.Disproved, LabError, ValueError):
        return False
    return True


def interface_ids(mesh: Deployed) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Interface index and peers of every meshed task, by task name."""
    found = {}
    for service in (WEB, API, DB):
        for task in mesh.tasks(service):
            link = json.loads(mesh.in_namespace(task, "ip", "-j", "link", "show", "wg0"))[0]
            found[task.name] = (link["ifindex"], tuple(sorted(mesh.wireguard(task))))
    return found


def test_services_reach_each_other_by_name_over_vips(mesh: Deployed) -> None:
    """Web reaches every task of api by the VIP, api reaches db, and each sees the client task's own address."""
    claims.chain_answers(mesh)


def test_nothing_crosses_the_underlay_in_clear(mesh: Deployed) -> None:
    """A wiretap sees WireGuard, but neither the marker nor VXLAN frames between linked tasks."""
    claims.nothing_in_clear(mesh)


def test_wg_shows_the_expected_peers_with_recent_handshakes(mesh: Deployed) -> None:
    """Every task has exactly the peers that its links call for, and traffic makes handshakes with them."""
    claims.chain_answers(mesh)
    for service in (WEB, API, DB):
        for task in mesh.tasks(service):
            claims.peers_of(mesh, task)
            claims.handshakes_are_recent(mesh, task)


def test_a_task_without_a_link_is_shut_out(mesh: Deployed) -> None:
    """Spy shares the overlay network, and reaches neither names nor VIPs nor addresses of meshed tasks."""
    claims.spy_is_shut_out(mesh)


def test_a_label_opens_and_closes_a_link_without_restarts(mesh: Deployed) -> None:
    """Adding a label opens a link, removing it closes it, and every container stays the same."""
    print(claims.link_opens_and_closes(mesh))


def test_scaling_is_followed_everywhere(mesh: Deployed) -> None:
    """From 2 to 6 tasks and back, peers and VIP maps of all other tasks follow."""
    for replicas in (2, 6, 2, 3):
        mesh.scale(API, replicas)
        wait_for(f"peers of {replicas} api tasks", lambda: all_peers_right(mesh), 60)
        claims.chain_answers(mesh)


def test_a_rolling_update_keeps_web_answering(mesh: Deployed) -> None:
    """While all tasks of api are replaced one by one, no request of web fails."""
    before = {task.container for task in mesh.tasks(API)}
    with steady_requests(mesh, mesh.tasks(WEB)[0]) as wrong:
        mesh.update(API, "--force")
        wait_for("the update's end", lambda: update_state(mesh, API) == "completed", 120)
    assert wrong == []
    assert before.isdisjoint(task.container for task in mesh.tasks(API))
    wait_for("peers after the update", lambda: all_peers_right(mesh), 60)


def test_a_task_that_dies_is_replaced_and_its_peer_disappears(mesh: Deployed) -> None:
    """After a task's container is killed its key is gone from every interface, and its replacement is a peer."""
    victim = mesh.tasks(API)[0]
    web = mesh.tasks(WEB)[0]
    addresses = {f"{a}/32" for a in mesh.addresses(victim)}
    key = next(k for k, peer in mesh.wireguard(web).items() if addresses & set(peer["allowed_ips"]))
    mesh.lab.docker(victim.node, "kill", victim.container)
    wait_for("a new task", lambda: len(mesh.tasks(API)) == 3 and victim not in mesh.tasks(API), 60)
    wait_for("peers of the new task", lambda: all_peers_right(mesh), 60)
    for service in (WEB, API, DB):
        assert all(key not in mesh.wireguard(task) for task in mesh.tasks(service))
    claims.chain_answers(mesh)


def test_a_killed_agent_comes_back_and_adopts_its_interfaces(mesh: Deployed) -> None:
    """After kill -9 of an agent interfaces and keys are the ones from before, and no request failed meanwhile."""
    web = mesh.tasks(WEB)[0]
    wait_for("all peers", lambda: all_peers_right(mesh), 60)
    before = interface_ids(mesh)
    agent = next(t for t in mesh.tasks(f"{STACK}_agent") if t.node == web.node)
    with steady_requests(mesh, web) as wrong:
        mesh.lab.docker(agent.node, "kill", "--signal", "KILL", agent.container)
        wait_for("a new agent", lambda: _new_task_on(mesh, agent), 60)
        mesh.wait_ready(90)
    assert wrong == []
    assert interface_ids(mesh) == before
    mesh.scale(API, 4)  # the new agent works
    wait_for("peers of a task more", lambda: all_peers_right(mesh), 60)
    mesh.scale(API, 3)
    wait_for("peers of a task less", lambda: all_peers_right(mesh), 60)


def test_links_survive_the_loss_of_controller_and_store(mesh: Deployed) -> None:
    """With controller and etcd gone, and etcd's data wiped, links go on; the store fills itself again."""
    web = mesh.tasks(WEB)[0]
    before = interface_ids(mesh)
    with steady_requests(mesh, web) as wrong:
        mesh.docker("service", "scale", "--detach", f"{STACK}_etcd=0", f"{STACK}_controller=0")
        wait_for("no etcd", lambda: not mesh.tasks(f"{STACK}_etcd"), 60)
        wait_for("the wiped volume", lambda: _remove_volume(mesh, f"{STACK}_etcd"), 30)
        mesh.docker("service", "scale", "--detach", f"{STACK}_etcd=1", f"{STACK}_controller=1")
        wait_for("a controller", lambda: mesh.tasks(f"{STACK}_controller"), 60)
        mesh.wait_ready(120)
    assert wrong == []
    assert interface_ids(mesh) == before
    assert all_peers_right(mesh)


def test_the_api_asks_for_its_token(mesh: Deployed) -> None:
    """Without the token every answer is 401; the probes and the CLI in the container work."""
    controller = mesh.tasks(f"{STACK}_controller")[0]

    def status(path: str) -> int:
        code = (
            "import sys, urllib.request, urllib.error\n"
            "try: print(urllib.request.urlopen('http://127.0.0.1:9480' + sys.argv[1], timeout=5).status)\n"
            "except urllib.error.HTTPError as e: print(e.code)"
        )
        return int(mesh.exec(controller, "python3", "-c", code, path))

    assert status("/livez") == 200
    assert status("/readyz") == 200
    for path in ("status", "services", "links", "nodes", "findings"):
        assert status(f"/api/v1/{path}") == 401
    assert mesh.ask("status")


def test_bad_labels_become_findings_and_touch_nobody_else(mesh: Deployed) -> None:
    """Every case of a bad label shows its finding with service, label, problem and remedy; others keep working."""
    links = mesh.ask("link", "ls")
    names = [f"shop{number}_web" for number, _ in enumerate(BAD_LABELS)]
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda pair: _create_bad(mesh, *pair), zip(names, BAD_LABELS, strict=True)))
        found = wait_for("a finding for each", lambda: _findings_for(mesh, names), 60, 1.0)
    finally:
        mesh.docker("service", "rm", *names)
    for number, (name, case) in enumerate(zip(names, BAD_LABELS, strict=True)):
        told = {(f["code"], f["label"], f["message"], f["remedy"]) for f in found if f["subject"] == name}
        texts = (text.replace("shop", f"shop{number}") for text in (case.message, case.remedy))
        assert (case.code, case.label, *texts) in told, case.what
    assert [link["source"] for link in mesh.ask("link", "ls")["items"]] == [link["source"] for link in links["items"]]
    claims.chain_answers(mesh)


def test_the_swarm_adapter_keeps_its_contract_on_this_engine(mesh: Deployed) -> None:
    """The suite that keeps the fake Swarm honest passes on the real one."""
    env = os.environ | {
        test_swarm.HOST_VARIABLE: f"unix://{mesh.lab.nodes[0].socket}",
        test_swarm.IMAGE_VARIABLE: Images().demo,
    }
    command = [sys.executable, "-m", "pytest", "-q", "-k", "real", str(Path(test_swarm.__file__))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=patient(280), check=False)
    print(done.stdout[-3000:])
    assert done.returncode == 0


def _create_bad(mesh: Deployed, name: str, case: BadLabel) -> None:
    """Through the API, which takes what the command line refuses to write."""
    stack = name.split("_")[0]
    labels = {"com.docker.stack.namespace": stack}
    bad = {case.label: case.value.replace("shop", stack)}
    container = {"Image": Images().demo, "Labels": bad if case.is_on_container else {}}
    engine = docker.APIClient(f"unix://{mesh.lab.nodes[0].socket}", version="auto")
    try:
        engine.create_service(
            {"ContainerSpec": container, "Networks": [{"Target": engine.inspect_network("demo_app")["Id"]}]},
            name=name,
            labels=labels if case.is_on_container else labels | bad,
            mode={"Replicated": {"Replicas": 0}},
        )
    finally:
        engine.close()


def _findings_for(mesh: Deployed, names: list[str]) -> list[dict[str, str]] | None:
    found: list[dict[str, str]] = mesh.ask("findings")["items"]
    return found if {f["subject"] for f in found} >= set(names) else None


def update_state(mesh: Deployed, service: str) -> str:
    return mesh.docker("service", "inspect", "-f", "{{.UpdateStatus.State}}", service).strip()


def _new_task_on(mesh: Deployed, old: Task) -> Task | None:
    return next((t for t in mesh.tasks(old.service) if t.node == old.node and t.container != old.container), None)


def _remove_volume(mesh: Deployed, name: str) -> bool:
    """The engine refuses while a container still holds it, also an ended one."""
    ended = mesh.docker("ps", "-aq", "--filter", f"volume={name}", "--filter", "status=exited").split()
    for container in ended:
        mesh.lab.docker(mesh.manager, "rm", container, check=False)
    return mesh.lab.docker(mesh.manager, "volume", "rm", name, check=False).returncode == 0
