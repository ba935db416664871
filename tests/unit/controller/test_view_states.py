"""The catalogue of meshes that the tests of view, API and CLI look at, and that it holds together.

The shop: shop_web (two tasks, on node-1 and node-2) links to shop_api (one task, on node-2), which links to shop_db
(one task, on node-3) and waits for the consent of billing_ledger. blog_page is outside the mesh.
"""

import base64
from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass, field
from ipaddress import IPv4Address

from controller.state import Component, MeshState, PendingLink
from controller.swarm.snapshot import Network, Node, Service, SwarmSnapshot, Task
from hivewire.errors import SwarmUnavailable
from hivewire.ids import ContainerId, NetworkId, NodeId, ServiceId, TaskId
from hivewire.records import (
    ClaimRecord,
    Endpoint,
    Finding,
    Link,
    Mode,
    NodeRecord,
    PeerRecord,
    PolicyRecord,
    PortRange,
    Protocol,
    QuarantineKind,
    QuarantineRecord,
    Severity,
    StatusRecord,
    TaskPhase,
)
from hivewire.records import Network as PolicyNetwork
from hivewire.reports import AgentReport, InterfaceReport, PeerReport, TaskDenials

NOW = 1_800_000_000.0
APP = NetworkId("net-app")
WEB, API, DB = ServiceId("svc-web"), ServiceId("svc-api"), ServiceId("svc-db")
LEDGER, PAGE = ServiceId("svc-ledger"), ServiceId("svc-page")
WEB1, WEB2, API1, DB1 = TaskId("task-web1"), TaskId("task-web2"), TaskId("task-api1"), TaskId("task-db1")
NODE1, NODE2, NODE3 = NodeId("node-id-1"), NodeId("node-id-2"), NodeId("node-id-3")

NAMES = {WEB: "shop_web", API: "shop_api", DB: "shop_db", LEDGER: "billing_ledger", PAGE: "blog_page"}
PLACES = {WEB1: (WEB, 1, NODE1), WEB2: (WEB, 2, NODE2), API1: (API, 1, NODE2), DB1: (DB, 1, NODE3)}


def key(task: TaskId) -> str:
    """A public key for this task, the same each time."""
    return base64.b64encode(task.encode().ljust(32, b".")).decode()


def tcp(port: int) -> PortRange:
    return PortRange(protocol=Protocol.TCP, first=port, last=port)


def link(service: ServiceId, *ports: int) -> Link:
    return Link(service=service, name=NAMES[service], network=APP, ports=tuple(tcp(port) for port in ports))


def policy(service: ServiceId, *out_links: Link, **changes: object) -> PolicyRecord:
    network = PolicyNetwork(id=APP, name="shop_app", subnets=("10.0.1.0/24",))
    values: dict[str, object] = {
        "service": service,
        "name": NAMES[service],
        "stack": NAMES[service].partition("_")[0],
        "mode": Mode.ENFORCE,
        "networks": (network,),
        "out_links": out_links,
    }
    return PolicyRecord(**{**values, **changes})  # type: ignore[arg-type]


def peer(task: TaskId) -> PeerRecord:
    service, slot, node = PLACES[task]
    return PeerRecord(
        task=task,
        task_name=f"{NAMES[service]}.{slot}",
        service=service,
        node=node,
        public_key=key(task),
        endpoint=Endpoint(address=IPv4Address("192.0.2.1"), port=51820),
        epoch=1,
        addresses={APP: IPv4Address("10.0.1.5")},
        serving=True,
    )


def claim(task: TaskId) -> ClaimRecord:
    service, _, node = PLACES[task]
    endpoint = Endpoint(address=IPv4Address("192.0.2.1"), port=51820)
    return ClaimRecord(
        task=task,
        service=service,
        node=node,
        container=ContainerId("c"),
        public_key=key(task),
        endpoint=endpoint,
        epoch=1,
        serving=True,
    )


def status(task: TaskId, phase: TaskPhase = TaskPhase.READY, error: str = "") -> StatusRecord:
    service, _, node = PLACES[task]
    return StatusRecord(task=task, service=service, node=node, phase=phase, interface="wg0", mtu=1420, error=error)


def task(id_: TaskId, state: str = "running") -> Task:
    service, slot, node = PLACES[id_]
    return Task(
        id=id_,
        name=f"{NAMES[service]}.{slot}",
        service=service,
        node=node,
        state=state,
        desired_state="running",
        container=ContainerId("c"),
    )


def agent(node: NodeId, number: int, **changes: object) -> NodeRecord:
    values: dict[str, object] = {
        "node": node,
        "hostname": f"node-{number}",
        "agent_version": "0.1.0",
        "underlay_address": IPv4Address(f"192.0.2.{number}"),
        "underlay_mtu": 1500,
        "backend": "kernel",
        "first_port": 51820,
        "last_port": 52819,
    }
    return NodeRecord(**{**values, **changes})  # type: ignore[arg-type]


def swarm() -> SwarmSnapshot:
    services = {id_: Service(id=id_, name=name, stack=name.partition("_")[0]) for id_, name in NAMES.items()}
    nodes = {
        id_: Node(id=id_, hostname=f"node-{number}", is_manager=number == 1, engine_version="28.2.2")
        for number, id_ in enumerate((NODE1, NODE2, NODE3), 1)
    }
    return SwarmSnapshot(
        cluster="mesh-one", services=services, nodes=nodes, networks={APP: Network(id=APP, name="shop_app")}
    )


