"""What a machine must have for tests that make namespaces, and why they cannot run where it has not."""

import os
import shutil
from typing import Final

import pytest

_TOOLS: Final = ("ip", "nft", "unshare", "nsenter", "setpriv")


def missing(*more: str) -> str:
    """Why no namespaces can be made and filled here, or these further programs not run; empty: all is there."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    tools = [tool for tool in (*_TOOLS, *more) if shutil.which(tool) is None]
    return f"not installed: {', '.join(tools)}" if tools else ""


def need_namespaces() -> None:
    """Skip, with the reason, where there are none to be had."""
    if reason := missing():
        pytest.skip(reason)
