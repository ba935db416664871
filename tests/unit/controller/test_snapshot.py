"""Engine API objects become values; the samples have the shapes of engines 20.10 (1.41) and 29 (1.52)."""

import json
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest

from controller.swarm.snapshot import (
    Manager,
    Network,
    Node,
    Service,
    SwarmInfo,
    Task,
    attached_networks,
    parse_info,
    parse_network,
    parse_node,
    parse_service,
    parse_task,
)
from hivewire.ids import ContainerId, NetworkId, NodeId, ServiceId, TaskId

INGRESS, APP, HOST = NetworkId("ingressid"), NetworkId("appid"), NetworkId("hostid")

NETWORK_1_41 = json.loads("""{
  "Name": "shop_app", "Id": "appid", "Created": "2026-01-05T07:00:16.734392804Z", "Scope": "swarm",
  "Driver": "overlay", "EnableIPv6": false,
  "IPAM": {"Driver": "default", "Options": null, "Config": [{"Subnet": "10.0.1.0/24", "Gateway": "10.0.1.1"}]},
  "Internal": false, "Attachable": false, "Ingress": false, "ConfigFrom": {"Network": ""}, "ConfigOnly": false,
  "Containers": null,
  "Options": {"com.docker.network.driver.overlay.vxlanid_list": "4097", "encrypted": ""},
  "Labels": {"hivewire.guard": "strict"}
}""")

NETWORK_1_52 = json.loads("""{
  "Name": "shop_app", "Id": "appid", "Created": "2026-01-05T07:00:16.734392804Z", "Scope": "swarm",
  "Driver": "overlay", "EnableIPv4": true, "EnableIPv6": true,
  "IPAM": {"Driver": "default", "Options": {}, "Config": [
    {"Subnet": "fd00:1::/64", "Gateway": "fd00:1::1"}, {"Subnet": "10.0.1.0/24", "Gateway": "10.0.1.1"}]},
  "Internal": false, "Attachable": true, "Ingress": false, "ConfigFrom": {"Network": ""}, "ConfigOnly": false,
  "Options": {"com.docker.network.driver.overlay.vxlanid_list": "4097", "encrypted": "", "dsr": "1"},
  "Labels": {"hivewire.guard": "strict"},
  "Status": {"IPAM": {"Subnets": {"10.0.1.0/24": {"IPsInUse": 4, "DynamicIPsAvailable": 252}}}}
}""")

HOST_NETWORK = json.loads("""{
  "Name": "host", "Id": "hostid", "Scope": "swarm", "Driver": "host",
  "IPAM": {"Driver": "", "Options": null, "Config": []}, "Ingress": false, "Options": null,
  "Labels": {"com.docker.swarm.predefined": "true"}
}""")

NETWORKS = {
    APP: Network(id=APP, name="shop_app", subnets=(IPv4Network("10.0.1.0/24"),)),
    INGRESS: Network(id=INGRESS, name="ingress", is_ingress=True),
    HOST: Network(id=HOST, name="host", driver="host"),
}

SERVICE_1_41 = json.loads("""{
  "ID": "webid", "Version": {"Index": 102},
  "CreatedAt": "2026-01-05T07:00:42.624166091Z", "UpdatedAt": "2026-01-05T07:00:42.624964Z",
  "Spec": {
    "Name": "shop_web",
    "Labels": {"com.docker.stack.namespace": "shop", "hivewire.links": "api:80"},
    "TaskTemplate": {
      "ContainerSpec": {"Image": "nginx:1.29", "Labels": {"hivewire.ports": "1"}, "Init": false, "DNSConfig": {},
                        "Isolation": "default", "CapabilityAdd": ["CAP_NET_ADMIN"]},
      "Resources": {"Limits": {}, "Reservations": {}}, "Placement": {},
      "Networks": [{"Target": "appid", "Aliases": ["web"]}], "ForceUpdate": 0, "Runtime": "container"},
    "Mode": {"Replicated": {"Replicas": 2}},
    "EndpointSpec": {"Mode": "vip", "Ports": [
      {"Protocol": "tcp", "TargetPort": 80, "PublishedPort": 8080, "PublishMode": "ingress"}]}},
  "Endpoint": {
    "Spec": {"Mode": "vip", "Ports": [
      {"Protocol": "tcp", "TargetPort": 80, "PublishedPort": 8080, "PublishMode": "ingress"}]},
    "Ports": [{"Protocol": "tcp", "TargetPort": 80, "PublishedPort": 8080, "PublishMode": "ingress"}],
    "VirtualIPs": [{"NetworkID": "ingressid", "Addr": "10.0.0.3/24"}, {"NetworkID": "appid", "Addr": "10.0.1.2/24"}]},
  "UpdateStatus": {"State": "updating", "StartedAt": "2026-01-05T07:00:42Z", "Message": "update in progress"}
}""")

