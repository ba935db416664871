"""What became of every claim: admitted, refused and why, or not judged yet. Pure."""

from collections.abc import Iterator
from typing import Final

from controller.api.shapes import ClaimState, ClaimView
from controller.state import MeshState, RefusedClaim
from hivewire.records import ClaimRecord

# What refusals say, in the order in which they are looked for. Programs count by the word on the left; people read the
# text, which ``admission`` writes and may change: what is not found here is "other".
_CLASSES: Final = (
    ("quarantined", ("quarantined",)),
    ("path", ("but lies under",)),
    ("node", ("the task runs on node", "is not in the Swarm")),
    ("service", ("the task belongs to service",)),
    ("not_meshed", ("its service is not in the mesh", "no address on an overlay network")),
    ("epoch", ("its public key is of epoch",)),
    ("key", ("its public key",)),
    ("endpoint", ("its endpoint", "its port")),
    ("signature", ("signature", "signed", "certificate", "generation")),
)
OTHER: Final = "other"
CLASSES: Final = (*(name for name, _ in _CLASSES), OTHER)


def reason_class(reason: str) -> str:
    """One of ``CLASSES``."""
    return next((name for name, parts in _CLASSES if any(part in reason for part in parts)), OTHER)


def rows(state: MeshState) -> list[ClaimView]:
    """Every claim, by task and node."""
    refused = {(it.task, it.node) for it in state.refused}
    shown = [_refused(state, it) for it in state.refused]
    shown += [_judged(state, it) for it in state.claims.values() if (it.task, it.node) not in refused]
    return sorted(shown, key=row_key)


def row_key(row: ClaimView) -> tuple[str, ...]:
    return (row.task, row.node_id, row.reason)


def _judged(state: MeshState, claim: ClaimRecord) -> ClaimView:
    peer = state.peers.get(claim.task)
    if peer is not None and (peer.node, peer.public_key) == (claim.node, claim.public_key):
        return _view(state, claim, ClaimState.ADMITTED, "")
    # A claim of a task that is over, or unknown to Swarm, is merely late or early: it is neither admitted nor refused.
    known = claim.task in state.tasks
    reason = "the controller has not admitted it yet" if known else "Swarm does not run this task"
    return _view(state, claim, ClaimState.WAITING, reason)


def _refused(state: MeshState, it: RefusedClaim) -> ClaimView:
    claim = state.claims.get(it.task)
    return _view(state, claim if claim is not None and claim.node == it.node else it, ClaimState.REFUSED, it.reason)


def _view(state: MeshState, claim: ClaimRecord | RefusedClaim, at: ClaimState, reason: str) -> ClaimView:
    task, node = state.tasks.get(claim.task), state.swarm.nodes.get(claim.node)
    said = task.service if task else claim.service if isinstance(claim, ClaimRecord) else None
    service = state.swarm.services.get(said) if said is not None else None
    return ClaimView(
        task=claim.task,
        task_name=task.name if task else "",
        service=service.name if service else said or "",
        node=node.hostname if node else str(claim.node),
        node_id=claim.node,
        state=at,
        reason=reason,
        reason_class=reason_class(reason) if at is ClaimState.REFUSED else "",
    )


def refused_by_class(state: MeshState) -> Iterator[tuple[str, int]]:
    """How many claims are refused now, for every class."""
    found = [reason_class(it.reason) for it in state.refused]
    return ((name, found.count(name)) for name in CLASSES)
