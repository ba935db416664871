"""New files of a folder, told by inotify(7) at once: the standard library has no call for it."""

import ctypes
import errno
import os
import select
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final

from hivewire.errors import KernelBusy

# sys/inotify.h
_IN_MOVED_TO: Final = 0x80
_IN_CREATE: Final = 0x100
_IN_UNMOUNT: Final = 0x2000
_IN_Q_OVERFLOW: Final = 0x4000
_IN_IGNORED: Final = 0x8000
_IN_ONLYDIR: Final = 0x01000000
_EVENT: Final = struct.Struct("=iIII")
_ROOM: Final = 64 * 1024

_libc: Final = ctypes.CDLL(None, use_errno=True)


class NewFiles:
    """A watch of one folder; a context manager, of one thread."""

    def __init__(self, folder: Path) -> None:
        """Raises KernelBusy where the folder cannot be watched."""
        self._fd = _checked(_libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK), "inotify_init1")
        try:
            mask = _IN_CREATE | _IN_MOVED_TO | _IN_ONLYDIR
            _checked(_libc.inotify_add_watch(self._fd, os.fsencode(folder), mask), f"watch {folder}")
        except KernelBusy:
            os.close(self._fd)
            raise

    def __enter__(self) -> "NewFiles":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def wait(self, timeout_s: float) -> tuple[str, ...]:
        """Names that appeared meanwhile; none after the timeout. Raises KernelBusy where some were missed, or the
        folder went: watch it anew and list it.
        """
        if not select.select([self._fd], [], [], timeout_s)[0]:
            return ()
        return tuple(_names(os.read(self._fd, _ROOM)))


def _names(data: bytes) -> Iterator[str]:
    offset = 0
    while offset + _EVENT.size <= len(data):
        _, mask, _, size = _EVENT.unpack_from(data, offset)
        if mask & (_IN_Q_OVERFLOW | _IN_UNMOUNT | _IN_IGNORED):
            raise KernelBusy("the watch of the folder ended, or events were missed")
        name = data[offset + _EVENT.size : offset + _EVENT.size + size].rstrip(bytes(1))
        yield os.fsdecode(name)
        offset += _EVENT.size + size


def _checked(result: int, doing: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        more = "; raise fs.inotify.max_user_instances" if code == errno.EMFILE else ""
        raise KernelBusy(f"{doing}: {os.strerror(code)}{more}")
    return result
