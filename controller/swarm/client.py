"""Swarm through the Docker Engine API of a manager. The only module of the controller that imports docker.

A session of requests is not safe to share between threads, so every thread that asks gets a client of its own. A
client that failed is thrown away: the next one negotiates the API version again, as the engine may be a new one.
"""

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NoReturn, TypeVar

import docker
import docker.errors
import tenacity
import urllib3.exceptions

from controller.swarm.api import LIVE, EventKind, SwarmEvent
from controller.swarm.snapshot import (
    Network,
    Service,
    SwarmInfo,
    SwarmSnapshot,
    Task,
    attached_networks,
    parse_info,
    parse_network,
    parse_node,
    parse_service,
    parse_task,
)
from hivewire.errors import Gone, HivewireError, NoPermission, SwarmUnavailable, TaskGone
from hivewire.ids import NetworkId, NodeId, ServiceId, TaskId

DEFAULT_URL: Final = "unix:///var/run/docker.sock"

# A request to a manager is handed on to the leader, which gives up after 20 s (moby daemon/cluster).
DEFAULT_TIMEOUT_S: Final = 25.0
DEFAULT_QUIET_S: Final = 75.0
_CONNECT_TIMEOUT_S: Final = 5.0
_TRIES: Final = 3
_TASK_ID: Final = re.compile("[a-z0-9]{25}")
_EVENT_FILTERS: Final = json.dumps({"type": ["service", "node", "network"], "scope": ["swarm"]})
_LIBRARY_ERRORS: Final = (docker.errors.DockerException, urllib3.exceptions.HTTPError, OSError, ValueError)

T = TypeVar("T")
Json = Mapping[str, Any]


