"""From samples to figures: medians, ratios of pairs with their intervals, goals. Pure.

A ratio is always of neighbours: two samples of one round, taken one after the other. What the machine does besides
changes from one minute to the next by more than the paths differ, and mostly cancels out of a pair.
"""

import math
import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Sample = Mapping[str, Any]

VALUES = {
    "tcp_1": "bits_per_s",
    "tcp_8": "bits_per_s",
    "udp_small": "packets_per_s",
    "connections": "connections_per_s",
}
"""What each probe is compared by; round trips are many values per sample, and have figures of their own."""

_RESAMPLES = 5000
_SEED = 20  # any: the same samples shall give the same interval
_TAIL = 0.025


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and the two ends of its 95 % interval."""

    value: float
    low: float
    high: float
    pairs: int


@dataclass(frozen=True, slots=True)
class Goal:
    """What is claimed of the ratio of two paths. None: there is no such claim, only a figure."""

    name: str
    probe: str
    path: str
    against: str
    at_least: float | None = None
    at_most: float | None = None
    low_at_least: float | None = None
    """For the lower end of the interval."""
    value: str = ""
    """Another value of the sample than the probe's own."""


GOALS = (
    Goal("link against devices made by hand", "tcp_1", "link", "devices", at_least=0.99, low_at_least=0.97),
    Goal("processor time per GB, link against devices", "tcp_1", "link", "devices", value="cpu_s_per_gb"),
    Goal("p99 round trip of link against devices", "round_trip", "link", "devices", at_most=1.05),
    Goal("VIP against direct", "tcp_1", "vip", "link", at_least=0.97),
    Goal("rules against none, same devices", "tcp_1", "rules", "devices", at_least=0.97),
    Goal("link against Swarm's encrypted overlay", "tcp_1", "link", "sealed", at_least=1.5),
    Goal("link against Swarm's plain overlay", "tcp_1", "link", "overlay"),
    Goal("guarded network, mode off, against an unknown one", "tcp_1", "off", "overlay"),
    Goal("VIP against direct, new connections", "connections", "vip", "link"),
    Goal("VIP against Swarm's VIP, new connections", "connections", "vip", "overlay_vip"),
)


def summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """Figures of every path, and of every goal that these samples say something about."""
    return {"paths": by_path(samples), "goals": [judged(goal, samples) for goal in GOALS]}


def by_path(samples: Sequence[Sample]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for path in dict.fromkeys(sample["path"] for sample in samples):
        figures: dict[str, Any] = {}
        for probe in dict.fromkeys(s["probe"] for s in samples if s["path"] == path):
            good = [s for s in samples if (s["path"], s["probe"]) == (path, probe) and "error" not in s]
            figures[probe] = _of_probe(probe, good)
            figures[probe]["failed"] = sum("error" in s for s in samples if (s["path"], s["probe"]) == (path, probe))
        found[path] = figures
    return found


def _of_probe(probe: str, good: Sequence[Sample]) -> dict[str, Any]:
    if not good:
        return {"count": 0}
    if probe == "round_trip":
        times = [time for sample in good for time in sample["ms"]]
        return {"count": len(times), "median_ms": statistics.median(times), "p99_ms": percentile(times, 99)}
    values = [sample[VALUES[probe]] for sample in good]
    figures = {"count": len(values), "median": statistics.median(values), "least": min(values), "most": max(values)}
    spent = [s["cpu_s_per_gb"] for s in good if s.get("cpu_s_per_gb") is not None]
    if spent:
        figures["cpu_s_per_gb"] = statistics.median(spent)
    return figures


def judged(goal: Goal, samples: Sequence[Sample]) -> dict[str, Any]:
    """The goal with what was measured; ``met`` is None where nothing is claimed, or nothing was measured."""
    interval = ratio(goal, samples)
    result = asdict(goal) | {"ratio": None if interval is None else asdict(interval)}
    checks: list[bool] = []
    if interval is not None:
        checks += [interval.value >= goal.at_least] if goal.at_least is not None else []
        checks += [interval.value <= goal.at_most] if goal.at_most is not None else []
        checks += [interval.low >= goal.low_at_least] if goal.low_at_least is not None else []
    return result | {"met": all(checks) if checks else None}


def ratio(goal: Goal, samples: Sequence[Sample]) -> Interval | None:
    """The ratio over all rounds that have both paths, by resampling rounds. None without at least three."""
    rounds = _pairs(goal, samples)
    if len(rounds) < 3:
        return None
    estimate = _ratio_of_p99 if goal.probe == "round_trip" else _mean_ratio
    dice = random.Random(_SEED)  # noqa: S311 - resampling, not secrets
    drawn = sorted(estimate(dice.choices(rounds, k=len(rounds))) for _ in range(_RESAMPLES))
    ends = (drawn[int(_TAIL * _RESAMPLES)], drawn[int((1 - _TAIL) * _RESAMPLES) - 1])
    return Interval(estimate(rounds), *ends, len(rounds))


def _pairs(goal: Goal, samples: Sequence[Sample]) -> list[tuple[Any, Any]]:
    wanted = goal.value or VALUES.get(goal.probe, "ms")
    found: dict[int, dict[str, Any]] = {}
    for sample in samples:
        if sample["probe"] == goal.probe and sample.get(wanted):
            found.setdefault(sample["round"], {})[sample["path"]] = sample[wanted]
    return [
        (each[goal.path], each[goal.against]) for each in found.values() if {goal.path, goal.against} <= each.keys()
    ]


def _mean_ratio(rounds: Sequence[tuple[float, float]]) -> float:
    """The geometric mean, for which twice as fast and half as fast cancel out."""
    return math.exp(statistics.fmean(math.log(a / b) for a, b in rounds))


def _ratio_of_p99(rounds: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float:
    ours = [time for a, _ in rounds for time in a]
    theirs = [time for _, b in rounds for time in b]
    return percentile(ours, 99) / percentile(theirs, 99)


def percentile(values: Iterable[float], percent: float) -> float:
    """The least value that at least so many percent are not above."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def durations(values: Sequence[float]) -> dict[str, float]:
    """Of times that something took."""
    if not values:
        return {"count": 0}
    at = {name: percentile(values, percent) for name, percent in (("p50", 50), ("p99", 99))}
    return {"count": len(values), **{name: round(value, 4) for name, value in at.items()}, "max": round(max(values), 4)}
