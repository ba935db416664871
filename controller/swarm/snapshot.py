"""What Swarm says, as values. Engine API objects (dicts) end here; the rest of the controller sees only these.

The parsers read the fields of Engine API 1.41 to 1.52 and raise nothing for a field that is absent, null or not
what it should be: then the value is empty. An object of the API that Swarm has not finished allocating, a service
without its VIPs or a network without its subnets, is a normal thing to read.
Field names and shapes: moby api/types/swarm and api/types/network, compared with what engine 20.10 answers.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Any

from hivewire.ids import ContainerId, NetworkId, NodeId, ServiceId, TaskId

STACK_LABEL = "com.docker.stack.namespace"
_VNIS = "com.docker.network.driver.overlay.vxlanid_list"
"""Option that Swarm gives to an overlay network (libnetwork netlabel.OverlayVxlanIDList)."""
VXLAN_PORT = 4789
"""Where VXLAN frames go, unless docker swarm init said otherwise (--data-path-port)."""

# States of a task in the order of its life (swarmkit api/types.proto, TaskState).
TASK_STATES = (
    "new", "allocated", "pending", "assigned", "accepted", "preparing", "ready", "starting",
    "running", "complete", "shutdown", "failed", "rejected", "remove", "orphaned",
)  # fmt: skip
FINISHED_STATES = frozenset(TASK_STATES[TASK_STATES.index("complete") :])


@dataclass(frozen=True, slots=True)
class Service:
    """A service's spec and endpoint, as far as the mesh is concerned."""

    id: ServiceId
    name: str
    stack: str
    """Empty where the service belongs to no stack."""
    labels: Mapping[str, str] = field(default_factory=dict)
    container_labels: Mapping[str, str] = field(default_factory=dict)
    networks: tuple[NetworkId, ...] = ()
    """Overlay networks that its tasks attach to, ingress left out; sorted."""
    vips: Mapping[NetworkId, IPv4Address] = field(default_factory=dict)
    host_network: bool = False
    publishes_ingress: bool = False
    is_updating: bool = False
    can_change_network: bool = False
    """Whether its containers have CAP_NET_ADMIN, which rules in their own namespace do not bind."""


