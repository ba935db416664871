"""A decision agrees with the compiled policy and with the kernels, whatever the cluster is."""

import dataclasses
import hashlib
from ipaddress import IPv4Address
from typing import NamedTuple

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from controller.names import End
from controller.policy.compile import MeshDefaults, compile_mesh
from controller.policy.explain import closed_by, covers, link_to
from controller.policy.verdict import StepName, Verdict
from controller.policy.why import Question, concerned, decide
from controller.state import MeshState
from controller.swarm.snapshot import Task
from hivewire.ids import ContainerId, NodeId, ServiceId, TaskId
from hivewire.keys import PublicKey
from hivewire.records import (
    ClaimRecord,
    Endpoint,
    Mode,
    NodeRecord,
    PeerRecord,
    PortRange,
    Protocol,
    QuarantineKind,
    QuarantineRecord,
    StatusRecord,
    TaskPhase,
)
from hivewire.reports import AgentReport, InterfaceReport, PeerReport
from tests import strategies

UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
NOW = 1_800_000_000.0
NODES = (NodeId("n1"), NodeId("n2"))


class Mesh(NamedTuple):
    state: MeshState
    reports: dict[NodeId, AgentReport]


def key(task: TaskId) -> str:
    return str(PublicKey(hashlib.sha256(task.encode()).digest()))


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    """A cluster in which every agent did what it should: one task for each service, and peers as the links say."""
    snapshot = draw(strategies.snapshots())
    compiled = compile_mesh(snapshot, {}, MeshDefaults(Mode.ENFORCE))
    tasks, peers, claims, statuses = {}, {}, {}, {}
    for number, service in enumerate(snapshot.services.values()):
        id_, node = TaskId(f"task-{service.name}"), NODES[number % 2]
        addresses = {network: IPv4Address(f"10.{n}.0.{number + 50}") for n, network in enumerate(service.networks)}
        tasks[id_] = Task(id_, f"{service.name}.1", service.id, node, "running", "running", ContainerId("c"), addresses)
        policy = compiled.policies.get(service.id)
        if policy is None or policy.mode is Mode.OFF:
            continue
        endpoint = Endpoint(address=IPv4Address("192.0.2.1"), port=51820)
        claims[id_] = ClaimRecord(
            task=id_, service=service.id, node=node, container=ContainerId("c"), public_key=key(id_),
            endpoint=endpoint, epoch=1, serving=True,
        )  # fmt: skip
        peers[id_] = PeerRecord(
            task=id_, task_name=tasks[id_].name, service=service.id, node=node, public_key=key(id_),
            endpoint=endpoint, epoch=1, addresses=addresses, serving=True,
        )  # fmt: skip
        statuses[id_] = StatusRecord(task=id_, service=service.id, node=node, phase=TaskPhase.READY, mode=policy.mode)
    state = MeshState(
        swarm=snapshot,
        policies=compiled.policies,
        compiled=compiled,
        nodes={node: _agent(node) for node in NODES},
        tasks=tasks,
        claims=claims,
        peers=peers,
        statuses=statuses,
    )
    return Mesh(state, {node: _report(state, node) for node in NODES})


def _agent(node: NodeId) -> NodeRecord:
    return NodeRecord(
        node=node, hostname=node, agent_version="1", underlay_address=IPv4Address("192.0.2.1"), underlay_mtu=1500,
        backend="kernel", first_port=51820, last_port=52819,
    )  # fmt: skip


def _report(state: MeshState, node: NodeId) -> AgentReport:
    interfaces = []
    for peer in state.peers.values():
        if peer.node != node:
            continue
        linked = state.policies[peer.service].linked_services
        others = [it for it in state.peers.values() if it.service in linked and it.task != peer.task]
        seen = tuple(
            PeerReport(public_key=it.public_key, last_handshake=NOW - 5, received_bytes=1, sent_bytes=1)
            for it in others
        )
        interfaces.append(
            InterfaceReport(
                task=peer.task,
                service=peer.service,
                public_key=peer.public_key,
                listen_port=1,
                mtu=1420,
                peers=seen,
                rules="0123",
            )
        )
    return AgentReport(node=node, taken_at=NOW, interfaces=tuple(interfaces))


