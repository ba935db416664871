"""Whatever happens to a Swarm, its store and its controllers, in any order: in the end the store says what is true."""

from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from controller.admission import Evidence, Refused, judge
from controller.leader import LEASE_S
from controller.policy.compile import MeshDefaults, compile_mesh
from controller.swarm.snapshot import Node, SwarmSnapshot, Task
from hivewire.ids import NodeId, ServiceId, TaskId
from hivewire.records import (
    CLAIMS,
    PEERS,
    POLICIES,
    ClaimRecord,
    Mode,
    NodeRecord,
    PeerRecord,
    PolicyRecord,
    decode,
    encode,
    node_key,
    peer_key,
    policy_key,
    split_key,
)
from tests.property.test_controller_rig import Cluster, key_of

NAMES = ("web", "api", "db")
LABELS = st.sampled_from(
    [
        {},
        {"hivewire.ports": "5432"},
        {"hivewire.links": "db:5432"},
        {"hivewire.links": "api:80 db"},
        {"hivewire.links": "web:80", "hivewire.mode": "observe"},
        {"hivewire.enable": "false"},
        {"hivewire.links": "db:none"},
        {"hivewire.mode": "loud"},
    ]
)
picks = st.integers(0, 1000)


class ControllerMachine(RuleBasedStateMachine):
    """Two controllers over one store; Swarm's events may get lost, and agents claim whatever they like."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = Cluster(["m1", "m2"])
        self.second = self.cluster.swarm.add_node("n2")
        self.services: dict[str, ServiceId] = {}

    @initialize()
    def begin(self) -> None:
        self.cluster.settle(0.5)

    # Swarm.

    @rule(name=st.sampled_from(NAMES), labels=LABELS, replicas=st.integers(0, 3), is_told=st.booleans())
    def add_service(self, name: str, labels: dict[str, str], replicas: int, is_told: bool) -> None:
        if name not in self.services:
            self.services[name] = self.cluster.swarm.add_service(
                f"shop_{name}", labels, stack="shop", networks=[self.cluster.network], replicas=replicas
            )
            self._changed(self.services[name], is_told)

    @precondition(lambda self: self.services)
    @rule(pick=picks, labels=LABELS, is_told=st.booleans())
    def relabel(self, pick: int, labels: dict[str, str], is_told: bool) -> None:
        service = self._service(pick)
        self.cluster.swarm.set_labels(service, labels)
        self._changed(service, is_told)

    @precondition(lambda self: self.services)
    @rule(pick=picks, replicas=st.integers(0, 3), is_told=st.booleans())
    def scale(self, pick: int, replicas: int, is_told: bool) -> None:
        service = self._service(pick)
        self.cluster.swarm.scale(service, replicas)
        self._changed(service, is_told)

    @precondition(lambda self: self.services)
    @rule(pick=picks, is_told=st.booleans())
    def remove_service(self, pick: int, is_told: bool) -> None:
        name = sorted(self.services)[pick % len(self.services)]
        service = self.services.pop(name)
        self.cluster.swarm.remove_service(service)
        self._changed(service, is_told)

    @rule(steps=st.integers(1, 4))
    def tasks_progress(self, steps: int) -> None:
        for _ in range(steps):
            self.cluster.swarm.step()

    @rule(pick=picks)
    def task_fails(self, pick: int) -> None:
        with self._from_outside():
            running = [task for task in self.cluster.swarm.tasks() if task.state == "running"]
            if running:
                self.cluster.swarm.fail_task(running[pick % len(running)].id)

    @rule(is_ready=st.booleans(), is_told=st.booleans())
    def node_changes(self, is_ready: bool, is_told: bool) -> None:
        self.cluster.swarm.set_ready(self.second, is_ready)
        if is_told:
            for replica in self.cluster.replicas:
                replica.reconciler.on_node()

    @rule(is_down=st.booleans())
    def engine(self, is_down: bool) -> None:
        self.cluster.swarm.is_down = is_down

    # Agents.

    @rule(pick=picks, is_serving=st.booleans(), is_rotated=st.booleans())
    def claim(self, pick: int, is_serving: bool, is_rotated: bool) -> None:
        with self._from_outside():
            task = self._task(pick)
            if task is not None:
                self.cluster.claim(task, serving=is_serving, key=key_of(f"{task.id}-2") if is_rotated else "")

    @rule(pick=picks, lie=st.sampled_from(["node", "service", "address", "key", "registered"]))
    def claim_falsely(self, pick: int, lie: str) -> None:
        with self._from_outside():
            task = self._task(pick)
            if task is None:
                return
            match lie:
                case "node":
                    other = self.cluster.node if task.node == self.second else self.second
                    self.cluster.claim(task, node=other)
                case "service":
                    self.cluster.claim(task, service=ServiceId("other"))
                case "address":
                    self.cluster.claim(task, address="203.0.113.1")
                case "registered":
                    self.cluster.claim(task, address="198.51.100.1")
                case _:
                    self.cluster.claim(task, key=key_of("shared"))

    @rule(address=st.sampled_from(["", "198.51.100.1", "gone"]))
    def agent_registers(self, address: str) -> None:
        with self._from_outside():
            if address == "gone":
                self.cluster.store.delete(node_key(self.cluster.node))
            else:
                self.cluster.agent(self.cluster.node, underlay=address)

    @rule(pick=picks)
    def claim_vanishes(self, pick: int) -> None:
        with self._from_outside():
            claims = sorted(self.cluster.stored(CLAIMS))
            if claims:
                self.cluster.store.delete(claims[pick % len(claims)])

    @rule(pick=picks, prefix=st.sampled_from([CLAIMS, PEERS, POLICIES]))
    def record_is_broken(self, pick: int, prefix: str) -> None:
        with self._from_outside():
            keys = [*sorted(self.cluster.stored(prefix)), prefix + "odd"]
            self.cluster.store.put(keys[pick % len(keys)], b"\xff")

    # The store and the controllers.

    @rule()
    def watches_break(self) -> None:
        self.cluster.store.faults.break_watches()

    @rule()
    def watches_fall_silent(self) -> None:
        self.cluster.store.faults.drop_watches()

    @rule()
    def store_is_wiped(self) -> None:
        self.cluster.store.faults.wipe()

    @rule(count=st.integers(1, 4), is_applied=st.booleans())
    def calls_fail(self, count: int, is_applied: bool) -> None:
        faults = self.cluster.store.faults
        (faults.lose_next_answers if is_applied else faults.fail_next_calls)(count)

    @rule(which=st.integers(0, 1))
    def controller_freezes(self, which: int) -> None:
        self.cluster.replicas[which].is_frozen = True

    @rule(which=st.integers(0, 1))
    def controller_restarts(self, which: int) -> None:
        self.cluster.replicas[which] = self.cluster.start(f"m{which}")

    @rule(seconds=st.sampled_from([0.1, 0.3, 1.0, 3.0, LEASE_S + 1.0]))
    def time_passes(self, seconds: float) -> None:
        self.cluster.settle(seconds)

    # What must hold in the end.

    @rule()
    def everything_is_true_in_the_end(self) -> None:
        """After faults end, a resync makes the store equal to what pure functions say; then nothing is written."""
        self._heal()
        self.cluster.resync(3.0)
        assert sum(replica.leadership.is_leader for replica in self.cluster.replicas) == 1
        self._check_policies()
        self._check_peers()
        assert self.cluster.resync(3.0) == 0
        for replica in self.cluster.replicas:
            replica.errors.clear()

    def teardown(self) -> None:
        self.everything_is_true_in_the_end()
        self.cluster.swarm.settle()
        for service in self.services.values():
            self.cluster.tell(service)
        for task in self.cluster.swarm.tasks():
            if task.node:
                self.cluster.claim(task)
        self.cluster.settle(70.0)  # the mesh settles by then, whoever did not claim
        self.everything_is_true_in_the_end()
        assert self.cluster.mesh().settled

    def _heal(self) -> None:
        faults = self.cluster.store.faults
        faults.fail_next_calls(0)
        faults.lose_next_answers(0)
        self.cluster.swarm.is_down = False
        for replica in self.cluster.replicas:
            replica.is_frozen = False
        # Long enough for a silent watch, a lease and the longest delay of a retry.
        self.cluster.settle(45.0)
        if not self.cluster.mesh().settled:  # which comes a minute after a loss where not every task has claimed
            self.cluster.settle(40.0)

    def _check_policies(self) -> None:
        swarm, stored = self.cluster.swarm.snapshot(), self.cluster.stored(POLICIES)
        previous = {p.service: p for p in self.cluster.policies().values()}
        compiled = compile_mesh(swarm, previous, MeshDefaults(Mode.ENFORCE), frozenset())
        expected = {policy_key(s): encode(p) for s, p in compiled.policies.items()}
        records = {key: decode(PolicyRecord, value) for key, value in stored.items()}
        withdrawn = {key for key, record in records.items() if record.mode is Mode.OFF and not record.networks}
        assert {key: value for key, value in stored.items() if key not in withdrawn - expected.keys()} == expected
        assert {split_key(key)[1] for key in withdrawn - expected.keys()} <= swarm.services.keys()

    def _check_peers(self) -> None:
        """Every peer is what its claim becomes, and every claim that is true is a peer, one per key."""
        swarm, peers = self.cluster.swarm.snapshot(), self.cluster.peers()
        policies = {p.service: p for p in self.cluster.policies().values()}
        tasks = {task.id: task for task in self.cluster.swarm.tasks(desired=frozenset())}
        owners = {peer.public_key: peer.task for peer in peers.values()}
        assert len(owners) == len(peers)
        expected: dict[str, bytes] = {}
        for key, value in self.cluster.stored(CLAIMS).items():
            if value == b"\xff":
                continue
            claim = decode(ClaimRecord, value)
            *_, node, task = key.split("/")
            verdict = judge(
                NodeId(node),
                TaskId(task),
                claim,
                Evidence(
                    task=tasks.get(TaskId(task)),
                    policy=policies.get(claim.service),
                    node=swarm.nodes.get(claim.node),
                    agent=self._agent(claim.node),
                    neighbour=self._neighbour(swarm, claim),
                    key_owner=owners.get(claim.public_key),
                    admitted=peers.get(TaskId(task)),
                ),
            )
            if isinstance(verdict, PeerRecord):
                expected[peer_key(verdict.service, verdict.task)] = encode(verdict)
            elif isinstance(verdict, Refused):
                shown = {(r.node, r.task): r.reason for r in self.cluster.replicas[0].reconciler.state().refused}
                assert shown[NodeId(node), TaskId(task)] == verdict.reason
        assert self.cluster.stored(PEERS) == expected

    def _neighbour(self, swarm: SwarmSnapshot, claim: ClaimRecord) -> Node | None:
        """The first of the other nodes whose address the claim names; an agent's word is no match for the Swarm's."""
        address = str(claim.endpoint.address)
        own = swarm.nodes.get(claim.node)
        named = [node for node in swarm.nodes.values() if node.address == address]
        if own is None or own.address != address:
            registered = ((node, self._agent(node.id)) for node in swarm.nodes.values())
            named += [node for node, agent in registered if agent and str(agent.underlay_address) == address]
        return min((node for node in named if node.id != claim.node), key=lambda node: node.id, default=None)

    def _agent(self, node: NodeId) -> NodeRecord | None:
        item = self.cluster.store.get(node_key(node))
        return None if item is None else decode(NodeRecord, item.value)

    @contextmanager
    def _from_outside(self) -> Iterator[None]:
        """What the test does itself meets no fault."""
        faults, swarm = self.cluster.store.faults, self.cluster.swarm
        before = faults.failing_calls, faults.lost_answers, swarm.is_down
        faults.failing_calls, faults.lost_answers, swarm.is_down = 0, 0, False
        yield
        faults.failing_calls, faults.lost_answers, swarm.is_down = before

    def _changed(self, service: ServiceId, is_told: bool) -> None:
        if is_told:
            self.cluster.tell(service)

    def _service(self, pick: int) -> ServiceId:
        return self.services[sorted(self.services)[pick % len(self.services)]]

    def _task(self, pick: int) -> Task | None:
        tasks = [task for task in self.cluster.swarm.tasks(desired=frozenset()) if task.node]
        return tasks[pick % len(tasks)] if tasks else None


ControllerMachine.TestCase.settings = settings(
    max_examples=30, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestController = ControllerMachine.TestCase
