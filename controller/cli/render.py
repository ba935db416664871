"""From the API's JSON to text: docker-like tables, and the sheets of status, check and inspect. No IO."""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Final

Answer = Mapping[str, Any]

_STYLES: Final = {
    "secure": "green",
    "configured": "green",
    "admitted": "green",
    "done": "green",
    "up": "green",
    "pending": "yellow",
    "waiting": "yellow",
    "passes": "yellow",
    "dropped": "red",
    "warning": "yellow",
    "stale": "red",
    "failed": "red",
    "refused": "red",
    "quarantined": "red",
    "missing": "red",
    "error": "red",
    "unknown": "magenta",
}
_MARKS: Final = {"success": ("√", "green"), "warning": ("‼", "yellow"), "error": ("×", "red")}  # noqa: RUF001
_STEP_MARKS: Final = {True: ("√", "green"), False: ("×", "red"), None: ("–", "")}  # noqa: RUF001
_VERDICTS: Final = {"allowed": "green", "denied": "red", "broken": "magenta"}
_NONE: Final = "-"


def as_json(answer: Answer) -> str:
    return json.dumps(answer, indent=2)


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, color: bool) -> str:
    """Aligned columns without lines. Words that are states get their colour."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), show_header=True, header_style="")
    for header in headers:
        made.add_column(header, no_wrap=True)
    for row in rows:
        made.add_row(*(Text.assemble((clean(cell), _STYLES.get(cell, ""))) for cell in row))
    stream = io.StringIO()
    # As wide as it needs: a cut name is of no use, and other programs read this.
    console = Console(file=stream, width=100_000, color_system="standard" if color else None, force_terminal=color)
    console.print(made)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def clean(text: str) -> str:
    """The text without what would steer a terminal: names and labels are written by anybody."""
    return "".join(char if char.isprintable() else "?" for char in text)


def services(answer: Answer, *, wide: bool, color: bool) -> str:
    headers = ["NAME", "STACK", "MODE", "TASKS", "IN", "OUT", "FINDINGS", *(["ID"] if wide else []), ""]
    rows = []
    for it in answer["items"]:
        row = [it["name"], it["stack"] or _NONE, it["mode"] or _NONE, _ratio(it, "tasks")]
        row += [str(it["links_in"]), str(it["links_out"]), str(it["findings"])]
        rows.append([*row, *([it["id"]] if wide else []), it["quarantine"] or ""])
    return table(headers, rows, color=color)


def links(answer: Answer, *, wide: bool, color: bool) -> str:
    more = ["NETWORK", "SECURE", "STALE", "UNKNOWN"] if wide else []
    headers = ["SOURCE", "DESTINATION", "PORT", "STATE", "PEERS", "HANDSHAKE", "RX", "TX", *more, ""]
    rows = []
    for it in answer["items"]:
        row = [it["source"], it["destination"], ",".join(it["ports"]) or "all", it["state"]]
        row += [f"{it['pairs_configured']}/{it['pairs_expected']}", *_traffic(it)]
        if wide:
            row += [",".join(it["networks"]) or _NONE]
            row += [str(it[name]) for name in ("pairs_secure", "pairs_stale", "pairs_unknown")]
        rows.append([*row, it["reason"]])
    return table(headers, rows, color=color)


def nodes(answer: Answer, *, wide: bool, color: bool) -> str:
    more = ["ID", "OS", "ENGINE", "READY", "ANSWERS"] if wide else []
    headers = ["HOSTNAME", "ROLE", "AGENT", "VERSION", "BACKEND", "UNDERLAY", "MTU", "TASKS", *more, ""]
    rows = []
    for it in answer["items"]:
        row = [it["hostname"], it["role"], it["agent"], *(_or_none(it[n]) for n in ("agent_version", "backend"))]
        row += [_or_none(it["underlay_address"]), _or_none(it["underlay_mtu"]), _ratio(it, "tasks")]
        if wide:
            row += [it["id"], it["os"], it["engine_version"] or _NONE, _yes(it["is_ready"]), _yes(it["agent_answers"])]
        rows.append([*row, it["quarantine"] or ""])
    return table(headers, rows, color=color)


def findings(answer: Answer, *, color: bool) -> str:
    if not answer["items"]:
        return "no findings"
    return "\n".join(_finding(it, color=color) for it in answer["items"])


def _finding(it: Answer, *, color: bool) -> str:
    head = _paint(it["severity"].capitalize(), _STYLES.get(it["severity"], ""), color=color)
    label = f"{it['label']}: " if it["label"] and it["label"] not in it["message"] else ""
    lines = [f"{head} [{it['code']}] ({clean(it['subject'])}) {clean(label + it['message'])}"]
    lines += [f"    {clean(line)}" for line in it["remedy"].splitlines()]
    return "\n".join(lines)


def denials(answer: Answer, *, wide: bool, color: bool) -> str:
    """The latest first."""
    if not answer["items"]:
        return "nothing was denied"
    headers = ["LAST SEEN", "COUNT", "SOURCE", "DESTINATION", "PORT", "OUTCOME", "REASON", *(["TASKS"] if wide else [])]
    rows = []
    for it in sorted(answer["items"], key=lambda it: str(it["last_seen"]), reverse=True):
        row = [age(it["last_seen_age_seconds"]), str(it["count"]), it["source"], it["destination"], _port(it)]
        row += [_outcome(it), ",".join(it["reasons"])]
        rows.append([*row, *([",".join(it["tasks"])] if wide else []), it["detail"]])
    return table([*headers, ""], rows, color=color)


def claims(answer: Answer, *, wide: bool, color: bool) -> str:
    if not answer["items"]:
        return "no claims"
    headers = ["TASK", "SERVICE", "NODE", "STATE", *(["ID", "CLASS"] if wide else []), ""]
    rows = []
    for it in answer["items"]:
        row = [it["task_name"] or it["task"], it["service"] or _NONE, it["node"], it["state"]]
        rows.append([*row, *([it["task"], it["reason_class"] or _NONE] if wide else []), it["reason"]])
    return table(headers, rows, color=color)


def audit(answer: Answer, *, wide: bool, color: bool) -> str:
    """The newest first."""
    if not answer["items"]:
        return "nothing was written since this controller began"
    more = ["STATUS", "PATH", "REQUEST"] if wide else []
    headers = ["TIME", "ROLE", "TOKEN", "ADDRESS", "RESULT", "ACTION", "WHAT", *more, ""]
    rows = []
    for it in answer["items"]:
        what = f"{it['kind']} {it['name']}".strip() or _NONE
        row = [it["time"][:19] + "Z", it["role"], it["token"], it["address"], it["result"], it["action"], what]
        rows.append([*row, *([str(it["status"]), it["path"], it["request_id"]] if wide else []), it["reason"]])
    return table(headers, rows, color=color)


def denial(it: Answer, more: int) -> str:
    """One line of ``denials -f``."""
    event = "conn.denied" if it["dropped"] else "conn.undeclared"
    ends = f"{it['source']} -> {it['destination']}:{_port(it)}"
    return clean(f"{it['last_seen'][11:19]} {event:<16} {ends:<48} {','.join(it['reasons']):<12} x{more}")


def denial_key(it: Answer) -> str:
    return json.dumps([it[name] for name in ("source", "destination", "protocol", "port", "dropped")])


def as_line(answer: Answer) -> str:
    return json.dumps(answer)


def suggestions(answer: Answer, *, color: bool) -> str:
    if not answer["attempts"]:
        return "nothing was seen that no link allows"
    rows = [
        (
            *(it["source"], it["destination"], _port(it), str(it["count"] or _NONE)),
            "passes, enforce cuts it" if it["passes"] else "dropped",
            "labels below allow it" if it["is_suggested"] else it["reason"],
        )
        for it in answer["attempts"]
    ]
    parts = [table(["SOURCE", "DESTINATION", "PORT", "COUNT", "TODAY", "THEN"], rows, color=color)]
    for stack, text in sorted(answer["stack_files"].items()):
        # Lines stay lines: this is to be pasted.
        parts += ["", f"# stack {clean(stack)}", *(clean(line) for line in text.splitlines())]
    if answer["commands"]:
        parts += ["", "# the same at once; no task restarts", *(clean(line) for line in answer["commands"])]
    return "\n".join(parts)


def _port(it: Answer) -> str:
    return f"{it['port']}/{it['protocol']}" if it["port"] else str(it["protocol"])


def _outcome(it: Answer) -> str:
    return "dropped" if it["dropped"] else "passes"


def _denied(it: Answer) -> str:
    """The line of ``status`` about attempts."""
    if not it["count"]:
        return f"0 in the last {it['period_seconds'] // 60} min"
    top = it["top"]
    ends = f" ({top['source']} -> {top['destination']}:{_port(top)}, {top['count']})" if top else ""
    return f"{it['count']} in the last {it['period_seconds'] // 60} min{ends}     -> hivewire denials"


def status(it: Answer) -> str:
    found, links_, agents = it["findings"], it["links"], it["agents"]
    store = next((part for part in it["components"] if part["name"] == "store"), None)
    store_text = _NONE if store is None else "ok" if store["is_ok"] else f"failed: {store['detail']}"
    counts = "   ".join(f"{name} {links_[name]}" for name in ("secure", "idle", "pending", "stale"))
    unknown = f"   unknown {links_['unknown']}" if links_["unknown"] else ""
    words = ", ".join([_plural(found["error"], "error"), _plural(found["warning"], "warning")])
    leader = f"leader {it['leader']}" if it["leader"] else "no leader"
    lines = [
        f"Mesh        {it['mesh']}   v{it['version']}   mode {it['mode']}   revision {it['revision']}",
        f"Controller  {leader}     Agents  {agents['up']}/{agents['nodes']} up     Store  {store_text}",
        f"Services    {it['services']['meshed']} meshed / {it['services']['total']} total"
        f"       Tasks   {it['tasks']['configured']}/{it['tasks']['expected']} configured",
        f"Links       {links_['total']}   {counts}{unknown}",
        f"Denied      {_denied(it['denied'])}",
        f"Findings    {words}" + ("     -> hivewire findings" if any(found.values()) else ""),
    ]
    if it["quarantines"]:
        lines.append(f"Quarantine  {it['quarantines']} in force     -> hivewire quarantine ls")
    failed = [part for part in it["components"] if not part["is_ok"]]
    if failed:
        names = ", ".join(part["name"] for part in failed)
        lines.append(f"Failing     {names}     -> hivewire check")
    return "\n".join(clean(line) for line in lines)


def checks(report: Answer, *, color: bool) -> str:
    lines = []
    counts = dict.fromkeys(_MARKS, 0)
    for category in report["categories"]:
        lines += [category["categoryName"], "-" * len(category["categoryName"])]
        for it in category["checks"]:
            counts[it["result"]] += 1
            mark, style = _MARKS[it["result"]]
            lines.append(f"{_paint(mark, style, color=color)} {clean(it['description'])}")
            lines += [f"    {clean(line)}" for line in it["error"].splitlines()]
            code = f"   [{it['code']}]" if it["code"] else ""
            lines += [f"    -> {clean(it['hint'])}{code}"] if it["hint"] or code else []
        lines.append("")
    failed, warned = counts["error"], _plural(counts["warning"], "warning")
    return "\n".join([*lines, f"Status: {failed} failed, {warned}, {counts['success']} ok"])


def service(it: Answer, *, color: bool) -> str:
    stack = f"stack {it['stack']}" if it["stack"] else "no stack"
    mode = f"mode {it['mode']}" if it["mode"] else "not in the mesh"
    parts = [
        clean(f"{it['name']}   {stack}   {mode}   tasks {_ratio(it, 'tasks')} configured"),
        clean(f"id {it['id']}   networks {', '.join(it['networks']) or _NONE}"),
        *(clean(f"    {name}={value}") for name, value in sorted(it["labels"].items())),
    ]
    if it["tasks"]:
        parts += ["", _tasks(it["tasks"], color=color)]
    if it["links"]:
        parts += ["", links({"items": it["links"]}, wide=False, color=color)]
    if it["finding_list"]:
        parts += ["", findings({"items": it["finding_list"]}, color=color)]
    return "\n".join(parts)


def node(it: Answer, *, color: bool) -> str:
    agent = f"agent {it['agent']}" + (f" {it['agent_version']}" if it["agent_version"] else "")
    ports = f"UDP ports {it['first_port']}-{it['last_port']}" if it["first_port"] else "UDP ports -"
    underlay = f"underlay {_or_none(it['underlay_address'])} MTU {_or_none(it['underlay_mtu'])}"
    parts = [
        clean(f"{it['hostname']}   {it['role']}   {agent}   tasks {_ratio(it, 'tasks')} configured"),
        clean(f"id {it['id']}   backend {_or_none(it['backend'])}   {underlay}   {ports}"),
    ]
    if it["tasks"]:
        parts += ["", _tasks(it["tasks"], color=color)]
    if it["refused"]:
        parts += ["", table(["REFUSED", "REASON"], [(r["task"], r["reason"]) for r in it["refused"]], color=color)]
    return "\n".join(parts)


def link(it: Answer, *, color: bool) -> str:
    networks = ", ".join(it["networks"]) or _NONE
    ports = ", ".join(it["ports"]) or "all"
    parts = [clean(f"{it['source']} -> {it['destination']}   ports {ports}   networks {networks}")]
    state = _paint(it["state"], _STYLES.get(it["state"], ""), color=color)
    reason = f"   {clean(it['reason'])}" if it["reason"] else ""
    parts.append(f"{state}   {it['pairs_configured']}/{it['pairs_expected']} pairs of tasks{reason}")
    if it["pairs"]:
        headers = ["SOURCE", "NODE", "DESTINATION", "NODE", "STATE", "HANDSHAKE", "RX", "TX"]
        rows = [
            (p["source_task"], p["source_node"], p["destination_task"], p["destination_node"], p["state"], *_traffic(p))
            for p in it["pairs"]
        ]
        parts += ["", table(headers, rows, color=color)]
    return "\n".join(parts)


def decision(it: Answer, *, color: bool) -> str:
    """The verdict, the steps, what passes, and what would change it."""
    port = f":{it['port']}" if it["port"] else ""
    verdict = _paint(it["verdict"].upper(), _VERDICTS[it["verdict"]], color=color)
    unsure = ", ".join(it["unknown_nodes"])
    note = f"   not confirmed: the agent on {unsure} does not answer" if unsure else ""
    lines = [f"{verdict}  {clean(it['source'])} -> {clean(it['destination'])}{port}{clean(note)}"]
    for number, step in enumerate(it["steps"], 1):
        mark, style = _STEP_MARKS[step["is_ok"]]
        lines.append(f" {number:>2}. {_paint(mark, style, color=color)} {step['name']}: {clean(step['text'])}")
    if it["path"]:
        lines += [f"  {clean(line)}" for line in _way(it)]
    if it["attempts"]:
        lines.append(f"{_plural(it['attempts'], 'attempt')} in the last 5 min dropped -> hivewire denials")
    if it["fix"]:
        restart = "     (no task restarts)" if "--label-add hivewire." in it["fix"] else ""
        lines += ["To allow it:" if it["verdict"] == "denied" else "To mend it:", f"  {clean(it['fix'])}{restart}"]
    return "\n".join(lines)


def _way(it: Answer) -> list[str]:
    path, handshake = it["path"], age(it["handshake_age_seconds"])
    return [
        f"encrypted by WireGuard, {it['source_tasks']} x {it['destination_tasks']} tasks, newest handshake {handshake},"
        f" received {size(it['received_bytes'])}, sent {size(it['sent_bytes'])}",
        f"path {path['source_task']}@{path['source_node']} {path['source_address']}"
        f" -> {path['destination_task']}@{path['destination_node']} {path['destination_address']}"
        f"   underlay {path['source_endpoint']} -> {path['destination_endpoint']}   MTU {path['mtu']}",
    ]


def quarantines(answer: Answer, *, color: bool) -> str:
    if not answer["items"]:
        return "nobody is quarantined"
    rows = []
    for it in answer["items"]:
        nodes_ = len(it["closed_nodes"]) + len(it["open_nodes"]) + len(it["unknown_nodes"])
        rows.append(
            [it["kind"], it["name"], it["since"], it["by"], f"{len(it['closed_nodes'])}/{nodes_}", it["reason"]]
        )
    return table(["KIND", "NAME", "SINCE", "BY", "CLOSED", "REASON"], rows, color=color)


def left_open(it: Answer) -> str:
    """What is not closed yet, or not known to be."""
    still = [f"{node}: {what}" for node, what in it["open_nodes"].items()]
    return "; ".join([*still, *(f"{node}: its agent does not answer" for node in it["unknown_nodes"])])


def _tasks(items: Iterable[Answer], *, color: bool) -> str:
    headers = ["TASK", "NODE", "STATE", "SERVING", "INTERFACE", "MTU", "PEERS", ""]
    rows = [
        (
            *(it["name"], it["node"], it["state"], _yes(it["serving"])),
            *(it["interface"] or _NONE, str(it["mtu"] or _NONE), str(it["peers"]), it["detail"]),
        )
        for it in items
    ]
    return table(headers, rows, color=color)


def _traffic(it: Answer) -> tuple[str, str, str]:
    return age(it["handshake_age_seconds"]), size(it["received_bytes"]), size(it["sent_bytes"])


def age(seconds: float | None) -> str:
    """Short, as in docker: the largest unit only."""
    if seconds is None:
        return _NONE
    for unit, length in (("d", timedelta(days=1)), ("h", timedelta(hours=1)), ("m", timedelta(minutes=1))):
        if seconds >= length.total_seconds():
            return f"{int(seconds // length.total_seconds())}{unit}"
    return f"{int(seconds)}s"


def size(number: int | None) -> str:
    """In powers of 1000, with three digits or fewer."""
    if number is None:
        return _NONE
    value = float(number)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{value:.1f} {unit}" if unit != "B" and value < 9.95 else f"{value:.0f} {unit}"


def _ratio(it: Answer, name: str) -> str:
    return f"{it[f'{name}_configured']}/{it[f'{name}_expected']}"


def _or_none(value: Any) -> str:
    return _NONE if value in (None, "") else str(value)


def _yes(value: bool | None) -> str:
    return _NONE if value is None else "yes" if value else "no"


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _paint(text: str, style: str, *, color: bool) -> str:
    codes = {"green": 32, "yellow": 33, "red": 31, "magenta": 35}
    return f"\x1b[{codes[style]}m{text}\x1b[0m" if color and style in codes else text
