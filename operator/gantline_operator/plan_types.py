"""What the planner answers: a `Plan`, or `Rejected`, both with every option that was turned down. `plan_status.py` writes them down."""

from __future__ import annotations

from dataclasses import dataclass

from gantline_runtime.config import EngineConfig
from gantline_runtime.sizing import MemoryEstimate

from gantline_operator.conditions import Reason

__all__ = ["Placement", "Plan", "Rejected", "Requirement", "StagePlan", "Turned"]


@dataclass(frozen=True)
class Requirement:
    """A label that a node must have, with one of `values`."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Placement:
    """Where a pod may run, and what it takes there."""

    image: str
    """Key of the runtime's images: cuda, cpu, rocm or ascend."""
    resource: str
    """The accelerators' resource; empty: none."""
    count: int
    """How many of it, 0 without."""
    node_labels: tuple[Requirement, ...]
    """All must hold, beside `spec.accelerator.nodeSelector`."""
    memory_bytes: int
    """Of the pod (host memory on GPU nodes): request and limit."""
    cpu_millis: int
    """Request; there is no limit."""
    waiting: bool
    """Too few are free now: the pods are created and wait. No part of what pods are made from."""
    tolerated: tuple[str, ...] = ()
    """Keys of taints that say `only pods with this resource`; tolerated with any value."""


@dataclass(frozen=True)
class StagePlan(Placement):
    """The placement of a stage's Job."""

    stage: str = ""
    disk_bytes: int = 0
    """Room that it needs in the cache volume."""


@dataclass(frozen=True)
class Turned:
    """An option that was turned down."""

    option: str
    reason: Reason
    message: str


@dataclass(frozen=True)
class Plan:
    """How one replica runs, and where."""

    inputs: str
    """Hash of what the decision depended on beside the cluster: another one means a new plan."""
    placement: Placement
    engine: EngineConfig
    """All that the runtime is started with."""
    product: str
    """The device's name; empty on a CPU."""
    precision: str
    """Of the weights as they are served: a dtype, or awq4."""
    quantize: bool
    """Whether a Job makes a quantized copy first."""
    memory: MemoryEstimate
    """Bytes of one GPU, or of one process on a CPU."""
    load_seconds: float
    """Predicted time from the container's start to ready, in whole seconds: a plan read back from the status is the same."""
    rejected: tuple[Turned, ...] = ()
    calibration: str = ""
    """What earlier starts measured, where `memory` and `load_seconds` go by it."""


@dataclass(frozen=True)
class Rejected:
    """No known shape of node serves the model. `reason` is that of the options that came furthest."""

    reason: Reason
    message: str
    cure: str
    rejected: tuple[Turned, ...] = ()
