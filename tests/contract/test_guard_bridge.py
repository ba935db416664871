"""The guard's rules in the kernel: a bridge as in an overlay namespace, and frames that do or do not get across.

    local task (enforced) --veth0--.            .--veth1-- local task (exempt)
                                   '--- br0 ----'
                                         '------vxlan0-- the other nodes

Each end is a network namespace that lives as long as a process of the test. The uplink is a veth pair with the name
that Docker gives its VXLAN port; the guard knows it by that name.
"""

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from agent.guard.desired import Holder, LocalNetwork, Stage, guard
from agent.guard.render import FROM_TASKS, SHUT, TO_TASKS, Rules, render
from agent.kernel.namespace import identify, run_in
from agent.kernel.nftables import ALTERED
from agent.kernel.overlay import OverlayNamespaces
from hivewire.errors import NamespaceGone
from hivewire.ids import ContainerId, NetworkId, ServiceId, TaskId
from hivewire.records import GuardRecord
from tests.needs import need_namespaces
from tests.real_nft import need_nft

FILE, GROUP = "1-abcdefghij", "239.1.2.3"
TRIES, WAIT_S = 8, 0.1
"""A first datagram may be lost while a port comes up or a neighbour is looked for."""
ENFORCED, EXEMPT, REMOTE = (IPv4Address(f"10.0.1.{n}") for n in (3, 4, 9))
ADDRESSES = {"enforced": ENFORCED, "exempt": EXEMPT, "remote": REMOTE}
PORTS = {"enforced": "veth0", "exempt": "veth1", "remote": "vxlan0"}
RECORD = GuardRecord(network=NetworkId("abcdefghijk"), name="app", enforced=(ServiceId("api"),))
STRICT = GuardRecord(
    network=RECORD.network, name="app", strict=True, enforced=RECORD.enforced, exempt=(ServiceId("spy"),)
)
LOCAL = LocalNetwork(
    (
        Holder(ContainerId("1"), ServiceId("api"), ENFORCED, "", Stage.ATTACHED),
        Holder(ContainerId("2"), ServiceId("spy"), EXEMPT, "", Stage.ATTACHED),
    )
)


@dataclass
class Bench:
    """The bridge's namespace and the three around it."""

    folder: Path
    ends: dict[str, str]
    overlays: OverlayNamespaces

    def guard(self, record: GuardRecord) -> Rules:
        """With the ports that lead to the two local tasks."""
        with self.overlays.open(FILE) as space:
            ports = space.ports(frozenset(self.ends.values()))
        ends = ("enforced", "exempt")
        holders = (replace(h, sandbox=self.ends[end]) for h, end in zip(LOCAL.holders, ends, strict=True))
        return guard(record, LocalNetwork(tuple(holders)), ports=ports)

    def put(self, rules: Rules) -> None:
        with self.overlays.open(FILE) as space:
            space.apply(render(rules)[0], space.observe().counts)

    def dropped(self) -> dict[str, int]:
        with self.overlays.open(FILE) as space:
            return {name: count.packets for name, count in space.observe().counts.items()}

    def arrives(self, source: str, target: str, *, family: int = socket.AF_INET) -> bool:
        """Whether a marked datagram from one end is seen at the other."""
        return self._arrives(source, target, family, "")

    def arrives_from(self, source: str, target: str, address: IPv4Address) -> bool:
        """The same, sent from an address that the end gave itself."""
        return self._arrives(source, target, socket.AF_INET, str(address))

    def _arrives(self, source: str, target: str, family: int, own: str) -> bool:
        def opened(bind: str) -> socket.socket:
            udp = socket.socket(family, socket.SOCK_DGRAM)
            udp.settimeout(WAIT_S)
            udp.bind((bind, 7))
            return udp

        def to() -> tuple[str, int] | tuple[str, int, int, int]:
            if family == socket.AF_INET:
                return str(ADDRESSES[target]), 7
            return f"fd00::{int(ADDRESSES[target]) & 255}", 7, 0, 0

        everywhere = "0.0.0.0" if family == socket.AF_INET else "::"
        here, there = (identify(TaskId(""), self.ends[end]) for end in (source, target))
        with run_in(there, lambda: opened(everywhere)) as theirs, run_in(here, lambda: opened(own or everywhere)) as us:
            for _ in range(TRIES):
                us.sendto(b"marked", to())
                with contextlib.suppress(TimeoutError):
                    return theirs.recv(100) == b"marked"
            return False


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    need_nft("bridge")
    need_namespaces()
    with contextlib.ExitStack() as stack:

        def hold() -> int:
            holder = subprocess.Popen(
                ["unshare", "--net", "setpriv", "--pdeathsig", "KILL", "sh", "-c", "echo up; exec sleep 600"],
                stdout=subprocess.PIPE,
            )
            stack.callback(_kill, holder)
            assert holder.stdout is not None
            holder.stdout.readline()
            return holder.pid

        bridge = hold()
        _ip(bridge, "link add br0 type bridge mcast_snooping 0", "address add 10.0.1.1/24 dev br0", "link set br0 up")
        ends = {}
        for end, address in ADDRESSES.items():
            pid = hold()
            ends[end] = f"/proc/{pid}/ns/net"
            mac = f"02:42:0a:00:01:{int(address) & 255:02x}"
            _ip(
                bridge,
                f"link add {PORTS[end]} type veth peer name eth0 address {mac} netns {pid}",
                f"link set {PORTS[end]} master br0",
                f"link set {PORTS[end]} up",
            )
            _ip(
                pid,
                "link set lo up",
                f"address add {address}/24 dev eth0",
                f"address add fd00::{int(address) & 255}/64 dev eth0 nodad",
                "link set eth0 up",
            )
        (tmp_path / FILE).symlink_to(f"/proc/{bridge}/ns/net")
        made = Bench(tmp_path, ends, OverlayNamespaces(tmp_path))
        yield made


