"""Network namespaces: find one, tell it from the node's own, and run a piece of work inside.

Work inside a namespace is done by a thread made for it, which enters with setns(2) and ends with the work. It never
goes back to a pool, so no other code can find itself in a wrong namespace; and nothing forks, which would be unsafe
beside the threads of gRPC. Nothing here creates a file, and no descriptor outlives its ``with`` block: an open one
would keep the namespace, its interface and its UDP port alive after the container is gone.

Facts: setns(2), ioctl_ns(2), network_namespaces(7).
"""

import _thread
import contextlib
import ctypes
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

from agent.kernel.api import Namespace
from hivewire.errors import KernelBusy, NamespaceGone, NoPermission
from hivewire.ids import TaskId

R = TypeVar("R")

# linux/sched.h and linux/nsfs.h
_CLONE_NEWNET: Final = 0x40000000
_NS_GET_NSTYPE: Final = 0xB703

# os.setns and os.unshare came with Python 3.12.
_libc: Final = ctypes.CDLL(None, use_errno=True)


def identify(task: TaskId, path: str) -> Namespace:
    """The namespace behind a path. Raises NamespaceGone where there is none (yet), or where it is the node's own."""
    fd = _open(path)
    try:
        _check(fd, path)
        status = os.fstat(fd)
    finally:
        os.close(fd)
    return Namespace(task, path, status.st_dev, status.st_ino)


@contextlib.contextmanager
def opened(namespace: Namespace) -> Iterator[int]:
    """A descriptor of the namespace. Raises NamespaceGone where another one is behind its path by now."""
    # What was found is no namespace of the node's own, and its number is nobody else's while that one is there.
    fd = _open(namespace.path)
    try:
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != (namespace.device, namespace.inode):
            raise NamespaceGone(f"{namespace.path} is another network namespace than before")
        yield fd
    finally:
        os.close(fd)


def run_in(namespace: Namespace, work: Callable[[], R]) -> R:
    """Do the work inside the namespace. Raises NamespaceGone, NoPermission, and what the work raises."""
    with opened(namespace) as fd:
        return _run(lambda: _call("setns", fd, _CLONE_NEWNET), work)


def run_in_new(work: Callable[[], R]) -> R:
    """Do the work inside a new, empty network namespace, which is gone afterwards. Raises NoPermission."""
    return _run(lambda: _call("unshare", _CLONE_NEWNET), work)


def _open(path: str) -> int:
    try:
        # Not blocking, so that a fifo in the place of a namespace stops nobody.
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise NoPermission(f"{path} may not be opened: give the agent CAP_SYS_ADMIN") from error
        raise NamespaceGone(f"{path} cannot be opened: {error.strerror}") from error


def _check(fd: int, path: str) -> None:
    # Docker creates an empty file and mounts the namespace over it a moment later; and where its folder is bound
    # without "rslave" the mount never arrives. Only the files of nsfs answer this question (ioctl_ns(2)).
    try:
        kind = fcntl.ioctl(fd, _NS_GET_NSTYPE)
    except OSError as error:
        raise NamespaceGone(f"{path} is no namespace, or not yet: is its folder bound with rslave?") from error
    if kind != _CLONE_NEWNET:
        raise NamespaceGone(f"{path} is no network namespace")
    status = os.fstat(fd)
    for own in ("/proc/self/ns/net", "/proc/thread-self/ns/net"):
        node = os.stat(own)
        if (node.st_dev, node.st_ino) == (status.st_dev, status.st_ino):
            raise NamespaceGone(f"{path} is the network namespace of the node itself: it is left alone")


def _call(name: str, *arguments: int) -> None:
    if getattr(_libc, name)(*arguments) == 0:
        return
    code = ctypes.get_errno()
    if code == errno.EPERM:
        raise NoPermission(f"{name} is not permitted: give the agent CAP_SYS_ADMIN")
    if code == errno.EINVAL:
        raise NamespaceGone("the network namespace is gone")
    raise KernelBusy(f"{name}: {os.strerror(code)}")


def _run(enter: Callable[[], None], work: Callable[[], R]) -> R:
    results: list[R] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            enter()
            results.append(work())
        except BaseException as error:  # noqa: BLE001 -- it is raised again in the thread that asked
            errors.append(error)
        finally:
            ended.release()

    # Not a Thread of threading: that one waits for the new thread to run before it waits for its end.
    ended = _thread.allocate_lock()
    ended.acquire()
    _thread.start_new_thread(body, ())
    ended.acquire()
    if errors:
        raise errors.pop()
    return results.pop()
