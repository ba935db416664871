"""A process that holds keys leaks none by a dump, a reader or a program with more rights."""

import subprocess
import sys

_SHOW = """
import ctypes, subprocess, sys
from hivewire.process import harden
harden()
core = "print(*[line.split()[4:6] for line in open('/proc/self/limits') if line.startswith('Max core')][0])"
new = "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('NoNewPrivs')][0])"
print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), flush=True)
for program in (core, new):
    exec(program, {"print": lambda *words: print(*words, flush=True)})
    subprocess.run([sys.executable, "-c", program], check=True)
"""


def test_a_hardened_process_and_its_children_dump_no_core_and_gain_nothing() -> None:
    """Not dumpable itself; the core limit of one byte and no-new-privileges are its children's too."""
    shown = subprocess.run([sys.executable, "-c", _SHOW], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines() == ["0", "1 1", "1 1", "1", "1"]
