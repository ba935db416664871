"""Why a connection passes or not, and shutting somebody out, on a real Swarm: what is said is what happens."""

import json
import shlex
import subprocess
import time
from collections.abc import Mapping
from typing import Any

import pytest
from proof import claims
from proof.claims import API, DB, SPY, WEB
from proof.deployed import STACK, Deployed, Task, wait_for

pytestmark = pytest.mark.e2e

BEATS = "/tmp/beats"
PINGING = f"""
import socket, time
channel = socket.create_connection(("db", 6379), timeout=600)
with open("{BEATS}", "w", buffering=1) as beats:
    while True:
        channel.sendall(b"PING\\r\\n")
        if not channel.recv(100):
            break
        beats.write(f"{{time.time()}}\\n")
        time.sleep(0.02)
"""
"""One connection to db, asked again and again: a line per answer."""
FRAMES = """
import socket, struct, sys
link, own, other = sys.argv[1], *map(socket.inet_aton, sys.argv[2:])
mac = lambda address: bytes([2, 0x42]) + address
udp = struct.pack("!HHHH", 7, 7, 12, 0) + b"mark"
ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0) + own + other
words = sum(struct.unpack("!10H", ip))
while words >> 16:
    words = (words >> 16) + (words & 0xFFFF)
ip = ip[:10] + struct.pack("!H", ~words & 0xFFFF) + ip[12:]
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
    raw.bind((link, 0))
    for _ in range(3):
        raw.send(mac(other) + mac(own) + bytes([8, 0]) + ip + udp)
"""
"""Sends frames past the rules of the task's own namespace, which CAP_NET_RAW allows."""


@pytest.fixture(autouse=True)
def _same_containers(mesh: Deployed) -> Any:
    """Nothing here restarts a container of the demo."""

    def containers() -> set[str]:
        return {task.container for service in (WEB, API, DB, SPY) for task in mesh.tasks(service)}

    before = containers()
    yield
    assert containers() == before


