"""The kernel's WireGuard as the agent uses it: backend, sockets, modules."""

import json
import re
from pathlib import Path

import pytest
from proof import claims
from proof.claims import API, DB, WEB
from proof.deployed import STACK, Deployed

from tests.kernel.modules import LOADED_BEFORE, loaded

pytestmark = pytest.mark.e2e

CAP_SYS_MODULE = 16  # include/uapi/linux/capability.h
SOCKET = re.compile(r"^\S+\s+\d+\s+\d+\s+(\S+):(\d+)\s", re.MULTILINE)


def udp_ports(listing: str) -> set[int]:
    """The local ports in what `ss -Hnua` printed, but those of Docker's name server."""
    return {int(port) for address, port in SOCKET.findall(listing) if address != "127.0.0.11"}


def test_every_node_uses_the_kernels_wireguard(mesh: Deployed) -> None:
    """`auto`, the default, takes the kernel's; no wireguard-go runs."""
    nodes = mesh.ask("node", "ls")["items"]
    assert [node["backend"] for node in nodes] == ["kernel"] * len(mesh.lab.nodes)
    for task in (*mesh.tasks(WEB), *mesh.tasks(API), *mesh.tasks(DB)):
        link = json.loads(mesh.in_namespace(task, "ip", "-j", "-d", "link", "show", "wg0"))[0]
        assert link["linkinfo"]["info_kind"] == "wireguard"
    for node in mesh.lab.nodes:
        assert mesh.lab.exec(node.name, "pgrep", "-x", "wireguard-go", check=False).stdout == ""


def test_a_device_has_its_socket_on_the_node_and_none_in_the_task(mesh: Deployed) -> None:
    """Each device's port is open in the node's namespace; the task's has no UDP socket that packets could come to."""
    claims.chain_answers(mesh)
    on_node = {node.name: udp_ports(mesh.lab.exec(node.name, "ss", "-Hnua").stdout) for node in mesh.lab.nodes}
    for task in (*mesh.tasks(WEB), *mesh.tasks(API), *mesh.tasks(DB)):
        port = int(mesh.in_namespace(task, "wg", "show", "wg0", "listen-port"))
        assert port in on_node[task.node], f"{task.name}: {port} is not open on {task.node}"
        assert udp_ports(mesh.in_namespace(task, "ss", "-Hnua")) == set(), task.name


def test_the_kernel_loads_its_modules_for_an_agent_that_may_not(mesh: Deployed) -> None:
    """No module of WireGuard was there before; the agents, without CAP_SYS_MODULE, made devices nevertheless."""
    assert "wireguard" not in LOADED_BEFORE, "loaded before any agent ran: nothing is shown"
    assert "wireguard" in loaded()
    for agent in mesh.tasks(f"{STACK}_agent"):
        pid = mesh.inspect(agent)["State"]["Pid"]
        status = mesh.lab.exec(agent.node, "cat", f"/proc/{pid}/status").stdout
        for kind in ("CapPrm", "CapEff", "CapBnd"):
            (word,) = re.findall(rf"^{kind}:\s+([0-9a-f]+)$", status, re.MULTILINE)
            assert not int(word, 16) >> CAP_SYS_MODULE & 1, f"{agent.name}: {kind} has CAP_SYS_MODULE"
    print("loaded since then:", *sorted(loaded() - LOADED_BEFORE))
    assert Path("/proc/sys/kernel/modprobe").read_text().strip(), "the kernel cannot load anything by itself"
