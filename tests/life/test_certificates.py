"""Swarm's certificates under traffic: renewal, another CA, autolock. No request fails, and all is signed anew."""

from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID
from proof.claims import WEB
from proof.deployed import STACK, Deployed, wait_for

from hivewire.errors import InvalidRecord
from hivewire.identity import SWARM_CERTIFICATES
from hivewire.records import LEADER_KEY, writer_of
from tests.attack.foothold import Foothold
from tests.attack.mutations import kind_of
from tests.e2e.test_mesh import all_peers_right, interface_ids, steady_requests

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


def leaf(mesh: Deployed, name: str) -> x509.Certificate:
    """The certificate of a node, as it is in its file now."""
    pem = mesh.lab.exec(name, "cat", f"{SWARM_CERTIFICATES}/swarm-node.crt").stdout
    return x509.load_pem_x509_certificates(pem.encode())[0]


def roots(mesh: Deployed, name: str) -> str:
    return mesh.lab.exec(name, "cat", f"{SWARM_CERTIFICATES}/swarm-root-ca.crt").stdout


def _node(certificate: x509.Certificate) -> str:
    return str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def unsigned(mesh: Deployed, folder: Path) -> list[str]:
    """What who reads with a node's present files does not believe, or what its own node signed with an earlier one."""
    found = []
    reader = Foothold(mesh, mesh.manager, folder)
    present = {_node(it): it.not_valid_before_utc for it in (leaf(mesh, node.name) for node in mesh.lab.nodes)}
    for key, value in reader.records().items():
        if key == LEADER_KEY:
            continue
        try:
            signed = reader.signatures.verify(kind_of(key), key, value)
        except InvalidRecord as error:
            found.append(f"{key}: {error}")
            continue
        owner = writer_of(key)
        if owner is not None and present.get(owner, signed.signer.valid_from) != signed.signer.valid_from:
            found.append(f"{key}: signed with an earlier certificate of its node")
    return found


def test_a_renewal_signs_anew(mesh: Deployed, tmp_path: Path) -> None:
    """A node gets another certificate of the same CA, twice, as it is promoted and demoted: nothing fails."""
    node = mesh.lab.nodes[1].name
    before, interfaces = leaf(mesh, node), interface_ids(mesh)
    with steady_requests(mesh, mesh.tasks(WEB)[0]) as wrong:
        mesh.docker("node", "promote", node)
        wait_for("the manager's certificate", lambda: leaf(mesh, node).serial_number != before.serial_number, 60)
        reachable = ("node", "inspect", "-f", "{{with .ManagerStatus}}{{.Reachability}}{{end}}", node)
        wait_for("the second manager", lambda: mesh.docker(*reachable).strip() == "reachable", 60)
        promoted = leaf(mesh, node)
        mesh.docker("node", "demote", node)
        wait_for("a worker's certificate", lambda: leaf(mesh, node).serial_number != promoted.serial_number, 90)
        wait_for("all signed anew", lambda: unsigned(mesh, tmp_path) == [], 120, 1)
        mesh.wait_ready(120)
    assert wrong == []
    assert interface_ids(mesh) == interfaces
    wait_for("all peers", lambda: all_peers_right(mesh), 60)


@pytest.mark.parametrize("turn", [1, 2])
def test_another_ca_under_traffic(mesh: Deployed, tmp_path: Path, turn: int) -> None:
    """`docker swarm ca --rotate`, and once more: two roots for a while, then the new one alone; all that is stored is
    signed by it, everybody has connected anew, no request failed and no interface was touched.
    """
    old, interfaces = roots(mesh, mesh.manager), interface_ids(mesh)
    with steady_requests(mesh, mesh.tasks(WEB)[0]) as wrong:
        mesh.docker("swarm", "ca", "--rotate", "--quiet", timeout_s=300)
        for node in mesh.lab.nodes:
            wait_for("the new root alone", lambda n=node.name: _is_new(old, roots(mesh, n)), 120)
        wait_for("all signed anew", lambda: unsigned(mesh, tmp_path) == [], 180, 1)
        mesh.wait_ready(180)
        mesh.update("demo_spy", "--force")  # a new task claims, and is heard of
        mesh.wait_ready(120)
    assert wrong == []
    assert interface_ids(mesh) == interfaces
    wait_for("all peers", lambda: all_peers_right(mesh), 60)
    print(f"turn {turn}")


def _is_new(old: str, now: str) -> bool:
    return now.count("BEGIN CERTIFICATE") == 1 and now.strip() != old.strip()


def test_autolock_is_said_and_links_go_on(mesh: Deployed) -> None:
    """A locked Swarm encrypts the key of its managers: who starts there says so and both ways out, and links go on."""
    key = f"{SWARM_CERTIFICATES}/swarm-node.key"
    interfaces = interface_ids(mesh)
    before = {task.container for task in mesh.tasks(f"{STACK}_controller")}
    with steady_requests(mesh, mesh.tasks(WEB)[0]) as wrong:
        mesh.docker("swarm", "update", "--autolock=true")
        try:
            wait_for("the key encrypted", lambda: "ENCRYPTED" in mesh.lab.exec(mesh.manager, "cat", key).stdout, 60)
            mesh.docker("service", "update", "--detach", "--force", f"{STACK}_controller")
            said = wait_for("the error", lambda: _last_words(mesh, before), 120)
            print(said)
            assert "is encrypted, because the Swarm is locked (autolock)" in said
            assert "HIVEWIRE_IDENTITY_CERT" in said
            assert "docker swarm update --autolock=false" in said
        finally:
            mesh.docker("swarm", "update", "--autolock=false")
        wait_for("the key in clear", lambda: "ENCRYPTED" not in mesh.lab.exec(mesh.manager, "cat", key).stdout, 60)
        wait_for("a controller", lambda: mesh.tasks(f"{STACK}_controller"), 120)
        mesh.wait_ready(180)
    assert wrong == []
    assert interface_ids(mesh) == interfaces


def _last_words(mesh: Deployed, before: set[str]) -> str:
    """The log of a controller's container that has ended since."""
    ours = f"label=com.docker.swarm.service.name={STACK}_controller"
    listed = mesh.lab.docker(mesh.manager, "ps", "-aq", "--no-trunc", "--filter", ours, "--filter", "status=exited")
    for container in listed.stdout.split():
        if container not in before:
            done = mesh.lab.docker(mesh.manager, "logs", container, check=False)
            if "autolock" in done.stdout + done.stderr:
                return done.stdout + done.stderr
    return ""
