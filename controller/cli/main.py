"""The command ``hivewire``. Data goes to stdout, words about it to stderr; exit codes are in ``client``."""

import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, TextIO

import typer
from typer.core import TyperGroup

from controller.cli import operations, render
from controller.cli.client import DEFAULT_ADDRESS, NO, TIMED_OUT, UNREACHABLE, Client, Failure
from controller.cli.session import Output, Session, seconds
from hivewire.process import harden

POLL_S: Final = 1.0
"""How often ``check --wait`` asks."""
FOLLOW_S: Final = 2.0
"""How often ``denials -f`` asks: more often brings nothing, because the controller keeps the agents' answers."""

_FLAGS: Final = frozenset({"--no-color"})
_VALUED: Final = frozenset(
    {"-o", "--output", "--addr", "--url", "--token-file", "--ca", "--server-name", "-s", "--stack"}
)


class _Group(TyperGroup):
    """Takes global options anywhere on the line, and turns a Failure into its message and exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, hoist(args))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Failure as failure:
            request = f" (request {failure.request})" if failure.request else ""
            typer.echo(render.clean(f"hivewire: {failure}{request}"), err=True)
            raise typer.Exit(failure.code) from failure


def hoist(args: list[str]) -> list[str]:
    """The same words with the global options first."""
    first: list[str] = []
    rest: list[str] = []
    left = iter(args)
    for word in left:
        if word == "--":
            rest += [word, *left]
        elif word in _VALUED:
            first += [word, *(value for value in [next(left, None)] if value is not None)]
        elif word in _FLAGS or word.partition("=")[0] in _VALUED or re.fullmatch(r"-[os].+", word):
            first.append(word)
        else:
            rest.append(word)
    return first + rest


app = typer.Typer(
    cls=_Group,
    help="What the Hivewire mesh does. Options of this level may stand anywhere on the line.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,  # it would print local variables
    context_settings={"help_option_names": ["-h", "--help"]},
)
_service = typer.Typer(no_args_is_help=True, help="Services and how they are meshed.")
_link = typer.Typer(no_args_is_help=True, help="Links between services.")
_node = typer.Typer(no_args_is_help=True, help="Nodes and their agents.")
app.add_typer(_service, name="service")
app.add_typer(_link, name="link")
app.add_typer(_node, name="node")
app.add_typer(operations.quarantine, name="quarantine")
app.command("why")(operations.why)
app.command("release")(operations.release)


@app.callback()
def _global(
    ctx: typer.Context,
    output: Annotated[Output, typer.Option("-o", "--output", help="How to print.")] = Output.TABLE,
    no_color: Annotated[bool, typer.Option("--no-color", help="No colours, as with NO_COLOR.")] = False,
    addr: Annotated[
        str | None,
        typer.Option("--addr", "--url", envvar="HIVEWIRE_ADDR", help="Where the API is.", show_default=DEFAULT_ADDRESS),
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(envvar="HIVEWIRE_TOKEN_FILE", help="File with a token of the API.")
    ] = None,
    ca: Annotated[
        Path | None, typer.Option(envvar="HIVEWIRE_API_CA", help="CA of the API's certificate, PEM; with https.")
    ] = None,
    server_name: Annotated[
        str | None, typer.Option(envvar="HIVEWIRE_API_SERVER_NAME", help="The name that its certificate must say.")
    ] = None,
    stack: Annotated[str | None, typer.Option("-s", "--stack", help="Only this stack, in lists.")] = None,
) -> None:
    color = not no_color and wants_color(sys.stdout, os.environ)
    ctx.obj = Session(output, color, addr, token_file, stack, ca, server_name)


def wants_color(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Whether this stream shows colours and its reader wants them."""
    return stream.isatty() and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


@app.command()
def status(ctx: typer.Context) -> None:
    """The mesh on one screen."""
    session: Session = ctx.obj
    answer = session.client().get("status")
    session.show(answer, lambda: render.status(answer))


