"""Builds the controller and runs it.

Swarm events --on_service/network/node--.
records (claims, nodes, ...) --on_records--+--> queue of work --> reconcile --> policies/, peers/, mesh  (store)
every half minute --resync-----------------'    (one thread)         |          guarded by `leader`
                                                                     '--> state --> API, CLI
"""

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
from fastapi import FastAPI

from controller.access_keeper import AccessKeeper
from controller.agents import AgentQuestions
from controller.api.app import create_app
from controller.api.auth import TokenSet, ensure_token
from controller.api.metrics import Vitals
from controller.api.server import ApiServer, is_private
from controller.api.tls import Contexts, NodePair, Pairs, StoredPair
from controller.leader import LeaderRecord, Leadership
from controller.reconciler import MeshReconciler, Work
from controller.settings import ControllerSettings
from controller.state import MeshState
from controller.swarm.api import EventKind
from controller.swarm.client import SwarmClient
from controller.swarm.snapshot import SwarmInfo
from hivewire import __version__, logs
from hivewire.connect import open_store
from hivewire.errors import Conflict, HivewireError, InvalidIdentity, InvalidSettings
from hivewire.identity import IdentitySource
from hivewire.identity import load as load_identity
from hivewire.ids import NodeId, ServiceId, TaskId
from hivewire.process import stop_event
from hivewire.records import QuarantineKind, QuarantineRecord, quarantine_key
from hivewire.reports import AgentReport, InterfaceReport, TaskDenials
from hivewire.signed import Managers, Signatures, SwarmSignatures
from hivewire.store.api import Put, Store
from hivewire.workqueue import WorkQueue

_SECRET = Path("/run/secrets/admin_token")


class Source:
    """What API requests read."""

    def __init__(
        self,
        reconciler: MeshReconciler,
        agents: AgentQuestions,
        store: Store,
        signatures: Signatures,
        keeper: AccessKeeper | None = None,
    ) -> None:
        self._reconciler = reconciler
        self._keeper = keeper
        self._agents = agents
        self._store = store
        self._signatures = signatures

    def state(self) -> MeshState:
        state = self._reconciler.state()
        if self._keeper is None:
            return state
        return replace(state, components=(*state.components, self._keeper.component()))

    def interfaces(self) -> Mapping[TaskId, InterfaceReport]:
        try:
            return self._agents.interfaces(self.state().nodes.values())
        except InvalidIdentity as error:
            logs.get().warning("agents.unasked", error=str(error))
            return {}

    def denials(self) -> Sequence[TaskDenials]:
        try:
            return self._agents.denials(self.state().nodes.values())
        except InvalidIdentity as error:
            logs.get().warning("agents.unasked", error=str(error))
            return ()

    def ask(self, nodes: Collection[NodeId]) -> Mapping[NodeId, AgentReport]:
        try:
            return self._agents.ask([it for node, it in self.state().nodes.items() if node in nodes])
        except InvalidIdentity as error:
            logs.get().warning("agents.unasked", error=str(error))
            return {}

    # A quarantine is a person's word, not derived from anything: one record per thing, the last word counts. So these
    # are the only writes that no leader guards, and they work on every replica while nobody leads.

    def quarantine(self, record: QuarantineRecord) -> None:
        self._store.txn((), (Put(quarantine_key(record.kind, record.id), self._signatures.sign(record)),))

    def release(self, kind: QuarantineKind, id_: str) -> None:
        for record in self.state().quarantines:
            if (record.kind, record.id) == (kind, id_):
                self.quarantine(msgspec.structs.replace(record, released=True))


def run(settings: ControllerSettings) -> bool:
    """Run until SIGTERM or SIGINT; false where a bug ended it. Raises InvalidSettings, InvalidIdentity at the start."""
    log = logs.get()
    stop = stop_event()

    identity = IdentitySource(settings.identity_files)
    me = identity.current()
    if not me.is_manager:
        raise InvalidSettings("the controller runs on managers only: constrain its service to node.role == manager")
    manages_access = _manages_access(settings, me.node)
    pairs = _pairs(settings, identity)
    tokens = _tokens(settings)
    swarm = SwarmClient(settings.docker_socket)
    info = _wait_for_swarm(swarm, stop)
    if info is None:
        return True
    store = open_store(settings, tuple(m.address.rsplit(":", 1)[0] for m in info.managers))
    managers = Managers(lambda: frozenset(m.node for m in swarm.info().managers))
    signatures = SwarmSignatures(identity, managers)
    queue: WorkQueue[Work] = WorkQueue()
    reconciler = MeshReconciler(
        swarm=swarm,
        store=store,
        leadership=lambda: leadership,
        queue=queue,
        signatures=signatures,
        mode=settings.mode,
    )
    leadership = Leadership(store, LeaderRecord(node=me.node, hostname=info.hostname), reconciler.resync)
    keeper = AccessKeeper(store, leadership, me.node)
    if manages_access:
        reconciler.on_nodes = keeper.on_nodes
    agents = AgentQuestions(identity)
    app = create_app(
        Source(reconciler, agents, store, signatures, keeper),
        tokens,
        __version__,
        vitals=lambda: _vitals(reconciler, identity, pairs, signatures.refused),
        metrics_auth=settings.metrics_auth,
    )
    servers = _servers(settings, app, pairs)

    for server in servers:
        server.start()
    reconciler.mirror.start()
    loops = [
        threading.Thread(target=_watch_swarm, args=(swarm, reconciler, stop), name="events", daemon=True),
        threading.Thread(target=_resync, args=(reconciler, settings.resync_s, stop), name="resync", daemon=True),
        threading.Thread(target=leadership.run, args=(stop,), name="leader"),
        threading.Thread(target=_work, args=(queue, reconciler), name="loop"),
        threading.Thread(target=keeper.run, args=(stop,), name="access"),
    ]
    for loop in loops:
        loop.start()
    log.info("controller.started", version=__version__, node=me.node, api=", ".join(map(str, servers)))
    stop.wait()
    queue.close()
    leadership.nudge()
    keeper.wake()
    for loop in loops:
        if not loop.daemon:
            loop.join()
    for server in servers:
        server.stop()
    agents.close()
    reconciler.mirror.stop()
    store.close()
    log.info("controller.stopped")
    return not stop.is_bug


