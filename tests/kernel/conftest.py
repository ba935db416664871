"""What only a kernel with WireGuard, IPVS and IPsec can show. `make kernel` runs it in a virtual machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

NEEDED = ("wireguard", "ip_vs", "esp4", "vxlan")
GUEST = Path("/run/vm")
"""In the virtual machine only (deploy/vm/inside), which is made to have all of them: nothing may be skipped there."""


@pytest.fixture(scope="session", autouse=True)
def machine() -> None:
    """Say why nothing of this can run here, where it cannot."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("these tests make network namespaces: run them as root on Linux")
    dry = subprocess.run(("modprobe", "--dry-run", "--quiet", "--all", *NEEDED), check=False)
    if dry.returncode != 0:
        give_up = pytest.fail if GUEST.is_dir() else pytest.skip
        give_up(f"this kernel has not all of {', '.join(NEEDED)}: make kernel runs these tests on one that has")
