"""Wheels of the project's dependencies for the image's Python, fetched outside: a build has no network."""

import hashlib
import os
import platform
import shutil
import sys
import tomllib
from pathlib import Path

from lab import packages
from lab.command import run
from lab.errors import LabError
from lab.progress import Progress
from lab.settings import PROJECT, Settings

PYTHON = "3.13"  # of Debian 13
GLIBC_MINOR = 41  # the same; wheels for an older glibc fit too
SOURCE_ONLY = ("etcd3",)  # no wheel is published; pure Python, so any machine can build it


def ensure(settings: Settings, progress: Progress) -> Path:
    """Return the cached folder of wheels for the pins of today, fetched now if there is none.

    Raises CommandFailed when pip fails, LabError when a package of SOURCE_ONLY is not pinned.
    """
    constraints = PROJECT / "constraints.txt"
    with (PROJECT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    key = "\n".join([PYTHON, platform.machine(), *sorted(wanted), constraints.read_text()])
    folder = settings.cache / "wheels" / hashlib.sha256(key.encode()).hexdigest()[:12]
    if folder.is_dir():
        return folder
    pip = _pip(progress)
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    with progress.step("fetching wheels (once per change of constraints.txt)"):
        env = dict(os.environ)
        for name in SOURCE_ONLY:
            run(
                *pip,
                "wheel",
                "--no-deps",
                "--wheel-dir",
                str(partial),
                _pinned(constraints, name),
                timeout_s=600,
                env=env,
            )
        tags = [f"--platform=manylinux_2_{minor}_{platform.machine()}" for minor in range(GLIBC_MINOR, 4, -1)]
        tags += [f"--platform=manylinux{old}_{platform.machine()}" for old in ("2014", "2010", "1")]
        argv = ("download", f"--python-version={PYTHON}", "--only-binary=:all:", *tags, "--dest", str(partial))
        run(*pip, *argv, "--find-links", str(partial), "-c", str(constraints), *wanted, timeout_s=900, env=env)
    partial.rename(folder)
    return folder


def _pip(progress: Progress) -> tuple[str, ...]:
    if run(sys.executable, "-m", "pip", "--version", check=False).returncode == 0:
        return (sys.executable, "-m", "pip")
    packages.ensure(("python3-pip", "python3-setuptools", "python3-wheel"), progress)
    return ("/usr/bin/python3", "-m", "pip")


def _pinned(constraints: Path, name: str) -> str:
    for line in constraints.read_text().splitlines():
        if line.lower().startswith(name.lower() + "=="):
            return line.strip()
    raise LabError(f"{constraints.name} pins no {name}; add a line `{name}==VERSION`")
