"""Which claims are true, by a table of everything that can be wrong with one."""

from dataclasses import replace
from ipaddress import IPv4Address

import msgspec
import pytest

from controller.admission import Evidence, Refused, judge
from controller.swarm.snapshot import FINISHED_STATES, TASK_STATES, Node, Task
from hivewire.ids import ContainerId, NetworkId, NodeId, ServiceId, TaskId
from hivewire.keys import PrivateKey, PublicKey
from hivewire.records import ClaimRecord, Endpoint, Mode, Network, NodeRecord, PeerRecord, PolicyRecord, parse_address

N1, N2 = NodeId("n1"), NodeId("n2")
WEB, DB = ServiceId("web"), ServiceId("db")
T1, T2 = TaskId("t1"), TaskId("t2")
APP, BACK, INGRESS, OTHER = NetworkId("app"), NetworkId("back"), NetworkId("ingress"), NetworkId("other")
KEY = "AQ" + "A" * 41 + "="
DISGUISED = str(PublicKey(PrivateKey.generate().public().raw[:31] + b"\xff"))
GOOD_KEY = "CQ" + "A" * 41 + "="
ZERO_KEY = "A" * 43 + "="

NODE = Node(N1, "alpha", "192.0.2.1")
OTHER_NODE = Node(N2, "beta", "192.0.2.2")
AGENT = NodeRecord(
    node=N1,
    hostname="alpha",
    agent_version="1",
    underlay_address=IPv4Address("198.51.100.1"),
    underlay_mtu=1500,
    backend="kernel",
    first_port=51800,
    last_port=51899,
)
TASK = Task(
    id=T1,
    name="shop_web.1",
    service=WEB,
    node=N1,
    state="running",
    desired_state="running",
    container=ContainerId("c1"),
    addresses={
        BACK: IPv4Address("10.2.0.5"),
        APP: IPv4Address("10.1.0.5"),
        OTHER: IPv4Address("10.9.0.5"),
        INGRESS: IPv4Address("10.255.0.5"),
    },
)
POLICY = PolicyRecord(
    service=WEB,
    name="shop_web",
    stack="shop",
    mode=Mode.ENFORCE,
    networks=(
        Network(id=APP, name="shop_app", subnets=("10.1.0.0/24",)),
        Network(id=BACK, name="shop_back", subnets=("10.2.0.0/24",)),
    ),
)
CLAIM = ClaimRecord(
    task=T1,
    service=WEB,
    node=N1,
    container=ContainerId("c1"),
    public_key=GOOD_KEY,
    endpoint=Endpoint(address=IPv4Address("192.0.2.1"), port=51801),
    epoch=7,
    serving=True,
)
PEER = PeerRecord(
    task=T1,
    task_name="shop_web.1",
    service=WEB,
    node=N1,
    public_key=GOOD_KEY,
    endpoint=CLAIM.endpoint,
    epoch=7,
    addresses={APP: IPv4Address("10.1.0.5"), BACK: IPv4Address("10.2.0.5")},
    serving=True,
)
EVIDENCE = Evidence(task=TASK, policy=POLICY, node=NODE, agent=AGENT)


def claim(**changes: object) -> ClaimRecord:
    return msgspec.structs.replace(CLAIM, **changes)


def endpoint(text: str) -> Endpoint:
    address, _, port = text.rpartition(":")
    return Endpoint(address=parse_address(address.strip("[]")), port=int(port))


