"""The images that the lab's services run: built from the checkout, pushed once, pulled on every node."""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lab import registry, roots, seed, wheels
from lab.command import run
from lab.errors import LabError
from lab.settings import PROJECT, REGISTRY

if TYPE_CHECKING:
    from lab.lab import Lab

PRODUCT = "deploy/Dockerfile"
DEMO = "deploy/demo/Dockerfile"
README = "README.md"
INSTALL = "deploy/install-dependencies.sh"
ENVIRONMENT = "/opt/hivewire"
SOURCE = ("pyproject.toml", README, "constraints.txt", INSTALL)
TREES = ("hivewire", "controller", "agent")


@dataclass(frozen=True, slots=True)
class Images:
    """References of the images as the lab's nodes pull them."""

    hivewire: str = f"{REGISTRY}/hivewire:dev"
    demo: str = f"{REGISTRY}/hivewire-demo:dev"


def ensure(lab: "Lab") -> Images:
    """Build what changed since the last time, push it and pull it on every node.

    With a seed the nodes have everything from the start. Raises LabError when no lab is up or the seed is of another
    state of the checkout, CommandFailed when a build or a transfer fails.
    """
    if not lab.is_up:
        raise LabError("no lab is up to build in and push to; start one with `lab up`")
    built = Images()
    if lab.settings.seed is not None:
        seed.check(lab.settings.seed, digests(lab))
        return built
    base = _ensure_base(lab)
    changed = [image for image in _images(lab, built, base) if not image.is_built]
    if changed:
        # On all nodes at once: the builder needs it now, the others anyway when they pull what is built.
        with lab.progress.step(f"pulling the base image on {len(lab.nodes)} nodes"):
            _pull(lab, base)
    for image in changed:
        _build(lab, image, base)
    with lab.progress.step(f"pulling on {len(lab.nodes)} nodes"):
        _pull(lab, built.hivewire, built.demo)
    return built


def digests(lab: "Lab") -> dict[str, str]:
    """Say of each image what it is to be built from in today's checkout; needs no lab that is up.

    Raises as `ensure` does when a Debian root or wheels have to be made for it, and cannot.
    """
    return {image.reference: image.digest for image in _images(lab, Images(), _base(lab).reference)}


@dataclass(frozen=True, slots=True)
class _Base:
    reference: str
    root: Path
    wheels: Path
    tag: str


@dataclass(frozen=True, slots=True)
class _Image:
    reference: str
    dockerfile: str
    files: tuple[Path, ...]
    digest: str  # of base and files
    is_built: bool  # the registry has it for this very digest


def _images(lab: "Lab", built: Images, base: str) -> list[_Image]:
    recorded = _recorded(lab)
    found = []
    for reference, dockerfile, inputs in (
        (built.hivewire, PRODUCT, (*SOURCE, *TREES)),
        (built.demo, DEMO, ("deploy/demo",)),
    ):
        files = tuple(sorted(_files((dockerfile, *inputs))))
        digest = _digest(base, files)
        name, _, tag = reference.removeprefix(f"{REGISTRY}/").rpartition(":")
        is_built = recorded.get(reference) == digest and registry.holds(lab.settings, name, tag)
        found.append(_Image(reference, dockerfile, files, digest, is_built))
    return found


def _base(lab: "Lab") -> _Base:
    """Find out what the base image is made of; its name says it."""
    names = sorted({name for file in (PRODUCT, DEMO) for name in _packages_of(PROJECT / file)})
    root = roots.ensure("image", names, lab.settings, lab.progress)
    parcel = wheels.ensure(lab.settings, lab.progress)
    script = hashlib.sha256((PROJECT / INSTALL).read_bytes()).hexdigest()[:8]
    tag = f"{root.name}-{parcel.name}-{script}"
    return _Base(f"{REGISTRY}/hivewire-base:{tag}", root, parcel, tag)


