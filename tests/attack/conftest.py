"""The lab of the end-to-end tests, on one engine, and the table of everything that was tried."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attack.ledger import Ledger
from tests.e2e.conftest import machine

__all__ = ["machine"]

_LEDGER = Ledger()
_TABLE = Path(__file__).resolve().parents[2] / "build" / "attack" / "attempts.json"


@pytest.fixture(scope="session")
def ledger() -> Iterator[Ledger]:
    return _LEDGER


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The store and the records are the same whatever engine runs; and what needs no lab goes first."""
    items[:] = [item for item in items if "trixie" not in item.name]
    items.sort(key=lambda item: item.get_closest_marker("e2e") is not None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _LEDGER.attempts or _LEDGER.figures:
        terminalreporter.section("attempts")
        for line in _LEDGER.lines():
            terminalreporter.write_line(line)
        _LEDGER.write(_TABLE)
