"""Where private keys and tokens must not be: after a demo with traffic, all of them are looked for everywhere.

A canary is a secret in one encoding. Nothing here prints one: a hit is told as its kind and its place.
"""

import base64
import json
import os
import re
import secrets
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from lab.images import Images
from proof import claims
from proof.deployed import STACK, Deployed, wait_for

from hivewire.identity import strip_pem_headers

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Canary:
    kind: str
    text: bytes = field(repr=False)


def encodings(kind: str, raw: bytes) -> Iterator[Canary]:
    yield Canary(f"{kind}, raw", raw)
    yield Canary(f"{kind}, hex", raw.hex().encode())
    yield Canary(f"{kind}, HEX", raw.hex().upper().encode())
    yield Canary(f"{kind}, base64", base64.b64encode(raw).rstrip(b"="))


def node_keys(mesh: Deployed) -> Iterator[Canary]:
    for node in mesh.lab.nodes:
        kind = f"key of node {node.name}"
        pem = strip_pem_headers((node.data / "swarm/certificates/swarm-node.key").read_bytes())
        key = load_pem_private_key(pem, None)
        assert isinstance(key, EllipticCurvePrivateKey)
        yield from encodings(f"{kind}, scalar", key.private_numbers().private_value.to_bytes(32, "big"))
        for name, form in (("SEC1", PrivateFormat.TraditionalOpenSSL), ("PKCS8", PrivateFormat.PKCS8)):
            yield from encodings(f"{kind}, DER {name}", key.private_bytes(Encoding.DER, form, NoEncryption()))
        # A line of the PEM body that holds a part of the scalar, whatever stands between the lines.
        for number, line in enumerate(pem.splitlines()[1:3]):
            yield Canary(f"{kind}, line {number} of PEM", line)


def wireguard_keys(mesh: Deployed) -> Iterator[Canary]:
    """Read from the devices by this process itself, so that no other program has them in its output."""
    for service in (claims.WEB, claims.API, claims.DB):
        for task in mesh.tasks(service):
            alias = json.loads(mesh.in_namespace(task, "ip", "-j", "link", "show", "wg0"))[0].get("ifalias", "")
            if ":" in alias:
                node = mesh.lab.node(task.node)
                folder = node.data / "volumes" / f"{STACK}_wireguard" / "_data"
                answer = _uapi(folder / f"{alias.split(':', 1)[1]}.sock")
                found = re.search(r"^private_key=([0-9a-f]{64})$", answer, re.MULTILINE)
                raw = bytes.fromhex(found[1]) if found else b""
            else:
                raw = base64.b64decode(mesh.in_namespace(task, "wg", "show", "wg0", "private-key"))
            assert len(raw) == 32, f"the device of {task.name} shows no private key"
            yield from encodings(f"WireGuard key of {task.name}", raw)


def _uapi(path: Path) -> str:
    descriptor = os.open(path, os.O_PATH)
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(f"/proc/self/fd/{descriptor}")  # the path itself is longer than an address may be
            connection.sendall(b"get=1\n\n")
            text = b""
            while not text.endswith(b"\n\n") and (part := connection.recv(65536)):
                text += part
            return text.decode()
    finally:
        os.close(descriptor)


def token_file(mesh: Deployed) -> Path:
    return mesh.lab.nodes[0].data / "volumes" / f"{STACK}_controller" / "_data" / "admin_token"


def token(mesh: Deployed) -> Iterator[Canary]:
    text = token_file(mesh).read_bytes().strip()
    yield Canary("token, clear", text)
    yield Canary("token, base64", base64.b64encode(text).rstrip(b"="))


Place = tuple[str, bytes]


def files(name: str, folder: Path, but: Iterable[Path] = ()) -> Iterator[Place]:
    left_out = set(but)
    for where, _, names in os.walk(folder):
        for each in names:
            path = Path(where, each)
            if path in left_out or path.is_symlink() or not path.is_file():
                continue
            try:
                yield f"{name}: {path.relative_to(folder)}", path.read_bytes()
            except FileNotFoundError:
                continue


def logs(mesh: Deployed) -> Iterator[Place]:
    """Of every container, as its engine wrote it, and of the engines."""
    for node in mesh.lab.nodes:
        yield f"log of dockerd on {node.name}", node.engine_log.read_bytes()
        yield from files(f"containers on {node.name}", node.data / "containers")


def live_processes() -> Iterator[Place]:
    """Arguments and environment of all processes of the nodes, which have process-id namespaces of their own."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        namespace = Path("/proc", pid, "ns", "pid")
        try:
            if namespace.readlink() == Path("/proc/self/ns/pid").readlink():
                continue
        except OSError:  # gone, or the machine's own first process, which not even root may look into everywhere
            continue
        for what in ("cmdline", "environ"):
            try:
                yield f"{what} of process {pid}", Path("/proc", pid, what).read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue


def etcd(mesh: Deployed) -> Iterator[Place]:
    folder = "/var/lib/docker/swarm/certificates"
    credentials = (f"--cert={folder}/swarm-node.crt", f"--key={folder}/swarm-node.key",
                   f"--cacert={folder}/swarm-root-ca.crt")  # fmt: skip
    server = mesh.tasks(f"{STACK}_etcd")[0]
    command = ("etcdctl", "--endpoints=https://127.0.0.1:2379", "--insecure-skip-tls-verify", *credentials)
    listed = json.loads(mesh.exec(server, *command, "get", "", "--from-key", "-w", "json"))
    assert listed["kvs"], "etcd holds nothing, so this shows nothing"
    for item in listed["kvs"]:
        key = base64.b64decode(item["key"])
        value = base64.b64decode(item["value"])
        # A signed record is in base64 itself.
        parts = [base64.urlsafe_b64decode(part + b"==") for part in value.split(b".")] if value.count(b".") == 2 else []
        yield f"etcd: {key.decode(errors='replace')}", b"\n".join((key, value, *parts))


_GET_ALL = """
import http.client, json, sys
token, base, names = json.load(sys.stdin)
found = {}
def get(path):
    c = http.client.HTTPConnection("127.0.0.1", 9480, timeout=20)
    c.request("GET", path, headers={"Authorization": "Bearer " + token})
    answer = c.getresponse()
    found[path] = (answer.status, answer.read().decode(errors="replace"))
    return found[path]
