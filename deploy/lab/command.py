"""Run other programs: in the foreground with their output, or detached with a pid file."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from lab.errors import CommandFailed, LabError
from lab.patience import patient

Completed = subprocess.CompletedProcess[str]

# Engines and tasks must not inherit the caller's proxies, tokens or virtual environment.
CLEAN_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}


def run(
    *argv: str,
    check: bool = True,
    text_in: str | None = None,
    timeout_s: float | None = 120,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Completed:
    """Run a program to its end and return its output as text.

    Raises CommandFailed when it ends with an error and `check` holds, LabError when the program does
    not exist or does not end within `timeout_s` seconds (times the patience of patience.py, as everywhere in the lab).
    """
    limit_s = None if timeout_s is None else patient(timeout_s)
    try:
        done = subprocess.run(
            argv,
            input=text_in,
            stdin=subprocess.DEVNULL if text_in is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_s,
            env=None if env is None else dict(env),
            cwd=cwd,
            check=False,
        )
    except FileNotFoundError as error:
        raise LabError(f"{argv[0]}: no such program; `lab up` installs what the lab needs") from error
    except subprocess.TimeoutExpired as error:
        raise LabError(f"`{' '.join(argv)}` did not end within {limit_s:.0f} s") from error
    if check and done.returncode != 0:
        raise CommandFailed(argv, done.returncode, done.stdout, done.stderr)
    return done


def detach(argv: Sequence[str], log: Path, pid_file: Path) -> None:
    """Start a program that outlives us, its output going to `log`, and write its process id to a file.

    It becomes a child of the machine's first process at once, so it never turns into our zombie.
    """
    # In the background of a shell without job control setsid need not fork, so $! stays its process id.
    script = 'file=$1; shift; setsid "$@" & echo $! >"$file"'
    with log.open("ab") as out:
        subprocess.run(
            ("sh", "-c", script, "sh", os.fspath(pid_file), *argv),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=CLEAN_ENVIRONMENT,
            check=True,
        )
