"""What every Swarm must do, asked of the in-memory one and of a real cluster.

The real half runs where HIVEWIRE_TEST_DOCKER_HOST names the engine of a manager, such as unix:///run/docker.sock, and
leaves no service and no network of its own behind; the end-to-end tests run it on each engine of the lab.
HIVEWIRE_TEST_IMAGE is an image that the nodes have and that holds ``sleep``; without it, busybox.
"""

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import docker
import pytest

from controller.swarm.api import EventKind, Swarm, SwarmEvent
from controller.swarm.client import SwarmClient
from controller.swarm.snapshot import STACK_LABEL, Service, SwarmSnapshot, Task
from hivewire.errors import Gone, TaskGone
from hivewire.ids import NetworkId, ServiceId, TaskId
from tests.fakes.swarm import FakeSwarm

HOST_VARIABLE = "HIVEWIRE_TEST_DOCKER_HOST"
IMAGE_VARIABLE = "HIVEWIRE_TEST_IMAGE"
QUIET_S = 3.0
PATIENCE_S = 60.0


class Cluster(Protocol):
    """A Swarm to ask, with the levers that the cases need."""

    swarm: Swarm
    prefix: str
    """Of every name that the cases make, so that a real cluster may hold other things."""

    def add_network(self, name: str, options: Sequence[str] = ()) -> NetworkId: ...

    def add_service(
        self,
        name: str,
        labels: Mapping[str, str],
        networks: Sequence[NetworkId],
        *,
        replicas: int | None = 1,
        container_labels: Mapping[str, str] | None = None,
        is_dnsrr: bool = False,
        host_network: bool = False,
        publishes_ingress: bool = False,
        can_change_network: bool = False,
    ) -> ServiceId: ...

    def set_labels(self, service: ServiceId, labels: Mapping[str, str]) -> None: ...

    def set_container_labels(self, service: ServiceId, labels: Mapping[str, str]) -> None: ...

    def scale(self, service: ServiceId, replicas: int) -> None: ...

    def remove_service(self, service: ServiceId) -> None: ...

    def until(self, is_so: Callable[[], bool]) -> None:
        """Let the cluster go on until it is so; fail where that takes too long."""
        ...


class FakeCluster:
    """The in-memory Swarm."""

    prefix = "hwt"

    def __init__(self) -> None:
        self.fake = FakeSwarm()
        self.fake.add_node("n2")
        self.swarm: Swarm = self.fake

    def add_network(self, name: str, options: Sequence[str] = ()) -> NetworkId:
        return self.fake.add_network(name, is_encrypted="encrypted" in options, is_dsr="dsr" in options)

    def add_service(
        self, name: str, labels: Mapping[str, str], networks: Sequence[NetworkId], **options: Any
    ) -> ServiceId:
        plain = {key: value for key, value in labels.items() if key != STACK_LABEL}
        stack = labels.get(STACK_LABEL, "")
        return self.fake.add_service(name, plain, stack=stack, networks=networks, **options)

    def set_labels(self, service: ServiceId, labels: Mapping[str, str]) -> None:
        self.fake.set_labels(service, labels)

    def set_container_labels(self, service: ServiceId, labels: Mapping[str, str]) -> None:
        self.fake.set_container_labels(service, labels)

    def scale(self, service: ServiceId, replicas: int) -> None:
        self.fake.scale(service, replicas)

    def remove_service(self, service: ServiceId) -> None:
        self.fake.remove_service(service)

    def until(self, is_so: Callable[[], bool]) -> None:
        self.fake.settle()
        assert is_so()


