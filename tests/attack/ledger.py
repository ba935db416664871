"""What was tried, what stood in its way, and where a person sees it: the table that ``make attack`` ends with."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Attempt:
    who: str
    what: str
    refusal: str
    trace: str


@dataclass
class Ledger:
    attempts: list[Attempt] = field(default_factory=list)
    figures: dict[str, str] = field(default_factory=dict)

    def note(self, who: str, what: str, refusal: str, trace: str) -> None:
        """Only after it was seen: the table claims nothing."""
        self.attempts.append(Attempt(who, what, refusal, trace))

    def lines(self) -> Iterable[str]:
        rows = [("who", "attempt", "refusal", "trace"), *((a.who, a.what, a.refusal, a.trace) for a in self.attempts)]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        for row in rows:
            yield "  ".join((*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3])).rstrip()
        for name, value in self.figures.items():
            yield f"{name}: {value}"

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"attempts": [asdict(a) for a in self.attempts], "figures": self.figures}, indent=1))