document = json.loads(get("/api/openapi.json")[1])
for path, verbs in document["paths"].items():
    if "get" not in verbs:
        continue
    for service in names["service"] if "{" in path else [""]:
        for node in names["node"] if "/nodes/{name}" in path else [service]:
            filled = path.replace("{name}", node).replace("{source}", service).replace("{destination}", "demo_api")
            asks = [p["name"] for p in verbs["get"].get("parameters", []) if p.get("required") and p["in"] == "query"]
            query = "&".join(a + "=demo_" + {"source": "web", "destination": "api"}.get(a, a) for a in asks)
            get(filled + ("?" + query if query else ""))
print(json.dumps(found))
"""


def api(mesh: Deployed) -> Iterator[Place]:
    """Every answer to GET that the API's own document names."""
    names = {"service": [claims.WEB, claims.API, claims.DB], "node": [n.name for n in mesh.lab.nodes]}
    words = json.dumps([token_file(mesh).read_text().strip(), "", names])
    answers = json.loads(mesh.lab.exec(mesh.manager, "python3", "-c", _GET_ALL, text_in=words).stdout)
    good = sum(status == 200 for status, _ in answers.values())
    assert good > 12, {path: status for path, (status, _) in answers.items()}
    for path, (_, text) in answers.items():
        yield f"GET {path}", text.encode()


def layers(mesh: Deployed) -> Iterator[Place]:
    """What containers wrote, volumes but for the token's own file, and the image."""
    for node in mesh.lab.nodes:
        form = "{{.GraphDriver.Data.UpperDir}}"
        for container in mesh.lab.docker(node.name, "ps", "-aq").stdout.split():
            upper = mesh.lab.docker(node.name, "inspect", "-f", form, container, check=False).stdout.strip()
            if upper:
                yield from files(f"layer of {container} on {node.name}", _seen_from_here(node.data, upper))
        yield from files(f"volumes on {node.name}", node.data / "volumes", but=[token_file(mesh)])
    first = mesh.lab.nodes[0]
    form = "{{.GraphDriver.Data.LowerDir}}:{{.GraphDriver.Data.UpperDir}}"
    for layer in mesh.lab.docker(first.name, "inspect", "-f", form, Images().hivewire).stdout.strip().split(":"):
        yield from files("image", _seen_from_here(first.data, layer))


def _seen_from_here(data: Path, path: str) -> Path:
    return data / Path(path).relative_to("/var/lib/docker")


def everywhere(mesh: Deployed) -> Iterator[Place]:
    yield from logs(mesh)
    yield from live_processes()
    yield from etcd(mesh)
    yield from api(mesh)
    yield from layers(mesh)


def hits(canaries: Iterable[Canary], places: Iterable[Place]) -> list[tuple[str, str]]:
    """Kind and place of every canary found."""
    wanted = list(canaries)
    return sorted({(c.kind, where) for where, content in places for c in wanted if c.text in content})


def test_no_secret_is_anywhere(mesh: Deployed) -> None:
    """No private key and no token, in any encoding, is in a log, argument, environment, record, answer or file."""
    claims.chain_answers(mesh)
    canaries = [*node_keys(mesh), *wireguard_keys(mesh), *token(mesh)]
    assert len(canaries) > 60
    found = hits(canaries, everywhere(mesh))
    assert not found, found


def test_the_search_finds_what_is_planted(mesh: Deployed) -> None:
    """A made-up secret in arguments, environment, a log, a layer, a volume and a label is found in every place."""
    fake = "canary" + secrets.token_hex(16)
    script = "echo $PLANTED; echo $PLANTED >/tmp/x; echo $PLANTED >/kept/x; sleep 3600; : $0"
    mesh.docker(
        "service", "create", "--detach", "--name", "planted", "--network", "demo_app", "--env", f"PLANTED={fake}",
        "--user", "root", "--mount", "type=volume,source=planted,target=/kept", "--label", f"hivewire.links={fake}",
        Images().demo, "sh", "-c", script, fake,
    )  # fmt: skip
    try:
        wait_for("the planted task", lambda: mesh.tasks("planted"), 60)
        wait_for("its finding", lambda: fake in mesh.cli("-o", "json", "findings", check=False), 60)
        canary = Canary("planted", fake.encode())
        wait_for("its record", lambda: hits([canary], etcd(mesh)), 60)
        found = {where for _, where in hits([canary], everywhere(mesh))}
        wanted = ("containers on", "cmdline of", "environ of", "etcd:", "GET /", "layer of", "volumes on")
        missing = [start for start in wanted if not any(where.startswith(start) for where in found)]
        assert not missing, missing
    finally:
        mesh.docker("service", "rm", "planted")
