"""Samples on their way from a measurement to a report: kept in a file, or handed out through standard output."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MARK = "@bench "
"""Before a sample in the output of a run whose files are lost."""
_KINDS = {
    "datapath": {"facts", "idle", "sample"},
    "replay": {"replay"},
    "revocation": {"revocation"},
    "tasks": {"task_start", "fresh_link"},
}


def folder(root: Path) -> Path:
    return root / "build" / "bench"


def file(root: Path, where: str) -> Path:
    return folder(root) / f"{where}.jsonl"


@contextmanager
def kept(root: Path, where: str, parts: Sequence[str]) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Keep samples in a file from now on; older ones of the same parts go, those of other parts stay."""
    replaced = set().union(*(_KINDS[part] for part in parts))
    others = [sample for sample in read(root, where) if sample["kind"] not in replaced]
    folder(root).mkdir(parents=True, exist_ok=True)
    with file(root, where).open("w") as out:

        def keep(sample: dict[str, Any]) -> None:
            out.write(json.dumps(sample) + "\n")
            out.flush()

        for sample in others:
            keep(sample)
        yield keep


def read(root: Path, where: str) -> list[dict[str, Any]]:
    """All samples of an earlier run; none where there was no run."""
    path = file(root, where)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def hand_out(sample: dict[str, Any]) -> None:
    print(MARK + json.dumps(sample), flush=True)


def handed_out(line: str) -> dict[str, Any] | None:
    """The sample in a line of output, or None where it is no sample."""
    if not line.startswith(MARK):
        return None
    sample: dict[str, Any] = json.loads(line.removeprefix(MARK))
    return sample
