"""Who may do what in etcd: each node of the Swarm its own records, managers everything. Pure.

etcd takes the user from the CN of the client certificate, which for Swarm's certificates is the node's id. So the users
are the Swarm's nodes and ``root``, which etcd demands and which nobody can be: no certificate names it, and it has no
password. Whatever else there is goes.
"""

from collections.abc import Iterable
from typing import Final

from controller.swarm.snapshot import Node
from hivewire.ids import NodeId
from hivewire.records import CLAIMS, GUARDS, MESH_KEY, PEERS, POLICIES, QUARANTINES, STATUS, node_key
from hivewire.store.api import (
    ROOT,
    Access,
    AccessOp,
    AddGrant,
    AddRole,
    AddUser,
    EnableAccess,
    GiveRole,
    Grant,
    RemoveGrant,
    RemoveRole,
    RemoveUser,
    TakeRole,
    prefix_end,
)

AGENT_ROLE: Final = "agent"
"""What every agent may read."""

LOCKED_OUT: Final = (
    "where no controller leads, nobody can give this manager access: etcd's users are those of another time (an old "
    "volume or backup) or of another cluster. Empty Hivewire's own etcd, all in it is made again: docker service scale "
    "hivewire_etcd=0, docker volume rm hivewire_etcd on its manager, docker service scale hivewire_etcd=1; in an etcd "
    "of your own give this certificate's user the role root, or as much as docs/operations.md says with "
    "HIVEWIRE_ETCD_ACCESS=external"
)
"""What to do about a controller that etcd refuses."""

_NOTHING: Final[frozenset[str]] = frozenset()


def desired_access(nodes: Iterable[Node]) -> Access:
    """The users, roles and grants that these nodes call for."""
    users: dict[str, frozenset[str]] = {ROOT: frozenset({ROOT})}
    roles: dict[str, frozenset[Grant]] = {ROOT: frozenset(), AGENT_ROLE: frozenset(_read_by_agents())}
    for node in nodes:
        if node.is_manager:
            users[node.id] = frozenset({ROOT})
        else:
            users[node.id] = frozenset({AGENT_ROLE, node_role(node.id)})
            roles[node_role(node.id)] = frozenset(_own(node.id))
    return Access(True, users, roles)


def node_role(node: NodeId) -> str:
    """The role that lets a node write its own records."""
    return f"node-{node}"


def plan_access(desired: Access, observed: Access) -> tuple[AccessOp, ...]:
    """What to change, in an order in which nobody who should have access is without it; empty where all is right.

    While access control is off everybody could write users and roles, so nothing of these is kept.
    """
    if not observed.enabled:
        emptying: list[AccessOp] = [RemoveUser(user) for user in sorted(observed.users)]
        emptying += [RemoveRole(role) for role in sorted(observed.roles)]
        return (*emptying, *_additions(desired, Access(False, {}, {})), EnableAccess())
    return (*_additions(desired, observed), *_removals(desired, observed))


def _additions(desired: Access, observed: Access) -> Iterable[AccessOp]:
    for role, grants in sorted(desired.roles.items()):
        if role not in observed.roles:
            yield AddRole(role)
        for grant in sorted(grants - observed.roles.get(role, frozenset())):
            yield AddGrant(role, grant)
    for user, roles in sorted(desired.users.items()):
        if user not in observed.users:
            yield AddUser(user)
        for role in sorted(roles - observed.users.get(user, _NOTHING)):
            yield GiveRole(user, role)


def _removals(desired: Access, observed: Access) -> Iterable[AccessOp]:
    for user, roles in sorted(observed.users.items()):
        if user not in desired.users:
            yield RemoveUser(user)
            continue
        for role in sorted(roles - desired.users[user]):
            yield TakeRole(user, role)
    for role, grants in sorted(observed.roles.items()):
        if role not in desired.roles:
            yield RemoveRole(role)
            continue
        replaced = {(grant.key, grant.end) for grant in desired.roles[role]}
        for grant in sorted(grants - desired.roles[role]):
            if (grant.key, grant.end) not in replaced:
                yield RemoveGrant(role, grant)


def _read_by_agents() -> Iterable[Grant]:
    # The mirror follows the key of the mesh as a prefix.
    for prefix in (MESH_KEY, POLICIES, PEERS, GUARDS, QUARANTINES):
        yield Grant(prefix, prefix_end(prefix), "read")


def _own(node: NodeId) -> Iterable[Grant]:
    yield Grant(node_key(node))
    for prefix in (f"{CLAIMS}{node}/", f"{STATUS}{node}/"):
        yield Grant(prefix, prefix_end(prefix))