def _ensure_base(lab: "Lab") -> str:
    """Return the reference of the base image in the registry, made now if its contents are new.

    It has the Debian packages and the dependencies already, so that a build after a change of our code
    needs no network and adds one small layer.
    """
    base = _base(lab)
    if registry.holds(lab.settings, "hivewire-base", base.tag):
        return base.reference
    with tempfile.TemporaryDirectory(dir=lab.settings.cache, prefix="base-") as folder:
        with lab.progress.step("installing the dependencies into the base image (once)"):
            copy = roots.copy_of(base.root, Path(folder) / "root")
            shutil.copytree(base.wheels, copy / "build")
            for name in ("pyproject.toml", "constraints.txt", INSTALL):
                shutil.copy(PROJECT / name, copy / "build")
            roots.run_inside(copy, f"/build/{Path(INSTALL).name}", ENVIRONMENT, "/build")
        with lab.progress.step("importing the base image (once)"):
            archive = Path(folder) / "base.tar"
            run("tar", "-C", str(copy), "--sort=name", "-cf", str(archive), ".", timeout_s=300)
            lab.docker(_builder(lab), "import", str(archive), base.reference, timeout_s=300)
            lab.docker(_builder(lab), "push", "-q", base.reference, timeout_s=300)
    return base.reference


def _build(lab: "Lab", image: _Image, base: str) -> None:
    builder = _builder(lab)
    with (
        lab.progress.step(f"building {image.reference}"),
        tempfile.TemporaryDirectory(dir=lab.settings.cache, prefix="context-") as folder,
    ):
        context = Path(folder)
        _stage(context, image.files)
        options = ("--build-arg", f"BASE={base}", "-f", str(context / image.dockerfile), "-t", image.reference)
        lab.docker(builder, "build", *options, str(context), timeout_s=900)
        lab.docker(builder, "push", "-q", image.reference, timeout_s=300)
    _record(lab, image.reference, image.digest)


def _stage(context: Path, files: Iterable[Path]) -> None:
    """Copy the inputs into a build context of their own; the checkout has more than a build needs."""
    for file in files:
        target = context / file.relative_to(PROJECT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    if not (context / README).exists():  # the build reads it, a young checkout has none
        (context / README).write_text("Hivewire\n")


def _pull(lab: "Lab", *references: str) -> None:
    def pull_on(node: str) -> None:
        for reference in references:
            lab.docker(node, "pull", "-q", reference, timeout_s=600)

    nodes = [node.name for node in lab.nodes]
    with ThreadPoolExecutor(len(nodes)) as pool:
        list(pool.map(pull_on, nodes))


def _builder(lab: "Lab") -> str:
    return lab.nodes[0].name


def _packages_of(dockerfile: Path) -> list[str]:
    """Read the Debian packages that a Dockerfile installs, so that they are named in one place."""
    found = re.search(r'^ARG PACKAGES="([^"]+)"$', dockerfile.read_text(), re.MULTILINE)
    if found is None:
        raise LabError(f'{dockerfile} has no line ARG PACKAGES="..." to prepare a base image from')
    return found[1].split()


def _files(inputs: Iterable[str]) -> set[Path]:
    found: set[Path] = set()
    for name in inputs:
        path = PROJECT / name
        if not path.exists():
            if name == README:
                continue
            raise LabError(f"{path} is missing, and the images are built from it")
        tree = [path] if path.is_file() else path.rglob("*")
        found.update(file for file in tree if file.is_file() and "__pycache__" not in file.parts)
    return found


def _digest(base: str, files: Iterable[Path]) -> str:
    digest = hashlib.sha256(base.encode())
    for file in files:
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"\n{file.relative_to(PROJECT)} {file.stat().st_mode:o} {content}".encode())
    return digest.hexdigest()


def _recorded(lab: "Lab") -> dict[str, str]:
    """Read what is in the registry: reference -> digest of the inputs it was built from."""
    try:
        content = json.loads((lab.settings.cache / "images.json").read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _record(lab: "Lab", reference: str, digest: str) -> None:
    file = lab.settings.cache / "images.json"
    new = file.with_suffix(".new")
    new.write_text(json.dumps({**_recorded(lab), reference: digest}))
    new.replace(file)
