"""The fixture that end-to-end tests share, wherever they stand: a lab with Hivewire and the demo in it."""

from collections.abc import Iterator

import pytest
from lab.lab import Lab
from lab.progress import Progress
from proof.deployed import Deployed

ENGINES = ("host", "trixie")
"""Docker 20.10 of Debian 12 and 26.1 of Debian 13."""

_OWNED = "end-to-end-tests"


@pytest.fixture(scope="session", params=ENGINES)
def mesh(request: pytest.FixtureRequest) -> Iterator[Deployed]:
    """Hivewire and the demo, ready, once per engine. A lab that somebody else started is left alone."""
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
