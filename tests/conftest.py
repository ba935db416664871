"""What all tests share: one Hypothesis profile, so that a run on a slow machine finds the same as one on a fast one;
the time that they may take there; the lab of the end-to-end tests; and that nothing is skipped where all can run.
"""

import os
from collections.abc import Generator

import pytest
from hypothesis import settings
from lab.patience import FACTOR, patient

pytest_plugins = ("tests.lab_mesh",)

ALL_CAN_RUN = os.environ.get("HIVEWIRE_TEST_SKIPS") == "fail"
"""Said of a machine that has what all tests need: what is skipped there has lost something that was proven before."""

settings.register_profile("hivewire", deadline=None, print_blob=True)
settings.load_profile("hivewire")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give each test its time, multiplied where the environment asks for patience."""
    if FACTOR == 1:
        return
    for item in items:
        marker = item.get_closest_marker("timeout")
        limit_s = float(marker.args[0] if marker else config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(patient(limit_s)), append=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if ALL_CAN_RUN and report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"nothing may be skipped on this machine: {reason}"
    return report
