"""The etcd that the launcher starts: who may speak to it, and where."""

import os
import socket
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from controller.etcd import EtcdServerSettings, arguments, note_roots
from hivewire.errors import NoPermission
from hivewire.store.api import AddUser, EnableAccess, GiveRole, TlsCredentials
from hivewire.store.etcd import EtcdSettings, EtcdStore
from tests.contract.etcd_certificates import Authority, Leaf
from tests.contract.etcd_server import ABSENT, BINARY, free_ports, wait_until

pytestmark = pytest.mark.skipif(ABSENT is not None, reason=ABSENT or "")

_FILES = ("swarm-node.crt", "swarm-node.key", "swarm-root-ca.crt")


@dataclass
class Launched:
    """An etcd with the launcher's command line; `client` and `peer` are its ports on loopback."""

    folder: Path
    authority: Authority
    client: int
    peer: int
    process: "subprocess.Popen[bytes] | None" = None

    def command(self) -> list[str]:
        settings = EtcdServerSettings(
            certificates=self.folder, etcd_data=self.folder / "data", etcd_peer_port=self.peer
        )
        return [option.replace(":2379", f":{self.client}") for option in arguments(settings, "m1", "127.0.0.1")]

    def store(self, leaf: Leaf) -> EtcdStore:
        credentials = TlsCredentials(self.authority.pem, leaf.cert_pem, leaf.key_pem)
        return EtcdStore(EtcdSettings((f"127.0.0.1:{self.client}",), lambda: credentials))

    def ask(self, port: int, request: str, leaf: Leaf | None) -> str:
        """The status line of an HTTPS answer; empty where the connection is refused."""
        context = ssl.create_default_context(cadata=self.authority.pem.decode())
        if leaf:
            (self.folder / "asker").write_bytes(leaf.cert_pem + leaf.key_pem)
            context.load_cert_chain(self.folder / "asker")
        try:
            with (
                socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
                context.wrap_socket(plain, server_hostname="swarm-manager") as tls,
            ):
                tls.sendall(f"{request} HTTP/1.1\r\nHost: etcd\r\nContent-Length: 0\r\n\r\n".encode())
                return tls.recv(100).decode().partition("\r\n")[0]
        except OSError:
            return ""


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Launched]:
    authority = Authority()
    mine = authority.issue("m1", "swarm-manager")
    for name, pem in zip(_FILES, (mine.cert_pem, mine.key_pem, authority.pem), strict=True):
        (tmp_path / name).write_bytes(pem)
    found = Launched(tmp_path, authority, *free_ports(2))
    found.process = start(found)
    yield found
    stop(found)


def stop(launched: Launched) -> None:
    assert launched.process is not None
    launched.process.kill()
    launched.process.wait()


def start(launched: Launched) -> "subprocess.Popen[bytes]":
    command = [str(BINARY), *launched.command()[1:]]
    log = launched.folder / "etcd.log"
    environment = {**os.environ, "ETCD_UNSUPPORTED_ARCH": os.uname().machine}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)

    def answers() -> bool:
        assert process.poll() is None, log.read_text(errors="replace")[-3000:]
        manager = launched.authority.issue("m1", "swarm-manager")
        return launched.ask(launched.client, "GET /health", manager).endswith("200 OK")

    wait_until(answers, "etcd to be healthy")
    return process


def test_the_peer_port_speaks_to_managers_alone(launched: Launched) -> None:
    """Raft on loopback takes a manager's certificate: none, a worker's and another Swarm's are refused, HTTP too."""
    issue = launched.authority.issue
    members = "GET /members"
    assert launched.ask(launched.peer, members, issue("m2", "swarm-manager")).endswith("200 OK")
    stranger = Authority("stranger").issue("m1", "swarm-manager")
    for leaf in (None, issue("w1", "swarm-worker"), stranger):
        assert launched.ask(launched.peer, members, leaf) == ""
    with socket.create_connection(("127.0.0.1", launched.peer), timeout=10) as plain:
        plain.sendall(b"GET /members HTTP/1.1\r\nHost: etcd\r\n\r\n")
        assert b"200 OK" not in plain.recv(100)


