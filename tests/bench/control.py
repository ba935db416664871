"""``make bench-control``: the control side of a node beside ``wg`` and pyroute2; JSON in ``build/bench/control.json``.

All of it runs in the virtual machine of ``deploy/vm``, in one run, on the kernel's WireGuard: emulated, so only ratios
within the run mean anything. What has a meaning in microseconds is measured on this machine besides, with wireguard-go.
Counterparts take turns, and each figure is a median with the ratio to its counterpart.
"""

import contextlib
import functools
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, Final, TypeVar

from pyroute2 import IPRoute, WireGuard

from agent.desired import DesiredTask
from agent.kernel import encode, netlink, nftables, rtnetlink
from agent.kernel import namespace as namespaces
from agent.kernel.hosting import Start
from agent.kernel.rtnetlink import Calls, Netlink
from agent.kernel.userspace import HostClient, UserspaceDriver
from agent.observed import ObservedTask
from agent.ops import (
    AddPeer,
    CreateInterface,
    Op,
    PeerSpec,
    RemoveInterface,
    RemovePeer,
    RemoveRules,
    Route,
    SetRules,
    SetUp,
)
from agent.plan import plan
from agent.rules.render import RuleSet, Source, render
from hivewire.ids import NodeId
from hivewire.keys import PrivateKey, PublicKey
from hivewire.records import Endpoint, NodeRecord, PortRange, Protocol
from tests.contract.test_kernel import FIRST_PORT, NODES, RealBench, Task

R = TypeVar("R")

ROOT: Final = Path(__file__).parents[2]
OUTPUT: Final = ROOT / "build/bench/control.json"
LIMIT_S: Final = 3600
SO_RCVBUFFORCE: Final = 33  # asm-generic/socket.h
MARK: Final = "control.json: "

RULES: Final = (ROOT / "tests/unit/agent/golden/enforce.nft").read_text()
RULES_DIGEST: Final = RULES.split('comment "')[1].split('"')[0]
LAST_PORT: Final = FIRST_PORT + 200
NODE: Final = NodeRecord(
    node=NodeId("n"), hostname="n", agent_version="", underlay_address=NODES[0], underlay_mtu=1500, backend="",
    first_port=FIRST_PORT, last_port=LAST_PORT,
)  # fmt: skip


def main() -> int:
    if sys.argv[1:2] == ["inside"]:
        results = Control().run(sys.argv[2:])
        print(MARK + json.dumps(results), flush=True)
        return 0
    if sys.argv[1:2] == ["prober"]:
        return prober(float(sys.argv[2]))
    if sys.argv[1:2] == ["receiver"]:
        return receiver(sys.argv[2])
    if sys.argv[1:2] == ["sender"]:
        return sender(sys.argv[2], sys.argv[3], float(sys.argv[4]))
    say("on this machine, with wireguard-go")
    results = {"machine": machine()}
    say("in the virtual machine, with the kernel's WireGuard")
    command = ["deploy/vm/run", "--limit", str(LIMIT_S), sys.executable, "-m", "tests.bench.control", "inside"]
    with subprocess.Popen([*command, *sys.argv[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True) as guest:
        assert guest.stdout is not None
        for line in guest.stdout:
            if line.startswith(MARK):
                results["virtual_machine"] = json.loads(line.removeprefix(MARK))
            else:
                print(line, end="", flush=True)
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    return guest.returncode


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


# -- time -------------------------------------------------------------------------------------------------------


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ms(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "count": len(ordered),
        "median_ms": round(statistics.median(ordered) * 1e3, 4),
        "p99_ms": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))] * 1e3, 4),
        "min_ms": round(ordered[0] * 1e3, 4),
        "max_ms": round(ordered[-1] * 1e3, 4),
    }


@dataclass
class Turns:
    """Works that take turns; every one of them gives the seconds that count of it."""

    works: dict[str, Callable[[], float]]
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def run(self, times: int) -> dict[str, Any]:
        for _ in range(times):
            for name, work in self.works.items():
                self.seconds.setdefault(name, []).append(work())
        first, *others = self.works
        results: dict[str, Any] = {name: ms(each) for name, each in self.seconds.items()}
        for other in others:
            pairs = zip(self.seconds[first], self.seconds[other], strict=True)
            results[f"{first}_to_{other}"] = round(
                statistics.median(self.seconds[first]) / statistics.median(self.seconds[other]), 5
            )
            results[f"{first}_to_{other}_of_pairs"] = round(statistics.median(a / b for a, b in pairs), 5)
        say(json.dumps(results))
        return results


