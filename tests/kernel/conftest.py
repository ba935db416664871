"""What only a kernel with WireGuard, IPVS and IPsec can show. `make kernel-lab` runs it in a virtual machine."""

import os
import subprocess
import sys

import pytest

NEEDED = ("wireguard", "ip_vs", "esp4", "vxlan")


@pytest.fixture(scope="session", autouse=True)
def machine() -> None:
    """Say why nothing of this can run here, where it cannot."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("these tests make network namespaces: run them as root on Linux")
    dry = subprocess.run(("modprobe", "--dry-run", "--quiet", "--all", *NEEDED), check=False)
    if dry.returncode != 0:
        pytest.skip(f"this kernel has not all of {', '.join(NEEDED)}: make kernel-lab runs these tests on one that has")
