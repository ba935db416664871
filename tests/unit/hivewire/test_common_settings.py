"""Settings from the environment: defaults, what overrides what, and clear words for what is wrong."""

import os
from pathlib import Path

import pytest

from agent.settings import AgentSettings
from hivewire.errors import InvalidSettings
from hivewire.identity import IdentityFiles
from hivewire.settings import CommonSettings, load


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.upper().startswith("HIVEWIRE_")]:
        monkeypatch.delenv(name)


def test_defaults() -> None:
    """Without any setting the node's own certificates and the managers' etcd are used."""
    settings = load(CommonSettings)
    swarm = Path("/var/lib/docker/swarm/certificates")
    files = IdentityFiles(swarm / "swarm-node.crt", swarm / "swarm-node.key", swarm / "swarm-root-ca.crt")
    assert settings.identity_files == settings.etcd_files == files
    assert settings.etcd_server_name == "swarm-manager"


@pytest.mark.parametrize(
    ("given", "managers", "endpoints"),
    [
        ("", ("10.0.0.1", "10.0.0.2"), ("10.0.0.1:2379", "10.0.0.2:2379")),
        ("etcd1:2379, etcd2:4001 ,", ("10.0.0.1",), ("etcd1:2379", "etcd2:4001")),
        (" , ", ("10.0.0.1",), ("10.0.0.1:2379",)),
        ("etcd1:2379", (), ("etcd1:2379",)),
    ],
)
def test_endpoints(
    monkeypatch: pytest.MonkeyPatch, given: str, managers: tuple[str, ...], endpoints: tuple[str, ...]
) -> None:
    """An etcd that was set is used, else that of the managers."""
    monkeypatch.setenv("HIVEWIRE_ETCD_ENDPOINTS", given)
    assert load(CommonSettings).endpoints(managers) == endpoints


def test_no_endpoint() -> None:
    """Where neither a setting nor the engine names an etcd the setting to make is named."""
    with pytest.raises(InvalidSettings, match="HIVEWIRE_ETCD_ENDPOINTS"):
        load(CommonSettings).endpoints(())


def test_other_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials for etcd are the identity's unless set, each file by itself."""
    monkeypatch.setenv("HIVEWIRE_CERTIFICATES", "/certs")
    monkeypatch.setenv("HIVEWIRE_IDENTITY_KEY", "/other/key")
    monkeypatch.setenv("HIVEWIRE_ETCD_CA", "/etcd/ca")
    settings = load(CommonSettings)
    assert settings.identity_files == IdentityFiles(
        Path("/certs/swarm-node.crt"), Path("/other/key"), Path("/certs/swarm-root-ca.crt")
    )
    assert settings.etcd_files == IdentityFiles(Path("/certs/swarm-node.crt"), Path("/other/key"), Path("/etcd/ca"))


def test_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent's settings come from the environment, and an empty one is none."""
    monkeypatch.setenv("HIVEWIRE_FIRST_PORT", "40000")
    monkeypatch.setenv("HIVEWIRE_LAST_PORT", "40000")
    monkeypatch.setenv("HIVEWIRE_WORKERS", "")
    monkeypatch.setenv("HIVEWIRE_UNKNOWN", "x")
    settings = load(AgentSettings)
    assert (settings.first_port, settings.last_port, settings.workers) == (40000, 40000, 2)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("HIVEWIRE_FIRST_PORT", "0", "greater than or equal to 1"),
        ("HIVEWIRE_LAST_PORT", "65536", "less than or equal to 65535"),
        ("HIVEWIRE_LAST_PORT", "80", "80 is below HIVEWIRE_FIRST_PORT, which is 51820"),
        ("HIVEWIRE_WORKERS", "many", "valid integer"),
        ("HIVEWIRE_RESYNC_S", "0", "greater than 0"),
        ("HIVEWIRE_BACKEND", "magic", "'auto'"),
    ],
)
def test_wrong_settings(monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str) -> None:
    """A wrong setting is refused by the name under which it was set, with what is wrong."""
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidSettings) as caught:
        load(AgentSettings)
    assert f"{name}: " in str(caught.value)
    assert words in str(caught.value)


def test_every_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several wrong settings are named at once."""
    monkeypatch.setenv("HIVEWIRE_WORKERS", "0")
    monkeypatch.setenv("HIVEWIRE_REPORT_PORT", "-1")
    with pytest.raises(InvalidSettings, match=r"HIVEWIRE_REPORT_PORT: .*; HIVEWIRE_WORKERS: "):
        load(AgentSettings)