# -- the parts ----------------------------------------------------------------------------------------------------


def specs(count: int, first: int = 0) -> list[PeerSpec]:
    """Peers that never answer. Any 32 bytes are a public key."""
    endpoint = Endpoint(address=NODES[1], port=9)
    return [
        PeerSpec(PublicKey(os.urandom(31) + b"\1"), endpoint, frozenset({IPv4Network((10 << 24) + (8 << 16) + n)}))
        for n in range(first, first + count)
    ]


def added(peers: Sequence[PeerSpec]) -> tuple[Op, ...]:
    # Without a handshake each: wg starts none either.
    return tuple(AddPeer(peer, initiate=False) for peer in peers)


def base64_of(key: PrivateKey) -> str:
    return str(PublicKey(key.reveal()))


def desired(task: Task, peers: Sequence[PeerSpec]) -> DesiredTask:
    routes = frozenset(Route(network, task.address) for peer in peers for network in peer.allowed_ips)
    return DesiredTask(
        mtu=1420,
        address=task.address,
        peers={peer.public_key: peer for peer in peers},
        routes=routes,
        rules=RULES,
        rules_digest=RULES_DIGEST,
    )


def planned(task: Task, wanted: DesiredTask, seen: ObservedTask) -> tuple[Op, ...]:
    return plan(wanted, seen, new_key=task.key, node=NODE, now=time.time(), prune=True)


def without_rules(ops: Iterable[Op]) -> list[Op]:
    return [op for op in ops if not isinstance(op, SetRules | RemoveRules)]


class Place(contextlib.AbstractContextManager["Place"]):
    """A bench of two nodes, gone afterwards with all its tasks."""

    def __init__(self, backend: str) -> None:
        self._stack = contextlib.ExitStack()
        self._backend = backend
        self._folder = tempfile.TemporaryDirectory()
        self.window = (0.0, 0.0)
        """When the work began and ended that was timed last."""

    def __enter__(self) -> "Place":
        self._stack.enter_context(self._folder)
        self.bench = RealBench(self._stack, Path(self._folder.name), self._backend)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def device(self, peers: Sequence[PeerSpec] = ()) -> Task:
        """A task with an interface."""
        task = self.bench.task()
        self.apply(task, CreateInterface(task.key, 1420, FIRST_PORT, LAST_PORT), SetUp(), *added(peers))
        return task

    def renew(self, task: Task) -> None:
        """Another interface, without peers."""
        found = self.observe(task).interface
        # First its peers: with thousands of them the kernel takes a minute to remove an interface.
        former = () if found is None else tuple(map(RemovePeer, found.peers))
        self.apply(task, *former, RemoveInterface(), CreateInterface(task.key, 1420, FIRST_PORT, LAST_PORT), SetUp())

    def configuration(self, task: Task, peers: Sequence[PeerSpec]) -> str:
        """What ``wg`` would call the task's interface with these peers."""
        found = self.observe(task).interface
        assert found is not None
        parts = [f"[Interface]\nPrivateKey = {base64_of(task.key)}\nListenPort = {found.listen_port}\n"]
        for peer in peers:
            (network,) = peer.allowed_ips
            parts.append(f"[Peer]\nPublicKey = {peer.public_key}\nEndpoint = {peer.endpoint}\nAllowedIPs = {network}\n")
        return "\n".join(parts)

    def apply(self, task: Task, *ops: Op) -> None:
        def work() -> None:
            with task.kernel.open(task.namespace) as session:
                session.apply(ops)

        self.bench.on(task.node, work)

    def time_ops(self, task: Task, *ops: Op) -> float:
        """Seconds that the operations take in a session that has looked, as a pass of the agent has it."""

        def work() -> float:
            with task.kernel.open(task.namespace) as session:
                session.apply([SetUp()])
                return self._timed(lambda: session.apply(ops))

        return self.bench.on(task.node, work)

    def _timed(self, work: Callable[[], object]) -> float:
        start = time.monotonic()
        work()
        self.window = (start, time.monotonic())
        return self.window[1] - start

    def observe(self, task: Task) -> ObservedTask:
        def work() -> ObservedTask:
            with task.kernel.open(task.namespace) as session:
                return session.observe()

        return self.bench.on(task.node, work)

    def time_wg(self, task: Task, *words: str, text: str = "") -> float:
        """Seconds of a process ``wg`` in the task's namespace."""
        with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
            file.write(text)
            file.flush()
            command = ["wg", *(file.name if word == "FILE" else word for word in words)]

            def work() -> float:
                return self._timed(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))

            return namespaces.run_in(task.namespace, work)


