"""The guard on a real Swarm: enforced services do not talk in clear, from their first instruction to their last."""

import json
import re
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import pytest
from lab.errors import LabError
from lab.images import Images
from lab.node import Node
from lab.patience import FACTOR, patient
from proof import claims
from proof.deployed import STACK, Deployed, Task, wait_for

from tests.e2e.wiretap import Tap, entered

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

STRICT, DEFAULT, PLAIN = "guard_strict", "guard_default", "guard_plain"
GUARDED = (STRICT, DEFAULT)
FIGURES = Path(__file__).resolve().parents[2] / "build" / "fire"

# Its first instruction is to send, bash being quick to start; on SIGTERM it goes on for a second.
LEAK = """
s=$EPOCHREALTIME
for t in "$@"; do echo "$MARK" >/dev/udp/$t/$PORT; done 2>/dev/null
echo "first $NODE $s"
exec python3 -c '
import os, signal, socket, sys, time
mark, port, end = os.environ["MARK"].encode(), int(os.environ["PORT"]), []
signal.signal(15, lambda *_: end.append(time.time() + 1))
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
while not end or time.time() < end[0]:
    for target in sys.argv[1:]:
        tcp = socket.socket()
        tcp.settimeout(0.02)
        try:
            udp.sendto(mark, (target, port))
            tcp.connect((target, port))
            tcp.sendall(mark)
        except OSError:
            pass
        tcp.close()
    time.sleep(float(os.environ["PAUSE"]))
' "$@"
"""

SINK = """
import asyncio, signal, sys
async def hear(reader, writer):
    await reader.read(100)
    writer.close()
async def main():
    for port in range(7770, 7780):
        await asyncio.start_server(hear, "0.0.0.0", port)
        await asyncio.get_running_loop().create_datagram_endpoint(asyncio.DatagramProtocol, ("0.0.0.0", port))
    await asyncio.Event().wait()
signal.signal(15, lambda *_: sys.exit(0))
asyncio.run(main())
"""


@dataclass(frozen=True)
class Sender:
    """A service that sends its mark to the sink of its network, over UDP and TCP."""

    name: str
    network: str
    port: int
    is_enforced: bool = False

    @property
    def mark(self) -> str:
        return f"MARK-{self.name}-{self.port}-"


LEAKS = tuple(Sender(f"{network}_leak", network, 7770 + i, True) for i, network in enumerate(GUARDED))
# Not enforced, on the sink's own node: the control of captures in namespaces before anybody else is on the network.
NEARS = tuple(Sender(f"{network}_near", network, 7773 + i) for i, network in enumerate(GUARDED))
TALKS = tuple(Sender(f"{network}_talk", network, 7775 + i) for i, network in enumerate((STRICT, DEFAULT, PLAIN)))
SENDERS = (*LEAKS, *NEARS, *TALKS)


@dataclass
class Field:
    """Three networks, each with a sink on the first node, and services that send to it."""

    mesh: Deployed
    networks: dict[str, str]
    starts: int = 0
    figures: dict[str, object] = field(default_factory=dict)

    def sink(self, network: str) -> Task:
        return self.mesh.tasks(f"{network}_sink")[0]

    def scale(self, services: tuple[Sender, ...], replicas: int) -> None:
        self.mesh.docker("service", "scale", "--detach", *(f"{s.name}={replicas}" for s in services))
        for service in services:
            wait_for(
                f"{replicas} tasks of {service.name}",
                lambda name=service.name: len(self.mesh.tasks(name)) == replicas,
                120,
            )
            self.starts += replicas if service.is_enforced else 0

    def files(self, node: Node, network: str) -> list[str]:
        """The overlay namespaces of a network on a node."""
        names = self.mesh.lab.exec(node.name, "ls", "/var/run/docker/netns").stdout.split()
        return [n for n in names if re.fullmatch(rf"\d+-{self.networks[network][:10]}", n)]

    def table(self, node: Node, network: str) -> str:
        """The guard on a node, as nft lists it."""
        listed = ""
        for file in self.files(node, network):
            listed += self.inside(node, file, "nft", "list", "table", "bridge", "hivewire")
        return listed

    def closes(self, task: Task, network: str) -> bool:
        """Whether a rule of the guard on the task's node stops its address; what the guard noted is none."""
        rules = re.findall(r"ip saddr (\{[^}]*\}|\S+) goto", self.table(self.mesh.lab.node(task.node), network))
        return set(self.mesh.addresses(task)) <= set(re.findall(r"[0-9.]+", " ".join(rules)))

    def inside(self, node: Node, file: str, *argv: str) -> str:
        return subprocess.run(
            [*entered(node, file), *argv], capture_output=True, text=True, timeout=patient(60), check=False
        ).stdout


