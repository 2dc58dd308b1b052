"""What can be tried, and whether it fits: one precision on one shape of node with one tensor parallelism.

`assess` and `assess_cpu` answer for one such option: a `Candidate` with its numbers, or `Turned` with the reason. `plan.py` tries them in
order and chooses. All arithmetic is `gantline_runtime.sizing`'s, which the engine uses too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gantline_runtime import sizing
from gantline_runtime.config import DataType, EngineConfig
from gantline_runtime.model_facts import DTYPE_BYTES, ModelFacts
from gantline_runtime.sizing import GIB, MemoryEstimate

from gantline_operator.calibration import Calibration, Measurement, bounded_ratio, key_of
from gantline_operator.conditions import Reason
from gantline_operator.facts import NodeFacts
from gantline_operator.plan_types import Placement, Turned
from gantline_operator.quantities import parse_quantity
from gantline_operator.resource import InferenceServiceSpec
from gantline_operator.shapes import MIN_BFLOAT16, Shape, readable

__all__ = ["Candidate", "Variant", "assess", "assess_cpu", "gpu_host_memory", "wished"]

BLOCK_SIZE = EngineConfig.block_size
CPU_BATCH_SIZE = 32
"""Requests at once on a CPU; each further one slows all the others."""
CPU_USABLE_SHARE = 0.95
"""A pod over its limit is killed: a twentieth stays free."""
SESSION_SHARE = 0.9
"""Of the tokens that fit by the formula, what one session is promised: the engine refuses to start where its measured cache holds less."""

_HOST_BYTES = 3 * GIB  # of a server pod on a GPU node: the API process and the launcher
_HOST_BYTES_PER_RANK = 3 * GIB  # Python, torch and CUDA libraries are 2 GiB resident; the rest is read-ahead and NCCL's shared memory
_CPU_MILLIS_PER_PROCESS = 500  # a request, not a limit; small, so that two replicas start on a small node
_ROUND_TO = 64 << 20
_NOTHING_KNOWN = Calibration()


@dataclass(frozen=True)
class Variant:
    """The model in one precision. `facts` are those after quantization."""

    facts: ModelFacts
    quantize: bool

    def precision(self, dtype: str) -> str:
        quantization = self.facts.quantization
        return dtype if quantization is None else f"{quantization.method}{quantization.bits}"


@dataclass(frozen=True)
class Candidate:
    """An option that fits. `placeable`: replicas that could start now, None where that is unknown."""

    variant: Variant
    engine: EngineConfig
    placement: Placement
    memory: MemoryEstimate
    product: str
    placeable: int | None
    device_bytes: int
    measured: Measurement | None = None
    """What earlier starts of it took: `memory` goes by that."""

    @property
    def precision(self) -> str:
        return self.variant.precision(self.engine.dtype)

    @property
    def option(self) -> str:
        where = f"{self.placement.count} x {self.product}" if self.placement.resource else "CPU"
        return f"{where}, {self.precision}"


def wished(spec: InferenceServiceSpec, name: str) -> float | None:
    """The user's own amount of cpu (cores) or memory (bytes) for the server: the limit, else the request."""
    for amounts in (spec.pod.resources.limits, spec.pod.resources.requests):
        if amounts and name in amounts:
            return float(parse_quantity(amounts[name]))
    return None


def gpu_host_memory(tp: int) -> int:
    """Host memory of a server pod on a GPU node, in bytes."""
    return _HOST_BYTES + tp * _HOST_BYTES_PER_RANK


def assess(
    spec: InferenceServiceSpec, variant: Variant, shape: Shape, tp: int, calibration: Calibration = _NOTHING_KNOWN
) -> Candidate | Turned:
    """One precision on `tp` devices of one node of a shape."""
    dtype = _choose_dtype(spec, variant, shape)
    if dtype is None:
        option = f"{tp} x {shape.device.title}"
        return Turned(option, Reason.UNSUPPORTED_GPU, "it has no bfloat16, which engine.dtype asks for: that needs compute capability 8.0")
    option = f"{tp} x {shape.device.title}, {variant.precision(dtype)}"
    illegal = _illegal(variant, shape, tp)
    if illegal is not None:
        return replace(illegal, option=option)
    host = wished(spec, "memory") or gpu_host_memory(tp)
    slots = [slot for slot in shape.slots if slot.count >= tp]
    if not slots:
        return Turned(option, Reason.NO_MATCHING_GPU, f"no node has more than {shape.largest} of them")
    roomy = [slot for slot in slots if _has_room(slot.node, host)]
    if not roomy:
        largest = max(slot.node.memory_bytes for slot in slots)
        message = f"the pod needs {readable(host)} of host memory, and the nodes have {readable(largest)}"
        return Turned(option, Reason.MODEL_TOO_LARGE, message)
    measured = calibration.of(key_of(variant.facts.fingerprint, shape.device.product, tp, variant.precision(dtype), dtype))
    memory = _estimate(spec, variant, tp, dtype, shape.device.memory_bytes or 0, measured=measured)
    if not memory.fits:
        message = _too_large(spec, variant, memory, tp, shape.device.title)
        if _takes_whole_node(spec, variant, shape, tp):
            return Turned(option, Reason.NEEDS_SEVERAL_NODES, f"{message}; these are all of a node, {_nodes_needed(memory)}")
        return Turned(option, Reason.MODEL_TOO_LARGE, message)
    fixed = memory.capacity_tokens // BLOCK_SIZE if shape.device.replicas > 1 else None
    engine = _engine(spec, variant, tp, dtype, memory, fixed)
    return Candidate(
        variant=variant,
        engine=replace(engine, backend=shape.backend, device=shape.engine_device),
        placement=_gpu_placement(shape, tp),
        memory=memory,
        product=shape.device.product,
        placeable=replace(shape, slots=tuple(roomy)).placeable(tp),
        device_bytes=shape.device.memory_bytes or 0,
        measured=measured,
    )