# -- in the virtual machine -----------------------------------------------------------------------------------------


class Control:
    def run(self, only: Sequence[str]) -> dict[str, Any]:
        parts: dict[str, Callable[[], Any]] = {
            "new_peers": self.new_peers,
            "one_more_peer": self.one_more_peer,
            "dump_of_1000": self.dump,
            "no_op_reconcile_of_1000": self.no_op,
            "unchanged_under_traffic": self.traffic,
            "rules_under_traffic": self.rules,
            "born_in_target": self.born,
            "socket_elsewhere": lambda: sockets("kernel"),
            "rtnetlink_elsewhere": self.elsewhere,
            "removal_of_1000": self.removal,
            "tasks": lambda: tasks("kernel"),
        }
        results: dict[str, Any] = {"kernel": os.uname().release, "message_work": encode.MESSAGE_WORK}
        for name, part in parts.items():
            if not only or name in only:
                say(name)
                results[name] = part()
        return results

    def new_peers(self) -> dict[str, Any]:
        """So many new peers for an empty device."""
        results = {}
        for count, times in ((1, 9), (10, 9), (100, 7), (1000, 11), (5000, 7), (10000, 5)):
            with Place("kernel") as place:
                works = self._ways_to_add(place, place.bench.task(), specs(count))
                chosen = works if count in (100, 1000) else {name: works[name] for name in ("ours", "setconf")}
                results[str(count)] = Turns(chosen).run(times)
        return results

    @staticmethod
    def _ways_to_add(place: Place, task: Task, peers: Sequence[PeerSpec]) -> dict[str, Callable[[], float]]:
        def on_a_new_device(work: Callable[[], float]) -> Callable[[], float]:
            def measured() -> float:
                place.renew(task)
                took = work()
                found = place.observe(task).interface
                assert found is not None
                assert len(found.peers) == len(peers)
                return took

            return measured

        text = functools.cache(lambda: place.configuration(task, peers))
        works: dict[str, Callable[[], float]] = {
            "ours": lambda: place.time_ops(task, *added(peers)),
            "setconf": lambda: place.time_wg(task, "setconf", "wg0", "FILE", text=text()),
            "pyroute2_set_each": lambda: namespaces.run_in(task.namespace, lambda: pyroute2_sets(peers)),
            "ours_with_handshakes": lambda: place.time_ops(task, *(AddPeer(peer) for peer in peers)),
        }
        return {name: on_a_new_device(work) for name, work in works.items()}

    def one_more_peer(self) -> dict[str, Any]:
        results: dict[str, Any] = {}
        with Place("kernel") as place:
            tasks = {}
            for count in (100, 5000):
                peers = specs(count)
                tasks[count] = (place.device(peers), peers)
            (extra,) = specs(1, 60000)

            def ours(count: int) -> float:
                task, _ = tasks[count]
                took = place.time_ops(task, *added([extra]))
                place.apply(task, RemovePeer(extra.public_key))
                return took

            def syncconf() -> float:
                task, peers = tasks[5000]
                text = place.configuration(task, [*peers, extra])
                took = place.time_wg(task, "syncconf", "wg0", "FILE", text=text)
                place.apply(task, RemovePeer(extra.public_key))
                return took

            results["of_5000"] = Turns(
                {"ours": lambda: ours(5000), "syncconf": syncconf, "ours_on_100": lambda: ours(100)}
            ).run(11)
        return results

    def dump(self) -> dict[str, Any]:
        with Place("kernel") as place:
            task = place.device(specs(1000))

            def read() -> float:
                with task.kernel.open(task.namespace) as session:
                    return timed(session.observe)

            works = {
                "ours": lambda: place.bench.on(0, read),
                "show_dump": lambda: place.time_wg(task, "show", "wg0", "dump"),
            }
            return Turns(works).run(11)

    def no_op(self) -> dict[str, Any]:
        with Place("kernel") as place:
            task, peers = place.bench.task(), specs(1000)
            wanted = desired(task, peers)
            place.apply(task, *planned(task, wanted, place.observe(task)))
            writes: list[int] = []

            def reconcile() -> float:
                def work() -> None:
                    with task.kernel.open(task.namespace) as session:
                        ops = planned(task, wanted, session.observe())
                        assert ops == (), ops
                        session.apply(ops)

                with counted_writes(writes):
                    return place.bench.on(0, lambda: timed(work))

            show = {"show_dump": lambda: place.time_wg(task, "show", "wg0", "dump")}
            results = Turns({"ours": reconcile, **show}).run(11)
            assert writes == [], writes
            return {**results, "writes": len(writes)}

    def traffic(self) -> dict[str, Any]:
        """2,000 packets per second from one task to another, while the receiver's state is applied again."""
        with Place("kernel") as place:
            others = specs(100)
            source, sink, wanted = self._linked(place, others)
            text = place.configuration(sink, [*others, self._spec_of(place, source)])

            def reconcile() -> None:
                ops = planned(sink, wanted, place.observe(sink))
                place.apply(sink, *without_rules(ops))
                reapplied.append(len(without_rules(ops)))

            reapplied: list[int] = []
            works: dict[str, Callable[[], object]] = {
                "nothing": lambda: time.sleep(0.1),
                "ours": reconcile,
                "syncconf": lambda: place.time_wg(sink, "syncconf", "wg0", "FILE", text=text),
            }
            results: dict[str, Any] = self._floods(source, sink, works)
        return {**results, "operations_of_ours": sum(reapplied)}

    def rules(self) -> dict[str, Any]:
        """The same packets, while the rules that let them in go from ``enforce`` to ``observe`` and back."""
        with Place("kernel") as place:
            source, sink, _ = self._linked(place, ())
            links = (Source("bench", (source.address,), (PortRange(protocol=Protocol.UDP, first=9, last=9),)),)
            rendered = [render(RuleSet(mode == "enforce", ("eth0",), (), links)) for mode in ("enforce", "observe")]
            texts = itertools.cycle(rendered)
            place.apply(sink, SetRules(*next(texts)))
            took: dict[str, list[float]] = {"ours": [], "one_transaction": []}

            def exchange() -> None:
                took["ours"].append(place.time_ops(sink, SetRules(*next(texts))))

            def at_once() -> None:
                text = f"delete table inet {nftables.TABLE}\n{next(texts)[0]}"
                took["one_transaction"].append(
                    timed(lambda: namespaces.run_in(sink.namespace, lambda: nftables.apply(text)))
                )

            lost = self._floods(source, sink, {"ours": exchange, "one_transaction": at_once})
            return {name: {"floods": floods, **ms(took[name])} for name, floods in lost.items()}

    def _linked(self, place: Place, others: Sequence[PeerSpec]) -> tuple[Task, Task, DesiredTask]:
        """A source and a sink that reach each other, with other peers besides; and what the sink should have."""
        source, sink = pair = place.bench.task(0), place.bench.task(1)
        for task in pair:
            create = CreateInterface(task.key, 1420, FIRST_PORT, LAST_PORT)
            place.apply(task, create, SetUp(), *added(others))
        specs_of = [self._spec_of(place, task) for task in pair]
        wanted = [desired(task, [*others, spec]) for task, spec in zip(pair, reversed(specs_of), strict=True)]
        for task, state in zip(pair, wanted, strict=True):
            for _ in range(2):
                place.apply(task, *without_rules(planned(task, state, place.observe(task))))
        assert place.bench.latency(source, sink, 30) is not None
        return source, sink, wanted[1]

    @staticmethod
    def _spec_of(place: Place, task: Task) -> PeerSpec:
        port = place.observe(task).interface.listen_port  # type: ignore[union-attr]
        return PeerSpec(task.key.public(), Endpoint(address=NODES[task.node], port=port), frozenset({task.network}))

    def _floods(self, source: Task, sink: Task, works: dict[str, Callable[[], object]]) -> dict[str, Any]:
        """Three floods each, in turns."""
        results: dict[str, Any] = {name: [] for name in works}
        for turn in range(3):
            for name, work in works.items():
                results[name].append(self._flood(source, sink, work, 6.0))
                say(f"{turn} {name} {results[name][-1]}")
        return results

    @staticmethod
    def _flood(source: Task, sink: Task, work: Callable[[], object], seconds: float) -> dict[str, float]:
        me = [sys.executable, "-m", "tests.bench.control"]

        def start(task: Task, *words: str) -> subprocess.Popen[str]:
            command = ["nsenter", f"--net={task.path}", *me, *words]
            return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

        with start(sink, "receiver", str(sink.address)) as receiving:
            assert receiving.stdout is not None
            receiving.stdout.readline()
            with start(source, "sender", str(source.address), str(sink.address), str(seconds)) as sending:
                assert sending.stdout is not None
                sending.stdout.readline()
                done, until = 0, time.monotonic() + seconds - 1
                while time.monotonic() < until:
                    work()
                    done += 1
                    time.sleep(0.2)
                sent, took = json.loads(sending.stdout.readline())
            time.sleep(1)
            received = int(receiving.communicate("end\n")[0])
        return {"sent": sent, "lost": sent - received, "times": done, "per_second": round(sent / took)}

    def born(self) -> dict[str, Any]:
        with Place("kernel") as place:
            task = place.bench.task()

            def with_sockets(work: Callable[[Netlink, Netlink, int], None]) -> float:
                def measured() -> float:
                    there = namespaces.run_in(task.namespace, lambda: Netlink(rtnetlink.NETLINK_ROUTE, Calls()))
                    with (
                        contextlib.closing(Netlink(rtnetlink.NETLINK_ROUTE, Calls())) as here,
                        contextlib.closing(there),
                        namespaces.opened(task.namespace) as fd,
                    ):
                        took = timed(lambda: work(here, there, fd))
                        link = rtnetlink.link_named(there, "hwbench")
                        assert link is not None
                        rtnetlink.remove_link(there, link.index)
                        return took

                return place.bench.on(0, measured)

            def born(here: Netlink, there: Netlink, fd: int) -> None:
                rtnetlink.add_link(here, "hwbench", netlink.KIND, 1420, fd, 1 << 30)

            def moved(here: Netlink, there: Netlink, fd: int) -> None:
                rtnetlink.add_link(here, "hwbench", netlink.KIND, 1420, None, 1 << 30)
                rtnetlink.change_link(here, 1 << 30, namespace_fd=fd)

            return Turns({"born": lambda: with_sockets(born), "moved": lambda: with_sockets(moved)}).run(21)

    def elsewhere(self) -> dict[str, Any]:
        """The links of another namespace, asked for all the while: idle, and while 10,000 peers come to a device."""
        results: dict[str, Any] = {}
        peers = specs(10000)
        chosen = encode.MESSAGE_WORK
        sizes = sorted({1, chosen, 16, 64, 500})
        with Place("kernel") as place:
            other = place.bench.task()

            def probed(work: Callable[[], float]) -> tuple[dict[str, float], float]:
                me = [sys.executable, "-m", "tests.bench.control", "prober", "120"]
                command = ["nsenter", f"--net={other.path}", *me]
                with subprocess.Popen(
                    command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                ) as asking:
                    assert asking.stdout is not None
                    asking.stdout.readline()
                    took = work()
                    asked = json.loads(asking.communicate("end\n")[0])
                begin, end = place.window
                return ms([seconds for at, seconds in asked if begin <= at <= end]), took

            def idle() -> float:
                return place._timed(lambda: time.sleep(4))

            loading = place.bench.task()

            def loaded(size: int) -> float:
                place.renew(loading)
                with messages_of(size):
                    return place.time_ops(loading, *added(peers))

            def setconf() -> float:
                place.renew(loading)
                text = place.configuration(loading, peers)
                return place.time_wg(loading, "setconf", "wg0", "FILE", text=text)

            works: dict[str, Callable[[], float]] = {"idle": idle, "setconf": setconf}
            works |= {f"peers_per_message_{size}": lambda size=size: loaded(size) for size in sizes}  # type: ignore[misc]
            for turn in range(3):
                for name, work in works.items():
                    seen, took = probed(work)
                    results.setdefault(name, []).append({**seen, "load_s": round(took, 3)})
                    say(f"{turn} {name} {results[name][-1]}")
        summary = {
            name: {key: statistics.median(each[key] for each in runs) for key in runs[0]}
            for name, runs in results.items()
        }
        bound = 2 * summary["idle"]["p99_ms"] + 5
        return {**summary, "bound_ms": bound, "p99_ms": summary[f"peers_per_message_{chosen}"]["p99_ms"]}

    def removal(self) -> dict[str, Any]:
        with Place("kernel") as place:
            peers = specs(1000)
            task = place.device()

            def ours(size: int) -> float:
                place.apply(task, *added(peers))
                with messages_of(size):
                    return place.time_ops(task, *(RemovePeer(peer.public_key) for peer in peers))

            return Turns({"ours": lambda: ours(encode.MESSAGE_WORK), "in_messages_of_500": lambda: ours(500)}).run(3)


