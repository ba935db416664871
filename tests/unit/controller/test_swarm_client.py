"""The client of the Engine API against an engine that misbehaves: refusals, silence, broken streams."""

import gc
import json
import socketserver
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from controller.swarm.api import EventKind, SwarmEvent
from controller.swarm.client import SwarmClient
from hivewire.errors import Gone, NoPermission, SwarmUnavailable, TaskGone
from hivewire.ids import NetworkId, ServiceId, TaskId

Answer = tuple[int, Any]
QUIET_S = 0.2

TASK = TaskId("t1" + "x" * 23)


class Engine:
    """An HTTP server on a Unix socket that answers as it is told, by path without the API version."""

    def __init__(self, path: Path) -> None:
        self.url = f"unix://{path}"
        self.answers: dict[str, Answer | Callable[[], Answer]] = {"/version": (200, {"ApiVersion": "1.41"})}
        self.asked: Counter[str] = Counter()
        self.threads: set[str] = set()
        self.events: list[bytes] = []
        self.ends_stream = False
        self.closed = threading.Event()
        engine = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = self.path.split("?")[0].removeprefix("/v1.41")
                engine.asked[path] += 1
                if path == "/events" and path not in engine.answers:
                    self.stream()
                    return
                answer = engine.answers.get(path, (404, {"message": f"{path} not found"}))
                status, body = answer() if callable(answer) else answer
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def stream(self) -> None:
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for event in engine.events:
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
                if engine.ends_stream:
                    self.wfile.write(b"0\r\n\r\n")
                else:
                    engine.closed.wait(10)
                self.close_connection = True

            def address_string(self) -> str:
                return "client"

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
            daemon_threads = True

        self.server = Server(str(path), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def stop(self) -> None:
        self.closed.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    running = Engine(tmp_path / "docker.sock")
    yield running
    running.stop()


@pytest.fixture
def client(engine: Engine) -> Iterator[SwarmClient]:
    made = SwarmClient(engine.url, timeout_s=5, quiet_s=QUIET_S, wait=lambda _: None)
    yield made
    made.close()


def event(kind: str, action: str, thing: str, name: str) -> bytes:
    """An event as engine 29 sends it, without the fields that 1.52 dropped."""
    actor = {"ID": thing, "Attributes": {"name": name}}
    return json.dumps({"Type": kind, "Action": action, "Actor": actor, "scope": "swarm"}).encode() + b"\n"


@pytest.fixture
def no_engine(tmp_path: Path) -> Iterator[str]:
    """A socket that is not there. docker-py drops a socket that could not connect without closing it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield f"unix://{tmp_path}/nobody.sock"
        gc.collect()


def test_nothing_is_asked_before_it_is_needed(no_engine: str) -> None:
    """Making a client needs no engine."""
    SwarmClient(no_engine).close()


def test_no_engine_is_unavailable(no_engine: str) -> None:
    """Where nobody listens, three tries later the answer is SwarmUnavailable."""
    waits: list[float] = []
    with pytest.raises(SwarmUnavailable, match="does not answer"):
        SwarmClient(no_engine, wait=waits.append).info()
    assert len(waits) == 2


def test_no_engine_for_events_is_unavailable(no_engine: str) -> None:
    """A subscription is tried once; trying again is up to who subscribes."""
    with pytest.raises(SwarmUnavailable):
        next(SwarmClient(no_engine).events())


def test_a_short_trouble_is_not_seen(engine: Engine, client: SwarmClient) -> None:
    """Swarm without a leader for a moment costs a second try, with a new client."""
    answers = iter([(500, {"message": "rpc error: The swarm does not have a leader"}), (200, {"Name": "n1"})])
    engine.answers["/info"] = lambda: next(answers)
    assert client.info().hostname == "n1"
    assert engine.asked == {"/version": 2, "/info": 2}


def test_a_lasting_trouble_is_told_in_the_engines_words(engine: Engine, client: SwarmClient) -> None:
    """What the engine said is in the error."""
    engine.answers["/info"] = (200, {})
    engine.answers["/nodes"] = (503, {"message": "This node is not a swarm manager."})
    with pytest.raises(SwarmUnavailable, match=r"503 .* This node is not a swarm manager"):
        client.snapshot()
    assert engine.asked["/nodes"] == 3


def test_a_refusal_is_no_permission(engine: Engine, client: SwarmClient) -> None:
    """A proxy in front of the socket that forbids is not asked again."""
    engine.answers["/info"] = (403, {"message": "Forbidden by policy"})
    with pytest.raises(NoPermission, match="Forbidden by policy"):
        client.info()
    assert engine.asked["/info"] == 1


def test_a_refused_subscription_is_no_permission(engine: Engine, client: SwarmClient) -> None:
    """The same holds of events."""
    engine.answers["/events"] = (403, {})
    with pytest.raises(NoPermission):
        next(client.events())


def test_what_is_not_there_is_gone(engine: Engine, client: SwarmClient) -> None:
    """A 404 is an answer: it is not asked for again."""
    with pytest.raises(TaskGone):
        client.task(TASK)
    with pytest.raises(Gone):
        client.service(ServiceId("s1"))
    assert client.tasks(ServiceId("s1")) == ()
    assert engine.asked == {"/version": 1, f"/tasks/{TASK}": 1, "/services/s1": 1, "/tasks": 1}


def test_an_answer_that_is_no_json_is_unavailable(engine: Engine, client: SwarmClient) -> None:
    """Something else than an engine behind the socket is as good as none."""
    engine.answers["/version"] = (200, "hello")
    with pytest.raises(SwarmUnavailable):
        client.info()


def test_events_begin_with_the_subscription_and_end_when_quiet(engine: Engine, client: SwarmClient) -> None:
    """Events come as they are sent; silence ends the iteration without an error."""
    engine.events = [event("service", "update", "s1", "shop_web"), event("node", "update", "n1", "n1")]
    assert list(client.events()) == [
        SwarmEvent(EventKind.SUBSCRIBED),
        SwarmEvent(EventKind.SERVICE, "update", "s1", "shop_web"),
        SwarmEvent(EventKind.NODE, "update", "n1", "n1"),
    ]


def test_a_stream_that_ends_is_unavailable(engine: Engine, client: SwarmClient) -> None:
    """An engine that stops ends its streams: that is no silence."""
    engine.events, engine.ends_stream = [event("network", "create", "x", "shop_app")], True
    events = client.events()
    assert [next(events).kind, next(events).kind] == [EventKind.SUBSCRIBED, EventKind.NETWORK]
    with pytest.raises(SwarmUnavailable, match="ended the stream"):
        next(events)


def test_strange_lines_are_passed_over(engine: Engine, client: SwarmClient) -> None:
    """Unknown types, broken JSON and the record separator of json-seq do no harm."""
    engine.events = [
        b"{not json\n",
        b"[]\n",
        b'{"Type": "secret", "Actor": {}}\n',
        b"\n",
        b"\x1e" + event("service", "remove", "s1", "shop_web"),
    ]
    assert list(client.events())[1:] == [SwarmEvent(EventKind.SERVICE, "remove", "s1", "shop_web")]


def test_each_thread_has_a_session_of_its_own(engine: Engine, client: SwarmClient) -> None:
    """A session of requests is never shared: the version is negotiated once for each thread, and no more."""
    engine.answers["/info"] = (200, {"Name": "n1"})
    client.info()
    client.info()

    def ask() -> None:
        client.info()
        client.close()

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert engine.asked == {"/version": 4, "/info": 5}


def test_the_host_network_is_looked_up_once(engine: Engine, client: SwarmClient) -> None:
    """Swarm's own networks are in no list and never change: one question is enough for good."""
    spec = {"Name": "dns", "TaskTemplate": {"Networks": [{"Target": "hostid"}, {"Target": "goneid"}]}}
    engine.answers |= {
        "/info": (200, {"Swarm": {"Cluster": {"ID": "clusterid"}}}),
        "/nodes": (200, []),
        "/services": (200, [{"ID": "s1", "Spec": spec}]),
        "/networks": (200, [{"Id": "appid", "Name": "app", "Driver": "overlay"}]),
        "/networks/hostid": (200, {"Id": "hostid", "Name": "host", "Driver": "host"}),
    }
    for _ in range(2):
        snapshot = client.snapshot()
        assert snapshot.services[ServiceId("s1")].host_network
        assert set(snapshot.networks) == {NetworkId("appid")}
    assert engine.asked["/networks/hostid"] == 1
    assert engine.asked["/networks/goneid"] == 2


def test_a_task_of_a_service_that_left_is_named_by_id(engine: Engine, client: SwarmClient) -> None:
    """Where the service is gone already, its id stands in the task's name."""
    engine.answers[f"/tasks/{TASK}"] = (200, {"ID": TASK, "ServiceID": "s1", "Slot": 3})
    assert client.task(TASK).name == "s1.3"


def test_what_is_no_id_of_a_task_is_not_asked_for() -> None:
    """The engine also finds a task by the beginning of its id; here such a word is no task."""
    with pytest.raises(TaskGone, match="no id of a task"):
        SwarmClient("unix:///nonexistent.sock").task(TaskId("t1"))
