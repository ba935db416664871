"""Running connections go on, whatever is done to the mesh around them: numbered packets and a TCP connection tell."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from lab.images import Images
from lab.patience import patient
from proof.deployed import STACK, Deployed, Task, wait_for

from agent.grace import KNOWN_S
from agent.moving import FRESH_S, QUIET_S
from tests.e2e.test_modes import table
from tests.streams import PERIOD_S, Streams, start_server, stop

pytestmark = pytest.mark.e2e

CALLER, CALLED = "streams_calling", "streams_called"
PORT = 9000
LINK = f"hivewire.links=called:{PORT}/tcp, called:{PORT}/udp"


class Pair:
    """Two services of a stack, of one task each on different nodes, without any label of Hivewire; a server in one."""

    def __init__(self, mesh: Deployed, stack: ExitStack) -> None:
        self.mesh = mesh
        self._stack = stack
        for name, node in ((CALLED, mesh.lab.nodes[1]), (CALLER, mesh.lab.nodes[2])):
            constraint = f"node.hostname=={node.name}"
            mesh.docker(
                "service", "create", "--detach", "--name", name, "--network", "demo_app", "--constraint", constraint,
                "--stop-grace-period", "1s", "--label", "com.docker.stack.namespace=streams",
                Images().demo, "sleep", "infinity",
            )  # fmt: skip
            stack.callback(wait_for, f"{name} gone", lambda name=name: not mesh.tasks(name), 60)
            stack.callback(mesh.docker, "service", "rm", name)
        self.called, self.caller = (
            wait_for(f"a task of {name}", lambda name=name: mesh.tasks(name), 60)[0] for name in (CALLED, CALLER)
        )
        server = start_server(self._enter(self.called), PORT)
        stack.callback(stop, server)
        (self.address,) = mesh.addresses(self.called)
        time.sleep(max(KNOWN_S, FRESH_S) + 1)  # until then agents take the two for new tasks

    def _enter(self, task: Task) -> tuple[str, ...]:
        """Into the task's network only: a node that has a root of its own has not this Python."""
        # Docker writes /var/run, which here would lead to this machine's /run.
        sandbox = self.mesh.sandbox(task).removeprefix("/var")
        return ("nsenter", f"--net=/proc/{self.mesh.lab.node(task.node).pid}/root{sandbox}")

    def streams(self, host: str = "") -> Streams:
        streams = Streams(self._enter(self.caller), host or self.address, PORT, patient(PERIOD_S))
        self._stack.callback(streams.kill)
        return streams

    def label(self, *arguments: str, service: str = CALLER) -> None:
        self.mesh.update(service, *arguments)

    def routes(self, task: Task) -> bool:
        """Whether the task sends to the other one through WireGuard."""
        (other,) = self.mesh.addresses(self.called if task == self.caller else self.caller)
        return "dev wg0" in self.mesh.in_namespace(task, "ip", "route", "get", other)

    def is_linked(self) -> bool:
        return self.routes(self.caller) and self.routes(self.called)

    def has_shaken_hands(self) -> bool:
        """Until then WireGuard keeps packets, but not any number of them."""
        return any(peer["handshake_age_s"] is not None for peer in self.mesh.wireguard(self.caller).values())

    def is_in_clear(self) -> bool:
        """Nothing of Hivewire is left in either namespace."""
        links = (self.mesh.in_namespace(task, "ip", "-br", "link") for task in (self.caller, self.called))
        return not any("wg0" in text for text in links)

    def mode(self, task: Task) -> str:
        """What the rules in the task's namespace do: ``enforce``, ``observe``, or empty where there are none."""
        rules = table(self.mesh, task)
        return "enforce" if "denied_" in rules else "observe" if "passed_" in rules else ""


@pytest.fixture
def pair(mesh: Deployed) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(mesh, stack)


@contextmanager
def unharmed(pair: Pair, what: str, *, untouched: bool = False) -> Iterator[None]:
    """Streams by the task's address run while the block does, and lose nothing."""
    streams = pair.streams()
    yield
    time.sleep(1)  # they go the new way for a while
    verdict = streams.end()
    print(f"{what}: {verdict}")
    assert verdict.goes_on, f"{what}: {verdict}"
    assert verdict.is_untouched or not untouched, f"{what}: {verdict}"