def test_there_is_no_gateway(launched: Launched) -> None:
    """The HTTP gateway, which would ask etcd in the name of its own certificate, is not there."""
    worker = launched.authority.issue("w1", "swarm-worker")
    assert launched.ask(launched.client, "POST /v3/kv/range", worker).endswith("404 Not Found")


def test_the_user_is_the_name_in_the_certificate(launched: Launched) -> None:
    """With access control on, the node id in the certificate decides."""
    manager = launched.store(launched.authority.issue("m1", "swarm-manager"))
    for user in ("root", "m1"):
        for op in (AddUser(user), GiveRole(user, "root")):
            manager.change_access(op)
    manager.change_access(EnableAccess())
    manager.put("k", b"")
    worker = launched.store(launched.authority.issue("w1", "swarm-worker"))
    with pytest.raises(NoPermission):
        worker.get("k")
    manager.close()
    worker.close()


def test_data_of_a_member_with_a_plain_peer_port(tmp_path: Path, launched: Launched) -> None:
    """A volume that was begun before the peer port had TLS is taken over with what is in it."""
    other = Launched(tmp_path / "old", launched.authority, *free_ports(2))
    other.folder.mkdir()
    for name in _FILES:
        (other.folder / name).write_bytes((launched.folder / name).read_bytes())
    plain = [o.replace("https://127.0.0.1:" + str(other.peer), f"http://127.0.0.1:{other.peer}")
             for o in other.command() if not o.startswith("--peer-")]  # fmt: skip
    with (other.folder / "old.log").open("wb") as log:
        old = subprocess.Popen([str(BINARY), *plain[1:]], stdout=log, stderr=log)
    manager = launched.authority.issue("m1", "swarm-manager")
    wait_until(lambda: other.ask(other.client, "GET /health", manager).endswith("200 OK"), "the old etcd")
    store = other.store(manager)
    store.put("k", b"1")
    old.kill()
    old.wait()
    new = start(other)
    item = store.get("k")
    assert item is not None
    assert item.value == b"1"
    store.close()
    new.kill()
    new.wait()


def test_another_ca_takes_another_start(launched: Launched) -> None:
    """etcd keeps the roots that it began with: the health check of the stack file tells, and a start puts it right."""
    settings = EtcdServerSettings(identity_ca=launched.folder / _FILES[2], etcd_data=launched.folder)
    note_roots(settings)
    assert is_healthy(launched)
    launched.authority = Authority("another-ca")
    mine = launched.authority.issue("m1", "swarm-manager")
    for name, pem in zip(_FILES, (mine.cert_pem, mine.key_pem, launched.authority.pem), strict=True):
        (launched.folder / name).write_bytes(pem)
    renewed = launched.authority.issue("w1", "swarm-worker")
    assert launched.ask(launched.client, "GET /health", renewed) == "", "it knows the new root: the check is not needed"
    assert not is_healthy(launched)
    stop(launched)
    note_roots(settings)
    launched.process = start(launched)
    assert launched.ask(launched.client, "GET /health", renewed).endswith("200 OK")
    assert is_healthy(launched)


def is_healthy(launched: Launched) -> bool:
    """As the engine asks, with the paths of this test."""
    stack = yaml.safe_load((Path(__file__).parents[2] / "deploy" / "stack.yml").read_text())
    command = stack["services"]["etcd"]["healthcheck"]["test"].replace("$$", "$")
    assert "/var/lib/etcd" in command
    command = command.replace("/var/lib/etcd", str(launched.folder))
    environment = {**os.environ, "HIVEWIRE_IDENTITY_CA": str(launched.folder / _FILES[2])}
    return subprocess.run(["sh", "-c", command], env=environment, check=False).returncode == 0