def pyroute2_sets(peers: Sequence[PeerSpec]) -> float:
    with WireGuard() as wireguard:

        def work() -> None:
            for peer in peers:
                wireguard.set(
                    "wg0",
                    peer={
                        "public_key": str(peer.public_key),
                        "endpoint_addr": str(peer.endpoint.address),
                        "endpoint_port": peer.endpoint.port,
                        "allowed_ips": [str(network) for network in peer.allowed_ips],
                    },
                )

        return timed(work)


@contextlib.contextmanager
def messages_of(size: int) -> Iterator[None]:
    """Let a message add so many peers."""
    before = encode.set_peers
    encode.set_peers = lambda index, changes: before(index, changes, size)  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        encode.set_peers = before


@contextlib.contextmanager
def counted_writes(writes: list[int]) -> Iterator[None]:
    """Note every request that is neither a dump nor a look-up, and every transaction of nftables."""
    send, nft = Netlink._send, nftables.apply
    readers = {18, 22, 26}  # RTM_GETLINK, RTM_GETADDR, RTM_GETROUTE

    def noted(self: Netlink, requests: Any) -> list[int]:
        dump = rtnetlink.NLM_F_DUMP
        writes.extend(r.kind for r in requests if r.flags & dump != dump and r.kind not in readers)
        return send(self, requests)

    def transaction(text: str) -> None:
        writes.append(-1)
        nft(text)

    Netlink._send, nftables.apply = noted, transaction  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Netlink._send, nftables.apply = send, nft  # type: ignore[method-assign]


