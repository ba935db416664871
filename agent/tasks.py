"""The tasks of this node, as its Docker Engine tells. The only importer of ``docker`` in the agent; it only reads."""

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from ipaddress import IPv4Address
from types import MappingProxyType
from typing import Any, Final

import docker
import requests
from docker.errors import DockerException, NotFound

from agent.guard.desired import Holder, LocalNetwork, Stage
from hivewire.errors import SwarmUnavailable, TaskGone
from hivewire.ids import ContainerId, NetworkId, NodeId, ServiceId, TaskId

TASK_LABEL: Final = "com.docker.swarm.task.id"
SERVICE_LABEL: Final = "com.docker.swarm.service.id"
TASK_NAME_LABEL: Final = "com.docker.swarm.task.name"

# Of all container events only these change anything for the mesh.
_ACTIONS: Final = ("start", "health_status", "kill", "die", "destroy")
# Signals after which a container is on its way out; a HUP, for instance, only makes it read its configuration, unless
# it is the one that its image stops by.
_STOP_SIGNALS: Final = frozenset({signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGQUIT})
# How far back a new listener asks: an engine keeps its last 256 events (moby daemon/events, eventsLimit), and a
# container that was told to stop longer ago has most likely ended.
_PAST_S: Final = 600
_TIMEOUT_S: Final = 30

# What can change who holds an address of an overlay network: a container's first and last sign, and its networks'.
_NETWORK_ACTIONS: Final = ("create", "start", "die", "destroy", "connect", "disconnect")
_BALANCER: Final = "lb-"
"""So begins the id of a network's load balancer among its containers (libnetwork, createLoadBalancerSandbox)."""
# A container is made some 30 ms before the engine names its networks; after this long it has none.
_FORMING_S: Final = 5.0
_HELD: Final = frozenset({"running", "paused", "restarting"})


@dataclass(frozen=True, slots=True)
class LocalTask:
    """A running container of a task."""

    task: TaskId
    name: str
    service: ServiceId
    container: ContainerId
    sandbox: str
    """Path of its network namespace."""
    addresses: Mapping[NetworkId, IPv4Address]
    is_healthy: bool
    """True as well where it has no health check."""
    started_at: float = 0.0
    """Unix time in seconds, by the engine's clock."""


@dataclass(frozen=True, slots=True)
class TaskEvent:
    task: TaskId
    action: str
    stops: bool
    """The container was told to stop, or has stopped: no new connections should be sent to it."""


@dataclass(frozen=True, slots=True)
class LocalNode:
    """The node as its own engine knows it."""

    node: NodeId
    cluster: str
    """Empty on a worker: engines tell it to managers only."""
    hostname: str
    address: str
    managers: tuple[str, ...]
    """Addresses of the Swarm's managers, without ports."""
    manager_ids: frozenset[NodeId] = frozenset()


