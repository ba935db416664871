"""Figures as people look at them: a table in Markdown and a plot, beside the JSON that both are made of.

build/bench/here.json, vm.json     the figures
build/bench/results.md             the tables
build/bench/results.png            the plot
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")  # files only: there may be no screen
from lab.progress import Progress
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from tests.bench import figures, samples

Figures = Mapping[str, Any]

TITLES = {
    "veth": "nodes, no encryption",
    "wireguard": "WireGuard by hand, nodes",
    "devices": "WireGuard by hand, namespaces",
    "rules": "the same with a link's rules",
    "link": "Hivewire link",
    "vip": "Hivewire link by VIP",
    "off": "Swarm overlay, guarded",
    "overlay": "Swarm overlay",
    "overlay_vip": "Swarm overlay by VIP",
    "sealed": "Swarm overlay, encrypted",
}
WHERE = {"here": "this machine's kernel", "vm": "Debian's kernel, emulated"}
_OURS = {"link", "vip"}
_PAIR = {"rules", "devices", "wireguard"}
_COLOURS = {"ours": "#e8a317", "hand": "#6b7a8f", "swarm": "#3b7dd8", "bare": "#c9ced6"}


def write(root: Path, progress: Progress) -> None:
    """Make all of it from the samples that are there."""
    found = {where: figures_of(samples.read(root, where)) for where in WHERE}
    found = {where: figures for where, figures in found.items() if figures}
    folder = samples.folder(root)
    for where, content in found.items():
        (folder / f"{where}.json").write_text(json.dumps(content, indent=2) + "\n")
    text = "\n".join(markdown(where, content) for where, content in found.items())
    (folder / "results.md").write_text(text)
    measured = {where: content for where, content in found.items() if content.get("paths")}
    if measured:
        plot(measured, folder / "results.png")
    print(text)
    progress.say(f"figures, table and plot: {folder}")


def figures_of(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One value of all kinds of samples of a run."""
    result: dict[str, Any] = {}
    of_path = [sample for sample in found if sample["kind"] == "sample"]
    if of_path:
        result |= figures.summary(of_path)
    for kind in ("facts", "idle", "replay", "task_start", "fresh_link"):
        last = [sample for sample in found if sample["kind"] == kind]
        if last:
            result[kind] = {name: value for name, value in last[-1].items() if name != "kind"}
    revoked = [sample for sample in found if sample["kind"] == "revocation"]
    for what in dict.fromkeys(sample["what"] for sample in revoked):
        of_kind = [sample for sample in revoked if sample["what"] == what]
        names = [name for name in of_kind[0] if name.endswith("_s")]
        result.setdefault("revocation", {})[what] = {
            name: figures.durations([sample[name] for sample in of_kind]) for name in names
        }
    return result


# -- Markdown -----------------------------------------------------------------------------------------------------


def markdown(where: str, content: Figures) -> str:
    facts = content.get("facts", {})
    backend = facts.get("backend", "")
    lines = [f"## {WHERE[where]}" + (f": {backend} WireGuard" if backend else ""), ""]
    if facts:
        lines += [
            f"Linux {facts['kernel']}, {facts['processors']} processors ({facts['processor']}), "
            f"Docker {facts['engine']}, "
            f"WireGuard MTU {facts['wireguard_mtu']}, overlay MTU {facts['overlay_mtu']}, iperf3 {facts['iperf3']}. "
            f"Before the run the machine was busy with other work on "
            f"{content.get('idle', {}).get('busy_processors', 0):.2f} processors.",
            "",
        ]
    if content.get("paths"):
        lines += [*_table(content["paths"]), ""]
        lines += [f"* {TITLES[path]}: not measured, {why}." for path, why in facts.get("missing", {}).items()]
        lines += ["", *_goals(content["goals"]), ""]
    if "replay" in content:
        lines += [*_replay(content["replay"]), ""]
    if "revocation" in content:
        lines += [*_revocation(content["revocation"]), ""]
    return "\n".join(lines)


