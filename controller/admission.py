"""Is a claim true? Judged against Swarm's own answer, never against the agent's word. Pure."""

from dataclasses import dataclass

from controller.swarm.snapshot import Node, Task
from hivewire.ids import NodeId, TaskId
from hivewire.keys import PublicKey
from hivewire.records import ClaimRecord, Mode, NodeRecord, PeerRecord, PolicyRecord

# Swarm counts a task as a backend from "running" on, and nobody announces that change. An agent that sees the
# container started, and healthy where it has a health check, knows it first.
CAN_SERVE = frozenset({"starting", "running"})


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a claim is held against."""

    task: Task | None
    """As Swarm tells it now; None: it knows no such task."""
    policy: PolicyRecord | None
    """That of the service it names; None: not in the mesh."""
    node: Node | None
    """The node it names; None: not in the Swarm."""
    agent: NodeRecord | None = None
    """What that node's agent registered; None: no agent is alive there."""
    last_ports: tuple[int, int] | None = None
    """The first and the last port that the node's agent registered last, alive or not; None: never."""
    neighbour: Node | None = None
    """Another node that has the address of the claim's endpoint: in the Swarm, or by its agent's word where the address
    is not the one that this node has in the Swarm."""
    key_owner: TaskId | None = None
    """The task that holds the claim's public key already."""
    admitted: PeerRecord | None = None
    """What an earlier claim of the task became."""
    last_epoch: int = 0
    """Of the claim of this task that was admitted last, also where its peer is gone meanwhile."""
    last_key: str = ""
    """The public key of that claim."""
    quarantine: str = ""
    """Why a person has shut the task out, beginning with "quarantined"; empty: nobody has."""


@dataclass(frozen=True, slots=True)
class Refused:
    reason: str
    """For a person; begins with what is wrong."""


def judge(path_node: NodeId, path_task: TaskId, claim: ClaimRecord, evidence: Evidence) -> PeerRecord | Refused | None:
    """The peer that the claim becomes, or why it does not; None where the task is over and the claim merely late."""
    if (claim.node, claim.task) != (path_node, path_task):
        return Refused(f"names task {claim.task} on node {claim.node}, but lies under {path_node}/{path_task}")
    task = evidence.task
    # The engine also answers to the beginning of an id.
    if task is None or task.id != claim.task or task.is_finished:
        return None
    if evidence.quarantine:
        return Refused(evidence.quarantine)
    return _mismatch(claim, task, evidence) or _peer(claim, task, evidence)


def _mismatch(claim: ClaimRecord, task: Task, evidence: Evidence) -> Refused | None:
    if task.node != claim.node:
        return Refused(f"the task runs on node {task.node or '(none)'}, not on {claim.node}")
    if task.service != claim.service:
        return Refused(f"the task belongs to service {task.service}, not to {claim.service}")
    if evidence.policy is None or evidence.policy.mode is Mode.OFF:
        return Refused("its service is not in the mesh")
    return _wrong_key(claim, evidence) or _wrong_endpoint(claim, evidence)


def _wrong_key(claim: ClaimRecord, evidence: Evidence) -> Refused | None:
    is_known = evidence.admitted is not None and evidence.admitted.public_key == claim.public_key
    key = PublicKey.parse(claim.public_key)
    if not is_known and not key.is_usable:
        return Refused("its public key is a low-order point, with which no secret can be agreed")
    if not key.is_canonical:
        return Refused("its public key is written as no device writes it, so that it could be another's in disguise")
    if evidence.key_owner not in (None, claim.task):
        return Refused(f"its public key belongs to task {evidence.key_owner}")
    if claim.epoch <= evidence.last_epoch and claim.public_key != evidence.last_key:
        return Refused(
            f"its public key is of epoch {claim.epoch}, and one of epoch {evidence.last_epoch} was admitted before: "
            "an earlier key does not come back (or the node's clock was set back)"
        )
    return None


def _wrong_endpoint(claim: ClaimRecord, evidence: Evidence) -> Refused | None:
    """A node may use its Swarm address, or the one that its agent registered and that is no other node's."""
    endpoint, node, agent = claim.endpoint, evidence.node, evidence.agent
    if node is None:
        return Refused(f"node {claim.node} is not in the Swarm")
    if evidence.neighbour is not None:
        return Refused(f"its endpoint {endpoint} is the address of node {evidence.neighbour.hostname}")
    if agent is None and evidence.admitted is not None and evidence.admitted.endpoint == endpoint:
        return None  # the agent's record is gone with the agent; its tasks and their links are still there
    if str(endpoint.address) != node.address and (agent is None or agent.underlay_address != endpoint.address):
        return Refused(f"its endpoint {endpoint} is no address of node {node.hostname}")
    if endpoint.port == 0:
        return Refused(f"its endpoint {endpoint} has no port")
    ports = (agent.first_port, agent.last_port) if agent is not None else evidence.last_ports
    if ports is not None and not ports[0] <= endpoint.port <= ports[1]:
        return Refused(f"its port {endpoint.port} is outside {ports[0]}-{ports[1]}")
    return None


def _peer(claim: ClaimRecord, task: Task, evidence: Evidence) -> PeerRecord | Refused:
    assert evidence.policy is not None  # noqa: S101  _mismatch refuses otherwise
    meshed = {n.id for n in evidence.policy.networks}
    addresses = {network: address for network, address in sorted(task.addresses.items()) if network in meshed}
    if not addresses:
        return Refused("Swarm has given the task no address on an overlay network of the mesh")
    return PeerRecord(
        task=task.id,
        task_name=task.name,
        service=task.service,
        node=task.node,
        public_key=claim.public_key,
        endpoint=claim.endpoint,
        epoch=max(claim.epoch, evidence.last_epoch),
        addresses=addresses,
        serving=claim.serving and task.is_wanted and task.state in CAN_SERVE,
        underlay_mtu=claim.underlay_mtu,
    )
