"""Signatures for tests of what lies behind them: a record's bytes are the record, and everybody is believed."""

import itertools
from collections import Counter
from datetime import UTC, datetime
from typing import Any, TypeVar

from hivewire.errors import UnverifiedRecord
from hivewire.ids import NodeId
from hivewire.records import Record, decode, encode, writer_of
from hivewire.signed import Signed, Signer

R = TypeVar("R", bound=Record)

# The bytes have none, so whatever is read counts as written just now.
_GENERATIONS = itertools.count(1)
_NOBODY = Signer(NodeId(""), "", "", datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC))


class Unsigned:
    def __init__(self) -> None:
        self.refused: Counter[str] = Counter()
        self.knows_managers = True
        """False: the engine has not heard yet that the signer of all that only managers write is one."""

    def sign(self, record: Record) -> bytes:
        return encode(record)

    def verify(self, kind: type[R], key: str, data: bytes) -> Signed[R]:
        if writer_of(key) is None and not self.knows_managers:
            raise UnverifiedRecord("role", "no manager yet", may_pass=True)
        return Signed(decode(kind, data), next(_GENERATIONS), _NOBODY)

    def is_worn(self, signed: Signed[Any]) -> bool:
        return False

    @property
    def reached(self) -> int:
        return 0

    def outrun(self, generation: int) -> None:
        raise AssertionError("nobody has seen a generation: there are none")