REFUSALS: dict[str, tuple[ClaimRecord, Evidence, str]] = {
    "it names another task than its key": (
        claim(task=T2), EVIDENCE, "names task t2 on node n1, but lies under n1/t1",
    ),
    "it names another node than its key": (
        claim(node=N2), EVIDENCE, "names task t1 on node n2, but lies under n1/t1",
    ),
    "the task runs elsewhere": (
        CLAIM, replace(EVIDENCE, task=replace(TASK, node=N2)), "the task runs on node n2, not on n1",
    ),
    "the task has no node yet": (
        CLAIM, replace(EVIDENCE, task=replace(TASK, node=NodeId(""))), "the task runs on node (none), not on n1",
    ),
    "the task is another service's": (
        claim(service=DB), EVIDENCE, "the task belongs to service web, not to db",
    ),
    "the service has no policy": (CLAIM, replace(EVIDENCE, policy=None), "its service is not in the mesh"),
    "the service is switched off": (
        CLAIM,
        replace(EVIDENCE, policy=msgspec.structs.replace(POLICY, mode=Mode.OFF)),
        "its service is not in the mesh",
    ),
    "the key gives no secret": (
        claim(public_key=ZERO_KEY), EVIDENCE,
        "its public key is a low-order point, with which no secret can be agreed",
    ),
    "the key gives no secret either": (
        claim(public_key=KEY), EVIDENCE,
        "its public key is a low-order point, with which no secret can be agreed",
    ),
    "the key is another one's in disguise": (
        claim(public_key=DISGUISED),
        EVIDENCE,
        "its public key is written as no device writes it, so that it could be another's in disguise",
    ),
    "the key is an earlier one": (
        CLAIM,
        replace(EVIDENCE, last_epoch=CLAIM.epoch + 1, last_key="another"),
        f"its public key is of epoch {CLAIM.epoch}, and one of epoch {CLAIM.epoch + 1} was admitted before: "
        "an earlier key does not come back (or the node's clock was set back)",
    ),
    "two keys of one epoch": (
        CLAIM,
        replace(EVIDENCE, last_epoch=CLAIM.epoch, last_key="another"),
        f"its public key is of epoch {CLAIM.epoch}, and one of epoch {CLAIM.epoch} was admitted before: "
        "an earlier key does not come back (or the node's clock was set back)",
    ),
    "the agent is gone and the port is outside of what it registered": (
        claim(endpoint=endpoint("192.0.2.1:51900")),
        replace(EVIDENCE, agent=None, last_ports=(51800, 51899)),
        "its port 51900 is outside 51800-51899",
    ),
    "the key is another task's": (CLAIM, replace(EVIDENCE, key_owner=T2), "its public key belongs to task t2"),
    "Swarm does not know the node": (CLAIM, replace(EVIDENCE, node=None), "node n1 is not in the Swarm"),
    "the endpoint is another node's": (
        claim(endpoint=endpoint("192.0.2.2:51801")),
        replace(EVIDENCE, neighbour=OTHER_NODE),
        "its endpoint 192.0.2.2:51801 is the address of node beta",
    ),
    "the endpoint is another node's, though the agent says otherwise": (
        claim(endpoint=endpoint("198.51.100.1:51801")),
        replace(EVIDENCE, neighbour=OTHER_NODE),
        "its endpoint 198.51.100.1:51801 is the address of node beta",
    ),
    "the endpoint is another node's of the other family": (
        claim(endpoint=endpoint("[2001:db8::2]:51801")),
        replace(EVIDENCE, neighbour=replace(OTHER_NODE, address="2001:db8::2")),
        "its endpoint [2001:db8::2]:51801 is the address of node beta",
    ),
    "the endpoint is nobody's of the other family": (
        claim(endpoint=endpoint("[2001:db8::9]:51801")),
        EVIDENCE,
        "its endpoint [2001:db8::9]:51801 is no address of node alpha",
    ),
    "the endpoint is nobody's": (
        claim(endpoint=endpoint("203.0.113.9:51801")),
        EVIDENCE,
        "its endpoint 203.0.113.9:51801 is no address of node alpha",
    ),
    "the endpoint would need the agent's word, and there is no agent": (
        claim(endpoint=endpoint("198.51.100.1:51801")),
        replace(EVIDENCE, agent=None),
        "its endpoint 198.51.100.1:51801 is no address of node alpha",
    ),
    "the agent is gone and the endpoint is not the admitted one": (
        claim(endpoint=endpoint("198.51.100.1:51801")),
        replace(EVIDENCE, agent=None, admitted=PEER),
        "its endpoint 198.51.100.1:51801 is no address of node alpha",
    ),
    "there is no port": (
        claim(endpoint=endpoint("192.0.2.1:0")),
        replace(EVIDENCE, agent=None),
        "its endpoint 192.0.2.1:0 has no port",
    ),
    "the port is below the agent's": (
        claim(endpoint=endpoint("192.0.2.1:51799")), EVIDENCE, "its port 51799 is outside 51800-51899",
    ),
    "the port is above the agent's": (
        claim(endpoint=endpoint("192.0.2.1:51900")), EVIDENCE, "its port 51900 is outside 51800-51899",
    ),
    "the task has no address": (
        CLAIM,
        replace(EVIDENCE, task=replace(TASK, addresses={})),
        "Swarm has given the task no address on an overlay network of the mesh",
    ),
    "the task has addresses on other networks only": (
        CLAIM,
        replace(EVIDENCE, task=replace(TASK, addresses={OTHER: IPv4Address("10.9.0.5")})),
        "Swarm has given the task no address on an overlay network of the mesh",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("written", "evidence", "reason"), REFUSALS.values(), ids=REFUSALS.keys())
def test_what_is_not_true_is_refused(written: ClaimRecord, evidence: Evidence, reason: str) -> None:
    """Each thing that does not hold refuses the claim, in words that name it."""
    assert judge(N1, T1, written, evidence) == Refused(reason)


def test_a_true_claim_becomes_a_peer() -> None:
    """Name and addresses are Swarm's, only those on networks of the mesh; key, endpoint and epoch are the agent's."""
    assert judge(N1, T1, CLAIM, EVIDENCE) == PEER


ADMITTED: dict[str, tuple[ClaimRecord, Evidence]] = {
    "the node's own address needs no agent": (CLAIM, replace(EVIDENCE, agent=None)),
    "the registered address": (claim(endpoint=endpoint("198.51.100.1:51800")), EVIDENCE),
    "the last port": (claim(endpoint=endpoint("192.0.2.1:51899")), EVIDENCE),
    "the key is its own already": (CLAIM, replace(EVIDENCE, key_owner=T1, admitted=PEER)),
    "a service that observes": (
        CLAIM, replace(EVIDENCE, policy=msgspec.structs.replace(POLICY, mode=Mode.OBSERVE)),
    ),
    "a node that is down": (CLAIM, replace(EVIDENCE, node=replace(NODE, is_ready=False))),
}  # fmt: skip


@pytest.mark.parametrize(("written", "evidence"), ADMITTED.values(), ids=ADMITTED.keys())
def test_what_may_differ(written: ClaimRecord, evidence: Evidence) -> None:
    """Nothing but the claim's own endpoint tells these peers from the plain one."""
    assert judge(N1, T1, written, evidence) == msgspec.structs.replace(PEER, endpoint=written.endpoint)


def test_an_agent_that_dies_takes_no_peer_along() -> None:
    """A registered endpoint that was admitted stays admitted when the agent's record is gone."""
    there = claim(endpoint=endpoint("198.51.100.1:51801"))
    peer = judge(N1, T1, there, EVIDENCE)
    assert isinstance(peer, PeerRecord)
    assert judge(N1, T1, there, replace(EVIDENCE, agent=None, admitted=peer)) == peer


def test_epochs_do_not_fall() -> None:
    """The same key may be claimed as of an earlier time, when a claim was lost; what others read never goes back."""
    known = replace(EVIDENCE, last_epoch=CLAIM.epoch + 5, last_key=CLAIM.public_key)
    verdict = judge(CLAIM.node, CLAIM.task, CLAIM, known)
    assert isinstance(verdict, PeerRecord)
    assert verdict.epoch == CLAIM.epoch + 5


def test_an_earlier_admission_excuses_no_bad_key() -> None:
    """That a task is a peer says nothing of another key that it claims now."""
    verdict = judge(N1, T1, claim(public_key=ZERO_KEY), replace(EVIDENCE, admitted=PEER))
    assert isinstance(verdict, Refused)


@pytest.mark.parametrize("state", TASK_STATES)
@pytest.mark.parametrize("desired_state", ["running", "ready", "shutdown", "remove"])
@pytest.mark.parametrize("says_serving", [True, False])
def test_who_serves(state: str, desired_state: str, says_serving: bool) -> None:
    """A peer serves while Swarm wants the task, it starts or runs, and its agent says so; a finished one is none."""
    task = replace(TASK, state=state, desired_state=desired_state)
    verdict = judge(N1, T1, claim(serving=says_serving), replace(EVIDENCE, task=task))
    if state in FINISHED_STATES:
        assert verdict is None
    else:
        serves = says_serving and desired_state in ("running", "ready") and state in ("starting", "running")
        assert verdict == msgspec.structs.replace(PEER, serving=serves)


def test_a_task_that_swarm_does_not_know_is_nothing() -> None:
    """The claim is late, not false: nothing to show to a person."""
    assert judge(N1, T1, CLAIM, replace(EVIDENCE, task=None)) is None


def test_the_beginning_of_an_id_names_no_task() -> None:
    """The engine looks tasks up by the beginning of their id too; a claim must name the whole."""
    assert judge(N1, TaskId("t"), claim(task=TaskId("t")), EVIDENCE) is None


def test_a_false_name_is_refused_before_swarm_is_believed() -> None:
    """A record that lies under another name is shown, even where Swarm knows no such task."""
    assert isinstance(judge(N1, T1, claim(task=T2), replace(EVIDENCE, task=None)), Refused)
