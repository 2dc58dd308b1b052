"""The closed vocabulary of a service's status: condition types, reasons, events, and the condition itself.

Every reason that can stand in a condition, in `status.plan.rejected` or in an event is a member of `Reason`; docs/operations.md has a
line of cure for each, and a test holds the two together. Reasons that containers of ours report are those of `termination.Reason`,
under the same names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

__all__ = ["Condition", "ConditionType", "EventReason", "Reason", "Status", "from_termination", "unique"]

Status = Literal["True", "False", "Unknown"]


class ConditionType(StrEnum):
    """Condition types, in the order in which `kubectl describe` should show them. One that does not apply is absent, not False."""

    READY = "Ready"
    """Summary: the revision that the spec asks for serves with all its replicas. Its reason is the first thing that stands in the way."""
    SERVABLE = "Servable"
    """Some replica of some revision answers; stays True through a failed update."""
    PLAN_RESOLVED = "PlanResolved"
    """A shape of node is known on which the model fits. Capacity is `Scheduled`'s matter."""
    MODEL_READY = "ModelReady"
    """The source was inspected (and fetched, where it is remote)."""
    QUANTIZATION_READY = "QuantizationReady"
    """The quantized artefact is there and within its quality limit. Absent where nothing is to be quantized."""
    SCHEDULED = "Scheduled"
    """Every pod that should run has a node."""
    SCALING_READY = "ScalingReady"
    """Replicas follow the load. Absent where the spec has no scaling."""
    PROGRESSING = "Progressing"
    """Work is under way that will end by itself."""
    DEGRADED = "Degraded"
    """Something failed that an operator of the cluster should look at. Absent while nothing did."""


class Reason(StrEnum):
    """Why a condition has its status. CamelCase, stable: people alert on them."""

    # what is as it should be
    READY = "Ready"
    AVAILABLE = "Available"
    PLANNED = "Planned"
    INSPECTED = "Inspected"
    FETCHED = "Fetched"
    QUANTIZED = "Quantized"
    SCHEDULED = "Scheduled"
    COMPLETE = "Complete"
    SCALING_ACTIVE = "ScalingActive"
    SUSPENDED = "Suspended"
    PAUSED = "Paused"
    SCALED_TO_ZERO = "ScaledToZero"

    # what is under way
    INSPECTING = "Inspecting"
    FETCHING = "Fetching"
    QUANTIZING = "Quantizing"
    EVICTING = "Evicting"
    WAITING_FOR_MODEL = "WaitingForModel"
    WAITING_FOR_CAPACITY = "WaitingForCapacity"
    WAITING_FOR_VOLUME = "WaitingForVolume"
    RETRYING = "Retrying"
    ROLLED_BACK = "RolledBack"
    ROLLING_OUT = "RollingOut"
    STARTING = "Starting"
    NOT_AVAILABLE = "NotAvailable"

    # replicas by load
    METRICS_UNKNOWN = "MetricsUnknown"
    GATEWAY_MISSING = "GatewayMissing"
    CUSTOM_METRICS_MISSING = "CustomMetricsMissing"
    HANDING_OVER = "HandingOver"

    # the plan
    INVALID_SPEC = "InvalidSpec"
    NO_MATCHING_GPU = "NoMatchingGPU"
    NO_MATCHING_NODE = "NoMatchingNode"
    NOT_PREFERRED = "NotPreferred"
    INSUFFICIENT_FREE_GPU = "InsufficientFreeGPU"
    MODEL_TOO_LARGE = "ModelTooLarge"
    NEEDS_SEVERAL_NODES = "NeedsSeveralNodes"
    ILLEGAL_TENSOR_PARALLEL = "IllegalTensorParallel"
    UNSUPPORTED_GPU = "UnsupportedGPU"
    GPU_LABELS_MISSING = "GPULabelsMissing"
    NO_RUNTIME_IMAGE = "NoRuntimeImage"
    CACHE_NOT_SHAREABLE = "CacheNotShareable"
    SOURCE_NOT_SHAREABLE = "SourceNotShareable"
    CACHE_MISSING = "CacheMissing"
    IMAGE_VOLUME_UNAVAILABLE = "ImageVolumeUnavailable"

    # what containers of ours report (termination.Reason)
    MODEL_NOT_FOUND = "ModelNotFound"
    NOT_A_MODEL = "NotAModel"
    UNSUPPORTED_ARCHITECTURE = "UnsupportedArchitecture"
    INVALID_CHECKPOINT = "InvalidCheckpoint"
    UNSAFE_WEIGHTS = "UnsafeWeights"
    INVALID_QUANTIZATION = "InvalidQuantization"
    DOWNLOAD_UNAUTHORIZED = "DownloadUnauthorized"
    DOWNLOAD_RATE_LIMITED = "DownloadRateLimited"
    DOWNLOAD_STALLED = "DownloadStalled"
    DISK_FULL = "DiskFull"
    QUANTIZATION_FAILED = "QuantizationFailed"
    QUALITY_GATE_FAILED = "QualityGateFailed"
    INVALID_CONFIGURATION = "InvalidConfiguration"
    OUT_OF_MEMORY = "OutOfMemory"
    CUDA_OUT_OF_MEMORY = "CudaOutOfMemory"
    CUDA_ERROR = "CudaError"
    DRIVER_TOO_OLD = "DriverTooOld"
    SMOKE_REQUEST_FAILED = "SmokeRequestFailed"
    INTERNAL_ERROR = "InternalError"

    # what the cluster reports about pods
    IMAGE_PULL_FAILED = "ImagePullFailed"
    ENGINE_CRASH_LOOP = "EngineCrashLoop"
    PROBE_TIMEOUT = "ProbeTimeout"
    CONTAINER_FAILED = "ContainerFailed"
    POD_EVICTED = "PodEvicted"
    POD_KILLED = "PodKilled"
    NODE_LOST = "NodeLost"
    POD_CONFIGURATION = "PodConfiguration"

    # what the API server reports about our writes
    NAME_CONFLICT = "NameConflict"
    FORBIDDEN = "Forbidden"
    REJECTED = "Rejected"
    KIND_MISSING = "KindMissing"


