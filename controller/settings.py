"""The controller's settings."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from controller.api.auth import MetricsAuth
from hivewire.errors import InvalidSettings
from hivewire.records import Mode
from hivewire.settings import CommonSettings


class ControllerSettings(CommonSettings):
    mode: Mode = Mode.ENFORCE
    """Of services that have no ``hivewire.mode`` label."""
    api_host: str = "127.0.0.1"
    """Where the API listens: an address, or the path of a unix socket. Off loopback it speaks TLS."""
    api_port: int = Field(9480, ge=1, le=65535)
    api_cert: Path | None = None
    """Certificate with its chain, and key, of the API where it speaks TLS; empty: the node's Swarm certificate."""
    api_key: Path | None = None
    api_socket: Path = Path("/run/hivewire/api.sock")
    """Where the commands in the container find the API while it speaks TLS."""
    metrics_auth: MetricsAuth = MetricsAuth.AUTO
    """Whether ``/metrics`` takes a token: ``auto`` from other machines, ``always``, ``never``."""
    token_file: Path | None = None
    """Tokens of the API; empty: the Docker secret, else one made at the first start."""
    state_folder: Path = Path("/var/lib/hivewire")
    resync_s: float = Field(30.0, gt=0)
    etcd_access: Literal["managed", "external"] | None = None
    """Who says what each node may do in etcd: this controller, or the operator of an existing cluster."""

    @property
    def manages_access(self) -> bool:
        """Raises InvalidSettings where nobody said whose etcd it is: turning access control on shuts out others."""
        if self.etcd_access is None and (self.etcd_endpoints or self.etcd_cert):
            raise InvalidSettings(
                "HIVEWIRE_ETCD_ENDPOINTS or HIVEWIRE_ETCD_CERT names an etcd of your own: set HIVEWIRE_ETCD_ACCESS to "
                "`external` if its users and roles are yours to keep, or to `managed` if only Hivewire uses it and "
                "nodes connect with their Swarm certificates"
            )
        return self.etcd_access != "external"
