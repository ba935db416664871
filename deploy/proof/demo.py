"""``make demo``: from a bare machine to a mesh on a real three-node Swarm, and the proof that it holds.

Exit status 0 only when every promise held. What is up already is used again; what a crashed run left is cleaned up.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lab.errors import LabError
from lab.lab import Lab
from lab.progress import Progress

from proof import claims
from proof.claims import Disproved
from proof.deployed import Deployed


def main() -> int:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=("up", "down", "hivewire"))
    parser.add_argument("words", nargs=argparse.REMAINDER, help="of the command, with hivewire")
    parser.add_argument("--engine", default="host", choices=("host", "trixie"), help="Docker 20.10 or 26.1")
    options = parser.parse_args()
    progress = Progress()
    lab = Lab(progress=progress)
    try:
        if options.verb == "down":
            lab.down()
            return 0
        if options.verb == "hivewire":
            print(Deployed(lab).cli(*options.words, check=False), end="")
            return 0
        start = time.monotonic()
        mesh = bring_up(lab, progress, options.engine)
        show(mesh)
        prove(mesh)
    except (LabError, Disproved) as error:
        print(f"demo: {error}", file=sys.stderr)
        print("demo: the lab is left as it is; look around, or end it with: make demo-down", file=sys.stderr)
        return 1
    print(f"\nEvery promise held; {time.monotonic() - start:.0f} s in all. Look further:\n{HINTS}")
    return 0


HINTS = """\
  deploy/lab/lab ps                                   the nodes
  deploy/lab/lab docker n1 service ls                 any docker command on a node
  deploy/lab/lab docker n1 service logs hivewire_agent
  deploy/lab/lab capture udp                          what a wiretap sees
  deploy/lab/lab docker n1 service update --label-add hivewire.links=api:8080 demo_spy
  python3 deploy/proof/demo.py hivewire link ls       the CLI in the controller's container
  make demo-down                                      stop, and leave nothing behind"""


def bring_up(lab: Lab, progress: Progress, engine: str) -> Deployed:
    """Lab, images, stacks; returns when ``hivewire check`` is green."""
    if lab.is_up and lab.engine != engine:
        lab.down()
    if not lab.is_up or any(node.engine != "running" for node in lab.ps()):
        if lab.is_up:
            lab.down()
        lab.up(engine=engine)
    images = lab.ensure_images()
    mesh = Deployed(lab)
    with progress.step("docker stack deploy -c deploy/stack.yml hivewire"):
        mesh.deploy(images)
    with progress.step("docker stack deploy -c deploy/demo/stack.yml demo"):
        mesh.deploy_demo(images)
    with progress.step("hivewire check --wait"):
        mesh.wait_ready(180)
    return mesh


def show(mesh: Deployed) -> None:
    for command in (("status",), ("service", "ls"), ("link", "ls"), ("node", "ls")):
        print(f"\n$ hivewire {' '.join(command)}\n{mesh.cli(*command).rstrip()}")


def prove(mesh: Deployed) -> None:
    """Each promise, and what was seen. Raises Disproved."""
    _promise("web -> api -> db by service name, over VIPs", lambda: claims.chain_answers(mesh))
    _promise("a wiretap on the underlay", lambda: claims.nothing_in_clear(mesh))
    _promise("spy, on the same network without a link", lambda: claims.spy_is_shut_out(mesh))
    _promise("a label opens a link and its removal closes it", lambda: claims.link_opens_and_closes(mesh))
    for service in (claims.WEB, claims.API, claims.DB):
        task = mesh.tasks(service)[0]
        _promise(
            f"wg show in {task.name.rsplit('.', 1)[0]} on {task.node}", lambda task=task: claims.peers_of(mesh, task)
        )


def _promise(title: str, look: Callable[[], dict[str, Any]]) -> None:
    print(f"\n{title}")
    for name, value in look().items():
        print(f"  {name}: {', '.join(value) if isinstance(value, list) else value}")


if __name__ == "__main__":
    sys.exit(main())
