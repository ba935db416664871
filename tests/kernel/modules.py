"""The kernel's modules, now and before any test of this run."""

from pathlib import Path


def loaded() -> frozenset[str]:
    """Name the modules that are loaded; none where the kernel has no modules at all."""
    try:
        lines = Path("/proc/modules").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(line.split()[0] for line in lines)


LOADED_BEFORE = loaded()
"""Read when tests are collected, and so before any agent."""
