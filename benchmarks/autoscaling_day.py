"""A simulated day: bursts, lulls, a night and an outage of metrics, replayed for Gantline's decisions and for plain HPAs.

    python -m benchmarks.autoscaling_day [--kind "working day"] [--hours 24] [--seeds 3] [--plot docs/autoscaling-day.svg]
    python -m benchmarks.autoscaling_day --kind all --seeds 1 --first 100

Gantline's rows run the very function that the operator runs (`autoscaling/decision.py`), every 5 s; the HPA rows run the documented
algorithm every 15 s (`hpa_algorithm.py`) on what people give it: utilization, which a busy GPU has at one request already, and the queue's
length, each at several targets. All meet the same requests, start-up times and outage. Prints tables for docs/perf-log.md: of one kind of
day all controllers, of all kinds the default beside the HPAs.

A request misses its objective where its first token comes more than 10 s after it. A flap is a change of replicas against the one before,
within 15 minutes of it.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from gantline_operator.autoscaling.decision import Memory, decide
from gantline_operator.autoscaling.observation import Demand, Observation, Replica, Sample
from gantline_operator.autoscaling.policy import Policy

from benchmarks.hpa_algorithm import PERIOD_S, PlainHPA
from benchmarks.plot import Series, draw_steps
from benchmarks.serving_model import BATCH, Fleet, Request

OBJECTIVE_S = 10.0
FLAP_S = 900.0
MOST = 8
DEFAULT = "Gantline, as it comes"
POLICY = Policy(min=0, max=MOST)
_EVERY_S = 5


@dataclass(frozen=True)
class Day:
    """What everybody meets. `rates` are requests a second, by the second."""

    first: int
    """The second of the day with which it begins."""
    arrivals: Sequence[Sequence[Request]]
    startup_s: Sequence[float]
    silent: Callable[[int, str], bool]
    """(second, replica) -> whether nobody gets its metrics."""


@dataclass
class Outcome:
    name: str
    requests: int = 0
    missed: int = 0
    gpu_hours: float = 0.0
    changes: int = 0
    flaps: int = 0
    replicas: list[int] = field(default_factory=list)
    """By the second."""


Controller = Callable[[int, Fleet, Day], int | None]
"""(second, fleet, day) -> replicas wanted; None: not asked now."""


def rate(second: int) -> float:
    """Requests a second at this time of the day: quiet until 7, a working day with a lull at noon, and five bursts."""
    hour = second / 3600 % 24
    day = 9.0 * max(0.0, math.sin((hour - 7) / 14 * math.pi)) if 7 <= hour <= 21 else 0.02 if hour > 22.5 or hour < 1 else 0.0
    lull = 0.35 if 12.2 <= hour <= 13.1 else 1.0
    bursts = ((8.5, 10, 7.0), (10.75, 6, 12.0), (15.0, 20, 8.0), (17.6, 4, 14.0), (23.0, 5, 4.0))
    return day * lull + sum(extra for start, minutes, extra in bursts if start <= hour < start + minutes / 60)


def steady(second: int) -> float:
    return 6.0


def one_spike(second: int) -> float:
    """Little all day, and ten times as much for a quarter of an hour."""
    return 15.0 if 13.0 <= second / 3600 % 24 < 13.25 else 1.5


def ramps(second: int) -> float:
    """Each hour from 1 to 12 within ten minutes, twenty minutes of that, and back within ten."""
    minute = second / 60 % 60
    return 1.0 + 11.0 * max(0.0, min(1.0, minute / 10, (40 - minute) / 10))


@dataclass(frozen=True)
class Kind:
    """What days of one kind have in common."""

    rate: Callable[[int], float] = rate
    startup_s: tuple[float, float] = (90.0, 150.0)
    tokens: float = 180.0
    """Of the median answer."""


KINDS = {
    "working day": Kind(),
    "starts of 30 s": Kind(startup_s=(20.0, 40.0)),
    "starts of 300 s": Kind(startup_s=(240.0, 360.0)),
    "long answers": Kind(lambda second: rate(second) / 3, tokens=540.0),
    "short answers": Kind(lambda second: rate(second) * 3, tokens=60.0),
    "steady": Kind(steady),
    "one spike": Kind(one_spike),
    "ramps": Kind(ramps),
}


def outage(second: int, replica: str) -> bool:
    """Nobody's metrics from 14:50 to 15:20, with a burst inside; half of the replicas' from 16:30 to 17:00."""
    hour = second / 3600 % 24
    return 14.83 <= hour < 15.33 or (16.5 <= hour < 17.0 and int(replica[1:]) % 2 == 0)


def build_day(hours: float, seed: int, *, start: float = 0.0, kind: Kind = KINDS["working day"]) -> Day:
    """`hours` from the hour `start` on."""
    rng = random.Random(seed)
    first = int(start * 3600)
    middle = math.log(kind.tokens)
    arrivals = []
    for second in range(first, first + int(hours * 3600)):
        count = _poisson(rng, kind.rate(second))
        arrivals.append([Request(second, max(8, min(2000, int(rng.lognormvariate(middle, 0.8))))) for _ in range(count)])
    return Day(first, arrivals, [rng.uniform(*kind.startup_s) for _ in range(97)], outage)


def _poisson(rng: random.Random, mean: float) -> int:
    count, product, limit = 0, rng.random(), math.exp(-mean)
    while product > limit:
        count, product = count + 1, product * rng.random()
    return count


# ---- controllers ---------------------------------------------------------------------------------------------------------------------


def gantline(policy: Policy) -> Controller:
    """The operator's own decision, with its samples and their age."""
    memory = Memory()
    samples: dict[str, Sample] = {}

    def control(second: int, fleet: Fleet, day: Day) -> int | None:
        nonlocal memory
        told = replace(policy, startup_s=day.startup_s[0])  # as status.startup has it, of the first pod
        if second % (1 if fleet.current == 0 else _EVERY_S):
            return None
        ready = {replica.name for replica in fleet.ready(second)}
        for item in fleet.replicas:
            if item.name in ready and not day.silent(second, item.name):
                samples[item.name] = Sample(second, item.running, len(item.queue), item.running / BATCH, item.served)
        pods = tuple(Replica(item.name, item.name in ready, samples.get(item.name)) for item in fleet.replicas if not item.going)
        demand = Demand(held=len(fleet.held), running=sum(item.requests for item in fleet.replicas), quiet_s=fleet.quiet_s(second))
        decision, memory = decide(told, Observation(second, fleet.current, pods, demand), memory)
        return decision.replicas

    return control