def _choose_dtype(spec: InferenceServiceSpec, variant: Variant, shape: Shape) -> DataType | None:
    """None where the device lacks the type that was asked for."""
    lacks_bfloat16 = shape.device.vendor == "nvidia" and shape.device.compute < MIN_BFLOAT16
    asked: DataType = spec.engine.dtype  # type: ignore[assignment]
    if asked != "auto":
        return None if asked == "bfloat16" and lacks_bfloat16 else asked
    return "float16" if variant.facts.dtype == "bfloat16" and lacks_bfloat16 else variant.facts.dtype  # type: ignore[return-value]


def _illegal(variant: Variant, shape: Shape, tp: int) -> Turned | None:
    if tp > 1 and shape.device.sliced:
        return Turned("", Reason.ILLEGAL_TENSOR_PARALLEL, "MIG slices have no link to each other: tensor parallelism never spans them")
    if tp > 1 and shape.device.replicas > 1:
        return Turned("", Reason.ILLEGAL_TENSOR_PARALLEL, "time-sliced GPUs may be one and the same: tensor parallelism never spans them")
    reason = sizing.legal_tensor_parallel(variant.facts, tp)
    return None if reason is None else Turned("", Reason.ILLEGAL_TENSOR_PARALLEL, reason)


def _nodes_needed(memory: MemoryEstimate) -> str:
    """Workspace is needed on each device; weights and cache are shared out."""
    room = memory.usable - memory.workspace
    if room <= 0:
        return "and more of them would not help"
    return f"and it would take {max(2, math.ceil((memory.weights + memory.cache) / room))} such nodes"


def _takes_whole_node(spec: InferenceServiceSpec, variant: Variant, shape: Shape, tp: int) -> bool:
    """Whether `tp` devices are as many as the model can be split over on one node of the shape, and more than one."""
    more = [wider for wider in sizing.TENSOR_PARALLEL if tp < wider <= shape.largest and _illegal(variant, shape, wider) is None]
    return tp > 1 and not more and 2 * tp > shape.largest and spec.engine.tensor_parallel is None


def _has_room(node: NodeFacts, memory_bytes: float) -> bool:
    return node.memory_bytes == 0 or node.memory_bytes >= memory_bytes


def _required_tokens(spec: InferenceServiceSpec, facts: ModelFacts) -> int:
    session = spec.engine.session_len or min(facts.max_position_embeddings, sizing.TYPICAL_SESSION_LEN)
    return sizing.required_cache_tokens(session, spec.engine.max_batch_size or sizing.TYPICAL_CONCURRENCY)


def _estimate(
    spec: InferenceServiceSpec,
    variant: Variant,
    tp: int,
    dtype: str,
    device_bytes: int,
    *,
    cpu: bool = False,
    measured: Measurement | None = None,
) -> MemoryEstimate:
    batch = spec.engine.max_batch_size or (CPU_BATCH_SIZE if cpu else EngineConfig.max_batch_size)
    width, device = DTYPE_BYTES[dtype], "cpu" if cpu else "cuda"
    return sizing.estimate(
        variant.facts,
        tp=tp,
        session_len=_required_tokens(spec, variant.facts),
        concurrency=1,  # the tokens of all sessions together
        dtype_bytes=width,
        kv_bytes=width,
        gpu_memory_bytes=device_bytes,
        usable_share=CPU_USABLE_SHARE if cpu else sizing.USABLE_SHARE,
        workspace_bytes=_workspace(variant.facts, tp, width, batch, device, measured),
        cache_share=spec.engine.cache_max_entry_count,
    )


def _workspace(facts: ModelFacts, tp: int, dtype_bytes: int, max_batch_size: int, device: str, measured: Measurement | None) -> int:
    """Bytes beside weights and cache, by the formula, and where something is known by what was measured of it."""
    reserved = sizing.reserved_bytes(facts, tp=tp, dtype_bytes=dtype_bytes, max_batch_size=max_batch_size, device=device)
    context = sizing.context_bytes(tp, device)
    if measured is None:
        return context + reserved
    return math.ceil(context * bounded_ratio(measured, "context") + reserved * bounded_ratio(measured, "workspace"))