def shop(**changes: object) -> MeshState:
    """Everything works, but for the link that waits for consent."""
    consent = Finding(
        code="HW301",
        severity=Severity.WARNING,
        subject="shop_api",
        message="link shop_api -> billing_ledger is waiting for consent",
        remedy='add  hivewire.allow: "shop_api"  to billing_ledger',
    )
    values: dict[str, object] = {
        "swarm": swarm(),
        "revision": 18211,
        "leader": "node-1",
        "is_leader": True,
        "policies": {
            WEB: policy(WEB, link(API, 8080), labels={"hivewire.links": "api:8080"}),
            API: policy(API, link(DB, 5432), findings=(consent,)),
            DB: policy(DB),
        },
        "findings": (consent,),
        "pending": (PendingLink("shop_api", "billing_ledger", "7000/tcp", "waits for hivewire.allow"),),
        "nodes": {NODE1: agent(NODE1, 1), NODE2: agent(NODE2, 2), NODE3: agent(NODE3, 3)},
        "tasks": {id_: task(id_) for id_ in PLACES},
        "claims": {id_: claim(id_) for id_ in PLACES},
        "peers": {id_: peer(id_) for id_ in PLACES},
        "statuses": {id_: status(id_) for id_ in PLACES},
        "components": (Component("swarm", True), Component("store", True), Component("leader", True)),
    }
    return MeshState(**{**values, **changes})  # type: ignore[arg-type]


BASE_ROUTES = (
    "/version",
    "/status",
    "/services",
    "/services/shop_web",
    "/links",
    "/links/shop_web/shop_api",
    "/nodes",
    "/nodes/node-1",
    "/findings",
    "/checks",
    "/quarantines",
    "/denials",
    "/suggestions",
)

End = tuple[float | None, int, int]
"""Age of the last handshake (None: never), received bytes, sent bytes."""


def interfaces(*ends: tuple[TaskId, TaskId, End], alone: tuple[TaskId, ...] = ()) -> dict[TaskId, InterfaceReport]:
    """Reports with these ends: how the first task sees the second one. ``alone``: reports without a peer."""
    peers: dict[TaskId, list[PeerReport]] = {task: [] for task in alone}
    for one, other, (age, received, sent) in ends:
        handshake = None if age is None else NOW - age
        report = PeerReport(public_key=key(other), last_handshake=handshake, received_bytes=received, sent_bytes=sent)
        peers.setdefault(one, []).append(report)
    return {
        task: InterfaceReport(
            task=task,
            service=PLACES[task][0],
            public_key=key(task),
            listen_port=51820,
            mtu=1420,
            peers=tuple(found),
        )
        for task, found in peers.items()
    }


def both(
    one: TaskId, other: TaskId, age: float | None, received: int, sent: int
) -> tuple[tuple[TaskId, TaskId, End], tuple[TaskId, TaskId, End]]:
    """The two ends of a pair, which agree."""
    return (one, other, (age, received, sent)), (other, one, (age, sent, received))


def shop_interfaces() -> dict[TaskId, InterfaceReport]:
    """What the agents see while everything works: web and api talk, api and db did six minutes ago."""
    return interfaces(
        *both(WEB1, API1, 34, 2_100_000, 310_000),
        *both(WEB2, API1, 60, 1_000, 2_000),
        *both(API1, DB1, 360, 500, 700),
    )


@dataclass
class FakeSource:
    """A StateSource that answers what it was given; None: before the first reading."""

    current: MeshState | None = field(default_factory=shop)
    reports: Mapping[TaskId, InterfaceReport] = field(default_factory=shop_interfaces)
    silent: Set[NodeId] = frozenset()
    written: list[object] = field(default_factory=list)
    """Quarantines as they were written, and (kind, id) of what was released."""
    noted: tuple[TaskDenials, ...] = ()

    def state(self) -> MeshState:
        if self.current is None:
            raise SwarmUnavailable("the Swarm has not been read yet")
        return self.current

    def interfaces(self) -> Mapping[TaskId, InterfaceReport]:
        return self.reports

    def ask(self, nodes: Collection[NodeId]) -> Mapping[NodeId, AgentReport]:
        """The same, by node; those of ``silent`` do not answer."""
        return {
            node: AgentReport(
                node=node,
                taken_at=NOW,
                interfaces=tuple(it for task, it in sorted(self.reports.items()) if PLACES[task][2] == node),
            )
            for node in sorted(set(nodes) - self.silent)
        }

    def quarantine(self, record: QuarantineRecord) -> None:
        self.written.append(record)

    def release(self, kind: QuarantineKind, id_: str) -> None:
        self.written.append((kind, id_))

    def denials(self) -> tuple[TaskDenials, ...]:
        return self.noted


def test_every_task_of_the_shop_is_known_everywhere() -> None:
    """Tasks, claims, peers, statuses and reports of the shop name the same tasks."""
    state = shop()
    every = set(PLACES)
    assert {*state.tasks} == {*state.claims} == {*state.peers} == {*state.statuses} == {*shop_interfaces()} == every
