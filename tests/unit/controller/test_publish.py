"""The writes between two states of the store."""

import pytest

from controller.publish import Write, difference, transactions
from hivewire.records import MeshRecord, Record
from hivewire.store.api import MAX_TXN_OPS

A, B = MeshRecord(mesh="a"), MeshRecord(mesh="b")


def test_equal_states_need_no_write() -> None:
    """The second run of anything writes nothing."""
    assert difference({"k1": A, "k2": B}, {"k2": B, "k1": A}) == ()
    assert difference({}, {}) == ()


def test_only_what_differs_is_written() -> None:
    """New and changed records are put, undesired and unreadable ones go, in the order of the keys."""
    desired: dict[str, Record] = {"k4": A, "k1": A, "k3": B, "k5": A}
    stored = {"k3": A, "k2": A, "k0": None, "k4": A, "k5": None}
    assert difference(desired, stored) == (
        Write("k0"),
        Write("k1", A),
        Write("k2"),
        Write("k3", B),
        Write("k5", A),
    )


@pytest.mark.parametrize(
    ("count", "sizes"),
    [
        (0, []),
        (1, [1]),
        (MAX_TXN_OPS, [MAX_TXN_OPS]),
        (MAX_TXN_OPS + 1, [MAX_TXN_OPS, 1]),
        (3 * MAX_TXN_OPS, [MAX_TXN_OPS] * 3),
    ],
)
def test_transactions_are_as_large_as_the_store_takes(count: int, sizes: list[int]) -> None:
    """Every write is in exactly one transaction, in order, and none is larger than the store allows."""
    writes = [Write(f"k{i:04}") for i in range(count)]
    parts = list(transactions(writes))
    assert [len(part) for part in parts] == sizes
    assert [op for part in parts for op in part] == writes