@_service.command("ls")
def list_services(
    ctx: typer.Context,
    show_all: Annotated[bool, typer.Option("-a", "--all", help="Services outside the mesh, too.")] = False,
) -> None:
    """List the services of the mesh."""
    session: Session = ctx.obj
    answer = session.client().list("services", stack=session.stack, meshed=None if show_all else "true")
    session.show(answer, lambda: render.services(answer, wide=session.is_wide, color=session.color))


@_service.command("inspect")
def inspect_service(ctx: typer.Context, name: str) -> None:
    """Show a service with its tasks, links and findings."""
    session: Session = ctx.obj
    answer = session.client().get("services", name)
    session.show(answer, lambda: render.service(answer, color=session.color))


@_link.command("ls")
def list_links(
    ctx: typer.Context,
    state: Annotated[str | None, typer.Option(help="secure, idle, stale, pending or unknown.")] = None,
    show_all: Annotated[bool, typer.Option("-a", "--all", help="Links within a service, too.")] = False,
) -> None:
    """List the links with what passes over them."""
    session: Session = ctx.obj
    internal = None if show_all else "false"
    answer = session.client().list("links", stack=session.stack, state=state, internal=internal)
    session.show(answer, lambda: render.links(answer, wide=session.is_wide, color=session.color))


@_link.command("inspect")
def inspect_link(ctx: typer.Context, source: str, destination: str) -> None:
    """Show a link with every pair of tasks."""
    session: Session = ctx.obj
    answer = session.client().get("links", source, destination)
    session.show(answer, lambda: render.link(answer, color=session.color))


@_node.command("ls")
def list_nodes(ctx: typer.Context) -> None:
    """List the nodes with their agents."""
    session: Session = ctx.obj
    answer = session.client().list("nodes")
    session.show(answer, lambda: render.nodes(answer, wide=session.is_wide, color=session.color))


@_node.command("inspect")
def inspect_node(ctx: typer.Context, name: str) -> None:
    """Show a node with its tasks."""
    session: Session = ctx.obj
    answer = session.client().get("nodes", name)
    session.show(answer, lambda: render.node(answer, color=session.color))


@app.command()
def findings(ctx: typer.Context) -> None:
    """What somebody should know or change."""
    session: Session = ctx.obj
    answer = session.client().list("findings", stack=session.stack)
    session.show(answer, lambda: render.findings(answer, color=session.color))


@app.command()
def denials(
    ctx: typer.Context,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on, with a line for each that is new.")] = False,
    since: Annotated[str | None, typer.Option(help="Only what was seen so lately: 5m, 1h30m, or since a time.")] = None,
) -> None:
    """Who tried what that no link allows: what was dropped, and what enforce would drop."""
    session: Session = ctx.obj
    client = session.client()
    answer = client.list("denials", stack=session.stack, since=since)
    if not follow:
        session.show(answer, lambda: render.denials(answer, wide=session.is_wide, color=session.color))
        return
    seen: dict[str, int] = {}
    while True:
        for it, more in new_denials(answer, seen):
            typer.echo(render.as_line(it) if session.output is Output.JSON else render.denial(it, more))
        time.sleep(FOLLOW_S)
        answer = client.list("denials", stack=session.stack)
        if since is not None:  # counts of another length of time: what is there now is where to go on from
            seen.update({render.denial_key(it): it["count"] for it in answer["items"]})
            since = None


def new_denials(answer: Mapping[str, Any], seen: dict[str, int]) -> list[tuple[dict[str, Any], int]]:
    """The items that grew, and by how much, the oldest first; ``seen`` is brought up to date."""
    found = []
    for it in sorted(answer["items"], key=lambda it: str(it["last_seen"])):
        key = render.denial_key(it)
        before = seen.get(key, 0)
        # An agent that starts again counts from the beginning.
        more = it["count"] - before if it["count"] >= before else it["count"]
        seen[key] = it["count"]
        if more:
            found.append((it, more))
    return found


