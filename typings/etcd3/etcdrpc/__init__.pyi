from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import grpc
from etcd3.etcdrpc import auth_pb2, kv_pb2

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")

class _Message:
    def SerializeToString(self) -> bytes: ...
    @classmethod
    def FromString(cls, data: bytes) -> Self: ...

class _Unary(Protocol):
    def __call__(self, request: Any, *, timeout: float | None = ...) -> Any: ...

class _Call(Iterator[_Response], Generic[_Response]):
    def __next__(self) -> _Response: ...
    def cancel(self) -> bool: ...

class _Stream(Generic[_Request, _Response]):
    def __call__(
        self,
        requests: Iterator[_Request],
        *,
        timeout: float | None = ...,
        metadata: Sequence[tuple[str, str]] | None = ...,
    ) -> _Call[_Response]: ...

class ResponseHeader(_Message):
    cluster_id: int
    member_id: int
    revision: int
    raft_term: int

class Compare(_Message):
    EQUAL: ClassVar[int]
    CREATE: ClassVar[int]
    MOD: ClassVar[int]
    def __init__(
        self,
        *,
        key: bytes,
        target: int,
        result: int,
        create_revision: int = ...,
        mod_revision: int = ...,
    ) -> None: ...

class RangeRequest(_Message):
    def __init__(self, *, key: bytes, range_end: bytes = ..., limit: int = ..., revision: int = ...) -> None: ...

class RangeResponse(_Message):
    header: ResponseHeader
    kvs: Sequence[kv_pb2.KeyValue]
    more: bool

class PutRequest(_Message):
    def __init__(self, *, key: bytes, value: bytes, lease: int = ...) -> None: ...

class DeleteRangeRequest(_Message):
    def __init__(self, *, key: bytes) -> None: ...

class RequestOp(_Message):
    def __init__(self, *, request_put: PutRequest = ..., request_delete_range: DeleteRangeRequest = ...) -> None: ...

class TxnRequest(_Message):
    def __init__(self, *, compare: Iterable[Compare], success: Iterable[RequestOp]) -> None: ...

class TxnResponse(_Message):
    header: ResponseHeader
    succeeded: bool

class LeaseGrantRequest(_Message):
    def __init__(self, *, TTL: int) -> None: ...

class LeaseRevokeRequest(_Message):
    def __init__(self, *, ID: int) -> None: ...

class LeaseKeepAliveRequest(_Message):
    def __init__(self, *, ID: int) -> None: ...

class LeaseKeepAliveResponse(_Message):
    ID: int
    TTL: int

class WatchCreateRequest(_Message):
    def __init__(self, *, key: bytes, range_end: bytes, start_revision: int, progress_notify: bool) -> None: ...

class WatchCancelRequest(_Message):
    def __init__(self, *, watch_id: int) -> None: ...

class WatchRequest(_Message):
    def __init__(
        self, *, create_request: WatchCreateRequest = ..., cancel_request: WatchCancelRequest = ...
    ) -> None: ...

class WatchResponse(_Message):
    header: ResponseHeader
    watch_id: int
    created: bool
    canceled: bool
    compact_revision: int
    cancel_reason: str
    events: Sequence[kv_pb2.Event]

class KVStub:
    def __init__(self, channel: grpc.Channel) -> None: ...
    Range: _Unary
    Txn: _Unary

class LeaseStub:
    def __init__(self, channel: grpc.Channel) -> None: ...
    LeaseGrant: _Unary
    LeaseRevoke: _Unary
    LeaseKeepAlive: _Stream[LeaseKeepAliveRequest, LeaseKeepAliveResponse]

class WatchStub:
    def __init__(self, channel: grpc.Channel) -> None: ...
    Watch: _Stream[WatchRequest, WatchResponse]

class AuthEnableRequest(_Message):
    def __init__(self) -> None: ...

class AuthenticateRequest(_Message):
    def __init__(self, *, name: str) -> None: ...

class AuthUserListRequest(_Message):
    def __init__(self) -> None: ...

class AuthUserGetRequest(_Message):
    def __init__(self, *, name: str) -> None: ...

class AuthUserAddRequest(_Message):
    def __init__(self, *, name: str) -> None: ...

class AuthUserDeleteRequest(_Message):
    def __init__(self, *, name: str) -> None: ...

class AuthUserGrantRoleRequest(_Message):
    def __init__(self, *, user: str, role: str) -> None: ...

class AuthUserRevokeRoleRequest(_Message):
    def __init__(self, *, name: str, role: str) -> None: ...

class AuthRoleListRequest(_Message):
    def __init__(self) -> None: ...

class AuthRoleGetRequest(_Message):
    def __init__(self, *, role: str) -> None: ...

class AuthRoleAddRequest(_Message):
    def __init__(self, *, name: str) -> None: ...

class AuthRoleDeleteRequest(_Message):
    def __init__(self, *, role: str) -> None: ...

class AuthRoleGrantPermissionRequest(_Message):
    def __init__(self, *, name: str, perm: auth_pb2.Permission) -> None: ...

class AuthRoleRevokePermissionRequest(_Message):
    def __init__(self, *, role: str, key: str, range_end: str) -> None: ...

class AuthStub:
    def __init__(self, channel: grpc.Channel) -> None: ...