def _table(paths: Figures) -> list[str]:
    head = ("path", "TCP, 1 stream", "8 streams", "CPU s per GB", "UDP 64 B", "round trip", "p99", "connections")
    units = ("", "Mbit/s", "Mbit/s", "", "packets/s", "ms", "ms", "per s")
    rows = [head, units]
    for name, probes in sorted(paths.items(), key=lambda item: list(TITLES).index(item[0])):
        one, trip = probes.get("tcp_1", {}), probes.get("round_trip", {})
        rows.append(
            (
                TITLES[name],
                _number(one.get("median"), 1e6),
                _number(probes.get("tcp_8", {}).get("median"), 1e6),
                _number(one.get("cpu_s_per_gb")),
                _number(probes.get("udp_small", {}).get("median")),
                _number(trip.get("median_ms")),
                _number(trip.get("p99_ms")),
                _number(probes.get("connections", {}).get("median")),
            )
        )
    return [f"| {' | '.join(rows[0])} |", f"|{' --- |' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows[1:])]


def _number(value: float | None, unit: float = 1) -> str:
    if value is None:
        return "-"
    value /= unit
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _goals(goals: Sequence[Figures]) -> list[str]:
    lines = ["| comparison | ratio | 95 % interval | pairs | goal | |", "| --- | --- | --- | --- | --- | --- |"]
    for goal in goals:
        ratio = goal["ratio"]
        if ratio is None:
            continue
        said = {None: "", True: "met", False: "**not met**"}[goal["met"]]
        spread = f"{ratio['low']:.3f} to {ratio['high']:.3f}"
        lines.append(
            f"| {goal['name']} | {ratio['value']:.3f} | {spread} | {ratio['pairs']} | {_wanted(goal)} | {said} |"
        )
    return lines


def _wanted(goal: Figures) -> str:
    words = []
    if goal["at_least"] is not None:
        words.append(f"≥ {goal['at_least']}")
    if goal["at_most"] is not None:
        words.append(f"≤ {goal['at_most']}")
    if goal["low_at_least"] is not None:
        words.append(f"lower end ≥ {goal['low_at_least']}")
    return ", ".join(words)


def _replay(replay: Figures) -> list[str]:
    across = next(name for name in replay if name.endswith("_across_the_end"))
    of = across.split("_")[2]
    rows = (
        ("20 before", "answered_of_20_before"),
        (f"{of} across the end", across),
        ("20 after", "answered_of_20_after"),
        ("20 with the number set back", "answered_of_20_with_a_new_number"),
    )
    return [
        "| pings answered | Swarm's encrypted overlay | Hivewire link |",
        "| --- | --- | --- |",
        *(f"| of {name} | {replay[key]['sealed']} | {replay[key]['link']} |" for name, key in rows),
        "",
        f"The kernel refused {replay['refused_by_the_kernel']} packets for the sequence number of their state, "
        f"after {replay['packets_left']} that were left.",
    ]


def _revocation(revocation: Figures) -> list[str]:
    lines = ["| | runs | p50 | p99 | longest |", "| --- | --- | --- | --- | --- |"]
    names = {
        "last_packet_after_return_s": "last packet, seconds after the command came back",
        "last_packet_after_command_s": "last packet, seconds after the command was given",
        "open_after_return_s": "packets again on all nodes, seconds after the command came back",
    }
    for what, figures_of_it in revocation.items():
        for key, name in names.items():
            value = figures_of_it[key]
            lines.append(
                f"| {what}: {name} | {value['count']} | {value['p50']:.2f} | {value['p99']:.2f} | {value['max']:.2f} |"
            )
    return lines


# -- plot ---------------------------------------------------------------------------------------------------------


def plot(found: Mapping[str, Figures], file: Path) -> None:
    """Throughput, round trips and the claimed ratios: a row per machine."""
    figure, axes = plt.subplots(
        len(found), 3, figsize=(16, 5.2 * len(found)), squeeze=False, layout="constrained", width_ratios=(5, 5, 4)
    )
    for row, (where, content) in zip(axes, found.items(), strict=True):
        facts = content["facts"]
        _throughput(row[0], content)
        row[0].set_title(f"{WHERE[where]}: {facts['backend']} WireGuard", loc="left", fontweight="bold")
        _trips(row[1], content["paths"])
        _ratios(row[2], content["goals"])
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _throughput(axes: Axes, content: Figures) -> None:
    paths = content["paths"]
    shown = [name for name in TITLES if paths.get(name, {}).get("tcp_1", {}).get("median")]
    for number, name in enumerate(shown):
        found = {key: paths[name]["tcp_1"][key] / 1e6 for key in ("least", "median", "most")}
        axes.plot([found["least"], found["most"]], [number, number], color=_colour(name), linewidth=3, zorder=1)
        axes.scatter([found["median"]], [number], color=_colour(name), s=70, zorder=2)
        text = f"  {_number(found['median'])}"
        if name == "sealed":
            text += "".join(
                f" (link: {goal['ratio']['value']:.1f} times as much)"
                for goal in content["goals"]
                if (goal["path"], goal["against"]) == ("link", "sealed") and goal["ratio"]
            )
        axes.annotate(text, (found["most"], number), va="center", fontsize=9)
    axes.set_yticks(range(len(shown)), [TITLES[name] for name in shown])
    _logarithmic(axes)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * 3)
    axes.set_xlabel("TCP, one stream (Mbit/s), logarithmic: dot median, line least to most")
    _plain(axes)


