"""Agents on real namespaces: their own reconcile pass, without engine and Swarm, on the nodes of a bench.

The overlay network is a bridge in a namespace of its own that every task has a veth to. It stands for VXLAN, and for
Swarm's load balancer: the VIP is an address of the bridge, from which connections go on to a backend from another
source, as IPVS does it. Each task's namespace tracks connections, as Docker's rules for its DNS make it do.
"""

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address
from pathlib import Path

from lab.patience import patient

from agent.book import Book
from agent.grace import Grace
from agent.kernel.paths import PathSockets
from agent.ops import ForgetFlows, Op
from agent.paths import PathWatch
from agent.reconciler import TaskReconciler
from agent.seen import Seen
from agent.tasks import LocalTask, TaskEvent
from agent.wiring import queue_all
from hivewire.errors import TaskGone
from hivewire.ids import ContainerId, NetworkId, NodeId, ServiceId, TaskId
from hivewire.records import (
    CLAIMS,
    Address,
    ClaimRecord,
    Link,
    MeshRecord,
    Mode,
    Network,
    NodeRecord,
    PeerRecord,
    PolicyRecord,
    PortRange,
    Protocol,
    Record,
    decode,
    encode,
    key_of,
)
from hivewire.store.api import Put
from hivewire.store.memory import MemoryStore
from hivewire.workqueue import WorkQueue
from tests.contract.test_kernel import FIRST_PORT, NODES, RealBench, Task, _ip, _path, _run
from tests.fakes.signatures import Unsigned

NETWORK = NetworkId("app")
VIP = IPv4Address("10.9.0.200")
PORT = 9000
_BALANCER = IPv4Address("10.9.0.201")
_TRACKING = """
add table ip docker
add chain ip docker out { type nat hook output priority -100; }
add rule ip docker out ip daddr 127.0.0.11 dnat to 127.0.0.11
"""
PORTS = tuple(PortRange(protocol=p, first=PORT, last=PORT) for p in Protocol)


