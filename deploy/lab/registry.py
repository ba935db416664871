"""An image registry in the underlay, for the lab's nodes alone. Its blobs stay in the cache."""

import json
import time

from lab.command import detach, run
from lab.errors import LabError
from lab.patience import patient
from lab.settings import REGISTRY, UNDERLAY, Settings


def start(settings: Settings, timeout_s: float = 20) -> None:
    """Start the registry and wait until it answers; raises LabError when it does not."""
    store = settings.registry
    store.mkdir(parents=True, exist_ok=True)
    config = settings.state / "registry.json"  # JSON is YAML
    config.write_text(
        json.dumps(
            {
                "version": 0.1,
                "log": {"level": "warn"},
                "storage": {"filesystem": {"rootdirectory": str(store)}, "delete": {"enabled": True}},
                "http": {"addr": REGISTRY},
            }
        )
    )
    log = settings.state / "registry.log"
    detach(
        ("nsenter", f"--net=/run/netns/{UNDERLAY}", "docker-registry", "serve", str(config)),
        log,
        settings.state / "registry.pid",
    )
    deadline = time.monotonic() + patient(timeout_s)
    while not _is_listening():
        if time.monotonic() > deadline:
            raise LabError(f"the registry does not start: {log.read_text(errors='replace')[-1000:]}")
        time.sleep(0.05)


def holds(settings: Settings, name: str, tag: str) -> bool:
    """Tell from the store whether the registry has an image."""
    tags = settings.registry / "docker/registry/v2/repositories" / name / "_manifests/tags"
    return (tags / tag / "current/link").is_file()


def _is_listening() -> bool:
    listening = run("ip", "netns", "exec", UNDERLAY, "ss", "-Hltn", "sport", "=", f":{REGISTRY.rpartition(':')[2]}")
    return bool(listening.stdout.strip())
