"""The lab as one object: up, down, and what one does in between."""

import contextlib
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from lab import engine, images, lock, node, packages, registry, roots, seed, swarm, sweep, underlay
from lab.capture import Capture
from lab.command import CLEAN_ENVIRONMENT, Completed, run
from lab.errors import CommandFailed, LabError
from lab.node import Node
from lab.progress import Progress
from lab.settings import ENGINES, MAX_NODES, REGISTRY, UNDERLAY, Settings

_EXEC_TRIES = 3


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """What `lab ps` shows of a node; `swarm` is what a manager says, `unknown` when none answers."""

    name: str
    address: str
    role: str  # manager or worker
    engine: str  # running, dead
    swarm: str  # ready, down, unknown


class Lab:
    """The machine's lab. Objects are cheap: all state is on the machine, in `settings.state`."""

    def __init__(self, settings: Settings | None = None, progress: Progress | None = None) -> None:
        self.settings = settings or Settings.from_environment()
        self.progress = progress or Progress()
        self.registry = REGISTRY

    # -- life --------------------------------------------------------------------------------------

    def up(self, nodes: int = 3, managers: int = 1, engine: str = "host") -> None:
        """Start `nodes` engines and join them to one Swarm, its first `managers` nodes being managers.

        What a crashed run left is removed first, and a start that fails is undone. Raises LabError when
        a lab is up already, and when anything does not start.
        """
        _check_machine()
        _check_shape(nodes, managers, engine)
        with lock.held(self.settings):
            known = self._record()
            if known.get("phase") == "up":
                raise LabError(
                    f"a lab is up already, started {known.get('started')} by `{known.get('by')}`; there can be only "
                    "one on a machine: when nobody needs it any more, end it with `lab down`"
                )
            packages.ensure(packages.LAB, self.progress)
            if sweep.leftovers(self.settings):
                with self.progress.step("removing what an earlier run left"):
                    sweep.sweep(self.settings)
            root = roots.ensure("engine", roots.ENGINE, self.settings, self.progress) if engine == "trixie" else None
            try:
                self._start(nodes, managers, engine, root)
            except BaseException:
                self._keep_logs()
                with self.progress.step("undoing the start"):
                    sweep.sweep(self.settings)
                raise

    def down(self) -> None:
        """End the lab and leave nothing behind but caches; also after a crash, also when there is none."""
        _check_machine()
        with lock.held(self.settings):
            if not sweep.leftovers(self.settings):
                self.progress.say("no lab is up")
                return
            with self.progress.step("ending the lab"):
                sweep.sweep(self.settings)

    def prepare(self) -> Path:
        """Have ready in the cache all that a lab of this checkout needs, and return its seed (see seed.py).

        With the seed in HIVEWIRE_LAB_SEED a lab comes up without a network, builds nothing and pulls nothing. Where
        there is none yet, a lab of one node makes it. Raises LabError when a lab is up, or something cannot be made.
        """
        _check_machine()
        packages.ensure(packages.LAB, self.progress)
        roots.ensure("engine", roots.ENGINE, self.settings, self.progress)
        wanted = images.digests(self)
        if (found := seed.folder(self.settings, wanted)).is_dir():
            return found
        self.up(nodes=1)
        try:
            self.ensure_images()
            with self.progress.step("keeping its images as a seed"):
                return seed.take(self.settings, wanted, self.nodes[0].data)
        finally:
            self.down()

    @property
    def is_up(self) -> bool:
        """Tell whether a lab was started here and not ended; its nodes may still have failed."""
        return self._record().get("phase") == "up"

    def _start(self, count: int, managers: int, engine_name: str, root: Path | None) -> None:
        self.settings.state.mkdir(parents=True)
        members = [node.make(number, self.settings) for number in range(1, count + 1)]
        record = {"nodes": count, "managers": managers, "engine": engine_name, "root": str(root or "")}
        # For whoever finds this lab in the way: whose is it?
        record |= {"started": time.strftime("%Y-%m-%d %H:%M:%S"), "by": shlex.join(sys.argv)}
        self._write_record({**record, "phase": "starting"})
        with self.progress.step(f"underlay and registry {REGISTRY}"):
            underlay.build(members)
            registry.start(self.settings)
        with self.progress.step(f"{count} engines"), ThreadPoolExecutor(count) as pool:
            list(pool.map(lambda member: _boot(member, root, self.settings.seed), members))
        with self.progress.step(f"Swarm of {managers} manager(s), {count - managers} worker(s)"):
            swarm.form(members, managers, self.docker)
        self._write_record({**record, "phase": "up"})

    def _keep_logs(self) -> None:
        """Copy the logs of a failed start to the cache, since the state is about to go."""
        kept = self.settings.cache / "failed"
        for log in self.settings.state.glob("**/*.log"):
            kept.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(OSError):
                (kept / f"{log.parent.name}-{log.name}").write_bytes(log.read_bytes())
        self.progress.say(f"the logs of this start are kept in {kept}")

    # -- use ---------------------------------------------------------------------------------------

    @property
    def nodes(self) -> list[Node]:
        """List the nodes; raises LabError when no lab is up."""
        record = self._record()
        if not record:
            raise LabError("no lab is up; start one with `lab up`")
        return [node.make(number, self.settings) for number in range(1, int(str(record["nodes"])) + 1)]

    @property
    def managers(self) -> list[Node]:
        """List the nodes that were started as managers."""
        return self.nodes[: int(str(self._record()["managers"]))]

    @property
    def engine(self) -> str:
        """Name the engine: `host` or `trixie`."""
        return str(self._record().get("engine", "host"))

    def node(self, name: str | Node) -> Node:
        """Find a node by its name; raises LabError when there is none of that name."""
        if isinstance(name, Node):
            return name
        for member in self.nodes:
            if member.name == name:
                return member
        raise LabError(f"no node {name!r}; the lab has {', '.join(member.name for member in self.nodes)}")

    def docker_command(self, name: str | Node) -> tuple[str, ...]:
        """Build the start of a docker command line that talks to a node's engine."""
        root = str(self._record().get("root") or "")
        return (*engine.client(Path(root) if root else None), "-H", f"unix://{self.node(name).socket}")

    def docker_environment(self) -> dict[str, str]:
        """Build what the docker CLI needs in its environment."""
        return {
            "DOCKER_BUILDKIT": "0",  # the classic builder: Debian's engines come without buildx
            "DOCKER_CONFIG": str(self.settings.state / "docker-cli"),  # not ~/.docker: contexts, credential stores
        }

    def docker(
        self,
        name: str | Node,
        *arguments: str,
        check: bool = True,
        text_in: str | None = None,
        timeout_s: float | None = 120,
        env: dict[str, str] | None = None,
    ) -> Completed:
        """Run the docker CLI against a node's engine; `env` is added to a clean environment.

        An `exec` whose process runc lost before it began is tried again. Raises CommandFailed when it fails and
        `check` holds, LabError on a timeout.
        """
        full = {**CLEAN_ENVIRONMENT, **self.docker_environment(), **(env or {})}
        argv = (*self.docker_command(name), *arguments)
        for left in reversed(range(_EXEC_TRIES)):
            done = run(*argv, check=False, text_in=text_in, timeout_s=timeout_s, env=full)
            if not (left and _never_began(done)):
                break
        if check and done.returncode != 0:
            raise CommandFailed(argv, done.returncode, done.stdout, done.stderr)
        return done

    def ask(self, name: str | Node, path: str, filters: dict[str, list[str]] | None = None) -> Any:
        """Get a value from the Engine API of a node. Raises LabError."""
        query = "?" + urlencode({"filters": json.dumps(filters)}) if filters else ""
        return engine.ask(self.node(name), path + query)

    def exec(
        self, name: str | Node, *argv: str, check: bool = True, text_in: str | None = None, timeout_s: float = 120
    ) -> Completed:
        """Run a program in a node's namespaces; raises as `docker` does."""
        return node.execute(self.node(name), *argv, check=check, text_in=text_in, timeout_s=timeout_s)

    def underlay(self, *argv: str, check: bool = True, timeout_s: float = 120) -> Completed:
        """Run a program of this machine in the underlay's network namespace; raises as `docker` does."""
        return run("ip", "netns", "exec", UNDERLAY, *argv, check=check, timeout_s=timeout_s)

    def capture(self, file: Path, expression: str = "") -> Capture:
        """Record the underlay's frames into a file while a `with` block runs."""
        return Capture(file, expression)

    def ensure_images(self) -> "images.Images":
        """Build what is not built yet, push it to the lab's registry, pull it on every node."""
        return images.ensure(self)

    def ps(self) -> list[NodeStatus]:
        """Report every node; a node that is down is reported, not raised."""
        members, managers = self.nodes, self.managers
        with ThreadPoolExecutor(len(members)) as pool:
            running = dict(zip(members, pool.map(engine.is_answering, members), strict=True))
        seen = self._ask_managers([member for member in managers if running[member]])
        return [
            NodeStatus(
                name=member.name,
                address=str(member.address),
                role="manager" if member in managers else "worker",
                engine="running" if running[member] else "dead",
                swarm=seen.get(member.name, "unknown").lower(),
            )
            for member in members
        ]

    def fail(self, name: str | Node, action: str) -> None:
        """Make a node fail, or heal it.

        `kill`: SIGKILL to its engine; `restart`: the engine starts (killed before if it runs);
        `unplug`/`plug`: its cable. Raises LabError for another action or when it does not work.
        """
        member = self.node(name)
        match action:
            case "kill":
                engine.kill(member)
            case "restart":
                if engine.is_answering(member):
                    engine.kill(member)
                engine.start(member)
            case "unplug" | "plug":
                underlay.plug(member, connected=action == "plug")
            case _:
                raise LabError(f"{action!r} is no failure; there are kill, restart, unplug and plug")

    def _ask_managers(self, answering: Sequence[Node]) -> dict[str, str]:
        for manager in answering:
            with contextlib.suppress(LabError):  # without a quorum each refuses; the status is unknown then
                return {row["Hostname"]: row["Status"] for row in swarm.members(manager, self.docker)}
        return {}

    # -- record ------------------------------------------------------------------------------------

    def _record(self) -> dict[str, object]:
        try:
            content = json.loads((self.settings.state / "lab.json").read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _write_record(self, record: dict[str, object]) -> None:
        file = self.settings.state / "lab.json"
        new = file.with_suffix(".new")
        new.write_text(json.dumps(record))
        new.replace(file)


def _never_began(done: Completed) -> bool:
    """Tell whether runc lost the process of a `docker exec` before it ran: on a busy machine its two ends of a pipe
    come apart ("read init-p: connection reset by peer"), seen with runc 1.1. Docker 26.1 says it on standard output.
    """
    return done.returncode == 126 and "read init-p: connection reset" in done.stdout + done.stderr


def _boot(member: Node, root: Path | None, images_to_begin_with: Path | None) -> None:
    node.start(member, root, images_to_begin_with)
    engine.start(member)


def _check_machine() -> None:
    if platform.system() != "Linux":
        raise LabError(f"the lab needs Linux (network namespaces); this is {platform.system()}: use a Debian machine")
    if os.geteuid() != 0:
        raise LabError("the lab makes namespaces and mounts, which needs root: run it with sudo")


def _check_shape(nodes: int, managers: int, engine_name: str) -> None:
    if not 1 <= nodes <= MAX_NODES:
        raise LabError(f"--nodes {nodes}: choose 1 to {MAX_NODES}")
    if not 1 <= managers <= nodes:
        raise LabError(f"--managers {managers}: choose 1 to the number of nodes ({nodes})")
    if engine_name not in ENGINES:
        raise LabError(f"--engine {engine_name}: choose {' or '.join(ENGINES)}")
