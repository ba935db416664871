"""The threat model names the tests that show it: they exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
DOCUMENT = (TESTS.parent / "docs" / "security.md").read_text(encoding="utf-8")
FOOTHOLDS = DOCUMENT.split("## Who can do what")[1].split("\n## ")[0]


def test_what_shows_it_exists() -> None:
    """Each name is a file of tests, or after a colon functions of the file before it."""
    files = {path.stem: path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py")}
    named = 0
    for row in [line for line in FOOTHOLDS.splitlines() if line.startswith("| ")][2:]:
        for group in row.split("|")[4].split(";"):
            names = re.findall(r"`(test_\w+)`", group)
            if ":" in group:
                file, *functions = names
                assert [f for f in functions if f"def {f}(" not in files[file]] == [], file
            else:
                assert set(names) <= files.keys()
            named += len(names)
    assert named > 20


def test_every_foothold_that_is_kept_from_something_names_its_test() -> None:
    """A row with something in its third column has something in its fourth."""
    for row in [line for line in FOOTHOLDS.splitlines() if line.startswith("| ")][2:]:
        _, foothold, _, cannot, shown, _ = (cell.strip() for cell in row.split("|"))
        assert bool(cannot) == ("`test_" in shown), foothold
