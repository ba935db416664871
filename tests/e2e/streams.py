"""Traffic over a link that counts itself, in a task: one TCP connection and one stream of datagrams, each answered.

The state is a file in the task, replaced as a whole, so that it can be read at any moment.
"""

import json
from dataclasses import dataclass

from proof.deployed import Deployed, Task, wait_for

_CLIENT = """
import json, os, socket, sys, threading, time
host, port, mark, state, pause = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4], float(sys.argv[5])
seen = {"connections": 0, "answers": 0, "sent": 0, "heard": 0, "refused": {}, "lost": [], "last": 0.0, "done": False}
stop = threading.Event()
def tcp():
    while not stop.is_set():
        try:
            with socket.create_connection((host, port), 5) as channel:
                channel.settimeout(30)
                seen["connections"] += 1
                lines = channel.makefile("rb")
                while not stop.is_set():
                    channel.sendall(b"%s %d\\n" % (mark.encode(), seen["answers"]))
                    if not lines.readline():
                        break
                    seen["answers"] += 1
                    seen["last"] = time.time()
                    time.sleep(pause)
        except OSError:
            time.sleep(0.05)
def udp():
    channel = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    channel.settimeout(0.2)
    sent, heard = [], set()
    def listen():
        while not seen["done"]:
            try:
                heard.add(int(channel.recv(200).split()[1]))
                seen["heard"] = len(heard)
            except OSError:
                pass
    threading.Thread(target=listen, daemon=True).start()
    while not stop.is_set():
        now = time.time()
        try:
            channel.sendto(b"%s %d" % (mark.encode(), len(sent)), (host, port))
            sent.append(now)
            seen["sent"] = len(sent)
        except OSError as error:
            seen["refused"][str(error)] = seen["refused"].get(str(error), 0) + 1
        time.sleep(pause)
    quiet, before = 0, -1  # an answer may be late; when for so long none came, what is missing is lost
    while len(heard) < len(sent) and quiet < 50:
        quiet, before = (quiet + 1 if len(heard) == before else 0), len(heard)
        time.sleep(0.1)
    seen["lost"] = [at for number, at in enumerate(sent) if number not in heard][:100]
threads = [threading.Thread(target=work) for work in (tcp, udp)]
for thread in threads:
    thread.start()
def save():
    with open(state + ".new", "w") as file:
        json.dump(seen, file)
    os.replace(state + ".new", state)
while not os.path.exists(state + ".stop"):
    save()
    time.sleep(0.1)
stop.set()
for thread in threads:
    thread.join()
seen["done"] = True
save()
"""

SERVER = """
import collections, json, os, socket, sys, threading, time
heard = collections.Counter()
def note(kind, port, data):
    heard[f"{kind} {port} {data.decode(errors='replace').split(' ')[0][:40]}"] += 1
def serve(client, port):
    with client:
        lines = client.makefile("rb")
        try:
            for line in lines:
                note("tcp", port, line)
                client.sendall(line)
        except OSError:
            pass
def tcp(port):
    listener = socket.create_server(("", port), backlog=64)
    while True:
        client, _ = listener.accept()
        heard[f"tcp {port}"] += 1
        threading.Thread(target=serve, args=(client, port), daemon=True).start()
def udp(port):
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("", port))
    while True:
        data, client = server.recvfrom(2048)
        note("udp", port, data)
        server.sendto(data, client)
for port in map(int, sys.argv[1:]):
    for work in (tcp, udp):
        threading.Thread(target=work, args=(port,), daemon=True).start()
while True:
    with open("/tmp/heard.new", "w") as file:
        json.dump(dict(heard), file)
    os.replace("/tmp/heard.new", "/tmp/heard")
    time.sleep(0.1)
"""
"""Answers what it gets on the ports of its command line and counts it, in ``/tmp/heard``, by the first word."""


@dataclass(frozen=True)
class Seen:
    """How a stream went until now."""

    connections: int
    answers: int
    sent: int
    heard: int
    refused: dict[str, int]
    """How many datagrams could not be sent, by what the kernel said."""
    lost: list[float]
    """Unix times of the datagrams that were never answered, the first hundred; known at the end."""
    last: float
    """Unix time of the last answer over TCP."""
    done: bool


@dataclass(frozen=True)
class Stream:
    mesh: Deployed
    task: Task
    state: str

    def seen(self) -> Seen:
        return Seen(**json.loads(self.mesh.exec(self.task, "cat", self.state)))

    def goes_on(self, what: str, timeout_s: float = 60) -> None:
        """Over both protocols, from now on. Raises LabError."""
        before = self.seen()
        wait_for(
            f"{what}: more answers, after {before}",
            lambda: (now := self.seen()).answers > before.answers + 5 and now.heard > before.heard + 5,
            timeout_s,
        )

    def end(self) -> Seen:
        """Stop it, and tell how it went."""
        self.mesh.exec(self.task, "touch", f"{self.state}.stop")
        wait_for("the end of the stream", lambda: self.seen().done, 60)
        return self.seen()


def start(mesh: Deployed, task: Task, host: str, port: int, mark: str, pause_s: float = 0.02) -> Stream:
    """Returns once it is answered over both protocols."""
    stream = Stream(mesh, task, f"/tmp/stream-{mark}-{host}")
    mesh.exec(task, "sh", "-c", f"rm -f {stream.state} {stream.state}.stop")
    words = (host, str(port), mark, stream.state, str(pause_s))
    mesh.lab.docker(task.node, "exec", "-d", task.container, "python3", "-c", _CLIENT, *words)
    wait_for("the stream", lambda: mesh.exec(task, "cat", stream.state, check=False).startswith("{"), 30)
    stream.goes_on("the stream begins")
    return stream


def heard(mesh: Deployed, task: Task) -> dict[str, int]:
    """What a server of the kind above got until now: by protocol, port and mark; accepted connections without mark."""
    counts: dict[str, int] = json.loads(mesh.exec(task, "cat", "/tmp/heard"))
    return counts
