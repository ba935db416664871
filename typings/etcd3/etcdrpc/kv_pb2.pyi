from typing import ClassVar

class KeyValue:
    key: bytes
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: int

class Event:
    PUT: ClassVar[int]
    DELETE: ClassVar[int]
    type: int
    kv: KeyValue