class RealCluster:
    """A manager of a real Swarm."""

    def __init__(self, url: str) -> None:
        self.prefix = f"hwt{uuid.uuid4().hex[:8]}"
        self.swarm: Swarm = SwarmClient(url, quiet_s=QUIET_S)
        self._api = docker.APIClient(base_url=url, version="auto")
        self._image = os.environ.get(IMAGE_VARIABLE, "busybox")

    def add_network(self, name: str, options: Sequence[str] = ()) -> NetworkId:
        made = self._api.create_network(name, driver="overlay", options=dict.fromkeys(options, ""))
        return NetworkId(made["Id"])

    def add_service(
        self,
        name: str,
        labels: Mapping[str, str],
        networks: Sequence[NetworkId],
        *,
        replicas: int | None = 1,
        container_labels: Mapping[str, str] | None = None,
        is_dnsrr: bool = False,
        host_network: bool = False,
        publishes_ingress: bool = False,
        can_change_network: bool = False,
    ) -> ServiceId:
        host = [self._api.inspect_network("host", scope="swarm")["Id"]] if host_network else []
        container = {
            "Image": self._image,
            "Command": ["sleep", "3600"],
            "StopGracePeriod": 100_000_000,
            "Labels": dict(container_labels or {}),
            "CapabilityAdd": ["CAP_NET_ADMIN"] if can_change_network else [],
        }
        template = {"ContainerSpec": container, "Networks": [{"Target": n} for n in (*networks, *host)]}
        endpoint: dict[str, Any] = {"Mode": "dnsrr" if is_dnsrr else "vip"}
        if publishes_ingress:
            endpoint["Ports"] = [{"Protocol": "tcp", "TargetPort": 80, "PublishMode": "ingress"}]
        mode: dict[str, Any] = {"Global": {}} if replicas is None else {"Replicated": {"Replicas": replicas}}
        made = self._api.create_service(template, name=name, labels=dict(labels), mode=mode, endpoint_spec=endpoint)
        return ServiceId(made["ID"])

    def set_labels(self, service: ServiceId, labels: Mapping[str, str]) -> None:
        old = self._api.inspect_service(service)["Spec"].get("Labels") or {}
        kept = {key: value for key, value in old.items() if key == STACK_LABEL}
        self._update(service, labels=dict(labels) | kept)

    def set_container_labels(self, service: ServiceId, labels: Mapping[str, str]) -> None:
        template = self._api.inspect_service(service)["Spec"]["TaskTemplate"]
        template["ContainerSpec"]["Labels"] = dict(labels)
        self._update(service, task_template=template)

    def scale(self, service: ServiceId, replicas: int) -> None:
        self._update(service, mode={"Replicated": {"Replicas": replicas}})

    def remove_service(self, service: ServiceId) -> None:
        self._api.remove_service(service)

    def until(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not is_so():
            assert time.monotonic() < deadline, "the cluster does not get there"
            time.sleep(0.1)  # a real cluster sends no event for tasks

    def clean_up(self) -> None:
        for service in self._api.services():
            if service["Spec"]["Name"].startswith(self.prefix):
                self._api.remove_service(service["ID"])
        # The name filter takes a part of a name only for networks that the node has already.
        for network in self._api.networks():
            if not network["Name"].startswith(self.prefix):
                continue
            self.until(lambda network=network: self._removed(network["Id"]))  # type: ignore[misc]
        self._api.close()

    def _removed(self, network: str) -> bool:
        """Whether the network is gone: it cannot go before the last container has."""
        try:
            self._api.remove_network(network)
        except docker.errors.NotFound:
            return True
        except docker.errors.APIError:
            return False
        return True

    def _update(self, service: ServiceId, **changes: Any) -> None:
        """Send the whole spec back, changed, as the docker command does.

        Retries where Swarm itself changed the service in between, as it does when it allocates VIPs. docker-py's own
        ``fetch_current_spec`` sends Swarm's defaults back as well, and that replaces every task.
        """
        for _ in range(20):
            known = self._api.inspect_service(service)
            spec, version = known["Spec"], known["Version"]["Index"]
            whole = {
                "task_template": spec["TaskTemplate"],
                "name": spec["Name"],
                "labels": spec.get("Labels"),
                "mode": spec["Mode"],
                "endpoint_spec": spec.get("EndpointSpec"),
            }
            try:
                self._api.update_service(service, version, **(whole | changes))
            except docker.errors.APIError as error:
                if "out of sequence" not in str(error):
                    raise
            else:
                return
        raise AssertionError("the service changes all the time")


@pytest.fixture(params=["fake", *(["real"] if HOST_VARIABLE in os.environ else [])])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    if request.param == "fake":
        yield FakeCluster()
        return
    real = RealCluster(os.environ[HOST_VARIABLE])
    yield real
    real.clean_up()


def read(cluster: Cluster, service: ServiceId) -> Service:
    """The service from a snapshot, which is how the controller reads it."""
    return cluster.swarm.snapshot().services[service]


def allocated(cluster: Cluster, service: ServiceId) -> Service:
    """The service when it has all of its VIPs."""
    cluster.until(lambda: set(read(cluster, service).vips) == set(read(cluster, service).networks))
    return read(cluster, service)


def running(cluster: Cluster, service: ServiceId, count: int) -> tuple[Task, ...]:
    """The tasks of the service when as many as that run, and no others are wanted."""

    def is_so() -> bool:
        tasks = cluster.swarm.tasks(service)
        return len(tasks) == count and all(t.state == "running" for t in tasks)

    cluster.until(is_so)
    return cluster.swarm.tasks(service)


def test_a_snapshot_names_the_cluster_and_its_nodes(cluster: Cluster) -> None:
    """The snapshot has the cluster's id, and each node with its name, its engine and whether it is ready."""
    snapshot = cluster.swarm.snapshot()
    assert snapshot.cluster
    assert all(n.hostname and n.engine_version and n.os == "linux" for n in snapshot.nodes.values())
    assert any(n.is_manager and n.is_ready for n in snapshot.nodes.values())


def test_info_says_where_this_is(cluster: Cluster) -> None:
    """A manager knows the cluster's id, itself, its address and all managers with their ports."""
    info, snapshot = cluster.swarm.info(), cluster.swarm.snapshot()
    assert info.is_manager
    assert info.cluster == snapshot.cluster
    assert snapshot.nodes[info.node].hostname == info.hostname
    mine = next(m.address for m in info.managers if m.node == info.node)
    assert mine == f"{info.address}:2377"


def test_a_service_is_read_with_its_labels_and_vips(cluster: Cluster) -> None:
    """Labels of the service and of the container stay apart; each overlay network has a VIP of its subnet."""
    name = f"{cluster.prefix}_web"
    network = cluster.add_network(f"{cluster.prefix}_app")
    labels = {"hivewire.links": "api:80", STACK_LABEL: cluster.prefix}
    made = cluster.add_service(name, labels, [network], container_labels={"hivewire.ports": "80"})
    service = allocated(cluster, made)
    assert (service.id, service.name, service.stack) == (made, name, cluster.prefix)
    assert dict(service.labels) == labels
    assert dict(service.container_labels) == {"hivewire.ports": "80"}
    assert service.networks == (network,)
    assert not service.host_network
    assert not service.can_change_network
    [subnet] = cluster.swarm.snapshot().networks[network].subnets
    assert service.vips[network] in subnet
    assert cluster.swarm.service(made) == service


def test_options_of_networks_are_read(cluster: Cluster) -> None:
    """Encrypted and dsr networks are told apart from plain ones; ingress is known as such."""
    made = {
        "plain": cluster.add_network(f"{cluster.prefix}_plain"),
        "encrypted": cluster.add_network(f"{cluster.prefix}_sec", ["encrypted"]),
        "dsr": cluster.add_network(f"{cluster.prefix}_dsr", ["dsr"]),
    }
    # An engine may list what it has just made a moment later (seen on 26.1).
    cluster.until(lambda: set(made.values()) <= cluster.swarm.snapshot().networks.keys())
    networks = cluster.swarm.snapshot().networks
    assert [name for name, i in made.items() if networks[i].is_encrypted] == ["encrypted"]
    assert [name for name, i in made.items() if networks[i].is_dsr] == ["dsr"]
    assert [n.name for n in networks.values() if n.is_ingress] == ["ingress"]


def test_a_dnsrr_service_has_no_vip(cluster: Cluster) -> None:
    """With DNS round robin there is no VIP, and the network is there all the same."""
    network = cluster.add_network(f"{cluster.prefix}_app")
    made = cluster.add_service(f"{cluster.prefix}_rr", {}, [network], is_dnsrr=True)
    running(cluster, made, 1)
    service = read(cluster, made)
    assert service.networks == (network,)
    assert service.vips == {}


def test_a_host_network_service_has_no_overlay(cluster: Cluster) -> None:
    """The host network is recognised though no list of networks has it."""
    made = cluster.add_service(f"{cluster.prefix}_host", {}, [], host_network=True)
    service = read(cluster, made)
    assert service.host_network
    assert service.networks == ()
    assert cluster.swarm.service(made).host_network


def test_ingress_is_no_network_of_a_service(cluster: Cluster) -> None:
    """A published port brings an address and a VIP on ingress; neither is shown, only that it publishes."""
    network = cluster.add_network(f"{cluster.prefix}_app")
    made = cluster.add_service(f"{cluster.prefix}_pub", {}, [network], publishes_ingress=True)
    service = allocated(cluster, made)
    [task] = running(cluster, made, 1)
    assert service.publishes_ingress
    assert service.networks == (network,)
    assert set(service.vips) == {network}
    assert set(task.addresses) == {network}


def test_the_right_to_change_the_network_is_read(cluster: Cluster) -> None:
    """A service whose containers get CAP_NET_ADMIN is recognised."""
    made = cluster.add_service(f"{cluster.prefix}_adm", {}, [], can_change_network=True)
    assert read(cluster, made).can_change_network


def test_tasks_have_names_slots_and_addresses(cluster: Cluster) -> None:
    """Tasks are called service.slot, run on a node of the snapshot, and have an address of each overlay subnet."""
    name = f"{cluster.prefix}_api"
    network = cluster.add_network(f"{cluster.prefix}_app")
    made = cluster.add_service(name, {}, [network], replicas=2)
    tasks = running(cluster, made, 2)
    snapshot = cluster.swarm.snapshot()
    [subnet] = snapshot.networks[network].subnets
    assert sorted(t.name for t in tasks) == [f"{name}.1", f"{name}.2"]
    assert all(t.node in snapshot.nodes and t.service == made and t.container and t.is_wanted for t in tasks)
    addresses = {t.addresses[network] for t in tasks}
    assert len(addresses) == 2
    assert all(a in subnet for a in addresses)
    assert snapshot.services[made].vips[network] not in addresses
    assert [cluster.swarm.task(t.id) for t in tasks] == list(tasks)


def test_tasks_of_a_global_service_are_named_by_node(cluster: Cluster) -> None:
    """A global service has one task on each ready node, called service.node."""
    name = f"{cluster.prefix}_glob"
    ready = [n.id for n in cluster.swarm.snapshot().nodes.values() if n.is_ready]
    made = cluster.add_service(name, {}, [], replicas=None)
    tasks = running(cluster, made, len(ready))
    assert sorted(t.name for t in tasks) == sorted(f"{name}.{node}" for node in ready)


def test_new_labels_replace_no_task(cluster: Cluster) -> None:
    """After a change of the service's labels the same tasks run on: links change with no restart."""
    made = cluster.add_service(f"{cluster.prefix}_web", {"hivewire.links": "a:1"}, [])
    before = running(cluster, made, 1)
    cluster.set_labels(made, {"hivewire.links": "b:2"})
    cluster.until(lambda: read(cluster, made).labels.get("hivewire.links") == "b:2")
    assert running(cluster, made, 1) == before


def test_a_new_task_template_replaces_every_task(cluster: Cluster) -> None:
    """After a change of the container's labels other tasks run, and the old ones are no longer wanted."""
    made = cluster.add_service(f"{cluster.prefix}_web", {}, [])
    [before] = running(cluster, made, 1)
    cluster.set_container_labels(made, {"some": "label"})

    def is_replaced() -> bool:
        return before.id not in {t.id for t in cluster.swarm.tasks(made)}

    cluster.until(is_replaced)
    [after] = running(cluster, made, 1)
    assert after.name == before.name
    assert not cluster.swarm.task(before.id).is_wanted


def test_scaling_makes_and_retires_tasks(cluster: Cluster) -> None:
    """Scaling up keeps what runs; scaling down leaves the lower number of wanted tasks."""
    made = cluster.add_service(f"{cluster.prefix}_web", {}, [])
    [first] = running(cluster, made, 1)
    cluster.scale(made, 3)
    assert first in running(cluster, made, 3)
    cluster.scale(made, 1)
    running(cluster, made, 1)


def test_a_removed_service_is_gone(cluster: Cluster) -> None:
    """Asked for by id, a removed service and its tasks are gone; its list of tasks is empty."""
    made = cluster.add_service(f"{cluster.prefix}_web", {}, [])
    [task] = running(cluster, made, 1)
    cluster.remove_service(made)
    cluster.until(lambda: made not in cluster.swarm.snapshot().services)
    with pytest.raises(Gone):
        cluster.swarm.service(made)
    cluster.until(lambda: _is_gone(cluster, task))
    assert cluster.swarm.tasks(made) == ()
    assert cluster.swarm.tasks(made, desired=frozenset()) == ()


def test_what_never_was_is_gone(cluster: Cluster) -> None:
    """An unknown id is answered like one that has left."""
    with pytest.raises(TaskGone):
        cluster.swarm.task(TaskId("nosuchtask"))
    with pytest.raises(Gone):
        cluster.swarm.service(ServiceId("nosuchservice"))
    assert cluster.swarm.tasks(ServiceId("nosuchservice")) == ()


def test_events_tell_of_services_and_networks(cluster: Cluster) -> None:
    """A subscription begins with SUBSCRIBED, tells of what is made, changed and removed, and ends when it is quiet."""
    network_name, name = f"{cluster.prefix}_app", f"{cluster.prefix}_web"
    events = cluster.swarm.events()
    assert next(events) == SwarmEvent(EventKind.SUBSCRIBED)
    network = cluster.add_network(network_name)
    service = cluster.add_service(name, {}, [])
    cluster.set_labels(service, {"hivewire.mode": "observe"})
    cluster.remove_service(service)
    seen = list(events)
    assert SwarmEvent(EventKind.NETWORK, "create", network, network_name) in seen
    of_service = [event.action for event in seen if event.id == service]
    assert of_service[0] == "create"
    assert "update" in of_service
    assert of_service[-1] == "remove"


def test_no_event_tells_of_tasks(cluster: Cluster) -> None:
    """That a task starts is announced by nobody: all events of a new service are the service's own."""
    events = cluster.swarm.events()
    next(events)
    made = cluster.add_service(f"{cluster.prefix}_web", {}, [])
    [task] = running(cluster, made, 1)
    assert task.id not in {event.id for event in events}


def test_threads_may_ask_at_the_same_time(cluster: Cluster) -> None:
    """Four threads that read at once all get an answer."""
    made = cluster.add_service(f"{cluster.prefix}_web", {}, [])
    seen: list[SwarmSnapshot] = []
    threads = [threading.Thread(target=lambda: seen.append(cluster.swarm.snapshot())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert [made in snapshot.services for snapshot in seen] == [True] * 4


def _is_gone(cluster: Cluster, task: Task) -> bool:
    try:
        cluster.swarm.task(task.id)
    except TaskGone:
        return True
    return False
