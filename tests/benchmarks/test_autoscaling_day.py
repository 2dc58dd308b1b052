"""The simulated day, cut short: what docs/perf-log.md says of it, and what it is made of."""

from __future__ import annotations

import pytest

from benchmarks.autoscaling_day import DEFAULT, build_day, controllers, replay, unbeaten
from benchmarks.hpa_algorithm import PlainHPA

NAMES = (DEFAULT, "HPA, utilization 60 %", "HPA, queue of 4")


def test_gantline_misses_less_at_no_more_gpu_hours() -> None:
    day = build_day(8.0, seed=1, start=14.0)  # a burst while nobody's metrics are known, another one, and the evening
    makers = dict(controllers())
    outcomes = [replay(name, makers[name](), day) for name in NAMES]
    assert unbeaten(outcomes, outcomes[:1]) == [], [(item.name, item.missed, item.gpu_hours) for item in outcomes]
    assert len({item.requests for item in outcomes}) == 1 and outcomes[0].requests > 50_000


@pytest.mark.parametrize(
    ("values", "starting", "wanted"),
    [
        ([0.8, 0.8], 0, 2),
        ([1.6, 1.6], 0, 4),
        ([0.82, 0.85], 0, 2),  # within the tolerance
        ([0.2, 0.2, 0.2, 0.2], 0, 1),
        ([0.2, 0.2, None, None], 0, 3),  # missing ones count as at their target
        ([1.6, None], 0, 2),  # and as 0 when it would grow
        ([1.6], 1, 2),  # so does one that is starting
        ([None, None], 0, 2),
    ],
)
def test_the_plain_autoscaler_counts_as_documented(values: list[float | None], starting: int, wanted: int) -> None:
    current = len(values) + starting
    assert PlainHPA(0.8, low=1, high=100).decide(0.0, current, values, starting) == wanted


def test_the_plain_autoscaler_looks_back_before_it_shrinks() -> None:
    algorithm = PlainHPA(0.8, low=1, high=100)
    wanted = [algorithm.decide(float(second), 4, [0.8 if second < 60 else 0.1] * 4, 0) for second in range(0, 400, 15)]
    assert wanted[:23] == [4] * 23 and wanted[-1] == 1, "its last recommendation of four is of second 45"
