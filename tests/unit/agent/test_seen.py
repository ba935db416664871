"""What this node remembers of generations, and for how long."""

from pathlib import Path

import pytest

import agent.seen as seen_module
from agent.seen import GONE_S, Seen
from tests.fakes.clock import FakeClock

NOW = 1_700_000_000.0


def test_older_is_refused(tmp_path: Path) -> None:
    """A generation below the last one seen is, the same one is not; also by the next agent of the node."""
    path = tmp_path / "state" / "seen.sqlite"
    seen = Seen(path)
    assert not seen.is_known("k")
    seen.note("k", 5)
    for each in (seen, Seen(path)):
        assert each.is_known("k")
        assert each.refuses("k", 4)
        assert not each.refuses("k", 5)
        assert not each.refuses("k", 6)
        assert not each.refuses("other", 1)


def test_deleted_does_not_come_back_as_it_was(tmp_path: Path) -> None:
    """For an hour, by when a manager has seen to it; what is older never does."""
    clock, path = FakeClock(NOW), tmp_path / "seen.sqlite"
    seen = Seen(path, clock)
    seen.note("k", 5)
    seen.gone("k")
    seen.gone("never there")
    assert Seen(path, clock).refuses("k", 5)
    assert not seen.refuses("k", 6)
    clock.advance(GONE_S)
    assert not seen.refuses("k", 5)
    assert seen.refuses("k", 4)


def test_values_are_kept_until_deleted(tmp_path: Path) -> None:
    """Records that count until a newer one says otherwise are there after a restart."""
    path = tmp_path / "seen.sqlite"
    seen = Seen(path)
    seen.note("q", 1, b"value")
    seen.note("p", 1)
    assert Seen(path).values() == {"q": b"value"}
    seen.gone("q")
    assert Seen(path).values() == {}


def test_a_broken_file_is_no_end(tmp_path: Path) -> None:
    """The agent starts all the same, and remembers for as long as it runs."""
    path = tmp_path / "seen.sqlite"
    path.write_bytes(b"no database" * 100)
    seen = Seen(path)
    seen.note("k", 5)
    assert seen.refuses("k", 4)


def test_memory_has_an_end(tmp_path: Path) -> None:
    """What was deleted long ago is forgotten, on the node too; what is there, and what went just now, is not."""
    clock, path = FakeClock(NOW), tmp_path / "seen.sqlite"
    seen = Seen(path, clock)
    for key in ("old", "new", "there"):
        seen.note(key, 5)
    seen.gone("old")
    clock.advance(GONE_S)
    seen.gone("new")
    seen.expire()
    for each in (seen, Seen(path, clock)):
        assert [each.is_known(key) for key in ("old", "new", "there")] == [False, True, True]


def test_only_so_many_deletions_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last ones, on the node too; what is there stays."""
    monkeypatch.setattr(seen_module, "MOST_GONE", 3)
    clock = FakeClock()
    seen = Seen(tmp_path / "seen.sqlite", now=clock)
    seen.note("there", 1)
    for number in range(6):
        seen.note(f"k{number}", 10)
        seen.gone(f"k{number}")
        clock.advance(1)
    seen.expire()
    for again in (seen, Seen(tmp_path / "seen.sqlite", now=clock)):
        assert [again.refuses(f"k{number}", 10) for number in range(6)] == [False] * 3 + [True] * 3
        assert again.is_known("there")
