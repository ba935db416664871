"""Runs etcd on a manager with the node's own Swarm certificate: mTLS without a key or certificate made by hand.

A stack file cannot tell a service its node's address, so this asks the engine and then becomes etcd. Go's TLS accepts
the headers in a manager's key file, and etcd reads certificate and key anew for each connection, so renewals need
nothing. The roots that it trusts it reads once, though: a copy of them lies beside its data, and its health check
compares that with the node's file, so that it starts again when the Swarm's CA has changed.
"""

import os
import sys
from pathlib import Path
from typing import Final, NoReturn

from pydantic import Field

from controller.swarm.client import SwarmClient
from hivewire import identity
from hivewire.errors import HivewireError, InvalidSettings
from hivewire.process import harden
from hivewire.settings import ETCD_PORT, CommonSettings, load

ROOTS_IN_USE: Final = "roots.pem"


class EtcdServerSettings(CommonSettings):
    etcd_data: Path = Path("/var/lib/etcd")
    etcd_peer_port: int = Field(2380, ge=1, le=65535)


def arguments(settings: EtcdServerSettings, name: str, address: str) -> list[str]:
    """The command line of a single etcd member. It holds paths and addresses, no secret."""
    files = settings.identity_files
    host = f"[{address}]" if ":" in address else address
    client, peer = f"https://{host}:{ETCD_PORT}", f"https://127.0.0.1:{settings.etcd_peer_port}"
    # Both are the same where the node advertises the loopback; etcd does not bind an address twice.
    listen = dict.fromkeys((client, f"https://127.0.0.1:{ETCD_PORT}"))
    options = {
        "name": name,
        "data-dir": settings.etcd_data,
        "listen-client-urls": ",".join(listen),
        "advertise-client-urls": client,
        "listen-peer-urls": peer,
        "initial-advertise-peer-urls": peer,
        "initial-cluster": f"{name}={peer}",
        "cert-file": files.certificate,
        "key-file": files.key,
        "trusted-ca-file": files.roots,
        # Raft too is for managers only, though on loopback: every process of the node's network could speak it.
        "peer-cert-file": files.certificate,
        "peer-key-file": files.key,
        "peer-trusted-ca-file": files.roots,
        "peer-cert-allowed-hostname": identity.MANAGER,
        # Swarm's certificates hold no addresses that the caller's could be compared with.
        "experimental-peer-skip-client-san-verification": "true",
        # It would ask etcd with etcd's own certificate, which is a manager's.
        "enable-grpc-gateway": "false",
        "auto-compaction-mode": "periodic",
        "auto-compaction-retention": "1h",
        # Silence on a watch then means trouble within seconds, not minutes.
        "experimental-watch-progress-notify-interval": "5s",
        "logger": "zap",
        "log-level": "warn",
    }
    return [
        "etcd",
        "--client-cert-auth",
        "--peer-client-cert-auth",
        *(f"--{key}={value}" for key, value in options.items()),
    ]


def run() -> NoReturn:
    """Become etcd. Raises InvalidIdentity, InvalidSettings, SwarmUnavailable."""
    settings = load(EtcdServerSettings)
    here = identity.load(settings.identity_files)
    if not here.is_manager:
        raise InvalidSettings("etcd runs on managers: its certificate must name swarm-manager, this node's does not")
    info = SwarmClient(settings.docker_socket).info()
    command = arguments(settings, info.hostname, info.address)
    note_roots(settings)
    os.execvp(command[0], command)


def note_roots(settings: EtcdServerSettings) -> None:
    """Raises InvalidSettings where the folder of the data cannot be written to."""
    copy = settings.etcd_data / ROOTS_IN_USE
    try:
        copy.write_bytes(settings.identity_files.roots.read_bytes())
    except OSError as error:
        raise InvalidSettings(f"{copy} cannot be written ({error.strerror}): see HIVEWIRE_ETCD_DATA") from error


def main() -> None:
    try:
        harden()
        run()
    except HivewireError as error:
        sys.exit(f"hivewire-etcd: {error}")
    except FileNotFoundError:
        sys.exit("hivewire-etcd: there is no etcd in this image: install Debian's etcd-server")


if __name__ == "__main__":
    main()
