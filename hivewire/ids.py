"""Identifiers, as Swarm gives them. Each is a type of its own so that they cannot be mixed up."""

from typing import NewType

NodeId = NewType("NodeId", str)
ServiceId = NewType("ServiceId", str)
TaskId = NewType("TaskId", str)
NetworkId = NewType("NetworkId", str)
ContainerId = NewType("ContainerId", str)
