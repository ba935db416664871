"""Which end-to-end tests run on which engine, and in what order; the lab itself is in tests/lab_mesh.py."""

import os
import sys

import pytest

_ONE_ENGINE = {
    "test_access",
    "test_api",
    "test_denials",
    "test_matrix",
    "test_modes",
    "test_secrets",
    "test_storm",
    "test_streams",
    "test_why_quarantine",
}


@pytest.fixture(scope="session", autouse=True)
def machine() -> None:
    """Say why the whole tier cannot run here, where it cannot."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("end-to-end tests make network namespaces: run them as root on Linux")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the lab itself first, and leave out what tells the same on both engines.

    The lab's tests start and end labs, and there is only one on a machine. What the engine has no part in runs on one.
    """
    items[:] = [item for item in items if not (item.path.stem in _ONE_ENGINE and "trixie" in item.name)]
    items.sort(key=lambda item: "test_lab" not in item.nodeid)