class LocalTasks:
    """Reads from the engine behind a Unix socket. Each thread has a client of its own: requests is not thread-safe."""

    def __init__(self, socket: str = "unix:///var/run/docker.sock") -> None:
        self._socket = socket
        self._clients = threading.local()
        self._lock = threading.Lock()
        self._sandboxes: dict[str, str] = {}
        self._listeners: list[Callable[[], None]] = []

    def on_sandbox(self, listener: Callable[[], None]) -> None:
        """Call it when ``get`` has learned of a network namespace that ``network`` did not know of before."""
        self._listeners.append(listener)

    def node(self) -> LocalNode:
        """Raises SwarmUnavailable, also where the engine is not part of a Swarm."""
        with _errors():
            info = self._client().info()
        swarm = info.get("Swarm") or {}
        if swarm.get("LocalNodeState") != "active":
            raise SwarmUnavailable("this engine is not an active node of a Swarm: docker swarm init, or join")
        managers = [str(m["Addr"]).rsplit(":", 1)[0] for m in swarm.get("RemoteManagers") or ()]
        return LocalNode(
            node=NodeId(swarm["NodeID"]),
            cluster=str((swarm.get("Cluster") or {}).get("ID", "")),
            hostname=str(info.get("Name", "")),
            address=str(swarm.get("NodeAddr", "")),
            managers=tuple(sorted(managers)),
            manager_ids=frozenset(NodeId(str(m["NodeID"])) for m in swarm.get("RemoteManagers") or ()),
        )

    def list(self) -> dict[TaskId, ServiceId]:
        """All tasks with a running container, and their services. Raises SwarmUnavailable."""
        with _errors():
            containers = self._client().containers(filters={"label": TASK_LABEL, "status": "running"})
        labels = [c.get("Labels") or {} for c in containers]
        return {TaskId(each[TASK_LABEL]): ServiceId(each[SERVICE_LABEL]) for each in labels if SERVICE_LABEL in each}

    def get(self, task: TaskId) -> LocalTask:
        """Raises TaskGone where no container of the task runs, SwarmUnavailable."""
        with _errors():
            filters = {"label": f"{TASK_LABEL}={task}", "status": "running"}
            found = self._client().containers(filters=filters)
            if not found:
                raise TaskGone(f"task {task} has no running container on this node")
            local = parse_container(self._client().inspect_container(found[0]["Id"]))
        with self._lock:
            is_new = self._sandboxes.get(local.container) != local.sandbox
            self._sandboxes[local.container] = local.sandbox
        for listener in self._listeners if is_new else ():
            listener()
        return local

    def events(self) -> Iterator[TaskEvent]:
        """What happens to the containers of tasks, until the engine ends the stream.

        Begins with what the engine remembers, since that a container is being stopped is told by an event alone.
        Raises SwarmUnavailable. Events can be lost (the engine drops slow readers): list again after every start.
        """
        filters = {"type": "container", "event": list(_ACTIONS), "label": TASK_LABEL}
        with _errors():
            for event in self._client().events(since=int(time.time()) - _PAST_S, filters=filters, decode=True):
                if (parsed := parse_event(event, self._stop_signal)) is not None:
                    yield parsed

    def _stop_signal(self, container: str) -> str:
        """The one that the engine stops a container by; SIGTERM where it is gone, or names none."""
        try:
            return str(self._client().inspect_container(container)["Config"].get("StopSignal") or "SIGTERM")
        except NotFound:
            return "SIGTERM"

    def network(self, network: NetworkId, name: str) -> LocalNetwork:
        """Who of this node has, or will have, which address on a network. Raises SwarmUnavailable.

        Neither question waits for a container that is just being started, as asking for that container would.
        """
        with _errors():
            containers = self._client().containers(all=True)
            try:
                attached = self._client().inspect_network(network).get("Containers") or {}
            except NotFound:
                attached = {}
        with self._lock:
            self._sandboxes = {c["Id"]: self._sandboxes[c["Id"]] for c in containers if c["Id"] in self._sandboxes}
            sandboxes = dict(self._sandboxes)
        return parse_network(network, name, containers, attached, time.time(), sandboxes)

    def network_events(self) -> Iterator[NetworkId | None]:
        """Whenever the answer of ``network`` may have changed: for that network, or None for any.

        Raises SwarmUnavailable. Events can be lost: look at everything again after every start.
        """
        filters = {"type": ["container", "network"], "event": list(_NETWORK_ACTIONS)}
        with _errors():
            for event in self._client().events(filters=filters, decode=True):
                if event.get("Type") == "network":
                    yield NetworkId(str((event.get("Actor") or {}).get("ID", "")))
                else:
                    yield None

    def _client(self) -> Any:
        client = getattr(self._clients, "client", None)
        if client is None:
            client = self._clients.client = docker.APIClient(self._socket, version="auto", timeout=_TIMEOUT_S)
        return client


def parse_container(inspected: Mapping[str, Any]) -> LocalTask:
    """Read ``GET /containers/{id}/json``. Raises TaskGone where it does not run."""
    labels = inspected["Config"].get("Labels") or {}
    if not {TASK_LABEL, SERVICE_LABEL} <= labels.keys():
        raise TaskGone(f"container {inspected['Id']} is of no Swarm task, whatever one of its labels says")
    state, settings = inspected["State"], inspected["NetworkSettings"]
    if not state.get("Running") or not settings.get("SandboxKey"):
        raise TaskGone(f"the container of task {labels.get(TASK_LABEL)} does not run")
    health = (state.get("Health") or {}).get("Status", "none")
    return LocalTask(
        task=TaskId(labels[TASK_LABEL]),
        name=labels.get(TASK_NAME_LABEL, ""),
        service=ServiceId(labels[SERVICE_LABEL]),
        container=ContainerId(inspected["Id"]),
        sandbox=settings["SandboxKey"],
        addresses={
            NetworkId(network["NetworkID"]): IPv4Address(network["IPAddress"])
            for network in (settings.get("Networks") or {}).values()
            if network.get("NetworkID") and network.get("IPAddress")
        },
        is_healthy=health in ("none", "healthy"),
        started_at=_unix_time(str(state.get("StartedAt", ""))),
    )


