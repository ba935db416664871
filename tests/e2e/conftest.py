"""A lab with Hivewire and the demo in it, once per engine; all tests of an engine share it."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "deploy"))

from lab.lab import Lab
from lab.progress import Progress
from proof.deployed import Deployed

ENGINES = ("host", "trixie")
"""Docker 20.10 of Debian 12 and 26.1 of Debian 13."""

_ONE_ENGINE = {
    "test_access",
    "test_api",
    "test_attack",
    "test_denials",
    "test_matrix",
    "test_modes",
    "test_secrets",
    "test_storm",
    "test_why_quarantine",
}

_OWNED = "end-to-end-tests"


@pytest.fixture(scope="session", autouse=True)
def machine() -> None:
    """Say why the whole tier cannot run here, where it cannot."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("end-to-end tests make network namespaces: run them as root on Linux")


@pytest.fixture(scope="session", params=ENGINES)
def mesh(request: pytest.FixtureRequest) -> Iterator[Deployed]:
    """Hivewire and the demo, ready. A lab that somebody else started is left alone."""
    lab = Lab(progress=Progress())
    if lab.is_up:
        if not (lab.settings.state / _OWNED).exists():
            pytest.fail("a lab is up that these tests did not start; end it with: make demo-down")
        lab.down()
    lab.up(engine=request.param)
    try:
        (lab.settings.state / _OWNED).touch()
        images = lab.ensure_images()
        deployed = Deployed(lab)
        deployed.deploy(images)
        deployed.deploy_demo(images)
        deployed.wait_ready(180)
        yield deployed
    finally:
        lab.down()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the lab itself first, and leave out what tells the same on both engines.

    The lab's tests start and end labs, and there is only one on a machine. What the engine has no part in runs on one.
    """
    items[:] = [item for item in items if not (item.path.stem in _ONE_ENGINE and "trixie" in item.name)]
    items.sort(key=lambda item: "test_lab" not in item.nodeid)