PAIRS = [(a, b) for a in ADDRESSES for b in ADDRESSES if a != b]


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def test_without_a_guard_everything_arrives(bench: Bench, family: int) -> None:
    """The control: each end reaches each other one, so that what does not arrive below was dropped."""
    assert [pair for pair in PAIRS if not bench.arrives(*pair, family=family)] == []


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def test_the_default_guard_drops_what_an_enforced_task_sends_or_should_get(bench: Bench, family: int) -> None:
    """Local or from other nodes, in both directions; everything else arrives, and the counters say how many fell."""
    bench.put(guard(RECORD, LOCAL))
    arrived = {pair for pair in PAIRS if bench.arrives(*pair, family=family)}
    assert arrived == {("exempt", "remote"), ("remote", "exempt")}
    counted = {name for name, count in bench.dropped().items() if count}
    # What asks for an IPv6 neighbour goes to a group; the answer is what is dropped.
    assert counted == ({FROM_TASKS, TO_TASKS} if family == socket.AF_INET else {FROM_TASKS})


def test_the_strict_guard_passes_exempt_ends_only(bench: Bench) -> None:
    """Between an exempt task and other nodes it passes; nothing from or to the enforced one."""
    bench.put(guard(STRICT, LOCAL))
    assert {pair for pair in PAIRS if bench.arrives(*pair)} == {("exempt", "remote"), ("remote", "exempt")}


def test_the_strict_guard_starts_shut(bench: Bench) -> None:
    """Before anything is known of a network no IP frame passes a local port, while ARP does."""
    bench.put(SHUT)
    assert not any(bench.arrives(*pair) for pair in PAIRS)
    neighbours = run_in(
        identify(TaskId(""), bench.ends["enforced"]),
        lambda: (
            subprocess.run(
                ["ip", "neigh", "show", str(EXEMPT)], capture_output=True, text=True, timeout=30, check=True
            ).stdout
        ),
    )
    assert "02:42:0a:00:01:04" in neighbours


def test_the_strict_guard_carries_no_ipv6(bench: Bench) -> None:
    """Not between exempt tasks either: nothing says whose an IPv6 address is."""
    bench.put(guard(STRICT, LOCAL))
    assert not bench.arrives("exempt", "remote", family=socket.AF_INET6)


@pytest.mark.parametrize("record", [RECORD, STRICT], ids=["default", "strict"])
def test_an_address_of_its_own_making_helps_nobody(bench: Bench, record: GuardRecord) -> None:
    """A task that gives itself another address is known by its hardware address, or not known at all."""
    bench.put(guard(record, LOCAL))
    own = IPv4Address("10.0.1.77")
    run_in(
        identify(TaskId(""), bench.ends["enforced"]),
        lambda: subprocess.run(["ip", "address", "add", f"{own}/24", "dev", "eth0"], timeout=30, check=True),
    )
    assert not bench.arrives_from("enforced", "remote", own)


