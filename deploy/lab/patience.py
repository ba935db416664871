"""How long the lab and its tests wait: as written on an ordinary machine, a multiple of it on a slow one.

What grows is the time until something is given up, and the pause of those who send without end: they must leave a slow
machine its processor. Nothing else is slower where all goes well.
"""

import math
import os

VARIABLE = "HIVEWIRE_TEST_PATIENCE"


def factor() -> float:
    """Read by how much all waits are multiplied, 1 unless the environment says more.

    Raises SystemExit, since nothing can be tried with a wrong one.
    """
    text = os.environ.get(VARIABLE) or "1"
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 <= value <= 100:  # false for "nan", too
        raise SystemExit(f"{VARIABLE}={text}: write a number from 1 to 100, such as 6 in an emulated machine")
    return value


FACTOR = factor()


def patient(seconds: float) -> float:
    """The seconds to wait here for what takes at most `seconds` on an ordinary machine."""
    return seconds * FACTOR