class OverlayBench(RealBench):
    """A bench whose tasks reach each other in clear, too."""

    underlay: tuple[Address, ...] = NODES

    def _join(self) -> None:
        super()._join()
        self._overlay = self._hold()
        self._count = 0
        _ip(self._overlay, "link set lo up", "link add br0 type bridge", "link set br0 up")
        _ip(self._overlay, f"address add {VIP}/24 dev br0", f"address add {_BALANCER}/24 dev br0")

    def _put(self, path: str, address: IPv4Address) -> None:
        holder = self._hold()
        self._count += 1
        _ip(self._overlay, f"link add v{self._count} mtu 1450 type veth peer name eth0 mtu 1450 netns {holder.pid}")
        _ip(self._overlay, f"link set v{self._count} master br0 up")
        _ip(holder, "link set lo up", f"address add {address}/24 dev eth0", "link set eth0 up")
        _run(holder, "nft", _TRACKING)
        Path(path).unlink(missing_ok=True)
        Path(path).symlink_to(_path(holder))
        self._holders[path] = holder

    def balance(self, backend: Task) -> None:
        """Let the VIP lead to this task, in clear."""
        rules = f"""
            add table ip balancer
            add chain ip balancer in {{ type nat hook prerouting priority -100; }}
            add rule ip balancer in ip daddr {VIP} dnat to {backend.address}
            add chain ip balancer out {{ type nat hook postrouting priority 100; }}
            add rule ip balancer out ct status dnat ip daddr {backend.address} snat to {_BALANCER}
        """
        _run(self._overlay, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        _run(self._overlay, "nft", rules)

    def forget(self, task: Task, address: IPv4Address) -> None:
        """Let the namespace forget the tracked connections with an address."""

        def work() -> None:
            with task.kernel.open(task.namespace) as session:
                session.apply([ForgetFlows(frozenset({address}))])

        self.on(task.node, work)

    def enter(self, task: Task) -> tuple[str, ...]:
        return ("nsenter", f"--net={_path(self._holders[task.path])}")

    def node(self, number: int) -> NodeRecord:
        address = self.underlay[number]
        return NodeRecord(
            node=NodeId(f"node-{number}"),
            hostname=f"n{number}",
            agent_version="1",
            underlay_address=address,
            underlay_mtu=self.on(number, lambda: self.kernel(number).underlay(address)).mtu,
            backend=self._backend,
            first_port=FIRST_PORT,
            last_port=FIRST_PORT + 9,
        )


class Engine:
    """What one node's engine knows."""

    def __init__(self) -> None:
        self.running: dict[TaskId, LocalTask] = {}

    def get(self, task: TaskId) -> LocalTask:
        if task not in self.running:
            raise TaskGone(f"task {task} has no running container")
        return self.running[task]

    def list(self) -> dict[TaskId, ServiceId]:
        return {task: local.service for task, local in self.running.items()}


class Agent:
    """The agent of one node. A new one is a restarted one: it has the kernel and the store, and nothing else."""

    def __init__(self, bench: OverlayBench, number: int, store: MemoryStore, engine: Engine) -> None:
        self._bench = bench
        self._number = number
        self.record = bench.node(number)
        self._sockets = PathSockets()
        self.paths = PathWatch(self._sockets, lambda: self.record.underlay_mtu, lambda: queue_all(self.reconciler))
        self.queue: WorkQueue[TaskId] = WorkQueue()
        self.ops: list[Op] = []
        self.kernel = bench.kernel(number)
        self.reconciler = TaskReconciler(
            node=lambda: self.record,
            tasks=engine,
            kernel=self.kernel,
            store=store,
            queue=self.queue,
            signatures=Unsigned(),
            book=Book(Unsigned(), Seen()),
            paths=self.paths,
            grace=Grace(known_s=0.2),
        )
        self.reconciler.resync()

    def step(self) -> None:
        """Do what is due."""
        self.reconciler.mirror.step(0.0)
        while (task := self.queue.get(0.0)) is not None:
            try:
                outcome = self._bench.on(self._number, lambda task=task: self.reconciler.reconcile(task))
            finally:
                self.queue.done(task)
            self.ops += outcome.ops

    def measure(self) -> None:
        """What the agent's other threads do now and then: look at the underlay, and at the paths to other nodes."""
        self.record = self._bench.node(self._number)

        def find_out() -> None:
            self.paths.send(only_new=False)
            time.sleep(0.2)
            self.paths.look()
            self._sockets.close()

        self._bench.on(self._number, find_out)
        self.reconciler.resync()


class Cluster:
    """Two nodes with an agent each, the store, and a controller that admits whatever is claimed."""

    def __init__(self, bench: OverlayBench) -> None:
        self.bench = bench
        self.store = MemoryStore()
        self.engines = [Engine() for _ in NODES]
        self.admits: Callable[[ClaimRecord], bool] = lambda _claim: True
        self._admitted: dict[TaskId, PeerRecord] = {}
        self.put(MeshRecord(mesh="m", settled=True))
        self.agents = [self.agent(number) for number in range(len(NODES))]

    def agent(self, number: int) -> Agent:
        return Agent(self.bench, number, self.store, self.engines[number])

    def restart(self) -> None:
        """All agents are gone, and others come."""
        self.agents = [self.agent(number) for number in range(len(NODES))]

    def run(self, service: str, node: int) -> Task:
        task = self.bench.task(node)
        self.engines[node].running[task.id] = LocalTask(
            task=task.id,
            name=f"{service}.1",
            service=ServiceId(service),
            container=ContainerId(f"container-{task.id}"),
            sandbox=task.path,
            addresses={NETWORK: task.address},
            is_healthy=True,
        )
        self.agents[node].reconciler.on_event(TaskEvent(task.id, "start", stops=False))
        return task

    def put(self, *records: Record) -> None:
        self.store.txn((), [Put(key_of(record), encode(record)) for record in records])

    def link(self, source: str, destination: str, *, modes: tuple[Mode, Mode] = (Mode.OBSERVE, Mode.OBSERVE)) -> None:
        """Policies as the controller compiles them: source may talk to destination, by its VIP as well."""
        out = _link(destination, VIP)
        self.put(
            _policy(source, modes[0], out_links=(out,)),
            _policy(destination, modes[1], in_links=(_link(source, None),)),
        )

    def unlink(self, *services: str) -> None:
        """These services left the mesh."""
        self.put(*(_policy(service, Mode.OFF) for service in services))

    def admit(self) -> None:
        """What the controller does with claims."""
        addresses = {it.task: it.addresses for engine in self.engines for it in engine.running.values()}
        for item in self.store.list(CLAIMS).items:
            claim = decode(ClaimRecord, item.value)
            if claim.task not in addresses or not self.admits(claim):
                continue
            peer = PeerRecord(
                task=claim.task,
                task_name=claim.task,
                service=claim.service,
                node=claim.node,
                public_key=claim.public_key,
                endpoint=claim.endpoint,
                epoch=claim.epoch,
                addresses=dict(addresses[claim.task]),
                serving=claim.serving,
                underlay_mtu=claim.underlay_mtu,
            )
            if self._admitted.get(claim.task) != peer:
                self._admitted[claim.task] = peer
                self.put(peer)

    def step(self, agents: Iterable[int] = range(len(NODES))) -> None:
        for number in agents:
            self.agents[number].step()
        self.admit()

    def until(self, holds: Callable[[], bool], what: str, patience_s: float = patient(20.0)) -> None:
        """Let the agents work until it holds."""
        deadline = time.monotonic() + patience_s
        while not holds():
            assert time.monotonic() < deadline, f"not within {patience_s} s: {what}"
            self.step()
            time.sleep(0.01)

    def work(self, seconds: float) -> None:
        """Let the agents work for a while."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.step()
            time.sleep(0.01)

    def goes_through(self, source: Task, destination: IPv4Address) -> str:
        """The interface by which the source sends there."""
        words = self.bench.run(source, "ip", "-4", "route", "get", str(destination)).split()
        return words[words.index("dev") + 1]

    def are_linked(self, one: Task, other: Task) -> bool:
        ways = (self.goes_through(one, other.address), self.goes_through(other, one.address))
        return ways == ("wg0", "wg0")

    def has_interface(self, task: Task) -> bool:
        with contextlib.suppress(subprocess.CalledProcessError):
            return "wg0" in self.bench.run(task, "ip", "-br", "link", "show", "dev", "wg0")
        return False


def _link(service: str, vip: IPv4Address | None) -> Link:
    return Link(service=ServiceId(service), name=service, network=NETWORK, ports=PORTS, vip=vip)


def _policy(
    service: str, mode: Mode, *, out_links: tuple[Link, ...] = (), in_links: tuple[Link, ...] = ()
) -> PolicyRecord:
    return PolicyRecord(
        service=ServiceId(service),
        name=service,
        stack="",
        mode=mode,
        networks=(Network(id=NETWORK, name="app", subnets=("10.9.0.0/24",)),),
        out_links=out_links,
        in_links=in_links,
    )
