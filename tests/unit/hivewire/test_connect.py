"""Opening the store from settings: it connects to nothing by itself, and wants to know where etcd is."""

from pathlib import Path

import pytest

from hivewire.connect import open_store
from hivewire.errors import InvalidSettings
from hivewire.settings import CommonSettings


def test_nowhere_to_connect() -> None:
    """Without a manager and without a setting there is no store to open."""
    with pytest.raises(InvalidSettings, match="HIVEWIRE_ETCD_ENDPOINTS"):
        open_store(CommonSettings(etcd_endpoints=""), ())


def test_opening_connects_to_nothing(tmp_path: Path) -> None:
    """Opening reads no certificate and needs no etcd, so that an agent starts before either is there."""
    open_store(CommonSettings(certificates=tmp_path / "absent", etcd_endpoints=""), ("192.0.2.1",)).close()