# -- processes beside it --------------------------------------------------------------------------------------------


def prober(limit_s: float) -> int:
    """Ask for a link of the own namespace, which takes the lock of all namespaces, until told to end."""
    seconds: list[tuple[float, float]] = []
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), ended.set()), daemon=True).start()
    with contextlib.closing(Netlink(rtnetlink.NETLINK_ROUTE, Calls())) as routes:
        request = rtnetlink.changed_link(1, alias="probed")
        routes.ask(request)
        print("ready", flush=True)
        until = time.monotonic() + limit_s
        while not ended.is_set() and time.monotonic() < until:
            seconds.append((time.monotonic(), timed(lambda: routes.ask(request))))
            time.sleep(0.005)
    print(json.dumps(seconds))
    return 0


def receiver(address: str) -> int:
    count, ended = 0, threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), ended.set()), daemon=True).start()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 26)
        udp.bind((address, 9))
        udp.settimeout(0.1)
        print("ready", flush=True)
        while not ended.is_set():
            with contextlib.suppress(TimeoutError):
                udp.recv(100)
                count += 1
    print(count)
    return 0


def sender(source: str, address: str, seconds: float) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind((source, 0))
        udp.connect((address, 9))
        print("ready", flush=True)
        start, sent = time.monotonic(), 0
        while (now := time.monotonic()) < start + seconds:
            while sent < (now - start) * 2000:
                udp.send(b"12345678")
                sent += 1
            time.sleep(0.005)
        print(json.dumps([sent, time.monotonic() - start]))
    return 0


