"""Hivewire and the demo, deployed in a lab: what an operator does by hand, as functions."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lab.errors import CommandFailed, LabError
from lab.images import Images
from lab.lab import Lab
from lab.patience import FACTOR, patient

DEPLOY = Path(__file__).resolve().parent.parent
STACK = "hivewire"
DEMO = "demo"

T = TypeVar("T")


@dataclass(frozen=True, slots=True, order=True)
class Task:
    """A running container of a task, and where it runs."""

    service: str
    name: str
    node: str
    container: str
    task: str


class Deployed:
    """Commands go to the engine of the first manager; containers are reached on their own node."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.manager = lab.nodes[0].name

    # Stacks and services.

    def deploy(self, images: Images, **environment: str) -> None:
        """Deploy Hivewire as the README says, and wait until its controller answers."""
        env = {"HIVEWIRE_IMAGE": images.hivewire, **environment}
        self.docker("stack", "deploy", *_files(DEPLOY / "stack.yml", STACK), STACK, env=env)

    def deploy_demo(self, images: Images) -> None:
        env = {"HIVEWIRE_DEMO_IMAGE": images.demo}
        self.docker("stack", "deploy", *_files(DEPLOY / "demo" / "stack.yml", DEMO), DEMO, env=env)

    def remove(self, stack: str) -> None:
        self.docker("stack", "rm", stack)
        wait_for(f"stack {stack} gone", lambda: not self._stack_tasks(stack), 60)

    def update(self, service: str, *arguments: str) -> float:
        """``docker service update``; returns the Unix time at which the command came back."""
        self.docker("service", "update", "--detach", *arguments, service)
        return time.time()

    def scale(self, service: str, replicas: int) -> None:
        self.docker("service", "scale", "--detach", f"{service}={replicas}")
        wait_for(f"{replicas} tasks of {service}", lambda: len(self.tasks(service)) == replicas, 90)

    def tasks(self, service: str) -> list[Task]:
        """The running containers of a service, on all nodes."""
        found = []
        for node in self.lab.nodes:
            for container in self._running(node.name, f"com.docker.swarm.service.name={service}"):
                labels = container["Labels"]
                name, task = (labels[f"com.docker.swarm.task.{key}"] for key in ("name", "id"))
                found.append(Task(service, name, node.name, container["Id"], task))
        return sorted(found)

    def inspect(self, task: Task) -> Any:
        """A task's container as its engine describes it. Raises LabError when it is gone."""
        return self.lab.ask(task.node, f"/containers/{task.container}/json")

    def docker(self, *arguments: str, env: dict[str, str] | None = None, timeout_s: float = 180) -> str:
        return self.lab.docker(self.manager, *arguments, env=env, timeout_s=timeout_s).stdout

    def _stack_tasks(self, stack: str) -> bool:
        return any(self._running(node.name, f"com.docker.stack.namespace={stack}") for node in self.lab.nodes)

    def _running(self, node: str, label: str) -> Any:
        return self.lab.ask(node, "/containers/json", {"label": [label]})

    # Inside.

    def exec(self, task: Task, *argv: str, timeout_s: float = 60, check: bool = True) -> str:
        return self.lab.docker(task.node, "exec", task.container, *argv, timeout_s=timeout_s, check=check).stdout

    def probe(self, task: Task, *arguments: str, timeout_s: float = 3.0) -> dict[str, Any]:
        """Try to reach something from a task of the demo; the answer says how that went."""
        result: dict[str, Any] = json.loads(
            self.exec(task, "probe", "--timeout", str(patient(timeout_s)), *arguments, check=False) or "{}"
        )
        return result

    def ask_web(self, task: Task, marker: str = "hello") -> dict[str, Any]:
        """One request through web, api and db, begun in a web task itself."""
        return self.probe(task, "http", f"http://127.0.0.1:8080/?marker={marker}")

    def cli(self, *arguments: str, check: bool = True, timeout_s: float = 180) -> str:
        """The ``hivewire`` command in the controller's container."""
        controller = self.tasks(f"{STACK}_controller")
        if not controller:
            raise LabError("the controller does not run (docker service ps hivewire_controller)")
        return self.exec(controller[0], "hivewire", *arguments, check=check, timeout_s=timeout_s)

    def ask(self, *arguments: str) -> Any:
        """The same as JSON values, those of a command that found something wrong as well. Raises LabError."""
        try:
            said = self.cli("-o", "json", *arguments)
        except CommandFailed as failed:
            if not failed.stdout.strip():
                raise
            said = failed.stdout
        return json.loads(said)

    def wait_ready(self, timeout_s: int = 120) -> None:
        """Until ``hivewire check`` is green. Raises LabError with what it said last, and why tasks did not start."""
        limit_s = int(patient(timeout_s))
        deadline = time.monotonic() + limit_s
        while True:
            left = int(deadline - time.monotonic())
            try:
                self.cli("check", "--wait", f"{max(5, left)}s", timeout_s=max(5, left) + 30)
            except (CommandFailed, LabError) as error:
                if left <= 0:
                    told = "\n".join((str(error), *self._failed_tasks()))
                    raise LabError(f"the mesh is not ready after {limit_s} s: {told}") from error
                time.sleep(1)
            else:
                return

    def _failed_tasks(self) -> list[str]:
        """What the Swarm says of tasks that failed, each once."""
        shown = "{{if .Error}}{{.Name}} on {{.Node}}: {{.Error}}{{end}}"
        stacks = self.docker("stack", "ls", "--format", "{{.Name}}").split()
        said = [self.docker("stack", "ps", "--no-trunc", "--format", shown, stack) for stack in stacks]
        return sorted({line for text in said for line in text.splitlines() if line})

    def in_namespace(self, task: Task, *argv: str, check: bool = True) -> str:
        """A program of the node in a task's network namespace."""
        return self.lab.exec(task.node, "nsenter", f"--net={self.sandbox(task)}", *argv, check=check).stdout

    def sandbox(self, task: Task) -> str:
        """The path of a task's network namespace, on its node."""
        return str(self.inspect(task)["NetworkSettings"]["SandboxKey"])

    def wireguard(self, task: Task) -> dict[str, dict[str, Any]]:
        """A task's peers by public key: endpoint, allowed IPs, age of the handshake in seconds (None: never).

        Asked in parts, because ``wg show ... dump`` would print the private key as well.
        """
        endpoints = self._wg(task, "endpoints")
        allowed, handshakes = self._wg(task, "allowed-ips"), self._wg(task, "latest-handshakes")
        return {
            key: {
                "endpoint": endpoint,
                "allowed_ips": sorted(allowed.get(key, "").replace("(none)", "").split()),
                "handshake_age_s": time.time() - int(handshakes[key]) if int(handshakes.get(key, 0)) else None,
            }
            for key, endpoint in endpoints.items()
        }

    def _wg(self, task: Task, what: str) -> dict[str, str]:
        alias = json.loads(self.in_namespace(task, "ip", "-j", "link", "show", "wg0"))[0].get("ifalias", "")
        if ":" in alias:
            # A userspace device answers at its socket, which the agent's container sees.
            agent = next(t for t in self.tasks(f"{STACK}_agent") if t.node == task.node)
            lines = self.exec(agent, "wg", "show", alias.split(":", 1)[1], what)
        else:
            lines = self.in_namespace(task, "wg", "show", "wg0", what)
        return dict(line.split("\t", 1) for line in lines.splitlines())

    def addresses(self, task: Task) -> list[str]:
        """The overlay addresses of a task, ingress left out."""
        networks = self.inspect(task)["NetworkSettings"]["Networks"]
        return sorted(at["IPAddress"] for name, at in networks.items() if at["IPAddress"] and name != "ingress")


def _files(stack: Path, name: str) -> list[str]:
    """The stack file, and on a slow machine the one that gives its health checks more time."""
    slow = [DEPLOY / "proof" / "slow" / f"{name}.yml"] if FACTOR > 1 else []
    return [word for file in (stack, *slow) for word in ("-c", str(file))]


def wait_for(what: str, question: Callable[[], T], timeout_s: float, period_s: float = 0.25) -> T:
    """Ask until the answer is true and return it. Raises LabError naming what did not come true in time."""
    limit_s = patient(timeout_s)
    deadline = time.monotonic() + limit_s
    while True:
        answer = question()
        if answer:
            return answer
        if time.monotonic() >= deadline:
            raise LabError(f"not within {limit_s:.0f} s: {what}")
        time.sleep(period_s)


@contextmanager
def measured(into: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds that the block took."""
    start = time.perf_counter()
    yield
    into[name] = round(time.perf_counter() - start, 3)
