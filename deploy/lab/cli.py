"""The `lab` command."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from lab import capture
from lab.command import CLEAN_ENVIRONMENT
from lab.errors import LabError
from lab.lab import Lab
from lab.settings import ENGINES


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 1 for an error, which is printed."""
    options = _parser().parse_args(arguments)
    # A start that is ended by `kill` must undo itself as one that is ended by Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return _run(options)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _run(options: argparse.Namespace) -> int:
    lab = Lab()
    match options.command:
        case "up":
            lab.up(options.nodes, options.managers, options.engine)
            print(f"try: {sys.argv[0]} docker n1 node ls")
        case "down":
            lab.down()
        case "ps":
            _print_nodes(lab)
        case "docker":
            # Stack files take values from the environment; settings of another docker must not come along.
            env = {name: value for name, value in os.environ.items() if not name.startswith("DOCKER_")}
            _become((*lab.docker_command(options.node), *options.arguments), env | lab.docker_environment())
        case "exec":
            inherited = {name: os.environ[name] for name in ("TERM",) if name in os.environ}
            argv = lab.node(options.node).enter(*(options.arguments or ["sh"]))
            _become(argv, {**CLEAN_ENVIRONMENT, **inherited})
        case "capture":
            _capture(options)
        case "fail":
            lab.fail(options.node, options.action)
        case "prepare":
            print(lab.prepare())
        case "image":
            built = lab.ensure_images()
            print(built.hivewire, built.demo, sep="\n")
    return 0


def _print_nodes(lab: Lab) -> None:
    print(f"{'NODE':6}{'ADDRESS':14}{'ROLE':10}{'ENGINE':10}SWARM")
    for node in lab.ps():
        print(f"{node.name:6}{node.address:14}{node.role:10}{node.engine:10}{node.swarm}")


def _capture(options: argparse.Namespace) -> None:
    argv = capture.command(" ".join(options.filter), options.write)
    if options.seconds is not None:
        argv = ("timeout", "--signal=INT", str(options.seconds), *argv)
    _become(argv, CLEAN_ENVIRONMENT)


def _become(argv: Sequence[str], env: dict[str, str]) -> None:
    """Turn into another program, so that terminals, signals and exit statuses are its own."""
    sys.stdout.flush()
    os.execvpe(argv[0], list(argv), env)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lab", description="A real Docker Swarm on one machine, in namespaces.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    up = commands.add_parser("up", help="start the nodes and make a Swarm of them")
    up.add_argument("--nodes", type=int, default=3, metavar="N", help="how many (default 3)")
    up.add_argument("--managers", type=int, default=1, metavar="M", help="how many are managers (default 1)")
    up.add_argument("--engine", choices=ENGINES, default="host", help="this machine's engine or Debian 13's")
    commands.add_parser("down", help="end everything, also what a crashed run left")
    commands.add_parser("ps", help="list the nodes")
    commands.add_parser("image", help="build the images, push them to the lab's registry, pull them on all nodes")
    commands.add_parser("prepare", help="fetch and build all that a lab needs, and print the folder of its seed")

    docker = commands.add_parser("docker", help="run the docker CLI against a node's engine")
    execute = commands.add_parser("exec", help="run a program in a node's namespaces")
    for sub in (docker, execute):
        sub.add_argument("node", metavar="NODE")
        sub.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")

    tap = commands.add_parser("capture", help="tcpdump on the underlay: what a wiretap sees")
    tap.add_argument("--seconds", type=float, metavar="N", help="stop after N seconds (default: on a signal)")
    tap.add_argument("-w", dest="write", type=Path, metavar="FILE", help="write frames to FILE")
    tap.add_argument("filter", nargs="*", metavar="FILTER", help="tcpdump filter, such as 'udp port 4789'")

    fail = commands.add_parser("fail", help="make a node fail, or heal it")
    fail.add_argument("node", metavar="NODE")
    fail.add_argument("action", choices=("kill", "restart", "unplug", "plug"))
    return parser