@pytest.fixture(scope="module")
def ground(mesh: Deployed) -> Iterator[Field]:
    """Networks, sinks and senders; the enforced ones have no task yet."""
    made = {}
    for network in (STRICT, DEFAULT, PLAIN):
        options = ("--label", "hivewire.guard=strict") if network == STRICT else ()
        made[network] = mesh.docker("network", "create", "--driver", "overlay", *options, network).strip()
        _create(mesh, f"{network}_sink", network, ["python3", "-c", SINK], "--constraint", "node.hostname==n1")
    ground = Field(mesh, made)
    try:
        for network in made:
            wait_for(f"the sink of {network}", lambda n=network: mesh.tasks(f"{n}_sink"), 60)
        for sender in SENDERS:
            labels = ("--label", "hivewire.mode=enforce") if sender.is_enforced else ()
            # The machine is small: what only shows that the captures work need not be quick. Where all is slower the
            # senders are, too: they share processors with the agents, and must not be all that runs.
            pause = patient(0.01 if sender.is_enforced else 0.2)
            env = {"MARK": sender.mark, "PORT": sender.port, "PAUSE": pause, "NODE": "{{.Node.Hostname}}"}
            words = [w for key, value in env.items() for w in ("--env", f"{key}={value}")]
            targets = mesh.addresses(ground.sink(sender.network))
            command = ["bash", "-c", LEAK, "leak", *targets]
            place = ("--constraint", "node.hostname==n1") if sender in NEARS else ("--replicas", "0")
            _create(mesh, sender.name, sender.network, command, *labels, *words, *place)
        for network in GUARDED:
            wait_for(f"the guard of {network}", lambda n=network: ground.table(mesh.lab.nodes[0], n), 60)
        yield ground
    finally:
        print(json.dumps(ground.figures, indent=1))
        names = [f"{n}_sink" for n in made] + [s.name for s in SENDERS]
        mesh.lab.docker(mesh.manager, "service", "rm", *names, check=False)
        for network in made:
            with suppress(LabError):
                wait_for(
                    f"{network} gone",
                    lambda n=network: mesh.lab.docker(mesh.manager, "network", "rm", n, check=False).returncode == 0,
                    30,
                )


@dataclass
class Seen:
    """What the captures of one phase hold, by sender."""

    underlay: dict[str, int]
    overlays: dict[str, int]


@contextmanager
def watched(ground: Field, taps: tuple[tuple[Node, str], ...]) -> Iterator[Seen]:
    """Capture on the underlay and in overlay namespaces; counts are there when the block has ended."""
    seen = Seen({}, {})
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        wire = stack.enter_context(ground.mesh.lab.capture(folder / "wire.pcap"))
        opened = [
            Tap(node, file, folder / f"{node.name}-{network}.pcap")
            for node, network in taps
            for file in ground.files(node, network)
        ]
        try:
            yield seen
        finally:
            for tap in opened:
                tap.stop()
        stack.close()
        for sender in SENDERS:
            # TCP and UDP have the port in the same place. The mark alone would be seen in any other wrapping too.
            inner = f"(udp[39] = 6 or udp[39] = 17) and udp[52:2] = {sender.port}"
            framed = wire.count(f"udp dst port 4789 and {inner}")
            seen.underlay[sender.name] = max(framed, _marks(wire.file, sender))
            seen.overlays[sender.name] = sum(
                max(_frames(tap.write, f"dst port {sender.port}"), _marks(tap.write, sender)) for tap in opened
            )