def _manages_access(settings: ControllerSettings, me: NodeId) -> bool:
    """Whether users and roles of etcd are ours to keep. Raises InvalidSettings, InvalidIdentity."""
    if not settings.manages_access:
        return False
    shown = load_identity(settings.etcd_files).node
    if shown != me:
        raise InvalidSettings(
            f"HIVEWIRE_ETCD_ACCESS=managed gives etcd's users the ids of nodes, but the certificate towards etcd is of "
            f"{shown!r}, not of this node {me}: unset HIVEWIRE_ETCD_CERT, or set HIVEWIRE_ETCD_ACCESS=external"
        )
    return True


def _pairs(settings: ControllerSettings, identity: IdentitySource) -> Pairs | None:
    """The certificate of the API; None where it speaks plain HTTP. Raises InvalidSettings, InvalidIdentity."""
    certificate, key = settings.api_cert, settings.api_key
    if (certificate is None) != (key is None):
        raise InvalidSettings("HIVEWIRE_API_CERT and HIVEWIRE_API_KEY go together: set both, or neither")
    if is_private(settings.api_host):
        return None
    return NodePair(identity) if certificate is None or key is None else StoredPair(certificate, key)


def _servers(settings: ControllerSettings, app: FastAPI, pairs: Pairs | None) -> list[ApiServer]:
    """Where others can reach it the API speaks TLS; the commands in the container then have a socket of their own."""
    contexts = None if pairs is None else Contexts(pairs)
    servers = [ApiServer(app, settings.api_host, settings.api_port, contexts)]
    return servers if pairs is None else [*servers, ApiServer(app, str(settings.api_socket.absolute()), 0)]


def _vitals(
    reconciler: MeshReconciler, identity: IdentitySource, pairs: Pairs | None, refused: Mapping[str, int]
) -> Vitals:
    expiry: dict[str, float] = {}
    for purpose, read in (("node", identity.current), ("api", pairs.current if pairs else None)):
        try:
            if read is not None:
                expiry[purpose] = read().expires.timestamp()
        except HivewireError as error:  # being renewed, or unreadable: then the series is absent
            logs.get().debug("certificate.unread", purpose=purpose, error=str(error))
    mirror = reconciler.mirror
    return Vitals(
        certificates=expiry,
        store_watch_restarts=mirror.watch_restarts,
        store_lists=mirror.relists,
        store_history_changes=mirror.reset_count,
        records_refused=dict(refused),
    )


def _tokens(settings: ControllerSettings) -> TokenSet:
    """The tokens as set, else the Docker secret, else one made here and kept for the next start."""
    if settings.token_file is not None:
        return TokenSet.load(settings.token_file)
    if _SECRET.exists():
        return TokenSet.load(_SECRET)
    path = settings.state_folder / "admin_token"
    if ensure_token(path):
        logs.get().info("token.made", path=str(path))
    return TokenSet.load(path)


def _wait_for_swarm(swarm: SwarmClient, stop: threading.Event) -> SwarmInfo | None:
    while not stop.is_set():
        try:
            return swarm.info()
        except HivewireError as error:
            logs.get().warning("swarm.unavailable", error=str(error))
            stop.wait(1)
    return None


def _watch_swarm(swarm: SwarmClient, reconciler: MeshReconciler, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            for event in swarm.events():
                match event.kind:
                    case EventKind.SERVICE:
                        reconciler.on_service(ServiceId(event.id))
                    case EventKind.NODE:
                        reconciler.on_node()
                    case EventKind.NETWORK:
                        reconciler.on_network()
                    case EventKind.SUBSCRIBED:
                        reconciler.resync()
        except HivewireError as error:
            logs.get().warning("events.lost", error=str(error))
            stop.wait(1)


def _resync(reconciler: MeshReconciler, period_s: float, stop: threading.Event) -> None:
    while not stop.wait(period_s):
        reconciler.resync()


def _work(queue: WorkQueue[Work], reconciler: MeshReconciler) -> None:
    log = logs.get()
    while (work := queue.get()) is not None:
        try:
            reconciler.reconcile(work)
        except Conflict as error:
            # Somebody wrote in between, most likely the next leader: look again.
            queue.retry(work)
            log.info("write.conflict", work=str(work), error=str(error))
        except HivewireError as error:
            delay_s = queue.retry(work)
            log.warning("work.retry", work=str(work), error=str(error), again_in_s=round(delay_s, 2))
        except Exception:
            queue.retry(work)
            log.exception("work.bug", work=str(work))
        else:
            queue.done(work)
