"""Who of two peers shakes hands first."""

from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from agent.handshakes import PATIENCE_S, Handshakes, Turn
from agent.observed import ObservedPeer
from hivewire.ids import TaskId
from hivewire.keys import PublicKey

TASK = TaskId("web.1")
SMALL, MIDDLE, LARGE = (PublicKey(bytes([n]) * 32) for n in (1, 2, 3))


def there(*keys: PublicKey, handshake: float | None = None) -> Mapping[PublicKey, ObservedPeer]:
    return {key: ObservedPeer(key, None, frozenset(), last_handshake=handshake) for key in keys}


def test_a_task_that_nobody_can_know_is_quiet() -> None:
    """Before its claim a task adds all peers without a handshake, and waits for nobody."""
    handshakes = Handshakes()
    assert handshakes.turn(TASK, None, {SMALL, LARGE}, {}, 0) == Turn(quiet=frozenset({SMALL, LARGE}))
    assert handshakes.wait_s(TASK, 0) is None


def test_the_smaller_key_begins() -> None:
    """Of the new peers only those with a smaller key are left to begin."""
    handshakes = Handshakes()
    assert handshakes.turn(TASK, MIDDLE, {SMALL, LARGE}, {}, 10) == Turn(quiet=frozenset({SMALL}))
    assert handshakes.wait_s(TASK, 10) == PATIENCE_S


def test_the_larger_key_begins_when_nothing_came() -> None:
    """After a moment without a handshake the patient side begins, once."""
    handshakes = Handshakes()
    handshakes.turn(TASK, MIDDLE, {SMALL}, {}, 10)
    assert handshakes.turn(TASK, MIDDLE, {SMALL}, there(SMALL), 10 + PATIENCE_S / 2) == Turn()
    late = 10 + PATIENCE_S
    assert handshakes.turn(TASK, MIDDLE, {SMALL}, there(SMALL), late) == Turn(initiate=frozenset({SMALL}))
    assert handshakes.turn(TASK, MIDDLE, {SMALL}, there(SMALL), late + 1) == Turn()
    assert handshakes.wait_s(TASK, late + 1) is None


def test_a_handshake_that_came_ends_the_wait() -> None:
    """Where the other side began in time nothing more is done."""
    handshakes = Handshakes()
    handshakes.turn(TASK, MIDDLE, {SMALL}, {}, 10)
    assert handshakes.turn(TASK, MIDDLE, {SMALL}, there(SMALL, handshake=1.0), 11) == Turn()
    assert handshakes.wait_s(TASK, 11) is None


def test_a_peer_that_goes_is_not_waited_for() -> None:
    """A peer that is no longer wanted, and a task that is gone, leave nothing behind."""
    handshakes = Handshakes()
    handshakes.turn(TASK, LARGE, {SMALL, MIDDLE}, {}, 10)
    handshakes.turn(TASK, LARGE, {MIDDLE}, there(SMALL, MIDDLE), 10)
    assert handshakes.turn(TASK, LARGE, {MIDDLE}, there(MIDDLE), 11) == Turn(initiate=frozenset({MIDDLE}))
    handshakes.turn(TASK, LARGE, {SMALL}, {}, 12)
    handshakes.forget(TASK)
    assert handshakes.wait_s(TASK, 12) is None


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
def test_of_two_that_meet_exactly_one_begins(one: bytes, other: bytes) -> None:
    """Two tasks that add each other at the same moment never both begin, and never both wait."""
    if one != other:
        a, b = PublicKey(one), PublicKey(other)
        quiet = [bool(Handshakes().turn(TASK, own, {peer}, {}, 0).quiet) for own, peer in ((a, b), (b, a))]
        assert sorted(quiet) == [False, True]