TASK_1_41 = json.loads("""{
  "ID": "taskid", "Version": {"Index": 29}, "CreatedAt": "2026-01-05T07:00:16.79Z", "Labels": {},
  "Spec": {"ContainerSpec": {"Image": "nginx:1.29"}, "Networks": [{"Target": "appid"}], "ForceUpdate": 0},
  "ServiceID": "webid", "Slot": 2, "NodeID": "nodeid",
  "Status": {"Timestamp": "2026-01-05T07:00:17.3Z", "State": "running", "Message": "started",
             "ContainerStatus": {"ContainerID": "c0ffee", "PID": 4711, "ExitCode": 0}, "PortStatus": {}},
  "DesiredState": "running",
  "NetworksAttachments": [
    {"Network": {"ID": "ingressid", "Spec": {"Name": "ingress", "DriverConfiguration": {}, "Ingress": true,
       "Scope": "swarm"}, "DriverState": {"Name": "overlay"}}, "Addresses": ["10.0.0.7/24"]},
    {"Network": {"ID": "appid", "Spec": {"Name": "shop_app", "DriverConfiguration": {"Name": "overlay"},
       "Scope": "swarm"}, "DriverState": {"Name": "overlay",
       "Options": {"com.docker.network.driver.overlay.vxlanid_list": "4099"}}}, "Addresses": ["10.0.1.5/24"]},
    {"Network": {"ID": "hostid", "Spec": {"Name": "host", "DriverConfiguration": {"Name": "host"}, "Scope": "swarm"},
       "DriverState": {"Name": "host"}, "IPAMOptions": {"Driver": {}}}}]
}""")

NODE_1_41 = json.loads("""{
  "ID": "nodeid", "Version": {"Index": 9}, "Spec": {"Labels": {}, "Role": "manager", "Availability": "active"},
  "Description": {"Hostname": "n1", "Platform": {"Architecture": "x86_64", "OS": "linux"},
    "Resources": {"NanoCPUs": 2000000000, "MemoryBytes": 25276502016},
    "Engine": {"EngineVersion": "20.10.24", "Plugins": [{"Type": "Network", "Name": "overlay"}]}},
  "Status": {"State": "ready", "Addr": "10.77.0.1"},
  "ManagerStatus": {"Leader": true, "Reachability": "reachable", "Addr": "10.77.0.1:2377"}
}""")

INFO_1_41 = json.loads("""{
  "ID": "ABCD:EFGH", "Name": "n1", "ServerVersion": "20.10.24", "OperatingSystem": "Debian GNU/Linux 12 (bookworm)",
  "Swarm": {"NodeID": "nodeid", "NodeAddr": "10.77.0.1", "LocalNodeState": "active", "ControlAvailable": true,
    "Error": "", "RemoteManagers": [{"NodeID": "other", "Addr": "10.77.0.2:2377"},
    {"NodeID": "nodeid", "Addr": "10.77.0.1:2377"}], "Nodes": 3, "Managers": 2,
    "Cluster": {"ID": "clusterid", "Version": {"Index": 10}, "Spec": {"Name": "default"}}}
}""")


