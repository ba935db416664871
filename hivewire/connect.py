"""Opens the store as the settings and the Swarm say. Used by both sides; the only place that joins the two."""

from hivewire.identity import IdentitySource
from hivewire.settings import CommonSettings
from hivewire.store.api import TlsCredentials
from hivewire.store.etcd import EtcdSettings, EtcdStore


def open_store(settings: CommonSettings, managers: tuple[str, ...]) -> EtcdStore:
    """Connects to nothing yet. ``managers``: addresses of the Swarm's managers. Raises InvalidSettings."""
    identity = IdentitySource(settings.etcd_files)

    def credentials() -> TlsCredentials:
        present = identity.current()
        return TlsCredentials(present.roots_pem, present.certificate_pem, present.key_pem)

    return EtcdStore(
        EtcdSettings(
            endpoints=settings.endpoints(managers), credentials=credentials, target_name=settings.etcd_server_name
        )
    )