# Each turn is 50 starts and stops.
@pytest.mark.parametrize("turns", [1, pytest.param(4, marks=[pytest.mark.long, pytest.mark.timeout(1800)])])
def test_tasks_are_guarded_from_their_first_instruction_to_their_last(ground: Field, turns: int) -> None:
    """Many starts and stops: on the strict network nothing leaves in clear, while unguarded senders are seen."""
    starts_before = ground.starts
    nodes = ground.mesh.lab.nodes
    strict, default = LEAKS
    first = tuple((nodes[0], network) for network in GUARDED)
    # The first task of the network on its node: its namespace is made and unmade with each round.
    ground.scale(TALKS[2:], 3)
    ground.scale(NEARS, 1)
    with watched(ground, first) as seen:
        for _ in range(3 * turns):
            ground.scale(LEAKS, 3)
            time.sleep(1)
            _take_times(ground, "first")
            ground.scale(LEAKS, 0)
    _note(ground, "first tasks on their nodes", seen)
    assert seen.underlay[TALKS[2].name] > 0, "the control was not seen: the capture proves nothing"
    for near in NEARS:
        assert seen.overlays[near.name] > 0, f"{near.name} was not seen in the namespaces: the capture proves nothing"
    assert (seen.underlay[strict.name], seen.overlays[strict.name]) == (0, 0)
    # Later ones, beside tasks that are not enforced and go on talking.
    ground.scale(TALKS[:2], 3)
    everywhere = tuple((node, network) for node in nodes for network in GUARDED)
    with watched(ground, everywhere) as seen:
        for _ in range(2 * turns):
            ground.scale(LEAKS, 8)
            time.sleep(1)
            _take_times(ground, "later")
            ground.scale(LEAKS, 0)
    _note(ground, "later tasks", seen)
    for talk in TALKS:
        assert seen.underlay[talk.name] > 0, f"{talk.name} is not enforced, and was not heard"
    for talk in TALKS[:2]:
        assert seen.overlays[talk.name] > 0, f"{talk.name} was not seen in the namespaces: the capture proves nothing"
    assert (seen.underlay[strict.name], seen.overlays[strict.name]) == (0, 0)
    # The default guard knows a task as soon as the engine does. On a machine that starts sixteen at once on two cores
    # that can be late by a moment, which is what strict networks are for: the numbers are printed.
    assert FACTOR > 1 or seen.underlay[default.name] < 100 * turns, "the default guard does not work at all"
    # Once it is there, nothing passes, however slow the machine is.
    ground.scale(LEAKS, 8)
    for task in ground.mesh.tasks(default.name):
        wait_for(f"the guard of {task.name}", lambda t=task: ground.closes(t, DEFAULT), 60)
    with watched(ground, everywhere) as seen:
        time.sleep(3)
    ground.scale(LEAKS, 0)
    _note(ground, "once guarded", seen)
    for leak in LEAKS:
        assert (seen.underlay[leak.name], seen.overlays[leak.name]) == (0, 0)
    ground.figures["starts of enforced tasks"] = ground.starts - starts_before
    if turns > 1:
        FIGURES.mkdir(parents=True, exist_ok=True)
        (FIGURES / f"starts-{ground.mesh.lab.engine}.json").write_text(json.dumps(ground.figures, indent=2) + "\n")
    drops = re.findall(r"counter from_tasks \{\s+packets (\d+)", ground.table(nodes[0], STRICT))
    assert sum(map(int, drops)) > 0, "the counter of the guard says that it dropped nothing"


