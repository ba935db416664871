"""Every call of etcd's API, one by one and without the product's own care: what somebody with a certificate can try."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import hivewire.store.etcd  # noqa: F401  it chooses protobuf's Python implementation, before the stubs are imported

# isort: split
import grpc
from etcd3 import etcdrpc
from etcd3.etcdrpc import rpc_pb2 as rpc

from hivewire.store.api import prefix_end

TIMEOUT_S: Final = 5.0
#: The end of a range "from this key on".
FROM_KEY: Final = b"\x00"
SERVER_NAME: Final = "swarm-manager"
FIRST_REVISION: Final = 3


@dataclass(frozen=True)
class Answer:
    """What a call came to: ``OK``, or the name of the status; with the bytes that came back."""

    status: str
    detail: str = ""
    read: bytes = field(default=b"", repr=False)

    @property
    def is_done(self) -> bool:
        return self.status == "OK"


class Etcd:
    """A connection with some certificate, or with none."""

    def __init__(self, endpoint: str, ca: bytes, cert: bytes | None = None, key: bytes | None = None) -> None:
        tls = grpc.ssl_channel_credentials(ca, key, cert)
        self.channel = grpc.secure_channel(endpoint, tls, [("grpc.ssl_target_name_override", SERVER_NAME)])
        self.kv = etcdrpc.KVStub(self.channel)
        self.watching = etcdrpc.WatchStub(self.channel)
        self.lease = etcdrpc.LeaseStub(self.channel)
        self.cluster = etcdrpc.ClusterStub(self.channel)
        self.maintenance = etcdrpc.MaintenanceStub(self.channel)
        self.auth = etcdrpc.AuthStub(self.channel)

    def close(self) -> None:
        self.channel.close()

    def ask(self, call: Callable[[], Any]) -> Answer:
        try:
            return Answer("OK", read=call().SerializeToString())
        except grpc.RpcError as error:
            return Answer(error.code().name, str(error.details()))

    def grant(self, lease: int) -> Answer:
        return self.ask(lambda: self.lease.LeaseGrant(rpc.LeaseGrantRequest(TTL=600, ID=lease), timeout=TIMEOUT_S))

    # On keys.

    def put(self, key: str, value: bytes, lease: int = 0) -> Answer:
        return self.ask(lambda: self.kv.Put(put(key, value, lease), timeout=TIMEOUT_S))

    def get(self, key: str) -> Answer:
        return self.ask(lambda: self.kv.Range(get(key), timeout=TIMEOUT_S))

    def txn(self, *ops: Any, compare: Any = None) -> Answer:
        request = rpc.TxnRequest(compare=[compare] if compare else [], success=ops)
        return self.ask(lambda: self.kv.Txn(request, timeout=TIMEOUT_S))

    def watch(self, key: str, end: bytes = b"") -> Answer:
        """What happened since a revision that no compaction here reaches, as far as it comes at once."""
        create = rpc.WatchCreateRequest(key=key.encode(), range_end=end, start_revision=FIRST_REVISION)
        call = self.watching.Watch(iter([rpc.WatchRequest(create_request=create)]), timeout=TIMEOUT_S)
        read = b""
        try:
            for answer in call:
                read += answer.SerializeToString()
                if answer.canceled:
                    return Answer("PERMISSION_DENIED", answer.cancel_reason)
                if answer.events:
                    break
        except grpc.RpcError as error:
            return Answer(error.code().name, str(error.details()))
        finally:
            call.cancel()
        return Answer("OK", read=read)


def put(key: str, value: bytes, lease: int = 0) -> Any:
    return rpc.PutRequest(key=key.encode(), value=value, lease=lease)


def get(key: str, end: bytes = b"") -> Any:
    return rpc.RangeRequest(key=key.encode(), range_end=end)


def delete(key: str, end: bytes = b"") -> Any:
    return rpc.DeleteRangeRequest(key=key.encode(), range_end=end)


def op(request: Any) -> Any:
    """As a part of a transaction."""
    kinds = {"RangeRequest": "request_range", "PutRequest": "request_put", "DeleteRangeRequest": "request_delete_range",
             "TxnRequest": "request_txn"}  # fmt: skip
    return rpc.RequestOp(**{kinds[type(request).__name__]: request})


def nested(*ops: Any) -> Any:
    """A transaction inside of a transaction: unchecked before etcd 3.4.42 and 3.5.28 (CVE-2026-33343)."""
    return op(rpc.TxnRequest(success=ops))


def unchanged_since(key: str, revision: int) -> Any:
    return rpc.Compare(key=key.encode(), target=rpc.Compare.MOD, result=rpc.Compare.LESS, mod_revision=revision)


Verb = Callable[[Etcd, str, bytes], Answer]

#: Calls that read a key; etcd must ask whether the caller may read it.
READS: Final[dict[str, Verb]] = {
    "get": lambda it, key, value: it.get(key),
    "range over the prefix": lambda it, key, value: it.ask(lambda: it.kv.Range(get(key, _end(key)), timeout=TIMEOUT_S)),
    "count": lambda it, key, value: it.ask(
        lambda: it.kv.Range(rpc.RangeRequest(key=key.encode(), count_only=True), timeout=TIMEOUT_S)
    ),
    "watch": lambda it, key, value: it.watch(key),
    "watch over the prefix": lambda it, key, value: it.watch(key, _end(key)),
    "txn, get": lambda it, key, value: it.txn(op(get(key))),
    "txn, compare": lambda it, key, value: it.txn(compare=unchanged_since(key, 1 << 40)),
}

#: Calls that write a key.
WRITES: Final[dict[str, Verb]] = {
    "put": lambda it, key, value: it.put(key, value),
    "txn, put": lambda it, key, value: it.txn(op(put(key, value))),
    "delete": lambda it, key, value: it.ask(lambda: it.kv.DeleteRange(delete(key), timeout=TIMEOUT_S)),
    "txn, delete": lambda it, key, value: it.txn(op(delete(key))),
    "delete over the prefix": lambda it, key, value: it.ask(
        lambda: it.kv.DeleteRange(delete(key, _end(key)), timeout=TIMEOUT_S)
    ),
}

#: Ways around the check that installed versions leave open. What they give is worth nothing: that is what is tested.
BYPASSES: Final[dict[str, Verb]] = {
    "nested txn, put": lambda it, key, value: it.txn(nested(op(put(key, value)))),
    "nested txn, delete": lambda it, key, value: it.txn(nested(op(delete(key)))),
    "nested txn, get": lambda it, key, value: it.txn(nested(op(get(key)))),
    "nested txn, range from the first key": lambda it, key, value: it.txn(nested(op(get("\x00", FROM_KEY)))),
    "doubly nested txn, put": lambda it, key, value: it.txn(nested(nested(op(put(key, value))))),
    "watch from a key on": lambda it, key, value: it.watch(key, FROM_KEY),
    "put on a stranger's lease": lambda it, key, value: it.put(key, value, lease=LEASE),
    "txn, put on a stranger's lease": lambda it, key, value: it.txn(op(put(key, value, LEASE))),
}

LEASE: Final = 4711
"""A lease of the manager's, on which a key hangs."""


