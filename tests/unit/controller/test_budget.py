"""How much one payer may cause at once."""

from controller.budget import Budget
from tests.fakes.clock import FakeClock


def test_a_payer_has_a_burst_and_then_a_rate() -> None:
    """Beyond the burst it waits for what comes back each second; others are not touched."""
    clock = FakeClock()
    budget = Budget(burst=10, per_s=2.0, monotonic=clock)
    assert budget.spend("a", 10)
    assert not budget.spend("a", 1)
    assert budget.spend("b", 10)
    clock.advance(0.5)
    assert budget.spend("a", 1)
    assert not budget.spend("a", 1)
    clock.advance(3600)
    assert budget.spend("a", 10)
    assert not budget.spend("a", 1)


def test_asking_for_too_much_costs_what_there_is() -> None:
    """Who floods has nothing left afterwards."""
    clock = FakeClock()
    budget = Budget(burst=10, per_s=2.0, monotonic=clock)
    assert not budget.spend("a", 1000)
    assert not budget.spend("a", 1)


def test_payers_in_memory_are_limited() -> None:
    """Any number of names does not fill the memory."""
    budget = Budget(burst=1, per_s=1.0, monotonic=FakeClock())
    for number in range(20_000):
        budget.spend(number, 1)
    assert len(budget._left) == 10_000