def test_a_strict_network_is_closed_to_tasks_that_start_without_an_agent(ground: Field) -> None:
    """With the agents killed again and again meanwhile, a new enforced task still sends nothing in clear."""
    nodes = ground.mesh.lab.nodes
    ground.scale(TALKS, 3)
    everywhere = tuple((node, network) for node in nodes for network in GUARDED)
    with watched(ground, everywhere) as seen, agents_killed(ground.mesh):
        ground.scale(LEAKS, 3)
        time.sleep(3)
        ground.scale(LEAKS, 0)
    _note(ground, "agents killed meanwhile", seen)
    for talk in TALKS[:2]:
        assert seen.overlays[talk.name] > 0
    assert seen.underlay[TALKS[2].name] > 0
    assert (seen.underlay[LEAKS[0].name], seen.overlays[LEAKS[0].name]) == (0, 0)
    ground.mesh.wait_ready(90)
    # The next agents take over what is there, and close what came in between.
    with watched(ground, everywhere) as seen:
        ground.scale(LEAKS, 3)
        ground.scale(LEAKS, 0)
    _note(ground, "after the agents came back", seen)
    assert (seen.underlay[LEAKS[0].name], seen.overlays[LEAKS[0].name]) == (0, 0)


def test_what_is_not_enforced_goes_on(ground: Field) -> None:
    """Links, unmeshed services on both networks, Docker's DNS, published ports: all as without the guard."""
    mesh = ground.mesh
    claims.chain_answers(mesh)
    claims.spy_is_shut_out(mesh)
    ground.scale(TALKS[:2], 3)
    for talk in TALKS[:2]:
        for task in mesh.tasks(talk.name):
            found = wait_for(
                f"{task.name} reaches the sink of {talk.network}",
                lambda t=task, n=talk.network: _reached(mesh, t, f"tasks.{n}_sink", 7779),
                30,
            )
            assert found["outcome"] == "reached"
    if _has_ipvs():
        for talk in TALKS[:2]:
            task = mesh.tasks(talk.name)[0]
            assert _reached(mesh, task, f"{talk.network}_sink", 7779), "not by its VIP"
    # Names resolve in an enforced task as well, though nothing answers there.
    ground.scale(LEAKS, 1)
    for leak in LEAKS:
        (task,) = mesh.tasks(leak.name)
        lookup = f"import socket; print(socket.gethostbyname('tasks.{leak.network}_sink'))"
        assert mesh.exec(task, "python3", "-c", lookup).strip() in mesh.addresses(ground.sink(leak.network))
        assert not _reached(mesh, task, f"tasks.{leak.network}_sink", 7779)
    ground.scale(LEAKS, 0)


def test_the_way_in_from_outside_stays_open(ground: Field) -> None:
    """The ingress network has no guard, and a port published on the node answers for an enforced service."""
    mesh = ground.mesh
    ingress = mesh.docker("network", "inspect", "-f", "{{.ID}}", "ingress").strip()
    for node in mesh.lab.nodes:
        names = mesh.lab.exec(node.name, "ls", "/var/run/docker/netns").stdout.split()
        for file in (n for n in names if n.startswith(("lb_", "ingress")) or n.endswith(f"-{ingress[:10]}")):
            assert "hivewire" not in ground.inside(node, file, "nft", "list", "ruleset"), file
    publish = ("--publish", "mode=host,published=7799,target=7779", "--constraint", "node.hostname==n1")
    _create(mesh, "guard_published", STRICT, ["python3", "-c", SINK], "--label", "hivewire.mode=enforce", *publish)
    try:
        wait_for("the published service", lambda: mesh.tasks("guard_published"), 60)
        connect = f"import socket; socket.create_connection(('{mesh.lab.nodes[0].address}', 7799), 3)"
        wait_for(
            "its published port",
            lambda: mesh.lab.exec("n2", "python3", "-c", connect, check=False).returncode == 0,
            30,
        )
    finally:
        mesh.docker("service", "rm", "guard_published")


