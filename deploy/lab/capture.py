"""See what a wiretap on the underlay would see."""

import signal
import subprocess
import time
from pathlib import Path

from lab.command import CLEAN_ENVIRONMENT, run
from lab.errors import LabError
from lab.patience import patient
from lab.settings import BRIDGE, UNDERLAY


def command(expression: str, write: Path | None = None) -> tuple[str, ...]:
    """Build the tcpdump command line for a filter expression; empty means everything."""
    # Every frame between nodes passes the bridge once; -Z root because the file may be in a private folder.
    argv = ["ip", "netns", "exec", UNDERLAY, "tcpdump", "-i", BRIDGE, "-n", "-Z", "root", "-s", "0"]
    argv += ["--immediate-mode", "-U"]  # else frames wait up to a second in the kernel, and are lost at the end
    if write is not None:
        argv += ["-w", str(write)]
    return (*argv, expression) if expression else tuple(argv)


class Capture:
    """A running capture into a file, as a context manager.

    Frames are in the file when the block has ended.
    """

    def __init__(self, file: Path, expression: str = "") -> None:
        self.file = file
        self._expression = expression
        self._tcpdump: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Capture":
        """Start, and return when frames are being taken; raises LabError when tcpdump refuses."""
        self._tcpdump = subprocess.Popen(
            command(self._expression, self.file),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=CLEAN_ENVIRONMENT,
        )
        assert self._tcpdump.stderr is not None  # noqa: S101 - for the type checker; PIPE is given above
        line = self._tcpdump.stderr.readline()
        while line and "listening on" not in line:
            line = self._tcpdump.stderr.readline() or ""
        if not line:
            status = self._tcpdump.wait()
            self._tcpdump.stderr.close()
            raise LabError(f"tcpdump ended with status {status}; is the lab up, is the filter valid?")
        return self

    def __exit__(self, *_: object) -> None:
        if self._tcpdump is None:
            return
        time.sleep(patient(0.2))  # frames reach tcpdump in blocks; the last ones are still on their way
        self._tcpdump.send_signal(signal.SIGINT)
        self._tcpdump.communicate(timeout=patient(10))

    def count(self, expression: str = "") -> int:
        """Count the frames in the file that match a tcpdump filter."""
        argv = ("tcpdump", "-n", "-r", str(self.file), "-Z", "root")
        return len(run(*argv, *((expression,) if expression else ())).stdout.splitlines())

    def contains(self, marker: bytes) -> bool:
        """Tell whether the bytes occur in the file, that is in clear on the wire within one frame."""
        return marker in self.file.read_bytes()