def pick(data: st.DataObject, state: MeshState) -> Question:
    """Two different services and a port."""
    services = sorted(state.swarm.services.values(), key=lambda service: service.id)
    start, end = data.draw(st.permutations(services))[:2]
    protocol, port = data.draw(st.sampled_from(Protocol)), data.draw(st.sampled_from([80, 300, 5432, 65535]))
    given_port = data.draw(st.sampled_from([None, PortRange(protocol=protocol, first=port, last=port)]))
    return Question(End(start), End(end), given_port)


several = meshes().filter(lambda mesh: len(mesh.state.swarm.services) > 1)


@UNTIMED
@given(several, st.data())
def test_where_agents_do_their_work_the_answer_is_the_policy(mesh: Mesh, data: st.DataObject) -> None:
    """Allowed and encrypted exactly where a link covers it; denied exactly where nothing does and an end enforces."""
    state, question = mesh.state, pick(data, mesh.state)
    start, end = question.source.service, question.destination.service
    ours, theirs = (p if p and p.mode is not Mode.OFF else None for p in map(state.policies.get, (start.id, end.id)))
    link = link_to(ours, end)
    found = decide(state, question, mesh.reports, NOW)
    is_linked = link is not None and covers(link, question.port)
    if is_linked:
        assert (found.verdict, found.is_encrypted, found.fix) == (Verdict.ALLOWED, True, "")
    elif closed_by((ours, theirs), start, end, link):
        assert found.verdict is Verdict.DENIED
        assert found.fix
    assert (found.step is None) == (found.verdict is Verdict.ALLOWED)
    assert [step.name for step in found.steps] == list(StepName)
    assert concerned(state, question) <= set(NODES)


@UNTIMED
@given(several, st.data())
def test_without_the_peer_it_is_broken(mesh: Mesh, data: st.DataObject) -> None:
    """What is allowed needs each end to have the other: without one of the two it is broken, and never allowed."""
    question = pick(data, mesh.state)
    before = decide(mesh.state, question, mesh.reports, NOW)
    victim = data.draw(st.sampled_from([question.source, question.destination])).service.id
    reports = {node: _without_peers(report, victim) for node, report in mesh.reports.items()}
    after = decide(mesh.state, question, reports, NOW)
    expected = Verdict.BROKEN if before.is_encrypted else before.verdict
    assert after.verdict is expected


def _without_peers(report: AgentReport, service: ServiceId) -> AgentReport:
    interfaces = tuple(
        msgspec.structs.replace(it, peers=()) if it.service == service else it for it in report.interfaces
    )
    return msgspec.structs.replace(report, interfaces=interfaces)


@UNTIMED
@given(several, st.data())
def test_silence_is_neither_fine_nor_broken(mesh: Mesh, data: st.DataObject) -> None:
    """With no answer from anybody the verdict is that of the labels, and every step that needs an answer is open."""
    question = pick(data, mesh.state)
    told, silent = decide(mesh.state, question, mesh.reports, NOW), decide(mesh.state, question, {}, NOW)
    assert silent.verdict is told.verdict
    if told.is_encrypted:
        assert set(silent.unknown) == concerned(mesh.state, question)
        assert [s.is_ok for s in silent.steps][-4:] == [None] * 4


@UNTIMED
@given(several, st.data())
def test_a_quarantine_denies_everything(mesh: Mesh, data: st.DataObject) -> None:
    """Whatever the labels say, to and from a quarantined service nothing is allowed."""
    question = pick(data, mesh.state)
    end = data.draw(st.sampled_from([question.source, question.destination])).service
    record = QuarantineRecord(kind=QuarantineKind.SERVICE, id=end.id, name=end.name)
    state = dataclasses.replace(mesh.state, quarantines=(record,))
    found = decide(state, question, mesh.reports, NOW)
    assert found.verdict is not Verdict.ALLOWED
    if found.verdict is Verdict.DENIED:
        assert found.step is StepName.QUARANTINE
        assert found.fix == f"hivewire release service {end.name}"