def plain_hpa(target: float, value: Callable[[int, int], float]) -> Controller:
    """An HPA on `value(running, waiting)` of each replica."""
    algorithm = PlainHPA(target, low=1, high=MOST)

    def control(second: int, fleet: Fleet, day: Day) -> int | None:
        if second % PERIOD_S:
            return None
        ready = fleet.ready(second)
        values = [None if day.silent(second, item.name) else value(item.running, len(item.queue)) for item in ready]
        return algorithm.decide(second, fleet.current, values, fleet.current - len(ready))

    return control


def utilization(running: int, waiting: int) -> float:
    """Of a GPU, as its counters tell: a decode step for one request keeps it half busy."""
    return min(1.0, 0.5 + 0.5 * running / BATCH) if running else 0.0


def queue_length(running: int, waiting: int) -> float:
    return float(waiting)


def controllers() -> Iterator[tuple[str, Callable[[], Controller]]]:
    yield DEFAULT, lambda: gantline(POLICY)
    yield "Gantline, min 1", lambda: gantline(replace(POLICY, min=1))
    for target in (12, 16, 24):
        yield f"Gantline, target {target}", lambda target=target: gantline(replace(POLICY, target=target))
    yield "Gantline, queue", lambda: gantline(replace(POLICY, metric="queue"))
    for percent in (60, 70, 80, 90):
        yield f"HPA, utilization {percent} %", lambda target=percent / 100: plain_hpa(target, utilization)
    for length in (1, 4, 8):
        yield f"HPA, queue of {length}", lambda target=length: plain_hpa(target, queue_length)


# ---- the day -------------------------------------------------------------------------------------------------------------------------


def replay(name: str, control: Controller, day: Day) -> Outcome:
    fleet = Fleet(day.startup_s, replicas=1)
    outcome = Outcome(name)
    last: tuple[int, int] = (-int(FLAP_S), 0)  # when replicas changed, and in which direction
    for second, arrivals in enumerate(day.arrivals, day.first):
        fleet.step(second, arrivals)
        before, wanted = fleet.current, control(second, fleet, day)
        if wanted is not None and wanted != before:
            direction = 1 if wanted > before else -1
            outcome.changes += 1
            outcome.flaps += direction == -last[1] and second - last[0] < FLAP_S
            last = (second, direction)
            fleet.scale(second, wanted, least_loaded=name.startswith("Gantline"))
        outcome.replicas.append(fleet.current)
    outcome.requests = sum(len(arrivals) for arrivals in day.arrivals)
    in_time = sum(seconds <= OBJECTIVE_S for _, seconds in fleet.first_tokens)
    # What waits when the day ends is no miss yet, unless it has waited for too long already.
    waiting = [request for item in fleet.replicas for request in item.queue] + list(fleet.held)
    in_time += sum(day.first + len(day.arrivals) - request.at <= OBJECTIVE_S for request in waiting)
    outcome.missed = outcome.requests - in_time
    outcome.gpu_hours = fleet.gpu_seconds / 3600
    return outcome


