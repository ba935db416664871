from typing import ClassVar

class _PermissionType:
    @staticmethod
    def Value(name: str) -> int: ...

class Permission:
    Type: ClassVar[_PermissionType]
    READ: ClassVar[int]
    WRITE: ClassVar[int]
    READWRITE: ClassVar[int]
    permType: int
    key: bytes
    range_end: bytes
    def __init__(self, *, permType: int, key: bytes, range_end: bytes) -> None: ...