@app.command()
def claims(
    ctx: typer.Context,
    refused: Annotated[bool, typer.Option("--refused", help="Only those that are refused.")] = False,
) -> None:
    """What agents claim for their tasks, and why some of it is not admitted."""
    session: Session = ctx.obj
    answer = session.client().list("claims", refused="true" if refused else None)
    session.show(answer, lambda: render.claims(answer, wide=session.is_wide, color=session.color))


@app.command()
def audit(
    ctx: typer.Context,
    limit: Annotated[int, typer.Option("-n", "--limit", min=1, max=1000, help="How many at most.")] = 100,
) -> None:
    """Who wrote what through this controller lately, refused attempts included. Takes an admin's token."""
    session: Session = ctx.obj
    answer = session.client().get("audit", limit=limit)
    session.show(answer, lambda: render.audit(answer, wide=session.is_wide, color=session.color))


@app.command()
def suggest(ctx: typer.Context) -> None:
    """The labels that would allow what was seen, and what enforce would cut."""
    session: Session = ctx.obj
    answer = session.client().get("suggestions", stack=session.stack)
    session.show(answer, lambda: render.suggestions(answer, color=session.color))


@app.command()
def check(
    ctx: typer.Context,
    wait: Annotated[str | None, typer.Option(help="Wait this long until all is ready: 90s, 2m.")] = None,
) -> None:
    """Check that the mesh works. Exits with 1 if something does not."""
    session: Session = ctx.obj
    limit = None if wait is None else seconds(wait)
    client = session.client()
    report = client.get("checks") if limit is None else _wait_until_ready(client, limit)
    session.show(report, lambda: render.checks(report, color=session.color))
    if limit is not None and not report["ready"]:
        raise Failure(TIMED_OUT, f"not ready after {wait}: {_to_wait_for(report)}")
    if not report["success"]:
        raise typer.Exit(NO)


@app.command()
def healthcheck(ctx: typer.Context) -> None:
    """Whether the controller is ready, for Docker's HEALTHCHECK."""
    session: Session = ctx.obj
    is_ready, line = session.client().readiness()
    typer.echo(line)
    if not is_ready:
        raise typer.Exit(NO)


@app.command()
def version(
    ctx: typer.Context,
    short: Annotated[bool, typer.Option("--short", help="Only this program's version.")] = False,
) -> None:
    """The versions of this program and of the controller."""
    from hivewire import __version__

    session: Session = ctx.obj
    if short:
        typer.echo(__version__)
        return
    try:
        answer = {"client": __version__, "server": session.client().get("version")["version"]}
    except Failure:
        if session.output is not Output.JSON:
            typer.echo(f"client  {__version__}")
        raise
    session.show(answer, lambda: f"client  {answer['client']}\nserver  {answer['server']}")


def _wait_until_ready(client: Client, limit: float) -> dict[str, Any]:
    """The first report that is ready, or the last one in time."""
    end = time.monotonic() + limit
    told = ""
    while True:
        report: dict[str, Any] | None = None
        try:
            report = client.get("checks")
            words = _to_wait_for(report)
        except Failure as failure:
            if failure.code != UNREACHABLE:
                raise
            words = str(failure)
        if report is not None and report["ready"]:
            return report
        if words != told:
            told = words
            typer.echo(f"waiting: {render.clean(words)}", err=True)
        left = end - time.monotonic()
        if left <= 0:
            if report is None:
                raise Failure(TIMED_OUT, words)
            return report
        time.sleep(min(POLL_S, left))


def _to_wait_for(report: Mapping[str, Any]) -> str:
    things = list(report["waiting_for"])
    if not things and not report["success"]:
        things = [
            it["description"] for part in report["categories"] for it in part["checks"] if it["result"] == "error"
        ]
    more = f" and {len(things) - 1} more" if len(things) > 1 else ""
    return f"{things[0]}{more}" if things else "nothing"


def main() -> None:
    harden()  # it holds a token
    app(prog_name="hivewire")


if __name__ == "__main__":
    main()
