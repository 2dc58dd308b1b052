"""What `spec.scaling` asks for, with every `auto` resolved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gantline_operator.resource import InferenceServiceSpec, ScalingSpec

__all__ = ["ControllerName", "MetricName", "Policy", "build_policy"]

ControllerName = Literal["Gantline", "HPA", "KEDA"]
MetricName = Literal["queue", "kvCache", "inflight"]

_AUTO_TARGETS = {"queue": 4, "kvCache": 80}
_GPU_BATCH, _CPU_BATCH = 256, 32  # what engine.maxBatchSize: auto becomes, as docs/api.md says


@dataclass(frozen=True)
class Policy:
    controller: ControllerName = "Gantline"
    min: int = 1
    max: int = 1
    metric: MetricName = "inflight"
    target: int | None = None
    """inflight: requests of each replica; kvCache: percent of each replica's cache; queue: requests that may wait for each replica. None is
    auto: as `load.py` says."""
    zero_after_s: float = 900.0
    down_after_s: float = 300.0
    """Load must have allowed fewer replicas for this long."""
    on_unknown: Literal["Hold", "Max"] = "Hold"
    max_batch: int = _GPU_BATCH
    """Requests that one engine runs at most at once."""
    startup_s: float = 120.0
    """How long a replica takes from its pod's creation to ready."""
    mean_s: float = 60.0
    """Load is a mean over this long, but for what is more than chance."""
    stale_after_s: float = 15.0
    """A sample that is older counts as unknown."""
    tolerance: float = 0.15
    """Share by which load may miss what the replicas are meant to carry before anything is changed."""

    @property
    def target_or_auto(self) -> int:
        return self.target if self.target is not None else _AUTO_TARGETS[self.metric]

    @property
    def floor(self) -> int:
        """Fewest replicas, but for the step to zero."""
        return max(1, self.min)


def build_policy(
    spec: InferenceServiceSpec, *, max_batch: int | None = None, startup_s: float | None = None, interval_s: float = 5.0
) -> Policy | None:
    """None where the spec has no scaling. `max_batch` is the plan's, `startup_s` what a start took (None: not known yet); `interval_s` lies
    between two samples of a replica."""
    scaling: ScalingSpec | None = spec.scaling
    if scaling is None:
        return None
    auto_batch = _CPU_BATCH if spec.accelerator.resource == "cpu" else _GPU_BATCH
    return Policy(
        controller=scaling.controller,  # type: ignore[arg-type]
        min=scaling.min,
        max=scaling.max,
        metric=scaling.metric,  # type: ignore[arg-type]
        target=scaling.target,
        zero_after_s=scaling.zero_after,
        down_after_s=scaling.down_after,
        on_unknown=scaling.on_unknown,  # type: ignore[arg-type]
        max_batch=max_batch or spec.engine.max_batch_size or auto_batch,
        startup_s=startup_s if startup_s is not None else Policy.startup_s,
        mean_s=max(2 * interval_s, min(Policy.mean_s, 12 * interval_s)),
        stale_after_s=3 * interval_s,
    )
