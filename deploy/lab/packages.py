"""Debian packages that the lab needs on the machine itself."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lab.command import run
from lab.errors import LabError
from lab.progress import Progress

LAB = ("docker.io", "docker-registry", "iproute2", "iptables", "nftables", "tcpdump", "tini", "pigz", "kmod")
ROOTS = ("debootstrap", "debian-archive-keyring")
POLICY = Path("/usr/sbin/policy-rc.d")


def ensure(packages: Sequence[str], progress: Progress) -> None:
    """Install those of `packages` that are missing, without starting a service.

    Raises LabError on a machine without apt.
    """
    missing = [name for name in packages if not _is_installed(name)]
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise LabError(f"the lab needs {', '.join(missing)}, and this machine has no apt-get to install them")
    env = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    install = ("apt-get", "install", "-y", "--no-install-recommends", *missing)
    with progress.step(f"installing {', '.join(missing)}"), _no_services():
        if run(*install, check=False, timeout_s=900, env=env).returncode != 0:
            run("apt-get", "update", timeout_s=300, env=env)  # the lists may be missing or old
            run(*install, timeout_s=900, env=env)


def _is_installed(name: str) -> bool:
    shown = run("dpkg-query", "-W", "-f", "${db:Status-Status}", name, check=False)
    return shown.returncode == 0 and shown.stdout == "installed"


@contextmanager
def _no_services() -> Iterator[None]:
    """Keep packages from starting their service: a second engine or registry is not wanted here."""
    if POLICY.exists():
        yield
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink(missing_ok=True)
