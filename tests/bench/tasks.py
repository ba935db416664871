"""What a task start and a fresh link take and cost: as the agents log it, and as the demo's services see it."""

import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

from lab.images import Images
from lab.progress import Progress
from proof import claims
from proof.deployed import DEMO, STACK, Deployed, wait_for

from tests.bench.datapath import Sink

STARTS = 50
AT_ONCE = 10
LINKS = 10


def measure(mesh: Deployed, images: Images, progress: Progress, sink: Sink) -> None:
    """Deploys the demo where it is not there."""
    if not mesh.tasks(claims.API):
        with progress.step(f"docker stack deploy -c deploy/demo/stack.yml {DEMO}"):
            mesh.deploy_demo(images)
            mesh.wait_ready(180)
    with progress.step(f"{STARTS} task starts, {AT_ONCE} at a time"):
        sink({"kind": "task_start", **task_starts(mesh)})
    with progress.step(f"{LINKS} fresh links"):
        sink({"kind": "fresh_link", **fresh_links(mesh)})


def task_starts(mesh: Deployed) -> dict[str, Any]:
    """From the container's start event to a ready interface, as the agents log it; and what it costs."""
    base = len(mesh.tasks(claims.API))
    since, revision = time.time(), settled_revision(mesh)
    started = 0
    while started < STARTS:
        mesh.scale(claims.API, base + AT_ONCE)
        mesh.wait_ready()
        mesh.scale(claims.API, base)
        started += AT_ONCE
    after = settled_revision(mesh)
    passes = [line for line in agent_lines(mesh, since) if line.get("since_start_s") is not None]
    return {
        "starts": len(passes),
        "container_start_to_interface_ready_s": summary([line["since_start_s"] for line in passes]),
        "requests_to_kernel_and_device_per_start": summary([line["calls"] for line in passes]),
        # A start and a stop together: claim with status, peer, statuses of those that add it; and all of it removed.
        "store_revisions_per_start_and_stop": round((after - revision) / started, 2),
    }


def fresh_links(mesh: Deployed) -> dict[str, Any]:
    """A label opens a link between running tasks: until the first connection, and how long that one takes."""
    seen = [claims.link_opens_and_closes(mesh) for _ in range(LINKS)]
    names = {
        "label_to_first_connection_s": "open after (s)",
        "first_connection_ms": "first connection over the fresh link (ms)",
        "label_removed_to_closed_s": "closed after (s)",
    }
    return {name: summary([each[key] for each in seen]) for name, key in names.items()}


def settled_revision(mesh: Deployed) -> int:
    """The store's revision once it stopped growing."""

    def unchanged() -> int | None:
        before = int(mesh.ask("status")["revision"])
        time.sleep(2)
        return before if int(mesh.ask("status")["revision"]) == before else None

    return wait_for("a quiet store", unchanged, 60) or 0


def agent_lines(mesh: Deployed, since: float) -> list[dict[str, Any]]:
    lines = []
    for agent in mesh.tasks(f"{STACK}_agent"):
        logged = mesh.lab.docker(agent.node, "logs", "--since", str(int(since)), agent.container)
        lines += [json.loads(line) for line in (logged.stdout + logged.stderr).splitlines() if line.startswith("{")]
    return lines


def summary(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    if not ordered:
        return {"count": 0}
    return {
        "count": len(ordered),
        "median": round(statistics.median(ordered), 4),
        "p99": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 4),
        "max": round(ordered[-1], 4),
    }
