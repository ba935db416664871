"""One line per step, with the seconds it took, on standard error."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


class Progress:
    """Prints steps as they end; `out=None` keeps quiet (tests)."""

    def __init__(self, out: TextIO | None = sys.stderr) -> None:
        self._out = out

    def say(self, text: str) -> None:
        """Print one line."""
        if self._out is not None:
            print(text, file=self._out, flush=True)

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Print `text` with its duration when the block ends, or with `failed` when it raises."""
        live = self._out is not None and self._out.isatty()
        if live:
            print(f"        {text} ...", end="", file=self._out, flush=True)
        start = time.monotonic()
        outcome = ""
        try:
            yield
        except BaseException:
            outcome = ": failed"
            raise
        finally:
            seconds = time.monotonic() - start
            self.say(f"{chr(13) if live else ''}{seconds:6.1f}s {text}{outcome}    ")