@pytest.mark.parametrize("record", [RECORD, STRICT], ids=["default", "strict"])
def test_forged_addresses_help_nobody_whose_port_is_known(bench: Bench, record: GuardRecord) -> None:
    """With hardware address and address of an exempt task, or of nobody, an enforced one still does not get through."""
    forged = EXEMPT if record.strict else IPv4Address("10.0.1.77")
    mac = "02:42:" + ":".join(f"{octet:02x}" for octet in forged.packed)

    def forge() -> None:
        for command in (f"link set eth0 address {mac}", f"address add {forged}/24 dev eth0"):
            subprocess.run(["ip", *command.split()], timeout=30, check=True)

    run_in(identify(TaskId(""), bench.ends["exempt"]), lambda: subprocess.run(["ip", "link", "set", "eth0", "down"]))
    run_in(identify(TaskId(""), bench.ends["enforced"]), forge)
    bench.put(guard(record, LOCAL))
    assert bench.arrives_from("enforced", "remote", forged), "the control: known by its addresses alone it gets through"
    bench.put(bench.guard(record))
    assert not bench.arrives_from("enforced", "remote", forged)


def test_what_is_for_everybody_does_not_reach_a_port_that_is_known(bench: Bench) -> None:
    """A datagram to a group goes out on every port of a bridge, but for those of enforced tasks."""

    def heard() -> bool:
        ears = [run_in(identify(TaskId(""), bench.ends["enforced"]), _group_ears)]
        with contextlib.ExitStack() as stack:
            for each in ears:
                stack.enter_context(each)
            say = stack.enter_context(
                run_in(
                    identify(TaskId(""), bench.ends["exempt"]), lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                )
            )
            say.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(str(EXEMPT)))
            for _ in range(TRIES):
                say.sendto(b"all", (GROUP, 7))
                with contextlib.suppress(TimeoutError):
                    return ears[0].recv(100) == b"all"
            return False

    bench.put(guard(RECORD, LOCAL))
    assert heard(), "the control"
    bench.put(bench.guard(RECORD))
    assert not heard()


def test_ports_are_those_of_the_namespace_behind_a_path(bench: Bench, tmp_path: Path) -> None:
    """Each local task has one; a path without a namespace has none, and neither has a namespace without a port."""
    (tmp_path / "plain").touch()
    missing, plain, own = str(tmp_path / "nowhere"), str(tmp_path / "plain"), "/proc/self/ns/net"
    with bench.overlays.open(FILE) as space:
        found = space.ports(frozenset({*bench.ends.values(), missing, plain, own}))
    assert all(len(found[path]) == 1 for path in bench.ends.values())
    assert len(frozenset().union(*(found[path] for path in bench.ends.values()))) == len(bench.ends)
    assert found[missing] == found[plain] == found[own] == frozenset()


def _group_ears() -> socket.socket:
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.settimeout(WAIT_S)
    udp.bind(("", 7))
    group = socket.inet_aton(GROUP) + socket.inet_aton(str(ENFORCED))
    udp.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
    return udp


def test_the_bridges_own_address_is_no_way_around(bench: Bench) -> None:
    """A task that sends by way of the bridge's address, which may forward, meets the guard there too."""
    for end, pair in (("enforced", "remote"), ("remote", "enforced")):
        run_in(
            identify(TaskId(""), bench.ends[end]),
            lambda pair=pair: subprocess.run(
                ["ip", "route", "add", f"{ADDRESSES[pair]}/32", "via", "10.0.1.1"], timeout=30, check=True
            ),
        )
    bridge = identify(TaskId(""), str(bench.folder / FILE))
    run_in(
        bridge,
        lambda: subprocess.run(
            ["sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv4.conf.all.send_redirects=0"], timeout=30, check=False
        ),
    )
    assert bench.arrives("enforced", "remote"), "the control: it does forward"
    bench.put(guard(RECORD, LOCAL))
    assert not bench.arrives("enforced", "remote")
    assert not bench.arrives("remote", "enforced")


def test_what_falls_is_noted_with_its_addresses(bench: Bench) -> None:
    """Source, destination and port of what was dropped stand in the set of its direction, as often as it was tried."""
    bench.put(guard(RECORD, LOCAL))
    bench.arrives("enforced", "remote")
    bench.arrives("remote", "enforced")
    with bench.overlays.open(FILE) as space:
        counted = space.noted_counters().packets
        out, into = (space.noted_entries(f"denied_no_link_{way}") for way in ("out", "in"))
    assert {(e.source, e.destination) for e in out} == {(ADDRESSES["enforced"], ADDRESSES["remote"])}
    assert {(e.source, e.destination) for e in into} == {(ADDRESSES["remote"], ADDRESSES["enforced"])}
    assert all(e.port for e in (*out, *into))
    assert sum(e.count for e in out) == counted["denied_no_link_out"] > 0
    assert sum(e.count for e in into) == counted["denied_no_link_in"] > 0