# -- both backends --------------------------------------------------------------------------------------------------


def sockets(backend: str) -> dict[str, Any]:
    """A netlink socket in the namespace of a task: from its path to a socket that can be used."""
    with Place(backend) as place:
        task = place.bench.task()

        def ours() -> float:
            start = time.perf_counter()
            made = namespaces.run_in(task.namespace, lambda: Netlink(rtnetlink.NETLINK_ROUTE, Calls()))
            took = time.perf_counter() - start
            made.close()
            return took

        def pyroute2() -> float:
            start = time.perf_counter()
            made = IPRoute(netns=task.path)
            took = time.perf_counter() - start
            made.close()
            return took

        for _ in range(200):
            ours()
        results = Turns({"ours": ours, "pyroute2": pyroute2}).run(51)
        results["ours_alone"] = ms([place.bench.on(0, ours) for _ in range(500)])
        say(json.dumps(results["ours_alone"]))
        return results


def set_up(task: Task, peers: Sequence[PeerSpec]) -> None:
    """All that a pass of the agent does for a new task whose namespace is known."""
    wanted = desired(task, peers)
    with task.kernel.open(task.namespace) as session:
        session.apply(planned(task, wanted, session.observe()))
        assert session.observe().interface is not None


def tear_down(task: Task) -> None:
    with task.kernel.open(task.namespace) as session:
        session.apply([RemoveRules(), RemoveInterface()])


