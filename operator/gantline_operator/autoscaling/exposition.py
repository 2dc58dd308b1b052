"""From what replicas and gateways answer to samples and demand. None of it is trusted: what is not as it should be is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from gantline_operator.autoscaling.observation import Demand, Sample

__all__ = ["add_demands", "parse_demand", "parse_sample"]

_RUNNING, _WAITING = "gantline_num_requests_running", "gantline_num_requests_waiting"
_USAGE, _SERVED = "gantline_kv_cache_usage_perc", "gantline_prompt_tokens_total"
_NAMES = (_RUNNING, _WAITING, _USAGE, _SERVED)
_LINE = re.compile(rf"^({'|'.join(_NAMES)}) (\S+)", re.MULTILINE)
_MOST = 1e15
_MOST_SERVICES = 20_000


def parse_sample(text: str, at: float) -> Sample | None:
    """A replica's sample from Prometheus' text format; None where one of the four series is missing or no number."""
    values = {match[1]: _number(match[2]) for match in _LINE.finditer(text)}
    found = {name: value for name, value in values.items() if value is not None}
    if len(found) < len(_NAMES):
        return None
    return Sample(at, int(found[_RUNNING]), int(found[_WAITING]), min(1.0, found[_USAGE]), found[_SERVED])


def parse_demand(text: str) -> dict[str, Demand] | None:
    """What one gateway says of each service (`namespace/name`), as if it were the only one; None where the answer is not what was agreed.

    {"services": {"ns/name": {"held": 3, "held_since_s": 1.5, "running": 8, "last_request_age_s": 0.2}}}
    """
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        return None
    services = answer.get("services") if isinstance(answer, Mapping) else None
    if not isinstance(services, Mapping) or len(services) > _MOST_SERVICES:
        return None
    parsed = {key: _demand(value) for key, value in services.items()}
    return None if None in parsed.values() else {key: value for key, value in parsed.items() if value is not None}


def add_demands(answers: Iterable[Mapping[str, Demand] | None], service: str) -> Demand:
    """What all gateways together say of a service; None stands for one that did not answer. They list every service that they know: one
    that does not list it would not hold a request for it either, so nothing is known from that one."""
    asked = list(answers)
    known = [answer[service] for answer in asked if answer is not None and service in answer]
    quiet = [demand.quiet_s for demand in known if demand.quiet_s is not None]
    return Demand(
        held=sum(demand.held for demand in known),
        running=sum(demand.running for demand in known),
        quiet_s=min(quiet, default=None),
        complete=len(known) == len(asked),
        gateways=len(asked),
    )


def _demand(value: Any) -> Demand | None:
    if not isinstance(value, Mapping):
        return None
    held, running = _number(value.get("held", 0)), _number(value.get("running", 0))
    age = value.get("last_request_age_s")
    quiet = None if age is None else _number(age)
    if held is None or running is None or (age is not None and quiet is None):
        return None
    return Demand(held=int(held), running=int(running), quiet_s=quiet)


def _number(value: object) -> float | None:
    """A finite number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and 0 <= number <= _MOST else None