def test_counters_outlive_a_change_of_rules(bench: Bench) -> None:
    """What was dropped before a replacement is still counted after it."""
    bench.put(guard(RECORD, LOCAL))
    bench.arrives("enforced", "remote")
    before = bench.dropped()[FROM_TASKS]
    assert before > 0
    bench.put(guard(STRICT, LOCAL))
    assert bench.dropped()[FROM_TASKS] >= before


def test_the_bridge_remembers_who_is_behind_local_ports(bench: Bench) -> None:
    """Hardware addresses of local tasks are seen until their port goes; those behind the uplink are not."""
    bench.arrives("enforced", "remote")
    bench.arrives("remote", "exempt")
    with bench.overlays.open(FILE) as space:
        assert space.observe().macs == {"02:42:0a:00:01:03", "02:42:0a:00:01:04"}
        run_in(
            identify(TaskId(""), str(bench.folder / FILE)),
            lambda: subprocess.run(["ip", "link", "del", "veth0"], timeout=30, check=True),
        )
        assert space.observe().macs == {"02:42:0a:00:01:04"}


def test_the_gate_shuts_what_nobody_guards(bench: Bench) -> None:
    """It makes the table that an agent begins with, and never replaces one."""
    text, digest = render(SHUT)
    with bench.overlays.open(FILE) as space:
        assert space.create(text)
        assert space.observe().digest == digest
        assert not any(bench.arrives(*pair) for pair in PAIRS)
        assert not space.create(text)
    bench.put(guard(RECORD, LOCAL))
    with bench.overlays.open(FILE) as space:
        assert not space.create(text)
        assert space.observe().digest == render(guard(RECORD, LOCAL))[1]


def test_the_table_is_adopted_by_its_digest_and_removed(bench: Bench) -> None:
    """Another agent reads which rules are there; removing them twice is no error."""
    rules = guard(RECORD, LOCAL)
    bench.put(rules)
    with OverlayNamespaces(bench.folder).open(FILE) as space:
        assert space.observe().digest == render(rules)[1]
        space.remove()
        space.remove()
        assert space.observe().digest == ""
        assert space.observe().counts == {}


@pytest.mark.parametrize(
    "harm",
    [
        "flush table bridge hivewire",
        "flush chain bridge hivewire from_tasks",
        "insert rule bridge hivewire from_tasks accept",
        "add table bridge hivewire { flags dormant; }",
    ],
)
@pytest.mark.parametrize("record", [RECORD, STRICT], ids=["default", "strict"])
def test_a_guard_that_was_weakened_is_noticed(bench: Bench, record: GuardRecord, harm: str) -> None:
    """Untouched, also after it dropped and noted, the table answers with its digest; opened by hand, it does not."""
    rules = bench.guard(record)
    bench.put(rules)
    bench.arrives("enforced", "remote")
    bench.put(rules)  # with its counters going on
    bridge = identify(TaskId(""), str(bench.folder / FILE))
    with bench.overlays.open(FILE) as space:
        assert space.observe().digest == render(rules)[1]
        run_in(bridge, lambda: subprocess.run(["nft", harm], timeout=30, check=True))
        assert space.observe().digest == ALTERED
    bench.put(rules)
    assert not bench.arrives("enforced", "remote")


def test_only_overlay_namespaces_are_listed(tmp_path: Path) -> None:
    """Tasks, load balancers, the ingress sandbox and the node itself have other names."""
    for name in ("1-abcdefghij", "12-0123456789", "lb_abcdefghi", "ingress_sbox", "default", "3e2d5c29aa01", "1-short"):
        (tmp_path / name).touch()
    overlays = OverlayNamespaces(tmp_path)
    assert overlays.list() == {"1-abcdefghij", "12-0123456789"}
    assert OverlayNamespaces(tmp_path / "nowhere").list() == frozenset()
    with pytest.raises(NamespaceGone), overlays.open("1-abcdefghij"):
        pass


def _ip(pid: int, *commands: str) -> None:
    for command in commands:
        subprocess.run(["nsenter", f"--net=/proc/{pid}/ns/net", "ip", *command.split()], timeout=30, check=True)


def _kill(holder: subprocess.Popen[bytes]) -> None:
    holder.kill()
    holder.wait()
    if holder.stdout is not None:
        holder.stdout.close()
