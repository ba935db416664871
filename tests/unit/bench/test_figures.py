"""What is made of samples: pairs, intervals, goals."""

import pytest

from tests.bench import figures
from tests.bench.figures import Goal

LINK = Goal("link", "tcp_1", "link", "devices", at_least=0.99, low_at_least=0.97)


def tcp(number: int, path: str, bits_per_s: float) -> dict[str, object]:
    return {"round": number, "path": path, "probe": "tcp_1", "bits_per_s": bits_per_s, "cpu_s_per_gb": 1.0}


def pairs(*ratios: float) -> list[dict[str, object]]:
    """Rounds of very different speed, as on a machine with other work, each with this ratio."""
    found = []
    for number, ratio in enumerate(ratios):
        speed = 1e8 * (1 + 7 * (number % 3))
        found += [tcp(number, "devices", speed), tcp(number, "link", speed * ratio)]
    return found


def test_a_ratio_is_of_neighbours_so_that_slow_rounds_do_not_count_less() -> None:
    interval = figures.ratio(LINK, pairs(*[0.995] * 9))
    assert interval is not None
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.995, 0.995, 0.995))
    assert interval.pairs == 9


def test_twice_as_fast_and_half_as_fast_cancel_out_and_the_interval_shows_the_spread() -> None:
    interval = figures.ratio(LINK, pairs(2, 0.5, 2, 0.5, 2, 0.5))
    assert interval is not None
    assert interval.value == pytest.approx(1)
    assert interval.low < 0.8
    assert interval.high > 1.25


@pytest.mark.parametrize(
    ("ratios", "met"),
    [
        pytest.param([1.0] * 9, True, id="equal"),
        pytest.param([0.95] * 9, False, id="slower"),
        pytest.param([0.6, 1.7] * 4 + [0.99], False, id="on average, but nobody can tell"),
    ],
)
def test_a_goal_is_met_by_the_estimate_and_the_lower_end_together(ratios: list[float], met: bool) -> None:
    assert figures.judged(LINK, pairs(*ratios))["met"] is met


def test_a_goal_without_samples_is_neither_met_nor_missed() -> None:
    sealed = Goal("sealed", "tcp_1", "link", "sealed", at_least=1.5)
    assert figures.judged(sealed, pairs(1, 1, 1))["met"] is None


def test_a_round_in_which_one_side_failed_is_no_pair() -> None:
    samples = pairs(1, 1, 1, 1)
    samples[1] = {"round": 0, "path": "link", "probe": "tcp_1", "error": "no answer"}
    interval = figures.ratio(LINK, samples)
    assert interval is not None
    assert interval.pairs == 3
    assert figures.by_path(samples)["link"]["tcp_1"]["failed"] == 1


def test_round_trips_are_compared_by_the_p99_of_all_rounds() -> None:
    goal = Goal("p99", "round_trip", "link", "devices", at_most=1.05)
    usual, slow = [1.0] * 98, [2.0, 4.0]
    samples = []
    for number in range(5):
        samples.append({"round": number, "path": "devices", "probe": "round_trip", "ms": [*usual, *slow]})
        samples.append({"round": number, "path": "link", "probe": "round_trip", "ms": [*usual, 3.0, 4.0]})
    judged = figures.judged(goal, samples)
    assert judged["ratio"]["value"] == pytest.approx(1.5)
    assert judged["met"] is False


def test_the_percentile_is_a_value_that_was_seen() -> None:
    assert figures.percentile([3, 1, 2], 50) == 2
    assert figures.percentile(range(1, 101), 99) == 99
    assert figures.percentile([7], 99) == 7
