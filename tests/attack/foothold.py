"""A foothold on a node of the lab: its certificate to sign with, its connection to etcd, what is seen of it."""

import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from proof.claims import API, DB, WEB
from proof.deployed import STACK, Deployed, Task, wait_for

from hivewire.errors import InvalidRecord, UnverifiedRecord
from hivewire.identity import SWARM_CERTIFICATES, IdentityFiles, IdentitySource
from hivewire.ids import NodeId, ServiceId
from hivewire.records import ROOT, Record
from hivewire.signed import Managers, SwarmSignatures
from tests.attack.mutations import kind_of

SERVICES = (WEB, API, DB)
HANDS = Path(__file__).with_name("hands.py")


class Foothold:
    """Root on a node: signs with its certificate, and speaks to etcd from there with it."""

    def __init__(self, mesh: Deployed, name: str, folder: Path) -> None:
        self.mesh, self.name, self.folder = mesh, name, folder
        self.node = node_id(mesh, name)
        self.read_certificate()

    def read_certificate(self) -> None:
        """As it is now: Swarm renews it."""
        files = IdentityFiles.in_folder(self.folder / self.name)
        files.roots.parent.mkdir(parents=True, exist_ok=True)
        for path in (files.certificate, files.key, files.roots):
            fresh = path.with_suffix(".new")
            fresh.write_text(self.mesh.lab.exec(self.name, "cat", f"{SWARM_CERTIFICATES}/{path.name}").stdout)
            fresh.replace(path)
        manager = node_id(self.mesh, self.mesh.manager)
        self.files = files
        self.signatures = SwarmSignatures(IdentitySource(files), Managers(lambda: frozenset({manager})))

    def do(self, *calls: tuple[object, ...], folder: str = "") -> list[tuple[str, str, bytes]]:
        """What etcd said to each call; bytes among the arguments are values."""
        server = next(iter(self.mesh.tasks(f"{STACK}_etcd")))
        endpoint = f"{self.mesh.lab.node(server.node).address}:2379"
        coded = [[base64.b64encode(it).decode() if isinstance(it, bytes) else it for it in call] for call in calls]
        words = json.dumps({"endpoint": endpoint, "calls": coded, "folder": folder})
        said = self.mesh.lab.exec(self.name, sys.executable, str(HANDS), text_in=words, timeout_s=240).stdout
        return [(status, detail, base64.b64decode(value)) for status, detail, value in json.loads(said)]

    def refused(self, *call: object) -> str:
        """That etcd refuses this one, and in which words."""
        ((status, detail, _),) = self.do(call)
        assert status == "PERMISSION_DENIED", (call[:2], status, detail)
        return detail

    def done(self, *call: object) -> str:
        ((status, detail, _),) = self.do(call)
        assert status == "OK", (call[:2], status, detail)
        return detail

    def put(self, key: str, value: bytes) -> None:
        self.done("put", key, value)

    def get(self, key: str) -> bytes:
        return self.do(("get", key))[0][2]

    def delete(self, key: str) -> None:
        self.done("delete", key)

    def records(self) -> dict[str, bytes]:
        """All of ours."""
        found = json.loads(self.do(("list", ROOT))[0][2])
        return {key: base64.b64decode(value) for key, value in found.items()}

    def believes(self, key: str, value: bytes) -> bool:
        """Whether this is a record that who may write the key has signed."""
        try:
            self.signatures.verify(kind_of(key), key, value)
        except InvalidRecord:
            return False
        return True

    def is_mended(self, kind: type[Record], key: str, *, was_there: bool = True) -> bool:
        """Whether a manager's record is below the key again, or nothing where nothing was."""
        if not was_there:
            return not self.get(key)
        try:
            self.signatures.verify(kind, key, self.get(key))
        except UnverifiedRecord:
            return False
        return True


def node_id(mesh: Deployed, name: str) -> NodeId:
    return NodeId(mesh.docker("node", "inspect", "-f", "{{.ID}}", name).strip())


def service_id(mesh: Deployed, name: str) -> ServiceId:
    return ServiceId(mesh.docker("service", "inspect", "-f", "{{.ID}}", name).strip())


def agent(mesh: Deployed, node: str) -> Task:
    return next(task for task in mesh.tasks(f"{STACK}_agent") if task.node == node)


def held(mesh: Deployed, *but: Task) -> dict[str, tuple[str, ...]]:
    """What the kernels hold for every task of the demo: peers, routes, rules. No secret is in it."""
    found = {}
    for task in (task for service in SERVICES for task in mesh.tasks(service) if task not in but):
        peers = "\n".join(f"{key} {peer['allowed_ips']}" for key, peer in sorted(mesh.wireguard(task).items()))
        routes = mesh.in_namespace(task, "ip", "route", "show", "dev", "wg0")
        found[task.name] = (peers, "\n".join(sorted(routes.splitlines())), rules(mesh, task))
    return found


def rules(mesh: Deployed, task: Task) -> str:
    """What the table says of itself: the digest of its text and how much of it there is. The image's nft made it."""
    listing = ("nft", "list", "table", "inet", "hivewire")
    listed = mesh.exec(agent(mesh, task.node), "nsenter", f"--net={mesh.sandbox(task)}", *listing)
    return next(line.strip() for line in listed.splitlines() if "comment" in line)


def logs(mesh: Deployed, service: str, tail: int = 800) -> str:
    done = mesh.lab.docker(mesh.manager, "service", "logs", "--raw", "--tail", str(tail), f"{STACK}_{service}")
    return done.stdout + done.stderr  # the log of a container stays on the stream that it was written to


def bugs(mesh: Deployed) -> list[str]:
    """Lines of a log that tell of an error that nobody thought of."""
    lines = (logs(mesh, "controller", 4000) + logs(mesh, "agent", 4000)).splitlines()
    return [line for line in lines if ".bug" in line or "Traceback" in line]


def refusal_of(mesh: Deployed, task: str, node: NodeId, reason: str) -> str:
    """Wait until `hivewire claims --refused` says why this claim is refused; the reason."""

    def find() -> str:
        rows: list[dict[str, Any]] = mesh.ask("claims", "--refused")["items"]
        return next(
            (r["reason"] for r in rows if (r["task"], r["node_id"]) == (task, node) and reason in r["reason"]), ""
        )

    return wait_for(f"the refusal {reason!r} of {task}", find, 30)


def finding_about(mesh: Deployed, key: str) -> Callable[[], bool]:
    return lambda: any(key in it["message"] for it in mesh.ask("findings")["items"])


def on_worker(mesh: Deployed, folder: Path) -> Foothold:
    """On the last node: no other test's demo depends on its coming back."""
    return Foothold(mesh, mesh.lab.nodes[-1].name, folder)


@pytest.fixture(scope="session")
def hold(mesh: Deployed, tmp_path_factory: pytest.TempPathFactory) -> Foothold:
    """A worker's root."""
    return on_worker(mesh, tmp_path_factory.mktemp("hold"))


@pytest.fixture(scope="session")
def manager(mesh: Deployed, tmp_path_factory: pytest.TempPathFactory) -> Foothold:
    """Who writes anything to etcd, as with a manager's credentials; what it signs, a worker signed."""
    return Foothold(mesh, mesh.manager, tmp_path_factory.mktemp("manager"))
