"""The commands that answer "why", and those that shut somebody out of the mesh and let him in again."""

import enum
import re
import time
from typing import Annotated, Any, Final

import typer

from controller.cli import render
from controller.cli.client import NO, TIMED_OUT, UNREACHABLE, USAGE, Client, Failure
from controller.cli.session import Output, Session, seconds

_POLL_S: Final = 0.05
"""How soon to ask again at first; the pause doubles, up to ..."""
_POLL_LONGEST_S: Final = 1.0


class Kind(enum.Enum):
    SERVICE = "service"
    TASK = "task"
    NODE = "node"


quarantine = typer.Typer(no_args_is_help=True, help="Shut a service, a task or a node out of the mesh, at once.")

_Reason = Annotated[str, typer.Option("--reason", help="For those who find it later.")]
_Wait = Annotated[str, typer.Option("--wait", help="How long to wait until it is in force: 30s, 0s.")]


def why(
    ctx: typer.Context, source: str, destination: Annotated[str, typer.Argument(metavar="DESTINATION[:PORT]")]
) -> None:
    """Say what happens to a connection, and what would change that. Exits with 1 if it does not pass.

    Ends are services, tasks (shop_web.1) or overlay addresses; the port is one of the destination: db:5432, dns:53/udp.
    """
    session: Session = ctx.obj
    name, port, protocol = read_destination(destination)
    answer = session.client().get(
        "decisions", source=source, destination=name, port=port, protocol=protocol, stack=session.stack
    )
    session.show(answer, lambda: render.decision(answer, color=session.color))
    if not answer["allowed"]:
        raise typer.Exit(NO)


def read_destination(text: str) -> tuple[str, int | None, str | None]:
    """``NAME[:PORT[/udp]]``: name, port and protocol."""
    found = re.fullmatch(r"([^:]+)(?::(\d{1,5})(?:/(tcp|udp))?)?", text)
    if found is None or (found[2] and not 1 <= int(found[2]) <= 65535):
        raise Failure(USAGE, f"{text!r} is no destination; write NAME, NAME:PORT or NAME:PORT/udp")
    return found[1], int(found[2]) if found[2] else None, found[3]


@quarantine.command("service")
def quarantine_service(ctx: typer.Context, name: str, reason: _Reason = "", wait: _Wait = "30s") -> None:
    """All tasks of a service, those to come included."""
    _quarantine(ctx.obj, Kind.SERVICE, name, reason, wait)


@quarantine.command("task")
def quarantine_task(ctx: typer.Context, name: str, reason: _Reason = "", wait: _Wait = "30s") -> None:
    """One task; the one that replaces it is not meant."""
    _quarantine(ctx.obj, Kind.TASK, name, reason, wait)


@quarantine.command("node")
def quarantine_node(ctx: typer.Context, name: str, reason: _Reason = "", wait: _Wait = "30s") -> None:
    """All tasks on a node, whether or not its own agent obeys."""
    _quarantine(ctx.obj, Kind.NODE, name, reason, wait)


@quarantine.command("ls")
def list_quarantines(ctx: typer.Context) -> None:
    """List who is shut out, since when and why."""
    session: Session = ctx.obj
    answer = session.client().get("quarantines")
    session.show(answer, lambda: render.quarantines(answer, color=session.color))


def release(ctx: typer.Context, kind: Kind, name: str) -> None:
    """End a quarantine."""
    session: Session = ctx.obj
    session.client().delete("quarantines", kind.value, name, stack=session.stack)
    answer = {"kind": kind.value, "name": name, "released": True}
    session.show(answer, lambda: f"released {kind.value} {name}: its links come back as its labels say")


def _quarantine(session: Session, kind: Kind, name: str, reason: str, wait: str) -> None:
    limit, client = seconds(wait), session.client()
    begun = time.monotonic()
    body = {"kind": kind.value, "name": name, "reason": reason, "stack": session.stack or ""}
    made = client.post("quarantines", body=body)
    answer = _wait_until_closed(client, made, begun + limit) if limit else made
    took_s = round(time.monotonic() - begun, 3)
    if session.output is Output.JSON:
        typer.echo(render.as_json({**answer, "took_seconds": took_s}))
    elif answer["is_closed"]:
        nodes = len(answer["closed_nodes"])
        typer.echo(render.clean(f"quarantined {kind.value} {made['name']}"))
        typer.echo(f"closed on {nodes} {'node' if nodes == 1 else 'nodes'} in {took_s:.1f} s")
    elif not limit:
        typer.echo(render.clean(f"quarantined {kind.value} {made['name']}, not waiting until it is closed"))
    if limit and not answer["is_closed"]:
        left = render.left_open(answer) or "no agent has told of it yet"
        raise Failure(TIMED_OUT, f"the quarantine stands, but after {wait} it is not closed everywhere: {left}")


def _wait_until_closed(client: Client, made: dict[str, Any], end: float) -> dict[str, Any]:
    """The first answer that says so, or the last one in time."""
    answer, pause = made, _POLL_S
    while True:
        try:
            items = client.get("quarantines", kind=made["kind"], name=made["id"])["items"]
        except Failure as failure:
            if failure.code != UNREACHABLE:
                raise
            items = []
        answer = items[0] if items else answer
        left = end - time.monotonic()
        if answer["is_closed"] or left <= 0:
            return answer
        time.sleep(min(pause, max(0.0, left)))
        pause = min(2 * pause, _POLL_LONGEST_S)
