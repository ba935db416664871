"""Where the lab keeps its things, and the numbers of its networks."""

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

PREFIX = "hwlab-"  # of every namespace, so that nothing else on the machine is mistaken for ours
UNDERLAY = PREFIX + "und"
BRIDGE = "br0"
NETWORK = ipaddress.ip_network("10.77.0.0/24")
REGISTRY_ADDRESS = ipaddress.ip_address("10.77.0.254")
REGISTRY = f"{REGISTRY_ADDRESS}:5000"
CGROUP = "hivewire-lab"
LOCK = Path("/run/hivewire-lab.lock")  # not configurable: the namespaces' names are global too
MAX_NODES = 100
ENGINES = ("host", "trixie")
PROJECT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Settings:
    """Folders of the lab."""

    state: Path  # what lives as long as the lab: pids, sockets, logs
    cache: Path  # what is worth keeping: Debian roots, wheels, the registry's blobs
    data: Path  # /var/lib/docker of each node, emptied on every run
    mirror: str  # Debian mirror for the roots; empty: the one that debootstrap takes by itself
    seed: Path | None = None  # images to begin with, as `lab prepare` made them; see seed.py

    @property
    def registry(self) -> Path:
        """The registry's store: with a seed, the one that belongs to it."""
        return (self.seed or self.cache) / "registry"

    @classmethod
    def from_environment(cls) -> "Settings":
        """Read HIVEWIRE_LAB_STATE, HIVEWIRE_CACHE, HIVEWIRE_LAB_DATA, HIVEWIRE_LAB_SEED, HIVEWIRE_DEBIAN_MIRROR."""
        seed = os.environ.get("HIVEWIRE_LAB_SEED")
        cache = Path(os.environ.get("HIVEWIRE_CACHE") or "/var/cache/hivewire").resolve()
        return cls(
            state=Path(os.environ.get("HIVEWIRE_LAB_STATE") or "/run/hivewire-lab").resolve(),
            cache=cache,
            data=Path(os.environ.get("HIVEWIRE_LAB_DATA") or cache / "engines").resolve(),
            mirror=os.environ.get("HIVEWIRE_DEBIAN_MIRROR", ""),
            seed=Path(seed).resolve() if seed else None,
        )
