"""The real nft: as a judge of rule texts, and to put them in force in a namespace as the agent does."""

import contextlib
import os
import shutil
import subprocess

import pytest

from agent.kernel import nftables
from agent.kernel.api import Namespace
from agent.kernel.namespace import run_in
from agent.kernel.rtnetlink import NETLINK_NETFILTER, Calls, Netlink


def put(namespace: Namespace, text: str) -> None:
    """Put the table that the text declares in force in the namespace."""
    with contextlib.closing(run_in(namespace, lambda: Netlink(NETLINK_NETFILTER, Calls()))) as netlink:
        nftables.replace(netlink, lambda transaction: run_in(namespace, lambda: nftables.apply(transaction)), text)


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
