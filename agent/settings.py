"""The agent's settings."""

from pathlib import Path

from pydantic import Field, ValidationInfo, field_validator

from agent.kernel.selection import Choice
from hivewire.settings import CommonSettings


class AgentSettings(CommonSettings):
    underlay_address: str = ""
    """Where other nodes reach this one; empty: the address that the node joined the Swarm with."""
    backend: Choice = "auto"
    first_port: int = Field(51820, ge=1, le=65535)
    last_port: int = Field(52819, ge=1, le=65535)
    """Range of UDP ports, one per task. Open it between the nodes in every firewall."""
    report_port: int = Field(9481, ge=1, le=65535)
    namespaces: Path = Path("/var/run/docker/netns")
    """Where the engine keeps its network namespaces, bound with propagation rslave."""
    state_folder: Path = Path("/var/lib/hivewire")
    """What the agent remembers over restarts: generations of records, no secret."""
    workers: int = Field(2, ge=1, le=64)
    resync_s: float = Field(60.0, gt=0)

    @field_validator("last_port")
    @classmethod
    def _not_below_first(cls, last: int, info: ValidationInfo) -> int:
        first = info.data.get("first_port", 1)
        if last < first:
            raise ValueError(f"{last} is below HIVEWIRE_FIRST_PORT, which is {first}")
        return last