def _too_large(spec: InferenceServiceSpec, variant: Variant, memory: MemoryEstimate, tp: int, title: str) -> str:
    tokens = _required_tokens(spec, variant.facts)
    parts = f"{readable(memory.weights)} weights, {readable(memory.workspace)} workspace, {readable(memory.cache)} cache of {tokens} tokens"
    limit = f"of {readable(memory.usable)} usable"
    if memory.total <= memory.usable:
        limit += ", of which engine.cacheMaxEntryCount leaves less to the cache"
    return f"each of {tp} x {title} would need {readable(memory.total)} ({parts}) {limit}"


def _engine(
    spec: InferenceServiceSpec, variant: Variant, tp: int, dtype: DataType, memory: MemoryEstimate, cache_blocks: int | None
) -> EngineConfig:
    promised = int(memory.capacity_tokens * SESSION_SHARE) // BLOCK_SIZE * BLOCK_SIZE
    least = min(variant.facts.max_position_embeddings, sizing.TYPICAL_SESSION_LEN)
    return EngineConfig(
        dtype=dtype,
        tp=tp,
        session_len=spec.engine.session_len or min(variant.facts.max_position_embeddings, max(least, promised)),
        max_batch_size=spec.engine.max_batch_size or EngineConfig.max_batch_size,
        cache_max_entry_count=spec.engine.cache_max_entry_count,
        num_cache_blocks=cache_blocks,
        enable_prefix_caching=spec.engine.enable_prefix_caching,
    )


def _gpu_placement(shape: Shape, tp: int) -> Placement:
    return Placement(
        image=shape.image,
        resource=shape.device.resource,
        count=tp,
        node_labels=shape.node_labels,
        memory_bytes=gpu_host_memory(tp),
        cpu_millis=1000 + 1000 * tp,
        waiting=False,
        tolerated=(shape.device.resource,),
    )


def assess_cpu(
    spec: InferenceServiceSpec, variant: Variant, nodes: Sequence[NodeFacts], nodes_known: bool, calibration: Calibration = _NOTHING_KNOWN
) -> Candidate | Turned:
    """One precision on CPUs. The pod's memory is the user's, or what the plan needs; the cache has a fixed size either way."""
    tp = spec.engine.tensor_parallel or 1
    dtype: DataType = "float32" if spec.engine.dtype == "auto" else spec.engine.dtype  # type: ignore[assignment]
    option = f"CPU, {variant.precision(dtype)}"
    illegal = sizing.legal_tensor_parallel(variant.facts, tp)
    if illegal is not None:
        return Turned(f"{option}, {tp} processes", Reason.ILLEGAL_TENSOR_PARALLEL, illegal)
    measured = calibration.of(key_of(variant.facts.fingerprint, "", tp, variant.precision(dtype), dtype))
    pod_bytes = int(wished(spec, "memory") or 0) or _pod_bytes(spec, variant, tp, dtype, measured)
    memory = _estimate(spec, variant, tp, dtype, pod_bytes // tp, cpu=True, measured=measured)
    if not memory.fits:
        return Turned(option, Reason.MODEL_TOO_LARGE, _too_large(spec, variant, memory, tp, "process"))
    largest = max((node.memory_bytes for node in nodes), default=0)
    if nodes_known and not any(_has_room(node, pod_bytes) for node in nodes):
        return Turned(option, Reason.MODEL_TOO_LARGE, f"the pod needs {readable(pod_bytes)}, and the largest node has {readable(largest)}")
    engine = _engine(spec, variant, tp, dtype, memory, memory.capacity_tokens // BLOCK_SIZE)
    cores = wished(spec, "cpu")
    return Candidate(
        variant=variant,
        engine=replace(engine, backend="torch", device="cpu", max_batch_size=spec.engine.max_batch_size or CPU_BATCH_SIZE),
        placement=Placement("cpu", "", 0, (), pod_bytes, int(cores * 1000) if cores else tp * _CPU_MILLIS_PER_PROCESS, False),
        memory=memory,
        product="",
        placeable=None,
        device_bytes=pod_bytes,
        measured=measured,
    )


def _pod_bytes(spec: InferenceServiceSpec, variant: Variant, tp: int, dtype: str, measured: Measurement | None) -> int:
    """Memory with which the estimate fits, of all processes together, in whole steps of 64 MiB."""
    need = _estimate(spec, variant, tp, dtype, 0, cpu=True, measured=measured)
    beside = need.weights + need.workspace
    each = max((beside + need.cache) / CPU_USABLE_SHARE, beside + need.cache / spec.engine.cache_max_entry_count)
    return math.ceil((each + BLOCK_SIZE * need.cache_bytes_per_token) * tp / _ROUND_TO) * _ROUND_TO
