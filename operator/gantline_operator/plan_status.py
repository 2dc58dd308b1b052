"""`status.plan`: a plan written down, and read back unchanged, so that it can stand for as long as it should."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from gantline_runtime.config import EngineConfig
from gantline_runtime.errors import ConfigurationError
from gantline_runtime.sizing import MemoryEstimate

from gantline_operator.conditions import Reason
from gantline_operator.fields import SpecError, camel, parse_object
from gantline_operator.plan_types import Placement, Plan, Rejected, Requirement, Turned
from gantline_operator.resource import InferenceServiceSpec
from gantline_operator.resource_status import MemoryStatus, PlanStatus

__all__ = ["MAX_ROWS", "from_status", "rejected_status", "to_status"]

MAX_ROWS = 32
"""Rows that `status.plan.rejected` holds; a last row counts the others."""


def to_status(plan: Plan) -> dict[str, Any]:
    """The plan as JSON for `status.plan`."""
    engine, placement = plan.engine, plan.placement
    values: dict[str, Any] = {
        "inputs": plan.inputs,
        "backend": engine.backend,
        "device": engine.device,
        "image": placement.image,
        "tensorParallel": engine.tp,
        "dtype": engine.dtype,
        "precision": plan.precision,
        "quantize": plan.quantize,
        "sessionLen": engine.session_len,
        "maxBatchSize": engine.max_batch_size,
        "cacheBlocks": engine.num_cache_blocks,
        "resource": placement.resource,
        "count": placement.count,
        "product": plan.product,
        "nodeLabels": [{"key": label.key, "values": list(label.values)} for label in placement.node_labels],
        "tolerated": list(placement.tolerated),
        "memory": {camel(key): value for key, value in dataclasses.asdict(plan.memory).items()},
        "memoryBytes": placement.memory_bytes,
        "cpuMillis": placement.cpu_millis,
        "loadSeconds": int(plan.load_seconds),
        "calibration": plan.calibration or None,
        "waiting": placement.waiting,
        "rejected": _rows(plan.rejected),
    }
    return {key: value for key, value in values.items() if value is not None}


def rejected_status(rejected: Rejected) -> dict[str, Any]:
    """`status.plan` where there is none: only what was turned down."""
    return {"rejected": _rows(rejected.rejected)}


def _rows(rejected: Sequence[Turned]) -> list[dict[str, str]]:
    rows = [{"option": row.option[:256], "reason": row.reason.value, "message": row.message[:512]} for row in rejected]
    if len(rows) <= MAX_ROWS:
        return rows
    more = f"{len(rows) - MAX_ROWS + 1} more options"
    return [*rows[: MAX_ROWS - 1], {"option": more, "reason": rows[-1]["reason"], "message": "`gantline plan --cluster` lists them all."}]


def from_status(values: Mapping[str, Any], spec: InferenceServiceSpec) -> Plan | None:
    """The plan in `status.plan`; None where there is none, or one that another release wrote in a way that is not understood.

    What the spec says word for word (share of the cache, prefix reuse) comes from there; `Plan.inputs` tells whether it is that spec still.
    """
    try:
        status: PlanStatus = parse_object(PlanStatus, values, "status.plan")
        placement, engine, memory = _placement(status), _engine(status, spec), _memory(status.memory)
        rejected = tuple(Turned(row.option, Reason(row.reason), row.message or "") for row in status.rejected or ())
    except (SpecError, ConfigurationError, ValueError, TypeError):
        return None
    if placement is None or memory is None or not status.inputs or not status.precision or engine.session_len is None:
        return None
    return Plan(
        inputs=status.inputs,
        placement=placement,
        engine=engine,
        product=status.product or "",
        precision=status.precision,
        quantize=bool(status.quantize),
        memory=memory,
        load_seconds=float(status.load_seconds or 0),
        rejected=rejected,
        calibration=status.calibration or "",
    )


def _placement(status: PlanStatus) -> Placement | None:
    if not status.image or not status.memory_bytes or status.cpu_millis is None or status.resource is None:
        return None
    return Placement(
        image=status.image,
        resource=status.resource,
        count=status.count or 0,
        node_labels=tuple(Requirement(label.key, label.values) for label in status.node_labels or ()),
        memory_bytes=status.memory_bytes,
        cpu_millis=status.cpu_millis,
        waiting=bool(status.waiting),
        tolerated=status.tolerated or (),
    )


def _engine(status: PlanStatus, spec: InferenceServiceSpec) -> EngineConfig:
    """Raises ConfigurationError or TypeError where the status holds what no planner wrote."""
    return EngineConfig(
        backend=status.backend,  # type: ignore[arg-type]
        device=status.device,  # type: ignore[arg-type]
        dtype=status.dtype,  # type: ignore[arg-type]
        tp=status.tensor_parallel,  # type: ignore[arg-type]
        session_len=status.session_len,
        max_batch_size=status.max_batch_size,  # type: ignore[arg-type]
        cache_max_entry_count=spec.engine.cache_max_entry_count,
        num_cache_blocks=status.cache_blocks,
        enable_prefix_caching=spec.engine.enable_prefix_caching,
    )


def _memory(status: MemoryStatus | None) -> MemoryEstimate | None:
    values = {item.name: getattr(status, item.name, None) for item in dataclasses.fields(MemoryEstimate)}
    return None if None in values.values() else MemoryEstimate(**values)  # type: ignore[arg-type]
