"""A real Docker Swarm on one machine: one engine per node, each in namespaces of its own.

Put `deploy/` on `sys.path` and write `from lab import Lab`. Standard library only, because the lab
must run before any virtual environment exists.

What it is not: it measures ratios rather than speeds, and its nodes share one kernel, so a node
cannot have kernel modules or a clock of its own.
"""

from lab.errors import CommandFailed, LabError
from lab.images import Images
from lab.lab import Lab, NodeStatus
from lab.node import Node
from lab.settings import Settings

__all__ = ["CommandFailed", "Images", "Lab", "LabError", "Node", "NodeStatus", "Settings"]
