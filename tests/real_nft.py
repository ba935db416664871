"""The real nft as a judge of rule texts: it checks them against the kernel, in a network namespace of its own."""

import os
import shutil
import subprocess

import pytest


def nft(text: str) -> subprocess.CompletedProcess[str]:
    """Let nft check the text; it changes nothing."""
    return subprocess.run(
        ["unshare", "-n", "nft", "-c", "-f", "-"], input=text, text=True, capture_output=True, timeout=60, check=False
    )


def need_nft(family: str) -> None:
    """Skip, with the reason, where rules of this family cannot be checked."""
    if os.geteuid() != 0:
        reason = "nft checks rules against the kernel as root only"
    elif shutil.which("nft") is None or shutil.which("unshare") is None:
        reason = "nft or unshare is missing"
    elif (tried := nft(f"table {family} probe {{ }}\n")).returncode != 0:
        reason = f"this kernel takes no nftables rules of family {family}: {tried.stderr.strip()}"
    else:
        return
    pytest.skip(reason)