def parse_network(
    network: NetworkId,
    name: str,
    containers: Iterable[Mapping[str, Any]],
    attached: Mapping[str, Mapping[str, Any]],
    now: float,
    sandboxes: Mapping[str, str] = MappingProxyType({}),
) -> LocalNetwork:
    """Read ``GET /containers/json?all=1`` together with the ``Containers`` of ``GET /networks/{id}``.

    ``sandboxes`` are the paths of network namespaces by container, as far as they are known.
    """
    holders, is_forming = [], False
    for container in containers:
        labels, state = container.get("Labels") or {}, container.get("State")
        networks = (container.get("NetworkSettings") or {}).get("Networks") or {}
        if not networks and state == "created" and TASK_LABEL in labels:
            is_forming = is_forming or now - float(container.get("Created") or 0) < _FORMING_S
        known = ((key, each or {}) for key, each in networks.items())
        mine = next((each for key, each in known if key == name or each.get("NetworkID") == network), {})
        endpoint = attached.get(container["Id"])
        written = (endpoint or {}).get("IPv4Address") or mine.get("IPAddress")
        address = _address(written or (mine.get("IPAMConfig") or {}).get("IPv4Address"))
        if address is None:
            continue
        is_held = endpoint is not None or state in _HELD
        stage = Stage.ATTACHED if is_held else Stage.COMING if state == "created" else Stage.ENDED
        mac = (endpoint or {}).get("MacAddress") or mine.get("MacAddress") or ""
        service = ServiceId(labels.get(SERVICE_LABEL, ""))
        task = TaskId(labels[TASK_LABEL]) if TASK_LABEL in labels else None
        sandbox = sandboxes.get(container["Id"], "")
        holders.append(Holder(ContainerId(container["Id"]), service, address, str(mac), stage, task, sandbox))
    balancer = next((e for key, e in attached.items() if key.startswith(_BALANCER)), {})
    return LocalNetwork(tuple(holders), _address(balancer.get("IPv4Address")), is_forming)


def _address(written: object) -> IPv4Address | None:
    """Of ``10.0.1.3`` or ``10.0.1.3/24``; None where it is none."""
    try:
        return IPv4Address(str(written or "").split("/", 1)[0])
    except ValueError:
        return None


def _unix_time(text: str) -> float:
    """Read RFC 3339 with nanoseconds, which Python's parser cuts to microseconds; 0 where it is none."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return 0.0


def parse_event(event: Mapping[str, Any], stop_signal: Callable[[str], str] = lambda _: "SIGTERM") -> TaskEvent | None:
    """Read one event; None where it tells nothing. ``Action`` alone: ``status`` is gone from API 1.52 on.

    ``stop_signal`` tells which signal the container of an id is stopped by; asked only where others were sent.
    """
    action, attributes = str(event.get("Action", "")), (event.get("Actor") or {}).get("Attributes") or {}
    if TASK_LABEL not in attributes:
        return None
    verb = action.split(":", 1)[0]
    stops = verb in ("die", "destroy")
    if verb == "kill":
        sent = _signal_number(str(attributes.get("signal", "15")))
        stops = sent in _STOP_SIGNALS or sent == _signal_number(stop_signal(event["Actor"].get("ID", "")))
        if not stops:
            return None
    return TaskEvent(TaskId(attributes[TASK_LABEL]), verb, stops)


def _signal_number(written: str) -> int:
    """Of ``28``, ``WINCH``, ``SIGWINCH`` or ``SIGRTMIN+3``, as images and events write it; 0 of anything else."""
    name, _, more = written.upper().removeprefix("SIG").partition("+")
    if name.isdecimal():
        return int(name)
    number = signal.Signals.__members__.get(f"SIG{name}", 0)
    return int(number) + (int(more) if number and more.isdecimal() else 0)


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except NotFound as error:
        raise TaskGone(f"the engine no longer knows it: {error.explanation}") from error
    except (DockerException, requests.RequestException, OSError) as error:
        raise SwarmUnavailable(f"the Docker Engine does not answer: {error}") from error