class EventReason(StrEnum):
    """Events that mark a transition; what goes wrong is a Warning event under its `Reason`."""

    PLANNED = "Planned"
    MODEL_INSPECTED = "ModelInspected"
    FETCH_STARTED = "FetchStarted"
    FETCH_SUCCEEDED = "FetchSucceeded"
    EVICTION_STARTED = "EvictionStarted"
    CACHE_REPLACED = "CacheReplaced"
    QUANTIZATION_STARTED = "QuantizationStarted"
    QUANTIZATION_SUCCEEDED = "QuantizationSucceeded"
    ROLLOUT_STARTED = "RolloutStarted"
    ROLLOUT_COMPLETED = "RolloutCompleted"
    SCALED_UP = "ScaledUp"
    SCALED_DOWN = "ScaledDown"
    SCALED_TO_ZERO = "ScaledToZero"
    WOKE_UP = "WokeUp"
    SUSPENDED = "Suspended"
    PAUSED = "Paused"
    RESUMED = "Resumed"


@dataclass(frozen=True)
class Condition:
    """One finding; `status.py` gives it its observedGeneration and lastTransitionTime."""

    type: ConditionType
    status: Status
    reason: Reason
    message: str = ""


def from_termination(reason: str) -> Reason:
    """The condition reason of a container's `termination.Reason`. Done and drained are no failures: `InternalError` for them is a defect
    of the caller; an unknown value cannot come through `termination.parse`."""
    return Reason(reason)


def unique(conditions: Iterable[Condition]) -> dict[ConditionType, Condition]:
    """By type; two findings of one type are a defect."""
    found: dict[ConditionType, Condition] = {}
    for condition in conditions:
        assert condition.type not in found, f"two conditions of type {condition.type}"
        found[condition.type] = condition
    return found