def _whole(answers: Iterator[Any]) -> Any:
    """The first answer of a stream."""
    return next(iter(answers))


Call = Callable[[Etcd], Answer]

#: Calls about no key, that etcd leaves to every user; a node without one is refused all the same, or not asked at all.
OPEN_TO_ALL: Final = frozenset(
    {
        "lease grant", "lease keepalive", "lease time to live", "lease list", "compact", "alarm list", "alarm raise",
        "alarm disarm", "status", "authenticate", "member list",
    }
)  # fmt: skip

CALLS: Final[dict[str, Call]] = {
    "lease grant": lambda it: it.ask(lambda: it.lease.LeaseGrant(rpc.LeaseGrantRequest(TTL=60), timeout=TIMEOUT_S)),
    "lease keepalive": lambda it: it.ask(
        lambda: _whole(it.lease.LeaseKeepAlive(iter([rpc.LeaseKeepAliveRequest(ID=LEASE)]), timeout=TIMEOUT_S))
    ),
    "lease time to live": lambda it: it.ask(
        lambda: it.lease.LeaseTimeToLive(rpc.LeaseTimeToLiveRequest(ID=LEASE, keys=True), timeout=TIMEOUT_S)
    ),
    "lease list": lambda it: it.ask(lambda: it.lease.LeaseLeases(rpc.LeaseLeasesRequest(), timeout=TIMEOUT_S)),
    "lease revoke": lambda it: it.ask(
        lambda: it.lease.LeaseRevoke(rpc.LeaseRevokeRequest(ID=LEASE), timeout=TIMEOUT_S)
    ),
    "compact": lambda it: it.ask(
        lambda: it.kv.Compact(rpc.CompactionRequest(revision=FIRST_REVISION - 1), timeout=TIMEOUT_S)
    ),
    "alarm list": lambda it: it.ask(lambda: it.maintenance.Alarm(rpc.AlarmRequest(action=0), timeout=TIMEOUT_S)),
    "alarm raise": lambda it: it.ask(
        lambda: it.maintenance.Alarm(rpc.AlarmRequest(action=1, memberID=1, alarm=1), timeout=TIMEOUT_S)
    ),
    "alarm disarm": lambda it: it.ask(
        lambda: it.maintenance.Alarm(rpc.AlarmRequest(action=2, memberID=1, alarm=1), timeout=TIMEOUT_S)
    ),
    "status": lambda it: it.ask(lambda: it.maintenance.Status(rpc.StatusRequest(), timeout=TIMEOUT_S)),
    "defragment": lambda it: it.ask(lambda: it.maintenance.Defragment(rpc.DefragmentRequest(), timeout=TIMEOUT_S)),
    "hash": lambda it: it.ask(lambda: it.maintenance.Hash(rpc.HashRequest(), timeout=TIMEOUT_S)),
    "hash of keys": lambda it: it.ask(lambda: it.maintenance.HashKV(rpc.HashKVRequest(), timeout=TIMEOUT_S)),
    "snapshot": lambda it: it.ask(lambda: _whole(it.maintenance.Snapshot(rpc.SnapshotRequest(), timeout=TIMEOUT_S))),
    "move leader": lambda it: it.ask(
        lambda: it.maintenance.MoveLeader(rpc.MoveLeaderRequest(targetID=1), timeout=TIMEOUT_S)
    ),
    "member list": lambda it: it.ask(lambda: it.cluster.MemberList(rpc.MemberListRequest(), timeout=TIMEOUT_S)),
    "member add": lambda it: it.ask(
        lambda: it.cluster.MemberAdd(rpc.MemberAddRequest(peerURLs=["https://127.0.0.1:1"]), timeout=TIMEOUT_S)
    ),
    "member remove": lambda it: it.ask(
        lambda: it.cluster.MemberRemove(rpc.MemberRemoveRequest(ID=1), timeout=TIMEOUT_S)
    ),
    "member update": lambda it: it.ask(
        lambda: it.cluster.MemberUpdate(
            rpc.MemberUpdateRequest(ID=1, peerURLs=["https://127.0.0.1:1"]), timeout=TIMEOUT_S
        )
    ),
    "authenticate": lambda it: it.ask(
        lambda: it.auth.Authenticate(rpc.AuthenticateRequest(name="root", password=""), timeout=TIMEOUT_S)
    ),
    "auth disable": lambda it: it.ask(lambda: it.auth.AuthDisable(rpc.AuthDisableRequest(), timeout=TIMEOUT_S)),
    "auth enable": lambda it: it.ask(lambda: it.auth.AuthEnable(rpc.AuthEnableRequest(), timeout=TIMEOUT_S)),
    "user list": lambda it: it.ask(lambda: it.auth.UserList(rpc.AuthUserListRequest(), timeout=TIMEOUT_S)),
    "user get": lambda it: it.ask(lambda: it.auth.UserGet(rpc.AuthUserGetRequest(name="root"), timeout=TIMEOUT_S)),
    "user add": lambda it: it.ask(
        lambda: it.auth.UserAdd(rpc.AuthUserAddRequest(name="thief", password="x"), timeout=TIMEOUT_S)
    ),
    "user delete": lambda it: it.ask(
        lambda: it.auth.UserDelete(rpc.AuthUserDeleteRequest(name="m1"), timeout=TIMEOUT_S)
    ),
    "user password": lambda it: it.ask(
        lambda: it.auth.UserChangePassword(
            rpc.AuthUserChangePasswordRequest(name="root", password="x"), timeout=TIMEOUT_S
        )
    ),
    "user grant": lambda it: it.ask(
        lambda: it.auth.UserGrantRole(rpc.AuthUserGrantRoleRequest(user="w1", role="root"), timeout=TIMEOUT_S)
    ),
    "user revoke": lambda it: it.ask(
        lambda: it.auth.UserRevokeRole(rpc.AuthUserRevokeRoleRequest(name="m1", role="root"), timeout=TIMEOUT_S)
    ),
    "role list": lambda it: it.ask(lambda: it.auth.RoleList(rpc.AuthRoleListRequest(), timeout=TIMEOUT_S)),
    "role get": lambda it: it.ask(lambda: it.auth.RoleGet(rpc.AuthRoleGetRequest(role="root"), timeout=TIMEOUT_S)),
    "role add": lambda it: it.ask(lambda: it.auth.RoleAdd(rpc.AuthRoleAddRequest(name="thieves"), timeout=TIMEOUT_S)),
    "role delete": lambda it: it.ask(
        lambda: it.auth.RoleDelete(rpc.AuthRoleDeleteRequest(role="node-w2"), timeout=TIMEOUT_S)
    ),
    "role grant": lambda it: it.ask(
        lambda: it.auth.RoleGrantPermission(rpc.AuthRoleGrantPermissionRequest(name="agent"), timeout=TIMEOUT_S)
    ),
    "role revoke": lambda it: it.ask(
        lambda: it.auth.RoleRevokePermission(rpc.AuthRoleRevokePermissionRequest(role="agent"), timeout=TIMEOUT_S)
    ),
}


def _end(key: str) -> bytes:
    return prefix_end(key).encode()
