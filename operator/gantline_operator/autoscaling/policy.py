"""What `spec.scaling` asks for, with every `auto` resolved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gantline_operator.resource import InferenceServiceSpec, ScalingSpec

__all__ = ["AUTO_TARGETS", "ControllerName", "MetricName", "Policy", "build_policy"]

ControllerName = Literal["Gantline", "HPA", "KEDA"]
MetricName = Literal["queue", "kvCache", "inflight"]

AUTO_TARGETS: dict[str, int] = {"queue": 4, "kvCache": 80, "inflight": 16}
_GPU_BATCH, _CPU_BATCH = 256, 32  # what engine.maxBatchSize: auto becomes, as docs/api.md says


@dataclass(frozen=True)
class Policy:
    controller: ControllerName = "Gantline"
    min: int = 1
    max: int = 1
    metric: MetricName = "queue"
    target: int = 4
    """queue: requests that may wait for each replica; inflight: requests of each replica; kvCache: percent of each replica's cache."""
    zero_after_s: float = 900.0
    down_after_s: float = 300.0
    """Load must have allowed fewer replicas for this long."""
    on_unknown: Literal["Hold", "Max"] = "Hold"
    max_batch: int = _GPU_BATCH
    """Requests that one engine runs at most at once."""
    up_after_s: float = 10.0
    """Load must have asked for more replicas for this long: a burst that one sample caught is over before a replica has started."""
    stale_after_s: float = 15.0
    """A sample that is older counts as unknown."""
    tolerance: float = 0.1
    """Share by which load may miss what the replicas are meant to carry before anything is changed."""

    @property
    def floor(self) -> int:
        """Fewest replicas, but for the step to zero."""
        return max(1, self.min)


def build_policy(spec: InferenceServiceSpec, *, max_batch: int | None = None, interval_s: float = 5.0) -> Policy | None:
    """None where the spec has no scaling. `max_batch` is the plan's; `interval_s` lies between two samples of a replica."""
    scaling: ScalingSpec | None = spec.scaling
    if scaling is None:
        return None
    auto_batch = _CPU_BATCH if spec.accelerator.resource == "cpu" else _GPU_BATCH
    return Policy(
        controller=scaling.controller,  # type: ignore[arg-type]
        min=scaling.min,
        max=scaling.max,
        metric=scaling.metric,  # type: ignore[arg-type]
        target=scaling.target if scaling.target is not None else AUTO_TARGETS[scaling.metric],
        zero_after_s=scaling.zero_after,
        down_after_s=scaling.down_after,
        on_unknown=scaling.on_unknown,  # type: ignore[arg-type]
        max_batch=max_batch or spec.engine.max_batch_size or auto_batch,
        up_after_s=2 * interval_s,
        stale_after_s=3 * interval_s,
    )
