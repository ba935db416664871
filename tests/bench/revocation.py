"""How long what is revoked still gets through: from the command to the last packet that arrives on any node.

A caller on every node sends a small UDP packet to the callee of the next node, a thousand times a second. The link's
label is removed, or the service is put into quarantine; the kernel's own time of the last packet that came in, on
whichever node that was, is compared with the time at which the command was given, and at which it came back.
"""

import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from lab.images import Images
from lab.progress import Progress
from proof.deployed import Deployed, wait_for

from agent.kernel import namespace
from hivewire.ids import TaskId
from tests.bench import places
from tests.bench.datapath import Sink

STACK = "revocation"
CALLER, CALLEE = f"{STACK}_caller", f"{STACK}_callee"
PORT = 9000
EVERY_S = 0.001
SILENT_S = 1.0
"""Nothing came for this long: closed."""
_PATIENCE_S = 60
_SO_TIMESTAMPNS = 35  # asm-generic/socket.h; Python has no name for it


class Flow:
    """Packets from one task to another, and when the last one arrived. Times are Unix seconds."""

    def __init__(self, sender: places.Place, receiver: places.Place, address: str) -> None:
        self.target = (address, PORT)
        self.sender = _socket_in(sender)
        self.receiver = _socket_in(receiver)
        self.receiver.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self.receiver.bind(("", PORT))
        self.last = 0.0
        self.first_after = 0.0
        """When a packet came after a silence."""

    def send(self) -> None:
        # A route or a rule that refuses is what is waited for.
        with contextlib.suppress(OSError):
            self.sender.sendto(b"hivewire", self.target)

    def receive(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                _, ancillary, _, _ = self.receiver.recvmsg(64, 64)
                seconds, nanoseconds = struct.unpack("qq", ancillary[0][2])
                arrived = seconds + nanoseconds / 1e9
                if arrived - self.last > SILENT_S / 2:
                    self.first_after = arrived
                self.last = arrived

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()


def measure(mesh: Deployed, images: Images, runs: int, progress: Progress, sink: Sink) -> None:
    """Raises LabError where traffic does not begin, or does not end."""
    stack = str(Path(__file__).with_name("revocation.yml"))
    with progress.step("callers and callees on every node"):
        mesh.docker("stack", "deploy", "-c", stack, STACK, env={"HIVEWIRE_DEMO_IMAGE": images.demo})
        nodes = len(mesh.lab.nodes)
        for service in (CALLER, CALLEE):
            wait_for(f"a task of {service} on every node", partial(_has_tasks, mesh, service, nodes), 120)
        mesh.wait_ready(180)
    ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "label": (
            lambda: mesh.update(CALLER, "--label-rm", "hivewire.links"),
            lambda: mesh.update(CALLER, "--label-add", "hivewire.links=callee"),
        ),
        "quarantine": (
            lambda: mesh.cli("quarantine", "service", CALLER, "--reason", "bench", "--wait", "0s"),
            lambda: mesh.cli("release", "service", CALLER),
        ),
    }
    with _flowing(_flows(mesh)) as flows:
        for what, (close, reopen) in ways.items():
            with progress.step(f"{runs} times: {what}"):
                for _ in range(runs):
                    sink({"kind": "revocation", "what": what, **_once(flows, close, reopen)})
    mesh.remove(STACK)


def _has_tasks(mesh: Deployed, service: str, count: int) -> bool:
    return len(mesh.tasks(service)) == count


def _once(flows: list[Flow], close: Callable[[], object], reopen: Callable[[], object]) -> dict[str, float]:
    wait_for("packets on every node", lambda: _all_flow(flows), _PATIENCE_S, 0.05)
    given = time.time()
    close()
    returned = time.time()
    wait_for("the last packet", lambda: time.time() - max(f.last for f in flows) > SILENT_S, _PATIENCE_S, 0.05)
    last = max(flow.last for flow in flows)
    asked = time.time()
    reopen()
    back = time.time()
    wait_for("packets again", lambda: _all_flow(flows), _PATIENCE_S, 0.05)
    return {
        "last_packet_after_return_s": last - returned,
        "last_packet_after_command_s": last - given,
        "open_after_return_s": max(flow.first_after for flow in flows) - back,
        "open_after_command_s": max(flow.first_after for flow in flows) - asked,
    }


def _all_flow(flows: list[Flow]) -> bool:
    now = time.time()
    return all(now - flow.last < 0.2 for flow in flows)


def _flows(mesh: Deployed) -> list[Flow]:
    callers, callees = mesh.tasks(CALLER), mesh.tasks(CALLEE)
    nodes = [node.name for node in mesh.lab.nodes]
    made = []
    for number, node in enumerate(nodes):
        sender = next(task for task in callers if task.node == node)
        receiver = next(task for task in callees if task.node == nodes[(number + 1) % len(nodes)])
        ends = (places.of_task(mesh, sender), places.of_task(mesh, receiver))
        made.append(Flow(*ends, mesh.addresses(receiver)[0]))
    return made


@contextlib.contextmanager
def _flowing(flows: list[Flow]) -> Iterator[list[Flow]]:
    """A thread sends and another one receives while the block runs."""
    stop = threading.Event()

    def send() -> None:
        while not stop.wait(EVERY_S):
            for flow in flows:
                flow.send()

    def receive() -> None:
        by_number = {flow.receiver.fileno(): flow for flow in flows}
        poll = select.poll()
        for number in by_number:
            poll.register(number, select.POLLIN)
        while not stop.is_set():
            for number, _ in poll.poll(100):
                by_number[number].receive()

    threads = [threading.Thread(target=work, daemon=True) for work in (send, receive)]
    for thread in threads:
        thread.start()
    try:
        yield flows
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        for flow in flows:
            flow.close()


def _socket_in(place: places.Place) -> socket.socket:
    """A socket stays in the namespace that it was made in, whichever thread uses it."""
    there = namespace.identify(TaskId("bench"), place.path)
    made = namespace.run_in(there, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK))
    made.setblocking(False)
    return made