def tasks(backend: str) -> dict[str, Any]:
    """Tasks of 10 peers: ready after what time, what of it is spent where, and how many per second come and go."""
    results: dict[str, Any] = {}
    peers = specs(10)
    with Place(backend) as place:
        these = [place.bench.task() for _ in range(8)]
        up: list[float] = []
        down: list[float] = []
        requests: list[int] = []
        spent: dict[str, list[float]] = {}
        for turn in range(4):
            for task in these:
                before = task.kernel.calls
                with timed_parts() as parts:
                    took = place.bench.on(0, lambda task=task: timed(lambda: set_up(task, peers)))  # type: ignore[misc]
                requests.append(task.kernel.calls - before)
                gone = place.bench.on(0, lambda task=task: timed(lambda: tear_down(task)))  # type: ignore[misc]
                if turn:
                    up.append(took)
                    down.append(gone)
                    for name, seconds in {**parts, "rest": took - sum(parts.values())}.items():
                        spent.setdefault(name, []).append(seconds)
        results["ready"] = ms(up)
        results["of_it"] = {name: ms(each) for name, each in spent.items()}
        without = [sum(each) for each in zip(*(spent[n] for n in spent if n != "wireguard_go"), strict=True)]
        results["ready_without_start_of_wireguard_go"] = ms(without)
        results["requests"] = statistics.median(requests)
        results["torn_down"] = ms(down)
        with ThreadPoolExecutor(4) as pool:
            whole = timed(lambda: list(pool.map(lambda t: place.bench.on(0, lambda: set_up(t, peers)), these)))
            results["set_up_per_second_by_4_threads"] = round(len(these) / whole, 2)
            whole = timed(lambda: list(pool.map(lambda t: place.bench.on(0, lambda: tear_down(t)), these)))
            results["torn_down_per_second_by_4_threads"] = round(len(these) / whole, 2)
        results["set_up_per_second"] = round(1 / statistics.median(up), 2)
        results["torn_down_per_second"] = round(1 / statistics.median(down), 2)
    say(json.dumps(results))
    return results


@contextlib.contextmanager
def timed_parts() -> Iterator[dict[str, float]]:
    """Note the seconds of what dominates: wireguard-go from its start until it is up, nft, links moved elsewhere."""
    spent = {"wireguard_go": 0.0, "nft": 0.0, "move_of_a_link": 0.0}

    def noted(name: str, work: Callable[..., Any], counts: Callable[..., bool] = lambda *_, **__: True) -> Any:
        def measured(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return work(*arguments, **named)
            finally:
                if counts(*arguments, **named):
                    spent[name] += time.perf_counter() - start

        return measured

    def is_move(*_: object, namespace_fd: int | None = None, **__: object) -> bool:
        return namespace_fd is not None

    with contextlib.ExitStack() as stack:
        for owner, attribute, name, counts in (
            (HostClient, "ask", "wireguard_go", lambda _, command, *__: isinstance(command, Start)),
            (UserspaceDriver, "_wait_until_up", "wireguard_go", lambda *_: True),
            (nftables, "apply", "nft", lambda *_: True),
            (rtnetlink, "change_link", "move_of_a_link", is_move),
        ):
            before = getattr(owner, attribute)
            setattr(owner, attribute, noted(name, before, counts))
            stack.callback(setattr, owner, attribute, before)
        yield spent


def machine() -> dict[str, Any]:
    return {
        "kernel": os.uname().release,
        "socket_elsewhere": sockets("userspace"),
        "tasks": tasks("userspace"),
    }


if __name__ == "__main__":
    sys.exit(main())
