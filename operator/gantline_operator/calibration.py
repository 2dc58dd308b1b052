"""What models turned out to take, so that the next plan promises what the last one needed. Pure.

The formula of `sizing.py` knows a model by its shape. Beside weights and cache it can only estimate: what the driver and libraries hold
(`context`), what steps need at most (`workspace`), and how long a start takes. Servers measure these, and a measurement of the same model
on the same device in the same precision replaces the estimate, within bounds: a wild one must not make plans absurd, and a start that found
the files in memory must not make probes impatient with one that does not.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

__all__ = ["Calibration", "Measurement", "PodReport", "key_of", "measure", "parse", "read_report", "render"]

PARTS = ("workspace", "context")

MARGIN = 1.05
"""Over what was measured: the next start may need a little more."""
LEAST, MOST = 0.7, 2.0
"""Bounds of measured over estimated bytes."""
LOAD_MARGIN, LOAD_BOUND = 1.25, 3.0
"""Over the seconds that were measured, and how far from the estimate at most: a container is given up after three times the prediction, so
that a third of the estimate still allows for the whole of it."""

MAX_ENTRIES = 512
_MAX_TEXT = 512 << 10


@dataclass(frozen=True)
class PodReport:
    """What a server's /metrics say of its start. Seconds by phase; bytes of one device by part, as estimated and as taken."""

    phases: Mapping[str, float] = field(default_factory=dict)
    promised: Mapping[str, float] = field(default_factory=dict)
    reserved: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """Of one model on one sort of device in one precision: the largest seen of each, as a share of the estimate."""

    ratios: Mapping[str, float] = field(default_factory=dict)
    """Bytes taken over bytes estimated, by part."""
    load_s: float = 0.0
    """From the container's start to ready."""
    starts: int = 1
    seen: str = ""
    """When it was last measured, as metav1.Time."""


@dataclass(frozen=True)
class Calibration:
    """All measurements, by `key_of`."""

    known: Mapping[str, Measurement] = field(default_factory=dict)

    def of(self, key: str) -> Measurement | None:
        return self.known.get(key)

    def noted(self, key: str, measured: Measurement) -> Calibration:
        """With one more start; of many, those measured longest ago are forgotten."""
        before = self.known.get(key)
        merged = _merge(before, measured) if before is not None else measured
        known = {name: item for name, item in self.known.items() if name != key} | {key: merged}
        return Calibration(dict(sorted(known.items(), key=lambda item: item[1].seen)[-MAX_ENTRIES:]))


def _merge(before: Measurement, now: Measurement) -> Measurement:
    """A new measurement counts half, so that a changed driver or release is learnt in a few starts; but more than before counts at once."""
    ratios = {part: _blend(before.ratios.get(part), now.ratios.get(part)) for part in {*before.ratios, *now.ratios}}
    return Measurement(ratios, _blend(before.load_s, now.load_s), min(before.starts + 1, 1 << 20), now.seen)


def _blend(before: float | None, now: float | None) -> float:
    if not before or not now:
        return now or before or 0.0
    return max(now, (before + now) / 2)


def key_of(fingerprint: str, product: str, tp: int, precision: str, dtype: str) -> str:
    """`product` is empty on a CPU."""
    return "/".join((fingerprint[-24:], product or "cpu", str(tp), precision, dtype))


def measure(report: PodReport, load_s: float, now: str) -> Measurement:
    ratios = {
        part: report.reserved[part] / report.promised[part]
        for part in PARTS
        if report.reserved.get(part, 0) > 0 and report.promised.get(part, 0) > 0
    }
    return Measurement(ratios, load_s, 1, now)


def bounded_ratio(measured: Measurement, part: str) -> float:
    """By what an estimate of this part is multiplied; 1 where nothing was measured."""
    ratio = measured.ratios.get(part)
    return 1.0 if ratio is None else min(max(ratio * MARGIN, LEAST), MOST)


def bounded_load_s(measured: Measurement | None, estimated_s: float) -> float:
    if measured is None or measured.load_s <= 0:
        return estimated_s
    return float(math.ceil(min(max(measured.load_s * LOAD_MARGIN, estimated_s / LOAD_BOUND), estimated_s * LOAD_BOUND)))


# ---- a server's /metrics -----------------------------------------------------------------------------------------------------------------

_LINE = re.compile(r'gantline_(startup_seconds|memory_promised_bytes|memory_reserved_bytes)\{(?:phase|part)="([a-z_-]{1,32})"\} (\S{1,32})')
_MOST_SERIES = 16


def read_report(text: str) -> PodReport:
    """From Prometheus' text format, which is a container's: what is no number of its range is left out."""
    found: dict[str, dict[str, float]] = {}
    for line in text.splitlines():
        match = _LINE.fullmatch(line)
        value = _number(match[3]) if match else None
        if match and value is not None and len(found.setdefault(match[1], {})) < _MOST_SERIES:
            found[match[1]][match[2]] = value
    names = ("startup_seconds", "memory_promised_bytes", "memory_reserved_bytes")
    phases, promised, reserved = (found.get(name, {}) for name in names)
    return PodReport(phases, promised, reserved)


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (ValueError, TypeError):
        return None
    return number if math.isfinite(number) and 0 <= number < 1e15 else None


# ---- the ConfigMap -----------------------------------------------------------------------------------------------------------------------


def render(calibration: Calibration) -> str:
    return json.dumps({key: _values(item) for key, item in calibration.known.items()}, separators=(",", ":"), sort_keys=True)


def _values(item: Measurement) -> dict[str, Any]:
    ratios = {part: round(ratio, 4) for part, ratio in sorted(item.ratios.items())}
    return {"ratios": ratios, "loadSeconds": round(item.load_s, 1), "starts": item.starts, "seen": item.seen}


def parse(text: str | None) -> Calibration:
    """What cannot be read is not known: plans go by the formula then."""
    if not text or len(text) > _MAX_TEXT:
        return Calibration()
    try:
        rows = json.loads(text).items()
    except (ValueError, AttributeError):
        return Calibration()
    return Calibration(dict(_readable(rows)))


def _readable(rows: Iterable[tuple[str, Any]]) -> Iterable[tuple[str, Measurement]]:
    for key, item in list(rows)[:MAX_ENTRIES]:
        try:
            numbers = {part: _number(item["ratios"][part]) for part in PARTS if part in item["ratios"]}
            ratios = {part: number for part, number in numbers.items() if number}
            seen, starts = str(item["seen"])[:32], int(item["starts"])
            yield key[:256], Measurement(ratios, _number(item["loadSeconds"]) or 0.0, starts, seen)
        except (KeyError, TypeError, ValueError, AttributeError):
            continue


def later(first: Calibration, second: Calibration) -> Calibration:
    """Both together; of a key that both have, the one measured last."""
    known = dict(first.known)
    for key, item in second.known.items():
        if key not in known or item.seen >= known[key].seen:
            known[key] = item
    return replace(first, known=dict(sorted(known.items(), key=lambda item: item[1].seen)[-MAX_ENTRIES:]))
