"""Only one lab at a time: a lock on the machine, held while a command changes the lab."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.errors import LabError
from lab.settings import LOCK, Settings


@contextmanager
def held(settings: Settings) -> Iterator[None]:
    """Hold the machine's lab lock.

    Raises LabError when another command holds it, or when the lab that is up belongs to another state
    folder.
    """
    descriptor = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = _read().get("pid", "unknown")
            raise LabError(f"another lab command is running (process {owner}); wait for it and try again") from error
        other = Path(_read().get("state", settings.state))
        if other != settings.state and other.exists():
            raise LabError(
                f"a lab with the state folder {other} is on this machine, and there can be only one; "
                f"end it with `HIVEWIRE_LAB_STATE={other} lab down`"
            )
        text = json.dumps({"pid": str(os.getpid()), "state": str(settings.state)})
        LOCK.write_text(text)
        yield
        if not settings.state.exists():
            LOCK.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _read() -> dict[str, str]:
    try:
        content = json.loads(LOCK.read_text() or "{}")
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