@contextmanager
def agents_killed(mesh: Deployed) -> Iterator[None]:
    """Kill every agent as soon as it is there, while the block runs."""
    stop = threading.Event()

    def kill() -> None:
        while not stop.is_set():
            for task in mesh.tasks(f"{STACK}_agent"):
                mesh.lab.docker(task.node, "kill", "--signal", "KILL", task.container, check=False)
            stop.wait(0.1)

    for task in mesh.tasks(f"{STACK}_agent"):
        mesh.lab.docker(task.node, "kill", "--signal", "KILL", task.container, check=False)
    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _create(mesh: Deployed, name: str, network: str, command: list[str], *options: str) -> None:
    mesh.docker(
        "service", "create", "--detach", "--quiet", "--name", name, "--network", network,
        "--stop-grace-period", "10s", *options, Images().demo, *command,
    )  # fmt: skip


def _marks(file: Path, sender: Sender) -> int:
    return file.read_bytes().count(sender.mark.encode())


def _frames(file: Path, expression: str) -> int:
    argv = ["tcpdump", "-n", "-r", str(file), "-Z", "root", expression]
    return len(
        subprocess.run(argv, capture_output=True, text=True, timeout=patient(60), check=True).stdout.splitlines()
    )


def _reached(mesh: Deployed, task: Task, host: str, port: int) -> dict[str, object] | None:
    report = mesh.probe(task, "tcp", host, str(port), timeout_s=2)
    return report if report.get("outcome") == "reached" else None


def _has_ipvs() -> bool:
    return Path("/proc/net/ip_vs").exists()


def _note(ground: Field, phase: str, seen: Seen) -> None:
    ground.figures[phase] = {"underlay": seen.underlay, "overlay namespaces": seen.overlays}


def _take_times(ground: Field, which: str) -> None:
    """How long before each enforced task's first packet the guard covered it, in milliseconds."""
    for leak in LEAKS:
        figures = ground.figures.setdefault(f"{leak.network}, {which} task on its node", {})
        assert isinstance(figures, dict)
        for task in ground.mesh.tasks(leak.name):
            said = ground.mesh.lab.docker(task.node, "logs", task.container).stdout.split()
            if len(said) < 3 or (which == "first" and task.node == ground.sink(leak.network).node):
                continue
            first, address = float(said[2]), ground.mesh.addresses(task)[0]
            recent = [a for a in _applied(ground, task, leak.network) if first - 20 < float(str(a["at"])) < first + 5]
            placed = [a for a in recent if a["since_created_s"] is not None]
            for entry in placed[-1:] if which == "first" else ():
                figures.setdefault("namespace to guard, ms", []).append(
                    round(1000 * float(str(entry["since_created_s"])))
                )
            if leak.network == STRICT:
                covering = placed[-1:]
            else:
                covering = [a for a in recent if address in re.findall(r"[0-9.]+", str(a["ops"]))][:1]
            for entry in covering:
                figures.setdefault("guard before first packet, ms", []).append(
                    round(1000 * (first - float(str(entry["at"]))))
                )
        for name in [n for n in figures if n.endswith(" ms")]:
            figures[f"{name}: median"] = statistics.median(figures[name])


def _applied(ground: Field, task: Task, network: str) -> list[dict[str, object]]:
    """What the agent of the task's node says that it applied, oldest first, with Unix times."""
    found = []
    for agent in ground.mesh.tasks(f"{STACK}_agent"):
        if agent.node != task.node:
            continue
        logged = ground.mesh.lab.docker(agent.node, "logs", agent.container).stderr
        for line in logged.splitlines():
            with suppress(ValueError):
                entry = json.loads(line)
                if entry.get("event") == "guard.applied" and entry.get("network") == network:
                    found.append(entry | {"at": datetime.fromisoformat(entry["ts"]).timestamp()})
    return found
