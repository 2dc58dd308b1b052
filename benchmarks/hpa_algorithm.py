"""What Kubernetes' documentation says that a HorizontalPodAutoscaler does, with its defaults; written to be compared with, from
https://kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale/ (algorithm details, configurable scaling behavior).

    every 15 s    desired = ceil(replicas * value / target), within a tolerance of 10 % nothing
    missing       a pod without a value counts as at its target when that would shrink, as 0 when it would grow; none at all: nothing
    starting      counts as 0 when it would grow
    up            at most double, or 4 more, in 15 s
    down          to the largest of the last 5 minutes' recommendations
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

__all__ = ["PERIOD_S", "PlainHPA"]

PERIOD_S = 15
_TOLERANCE = 0.1
_WINDOW_S = 300


class PlainHPA:
    def __init__(self, target: float, *, low: int, high: int) -> None:
        self._target, self._low, self._high = target, low, high
        self._recommended: deque[tuple[float, int]] = deque()

    def decide(self, now: float, current: int, values: Sequence[float | None], starting: int) -> int:
        """`values` of ready pods, None where missing; `starting` further pods are not ready."""
        desired = self._recommend(current, values, starting)
        self._recommended.append((now, desired))
        while now - self._recommended[0][0] >= _WINDOW_S:
            self._recommended.popleft()
        if desired < current:
            desired = min(current, max(value for _, value in self._recommended))
        desired = min(desired, max(2 * current, current + 4))
        return min(self._high, max(self._low, desired))

    def _recommend(self, current: int, values: Sequence[float | None], starting: int) -> int:
        known = [value for value in values if value is not None]
        if not known:
            return current
        missing = len(values) - len(known)
        ratio = sum(known) / len(known) / self._target
        if not missing and (not starting or ratio <= 1):
            return current if abs(ratio - 1) <= _TOLERANCE else math.ceil(ratio * len(known))
        assumed = [0.0 if ratio > 1 else self._target] * missing + ([0.0] * starting if ratio > 1 else [])
        counted = known + assumed
        again = sum(counted) / len(counted) / self._target
        if abs(again - 1) <= _TOLERANCE or (ratio > 1) != (again > 1):
            return current
        wanted = math.ceil(again * len(counted))
        return current if (again > 1) != (wanted > current) else wanted
