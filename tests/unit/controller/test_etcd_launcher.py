"""How etcd is started: its whole command line."""

from pathlib import Path

import pytest

from controller.etcd import EtcdServerSettings, arguments, note_roots
from hivewire.errors import InvalidSettings

CERTIFICATES = Path("/run/certificates")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CERTIFICATES", "ETCD_DATA", "ETCD_PEER_PORT", "IDENTITY_CERT", "IDENTITY_KEY", "IDENTITY_CA"):
        monkeypatch.delenv(f"HIVEWIRE_{name}", raising=False)


def listened(address: str) -> str:
    (option,) = [a for a in arguments(EtcdServerSettings(), "m1", address) if a.startswith("--listen-client-urls=")]
    return option.removeprefix("--listen-client-urls=")


def test_the_command_line() -> None:
    """One member, with the node's own certificate for clients, which must have one of the same Swarm."""
    assert arguments(EtcdServerSettings(certificates=CERTIFICATES), "m1", "192.0.2.1") == [
        "etcd",
        "--client-cert-auth",
        "--peer-client-cert-auth",
        "--name=m1",
        "--data-dir=/var/lib/etcd",
        "--listen-client-urls=https://192.0.2.1:2379,https://127.0.0.1:2379",
        "--advertise-client-urls=https://192.0.2.1:2379",
        "--listen-peer-urls=https://127.0.0.1:2380",
        "--initial-advertise-peer-urls=https://127.0.0.1:2380",
        "--initial-cluster=m1=https://127.0.0.1:2380",
        "--cert-file=/run/certificates/swarm-node.crt",
        "--key-file=/run/certificates/swarm-node.key",
        "--trusted-ca-file=/run/certificates/swarm-root-ca.crt",
        "--peer-cert-file=/run/certificates/swarm-node.crt",
        "--peer-key-file=/run/certificates/swarm-node.key",
        "--peer-trusted-ca-file=/run/certificates/swarm-root-ca.crt",
        "--peer-cert-allowed-hostname=swarm-manager",
        "--experimental-peer-skip-client-san-verification=true",
        "--enable-grpc-gateway=false",
        "--auto-compaction-mode=periodic",
        "--auto-compaction-retention=1h",
        "--experimental-watch-progress-notify-interval=5s",
        "--logger=zap",
        "--log-level=warn",
    ]


def test_settings_change_paths_and_ports() -> None:
    """Other credentials and another place for the data are named by their paths."""
    settings = EtcdServerSettings(
        identity_cert=Path("/c"),
        identity_key=Path("/k"),
        identity_ca=Path("/r"),
        etcd_data=Path("/d"),
        etcd_peer_port=1,
    )
    command = arguments(settings, "m1", "192.0.2.1")
    assert {"--cert-file=/c", "--key-file=/k", "--trusted-ca-file=/r", "--data-dir=/d"} <= set(command)
    assert "--initial-cluster=m1=https://127.0.0.1:1" in command


def test_there_is_no_secret_in_it(tmp_path: Path) -> None:
    """Every process of the node can read a command line: the key is named, never shown."""
    secret = "c2VjcmV0LXNlY3JldC1zZWNyZXQ"
    for name in ("swarm-node.crt", "swarm-node.key", "swarm-root-ca.crt"):
        (tmp_path / name).write_text(f"-----BEGIN EC PRIVATE KEY-----\n{secret}\n-----END EC PRIVATE KEY-----\n")
    command = "\0".join(arguments(EtcdServerSettings(certificates=tmp_path), "m1", "192.0.2.1"))
    assert secret not in command
    assert "BEGIN" not in command


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("192.0.2.1", "https://192.0.2.1:2379,https://127.0.0.1:2379"),
        ("127.0.0.1", "https://127.0.0.1:2379"),
        ("2001:db8::1", "https://[2001:db8::1]:2379,https://127.0.0.1:2379"),
    ],
)
def test_where_it_listens(address: str, expected: str) -> None:
    """No address twice, which etcd could not bind, and IPv6 as a URL has it."""
    assert listened(address) == expected


def test_the_roots_in_use_are_noted(tmp_path: Path) -> None:
    """A copy of what etcd trusts lies beside its data; a folder that cannot be written to is a setting to correct."""
    (tmp_path / "roots").write_text("root")
    settings = EtcdServerSettings(identity_ca=tmp_path / "roots", etcd_data=tmp_path)
    note_roots(settings)
    assert (tmp_path / "roots.pem").read_text() == "root"
    with pytest.raises(InvalidSettings, match=r"roots\.pem cannot be written \(No such file or directory\)"):
        note_roots(EtcdServerSettings(identity_ca=tmp_path / "roots", etcd_data=tmp_path / "absent"))
