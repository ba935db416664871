"""Settings that controller and agent have in common: from the environment (``HIVEWIRE_...``) alone."""

from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from hivewire.errors import InvalidSettings
from hivewire.identity import SWARM_CERTIFICATES, IdentityFiles

S = TypeVar("S", bound="CommonSettings")

ETCD_PORT = 2379


class CommonSettings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="HIVEWIRE_", extra="ignore", env_ignore_empty=True)

    docker_socket: str = "unix:///var/run/docker.sock"
    log_level: str = "info"
    log_format: str = "auto"
    etcd_endpoints: str = ""
    """``address:port`` of an existing etcd, several by comma; empty: port 2379 of the Swarm's managers."""
    etcd_server_name: str = "swarm-manager"
    """The name that etcd's certificate must carry."""
    certificates: Path = SWARM_CERTIFICATES
    identity_cert: Path | None = None
    identity_key: Path | None = None
    identity_ca: Path | None = None
    etcd_cert: Path | None = None
    etcd_key: Path | None = None
    etcd_ca: Path | None = None

    @property
    def identity_files(self) -> IdentityFiles:
        default = IdentityFiles.in_folder(self.certificates)
        return IdentityFiles(
            self.identity_cert or default.certificate,
            self.identity_key or default.key,
            self.identity_ca or default.roots,
        )

    @property
    def etcd_files(self) -> IdentityFiles:
        """Credentials towards etcd: the node's own, unless others are set."""
        identity = self.identity_files
        return IdentityFiles(
            self.etcd_cert or identity.certificate, self.etcd_key or identity.key, self.etcd_ca or identity.roots
        )

    def endpoints(self, managers: tuple[str, ...]) -> tuple[str, ...]:
        """Where etcd listens. Raises InvalidSettings where nothing tells."""
        given = tuple(e.strip() for e in self.etcd_endpoints.split(",") if e.strip())
        found = given or tuple(f"{address}:{ETCD_PORT}" for address in managers)
        if not found:
            raise InvalidSettings("the engine names no manager of the Swarm: set HIVEWIRE_ETCD_ENDPOINTS")
        return found


def load(kind: type[S]) -> S:
    """Read the settings. Raises InvalidSettings, naming each wrong one."""
    try:
        return kind()
    except ValidationError as error:
        wrong = "; ".join(f"HIVEWIRE_{'_'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in error.errors())
        raise InvalidSettings(wrong) from error