class SwarmClient:
    """``Swarm`` on a real engine. Connects when first asked, from any thread.

    Every request is short, and tried up to three times: all of them only read. ``quiet_s`` is how long ``events``
    waits for the next one before it ends. ``wait`` is what passes the time between tries.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        quiet_s: float = DEFAULT_QUIET_S,
        wait: Callable[[float], None] = tenacity.nap.sleep,
    ) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._quiet_s = quiet_s
        self._local = threading.local()
        self._retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(_TRIES),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=1.0),
            retry=tenacity.retry_if_exception_type(SwarmUnavailable),
            sleep=wait,
            reraise=True,
        )
        # Names of services and Swarm's predefined networks never change, so any thread may fill these.
        self._names: dict[ServiceId, str] = {}
        self._predefined: dict[NetworkId, Network] = {}

    def snapshot(self) -> SwarmSnapshot:
        """Services, networks and nodes. Raises SwarmUnavailable, NoPermission."""
        info = self.info()  # GET /swarm would tell it too, and the tokens to join with besides
        nodes = [parse_node(raw) for raw in self._read(lambda api: api.nodes())]
        services = self._read(lambda api: api.services())
        networks = self._networks()
        for raw in services:
            self._complete(raw, networks)
        parsed = [parse_service(raw, networks) for raw in services]
        self._names |= {service.id: service.name for service in parsed}
        return SwarmSnapshot(
            cluster=info.cluster,
            services={service.id: service for service in parsed},
            networks={n.id: n for n in networks.values() if n.driver == "overlay"},
            nodes={NodeId(node.id): node for node in nodes},
            vxlan_port=info.vxlan_port,
        )

    def service(self, service: ServiceId) -> Service:
        """One service. Raises Gone, SwarmUnavailable, NoPermission."""
        raw = self._read(lambda api: api.inspect_service(service), Gone(f"service {service} no longer exists"))
        networks: dict[NetworkId, Network] = {}
        self._complete(raw, networks)
        parsed = parse_service(raw, networks)
        self._names[parsed.id] = parsed.name
        return parsed

    def task(self, task: TaskId) -> Task:
        """One task. Raises TaskGone, SwarmUnavailable, NoPermission."""
        if not _TASK_ID.fullmatch(task):
            # The engine would also find a task by the beginning of its id, and fail where several begin so.
            raise TaskGone(f"{task!r} is no id of a task")
        raw = self._read(lambda api: api.inspect_task(task), TaskGone(f"task {task} no longer exists"))
        return parse_task(raw, self._service_name(raw))

    def tasks(self, service: ServiceId | None = None, desired: frozenset[str] = LIVE) -> tuple[Task, ...]:
        """Tasks by id. Raises SwarmUnavailable, NoPermission."""
        filters = {"desired-state": sorted(desired)} if desired else {}
        if service is not None:
            filters["service"] = [service]
        try:
            raws = self._read(lambda api: api.tasks(filters=filters), Gone(f"service {service} no longer exists"))
        except Gone:
            return ()
        return tuple(sorted((parse_task(raw, self._service_name(raw)) for raw in raws), key=lambda task: task.id))

    def info(self) -> SwarmInfo:
        """The engine and its place in the cluster. Raises SwarmUnavailable, NoPermission."""
        return parse_info(self._read(lambda api: api.info()))

    def events(self) -> Iterator[SwarmEvent]:
        """Changes, after a first SUBSCRIBED; ends after ``quiet_s`` without any. Raises SwarmUnavailable, NoPermission.

        The engine answers a moment before it listens itself, so a change of that moment can be missed.
        docker-py's own events() waits without a limit, and takes a broken connection for the end of the stream.
        """
        with _translated("events", None):
            api = self._new_client()
        try:
            yield from self._stream(api)
        finally:
            api.close()

    def close(self) -> None:
        """Close the connections of the calling thread."""
        api: docker.APIClient | None = getattr(self._local, "api", None)
        self._local.api = None
        if api is not None:
            api.close()

    def _stream(self, api: docker.APIClient) -> Iterator[SwarmEvent]:
        url = f"{api.base_url}/v{api.api_version}/events"
        timeouts = (_CONNECT_TIMEOUT_S, self._quiet_s)
        with _translated("events", None):
            response = api.get(url, params={"filters": _EVENT_FILTERS}, stream=True, timeout=timeouts)
        if response.status_code != 200:
            response.close()
            _refused(response.status_code, "events", "no stream")
        try:
            yield SwarmEvent(EventKind.SUBSCRIBED)
            lines = response.iter_lines()
            while True:
                try:
                    with _translated("events", None):
                        line = next(lines, None)
                except SwarmUnavailable as error:
                    if _is_timeout(error):
                        return
                    raise
                if line is None:
                    raise SwarmUnavailable("the Docker Engine ended the stream of events")
                event = _parse_event(line)
                if event is not None:
                    yield event
        finally:
            response.close()

    def _networks(self) -> dict[NetworkId, Network]:
        raws = self._read(lambda api: api.networks(filters={"scope": ["swarm"]}))
        return {network.id: network for network in (parse_network(raw) for raw in raws)}

    def _complete(self, raw: Json, networks: dict[NetworkId, Network]) -> None:
        """Look up what a service is attached to and the list does not have: new networks, and ``host``.

        Swarm keeps networks of its own for ``host`` and ``bridge`` and leaves them out of lists; a service on the
        host network names such a one.
        """
        for wanted in attached_networks(raw):
            if wanted in networks:
                continue
            if wanted not in self._predefined:
                try:
                    network = parse_network(self._inspect_network(wanted))
                except Gone:
                    continue
                if network.driver == "overlay":
                    networks[network.id] = network
                    continue
                self._predefined[wanted] = network
            networks[wanted] = self._predefined[wanted]

    def _inspect_network(self, network: NetworkId) -> Json:
        gone = Gone(f"network {network} no longer exists")
        return self._read(lambda api: api.inspect_network(network, scope="swarm"), gone)

    def _service_name(self, task: Json) -> str:
        service = ServiceId(str(task.get("ServiceID", "")))
        if service and service not in self._names:
            try:
                self.service(service)
            except Gone:
                return service
        return self._names.get(service, service)

    def _read(self, ask: Callable[[docker.APIClient], T], gone: HivewireError | None = None) -> T:
        answer: T = self._retrying(self._read_once, ask, gone)
        return answer

    def _read_once(self, ask: Callable[[docker.APIClient], T], gone: HivewireError | None) -> T:
        try:
            with _translated("request", gone):
                return ask(self._client())
        except SwarmUnavailable:
            self.close()
            raise

    def _client(self) -> docker.APIClient:
        api: docker.APIClient | None = getattr(self._local, "api", None)
        if api is None:
            api = self._local.api = self._new_client()
        return api

    def _new_client(self) -> docker.APIClient:
        return docker.APIClient(base_url=self._url, version="auto", timeout=self._timeout_s)


@contextmanager
def _translated(what: str, gone: HivewireError | None) -> Iterator[None]:
    """Turn the errors of docker-py, requests, urllib3 and the socket into ours; ``gone`` is what a 404 means."""
    try:
        yield
    except docker.errors.APIError as error:
        if error.status_code == 404 and gone is not None:
            raise gone from error
        _refused(error.status_code or 0, what, error.explanation or "", error)
    except _LIBRARY_ERRORS as error:
        if any(isinstance(e, PermissionError) for e in _causes(error)):
            raise NoPermission(
                "no right to use the Docker socket: run as root or bind it into the container"
            ) from error
        raise SwarmUnavailable(f"the Docker Engine does not answer: {error}") from error


def _refused(status: int, what: str, explanation: str, error: Exception | None = None) -> NoReturn:
    """Raise for an answer that is not success, with what the engine said."""
    if status in (401, 403):
        raise NoPermission(f"the Docker Engine forbids this {what}: {explanation}") from error
    raise SwarmUnavailable(f"the Docker Engine answers {status} to this {what}: {explanation}") from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and all that it was made from, also where a library only kept it as an argument."""
    waiting, seen = [error], set[int]()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        inner = [one.__cause__, one.__context__, *one.args, getattr(one, "reason", None)]
        waiting.extend(e for e in inner if isinstance(e, BaseException))


def _is_timeout(error: BaseException) -> bool:
    return any(isinstance(e, urllib3.exceptions.ReadTimeoutError | TimeoutError) for e in _causes(error))


def _parse_event(line: bytes) -> SwarmEvent | None:
    """An event of ``GET /events``; None for a line that is not one. The record separator of RFC 7464 is dropped."""
    try:
        raw = json.loads(line.strip(b"\x1e \r\n") or b"null")
        kind = EventKind(raw["Type"])
        actor = raw["Actor"]
        name = actor.get("Attributes", {}).get("name", "")
        return SwarmEvent(kind, str(raw.get("Action", "")), str(actor.get("ID", "")), str(name))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