def hivewire(mesh: Deployed, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in the controller's container, with its exit code."""
    controller = mesh.tasks(f"{STACK}_controller")[0]
    command = ("exec", controller.container, "hivewire", *arguments)
    done: subprocess.CompletedProcess[str] = mesh.lab.docker(controller.node, *command, check=False)
    return done


def why(mesh: Deployed, source: str, destination: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(hivewire(mesh, "-o", "json", "why", source, destination).stdout)
    return answer


def start_pinging(mesh: Deployed, task: Task) -> None:
    mesh.exec(task, "rm", "-f", BEATS)
    mesh.lab.docker(task.node, "exec", "-d", task.container, "python3", "-c", PINGING)
    wait_for("a connection that is used", lambda: len(beats(mesh, task)) > 5, 20)


def beats(mesh: Deployed, task: Task) -> list[float]:
    return [float(line) for line in mesh.exec(task, "cat", BEATS, check=False).split()]


def no_further_beat(mesh: Deployed, task: Task) -> float:
    """The time of the last answer, after a while in which there was none."""
    before = beats(mesh, task)
    time.sleep(2)
    assert len(beats(mesh, task)) == len(before), "the connection still carries something"
    return before[-1]


def reached(mesh: Deployed, task: Task, host: str, port: int) -> bool:
    return bool(mesh.probe(task, "tcp", host, str(port), timeout_s=1)["outcome"] == "reached")


def test_why_says_what_happens_and_how_to_change_it(mesh: Deployed) -> None:
    """Allowed, denied with the command that allows it, allowed and reached; revoked, the open connection ends too."""
    mesh.wait_ready(60)
    claims.chain_answers(mesh)
    allowed = hivewire(mesh, "why", WEB, f"{API}:8080")
    print(allowed.stdout)
    assert (allowed.returncode, allowed.stdout.split()[0]) == (0, "ALLOWED")
    denied = hivewire(mesh, "why", WEB, f"{DB}:6379")
    print(denied.stdout)
    assert (denied.returncode, denied.stdout.split()[0]) == (1, "DENIED")
    web = mesh.tasks(WEB)[0]
    assert not reached(mesh, web, "db", 6379)

    fix = why(mesh, WEB, f"{DB}:6379")["fix"]
    assert fix == 'docker service update --label-add hivewire.links="api:8080,db:6379" demo_web'
    words = shlex.split(fix)
    try:
        asked = time.time()
        mesh.docker(*words[1:3], "--detach", *words[3:])
        wait_for("the link", lambda: reached(mesh, web, "db", 6379), 30, 0.05)
        print(f"open after {time.time() - asked:.2f} s")
        assert wait_for("the verdict", lambda: why(mesh, WEB, f"{DB}:6379")["allowed"], 30)
        start_pinging(mesh, web)
        asked = time.time()
    finally:
        mesh.update(WEB, "--label-add", "hivewire.links=api:8080")
    wait_for("the verdict", lambda: why(mesh, WEB, f"{DB}:6379")["verdict"] == "denied", 30)
    print(f"an open connection ended {no_further_beat(mesh, web) - asked:.2f} s after the label was taken away")
    claims.chain_answers(mesh)


def test_unknown_names_are_wrong_use(mesh: Deployed) -> None:
    """A name that nothing has ends with 2, and with the name that was perhaps meant."""
    done = hivewire(mesh, "why", "demo_wep", API)
    assert (done.returncode, 'did you mean "demo_web"?' in done.stderr) == (2, True)


def test_what_a_silent_agent_holds_is_unknown(mesh: Deployed) -> None:
    """With the agent of a node stopped, why names the node and does not confirm."""
    web = mesh.tasks(WEB)[0]
    agent = next(t for t in mesh.tasks(f"{STACK}_agent") if t.node == web.node)
    mesh.lab.docker(agent.node, "pause", agent.container)
    try:
        done = hivewire(mesh, "why", _short(web), f"{API}:8080")
        print(done.stdout)
        assert "not confirmed: the agent on" in done.stdout
    finally:
        mesh.lab.docker(agent.node, "unpause", agent.container)


def test_a_dead_device_is_broken(mesh: Deployed) -> None:
    """When a task's device dies, why says that it is broken and where, until the agent has made another one."""
    web = mesh.tasks(WEB)[0]
    alias = json.loads(mesh.in_namespace(web, "ip", "-j", "link", "show", "wg0"))[0].get("ifalias", "")
    if ":" not in alias:
        pytest.skip("the kernel's own device does not die")
    host = next(t for t in mesh.tasks(f"{STACK}_userspace") if t.node == web.node)
    code = (
        "import os, pathlib, sys\n"
        "for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):\n"
        "    words = path.read_bytes().split(bytes(1))\n"
        "    if sys.argv[1].encode() in words and b'wireguard-go' in words[0]: os.kill(int(path.parent.name), 9)\n"
    )
    mesh.exec(host, "python3", "-c", code, alias.partition(":")[2])
    done = hivewire(mesh, "why", WEB, f"{API}:8080")
    print(done.stdout)
    assert (done.returncode, done.stdout.split()[0]) == (1, "BROKEN")
    assert _short(web) in done.stdout
    agent = next(t for t in mesh.tasks(f"{STACK}_agent") if t.node == web.node)
    mesh.lab.docker(agent.node, "kill", "--signal", "KILL", agent.container)  # a new one looks at every task at once
    wait_for("another device", lambda: _is_confirmed(why(mesh, WEB, f"{API}:8080")), 90, 1.0)
    mesh.wait_ready(60)
    claims.chain_answers(mesh)


def test_quarantine_closes_at_once_and_release_restores(mesh: Deployed) -> None:
    """A quarantined service reaches nobody and nobody reaches it, over open connections neither; nothing undoes that
    but its release.
    """
    mesh.wait_ready(60)
    web, api = mesh.tasks(WEB)[0], mesh.tasks(API)[0]
    claims.chain_answers(mesh)
    start_pinging(mesh, api)
    asked = time.time()
    done = hivewire(mesh, "quarantine", "service", API, "--reason", "behaves oddly")
    print(done.stdout, done.stderr)
    try:
        assert done.returncode == 0
        assert done.stdout.splitlines()[-1].startswith("closed on 3 nodes in ")
        print(f"the open connection ended {no_further_beat(mesh, api) - asked:.2f} s after the command was begun")
        assert not reached(mesh, web, "api", 8080)
        assert not reached(mesh, api, "db", 6379)
        for address in mesh.addresses(api):
            assert not reached(mesh, web, address, 8080)
        answer = why(mesh, WEB, f"{API}:8080")
        assert (answer["verdict"], answer["step"]) == ("denied", "quarantine")
        print(hivewire(mesh, "service", "ls").stdout, hivewire(mesh, "quarantine", "ls").stdout)
        assert hivewire(mesh, "check").returncode == 0

        for change in (("--label-add", "hivewire.enable=false"), ("--label-rm", "hivewire.enable")):
            mesh.update(API, *change)
            time.sleep(2)
            assert not reached(mesh, web, "api", 8080)
            assert not reached(mesh, api, "db", 6379)
        for part in ("controller", "etcd"):
            task = mesh.tasks(f"{STACK}_{part}")[0]
            mesh.lab.docker(task.node, "kill", task.container)
            wait_for(f"another {part}", lambda part=part, task=task: _replaced(mesh, part, task), 60)
        wait_for("the list", lambda: API in hivewire(mesh, "quarantine", "ls").stdout, 60)
        assert not reached(mesh, web, "api", 8080)
        no_further_beat(mesh, api)
        wait_for("a leader", lambda: hivewire(mesh, "check").returncode == 0, 60)
    finally:
        asked = time.time()
        print(hivewire(mesh, "release", "service", API).stdout)
    wait_for("api", lambda: reached(mesh, web, "api", 8080), 60, 0.1)
    print(f"back {time.time() - asked:.2f} s after the command was begun")
    mesh.wait_ready(60)
    claims.chain_answers(mesh)


def test_quarantine_holds_who_makes_its_frames_itself(mesh: Deployed) -> None:
    """What a task sends past its own rules is dropped outside of it, though its service is not enforced."""
    (spy,) = mesh.tasks(SPY)
    (own,), other = mesh.addresses(spy), mesh.addresses(mesh.tasks(DB)[0])[0]
    network = mesh.docker("network", "inspect", "-f", "{{.ID}}", "demo_app").strip()

    def dropped() -> int:
        listing = "nft -j list set bridge hivewire denied_no_link_out"
        look = f"for f in /var/run/docker/netns/*-{network[:10]}; do nsenter --net=$f {listing}; done"
        sets = [
            it["set"] for it in json.loads(mesh.lab.exec(spy.node, "sh", "-c", look).stdout)["nftables"] if "set" in it
        ]
        elements = [each["elem"] for found in sets for each in found.get("elem", ())]
        return sum(int(e["counter"]["packets"]) for e in elements if e["val"]["concat"][0] == own)

    def send() -> None:
        links = json.loads(mesh.in_namespace(spy, "ip", "-j", "address"))
        link = next(it["ifname"] for it in links if own in [a["local"] for a in it["addr_info"]])
        mesh.lab.docker(spy.node, "exec", "-u", "root", spy.container, "python3", "-c", FRAMES, link, own, other)

    before = dropped()
    send()
    assert dropped() == before, "the control: who is neither enforced nor in quarantine is let through"
    done = hivewire(mesh, "quarantine", "service", SPY)
    print(done.stdout, done.stderr)
    try:
        wait_for("the guard", lambda: send() or dropped() > before, 30)
    finally:
        print(hivewire(mesh, "release", "service", SPY).stdout)

    def is_let_through() -> bool:
        count = dropped()
        send()
        return dropped() == count

    wait_for("the guard lets it go", is_let_through, 30)


def test_quarantine_of_one_task_leaves_the_others(mesh: Deployed) -> None:
    """One task is shut out, its neighbours are not."""
    one, other = mesh.tasks(WEB)[:2]
    done = hivewire(mesh, "quarantine", "task", _short(one))
    print(done.stdout, done.stderr)
    try:
        assert done.returncode == 0
        assert not reached(mesh, one, "api", 8080)
        assert reached(mesh, other, "api", 8080)
    finally:
        hivewire(mesh, "release", "task", _short(one))
    wait_for("the task", lambda: reached(mesh, one, "api", 8080), 30)


def test_quarantine_of_a_node_shuts_out_its_tasks(mesh: Deployed) -> None:
    """Nobody on other nodes reaches a task of the node any more, even while its own agent does nothing."""
    victim = mesh.tasks(API)[0]
    agent = next(t for t in mesh.tasks(f"{STACK}_agent") if t.node == victim.node)
    elsewhere = next(t for t in mesh.tasks(WEB) if t.node != victim.node)
    address = mesh.addresses(victim)[0]
    assert reached(mesh, elsewhere, address, 8080)
    mesh.lab.docker(agent.node, "pause", agent.container)
    try:
        done = hivewire(mesh, "quarantine", "node", victim.node, "--wait", "3s")
        print(done.stdout, done.stderr)
        assert (done.returncode, "does not answer" in done.stderr) == (5, True)
        assert not reached(mesh, elsewhere, address, 8080)
    finally:
        mesh.lab.docker(agent.node, "unpause", agent.container)
        hivewire(mesh, "release", "node", victim.node)
    wait_for("the task", lambda: reached(mesh, elsewhere, address, 8080), 30)
    mesh.wait_ready(60)


def _is_confirmed(answer: Mapping[str, Any]) -> bool:
    """Allowed, and by the word of every agent that it concerns: without theirs, labels and records alone say it."""
    return bool(answer["allowed"] and not answer["unknown_nodes"])


def _replaced(mesh: Deployed, part: str, old: Task) -> bool:
    return any(task.container != old.container for task in mesh.tasks(f"{STACK}_{part}"))


def _short(task: Task) -> str:
    """``demo_web.1.abc`` without the task's id."""
    return ".".join(task.name.split(".")[:2])