@dataclass(frozen=True, slots=True)
class Network:
    id: NetworkId
    name: str
    driver: str = "overlay"
    subnets: tuple[IPv4Network, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    is_ingress: bool = False
    is_encrypted: bool = False
    is_dsr: bool = False
    vnis: tuple[int, ...] = ()
    """VXLAN identifiers, one for each subnet; sorted."""

    @property
    def is_host(self) -> bool:
        return self.driver == "host"

    @property
    def can_carry_links(self) -> bool:
        """Whether tasks get addresses on it that are unique in the cluster and that they use among themselves."""
        return self.driver == "overlay" and not self.is_ingress


@dataclass(frozen=True, slots=True)
class Node:
    id: NodeId
    hostname: str
    address: str = ""
    """Node.Status.Addr: what the manager saw; may be 0.0.0.0, a loopback or a translated address."""
    is_ready: bool = True
    is_manager: bool = False
    os: str = "linux"
    engine_version: str = ""


@dataclass(frozen=True, slots=True)
class Task:
    id: TaskId
    name: str
    """``<service>.<slot>``, or ``<service>.<node>`` for a global service: what people call it."""
    service: ServiceId
    node: NodeId
    state: str
    desired_state: str
    container: ContainerId
    addresses: Mapping[NetworkId, IPv4Address] = field(default_factory=dict)
    """Overlay addresses by network, ingress left out."""

    @property
    def is_finished(self) -> bool:
        return self.state in FINISHED_STATES

    @property
    def is_wanted(self) -> bool:
        """Whether Swarm wants it to run; false from the moment that it is being replaced or scaled away."""
        return self.desired_state in ("running", "ready") and not self.is_finished


@dataclass(frozen=True, slots=True)
class SwarmSnapshot:
    """One reading of the cluster: services, networks and nodes by id. Tasks are read apart, where needed."""

    cluster: str
    services: Mapping[ServiceId, Service] = field(default_factory=dict)
    networks: Mapping[NetworkId, Network] = field(default_factory=dict)
    nodes: Mapping[NodeId, Node] = field(default_factory=dict)
    vxlan_port: int = VXLAN_PORT


@dataclass(frozen=True, slots=True)
class Manager:
    """A manager as the engines know it; ``address`` has a port."""

    node: NodeId
    address: str


@dataclass(frozen=True, slots=True)
class SwarmInfo:
    """What an engine says of itself and of the cluster."""

    cluster: str
    """Empty on a worker: only managers know it."""
    node: NodeId
    hostname: str
    address: str
    """The address that this node advertises."""
    is_manager: bool
    managers: tuple[Manager, ...]
    engine_version: str
    vxlan_port: int = VXLAN_PORT


def parse_service(raw: Mapping[str, Any], networks: Mapping[NetworkId, Network]) -> Service:
    """A service of ``GET /services``.

    ``networks`` are all the cluster's networks, Swarm's own ``host`` included: the service itself does not say which
    of its networks are overlays. An attachment to a network that is not among them is left out.
    """
    spec = _dict(raw, "Spec")
    template = _dict(spec, "TaskTemplate")
    container = _dict(template, "ContainerSpec")
    endpoint = _dict(raw, "Endpoint")
    labels = _labels(spec.get("Labels"))
    attached = [networks[n] for n in attached_networks(raw) if n in networks]
    overlays = sorted({n.id for n in attached if n.can_carry_links})
    ports = [*_dicts(_dict(spec, "EndpointSpec"), "Ports"), *_dicts(endpoint, "Ports")]
    return Service(
        id=ServiceId(_text(raw, "ID")),
        name=_text(spec, "Name"),
        stack=labels.get(STACK_LABEL, ""),
        labels=labels,
        container_labels=_labels(container.get("Labels")),
        networks=tuple(overlays),
        vips=_vips(_dicts(endpoint, "VirtualIPs"), overlays),
        host_network=any(n.is_host for n in attached),
        publishes_ingress=any(port.get("PublishMode", "ingress") == "ingress" for port in ports),
        is_updating=_text(_dict(raw, "UpdateStatus"), "State") in ("updating", "rollback_started"),
        can_change_network=_has_net_admin(container.get("CapabilityAdd")),
    )


def attached_networks(raw: Mapping[str, Any]) -> tuple[NetworkId, ...]:
    """The ids of the networks that a service of ``GET /services`` asks for, in its own order."""
    spec = _dict(raw, "Spec")
    wanted = _dicts(_dict(spec, "TaskTemplate"), "Networks") or _dicts(spec, "Networks")
    return tuple(NetworkId(_text(item, "Target")) for item in wanted if _text(item, "Target"))


def parse_network(raw: Mapping[str, Any]) -> Network:
    """A network of ``GET /networks``. An option counts by being there, as it does for the overlay driver."""
    options = _labels(raw.get("Options"))
    configs = _dicts(_dict(raw, "IPAM"), "Config")
    subnets = (_subnet(_text(config, "Subnet")) for config in configs)
    return Network(
        id=NetworkId(_text(raw, "Id")),
        name=_text(raw, "Name"),
        driver=_text(raw, "Driver"),
        subnets=tuple(sorted(subnet for subnet in subnets if subnet is not None)),
        labels=_labels(raw.get("Labels")),
        is_ingress=raw.get("Ingress") is True,
        is_encrypted="encrypted" in options,
        is_dsr="dsr" in options,
        vnis=tuple(sorted(int(word) for word in options.get(_VNIS, "").split(",") if word.isdecimal())),
    )


def parse_node(raw: Mapping[str, Any]) -> Node:
    """A node of ``GET /nodes``."""
    description, status, manager = _dict(raw, "Description"), _dict(raw, "Status"), _dict(raw, "ManagerStatus")
    return Node(
        id=NodeId(_text(raw, "ID")),
        hostname=_text(description, "Hostname"),
        address=_text(status, "Addr"),
        is_ready=_text(status, "State") == "ready",
        is_manager=bool(manager) or _text(_dict(raw, "Spec"), "Role") == "manager",
        os=_text(_dict(description, "Platform"), "OS") or "linux",
        engine_version=_text(_dict(description, "Engine"), "EngineVersion"),
    )


def parse_task(raw: Mapping[str, Any], service_name: str = "") -> Task:
    """A task of ``GET /tasks``. The API does not name tasks: the name is made as ``docker service ps`` makes it."""
    service, node, slot = _text(raw, "ServiceID"), _text(raw, "NodeID"), raw.get("Slot")
    status = _dict(raw, "Status")
    return Task(
        id=TaskId(_text(raw, "ID")),
        name=f"{service_name or service}.{slot or node}",
        service=ServiceId(service),
        node=NodeId(node),
        state=_text(status, "State"),
        desired_state=_text(raw, "DesiredState"),
        container=ContainerId(_text(_dict(status, "ContainerStatus"), "ContainerID")),
        addresses=_addresses(_dicts(raw, "NetworksAttachments")),
    )


def parse_info(raw: Mapping[str, Any]) -> SwarmInfo:
    """The answer of ``GET /info``."""
    swarm = _dict(raw, "Swarm")
    managers = (Manager(NodeId(_text(m, "NodeID")), _text(m, "Addr")) for m in _dicts(swarm, "RemoteManagers"))
    return SwarmInfo(
        cluster=_text(_dict(swarm, "Cluster"), "ID"),
        node=NodeId(_text(swarm, "NodeID")),
        hostname=_text(raw, "Name"),
        address=_text(swarm, "NodeAddr"),
        is_manager=swarm.get("ControlAvailable") is True,
        managers=tuple(sorted(managers, key=lambda m: (m.node, m.address))),
        engine_version=_text(raw, "ServerVersion"),
        vxlan_port=port
        if isinstance(port := _dict(swarm, "Cluster").get("DataPathPort"), int) and port
        else VXLAN_PORT,
    )


def _vips(raw: Iterable[Mapping[str, Any]], overlays: Iterable[NetworkId]) -> dict[NetworkId, IPv4Address]:
    """VIPs of the overlays. Ingress has one too, and a network without addresses has an entry without one."""
    found = {NetworkId(_text(item, "NetworkID")): _address(_text(item, "Addr")) for item in raw}
    return {n: vip for n in overlays if (vip := found.get(n)) is not None}


def _addresses(raw: Iterable[Mapping[str, Any]]) -> dict[NetworkId, IPv4Address]:
    addresses = {}
    for item in raw:
        network = _dict(item, "Network")
        spec = _dict(network, "Spec")
        driver = _text(_dict(network, "DriverState"), "Name") or _text(_dict(spec, "DriverConfiguration"), "Name")
        if spec.get("Ingress") is True or driver not in ("", "overlay"):
            continue
        texts = item.get("Addresses")
        found = [_address(t) for t in texts if isinstance(t, str)] if isinstance(texts, list) else []
        first = next((address for address in found if address is not None), None)
        if first is not None:
            addresses[NetworkId(_text(network, "ID"))] = first
    return dict(sorted(addresses.items()))


def _has_net_admin(raw: object) -> bool:
    names = [str(name).upper().removeprefix("CAP_") for name in raw] if isinstance(raw, list) else []
    return "NET_ADMIN" in names or "ALL" in names


def _dict(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = raw.get(key)
    return value if isinstance(value, Mapping) else {}


def _dicts(raw: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    value = raw.get(key)
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _text(raw: Mapping[str, Any], key: str) -> str:
    value = raw.get(key)
    return value if isinstance(value, str) else ""


def _labels(raw: object) -> dict[str, str]:
    return {str(key): str(value) for key, value in raw.items()} if isinstance(raw, Mapping) else {}


def _address(text: str) -> IPv4Address | None:
    """The address of ``10.0.1.5/24``; None for what is not one, IPv6 included."""
    try:
        return IPv4Interface(text).ip
    except ValueError:
        return None


def _subnet(text: str) -> IPv4Network | None:
    try:
        return IPv4Network(text, strict=False)
    except ValueError:
        return None
