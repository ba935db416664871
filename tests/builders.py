"""Short ways to make the values that tests need. What a test does not mention has a plain default."""

from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network

from controller.swarm.snapshot import STACK_LABEL, Network, Node, Service, SwarmSnapshot, Task
from hivewire.ids import ContainerId, NetworkId, NodeId, ServiceId, TaskId
from hivewire.records import Link, PortRange, Protocol


def service_id(name: str) -> ServiceId:
    """Ids sort otherwise than names, as Swarm's do."""
    return ServiceId(f"{name[::-1]}-id")


def network_id(name: str) -> NetworkId:
    return NetworkId(f"net-{name}")


def node_id(name: str) -> NodeId:
    return NodeId(f"node-{name}")


def service(
    name: str,
    labels: Mapping[str, str] | None = None,
    *,
    networks: Iterable[str] = ("shop_app",),
    container_labels: Mapping[str, str] | None = None,
    stack: str | None = None,
    vips: Mapping[str, str] | None = None,
    host_network: bool = False,
    publishes_ingress: bool = False,
    can_change_network: bool = False,
) -> Service:
    """``shop_web`` is the service web of the stack shop, unless ``stack`` says something else."""
    if stack is None:
        stack = name.split("_", 1)[0] if "_" in name else ""
    return Service(
        id=service_id(name),
        name=name,
        stack=stack,
        labels=dict(labels or {}) | ({STACK_LABEL: stack} if stack else {}),
        container_labels=dict(container_labels or {}),
        networks=tuple(sorted(network_id(n) for n in networks)),
        vips={network_id(n): IPv4Address(vip) for n, vip in (vips or {}).items()},
        host_network=host_network,
        publishes_ingress=publishes_ingress,
        can_change_network=can_change_network,
    )


def network(
    name: str,
    subnet: str = "10.1.0.0/24",
    *,
    is_ingress: bool = False,
    is_encrypted: bool = False,
    is_dsr: bool = False,
    driver: str = "overlay",
) -> Network:
    return Network(
        id=network_id(name),
        name=name,
        driver=driver,
        subnets=(IPv4Network(subnet),),
        is_ingress=is_ingress,
        is_encrypted=is_encrypted,
        is_dsr=is_dsr,
    )


def node(name: str, *, os: str = "linux", is_ready: bool = True, is_manager: bool = False) -> Node:
    return Node(id=node_id(name), hostname=name, address="10.77.0.1", is_ready=is_ready, is_manager=is_manager, os=os)


def task(
    service_name: str,
    slot: int = 1,
    *,
    on: str = "n1",
    state: str = "running",
    desired_state: str = "running",
    addresses: Mapping[str, str] | None = None,
) -> Task:
    return Task(
        id=TaskId(f"task-{service_name}-{slot}"),
        name=f"{service_name}.{slot}",
        service=service_id(service_name),
        node=node_id(on),
        state=state,
        desired_state=desired_state,
        container=ContainerId(f"container-{service_name}-{slot}"),
        addresses={network_id(n): IPv4Address(a) for n, a in (addresses or {}).items()},
    )


def snapshot(
    *services: Service, networks: Iterable[Network] | None = None, nodes: Iterable[Node] = ()
) -> SwarmSnapshot:
    """Without ``networks``: plain overlays of the names that the services use."""
    if networks is None:
        names = sorted({n.removeprefix("net-") for s in services for n in s.networks})
        networks = [network(name, f"10.{index}.0.0/24") for index, name in enumerate(names, 1)]
    return SwarmSnapshot(
        cluster="cluster-1",
        services={s.id: s for s in services},
        networks={n.id: n for n in networks},
        nodes={n.id: n for n in nodes},
    )


def ports(text: str) -> PortRange:
    """``80``, ``80-90``, ``53/udp``."""
    span, _, protocol = text.partition("/")
    first, _, last = span.partition("-")
    return PortRange(protocol=Protocol(protocol or "tcp"), first=int(first), last=int(last or first))


def link(name: str, *written: str, network: str = "shop_app", vip: str = "") -> Link:
    return Link(
        service=service_id(name),
        name=name,
        network=network_id(network),
        ports=tuple(ports(text) for text in written),
        vip=IPv4Address(vip) if vip else None,
    )
