"""Leaves what takes kernel WireGuard to `make kernel` where this machine's kernel has none, and says so."""

import os
from typing import Final

import pytest

from agent.kernel import netlink
from agent.kernel.rtnetlink import Calls

_FIXTURES: Final = ("bench", "real", "world", "backend")
"""Those that take a backend as their parameter."""
_LEFT: Final = pytest.StashKey[int]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left = [item for item in items if _backend(item) == "kernel"]
    if left and os.geteuid() == 0 and not netlink.is_offered(Calls()):
        items[:] = [item for item in items if _backend(item) != "kernel"]
        config.hook.pytest_deselected(items=left)
        config.stash[_LEFT] = len(left)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if left := config.stash.get(_LEFT, 0):
        terminalreporter.line(f"{left} tests take kernel WireGuard, which this kernel lacks: make kernel runs them")


def _backend(item: pytest.Item) -> object:
    """What its fixture is to use, where there is a choice."""
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return next((parameters[name] for name in _FIXTURES if name in parameters), None)
