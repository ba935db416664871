"""Debian 13 roots in the cache: one as base image, one to run the newer engine in."""

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from lab import packages
from lab.command import CLEAN_ENVIRONMENT, run
from lab.progress import Progress
from lab.settings import Settings

SUITE = "trixie"
ENGINE = (
    *("docker.io", "docker-cli", "iptables", "nftables", "iproute2", "kmod", "mount", "hostname", "procps", "tini"),
    *("ca-certificates", "iputils-ping", "tcpdump", "wireguard-go", "wireguard-tools", "pigz", "python3-minimal"),
)

# Runs in a mount and process-id namespace of its own, so nothing stays mounted when it is killed.
INSTALL = """
set -eu
root=$1; shift
mount -t proc proc "$root/proc"
cp -L /etc/resolv.conf "$root/etc/resolv.conf"
printf '#!/bin/sh\\nexit 101\\n' >"$root/usr/sbin/policy-rc.d"; chmod 755 "$root/usr/sbin/policy-rc.d"
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
chroot "$root" apt-get update
chroot "$root" apt-get install -y --no-install-recommends "$@"
chroot "$root" apt-get clean
rm -rf "$root"/var/lib/apt/lists/* "$root"/usr/share/doc/* "$root"/usr/share/man/* "$root"/usr/share/locale/*
rm -rf "$root"/var/cache/debconf/*-old "$root"/var/cache/ldconfig/* "$root"/var/log/*.log
rm -f "$root/usr/sbin/policy-rc.d" "$root/etc/resolv.conf" "$root/etc/hostname"
"""


def ensure(purpose: str, contents: Sequence[str], settings: Settings, progress: Progress) -> Path:
    """Return the cached root with these packages, made now if it does not exist.

    Raises CommandFailed when debootstrap or apt fails, for example without a network.
    """
    digest = hashlib.sha256(" ".join(sorted(contents)).encode()).hexdigest()[:12]
    root = settings.cache / "roots" / f"{SUITE}-{purpose}-{digest}"
    if root.is_dir():
        return root
    base = minimal(settings, progress)
    with progress.step(f"installing {len(contents)} packages into the {SUITE} {purpose} root (once)"):
        partial = copy_of(base, _fresh(root))
        run(*_private("sh", "-c", INSTALL, "sh", str(partial), *contents), timeout_s=1800)
        partial.rename(root)
    return root


def copy_of(root: Path, target: Path) -> Path:
    """Copy a root and return the copy."""
    run("cp", "-a", "--reflink=auto", str(root), str(target), timeout_s=300)
    return target


def run_inside(root: Path, *argv: str) -> None:
    """Run a program with `root` as its root; raises CommandFailed."""
    run(*_private("chroot", str(root), *argv), timeout_s=900, env=CLEAN_ENVIRONMENT)


def minimal(settings: Settings, progress: Progress) -> Path:
    """Return the cached root that has only what is essential, made now if it does not exist; raises as `ensure`."""
    root = settings.cache / "roots" / f"{SUITE}-minbase"
    if root.is_dir():
        return root
    packages.ensure(packages.ROOTS, progress)
    with progress.step(f"debootstrap of {SUITE} (once)"):
        partial = _fresh(root)
        mirror = (settings.mirror,) if settings.mirror else ()
        argv = ("debootstrap", "--variant=minbase", SUITE, str(partial), *mirror)
        run(*_private(*argv), timeout_s=1800)
        partial.rename(root)
    return root


def _private(*argv: str) -> tuple[str, ...]:
    return ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", *argv)


def _fresh(root: Path) -> Path:
    """Name the folder to build in: a root that was cut off half-way must never be taken for whole."""
    partial = root.with_name(root.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    os.makedirs(root.parent, exist_ok=True)
    return partial
