"""Who may go on in clear for a moment, and for how long."""

import pytest

from agent.grace import KNOWN_S, LONGEST_S, SETTLE_S, Grace
from hivewire.ids import ContainerId
from tests.fakes.clock import FakeClock

ONE = ContainerId("one")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def grace(clock: FakeClock) -> Grace:
    found = Grace(clock)
    found.seen_in_clear(ONE)
    clock.advance(KNOWN_S)
    found.seen_in_clear(ONE)
    return found


def test_who_left_the_mesh_has_it_anew(grace: Grace, clock: FakeClock) -> None:
    """And seeing that again and again does not put it off."""
    assert grace.holds(ONE)
    grace.left(ONE)
    for _ in range(4):
        clock.advance(KNOWN_S / 4)
        grace.left(ONE)
    assert grace.holds(ONE)


def test_nobody_has_it_who_was_not_in_clear(grace: Grace) -> None:
    """Asking gives it to nobody."""
    assert not grace.holds(ContainerId("other"))


def test_a_new_task_whose_policy_is_late_has_none(clock: FakeClock) -> None:
    """The first moments of a service that is deployed with its labels are no life in clear."""
    grace = Grace(clock)
    grace.seen_in_clear(ONE)
    clock.advance(KNOWN_S / 2)
    assert not grace.holds(ONE)
    clock.advance(KNOWN_S)
    assert not grace.holds(ONE)


def test_it_ends_when_all_has_moved_for_a_while(grace: Grace, clock: FakeClock) -> None:
    """A connection that shows in between begins the while again."""
    assert grace.holds(ONE)
    grace.look(ONE, moved=True)
    clock.advance(SETTLE_S / 2)
    grace.look(ONE, moved=False)
    clock.advance(SETTLE_S)
    grace.look(ONE, moved=True)
    assert grace.holds(ONE)
    clock.advance(SETTLE_S)
    grace.look(ONE, moved=True)
    assert not grace.holds(ONE)
    grace.look(ONE, moved=False)
    assert not grace.holds(ONE)


def test_it_ends_from_the_first_question_on(grace: Grace, clock: FakeClock) -> None:
    """Whoever asks, agent or guard, and whatever is still in clear."""
    clock.advance(LONGEST_S * 9)
    assert grace.holds(ONE)
    clock.advance(LONGEST_S)
    assert not grace.holds(ONE)


def test_it_is_given_once(grace: Grace, clock: FakeClock) -> None:
    """Records that vanish and come back, as whoever owns etcd can make them, win no time."""
    assert grace.holds(ONE)
    clock.advance(LONGEST_S)
    grace.seen_in_clear(ONE)
    assert not grace.holds(ONE)
    grace.forget(ONE)
    assert not grace.holds(ONE)