def compare(hours: float, seeds: Sequence[int], kind: Kind) -> list[list[Outcome]]:
    """Outcomes of every controller, a list a seed."""
    days = [build_day(hours, seed, kind=kind) for seed in seeds]
    return [[replay(name, make(), day) for name, make in controllers()] for day in days]


def unbeaten(outcomes: Sequence[Outcome], ours: Sequence[Outcome]) -> list[str]:
    """HPAs that none of `ours` beats: with fewer misses at no more GPU-hours."""
    return [
        item.name
        for item in outcomes
        if item.name.startswith("HPA") and not any(own.missed < item.missed and own.gpu_hours <= item.gpu_hours for own in ours)
    ]


def mean(rows: Sequence[Outcome]) -> Outcome:
    """Of one controller's days."""
    count = len(rows)
    missed, gpu_hours = sum(row.missed for row in rows) // count, sum(row.gpu_hours for row in rows) / count
    return Outcome(rows[0].name, sum(row.requests for row in rows) // count, missed, gpu_hours)


def table(outcomes: Sequence[Sequence[Outcome]]) -> str:
    lines = ["| controller | missed (of all) | GPU-hours | changes | flaps |", "|---|---|---|---|---|"]
    for rows in zip(*outcomes, strict=True):
        count = len(rows)
        missed, requests = sum(row.missed for row in rows), sum(row.requests for row in rows)
        hours = sum(row.gpu_hours for row in rows) / count
        changes, flaps = (sum(getattr(row, key) for row in rows) / count for key in ("changes", "flaps"))
        share = missed / max(1, requests)
        lines.append(f"| {rows[0].name} | {missed / count:.0f} ({share:.2%}) | {hours:.1f} | {changes:.0f} | {flaps:.0f} |")
    return "\n".join(lines)


def summary(kind: str, outcomes: Sequence[Sequence[Outcome]]) -> str:
    """One row of the table over all kinds: the default and HPAs, and which of those it beats."""
    means = [mean(rows) for rows in zip(*outcomes, strict=True)]
    shown = [item for item in means if item.name.startswith("HPA") or item.name == DEFAULT]
    cells = [f"{item.missed / max(1, item.requests):.2%} at {item.gpu_hours:.0f}" for item in shown]
    ours = [item for item in means if item.name.startswith("Gantline")]
    return f"| {kind} | {' | '.join(cells)} | {_names(unbeaten(means, ours[:1]))} | {_names(unbeaten(means, ours))} |"


def _names(found: Sequence[str]) -> str:
    return ", ".join(name.removeprefix("HPA, ") for name in found) or "none"


def plot(outcomes: Sequence[Outcome], hours: float) -> str:
    """Replicas through the day, and the load in requests a second, as SVG."""
    step = 120
    shown = {DEFAULT: "#0b6e4f", "HPA, utilization 80 %": "#c1440e", "HPA, queue of 4": "#3a5a9b"}
    series = [Series(item.name, shown[item.name], item.replicas[::step]) for item in outcomes if item.name in shown]
    load = [sum(rate(second) for second in range(at, at + step)) / step for at in range(0, int(hours * 3600), step)]
    return draw_steps("Replicas on a simulated day", series, background=("requests/s", load), hours=hours, most=MOST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=[*KINDS, "all"], default="working day", help="kind of day (default: working day)")
    parser.add_argument("--hours", type=float, default=24.0, help="length of the day, from midnight (default: 24)")
    parser.add_argument("--seeds", type=int, default=3, help="days to replay; the table has their means (default: 3)")
    parser.add_argument("--first", type=int, default=0, help="seed of the first (default: 0)")
    parser.add_argument("--plot", type=Path, help="write the first day's replicas there, as SVG")
    options = parser.parse_args()
    seeds = range(options.first, options.first + options.seeds)
    if options.kind == "all":
        for kind in KINDS:
            print(summary(kind, compare(options.hours, seeds, KINDS[kind])), flush=True)
        return
    outcomes = compare(options.hours, seeds, KINDS[options.kind])
    print(table(outcomes))
    for seed, rows in zip(seeds, outcomes, strict=True):
        ours = [item for item in rows if item.name.startswith("Gantline")]
        print(f"day {seed}: HPAs not beaten by the default: {_names(unbeaten(rows, ours[:1]))}; by any row: {_names(unbeaten(rows, ours))}")
    if options.plot:
        options.plot.write_text(plot(outcomes[0], options.hours))


if __name__ == "__main__":
    main()
