"""What the global options of the command line say, for every command."""

import enum
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from controller.cli import render
from controller.cli.client import USAGE, Client, Failure


class Output(enum.Enum):
    TABLE = "table"
    WIDE = "wide"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class Session:
    """What the global options say."""

    output: Output
    color: bool
    address: str | None
    token_file: Path | None
    stack: str | None
    ca: Path | None = None
    server_name: str | None = None

    def client(self) -> Client:
        return Client(self.address, self.token_file, ca=self.ca, server_name=self.server_name)

    def show(self, answer: dict[str, Any], text: Callable[[], str]) -> None:
        typer.echo(render.as_json(answer) if self.output is Output.JSON else text())

    @property
    def is_wide(self) -> bool:
        return self.output is Output.WIDE


def seconds(text: str) -> float:
    """A duration such as 90s, 2m or 1h30m."""
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if not text or found is None:
        raise Failure(USAGE, f"--wait {text!r} is no duration; write 90s, 2m or 1h30m")
    hours, minutes, rest = (int(part or 0) for part in found.groups())
    return hours * 3600.0 + minutes * 60.0 + rest
