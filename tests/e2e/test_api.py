"""The API for other machines, on a real Swarm: TLS with the manager's own certificate, asked from another node."""

import json
import secrets
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from proof.deployed import STACK, Deployed, Task, wait_for

pytestmark = pytest.mark.e2e

CONTROLLER = f"{STACK}_controller"
ROOTS = "/var/lib/docker/swarm/certificates/swarm-root-ca.crt"
TOKENS = {role: secrets.token_hex(32) for role in ("viewer", "operator", "admin")}


@pytest.fixture(scope="module")
def elsewhere(mesh: Deployed) -> Iterator[Task]:
    """The API on all addresses, and a container on a worker from which to ask; a secret has the tokens.

    The container is read-only, but for its shared memory.
    """
    tokens = "".join(f"{role}:{token}\n" for role, token in TOKENS.items())
    mesh.lab.docker(mesh.manager, "secret", "create", "api_tokens", "-", text_in=tokens)
    given = ("--secret-add", "source=api_tokens,target=admin_token")
    mesh.update(CONTROLLER, "--env-add", "HIVEWIRE_API_HOST=0.0.0.0", *given)
    try:
        wait_for("the new controller", lambda: _has_socket(mesh), 90)
        mesh.wait_ready()
        here = mesh.tasks(CONTROLLER)[0].node
        agent = next(task for task in mesh.tasks(f"{STACK}_agent") if task.node != here)
        for role, token in TOKENS.items():
            into = ("exec", "-i", agent.container, "sh", "-c", f"umask 077; cat > /dev/shm/{role}")
            mesh.lab.docker(agent.node, *into, text_in=token)
        yield agent
    finally:
        mesh.update(CONTROLLER, "--env-rm", "HIVEWIRE_API_HOST", "--secret-rm", "api_tokens")
        wait_for("the controller as it was", lambda: mesh.tasks(CONTROLLER) and not _has_socket(mesh), 90)
        mesh.wait_ready()
        mesh.docker("secret", "rm", "api_tokens")


def _has_socket(mesh: Deployed) -> bool:
    found = mesh.tasks(CONTROLLER)
    test = ("exec", found[0].container, "test", "-S", "/run/hivewire/api.sock") if len(found) == 1 else ()
    return bool(test) and mesh.lab.docker(found[0].node, *test, check=False).returncode == 0


def url(mesh: Deployed, scheme: str = "https") -> str:
    return f"{scheme}://{mesh.lab.node(mesh.tasks(CONTROLLER)[0].node).address}:9480"


def ask(mesh: Deployed, agent: Task, role: str, *words: str, ca: str = ROOTS) -> subprocess.CompletedProcess[str]:
    options = ("--url", url(mesh), "--ca", ca, "--token-file", f"/dev/shm/{role}")
    command = ("exec", agent.container, "hivewire", *options, *words)
    done: subprocess.CompletedProcess[str] = mesh.lab.docker(agent.node, *command, check=False)
    return done


def test_another_node_asks_over_tls(mesh: Deployed, elsewhere: Task) -> None:
    """With the Swarm's root CA and a token of its own; roles hold, and the audit says who tried what from where."""
    answer: dict[str, Any] = json.loads(ask(mesh, elsewhere, "viewer", "-o", "json", "status").stdout)
    assert answer["services"]["meshed"] > 0
    claims = json.loads(ask(mesh, elsewhere, "viewer", "-o", "json", "claims").stdout)["items"]
    assert {it["state"] for it in claims} == {"admitted"}
    refused = ask(mesh, elsewhere, "viewer", "release", "service", "nobody")
    assert (refused.returncode, "role operator or admin is needed" in refused.stderr) == (4, True)
    audit = json.loads(ask(mesh, elsewhere, "admin", "-o", "json", "audit").stdout)["items"]
    address = str(mesh.lab.node(elsewhere.node).address)
    assert (audit[0]["role"], audit[0]["result"], audit[0]["address"]) == ("viewer", "refused", address)


def test_in_clear_nothing_answers(mesh: Deployed, elsewhere: Task) -> None:
    """Neither from another node nor from its own; the commands in the container have their socket."""
    get = (
        "import http.client,sys; c=http.client.HTTPConnection(sys.argv[1],9480,timeout=5);"
        "c.request('GET','/livez'); c.getresponse()"
    )
    address = url(mesh).removeprefix("https://").removesuffix(":9480")
    for where in (address, "127.0.0.1"):
        task = elsewhere if where == address else mesh.tasks(CONTROLLER)[0]
        command = ("exec", task.container, "/opt/hivewire/bin/python", "-c", get, where)
        done = mesh.lab.docker(task.node, *command, check=False)
        assert done.returncode != 0
        assert "RemoteDisconnected" in done.stderr or "ConnectionReset" in done.stderr
    assert mesh.cli("healthcheck") == "ok\n"


def test_a_ca_that_did_not_issue_it(mesh: Deployed, elsewhere: Task) -> None:
    """The machine's own CAs do not know a Swarm: the command ends before the token is sent, and says what to give."""
    done = ask(mesh, elsewhere, "admin", "status", ca="/etc/ssl/certs/ca-certificates.crt")
    assert (done.returncode, "not trusted" in done.stderr, "--ca" in done.stderr) == (3, True, True)


def test_metrics_take_a_token_from_elsewhere(mesh: Deployed, elsewhere: Task) -> None:
    """A Prometheus server reads them with a viewer's token; without one it gets 401."""
    script = (
        "import http.client,socket,ssl,sys; c=ssl.create_default_context(cafile=sys.argv[2]);"
        "s=c.wrap_socket(socket.create_connection((sys.argv[1],9480),5),server_hostname='swarm-manager');"
        "h=http.client.HTTPConnection(sys.argv[1]); h.sock=s;"
        "t={'Authorization':'Bearer '+open(sys.argv[3]).read()} if sys.argv[3:] else {};"
        "h.request('GET','/metrics',headers=t); r=h.getresponse(); print(r.status); print(r.read().decode())"
    )
    address = url(mesh).removeprefix("https://").removesuffix(":9480")
    command = ("/opt/hivewire/bin/python", "-c", script, address, ROOTS)
    assert mesh.exec(elsewhere, *command).startswith("401\n")
    text = mesh.exec(elsewhere, *command, "/dev/shm/viewer")
    assert text.startswith("200\n")
    for line in (
        "hivewire_leader 1.0",
        'hivewire_nodes{state="agent_missing"} 0.0',
        'expiry_timestamp_seconds{purpose="api"}',
    ):
        assert line in text
