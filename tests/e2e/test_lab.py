"""The lab itself: it makes a Swarm, it survives what breaks, and it leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab import Lab, LabError
from lab.progress import Progress

pytestmark = pytest.mark.e2e

COMMAND = (sys.executable, str(Path(__file__).resolve().parents[2] / "deploy" / "lab" / "lab"))
MARKS = ("hwlab", "hivewire-lab", "/hivewire/engines/")


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A lab that is down before and after the test; one that somebody else started is left alone."""
    lab = Lab(progress=Progress(None))
    if lab.is_up:
        pytest.fail("a lab is up already, and there can be only one: end it with `lab down`")
    lab.down()
    yield lab
    lab.down()


def traces() -> list[str]:
    """What of a lab is on the machine, found without the lab's own code."""
    found = [str(path) for path in Path("/run/netns").glob("hwlab-*")]
    found += [str(path) for path in Path("/run").glob("hivewire-lab*")]
    found += [line for line in Path("/proc/mounts").read_text().splitlines() if any(mark in line for mark in MARKS)]
    if not any(Path("/run/netns").glob("*")):  # else it is in use by others
        found += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if " /run/netns " in line]
    found += [str(path) for path in Path("/sys/fs/cgroup").glob("**/hivewire-lab")]
    for pid in (entry for entry in os.listdir("/proc") if entry.isdigit()):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            cgroup = Path(f"/proc/{pid}/cgroup").read_text()
        except OSError:
            continue
        if int(pid) != os.getpid() and ("hivewire-lab" in cgroup or any(mark in words for mark in MARKS)):
            found.append(f"process {pid}: {words}")
    return found


def in_root_network() -> tuple[str, str]:
    """Links and rules of the machine itself."""
    links = subprocess.run(("ip", "-j", "link"), capture_output=True, text=True, check=True).stdout
    rules = subprocess.run(("nft", "list", "ruleset"), capture_output=True, text=True, check=False).stdout
    return json.dumps(sorted(link["ifname"] for link in json.loads(links))), rules


def eventually(holds: Callable[[], bool], timeout_s: float = 30) -> bool:
    """Wait until something holds."""
    deadline = time.monotonic() + timeout_s
    while not (now := holds()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return now


def swarm_states(lab: Lab) -> dict[str, tuple[str, str]]:
    """Engine and Swarm state of each node."""
    return {node.name: (node.engine, node.swarm) for node in lab.ps()}


def test_a_lab_comes_up_refuses_a_second_and_goes_without_a_trace(lab: Lab) -> None:
    """Three ready nodes; a second `up` changes nothing and says why; `down` works once and again."""
    before = in_root_network()
    lab.up()
    assert lab.is_up
    assert swarm_states(lab) == dict.fromkeys(("n1", "n2", "n3"), ("running", "ready"))
    assert [node.role for node in lab.ps()] == ["manager", "worker", "worker"]
    assert lab.exec("n2", "hostname").stdout == "n2\n"
    assert "default" not in lab.exec("n2", "ip", "route").stdout, "a node has a way out"

    with pytest.raises(LabError, match=r"up already, started 20.*by.*lab down"):
        lab.up()
    assert swarm_states(lab)["n1"] == ("running", "ready")

    lab.down()
    assert traces() == []
    assert in_root_network() == before
    lab.down()
    with pytest.raises(LabError, match="lab up"):
        _ = lab.nodes


def test_a_killed_engine_is_a_failed_node_that_can_come_back(lab: Lab) -> None:
    """SIGKILL to one dockerd: the node is down in the Swarm's eyes, and `restart` heals it."""
    lab.up()
    lab.fail("n2", "kill")
    assert eventually(lambda: swarm_states(lab)["n2"] == ("dead", "down"))
    assert swarm_states(lab)["n3"] == ("running", "ready")
    with pytest.raises(LabError, match="restart"):
        lab.fail("n2", "kill")
    lab.fail("n2", "restart")
    assert eventually(lambda: swarm_states(lab)["n2"] == ("running", "ready"))

    lab.fail("n3", "kill")
    lab.down()
    assert traces() == []


def test_an_unplugged_node_is_down_until_it_is_plugged_in(lab: Lab, tmp_path: Path) -> None:
    """The cable of a node can be pulled; what passes on the underlay can be recorded."""
    lab.up(nodes=2)
    file = tmp_path / "underlay.pcap"
    with lab.capture(file) as wire:
        lab.exec("n1", "bash", "-c", "echo seen-in-clear >/dev/udp/10.77.0.2/9")
    assert wire.contains(b"seen-in-clear")
    assert wire.count("udp port 9") == 1
    lab.fail("n2", "unplug")
    assert eventually(lambda: swarm_states(lab)["n2"] == ("running", "down"))
    lab.fail("n2", "plug")
    assert eventually(lambda: swarm_states(lab)["n2"] == ("running", "ready"))


@pytest.mark.parametrize("after_s", [0.3, 0.6, 1.0, 1.5])
def test_a_start_that_was_killed_leaves_nothing_that_down_or_up_cannot_remove(lab: Lab, after_s: float) -> None:
    """SIGKILL to `lab up` at several moments: the next `up` cleans and works, `down` leaves nothing."""
    start = subprocess.Popen((*COMMAND, "up"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(after_s)
    start.send_signal(signal.SIGKILL)
    start.wait()
    if not lab.is_up:  # else it was quicker than us
        lab.up(nodes=1)
        assert swarm_states(lab) == {"n1": ("running", "ready")}
    lab.down()
    assert traces() == []


def test_down_ends_a_half_dead_lab(lab: Lab) -> None:
    """A node's first process and the registry killed, its state gone: `down` still leaves nothing."""
    lab.up(nodes=2)
    os.kill(lab.node("n1").pid, signal.SIGKILL)
    os.kill(int((lab.settings.state / "registry.pid").read_text()), signal.SIGKILL)
    for file in lab.settings.state.glob("lab.json"):
        file.unlink()
    lab.down()
    assert traces() == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("up", "--nodes", "0"), "--nodes 0: choose"),
        (("up", "--managers", "4"), "--managers 4: choose"),
        (("ps",), "lab up"),
        (("docker", "n1", "ps"), "lab up"),
    ],
)
def test_what_cannot_work_is_refused_in_words(lab: Lab, arguments: tuple[str, ...], said: str) -> None:
    """A wrong command line names the thing and what to do, and changes nothing."""
    assert not lab.is_up
    refused = subprocess.run((*COMMAND, *arguments), capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert said in refused.stderr
    assert "Traceback" not in refused.stderr
    assert traces() == []


def test_only_root_may(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without root nothing is tried."""
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(LabError, match="root"):
        lab.up()
    monkeypatch.undo()
    assert traces() == []


def test_three_managers_on_the_newer_engine(lab: Lab) -> None:
    """The Debian 13 engine runs in a root of its own, and a Swarm may have several managers."""
    lab.up(managers=3, engine="trixie")
    assert [(node.role, node.swarm) for node in lab.ps()] == [("manager", "ready")] * 3
    versions = [lab.docker(node, "version", "-f", "{{.Server.Version}}").stdout for node in lab.nodes]
    assert all(version.startswith("26.") for version in versions)
    lab.down()
    assert traces() == []