def new_agent_on(mesh: Deployed, old: Task) -> bool:
    return any(t.node == old.node and t.container != old.container for t in mesh.tasks(old.service))


def test_agents_come_and_go_without_a_packet_lost(pair: Pair) -> None:
    """Agents killed, replaced and upgraded with another environment: nothing is lost, nothing is sent again."""
    mesh = pair.mesh
    pair.label("--label-add", LINK)
    wait_for("the link", pair.is_linked, 30)
    wait_for("a handshake", pair.has_shaken_hands, 30)
    agents = [t for t in mesh.tasks(f"{STACK}_agent") if t.node in (pair.caller.node, pair.called.node)]
    with unharmed(pair, "both agents killed", untouched=True):
        for agent in agents:
            mesh.lab.docker(agent.node, "kill", "--signal", "KILL", agent.container)
        for agent in agents:
            wait_for("a new agent", lambda agent=agent: new_agent_on(mesh, agent), 60)
        mesh.wait_ready(90)
    for what, arguments in (
        ("agents replaced", ("--force",)),
        ("agents upgraded", ("--env-add", "HIVEWIRE_RESYNC_S=59")),
    ):
        agents = mesh.tasks(f"{STACK}_agent")
        with unharmed(pair, what, untouched=True):
            mesh.update(f"{STACK}_agent", *arguments)
            for agent in agents:
                wait_for("a new agent", lambda agent=agent: new_agent_on(mesh, agent), 60)
            mesh.wait_ready(90)
    assert pair.is_linked()


def test_a_link_of_running_services_comes_and_goes(pair: Pair) -> None:
    """In observe: streams from before go on while their link opens, and those that began meanwhile while it closes."""
    with unharmed(pair, "the mesh enabled"):
        pair.label("--label-add", LINK, "--label-add", "hivewire.mode=observe")
        wait_for("the link", pair.is_linked, 30)
        later = pair.streams()
    with unharmed(pair, "the mesh disabled"):
        pair.label("--label-rm", "hivewire.links", "--label-rm", "hivewire.mode")
        wait_for("nothing of Hivewire left", pair.is_in_clear, 30)
    verdict = later.end()
    assert verdict.goes_on, verdict


def test_a_link_closes_while_an_agent_does_not_answer(pair: Pair) -> None:
    """One side leaves the mesh, and receives through it until the other side's agent has heard of it as well."""
    mesh = pair.mesh
    pair.label("--label-add", LINK, "--label-add", "hivewire.mode=observe")
    wait_for("the link", pair.is_linked, 30)
    wait_for("a handshake", pair.has_shaken_hands, 30)
    (late,) = (t for t in mesh.tasks(f"{STACK}_agent") if t.node == pair.called.node)
    with unharmed(pair, "the mesh disabled, one agent late"):
        mesh.lab.docker(late.node, "pause", late.container)
        try:
            pair.label("--label-rm", "hivewire.links", "--label-rm", "hivewire.mode")
            wait_for("the caller's way in clear", lambda: not pair.routes(pair.caller), 30)
            time.sleep(2 * QUIET_S)
            assert pair.routes(pair.called), "the other agent was not late"
        finally:
            mesh.lab.docker(late.node, "unpause", late.container)
        wait_for("nothing of Hivewire left", pair.is_in_clear, 60)


def test_a_running_service_is_enforced_around_its_connections(pair: Pair) -> None:
    """In enforce too an open connection goes on; one that begins once it is enforced loses nothing."""
    before = pair.streams()
    pair.label("--label-add", LINK)
    wait_for("the link", pair.is_linked, 30)
    wait_for("enforcement", lambda: pair.mode(pair.caller) == "enforce", 30)
    wait_for("a handshake", pair.has_shaken_hands, 30)
    later = pair.streams()
    time.sleep(2)
    verdict = before.end()
    print(f"the mesh enforced: {verdict}")
    assert (verdict.tcp_broken, verdict.tcp_back) == ("", verdict.tcp_sent), verdict
    verdict = later.end()
    assert verdict.goes_on, verdict
