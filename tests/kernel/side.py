"""Two pairs on one overlay network: `caller` and `meshed` are linked, `guest` and `free` have no label at all."""

import json
from dataclasses import dataclass
from pathlib import Path

from lab.images import Images
from proof.deployed import Deployed, Task, wait_for

STACK = "side"
NETWORK = "side"
CALLER, MESHED, GUEST, FREE = (f"{STACK}_{name}" for name in ("caller", "meshed", "guest", "free"))

# Neither may have a `$` in it, which stack files replace.
SERVER = """
import socket, threading
def serve(client, address):
    with client:
        client.sendall((address[0] + chr(10)).encode())
        while data := client.recv(65536):
            client.sendall(data)
listener = socket.create_server(('', 8080), backlog=64)
while True:
    threading.Thread(target=serve, args=listener.accept(), daemon=True).start()
"""
"""Says which address it sees, then echoes."""

CLIENT = "import signal; signal.sigwait({signal.SIGTERM})"
"""Waits; what it does is executed in its container."""

ASK = """
import json, socket, sys
host, times, text = sys.argv[1], int(sys.argv[2]), sys.argv[3].encode()
seen = []
for _ in range(times):
    with socket.create_connection((host, 8080), 20) as channel:
        answer = channel.makefile('rb')
        seen.append(answer.readline().decode().strip())
        channel.sendall(text)
        assert answer.read(len(text)) == text
print(json.dumps(seen))
"""
"""As many connections as told, one after the other; prints the addresses that the servers saw."""


@dataclass(frozen=True, slots=True)
class Side:
    """The stack on a network that is encrypted by Swarm or not."""

    mesh: Deployed

    @classmethod
    def deployed(cls, mesh: Deployed, *network_options: str) -> "Side":
        """Make the network and the services, and wait until all run and the mesh is configured."""
        mesh.docker("network", "create", "--driver", "overlay", *network_options, NETWORK)
        env = {"SIDE_NETWORK": NETWORK, "SIDE_CLIENT": CLIENT, "SIDE_SERVER": SERVER}
        env["HIVEWIRE_DEMO_IMAGE"] = Images().demo
        mesh.docker("stack", "deploy", "-c", str(Path(__file__).with_name("side.yml")), STACK, env=env)
        others = len(mesh.lab.nodes) - 1
        for service, count in ((CALLER, 1), (MESHED, others), (GUEST, 1), (FREE, others)):
            wait_for(f"the tasks of {service}", lambda s=service, n=count: len(mesh.tasks(s)) == n, 90)
        mesh.wait_ready(90)
        return cls(mesh)

    def remove(self) -> None:
        self.mesh.remove(STACK)
        wait_for(
            "the network gone",
            lambda: (
                self.mesh.lab.docker(self.mesh.manager, "network", "rm", NETWORK, check=False).returncode == 0
                or NETWORK not in self.mesh.docker("network", "ls", "--format", "{{.Name}}").split()
            ),
            60,
        )

    def task(self, service: str) -> Task:
        """The only task of a client service, or the first one of a server."""
        return self.mesh.tasks(service)[0]

    def address(self, service: str) -> str:
        """The overlay address of the only task of a client service."""
        (address,) = self.mesh.addresses(self.task(service))
        return address

    def vip(self, service: str) -> str:
        """The service's virtual address on the network."""
        network = self.mesh.docker("network", "inspect", "-f", "{{.ID}}", NETWORK).strip()
        template = "{{range .Endpoint.VirtualIPs}}{{.NetworkID}} {{.Addr}}\n{{end}}"
        lines = self.mesh.docker("service", "inspect", "-f", template, service).splitlines()
        return next(line.split()[1].split("/")[0] for line in lines if line.startswith(network))

    def balancer(self, node: str) -> str:
        """The address of Swarm's balancer on a node: the source of what its IPVS passes on."""
        template = "{{range $name, $it := .Containers}}{{$name}} {{$it.IPv4Address}}\n{{end}}"
        lines = self.mesh.lab.docker(node, "network", "inspect", "-f", template, NETWORK).stdout.splitlines()
        return next(line.split()[1].split("/")[0] for line in lines if line.startswith("lb-"))

    def balanced(self, node: str) -> str:
        """What IPVS has in the balancer's namespace on a node, as the kernel prints it."""
        network = self.mesh.docker("network", "inspect", "-f", "{{.ID}}", NETWORK).strip()
        path = f"/run/docker/netns/lb_{network[:9]}"
        return self.mesh.lab.exec(node, "nsenter", f"--net={path}", "cat", "/proc/net/ip_vs").stdout

    def ask(self, client: str, host: str, times: int = 4, text: str = "hello") -> list[str]:
        """Connect so often from a client; the addresses that the servers saw. Raises CommandFailed where one fails."""
        seen: list[str] = json.loads(
            self.mesh.exec(self.task(client), "python3", "-c", ASK, host, str(times), text, timeout_s=120)
        )
        return seen