def _trips(axes: Axes, paths: Figures) -> None:
    shown = [name for name in TITLES if paths.get(name, {}).get("round_trip", {}).get("median_ms")]
    for number, name in enumerate(shown):
        trip = paths[name]["round_trip"]
        axes.plot([trip["median_ms"], trip["p99_ms"]], [number, number], color=_colour(name), linewidth=3, zorder=1)
        axes.scatter([trip["median_ms"]], [number], color=_colour(name), s=70, zorder=2)
        axes.scatter([trip["p99_ms"]], [number], color=_colour(name), s=70, marker="|", linewidths=3, zorder=2)
    axes.set_yticks(range(len(shown)), [TITLES[name] for name in shown])
    _logarithmic(axes)
    axes.set_xlabel("round trip (ms), logarithmic: dot median, tick p99")
    _plain(axes)


def _logarithmic(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")  # of a range that is less than a decade, one would cover the other


def _ratios(axes: Axes, goals: Sequence[Figures]) -> None:
    # Those that should be near one; what is far away would press them together.
    shown = [goal for goal in goals if goal["ratio"] and 0.5 < (goal["at_least"] or goal["at_most"] or 0) < 1.2]
    for number, goal in enumerate(shown):
        ratio = goal["ratio"]
        colour = {True: "#2e8b57", False: "#c0392b", None: _COLOURS["hand"]}[goal["met"]]
        axes.plot([ratio["low"], ratio["high"]], [number, number], color=colour, linewidth=3)
        axes.scatter([ratio["value"]], [number], color=colour, s=60, zorder=2)
        wanted = goal["at_least"] if goal["at_least"] is not None else goal["at_most"]
        if wanted is not None:
            axes.scatter([wanted], [number], color="black", marker="|", s=260, zorder=3)
    axes.axvline(1, color="#d0d4da", linewidth=1, zorder=0)
    axes.set_yticks(range(len(shown)), [goal["name"].replace(" against ", "\nagainst ") for goal in shown], fontsize=9)
    axes.set_xlabel("ratio with 95 % interval; black: goal")
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.invert_yaxis()
    axes.grid(axis="x", color="#eceff3")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _colour(name: str) -> str:
    if name in _OURS:
        return _COLOURS["ours"]
    return _COLOURS["hand"] if name in _PAIR else _COLOURS["bare"] if name == "veth" else _COLOURS["swarm"]
