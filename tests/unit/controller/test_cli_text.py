"""The small pieces of the command line: words, numbers, colours, and the order of options."""

import io
import subprocess
import sys

import pytest

from controller.cli import render
from controller.cli.client import Failure
from controller.cli.main import hoist, seconds, wants_color


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (9949, "9.9 kB"),
        (9950, "10 kB"),
        (999_499, "999 kB"),
        (999_500, "1.0 MB"),
        (2_100_000, "2.1 MB"),
        (5 * 10**9, "5.0 GB"),
        (7 * 10**15, "7000 TB"),
    ],
)
def test_sizes_are_short(number: int | None, text: str) -> None:
    """Sizes have a unit and at most three digits, but for the largest unit."""
    assert render.size(number) == text


@pytest.mark.parametrize(
    ("age", "text"), [(None, "-"), (0, "0s"), (59.9, "59s"), (60, "1m"), (3600, "1h"), (86400 * 3.5, "3d")]
)
def test_ages_are_short(age: float | None, text: str) -> None:
    """Ages have one unit."""
    assert render.age(age) == text


@pytest.mark.parametrize(("text", "expected"), [("0s", 0), ("90s", 90), ("2m", 120), ("1h30m", 5400), ("1h1m1s", 3661)])
def test_durations_are_read(text: str, expected: float) -> None:
    """Durations are written as Docker writes them."""
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "2", "m", "-1s", "1.5s", "1s1m", "2 m"])
def test_other_durations_are_refused(text: str) -> None:
    """What is no duration is wrong use."""
    with pytest.raises(Failure, match="no duration") as caught:
        seconds(text)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("link ls -o json", "-o json link ls"),
        ("link ls -ojson --all", "-ojson link ls --all"),
        ("status --addr=http://x --no-color", "--addr=http://x --no-color status"),
        ("service inspect web -s shop", "-s shop service inspect web"),
        ("version --short", "version --short"),
        ("service inspect -- -o", "service inspect -- -o"),
        ("status -o", "-o status"),
    ],
)
def test_global_options_may_stand_anywhere(line: str, expected: str) -> None:
    """Global options move to the front, everything else keeps its order."""
    assert hoist(line.split()) == expected.split()


@pytest.mark.parametrize(
    ("stream", "environment", "expected"),
    [
        (Terminal(), {}, True),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"NO_COLOR": ""}, True),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {}, False),
    ],
)
def test_colours_are_for_terminals_that_want_them(
    stream: io.StringIO, environment: dict[str, str], expected: bool
) -> None:
    """Colours need a terminal, and neither NO_COLOR nor TERM=dumb."""
    assert wants_color(stream, environment) is expected


def test_colours_change_nothing_but_colours() -> None:
    """A coloured table is the plain one with escape sequences."""
    rows = [("a", "secure"), ("b", "stale")]
    plain = render.table(["NAME", "STATE"], rows, color=False)
    colored = render.table(["NAME", "STATE"], rows, color=True)
    assert plain == "NAME   STATE\na      secure\nb      stale"
    assert "\x1b[32msecure\x1b[0m" in colored
    assert colored.replace("\x1b[32m", "").replace("\x1b[31m", "").replace("\x1b[0m", "") == plain


def test_names_cannot_steer_the_terminal() -> None:
    """Control characters of labels and names are shown as question marks, brackets are left alone."""
    shown = render.table(["NAME"], [("[red]x\x1b[2J\x9b1m\n",)], color=False)
    assert shown == "NAME\n[red]x?[2J?1m?"


def test_long_names_are_never_cut() -> None:
    """Columns are as wide as their longest cell, whatever the terminal."""
    name = "x" * 500
    assert name in render.table(["A", "B"], [(name, "b")], color=False)


def test_help_loads_neither_server_nor_client_libraries() -> None:
    """Help is quick because the libraries of server and HTTP stay unloaded."""
    code = (
        "import sys; from controller.cli.main import app; app(['--help'], standalone_mode=False); "
        "print([m for m in ('fastapi', 'starlette', 'uvicorn', 'httpx2', 'msgspec', 'docker', 'rich') "
        "if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
