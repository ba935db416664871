"""How a process of Hivewire begins, as one that holds keys, and how it ends: on a signal, or by a bug of a thread."""

import ctypes
import os
import resource
import signal
import threading
from typing import Final

from hivewire.errors import NoPermission

# linux/prctl.h
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NO_NEW_PRIVS: Final = 38


def harden() -> None:
    """Close the ways in which a key leaves a process by accident. First in every entry point; raises NoPermission.

    * No core dumps, neither of this process nor of what it starts. The limit is one byte: a limit of zero says nothing
      where ``core_pattern`` is a pipe, one byte means "no" there too (do_coredump in the kernel's fs/coredump.c).
    * Not dumpable: no other process without CAP_SYS_PTRACE reads its memory or environment, a root's neither. That
      ends at execve(2), the limit above does not.
    * No new privileges, by set-user-id or file capabilities, here and in all that it starts: stack files cannot say it.
    """
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    limit = 0 if most == 0 else 1
    resource.setrlimit(resource.RLIMIT_CORE, (limit, limit))
    _prctl(_PR_SET_DUMPABLE, 0)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, *(ctypes.c_ulong(word) for word in (value, 0, 0, 0))) != 0:
        raise NoPermission(f"prctl {option} is refused ({os.strerror(ctypes.get_errno())}): by a seccomp profile?")


class Stop(threading.Event):
    """Set when the process should end. ``is_bug`` then says whether it should be started again at once."""

    is_bug = False


def stop_event() -> Stop:
    """Set by SIGTERM and SIGINT, and when a thread dies of an exception: a half-dead process looks alive.

    Swarm starts the process again; what is applied stays applied meanwhile.
    """
    from hivewire import logs  # here, because the CLI hardens itself too and must start without a log library

    stop = Stop()

    def on_death(death: threading.ExceptHookArgs) -> None:
        logs.get().error("thread.bug", thread=death.thread.name if death.thread else "", exc_info=death.exc_value)
        stop.is_bug = True
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    threading.excepthook = on_death
    return stop
