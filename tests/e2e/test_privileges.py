"""What the deployed services may do: capabilities, file systems, core dumps, memory, and the engine's socket."""

import json
from collections.abc import Iterator

import pytest
from lab.images import Images
from proof import claims
from proof.deployed import DEPLOY, STACK, Deployed, Task, wait_for

pytestmark = pytest.mark.e2e

NET_ADMIN, SYS_ADMIN = 1 << 12, 1 << 21
CAPABILITIES = {"etcd": 0, "controller": 0, "agent": NET_ADMIN | SYS_ADMIN, "userspace": NET_ADMIN}
HOLDERS = ("hivewire-", "etcd", "wireguard-go")
"""Programs that hold keys, by what stands in their command line."""

_LIST = """
import json, os
def field(pid, name, key):
    return next(l for l in open(f"/proc/{pid}/{name}") if l.startswith(key))[len(key):].split()
def can_read(path):
    try:
        os.readlink(path)
    except OSError:
        return False
    return True
found = []
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        words = open(f"/proc/{pid}/cmdline").read().split(chr(0))
        found.append({
            "pid": int(pid), "words": words,
            "sets": [int(field(pid, "status", key)[0], 16) for key in ("CapInh:", "CapPrm:", "CapEff:", "CapBnd:")],
            "no_new_privileges": field(pid, "status", "NoNewPrivs:")[0] == "1",
            "core": field(pid, "limits", "Max core file size")[:2],
            "readable": can_read(f"/proc/{pid}/exe"),  # as ptrace(2) has it, memory included
        })
    except FileNotFoundError:
        pass
print(json.dumps(found))
"""


def processes(mesh: Deployed, task: Task) -> list[dict[str, object]]:
    """All processes of a container, as one in it sees them that has the same user and capabilities."""
    found: list[dict[str, object]] = json.loads(mesh.exec(task, "python3", "-c", _LIST))
    return found


def every_task(mesh: Deployed) -> Iterator[tuple[str, Task]]:
    for service in CAPABILITIES:
        tasks = mesh.tasks(f"{STACK}_{service}")
        assert tasks, f"{service} does not run"
        yield from ((service, task) for task in tasks)


def holds_keys(process: dict[str, object]) -> bool:
    words = process["words"]
    assert isinstance(words, list)
    return not words[0].endswith("tini") and any(name in word for word in words[:2] for name in HOLDERS)


def test_services_have_their_capabilities_and_no_other(mesh: Deployed) -> None:
    """In every process of every container the effective and the bounding set are what the stack file gives."""
    for service, task in every_task(mesh):
        for process in processes(mesh, task):
            _, *sets = process["sets"]
            assert sets == [CAPABILITIES[service]] * 3, (service, process["words"])


def test_no_service_can_write_to_its_own_file_system(mesh: Deployed) -> None:
    """The root file system is read-only, so nothing of the image can be replaced."""
    for service, task in every_task(mesh):
        outcome = mesh.exec(task, "sh", "-c", "touch /opt/hivewire/x 2>&1 || true")
        assert "Read-only file system" in outcome, service


def test_processes_with_keys_dump_no_core_and_show_no_memory(mesh: Deployed) -> None:
    """Core limit, no-new-privileges and "not dumpable" hold for ours, etcd and wireguard-go; a control is readable."""
    seen = set()
    for service, task in every_task(mesh):
        for process in processes(mesh, task):
            words = process["words"]
            if isinstance(words, list) and words[0].endswith("tini"):
                assert process["readable"], f"{service}: nothing is readable here, so this shows nothing"
            if not holds_keys(process):
                continue
            seen.add(service)
            assert process["core"] == ["1", "1"], process["words"]
            assert process["no_new_privileges"], process["words"]
            assert not process["readable"], process["words"]
    assert seen == set(CAPABILITIES)


def test_everything_works_behind_the_socket_filter(mesh: Deployed) -> None:
    """With the filter before every engine check is green, links answer, no wanted call is refused."""
    images = Images()
    env = {"HIVEWIRE_IMAGE": images.hivewire}
    files = ("-c", str(DEPLOY / "stack.yml"))
    filtered = (*files, "-c", str(DEPLOY / "socket-filter" / "stack.yml"))
    mesh.docker("stack", "deploy", *filtered, STACK, env={**env, "HIVEWIRE_ENGINE_SOCKET": "engine"})
    try:
        wait_for("filters", lambda: len(mesh.tasks(f"{STACK}_socket-filter")) == len(mesh.lab.nodes), 60)
        wait_for("all behind the filter", lambda: _all_filtered(mesh), 120)
        mesh.wait_ready(120)
        claims.chain_answers(mesh)
        claims.link_opens_and_closes(mesh)
        lines = [json.loads(line) for line in _log(mesh) if line.startswith("{")]
        assert [line for line in lines if line["event"] == "refused"] == []
        used = {line["rule"] for line in lines if line["event"] == "first use"}
        allowed = (DEPLOY / "socket-filter" / "allowed.txt").read_text().splitlines()
        # A single service and a single network are asked for only at times.
        rules = {" ".join(line.split()[:2]) for line in allowed if line and not line.startswith("#")}
        assert {rule for rule in rules if "{id}" not in rule} <= used <= rules
        controller = mesh.tasks(f"{STACK}_controller")[0]
        assert _ask(mesh, controller, "POST", "/v1.41/containers/create") == 403
        assert _ask(mesh, controller, "GET", "/v1.41/swarm") == 403
        assert _ask(mesh, controller, "GET", "/v1.41/info") == 200
        refused = [json.loads(line) for line in _log(mesh) if '"refused"' in line]
        assert {(r["method"], r["path"]) for r in refused} == {
            ("POST", "/v1.41/containers/create"),
            ("GET", "/v1.41/swarm"),
        }
    finally:
        mesh.docker("stack", "deploy", "--prune", *files, STACK, env=env)
        wait_for("none behind the filter", lambda: not _all_filtered(mesh, any_of_them=True), 120)
        mesh.wait_ready(120)


def _all_filtered(mesh: Deployed, *, any_of_them: bool = False) -> bool:
    wanted = []
    for service in ("etcd", "controller", "agent"):
        tasks = mesh.tasks(f"{STACK}_{service}")
        if not tasks:
            return any_of_them
        form = "{{range .Config.Env}}{{println .}}{{end}}"
        wanted += ["filtered.sock" in mesh.lab.docker(t.node, "inspect", "-f", form, t.container).stdout for t in tasks]
    return any(wanted) if any_of_them else all(wanted)


def _log(mesh: Deployed) -> list[str]:
    return [
        line
        for task in mesh.tasks(f"{STACK}_socket-filter")
        for line in mesh.lab.docker(task.node, "logs", task.container).stderr.splitlines()
    ]


def _ask(mesh: Deployed, task: Task, method: str, path: str) -> int:
    code = (
        "import http.client, os, socket, sys\n"
        "c = http.client.HTTPConnection('engine')\n"
        "c.sock = socket.socket(socket.AF_UNIX); c.sock.connect(os.environ['HIVEWIRE_DOCKER_SOCKET'][7:])\n"
        "c.request(*sys.argv[1:]); print(c.getresponse().status)"
    )
    return int(mesh.exec(task, "python3", "-c", code, method, path))
