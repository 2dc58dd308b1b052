"""Which server pod is to be replaced rather than restarted in place. Pure.

A container that ends with a fatal CUDA error is restarted by the kubelet in the same pod, hence on the same GPU, which is what failed: an
error of memory (ECC) or of a link stays with the device until it is reset. A pod that is deleted is made anew by its Deployment, and gets
another GPU, on another node where this one has none. Each time the wait before the next replacement doubles, so that a defect of ours, or a
cluster whose last GPU is broken, ends as slowly as Kubernetes' own back-off.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from gantline_operator.conditions import Reason
from gantline_operator.pod_state import PodState

__all__ = ["Replacements", "choose_replacement"]

_FIRST = timedelta(seconds=10)
_CAP = timedelta(minutes=10)
_FORGOTTEN = timedelta(hours=1)
"""A device that failed an hour ago says nothing of one that fails now."""


@dataclass(frozen=True)
class Replacements:
    """Of one service: how many pods were replaced one after the other, and when the last one was."""

    count: int = 0
    last: datetime | None = None

    def due(self, now: datetime) -> datetime:
        """When the next pod may be replaced."""
        if self.last is None or now - self.last > _FORGOTTEN:
            return now
        return self.last + min(_CAP, _FIRST * 2 ** min(self.count - 1, 16))

    def after(self, now: datetime) -> Replacements:
        fresh = self.last is None or now - self.last > _FORGOTTEN
        return Replacements(1 if fresh else self.count + 1, now)


def choose_replacement(pods: Iterable[PodState]) -> PodState | None:
    """The pod whose GPU failed; of several the first by name, since each replacement has its turn."""
    broken = (pod for pod in pods if not pod.deleting and pod.trouble is not None and pod.trouble.reason is Reason.CUDA_ERROR)
    return min(broken, key=lambda pod: pod.name, default=None)
