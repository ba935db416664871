"""The lab of the end-to-end tests, on one engine: what takes its time, because a Swarm takes it."""

import pytest

from tests.e2e.conftest import machine

__all__ = ["machine"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Certificates and backups are the same whatever engine runs."""
    items[:] = [item for item in items if "trixie" not in item.name]
