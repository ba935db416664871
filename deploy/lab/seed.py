"""Images to begin with: what an engine holds after it pulled them, kept to be mounted into the engines of other labs.

Pulling costs each engine the unpacking of everything, which takes minutes where the processor is emulated. A seed is
made once for a state of the checkout and has all that a lab of that state needs:

    images.json     reference -> digest of what the image was built from
    registry/       the registry's store, whose tags name these images and no later ones
    engine/         what each engine needs of its own in /var/lib/docker: the records of images and layers
    layers/         the unpacked layers, which no engine writes
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from lab.command import run
from lab.errors import LabError
from lab.settings import Settings

KEPT = 3  # states of the checkout; each has a copy of the base layer


def folder(settings: Settings, digests: Mapping[str, str]) -> Path:
    """Name the seed of these images, whether or not it is there."""
    key = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:12]
    return settings.cache / "seeds" / key


def take(settings: Settings, digests: Mapping[str, str], data: Path) -> Path:
    """Make the seed from an engine's /var/lib/docker; the engine may run, since a layer that is there never changes.

    Raises CommandFailed when something cannot be copied.
    """
    seed = folder(settings, digests)
    partial = seed.with_name(seed.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    engine, layers = partial / "engine", partial / "layers"
    (engine / "overlay2" / "l").mkdir(parents=True)
    layers.mkdir()
    run("cp", "-a", str(data / "image"), str(engine / "image"))
    shutil.rmtree(engine / "image/overlay2/layerdb/mounts", ignore_errors=True)  # of containers, which stay behind
    for record in (engine / "image/overlay2/layerdb/sha256").glob("*/cache-id"):
        layer = data / "overlay2" / record.read_text().strip()
        copy = engine / "overlay2" / layer.name
        (copy / "diff").mkdir(parents=True)  # to mount on
        for file in (path for path in layer.iterdir() if path.is_file()):
            shutil.copy2(file, copy)
        run("cp", "-a", str(layer / "diff"), str(layers / layer.name), timeout_s=300)
        # The short name that overlays are mounted with.
        (engine / "overlay2/l" / (layer / "link").read_text().strip()).symlink_to(f"../{layer.name}/diff")
    # Blobs are named by their contents and never written again: links do. Tags are written, so they are copied.
    store, copy = (root / "docker/registry/v2" for root in (settings.cache / "registry", partial / "registry"))
    copy.mkdir(parents=True)
    run("cp", "-al", str(store / "blobs"), str(copy / "blobs"))
    run("cp", "-a", str(store / "repositories"), str(copy / "repositories"))
    (partial / "images.json").write_text(json.dumps(dict(digests)))
    partial.rename(seed)
    made = sorted(seed.parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in made[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return seed


def check(seed: Path, digests: Mapping[str, str]) -> None:
    """See that the seed has these very images.

    Raises LabError when it was made from other files, or is none.
    """
    try:
        held = json.loads((seed / "images.json").read_text())
    except (OSError, ValueError) as error:
        raise LabError(f"HIVEWIRE_LAB_SEED={seed} is no seed; `lab prepare` makes one and prints its folder") from error
    if held != dict(digests):
        raise LabError(f"the seed {seed} is of another state of this checkout; `lab prepare` makes the one of today")