def changed(raw: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """A copy of the object in which the field at ``a.b.c`` has another value; None takes it away."""
    copy: dict[str, Any] = json.loads(json.dumps(raw))
    *way, last = path.split(".")
    place = copy
    for key in way:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return copy


def test_a_network_of_1_41() -> None:
    """Subnet, labels and the driver's options are read; an option counts by being there."""
    assert parse_network(NETWORK_1_41) == Network(
        id=APP,
        name="shop_app",
        subnets=(IPv4Network("10.0.1.0/24"),),
        labels={"hivewire.guard": "strict"},
        is_encrypted=True,
        vnis=(4097,),
    )


@pytest.mark.parametrize(("written", "vnis"), [("4099,4097", (4097, 4099)), ("", ()), ("4097,x", (4097,))])
def test_the_vxlan_identifiers_of_a_network(written: str, vnis: tuple[int, ...]) -> None:
    """One for each subnet, in order; what is no number is none."""
    options = {"com.docker.network.driver.overlay.vxlanid_list": written}
    assert parse_network({"Options": options}).vnis == vnis


@pytest.mark.parametrize(("cluster", "port"), [({"DataPathPort": 7777}, 7777), ({"DataPathPort": 0}, 4789), ({}, 4789)])
def test_the_port_of_vxlan_frames(cluster: dict[str, Any], port: int) -> None:
    """The one that the Swarm was made with, else the usual one."""
    assert parse_info({"Swarm": {"Cluster": cluster}}).vxlan_port == port


def test_a_network_of_1_52() -> None:
    """New fields do no harm, IPv6 subnets are left out, dsr is recognised."""
    parsed = parse_network(NETWORK_1_52)
    assert parsed.subnets == (IPv4Network("10.0.1.0/24"),)
    assert (parsed.is_encrypted, parsed.is_dsr, parsed.is_ingress) == (True, True, False)


def test_the_host_network_is_known_by_its_driver() -> None:
    """Swarm's own network for host can carry no link."""
    parsed = parse_network(HOST_NETWORK)
    assert parsed.is_host
    assert not parsed.can_carry_links


def test_a_service_of_1_41() -> None:
    """Both kinds of labels, the overlay without ingress, the VIP there, ports, capability and update are read."""
    assert parse_service(SERVICE_1_41, NETWORKS) == Service(
        id=ServiceId("webid"),
        name="shop_web",
        stack="shop",
        labels={"com.docker.stack.namespace": "shop", "hivewire.links": "api:80"},
        container_labels={"hivewire.ports": "1"},
        networks=(APP,),
        vips={APP: IPv4Address("10.0.1.2")},
        publishes_ingress=True,
        is_updating=True,
        can_change_network=True,
    )


@pytest.mark.parametrize(
    ("path", "value", "field", "expected"),
    [
        ("Spec.EndpointSpec.Ports", [{"TargetPort": 80, "PublishMode": "host"}], "publishes_ingress", True),
        ("UpdateStatus", None, "is_updating", False),
        ("UpdateStatus.State", "completed", "is_updating", False),
        ("UpdateStatus.State", "rollback_started", "is_updating", True),
        ("UpdateStatus.State", "paused", "is_updating", False),
        ("Spec.TaskTemplate.ContainerSpec.CapabilityAdd", ["ALL"], "can_change_network", True),
        ("Spec.TaskTemplate.ContainerSpec.CapabilityAdd", ["net_admin"], "can_change_network", True),
        ("Spec.TaskTemplate.ContainerSpec.CapabilityAdd", ["CAP_SYS_ADMIN"], "can_change_network", False),
        ("Spec.TaskTemplate.Networks", [{"Target": "hostid"}], "host_network", True),
        ("Spec.TaskTemplate.Networks", [{"Target": "hostid"}], "networks", ()),
        ("Spec.TaskTemplate.Networks", [{"Target": "ingressid"}, {"Target": "appid"}], "networks", (APP,)),
        ("Spec.TaskTemplate.Networks", [{"Target": "gone"}], "networks", ()),
        ("Spec.TaskTemplate.Networks", None, "networks", ()),
        ("Endpoint", {"Spec": {}}, "vips", {}),
        ("Endpoint.VirtualIPs", [{"NetworkID": "appid"}], "vips", {}),
        ("Endpoint.VirtualIPs", [{"NetworkID": "appid", "Addr": "fd00::2/64"}], "vips", {}),
        ("Spec.Labels", {}, "stack", ""),
    ],
)
def test_variants_of_a_service(path: str, value: object, field: str, expected: object) -> None:
    """Each field that may be absent or otherwise is read for what it is."""
    assert getattr(parse_service(changed(SERVICE_1_41, path, value), NETWORKS), field) == expected


def test_networks_of_an_old_spec() -> None:
    """A spec of before API 1.25 has its networks beside the task template."""
    old = changed(changed(SERVICE_1_41, "Spec.TaskTemplate.Networks", None), "Spec.Networks", [{"Target": "appid"}])
    assert attached_networks(old) == (APP,)


def test_a_task_of_1_41() -> None:
    """The name is made from service and slot; ingress and host give no address."""
    assert parse_task(TASK_1_41, "shop_web") == Task(
        id=TaskId("taskid"),
        name="shop_web.2",
        service=ServiceId("webid"),
        node=NodeId("nodeid"),
        state="running",
        desired_state="running",
        container=ContainerId("c0ffee"),
        addresses={APP: IPv4Address("10.0.1.5")},
    )


def test_a_task_of_1_52_with_two_families() -> None:
    """Of several addresses on a network the first IPv4 one counts."""
    raw = json.loads(json.dumps(TASK_1_41))
    raw["NetworksAttachments"][1]["Addresses"] = ["fd00:1::5/64", "10.0.1.5/24", "10.0.1.6/24"]
    assert parse_task(raw).addresses == {APP: IPv4Address("10.0.1.5")}


def test_a_task_of_a_global_service() -> None:
    """Without a slot the node is in the name."""
    assert parse_task(changed(TASK_1_41, "Slot", None), "shop_web").name == "shop_web.nodeid"


def test_a_new_task_has_no_container() -> None:
    """Before it starts a task has neither container nor, at first, node and addresses."""
    raw = {"ID": "t", "ServiceID": "s", "Slot": 1, "Status": {"State": "new"}, "DesiredState": "running"}
    parsed = parse_task(raw)
    assert (parsed.container, parsed.node, parsed.addresses, parsed.is_wanted) == ("", "", {}, True)


def test_a_node_of_1_41() -> None:
    """Role, state, system and engine of a node are read."""
    assert parse_node(NODE_1_41) == Node(
        id=NodeId("nodeid"),
        hostname="n1",
        address="10.77.0.1",
        is_ready=True,
        is_manager=True,
        os="linux",
        engine_version="20.10.24",
    )


def test_a_windows_worker_that_is_down() -> None:
    """A worker has no manager status; a node that is not ready says so."""
    raw = changed(changed(NODE_1_41, "ManagerStatus", None), "Spec.Role", "worker")
    raw = changed(changed(raw, "Description.Platform.OS", "windows"), "Status.State", "down")
    parsed = parse_node(raw)
    assert (parsed.is_manager, parsed.is_ready, parsed.os) == (False, False, "windows")


def test_the_info_of_a_manager() -> None:
    """A manager tells the cluster's id, itself and all managers, in order."""
    assert parse_info(INFO_1_41) == SwarmInfo(
        cluster="clusterid",
        node=NodeId("nodeid"),
        hostname="n1",
        address="10.77.0.1",
        is_manager=True,
        managers=(Manager(NodeId("nodeid"), "10.77.0.1:2377"), Manager(NodeId("other"), "10.77.0.2:2377")),
        engine_version="20.10.24",
    )


def test_the_info_of_an_engine_without_swarm() -> None:
    """An engine outside of a cluster is no manager and knows none."""
    raw = {"Name": "n1", "ServerVersion": "29.0.0", "Swarm": {"LocalNodeState": "inactive", "RemoteManagers": None}}
    parsed = parse_info(raw)
    assert (parsed.cluster, parsed.is_manager, parsed.managers) == ("", False, ())


@pytest.mark.parametrize("junk", [{}, {"Spec": None}, {"Spec": []}, {"Spec": {"TaskTemplate": "x", "Labels": 3}}])
def test_absent_and_strange_fields_are_empty(junk: dict[str, Any]) -> None:
    """A field that is absent or not what it should be makes an empty value, never an exception."""
    assert parse_service(junk, NETWORKS).networks == ()
    assert parse_network(junk).subnets == ()
    assert parse_node(junk).hostname == ""
    assert parse_task(junk).addresses == {}
    assert parse_info(junk).managers == ()
