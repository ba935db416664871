"""``make bench``: how fast links are beside what else there is, how fast they close, and what a task start costs.

    python -m tests.bench [PART ...] [--rounds N] [--seconds S] [--runs N]

Samples are kept as they come in build/bench/, one JSON object per line; figures, a table and a plot are made of them.
In the virtual machine, whose files are lost, the same program hands its samples out through its output (--hand-out).
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from lab.errors import LabError
from lab.images import Images
from lab.lab import Lab
from lab.progress import Progress
from proof.deployed import Deployed

from tests.bench import datapath, replay, revocation, samples, tasks
from tests.bench.datapath import Sink, Sizes

ROOT = Path(__file__).resolve().parents[2]
HERE = ("datapath", "revocation", "tasks")
"""What is measured on this machine itself, as its kernel allows."""
GUEST = ("replay", "datapath")
"""What is measured on Debian's kernel in the virtual machine."""
PARTS = (*HERE, "vm", "report")


def main() -> int:
    options = _options()
    progress = Progress()
    parts = options.parts or PARTS
    if not options.hand_out:
        progress.say(f"{', '.join(parts)}: about {minutes(parts, options):.0f} minutes, more beside other work")
    try:
        if options.hand_out:
            run(parts, options, progress, samples.hand_out)
            return 0
        here = [part for part in parts if part in {*HERE, "replay"}]
        if here:
            with samples.kept(ROOT, "here", parts=here) as keep:
                run(here, options, progress, keep)
        if "vm" in parts:
            in_the_guest(options, progress)
        if "report" in parts:
            from tests.bench import render

            render.write(ROOT, progress)
    except LabError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return 0


def run(parts: Sequence[str], options: argparse.Namespace, progress: Progress, sink: Sink) -> None:
    """Measure in a lab. One that is up already is used, and left up; else one is started and ended."""
    lab = Lab(progress=progress)
    with ExitStack() as stack:
        if not lab.is_up:
            if not options.hand_out:  # the guest goes with all that is in it
                stack.callback(lab.down)
            lab.up()
        images = lab.ensure_images()
        mesh = Deployed(lab)
        with progress.step("docker stack deploy -c deploy/stack.yml hivewire"):
            mesh.deploy(images)
            mesh.wait_ready(180)
        failed = []
        for part in parts:
            try:
                measure(part, mesh, images, options, progress, sink)
            except LabError as error:  # the other parts are worth having all the same
                print(f"bench: {part}: {error}", file=sys.stderr, flush=True)
                failed.append(part)
    if failed:
        raise LabError(f"failed: {', '.join(failed)}")


def measure(
    part: str, mesh: Deployed, images: Images, options: argparse.Namespace, progress: Progress, sink: Sink
) -> None:
    match part:
        case "datapath":
            datapath.measure(mesh, images, Sizes(options.rounds, options.seconds), progress, sink)
        case "replay":
            datapath.deploy(mesh, images)
            with progress.step("the end of Swarm's sequence number"):
                sink({"kind": "replay", **replay.show(mesh)})
        case "revocation":
            revocation.measure(mesh, images, options.runs, progress, sink)
        case "tasks":
            tasks.measure(mesh, images, progress, sink)


def minutes(parts: Sequence[str], options: argparse.Namespace) -> float:
    """How long it takes, by how long it took. A tool needs a moment to begin: ``overhead``, in seconds."""

    def of_rounds(rounds: int, overhead_s: float) -> float:
        wide = -(-rounds // datapath.TENTH) * sum(map(len, datapath.WIDE.values()))
        pairs = rounds * sum(map(len, datapath.PAIRS.values()))
        return (wide + pairs) * (float(options.seconds) + overhead_s) / 60

    each: dict[str, float] = {
        "datapath": of_rounds(options.rounds, 0.3),
        "revocation": options.runs * 2 * 2.5 / 60,
        "tasks": 3,
        "vm": 8 + of_rounds(_in_the_guest(options.rounds), 2),
    }
    return 1 + sum(each.get(part, 0.0) for part in parts)


def _in_the_guest(rounds: int) -> int:
    """Tools take long to begin there: half as many pairs."""
    return max(3, rounds // 2)


def in_the_guest(options: argparse.Namespace, progress: Progress) -> None:
    """The same program on a kernel that has WireGuard, ESP and IPVS. Raises LabError when it fails."""
    sizes = ("--rounds", str(_in_the_guest(options.rounds)), "--seconds", str(options.seconds))
    again = (sys.executable, "-m", "tests.bench", *GUEST, "--hand-out", *sizes)
    argv = (str(ROOT / "deploy/vm/run"), "--lab", "--limit", str(options.limit), "env", "PYTHONPATH=deploy", *again)
    progress.say("the same in a virtual machine with Debian's kernel, emulated:")
    with (
        samples.kept(ROOT, "vm", parts=GUEST) as keep,
        subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, errors="replace", cwd=ROOT) as guest,
    ):
        assert guest.stdout is not None
        for line in guest.stdout:
            sample = samples.handed_out(line)
            if sample is None:
                print(f"vm| {line.rstrip()}", file=sys.stderr, flush=True)
            else:
                keep(sample)
        status = guest.wait()
    if status:
        raise LabError(f"the measurement in the virtual machine ended with status {status}; see build/vm/")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--rounds", type=int, default=20, help="pairs of each comparison (default %(default)s)")
    parser.add_argument("--seconds", type=int, default=1, help="of each TCP and UDP sample (default %(default)s)")
    parser.add_argument("--runs", type=int, default=50, help="revocations of each kind (default %(default)s)")
    parser.add_argument("--limit", type=int, default=3000, help="seconds for the virtual machine (default %(default)s)")
    parser.add_argument("--hand-out", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = set(options.parts) - {*PARTS, "replay"}
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if os.geteuid() != 0:
        parser.error("the lab makes namespaces and mounts, which needs root: run it with sudo")
    return options


if __name__ == "__main__":
    sys.exit(main())
